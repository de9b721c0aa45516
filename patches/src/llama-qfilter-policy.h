#pragma once

#include "qfilter.h"

#include "ggml.h"

// what a policy needs of the model's file
enum llama_qfilter_needs {
    LLAMA_QFILTER_NEEDS_NOTHING,
    LLAMA_QFILTER_NEEDS_FILTERS,
    LLAMA_QFILTER_NEEDS_QUERIES, // before RoPE
    LLAMA_QFILTER_NEEDS_EITHER,  // queries, or filters if there are none
    LLAMA_QFILTER_NEEDS_MOMENTS,
};

// how the rows of a policy are scored: one of the two functions, large = keep
struct llama_qfilter_policy_info {
    llama_qfilter_policy policy;
    const char *         name;
    llama_qfilter_needs  needs;

    // from the keys, on their device
    //   k: cached keys   [n_embd_head_k, n_head, n_rows] F32, in the order of their positions
    //   v: cached values [n_embd_head_v, n_head, n_rows] F32, computed if the function uses them
    //   f: filters       [n_embd_head_k, 1,     1,          n_head] F32,
    //      or moments    [n_embd_head_k, n_rep, 1 + n_rank, n_head] F32 (see there), or nullptr
    //   returns          [n_rows, n_head] F32
    ggml_tensor * (*score)(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f);

    // from where the key is, on the host
    float (*score_pos)(uint32_t seed, uint32_t il, uint32_t ih, llama_pos pos);
};

// throws std::runtime_error if there is no such policy
const llama_qfilter_policy_info & llama_qfilter_policy_get(int32_t policy);
