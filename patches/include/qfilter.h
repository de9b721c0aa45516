// Q-Filters KV cache eviction for llama.cpp (arXiv 2503.02812): public C API.
//
// A context made by llama_qfilter_init_from_model() has a KV cache of a fixed number of cells. When a batch does not
// fit, every layer and KV head scores its own cached keys and keeps the best of them; positions go on to n_ctx.
// Layers whose cache does not grow with the context, windowed and recurrent ones, are as upstream has them.
#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// how a cached key is scored; the rows with the lowest scores go
enum llama_qfilter_policy {
    LLAMA_QFILTER_POLICY_QFILTERS  = 0, // projection of the key on its head's filter
    LLAMA_QFILTER_POLICY_KNORM     = 1, // minus the L2 norm of the key
    LLAMA_QFILTER_POLICY_STREAMING = 2, // all equal: sinks and the newest stay
    LLAMA_QFILTER_POLICY_KEYDIFF   = 3, // minus the cosine of the key with the mean of its head's normalized keys
    LLAMA_QFILTER_POLICY_RANDOM    = 4, // a hash of seed, layer, head and position
    LLAMA_QFILTER_POLICY_QFILTERS2 = 5, // the weight that attention is expected to give the key, times the length of its value
    LLAMA_QFILTER_POLICY_QBLEND    = 6, // LLAMA_QFILTER_POLICY_KVDIFF with LLAMA_QFILTER_POLICY_QAHEAD, or with that of the filter
    LLAMA_QFILTER_POLICY_KVDIFF    = 7, // how unlike the others value and key are, over neighbouring positions
    LLAMA_QFILTER_POLICY_QAHEAD    = 8, // projection of the key on the query that is expected at the next positions
};

struct llama_qfilter_params {
    size_t   struct_size; // sizeof(struct llama_qfilter_params), set by llama_qfilter_default_params()

    uint32_t n_cells;     // most cells a sequence may use (max_length)
    uint32_t n_keep;      // cells left after an eviction: at least n_sink + n_window, at most n_cells - n_batch
    uint32_t n_sink;      // first positions, always kept
    uint32_t n_window;    // last positions, always kept
    int32_t  policy;      // enum llama_qfilter_policy
    uint32_t flags;       // enum llama_qfilter_flag
    uint32_t seed;        // of LLAMA_QFILTER_POLICY_RANDOM

    // n_filters pointers, one per layer of the model, to [n_head_kv][head_dim] unit vectors in the basis of llama.cpp's K rows
    // (after RoPE); NULL for layers without a filter. needed by LLAMA_QFILTER_POLICY_QFILTERS, and by _QBLEND if
    // there are no queries, copied on init
    uint32_t              n_filters;
    const float * const * filters;

    // the same for LLAMA_QFILTER_POLICY_QFILTERS2: [n_head][1 + n_rank][head_dim], for each query head the rows r with
    // log E[exp(logit of k)] = <k, r[0]> + sum_j <k, r[j]>^2
    uint32_t              n_rank;
    const float * const * moments;

    // the same for LLAMA_QFILTER_POLICY_QAHEAD and _QBLEND: [n_head_kv][head_dim], the mean query before RoPE. every
    // eviction turns it to the 256 positions that come next; queries of all layers or of none
    const float * const * queries;
};

enum llama_qfilter_flag {
    LLAMA_QFILTER_FLAG_GRAPH_GATHER = 1, // treat the CPU as another device: move rows with ggml graphs (tests)
};

// for llama_state_seq_set_data_ext(), beside LLAMA_STATE_SEQ_FLAGS_*: the state may come from a context with another
// n_cells, n_keep and n_window, if its cells fit; policy, filters and n_sink have to be the same if it was ever evicted
#define LLAMA_QFILTER_STATE_SEQ_FLAGS_RESIZE (1 << 16)

struct llama_qfilter_stats {
    size_t   struct_size;    // set by the caller

    uint64_t n_evictions;    // compactions of one sequence
    uint64_t n_dropped;      // cells freed by them
    uint64_t n_bytes_moved;  // K and V bytes written by them
    uint64_t t_score_us;     // time in microseconds
    uint64_t t_select_us;
    uint64_t t_gather_us;

