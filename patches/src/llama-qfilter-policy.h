#pragma once

#include "qfilter.h"

#include "ggml.h"

// how the rows of a policy are scored: one of the two functions, large = keep
struct llama_qfilter_policy_info {
    llama_qfilter_policy policy;
    const char *         name;
    int32_t              needs[3]; // enum llama_qfilter_kind, best first, -1 after the last: see llama_qfilter_policy_needs()

    // is what learned filters say of a row added, both less their mean over the candidates and divided by their deviation?
    bool learned;

    // from the keys, on their device
    //   k: cached keys   [n_embd_head_k, n_head, n_rows] F32, in the order of their positions
    //   v: cached values [n_embd_head_v, n_head, n_rows] F32, computed if the function uses them
    //   f: filters       [n_embd_head_k, 1,     1,          n_head] F32,
    //      or moments    [n_embd_head_k, n_rep, 1 + n_rank, n_head] F32 (see there), or nullptr
    //   returns          [n_rows, n_head] F32
    ggml_tensor * (*score)(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f);

    // from where the key is, on the host
    float (*score_pos)(uint32_t seed, uint32_t il, uint32_t ih, llama_pos pos);};

// nullptr if there is no such policy
const llama_qfilter_policy_info * llama_qfilter_policy_find(int32_t policy);
