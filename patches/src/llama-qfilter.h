#pragma once

#include "llama-memory.h"
#include "llama-qfilter-policy.h"

#include "ggml-cpp.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

class llama_kv_cache;
class llama_memory_recurrent;
class llama_io_write_i;
class llama_io_read_i;

struct llama_cparams;

// the layer whose rows of K in the cache a tensor holds, or -1
int32_t llama_qfilter_layer_of(const ggml_tensor * k);

//
// llama_qfilter_rope
//

// how the queries of a layer are turned by their positions, as a context's graph has it
struct llama_qfilter_rope {
    // before the context decodes. false: something else is done to them after RoPE, or it is not to be found
    bool init(llama_context * lctx, int32_t il);

    // x: [n_embd_head, n_rows, n_pos]; back: from what it is after RoPE to what it was before
    bool turn(bool back, const llama_pos * pos, int64_t n_pos, int64_t n_rows, float * x) const;

    bool operator==(const llama_qfilter_rope & other) const;

    ggml_backend_t backend_cpu = nullptr;

    int64_t n_embd_head = 0; // 0: no RoPE in this layer
    int32_t op_params[GGML_MAX_OP_PARAMS/sizeof(int32_t)];

    std::vector<float> factors; // the frequencies are divided by them
};

//
// llama_qfilter
//

// the bounded part of a memory: at most n_cells cells per stream in the KV cache that grows with the context, and a way to
// make room in it. that cache is the memory itself, or the part of it that is not windowed or recurrent
//
// every layer and KV head keeps rows of its own, so after an eviction one cell holds rows of different positions. all heads
// have the same number of rows, so the cells (and with them masks, batch checks, graphs) stay as upstream has them: their
// positions are written as if the newest candidates had been kept, and the true ones are remembered here
class llama_qfilter {
public:
    // throws std::runtime_error when the parameters don't fit the cache
    llama_qfilter(llama_memory_i & mem, const llama_cparams & cparams, const llama_qfilter_params & params);

    // second part of the constructor, once the backends exist: filters and work buffers on the devices
    // throws std::runtime_error when a device can't run the graphs
    void init(llama_context * lctx);

    // model.create_memory(), with an attention cache of n_cells cells
    static llama_memory_i * create_memory(
            const llama_model         & model,
            const llama_memory_params & params_mem,
            const llama_cparams       & cparams,
                  uint32_t              n_cells);

    // the KV cache of a memory that grows with the context, nullptr: none, or of a kind that can't be bounded
    static llama_kv_cache * cache_of(llama_memory_i * mem);

    //
    // checks before a memory is changed
    //

    // does the memory have a place for this sequence?
    bool has(llama_seq_id seq_id) const;

    // false: the range would cut positions of which some heads have dropped rows, or leave a window with holes
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // whole sequences only: false, or our part is done and the range is set to all
    bool seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos & p0, llama_pos & p1);

    //
    // called by llama_kv_cache
    //

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) const;
    // the second one throws when the state does not belong here; after the third the cells are restored
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags);
    void state_apply(llama_seq_id seq_id);
    void clear      (llama_seq_id seq_id);

    //
    // eviction
    //

    // make room for a batch, in the streams that lack it
    // returns what llama_decode shall return, 0: go on
    int32_t make_room(const llama_batch & batch);

    int32_t compress(llama_seq_id seq_id, uint32_t n_keep);

    int32_t kept(llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) const;
    size_t  rows(llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) const;

    void get_stats(llama_qfilter_stats & stats) const;

