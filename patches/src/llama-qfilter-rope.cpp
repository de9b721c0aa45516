#include "llama-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// what the scheduler copied to another device, see ggml_backend_sched_split_graph(): "DEVICE#NAME#NUMBER"
static const ggml_tensor * llama_qfilter_original(ggml_cgraph * gf, const ggml_tensor * t) {
    const std::string name = t->name;

    const size_t i0 = name.find('#');
    const size_t i1 = name.rfind('#');

    if (t->op != GGML_OP_NONE || i0 == i1) {
        return t;
    }

    const std::string original = name.substr(i0 + 1, i1 - i0 - 1);

    for (int i = ggml_graph_n_nodes(gf) - 1; i >= 0; --i) {
        if (original == ggml_graph_node(gf, i)->name) {
            return ggml_graph_node(gf, i);
        }
    }

    const auto * leaf = ggml_graph_get_tensor(gf, original.c_str());

    return leaf ? leaf : t;
}

// does attention see vectors of the same direction where t is computed from its first input?
static bool llama_qfilter_keeps_direction(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_CONT:
        case GGML_OP_SCALE:
        case GGML_OP_L2_NORM:
        case GGML_OP_RMS_NORM:
            return true;
        case GGML_OP_MUL:
            return t->src[1]->ne[0] == 1; // one number per token
        default:
            return false;
    }
}

bool llama_qfilter_rope::init(llama_context * lctx, int32_t il) {
    auto * sched = lctx->get_sched();
    auto * gf    = lctx->get_gf_res_reserve()->get_gf();

    backend_cpu = ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1);

    const ggml_tensor * attn = nullptr;
    for (int i = 0; i < ggml_graph_n_nodes(gf) && !attn; ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);

        if (t->op == GGML_OP_FLASH_ATTN_EXT && llama_qfilter_layer_of(llama_qfilter_original(gf, t->src[1])) == il) {
            attn = t;
        }
    }
    if (!attn) {
        return false;
    }

    // from the queries back to their RoPE, or to the weights that project to them
    const ggml_tensor * t = llama_qfilter_original(gf, attn->src[0]);

    bool is_last = true;

    while (t && t->op != GGML_OP_ROPE) {
        if (t->op == GGML_OP_MUL_MAT) {
            // that of a quantized cache, see llama_kv_cache::build_input_k_rot(), is its own business
            const bool is_rot = t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD;
            if (!is_rot) {
                return true;
            }
            t = t->src[1];
        } else {
            is_last = is_last && llama_qfilter_keeps_direction(t);
            t = t->src[0];
        }
        t = t ? llama_qfilter_original(gf, t) : nullptr;
    }

    if (!t || !is_last || t->ne[0] != attn->src[0]->ne[0]) {
        return false;
    }

    memcpy(op_params, t->op_params, sizeof(op_params));

    if (t->src[2]) {
        const ggml_tensor * c = llama_qfilter_original(gf, t->src[2]);
        if (!c->buffer) {
            return false;
        }
        factors.resize(c->ne[0]);
        ggml_backend_tensor_get(c, factors.data(), 0, ggml_nbytes(c));
    }

    n_embd_head = t->ne[0];

    return true;
}

void llama_qfilter_rope::turn(bool back, const llama_pos * pos, int64_t n_pos, int64_t n_rows, float * x) const {
    if (n_embd_head == 0) {
        return; // no RoPE
    }

    const int  mode     = op_params[2];
    const bool is_multi = mode & GGML_ROPE_TYPE_MROPE;

    // text has the same position three times, see llm_graph_input_pos::set_input()
    std::vector<int32_t> pos_all(pos, pos + n_pos);
    for (int i = 1; is_multi && i < 4; ++i) {
        pos_all.resize(pos_all.size() + n_pos, 0);
        if (i < 3) {
            std::copy(pos, pos + n_pos, pos_all.end() - n_pos);
        }
    }

    std::vector<uint8_t> mem(8*ggml_tensor_overhead() + ggml_graph_overhead_custom(4, false));

    ggml_context_ptr ctx(ggml_init({ mem.size(), mem.data(), true }));

    ggml_tensor * a = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd_head, n_rows, n_pos);
    ggml_tensor * b = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, pos_all.size());
    ggml_tensor * c = factors.empty() ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, factors.size());

    int sections[GGML_MROPE_SECTIONS];
    memcpy(sections, op_params + 11, sizeof(sections));

    ggml_tensor * res = ggml_rope_multi(ctx.get(), a, b, c, op_params[1], sections, mode, 0, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f);

    memcpy(res->op_params, op_params, sizeof(op_params));

    if (back) {
        res->op = GGML_OP_ROPE_BACK;

        // that op is the transposed one: what RoPE scales is to be divided, and YaRN scales by itself
        float freq_scale, ext_factor, attn_factor;
        memcpy(&freq_scale,  op_params + 6, sizeof(float));
        memcpy(&ext_factor,  op_params + 7, sizeof(float));
        memcpy(&attn_factor, op_params + 8, sizeof(float));

        const float yarn = ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;

        attn_factor = 1.0f/(attn_factor*yarn*yarn);
        memcpy(res->op_params + 8, &attn_factor, sizeof(float));
    }

    std::vector<float> out(ggml_nelements(a));

    a->data   = x;
    b->data   = pos_all.data();
    res->data = out.data();
    if (c) {
        c->data = const_cast<float *>(factors.data());
    }

    auto * gf = ggml_new_graph_custom(ctx.get(), 4, false);
    ggml_build_forward_expand(gf, res);

    ggml_backend_graph_compute(backend_cpu, gf); // one node, so it has run in full even if it was aborted

    std::copy(out.begin(), out.end(), x);
}

bool llama_qfilter_rope_back(llama_context * ctx, int32_t il, const llama_pos * pos, int64_t n_pos, int64_t n_rows, float * x) {
    llama_qfilter_rope rope;

    if (!rope.init(ctx, il)) {
        return false;
    }
    rope.turn(true, pos, n_pos, n_rows, x);

    return true;
}