    uint32_t n_cells_used;   // over all sequences, at the moment
    uint32_t n_cells;        // the bound: n_cells * n_seq_max
    uint32_t n_cells_alloc;  // allocated: the bound rounded up to 256 per sequence

    uint64_t n_bytes_kv;      // allocated for K and V, and for windowed and recurrent layers
    uint64_t n_bytes_kv_full; // the same if every position of the context had a cell
    uint64_t n_bytes_scratch; // allocated for evictions, those of the largest one included
};

LLAMA_API struct llama_qfilter_params llama_qfilter_default_params(void);

// can a context with these parameters have a bounded cache? if not, why (size bytes, zero-terminated) says it in a line
LLAMA_API bool llama_qfilter_supported(
        const struct llama_model        * model,
              struct llama_context_params cparams,
                                   char * why,
                                   size_t size);

// the same for the model alone: is there anything in it that could be bounded?
LLAMA_API bool llama_qfilter_model_supported(const struct llama_model * model, char * why, size_t size);

// does layer il keep keys of its own over the whole context? only these are evicted and have filters; not those that
// are windowed, recurrent, without attention, or attend the keys of another layer
LLAMA_API bool llama_qfilter_layer_evicts(const struct llama_model * model, int32_t il);

// like llama_init_from_model(); NULL when the parameters are refused (the reason is logged)
LLAMA_API struct llama_context * llama_qfilter_init_from_model(
                    struct llama_model * model,
              struct llama_context_params cparams,
       const struct llama_qfilter_params * params);

// compact a sequence to n_keep cells now
// returns 0: done, 1: nothing to do, < 0: error (the sequence is cleared if rows may already have moved)
LLAMA_API int32_t llama_qfilter_compress(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_keep);

// the positions that layer il, KV head ih holds for a sequence, ascending, into out (at most capacity)
// returns their number (which may exceed capacity), < 0: no such sequence, layer, head, or no bounded cache
LLAMA_API int32_t llama_qfilter_kept(
        const struct llama_context * ctx,
                      llama_seq_id   seq_id,
                           int32_t   il,
                           int32_t   ih,
                         llama_pos * out,
                            size_t   capacity);

// the cached rows of layer il of a sequence as they are stored, in ascending order of cell position:
// type and bytes of K (is_v = false) or V; returns the bytes needed, or 0. out may be NULL
LLAMA_API size_t llama_qfilter_rows(
              struct llama_context * ctx,
                      llama_seq_id   seq_id,
                           int32_t   il,
                              bool   is_v,
                              void * out,
                            size_t   size);

// returns false if the context has no bounded cache
LLAMA_API bool llama_qfilter_get_stats(const struct llama_context * ctx, struct llama_qfilter_stats * stats);

// one call of attention, for llama_context_params.cb_eval with Flash Attention on
struct llama_qfilter_attn {
    int32_t il;        // the layer whose cached keys are attended
    int32_t head_dim;
    int32_t n_head;
    int32_t n_tokens;  // queries, in the order of the batch
    int32_t n_head_kv;
    int32_t n_kv;      // cells, of which the last may be empty
    float   kq_scale;  // of <q, k> before the softmax
};

// false: not the attention of a single sequence over a KV cache
LLAMA_API bool llama_qfilter_attn_of(const struct ggml_tensor * t, struct llama_qfilter_attn * attn);

// once computed: the queries [n_head][n_tokens][head_dim], or the cached keys [n_head_kv][n_kv][head_dim]
LLAMA_API void llama_qfilter_attn_get(const struct ggml_tensor * t, bool is_k, float * out);

// how RoPE turns the queries of a context's layers; to be made before the context decodes, and freed before it
struct llama_qfilter_ropes;

LLAMA_API struct llama_qfilter_ropes * llama_qfilter_ropes_init(struct llama_context * ctx);

LLAMA_API void llama_qfilter_ropes_free(struct llama_qfilter_ropes * ropes);

// queries after RoPE -> what they were before it. x: [n_pos][n_rows][head_dim] of layer il, changed in place
// returns false if something else is done to them after RoPE, or the graph does not show it
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
