#pragma once

#include "qfilter.h"

#include "llama-batch.h"
#include "llama-memory.h"

#include "ggml-cpp.h"

#include <memory>
#include <string>
#include <vector>

class llama_kv_cache;
class llama_io_write_i;
class llama_io_read_i;

struct llama_cparams;

//
// llama_qfilter
//

// the bounded part of a llama_kv_cache: at most n_cells cells per stream, and a way to make room
//
// every layer and KV head keeps rows of its own, so after an eviction one cell holds rows of different positions. all heads
// have the same number of rows, so the cells (and with them masks, batch checks, graphs) stay as upstream has them: their
// positions are written as if the newest candidates had been kept, and the true ones are remembered here
class llama_qfilter {
public:
    // throws std::runtime_error when the parameters don't fit the cache
    llama_qfilter(llama_kv_cache & kv, const llama_cparams & cparams, const llama_qfilter_params & params);

    // second part of the constructor, once the backends exist: filters and work buffers on the devices
    // throws std::runtime_error when a device can't run the graphs
    void init(llama_context * lctx);

    //
    // called by llama_kv_cache
    //

    // does the cache have a place for this sequence?
    bool has(llama_seq_id seq_id) const;

    // is there room for these ubatches? remembers which streams lack it
    bool fits(const std::vector<llama_ubatch> & ubatches);

    void clear();

    // false: refused, because the range would cut positions of which some heads have dropped rows
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    bool seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1);

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) const;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id); // throws when the state does not belong here
    void state_apply(llama_seq_id seq_id);                        // the cells are restored: take over what was read

    //
    // eviction
    //

    // make room in the streams that lack it
    // returns 0: nothing to do, 1: done, 2: aborted (nothing changed), -2 or -3: failed, as llama_decode has it
    int32_t evict(llama_context * lctx);

    int32_t compress(llama_context * lctx, llama_seq_id seq_id, uint32_t n_keep);

    int32_t kept(llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) const;
    size_t  rows(llama_context * lctx, llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) const;

    void get_stats(llama_qfilter_stats & stats) const;

private:
    // one device that holds K and V of some layers
    struct worker {
        ggml_backend_t       backend;
        ggml_gallocr_ptr     galloc;
        std::vector<int32_t> ikvs;      // layers in the KV cache
        bool                 on_host;   // rows can be copied by the CPU
        bool                 per_head;  // the backend multiplies K seen as heads; if not, as a block-diagonal filter
    };

    // what a stream's cells don't tell
    struct stream {
        // cells with positions in [p0, p1) hold rows of other positions, in the same order
        llama_pos p0 = 0;
        llama_pos p1 = 0;

        uint32_t n = 0; // their number

        std::vector<llama_pos> pos; // [n_head_all, n] true positions

        uint32_t n_lack = 0; // cells that the last batch found missing
    };

    // rows chosen for one layer: cell of each row, [n_head_kv, n_keep]
    using rows_t = std::vector<std::vector<uint32_t>>;

    llama_kv_cache & kv;

    const uint32_t n_ctx_seq; // logical context of a sequence

    const uint32_t n_cells;
    const uint32_t n_keep;
    const uint32_t n_sink;
    const uint32_t n_window;
    const uint32_t flags;

    const llama_qfilter_policy policy;

    std::vector<std::vector<float>> filters; // [n_layer_kv][n_head_kv*head_dim], rotated as the cached K
    uint64_t filters_hash = 0;

    std::vector<ggml_tensor *> filters_dev;  // [n_layer_kv] on the layer's device
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::vector<uint32_t> head_offs; // first head of each KV layer in stream::pos
    uint32_t n_head_all = 0;

    std::vector<worker> workers;
    std::vector<stream> streams;
    std::vector<stream> staged; // read from a state, not yet applied

    std::vector<uint8_t> ctx_mem;    // memory for graph metadata
    std::vector<float>   scores;     // scratch: one layer
    std::vector<uint8_t> copy_buf;   // scratch: one tensor's rows

    llama_qfilter_stats stats = {};

    uint32_t n_head_kv(int32_t ikv) const;
    uint32_t head_dim(const ggml_tensor * t, int32_t ikv) const;

    void load_filters(const llama_qfilter_params & params);
    void init_worker(worker & w);
    void test_worker(worker & w);

    ggml_context_ptr new_context(size_t n_tensors);

    ggml_tensor * build_score(ggml_context * ctx, const worker & w, int32_t ikv, uint32_t is, uint32_t n_span) const;
    ggml_cgraph * build_score_graph(ggml_context * ctx, const worker & w, uint32_t is, uint32_t n_span,
            std::vector<ggml_tensor *> & outs) const;
    ggml_cgraph * build_gather_graph(ggml_context * ctx, const worker & w, uint32_t is, uint32_t n_rows,
            std::vector<ggml_tensor *> & idxs) const;

    bool needs_scores() const;

    uint32_t n_keep_min() const;

    int32_t compact(llama_context * lctx, llama_seq_id seq_id, uint32_t n_keep);

    void select(int32_t ikv, const float * score, uint32_t n_span, const std::vector<uint32_t> & order,
            uint32_t n_keep, rows_t & rows) const;

    void gather_host (int32_t ikv, uint32_t is, const rows_t & rows);
    bool gather_graph(worker & w, uint32_t is, uint32_t n_rows, const std::vector<rows_t> & rows);

    void update_cells(llama_seq_id seq_id, const std::vector<uint32_t> & order, uint32_t n_keep, const std::vector<rows_t> & rows);

    llama_pos true_pos(const stream & st, uint32_t ih, llama_pos pos, uint32_t rank) const;
};

//
// called by llama_context
//

// like model.create_memory(), bounded if params is set
llama_memory_i * llama_qfilter_create_memory(
        const llama_model          & model,
        const llama_memory_params  & params_mem,
        const llama_cparams        & cparams,
        const llama_qfilter_params * params);

// a batch found no cells: returns as llama_qfilter::evict(), 0 for a context without a bounded cache
int32_t llama_qfilter_evict(llama_context * lctx);

// upstream's llama_init_from_model(), which now takes our parameters; defined in llama-context.cpp
llama_context * llama_qfilter_init_context(llama_model * model, llama_context_params cparams, const llama_qfilter_params * params);
