#include "llama-qfilter-vectors.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

// the tensor that node i of a graph uses as t. if t is a copy on another device, see ggml_backend_sched_split_graph(), this is
// the last node before i with the copied name (names are repeated in every layer), or the leaf with that name
static const ggml_tensor * llama_qfilter_original(ggml_cgraph * gf, int i, const ggml_tensor * t) {
    const std::string name = t->name;

    const size_t i0 = name.find('#');
    if (t->op != GGML_OP_NONE || i0 == std::string::npos) {
        return t;
    }

    // a copy is named "DEVICE#NAME#NUMBER"; the end is cut off if it is too long
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

    // go back from the queries to their RoPE, or to the weights that they are projected with
    const ggml_tensor * t = ggml_graph_node(gf, i)->src[0];

    bool is_last = true; // after t, the queries are only scaled: attention sees the direction of t

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
                is_last = is_last && t->src[1]->ne[0] == 1; // a scale with one number per query
                break;
            case GGML_OP_ADD:
            case GGML_OP_NORM:
            case GGML_OP_CLAMP:
                is_last = false;
                break;
            case GGML_OP_MUL_MAT:
                // the rotation of a quantized cache, which is applied to the filters, too: see llama_qfilter_rotation::apply()
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
        return true; // no RoPE in this layer
    }

    auto pos_all = positions(back, pos, n_pos);

    std::vector<uint8_t> mem(8*ggml_tensor_overhead() + ggml_graph_overhead_custom(4, false));

    ggml_context_ptr ctx(ggml_init({ mem.size(), mem.data(), true }));

    ggml_tensor * a = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd_head, n_rows, n_pos);
    ggml_tensor * b = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, pos_all.size());
    ggml_tensor * c = factors.empty() ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, factors.size());

    ggml_tensor * res = build(ctx.get(), a, b, c, back);

    std::vector<float> out(ggml_nelements(a));

    a->data   = x;
    b->data   = pos_all.data();
    res->data = out.data();
    if (c) {
        c->data = const_cast<float *>(factors.data());
    }

    auto * gf = ggml_new_graph_custom(ctx.get(), 4, false);
    ggml_build_forward_expand(gf, res);

    // a graph of one node runs to its end even if it is aborted
    const auto status = ggml_backend_graph_compute(backend_cpu, gf);
    if (status != GGML_STATUS_SUCCESS && status != GGML_STATUS_ABORTED) {
        return false;
    }

    std::copy(out.begin(), out.end(), x);

    return true;
}

ggml_tensor * llama_qfilter_rope::build(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, bool back) const {
    int sections[GGML_MROPE_SECTIONS];
    memcpy(sections, op_params + 11, sizeof(sections));

    ggml_tensor * res = ggml_rope_multi(ctx, a, b, c, op_params[1], sections, op_params[2], 0, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f);

    memcpy(res->op_params, op_params, sizeof(op_params));

    if (back) {
        // RoPE multiplied by attn_factor*yarn. divide by that, and by the yarn that this op will multiply by once more
        float freq_scale, ext_factor, attn_factor;
        memcpy(&freq_scale,  op_params + 6, sizeof(float));
        memcpy(&ext_factor,  op_params + 7, sizeof(float));
        memcpy(&attn_factor, op_params + 8, sizeof(float));

        const float yarn = ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;

        attn_factor = 1.0f/(attn_factor*yarn*yarn);
        memcpy(res->op_params + 8, &attn_factor, sizeof(float));
    }

    return res;
}

std::vector<int32_t> llama_qfilter_rope::positions(bool back, const llama_pos * pos, int64_t n_pos) const {
    // text has the same position three times, see llm_graph_input_pos::set_input()
    const bool is_multi = op_params[2] & GGML_ROPE_TYPE_MROPE;

    std::vector<int32_t> res((is_multi ? 4 : 1)*n_pos, 0);

    for (int64_t i = 0; i < (is_multi ? 3 : 1)*n_pos; ++i) {
        res[i] = back ? -pos[i % n_pos] : pos[i % n_pos]; // all devices support RoPE, few of them its inverse op
    }

    return res;
}

