#pragma once

#include "qfilter.h"

#include "ggml.h"

#include <vector>

// how a policy scores rows: with score or score_pos, large = keep. if it has neither, the newest rows stay
struct llama_qfilter_policy_info {
    llama_qfilter_policy policy;
    const char *         name;
    int32_t              needs[3]; // enum llama_qfilter_kind, best first, -1 after the last: see llama_qfilter_policy_needs()

    // is the score of learned filters added? both scores are standardized over the candidates first
    bool learned;

    // computes scores from cached keys and values, on their device
    //   k: cached keys   [n_embd_head_k, n_head, n_rows] F32, in the order of their positions
    //   v: cached values [n_embd_head_v, n_head, n_rows] F32, only computed if the function uses them
    //   f: filters       [n_embd_head_k, 1,     1,          n_head] F32,
    //      or moments    [n_embd_head_k, n_rep, 1 + n_rank, n_head] F32 (see there), or nullptr
    //   returns          [n_rows, n_head] F32: one score, or the parts that llama_qfilter_blend() makes one score of
    std::vector<ggml_tensor *> (*score)(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f);

    // a faster version for the CPU, or nullptr: there is none
    //   k, v: cached keys and values as stored, [n_embd_head*n_head, n_cells]
    //   idx:  the cells of the rows [n_rows] I32, in the order of their positions
    std::vector<ggml_tensor *> (*score_cpu)(
            ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f, ggml_tensor * idx, int64_t n_head);

    // computes a score from the position of a key, on the host
    float (*score_pos)(uint32_t seed, uint32_t il, uint32_t ih, llama_pos pos);
};

// nullptr if there is no such policy
const llama_qfilter_policy_info * llama_qfilter_policy_find(int32_t policy);

//
// pieces of scores
//

// <k, v> with one v per head
//   k: [n_embd_head, n_head, n_rows], v: [n_embd_head, n_head], returns [n_rows, n_head]
ggml_tensor * llama_qfilter_dot(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v);

// how similar a key is to the others: its cosine with the mean of the head's normalized keys, times the norm of that mean
//   k: [n_embd_head, n_head, n_rows], returns [n_rows, n_head]
ggml_tensor * llama_qfilter_likeness(ggml_context * ctx, ggml_tensor * k);

// mean over the rows
//   x: [n_embd_head, n_head, n_rows], returns [n_embd_head, n_head]
ggml_tensor * llama_qfilter_mean(ggml_context * ctx, ggml_tensor * x);

// |x|^2
//   x: [n_embd_head, n_head, n_rows], returns [n_rows, n_head], not contiguous
ggml_tensor * llama_qfilter_square(ggml_context * ctx, ggml_tensor * x);

//
// blend: large for rows whose value and key both differ from the others, and for their neighbours (llama-qfilter-blend.cpp)
//

// parts: |v - mean|^2, <k, f> if there are filters, and llama_qfilter_likeness() of the key
std::vector<ggml_tensor *> llama_qfilter_blend_parts(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f);

// v: nullptr: the first part is not computed
std::vector<ggml_tensor *> llama_qfilter_blend_parts_cpu(
        ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f, ggml_tensor * idx, int64_t n_head);

// keydiff: only the part of the key
std::vector<ggml_tensor *> llama_qfilter_score_keydiff_cpu(
        ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f, ggml_tensor * idx, int64_t n_head);

// makes one score of the parts, for the rows of one head
//   parts: n_parts times [n], n_stride apart, tmp: [n], out: [n]
void llama_qfilter_blend(const float * parts, size_t n_stride, uint32_t n_parts, uint32_t n, float * tmp, float * out);

// y += weight*(x - mean)/deviation, with the mean and standard deviation of x
void llama_qfilter_add_standardized(const float * x, uint32_t n, float weight, float * y);
