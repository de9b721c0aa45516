// The inputs of attention while a context computes; filters are calibrated from them. UNSTABLE: this depends on how
// upstream names the nodes of its graphs, and may change with every version.
#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// one call of attention, for llama_context_params.cb_eval with Flash Attention on
struct llama_qfilter_attn {
    int32_t il;        // the layer whose cached keys are attended
    int32_t head_dim;
    int32_t n_head;
    int32_t n_tokens;  // queries, in the order of the batch
    int32_t n_head_kv;
    int32_t n_kv;      // cells; the last ones may be empty
    float   kq_scale;  // factor of <q, k> before the softmax
    float   softcap;   // of the logits: c*tanh(x/c), 0: none
    int32_t n_embd_v;  // head_dim of V
};

// false: not the attention of a single sequence over a KV cache
LLAMA_API bool llama_qfilter_attn_of(const struct ggml_tensor * t, struct llama_qfilter_attn * attn);

// reads an input of attention after t has been computed. i = 0: the queries [n_head][n_tokens][head_dim],
// 1: the cached keys [n_head_kv][n_kv][head_dim], 2: the cached values [n_head_kv][n_kv][n_embd_v]
LLAMA_API void llama_qfilter_attn_get(const struct ggml_tensor * t, int32_t i, float * out);

// how RoPE turns the queries of a context's layers. make it before the context decodes, and free it before the context
struct llama_qfilter_ropes;

LLAMA_API struct llama_qfilter_ropes * llama_qfilter_ropes_init(struct llama_context * ctx);

LLAMA_API void llama_qfilter_ropes_free(struct llama_qfilter_ropes * ropes);

// undoes RoPE: queries after it -> queries before it. x: [n_pos][n_rows][head_dim] of layer il, changed in place
// returns false if the graph changes the queries again after RoPE, or does not show how RoPE turns them
LLAMA_API bool llama_qfilter_ropes_back(
        const struct llama_qfilter_ropes * ropes,
                           int32_t   il,
                   const llama_pos * pos,
                           int64_t   n_pos,
                           int64_t   n_rows,
                             float * x);

#ifdef __cplusplus
}
#endif