bool llama_qfilter_rope::operator==(const llama_qfilter_rope & other) const {
    return n_embd_head == other.n_embd_head && factors == other.factors &&
        (n_embd_head == 0 || memcmp(op_params, other.op_params, sizeof(op_params)) == 0);
}

//
// llama_qfilter_vector_store
//

// queries are expected at the next AHEAD positions; every STEP-th of them is used
static const uint32_t LLAMA_QFILTER_AHEAD      = 256;
static const uint32_t LLAMA_QFILTER_AHEAD_STEP = 16;

static const char * const LLAMA_QFILTER_KIND_NAMES[] = { "filters", "queries", "moments" };

uint64_t llama_qfilter_hash(uint64_t hash, const void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i])*0x100000001b3ull;
    }
    return hash;
}

const llama_qfilter_vectors * llama_qfilter_find(const llama_qfilter_params & params, int32_t kind, int32_t il) {
    for (uint32_t i = 0; i < params.n_vectors; ++i) {
        if (params.vectors[i].kind == kind && params.vectors[i].il == il) {
            return &params.vectors[i];
        }
    }
    return nullptr;
}

void llama_qfilter_vector_store::load(
        const llama_qfilter_policy_info        & policy,
        const llama_qfilter_params             & params,
        const std::vector<llama_qfilter_layer> & layers,
              llama_qfilter_rotation             rotation) {
    this->rotation = rotation;

    if (!policy.score) {
        hash = llama_qfilter_hash(hash, &params.seed, sizeof(params.seed));
    }
    if (policy.needs[0] < 0) {
        return;
    }

    if (params.n_vectors > 0 && !params.vectors) {
        throw std::runtime_error("n_vectors without vectors");
    }

    // the best kind that all layers have; if there is none, the error names the last kind
    const llama_qfilter_layer * lacks = nullptr;

    for (int i = 0; policy.needs[i] >= 0; ++i) {
        kind = policy.needs[i];

        const auto it = std::find_if(layers.begin(), layers.end(), [&](const auto & layer) {
            return !llama_qfilter_find(params, kind, layer.il);
        });
        lacks = it == layers.end() ? nullptr : &*it;

        if (!lacks) {
            break;
        }
    }
    const char * name = LLAMA_QFILTER_KIND_NAMES[kind];

    if (lacks) {
        throw std::runtime_error(format("layer %d has no %s, which policy %s needs", lacks->il, name, policy.name));
    }

    if (turns()) {
        hash = llama_qfilter_hash(hash, "queries", 7);
    }

    data.resize(layers.size());

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & layer = layers[i];
        const auto & src   = *llama_qfilter_find(params, kind, layer.il);

        const uint32_t n_unit = layer.n_head*(kind == LLAMA_QFILTER_KIND_MOMENTS ? layer.n_rep : 1);

        if (kind == LLAMA_QFILTER_KIND_MOMENTS && i == 0) {
            rank = std::max(src.n_rows/n_unit, 1u) - 1;
            if (rank == 0) {
                throw std::runtime_error(format("policy %s needs moments of rank 1 at least", policy.name));
            }
        }

        if (!src.data || src.n_embd != layer.n_embd_k || src.n_rows != n_unit*(1 + rank)) {
            throw std::runtime_error(format("the %s of layer %d are %u rows of %u numbers, the model needs %u of %u",
                        name, layer.il, src.n_rows, src.n_embd, n_unit*(1 + rank), layer.n_embd_k));
        }

        const size_t n_embd = src.n_embd;
        const size_t n      = src.n_rows*n_embd;

        float sum = 0.0f;
        for (size_t j = 0; j < n; ++j) {
            sum += fabsf(src.data[j]);
        }
        if (!std::isfinite(sum)) {
            throw std::runtime_error(format("the %s of layer %d have values that are not finite", name, layer.il));
        }

        hash = llama_qfilter_hash(hash, src.data, n*sizeof(float));

        auto & dst = data[i];
        dst.assign(src.data, src.data + n);

        if (kind == LLAMA_QFILTER_KIND_MOMENTS) {
            // for each KV head, put the first rows of its query heads together, see llama_qfilter_score_qfilters2()
            const size_t n_group = layer.n_rep*(1 + rank);

            for (size_t j = 0; j < src.n_rows; ++j) {
                const size_t ir = j % n_group/(1 + rank);
                const size_t ij = j % (1 + rank);
                const size_t to = ij == 0 ? ir : layer.n_rep + ir*rank + ij - 1;

                memcpy(&dst[(j/n_group*n_group + to)*n_embd], src.data + j*n_embd, n_embd*sizeof(float));
            }
        }

        if (!turns()) {
            rotation.apply(dst.data(), n);
        }
    }
}

