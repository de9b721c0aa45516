// Q-Filters KV cache eviction for llama.cpp (arXiv 2503.02812): public C API.
//
// A context made by llama_qfilter_init_from_model() has a KV cache of a fixed number of cells. When a batch does not
// fit, every layer and KV head scores its own cached keys and keeps the best of them; positions go on to n_ctx.
// Windowed and recurrent layers, whose cache does not grow with the context, stay as they are upstream.
//
// How this header grows: functions and enum values are only added. A struct whose first field is struct_size gets new
// fields at its end only. Callers set struct_size to the size they were compiled with; fields beyond it count as zero.
// LLAMA_QFILTER_ABI_VERSION changes when callers of the previous version would no longer work, and when qfllama calls a
// function that the previous version does not have.
#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_QFILTER_ABI_VERSION 5

// LLAMA_QFILTER_ABI_VERSION of the library
LLAMA_API uint32_t llama_qfilter_abi_version(void);

// one line that says why the last call on this thread failed, "" if it succeeded. this covers the functions of this header,
// and llama_decode() and llama_state_*_set_data() with a bounded cache. valid until the next such call on this thread
LLAMA_API const char * llama_qfilter_last_error(void);

//
// policies
//

// how a cached key is scored; the rows with the lowest scores are evicted
enum llama_qfilter_policy {
    LLAMA_QFILTER_POLICY_QFILTERS  = 0, // projection of the key on its head's filter
    LLAMA_QFILTER_POLICY_KNORM     = 1, // minus the L2 norm of the key
    LLAMA_QFILTER_POLICY_STREAMING = 2, // all scores are equal: sinks and the newest rows stay
    LLAMA_QFILTER_POLICY_KEYDIFF   = 3, // minus the cosine of the key with the mean of its head's normalized keys
    LLAMA_QFILTER_POLICY_RANDOM    = 4, // a hash of seed, layer, head and position
    LLAMA_QFILTER_POLICY_QFILTERS2 = 5, // the attention weight that the key is expected to get, times the norm of its value
    LLAMA_QFILTER_POLICY_QBLEND    = 6, // LLAMA_QFILTER_POLICY_KVDIFF plus LLAMA_QFILTER_POLICY_QAHEAD or, without queries,
                                        // LLAMA_QFILTER_POLICY_QFILTERS
    LLAMA_QFILTER_POLICY_KVDIFF    = 7, // how much value and key differ from the others, averaged over neighbouring positions
    LLAMA_QFILTER_POLICY_QAHEAD    = 8, // projection of the key on the query expected at the next positions
    LLAMA_QFILTER_POLICY_LEARNED   = 9, // LLAMA_QFILTER_POLICY_QBLEND plus a learned filter: it predicts, from the keys and
                                        // values of all heads, the weight that a repetition of the text would give the row
};

// vectors that calibration finds for a layer
enum llama_qfilter_kind {
    LLAMA_QFILTER_KIND_FILTERS = 0, // [n_head_kv][head_dim] in the basis of llama.cpp's K rows (after RoPE)
    LLAMA_QFILTER_KIND_QUERIES = 1, // [n_head_kv][head_dim] the mean query before RoPE
    LLAMA_QFILTER_KIND_MOMENTS = 2, // [n_head][1 + rank][head_dim] the rows r of each query head with
                                    // log E[exp(logit of k)] = <k, r[0]> + sum_j <k, r[j]>^2
    LLAMA_QFILTER_KIND_LEARNED = 3, // [n_head_kv][n_head_kv*(head_dim of K + head_dim of V)], applied to what the cache holds at
                                    // a position: the keys of all KV heads before RoPE, then their values
};

// the name of a policy, NULL: there is no such policy. policies are numbered from 0 without gaps
LLAMA_API const char * llama_qfilter_policy_name(int32_t policy);

// the i-th kind of vectors (enum llama_qfilter_kind) that a policy can use, best first; -1 after the last one.
// the first kind that all layers have is used. a policy without any kind needs no vectors
LLAMA_API int32_t llama_qfilter_policy_needs(int32_t policy, int32_t i);