private:
    // one device that holds K and V of some layers
    struct worker {
        ggml_backend_t       backend;
        ggml_gallocr_ptr     galloc;
        std::vector<int32_t> ikvs;      // layers in the KV cache
        bool                 on_host;   // the CPU can read and copy rows
        bool                 by_group;  // the backend can read the rows of some heads of a layer; if not, of all
        uint32_t             n_layers;  // layers per graph
    };

    // what a stream's cells don't tell
    struct stream {
        // cells with positions in [p0, p1) hold rows of other positions, in the same order
        llama_pos p0 = 0;
        llama_pos p1 = 0;

        uint32_t n = 0; // their number

        std::vector<llama_pos> pos; // [n_head_all, n] true positions

        // restored and not gone on from yet: used cells of the windowed part, and the one to look from
        uint32_t n_swa    = 0;
        uint32_t head_swa = 0;
    };

    // one eviction
    //
    // the rank of a row is its place in the order of positions. of n rows stay the ranks [0, n_sink), n_best of the
    // candidates in between, and [n - n_window, n)
    struct eviction {
        llama_seq_id seq_id;

        std::vector<uint32_t> order; // [n] the cell of each rank

        uint32_t n_keep;
        uint32_t n_best;

        std::vector<uint32_t> best; // [n_head_all, n_best] ranks, ascending
    };

    llama_memory_i & mem;
    llama_kv_cache & kv;

    llama_kv_cache * kv_swa; // windowed part of the memory

    const llama_memory_recurrent * recr; // recurrent part

    const uint32_t n_ctx_seq; // logical context of a sequence

    const uint32_t n_cells;
    const uint32_t n_keep;
    const uint32_t n_sink;
    const uint32_t n_window;
    const uint32_t flags;
    const uint32_t seed;

    const llama_qfilter_policy_info & policy;

    llama_context * lctx = nullptr;

    const uint32_t n_rank; // of moments

    std::vector<std::vector<float>> filters;     // [n_layer_kv][n_filter_rows*head_dim], rotated as the cached K; or before RoPE
    std::vector<llama_qfilter_rope> ropes;       // [n_layer_kv] in the latter case, else empty
    std::vector<std::vector<int32_t>> rope_ikvs; // layers with the same
    uint64_t filters_hash = 0;               // of the filters as given, or of what else the scores depend on

    std::vector<ggml_tensor *> filters_dev;  // [n_layer_kv] on the layer's device
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::vector<uint32_t> head_offs; // first head of each KV layer in stream::pos
    uint32_t n_head_all = 0;
    uint32_t n_head_max = 0; // of a layer

    std::vector<worker> workers;
    std::vector<stream> streams;
    std::vector<stream> staged; // read from a state, not yet applied

    ggml_backend_t backend_cpu = nullptr;

    std::vector<uint8_t> ctx_mem;    // memory for graph metadata
    std::vector<float>   scores;     // scratch: the layers of one graph
    std::vector<uint8_t> copy_buf;   // scratch: one tensor's rows

    llama_qfilter_stats stats = {};

    uint32_t n_head_kv(int32_t ikv) const;
    uint32_t n_rep(int32_t ikv) const;
    uint32_t n_filter_rows(int32_t ikv) const; // of a KV head
    uint32_t n_head_group(const worker & w, int32_t ikv) const;
    uint32_t head_dim(const ggml_tensor * t, int32_t ikv) const;

    const stream & get_stream(uint32_t is) const;

    void load_filters(const llama_qfilter_params & params);
    void rotate_rows (float * x, size_t n) const;
    bool turn_filters(llama_pos pos);
    void init_worker(worker & w);
    void init_score (worker & w);
    void init_gather(worker & w);
    void test_worker(worker & w);

    ggml_context_ptr new_context(size_t n_tensors);

    // fn(i, ith) for i in [0, n), on the context's threads ith
    void parallel(size_t n, const std::function<void(size_t i, int ith)> & fn);
    void set_n_threads();

    size_t n_score_tensors(const worker & w) const;

    ggml_cgraph * build_score_graph(ggml_context * ctx, const worker & w, size_t i0, uint32_t is, uint32_t n_rows,
            ggml_tensor ** idx, std::vector<ggml_tensor *> & outs) const;
    ggml_cgraph * build_gather_graph(ggml_context * ctx, const worker & w, uint32_t is, uint32_t n_rows,
            std::vector<ggml_tensor *> & idxs) const;

    uint32_t n_keep_min() const;

    // what make_room() returns, or -1: nothing to do
    int32_t evict(llama_seq_id seq_id, uint32_t n_keep);

    int32_t score_layers (worker & w, size_t i0, const eviction & ev);
    void    score_by_pos (worker & w, size_t i0, const eviction & ev);
    void    select_layers(worker & w, size_t i0, eviction & ev);

    uint32_t rank_of(const eviction & ev, uint32_t ih_all, uint32_t i) const;

    void gather_host (const worker & w, const eviction & ev);
    void gather_rows (ggml_tensor * t, int32_t ikv, const eviction & ev, uint8_t * buf) const;
    bool gather_graph(worker & w, const eviction & ev);

    void update_cells(const eviction & ev);

    // true positions of the rows of a head, by rank
    llama_pos true_pos(const eviction & ev, const stream & st, uint32_t r0, uint32_t ih_all, uint32_t rank) const;
    uint32_t  rank_p0 (const eviction & ev, const stream & st) const;
};

//
// called by llama_context; all of them let contexts without a bounded cache go on
//

// like model.create_memory(), bounded if params is set
llama_memory_i * llama_qfilter_create_memory(
        const llama_model          & model,
        const llama_memory_params  & params_mem,
        const llama_cparams        & cparams,
        const llama_qfilter_params * params);

// returns what llama_decode shall return, 0: go on
int32_t llama_qfilter_make_room(llama_memory_t mem, const llama_batch & batch);

// false: refused, nothing may be changed
bool llama_qfilter_seq_rm  (llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
bool llama_qfilter_seq_cp  (llama_memory_t mem, llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos & p0, llama_pos & p1);
bool llama_qfilter_seq_keep(llama_memory_t mem, llama_seq_id seq_id);
bool llama_qfilter_seq_move(llama_memory_t mem);

// upstream's llama_init_from_model(), which now takes our parameters; defined in llama-context.cpp
llama_context * llama_qfilter_init_context(llama_model * model, llama_context_params cparams, const llama_qfilter_params * params);