void llama_qfilter_vector_store::init_ropes(llama_context * lctx, const std::vector<llama_qfilter_layer> & layers) {
    if (!turns()) {
        return;
    }

    ropes.resize(layers.size());

    for (size_t i = 0; i < layers.size(); ++i) {
        if (!ropes[i].init(lctx, layers[i].il)) {
            throw std::runtime_error(format("the graph does not show how RoPE turns the queries of layer %d: "
                        "use a policy that needs no queries", layers[i].il));
        }

        auto it = std::find_if(same.begin(), same.end(), [&](const auto & is) { return ropes[is[0]] == ropes[i]; });
        if (it == same.end()) {
            it = same.insert(same.end(), { {} });
        }
        it->push_back(i);
    }
}

void llama_qfilter_vector_store::shape(const llama_qfilter_layer & layer, int64_t ne[4]) const {
    ne[0] = layer.n_embd_k;
    ne[1] = kind == LLAMA_QFILTER_KIND_MOMENTS ? layer.n_rep : 1;
    ne[2] = 1 + rank;
    ne[3] = layer.n_head;
}

void llama_qfilter_rotation::apply(float * x, size_t n) const {
    if (n_rot == 0) {
        return;
    }

    const std::vector<float> plain(x, x + n);

    for (size_t i = 0; i < n; ++i) {
        const size_t i0 = i/n_rot*n_rot;

        float cur = 0.0f;
        for (size_t j = 0; j < n_rot; ++j) {
            cur += (*matrix)[(i - i0)*n_rot + j]*plain[i0 + j];
        }
        x[i] = cur;
    }
}

bool llama_qfilter_vector_store::set(const std::vector<llama_qfilter_layer> & layers, llama_pos pos) const {
    if (!turns()) {
        for (size_t i = 0; i < data.size(); ++i) {
            ggml_backend_tensor_set(layers[i].vectors, data[i].data(), 0, ggml_nbytes(layers[i].vectors));
        }
        return true;
    }

    // the mean of the queries turned to the positions ahead
    std::vector<llama_pos> ahead;
    for (uint32_t i = 0; i < LLAMA_QFILTER_AHEAD; i += LLAMA_QFILTER_AHEAD_STEP) {
        ahead.push_back(pos + i);
    }

    for (const auto & is : same) {
        std::vector<float> plain;
        for (const size_t i : is) {
            plain.insert(plain.end(), data[i].begin(), data[i].end());
        }

        std::vector<float> turned;
        for (size_t i = 0; i < ahead.size(); ++i) {
            turned.insert(turned.end(), plain.begin(), plain.end());
        }

        if (!ropes[is[0]].turn(false, ahead.data(), ahead.size(), plain.size()/layers[is[0]].n_embd_k, turned.data())) {
            return false;
        }

        std::vector<float> mean(plain.size(), 0.0f);
        for (size_t i = 0; i < turned.size(); ++i) {
            mean[i % mean.size()] += turned[i]/ahead.size();
        }

        float * x = mean.data();
        for (const size_t i : is) {
            rotation.apply(x, data[i].size());
            ggml_backend_tensor_set(layers[i].vectors, x, 0, ggml_nbytes(layers[i].vectors));

            x += data[i].size();
        }
    }

    return true;
}