// does a policy also need learned filters of all layers?
LLAMA_API bool llama_qfilter_policy_learned(int32_t policy);

//
// contexts
//

struct llama_qfilter_vectors {
    int32_t       kind;   // enum llama_qfilter_kind
    int32_t       il;     // layer of the model
    uint32_t      n_rows; // rows in data: the product of all dimensions except the last
    uint32_t      n_embd; // numbers in a row
    const float * data;   // [n_rows][n_embd], copied
};

struct llama_qfilter_params {
    size_t   struct_size;

    uint32_t n_cells;     // most cells a sequence may use (max_length); UINT32_MAX: as many as positions
    uint32_t n_keep;      // cells left after an eviction: at least n_sink + n_window, at most n_cells - n_batch
    uint32_t n_sink;      // first positions, always kept
    uint32_t n_window;    // last positions, always kept
    int32_t  policy;      // enum llama_qfilter_policy
    uint32_t flags;       // enum llama_qfilter_flag
    uint32_t seed;        // of LLAMA_QFILTER_POLICY_RANDOM

    // in any order; kinds that the policy does not use are ignored
    uint32_t n_vectors;
    const struct llama_qfilter_vectors * vectors;

    // evicted rows go to an archive in host memory and can come back from it. at the limit, the oldest positions after the
    // sinks are dropped from it
    uint64_t     n_bytes_archive; // limit in bytes, over all sequences; 0: no archive
    const char * archive_dir;     // keep the archive in an unlinked file (without a name) in this folder; NULL: in memory
};

enum llama_qfilter_flag {
    LLAMA_QFILTER_FLAG_GRAPH_GATHER = 1, // treat the CPU as another device: move rows with ggml graphs (tests)
    LLAMA_QFILTER_FLAG_SMALL_PARTS  = 2, // score the archive in parts of a few rows, as if it were large (tests)
};

// fills in the defaults, and struct_size
LLAMA_API void llama_qfilter_params_init(struct llama_qfilter_params * params, size_t struct_size);

// can a context with these parameters have a bounded cache? if not, the reason is written to why in one line (size bytes,
// zero-terminated)
LLAMA_API bool llama_qfilter_supported(
        const struct llama_model        * model,
              struct llama_context_params cparams,
                                   char * why,
                                   size_t size);

// the same for the model alone: is there anything in it that could be bounded?
LLAMA_API bool llama_qfilter_model_supported(const struct llama_model * model, char * why, size_t size);

// does layer il keep its own keys over the whole context? only such layers evict and have filters. layers that are windowed,
// recurrent, without attention, or that attend to the keys of another layer do not
LLAMA_API bool llama_qfilter_layer_evicts(const struct llama_model * model, int32_t il);

// like llama_init_from_model(); NULL when the parameters are refused, see llama_qfilter_last_error()
LLAMA_API struct llama_context * llama_qfilter_init_from_model(
                    struct llama_model * model,
              struct llama_context_params cparams,
       const struct llama_qfilter_params * params);

//
// sequences
//

// compact a sequence to n_keep cells now; the last n_window of them hold the newest rows
// returns 0: done, 1: nothing to do, < 0: error (the sequence is cleared if rows may already have moved)
LLAMA_API int32_t llama_qfilter_compress(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_keep, uint32_t n_window);

// the same with scores of the caller: [heads][cells]. heads: the KV heads of all layers that evict, layer by layer. cells:
// those of the sequence, in the order of llama_qfilter_kept(). n_scores: heads*cells
LLAMA_API int32_t llama_qfilter_compress_scored(
        struct llama_context * ctx,
                llama_seq_id   seq_id,
                    uint32_t   n_keep,
                    uint32_t   n_window,
                 const float * scores,
                      size_t   n_scores);

// from now on the first n positions of a sequence always stay, as sinks do: in evictions, when cells are filled again, and in
// the archive. n: a system prompt, for example. call it before the sequence loses rows to an eviction, afterwards nothing
// changes. a state includes the number; it ends when the sequence is emptied
// returns how many always stay: at least n_sink, at most half of n_keep without the window, and no more than an archive at its
// limit has room for. < 0: no such sequence or no bounded cache
LLAMA_API int32_t llama_qfilter_keep_first(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n);

