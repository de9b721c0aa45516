// the inputs of attention while a context computes; filters are calibrated from them

#include "qfilter-calibration.h"

#include "llama-qfilter-vectors.h"

#include "llama-context.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

// the layer whose rows a tensor holds. upstream names the cache of layer 7 "cache_k_l7", see llama-kv-cache.cpp. a view points
// to that tensor; a copy on another device has a name that contains it
int32_t llama_qfilter_layer_of(const ggml_tensor * k) {
    static const char prefix[] = "cache_k_l";

    for (const ggml_tensor * t : { (const ggml_tensor *) k->view_src, k, (const ggml_tensor *) k->src[0] }) {
        const char * name = t ? strstr(t->name, prefix) : nullptr;
        if (name) {
            return atoi(name + strlen(prefix));
        }
    }

    return -1;
}

// q: [head_dim, n_tokens, n_head], k: [head_dim, n_kv, n_head_kv], see llm_graph_context::build_attn_mha()
bool llama_qfilter_attn_of(const ggml_tensor * t, llama_qfilter_attn * attn) {
    if (t->op != GGML_OP_FLASH_ATTN_EXT) {
        return false;
    }

    const ggml_tensor * q = t->src[0];
    const ggml_tensor * k = t->src[1];

    const int32_t il = llama_qfilter_layer_of(k);
    if (il < 0 || q->ne[3] != 1 || q->ne[0] != k->ne[0]) {
        return false;
    }

    attn->il        = il;
    attn->head_dim  = q->ne[0];
    attn->n_head    = q->ne[2];
    attn->n_tokens  = q->ne[1];
    attn->n_head_kv = k->ne[2];
    attn->n_kv      = k->ne[1];

    attn->n_embd_v  = t->src[2]->ne[0];

    memcpy(&attn->kq_scale, (const float *) t->op_params,     sizeof(float));
    memcpy(&attn->softcap,  (const float *) t->op_params + 2, sizeof(float));

    return true;
}

void llama_qfilter_attn_get(const ggml_tensor * t, int32_t i, float * out) {
    const ggml_tensor * src = t->src[i];

    std::vector<char> buf;

    const char * data = (const char *) src->data;
    if (!ggml_backend_buffer_is_host(src->view_src ? src->view_src->buffer : src->buffer)) {
        buf.resize(ggml_nbytes(src));
        ggml_backend_tensor_get(src, buf.data(), 0, buf.size());
        data = buf.data();
    }

    const auto to_float = ggml_get_type_traits(src->type)->to_float;

    for (int64_t i2 = 0; i2 < src->ne[2]; ++i2) {
        for (int64_t i1 = 0; i1 < src->ne[1]; ++i1) {
            const char * row = data + i2*src->nb[2] + i1*src->nb[1];

            if (src->type == GGML_TYPE_F32) {
                memcpy(out, row, src->ne[0]*sizeof(float));
            } else {
                to_float(row, out, src->ne[0]);
            }
            out += src->ne[0];
        }
    }
}

struct llama_qfilter_ropes {
    std::map<int32_t, llama_qfilter_rope> layers; // only layers whose queries can be turned back
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
