#include "llama-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

// what node i of a graph uses: the tensor itself, or for its copy on another device, see ggml_backend_sched_split_graph(), the
// node before i that was copied. names of nodes come back in every layer
static const ggml_tensor * llama_qfilter_original(ggml_cgraph * gf, int i, const ggml_tensor * t) {
    const std::string name = t->name;

    const size_t i0 = name.find('#');
    if (t->op != GGML_OP_NONE || i0 == std::string::npos) {
        return t;
    }

    // "DEVICE#NAME#NUMBER", cut at the end if it is too long
    const size_t i1 = name.size() + 1 < GGML_MAX_NAME ? name.rfind('#') : name.size();

    const std::string original = name.substr(i0 + 1, i1 - i0 - 1);

    for (int j = i - 1; j >= 0; --j) {
        const ggml_tensor * node = ggml_graph_node(gf, j);

        if (i1 < name.size() ? original == node->name : strncmp(original.c_str(), node->name, original.size()) == 0) {
            return node;
        }
    }

    const auto * leaf = ggml_graph_get_tensor(gf, original.c_str());

    return leaf ? leaf : t;
}

static int llama_qfilter_index_of(ggml_cgraph * gf, const ggml_tensor * t) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (ggml_graph_node(gf, i) == t) {
            return i;
        }
    }
    return -1;
}

bool llama_qfilter_rope::init(llama_context * lctx, int32_t il) {
    auto * sched = lctx->get_sched();
    auto * gf    = lctx->get_gf_res_reserve()->get_gf();

    backend_cpu = ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1);

    int i = 0;
    while (i < ggml_graph_n_nodes(gf)) {
        const ggml_tensor * node = ggml_graph_node(gf, i);

        if (node->op == GGML_OP_FLASH_ATTN_EXT && llama_qfilter_layer_of(node->src[1]) == il) {
            break;
        }
        i++;
    }
    if (i == ggml_graph_n_nodes(gf)) {
        return false;
    }

    const int64_t n_embd = ggml_graph_node(gf, i)->src[0]->ne[0];

    // from the queries back to their RoPE, or to the weights that project to them
    const ggml_tensor * t = ggml_graph_node(gf, i)->src[0];

    bool is_last = true; // what attention sees has the direction of t

    while (true) {
        t = llama_qfilter_original(gf, i, t);
        i = llama_qfilter_index_of(gf, t);

        if (i < 0) {
            return false;
        }
        if (t->op == GGML_OP_ROPE) {
            break;
        }

        switch (t->op) {
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_CONT:
            case GGML_OP_SCALE:
            case GGML_OP_L2_NORM:
            case GGML_OP_RMS_NORM:
                break;
            case GGML_OP_MUL:
                is_last = is_last && t->src[1]->ne[0] == 1; // by one number per query
                break;
            case GGML_OP_ADD:
            case GGML_OP_NORM:
            case GGML_OP_CLAMP:
                is_last = false;
                break;
            case GGML_OP_MUL_MAT:
                // what turns the rows of a quantized cache turns the filters, too: see llama_qfilter::rotate_rows()
                if (t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD) {
                    t = t->src[1];
                    continue;
                }
                return true; // no RoPE in this layer
            default:
                return false;
        }

        t = t->src[0];
    }

    if (!is_last || t->ne[0] != n_embd) {
        return false;
    }

    memcpy(op_params, t->op_params, sizeof(op_params));

    if (t->src[2]) {
        const ggml_tensor * c = llama_qfilter_original(gf, i, t->src[2]);
        if (!c->buffer || !c->data) {
            return false;
        }
        factors.resize(c->ne[0]);
        ggml_backend_tensor_get(c, factors.data(), 0, ggml_nbytes(c));
    }

    n_embd_head = t->ne[0];

    return true;
}

bool llama_qfilter_rope::turn(bool back, const llama_pos * pos, int64_t n_pos, int64_t n_rows, float * x) const {
    if (n_embd_head == 0) {
        return true; // no RoPE
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

    // a graph of one node has run in full even if it was aborted
    const auto status = ggml_backend_graph_compute(backend_cpu, gf);
    if (status != GGML_STATUS_SUCCESS && status != GGML_STATUS_ABORTED) {
        return false;
    }

    std::copy(out.begin(), out.end(), x);

    return true;
}

bool llama_qfilter_rope::operator==(const llama_qfilter_rope & other) const {
    return n_embd_head == other.n_embd_head && factors == other.factors &&
        (n_embd_head == 0 || memcmp(op_params, other.op_params, sizeof(op_params)) == 0);
}

//
// C API
//

struct llama_qfilter_ropes {
    std::map<int32_t, llama_qfilter_rope> layers; // those that can be turned
};

llama_qfilter_ropes * llama_qfilter_ropes_init(llama_context * ctx) {
    auto * ropes = new llama_qfilter_ropes;

    for (int32_t il = 0; il < (int32_t) ctx->get_model().hparams.n_layer(); ++il) {
        llama_qfilter_rope rope;

        if (rope.init(ctx, il)) {
            ropes->layers[il] = std::move(rope);
        }
    }

    return ropes;
}

void llama_qfilter_ropes_free(llama_qfilter_ropes * ropes) {
    delete ropes;
}

bool llama_qfilter_ropes_back(
        const llama_qfilter_ropes * ropes, int32_t il, const llama_pos * pos, int64_t n_pos, int64_t n_rows, float * x) {
    const auto it = ropes->layers.find(il);

    return it != ropes->layers.end() && it->second.turn(true, pos, n_pos, n_rows, x);
}