// tokens that still fit into the cells of a sequence, 0: they are full; < 0: no such sequence or no bounded cache
LLAMA_API int32_t llama_qfilter_room(const struct llama_context * ctx, llama_seq_id seq_id);

// the smallest p0 for which llama_memory_seq_rm(mem, seq_id, p0, -1) leaves a sequence that can go on at p0, 0: any
// < 0: no such sequence or no bounded cache. (a whole sequence can always be removed.) with an archive, removing fills the
// cells again with rows before p0: what always stays, the window, rows that are in the cells, and the newest others
LLAMA_API llama_pos llama_qfilter_rewind_limit(const struct llama_context * ctx, llama_seq_id seq_id);

// writes to out the positions that layer il, KV head ih holds for a sequence, ascending (at most capacity of them)
// returns their number (which may exceed capacity), < 0: no such sequence, layer, head, or no bounded cache
LLAMA_API int32_t llama_qfilter_kept(
        const struct llama_context * ctx,
                      llama_seq_id   seq_id,
                           int32_t   il,
                           int32_t   ih,
                         llama_pos * out,
                            size_t   capacity);

// copies to out the cached rows of layer il of a sequence, in ascending order of cell position: K (is_v = false) or V, with
// the type and bytes that they are stored in. returns the bytes needed, or 0. out may be NULL
LLAMA_API size_t llama_qfilter_rows(
              struct llama_context * ctx,
                      llama_seq_id   seq_id,
                           int32_t   il,
                              bool   is_v,
                              void * out,
                            size_t   size);

//
// recall
//

// order of calls: llama_qfilter_question(), llama_decode() of the question's tokens, llama_qfilter_recall(), and once more
// llama_decode() of the tokens that recall asks for. the question now sees the rows that it looks at, even evicted ones

// the question begins: tokens of this sequence that are decoded from now until llama_qfilter_recall() belong to it. a batch
// with tokens of other sequences spoils it. seq_id -1: no question any more. returns < 0: no such sequence
LLAMA_API int32_t llama_qfilter_question(struct llama_context * ctx, llama_seq_id seq_id);

// score all archived rows by the largest weight that any query of the question gives them, in any layer and head. then cut
// the sequence back to where the question began, and fill its cells with n_rows rows, the same positions in all layers. rows
// are taken in this order until there are enough:
// - the first positions, which always stay, and the newest rows
// - a quarter of n_rows, at least 64: the rows with the highest scores, each with up to 8 tokens before it and 24 after it
// - up to half of n_rows: rows with words of the question within up to 48 tokens. rare words count more, and a row needs at
//   least a third of the best row's count. a word is a token without case and spaces
// - rows that a query looks at closely: those with a weight above 0.1 each, if they get 0.7 of its attention together
// - rows that were in the cells, the newest of each head
// n_rows 0: all cells, less those for the question and for an answer (half of what an eviction frees, at most an eighth of
// the cells)
// returns the number of tokens to decode again, those of the question; 0: nothing was evicted, the question stays; < 0: error
// (nothing is changed, except that the sequence is cleared if rows may already have moved)
LLAMA_API int32_t llama_qfilter_recall(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_rows);

// how the queries of a question look at the cells before it, at layer il. writes [n_head][n] weights to out (at most capacity
// of them): the largest that a query of this head gives to the row of this cell, in a softmax over all rows that it sees.
// n: cells before the question, in the order of llama_qfilter_kept(). the question goes on after this call. it has to be one
// batch of at most n_ubatch tokens; no archive is needed. returns n_head*n (which may exceed capacity), < 0: error
LLAMA_API int32_t llama_qfilter_weights(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * out, size_t capacity);

// writes to out the positions that the last recall of a sequence brought back, ascending (at most capacity of them): those
// that some head did not have. returns their number (which may exceed capacity), < 0: no such sequence or no bounded cache
LLAMA_API int32_t llama_qfilter_recalled(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos * out, size_t capacity);

// copies to out the archived row of layer il at a position: K (is_v = false) or V, with the type and bytes that
// llama_qfilter_rows() gives. returns the bytes needed, 0: the position is not in the archive. out may be NULL
LLAMA_API size_t llama_qfilter_archived(
              struct llama_context * ctx,
                      llama_seq_id   seq_id,
                         llama_pos   pos,
                           int32_t   il,
                              bool   is_v,
                              void * out,
                            size_t   size);

enum llama_qfilter_state_flag {
    // set: the state may come from a context with another n_cells, n_keep and n_window, if its cells fit. if the sequence
    // ever lost rows to an eviction, policy, vectors and n_sink have to be the same.
    // get: windowed layers give only the rows that the last 32 positions see, which fit into a context with smaller batches.
    // the restored sequence may not be cut before these positions
    LLAMA_QFILTER_STATE_RESIZE = 1,
    // the state is an earlier position of the same sequence: the sequence keeps its archive up to that position
    LLAMA_QFILTER_STATE_KEEP_ARCHIVE = 2,
};

// like llama_state_seq_get_data(); flags: 0 or LLAMA_QFILTER_STATE_RESIZE. returns the bytes written, without dst those
// needed; 0: failed
LLAMA_API size_t llama_qfilter_state_seq_get_data(
              struct llama_context * ctx,
                           uint8_t * dst,
                            size_t   size,
                      llama_seq_id   seq_id,
                          uint32_t   flags);

// like llama_state_seq_set_data(); flags: enum llama_qfilter_state_flag. 0: the state was refused, and the sequence is
// cleared, unless nothing had been restored yet
LLAMA_API size_t llama_qfilter_state_seq_set_data(
              struct llama_context * ctx,
                     const uint8_t * src,
                            size_t   size,
                      llama_seq_id   seq_id,
                          uint32_t   flags);

// a state does not contain the archive: a restored sequence starts with an empty one. these functions save and restore the
// archive separately; restore it after the state. get: returns the bytes needed, 0: no archive; dst may be NULL.
// set: returns size, 0: refused
LLAMA_API size_t llama_qfilter_archive_get_data(struct llama_context * ctx, llama_seq_id seq_id,       uint8_t * dst, size_t size);
LLAMA_API size_t llama_qfilter_archive_set_data(struct llama_context * ctx, llama_seq_id seq_id, const uint8_t * src, size_t size);

//
// statistics
//

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
    uint64_t n_bytes_scratch; // allocated for evictions, including the temporary memory of the largest one

    uint64_t n_archived;              // positions in the archive, over all sequences; shared positions count once per sequence
    uint64_t n_bytes_archive;         // host memory used by the archive, in blocks of 256 positions
    uint64_t n_bytes_archive_limit;   // 0: no archive
    uint64_t n_bytes_archive_written; // since the context was made
    uint64_t t_archive_us;            // time in microseconds spent writing it
    uint64_t n_recalls;
    uint64_t t_recall_us;             // without decoding the questions again
    uint32_t archive_stopped;         // 1: out of memory, nothing more is archived

    uint64_t n_graph_nodes; // computed by the last eviction, on all devices
};

// returns false if the context has no bounded cache
LLAMA_API bool llama_qfilter_get_stats(const struct llama_context * ctx, struct llama_qfilter_stats * stats);

struct llama_qfilter_seq_stats {
    size_t   struct_size;    // set by the caller

    uint64_t n_evictions;    // since the sequence was last empty, overwritten by a copy, or restored
    uint64_t n_dropped;

    uint32_t n_cells_used;
    int32_t  pos_max;        // the last position, -1: empty

    uint64_t n_archived;     // positions in the archive
    int32_t  pos_archived;   // all positions from here up to the last eviction are archived; 0: nothing was ever lost
    uint32_t n_recalled;     // positions that the last recall brought back
    uint32_t n_first;        // first positions that always stay
};

// returns false if there is no such sequence or the context has no bounded cache
LLAMA_API bool llama_qfilter_get_seq_stats(
        const struct llama_context * ctx,
                      llama_seq_id   seq_id,
    struct llama_qfilter_seq_stats * stats);

#ifdef __cplusplus
}
#endif
