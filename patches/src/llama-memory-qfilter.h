#pragma once

#include "llama-kv-cells.h"
#include "llama-memory.h"
#include "llama-qfilter-archive.h"
#include "llama-qfilter-learned.h"
#include "llama-qfilter-recall.h"
#include "llama-qfilter-worker.h"

#include <memory>
#include <string>
#include <vector>

class llama_kv_cache;
class llama_kv_cache_iswa;
class llama_memory_recurrent;

struct llama_cparams;

// what is recorded of a question while it is read
struct llama_qfilter_asked {
    llama_seq_id seq_id = -1;

    llama_pos p0 = -1;
    uint32_t  n  = 0; // tokens

    uint32_t n_batches = 0;

    std::string why_not; // why it can't be used as a question, "": it can

    std::vector<llama_qfilter_queries> layers;

    std::vector<uint8_t> recr; // state of the recurrent part before the question

    // callback of the context's user, which is still called
    ggml_backend_sched_eval_callback cb      = nullptr;
    void *                           cb_data = nullptr;
    bool                             cb_asks = false;
};

//
// llama_memory_qfilter
//

// a memory that bounds the KV cache that grows with the context: it has at most n_cells cells per sequence. that cache is
// the whole memory owned here, or the part of it that is not windowed or recurrent. when a batch does not fit, init_batch()
// makes room
//
// every layer and KV head keeps its own rows, so after an eviction one cell holds rows of different positions. all heads have
// the same number of rows, so the cells (and with them masks, batch checks, graphs) work as they do upstream: cell positions
// are written as if the newest candidates had been kept, and the true positions are stored here. without an archive, a cut
// into compacted positions is refused before any part of the memory is touched. with an archive, where evicted rows go, the
// cells can be filled with other rows at any time
class llama_memory_qfilter : public llama_memory_i {
public:
    // throws std::runtime_error when the parameters don't fit the model or each other
    llama_memory_qfilter(
            const llama_model          & model,
            const llama_memory_params  & params_mem,
            const llama_cparams        & cparams,
            const llama_qfilter_params & params);

    ~llama_memory_qfilter() override;

    // second part of the constructor, once the backends exist: vectors and work buffers on the devices
    // throws std::runtime_error when a device can't run the graphs
    void init(llama_context * lctx);

    //
    // llama_memory_i
    //

    // nullptr: decode_error() says why
    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // states are complete, also for LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: a partial state relies on rows that are still in the
    // cache, and an eviction may have removed them
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_memory_qfilter specific API, see qfilter.h
    //

    // what llama_decode() shall return after init_batch() has returned nullptr
    int32_t decode_error() const;

    // given: scores of all rows that replace the policy's, see llama_qfilter_compress_scored(), or nullptr
    int32_t compress(llama_seq_id seq_id, uint32_t n_keep, uint32_t n_window, const float * given, size_t n_given);

    // from now on the first n positions of a sequence always stay; returns how many do, see llama_qfilter_keep_first()
    int32_t keep_first(llama_seq_id seq_id, uint32_t n);

    int32_t   room        (llama_seq_id seq_id) const;
    llama_pos rewind_limit(llama_seq_id seq_id) const;

    int32_t kept(llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) const;
    size_t  rows(llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) const;

    //
    // archive
    //

    // tokens of this sequence that are decoded from now until recall() are a question; -1: no question any more
    int32_t question(llama_seq_id seq_id);

    // cut the sequence back to where the question began, and fill the cells with n_rows rows that it looks at. n_rows 0: as
    // many as leave room for the answer. returns the number of tokens in the question
    int32_t recall(llama_seq_id seq_id, uint32_t n_rows);

    // how the queries of the question look at the cells before it, see llama_qfilter_weights()
    int32_t weights(llama_seq_id seq_id, int32_t il, float * out, size_t capacity);

    // called by the context's scheduler
    bool eval(ggml_tensor * t, bool ask);

    int32_t recalled(llama_seq_id seq_id, llama_pos * out, size_t capacity) const;

    size_t archived(llama_seq_id seq_id, llama_pos pos, int32_t il, bool is_v, void * out, size_t size);

    // the archive of a sequence, separate from its state. archive_read() throws std::runtime_error
    size_t archive_write(llama_seq_id seq_id,       uint8_t * dst, size_t size);
    void   archive_read (llama_seq_id seq_id, const uint8_t * src, size_t size);

    void get_stats(llama_qfilter_stats & stats) const;
    bool get_stats(llama_seq_id seq_id, llama_qfilter_seq_stats & stats) const;

    // the next state_read() may get the state of a cache with another size, the next state_write() is for one
    bool resize = false;

    // the next state_read() gets an earlier position of the same sequence, which keeps its archive
    bool keep_archive = false;

private:
    // model.create_memory(), with an attention cache of n_cells cells
    static std::unique_ptr<llama_memory_i> create(
            const llama_model         & model,
            const llama_memory_params & params_mem,
            const llama_cparams       & cparams,
                  uint32_t              n_cells);

    // what we know of a sequence besides its cells
    struct stream {
        llama_qfilter_table table;

        uint32_t n_first = 0;     // first positions that always stay, if more than n_sink
        bool     begun   = false; // had it used cells?

        uint64_t n_evictions = 0;
        uint64_t n_dropped   = 0;

        // windowed part of a restored sequence before its next batch: number of used cells, and where to look for a free one
        uint32_t swa[2] = { 0, 0 };

        llama_qfilter_archive archive;

        bool incomplete = false; // some dropped rows are not in the archive

        std::vector<llama_pos> recalled;
    };

    // the rows to fill the cells of a sequence with
    struct filling {
        llama_pos p0; // where the sequence goes on

        std::vector<llama_pos> cells; // [n]
        std::vector<llama_pos> rows;  // [n_head_all, n] ascending

        llama_qfilter_table table;

        uint32_t n() const { return cells.size(); }
    };

    std::unique_ptr<llama_memory_i> mem;

    llama_kv_cache & kv; // the part that is bounded

    llama_kv_cache * kv_swa; // windowed part, or nullptr

    llama_memory_recurrent * recr; // recurrent part, or nullptr

    const uint32_t n_ctx_seq; // logical context of a sequence

    const uint32_t n_cells;
    const uint32_t n_keep;
    const uint32_t n_sink;
    const uint32_t n_window;
    const uint32_t flags;
    const uint32_t seed;

    const llama_qfilter_policy_info & policy;

    llama_context * lctx = nullptr;

    std::vector<llama_qfilter_layer> layers;

    llama_qfilter_vector_store vectors;

    llama_qfilter_learned learned; // empty: the policy takes none

    uint32_t n_head_all = 0; // KV heads of all layers

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::vector<std::unique_ptr<llama_qfilter_worker>> workers;

    llama_qfilter_threads threads;

    std::unique_ptr<llama_qfilter_archive_store> store; // nullptr: nothing is archived

    std::vector<llama_qfilter_archive_layer> store_layers;

    bool store_stopped = false; // out of memory, nothing more is archived

    std::vector<std::unique_ptr<llama_qfilter_scorer>> scorers; // one per worker

    std::unique_ptr<llama_qfilter_asked> asked;

    std::vector<stream> streams;

    std::vector<float> scores; // of the layers that are scored together

    std::vector<float> scores_learned; // [n_head_all, n] of all rows of a sequence by rank, NaN where they are not needed

    llama_qfilter_stats stats = {};

    int32_t error = 0; // of the last init_batch()

    // is there such a sequence? false, with a note: no
    bool has(llama_seq_id seq_id) const;

    // first positions of a sequence that always stay
    uint32_t n_first(llama_seq_id seq_id) const;

    // rows that always stay, at least one of them the newest
    static uint64_t n_keep_min(uint32_t n_first, uint32_t n_window);

    llama_qfilter_order order_of(llama_seq_id seq_id) const;

    // nullptr: it does not evict
    const llama_qfilter_layer * find_layer(int32_t il) const;

    // does the CPU read and write the layer's rows itself?
    bool is_on_host(const llama_qfilter_layer & layer) const;

    // a sequence whose cells have been emptied has no history
    const stream & get_stream(llama_seq_id seq_id) const;

    // false: the rows before p0 are not those that were there when p0 was the next position
    bool can_cut(llama_seq_id seq_id, llama_pos p0) const;

    // false: the range would cut into positions that some heads have dropped, or leave a window with holes
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // remove a sequence (-1: all of them), whatever its cells hold
    void forget(llama_seq_id seq_id);

    // the two steps of state_read(); both throw std::runtime_error
    void read_state (llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);
    void check_state(llama_seq_id seq_id, const std::vector<stream> & read) const;

    // what llama_decode() shall return, 0: there is room
    int32_t make_room(const llama_batch & batch);

    // LLAMA_QFILTER_REFUSED: there is nothing to drop
    // given: [n_head_all, n] scores that replace the policy's, or nullptr
    llama_qfilter_result evict(llama_seq_id seq_id, uint32_t n_keep, uint32_t n_window, const float * given = nullptr);

    // fills scores_learned
    llama_qfilter_result learn(llama_seq_id seq_id, const llama_qfilter_order & order, uint32_t n_window);

    // fills f.table.learned; called before any row moves
    llama_qfilter_result learn(llama_seq_id seq_id, filling & f);

    std::vector<llama_qfilter_learned::rows> learned_rows(const llama_qfilter_worker & w, llama_seq_id seq_id) const;

    // out: [n_head_all, n] learned scores of the rows at these positions, which lie in cells, or in the archive
    llama_qfilter_result learn_cells  (llama_seq_id seq_id, const std::vector<uint32_t> & cells, const std::vector<llama_pos> & pos, std::vector<float> & out);
    llama_qfilter_result learn_archive(llama_seq_id seq_id, const std::vector<llama_pos> & pos, std::vector<float> & out);

    void score_by_pos(const llama_qfilter_worker & w, size_t i0, llama_seq_id seq_id, const llama_qfilter_order & order);
    bool select      (const llama_qfilter_worker & w, size_t i0, uint32_t n_parts, bool with_learned, llama_qfilter_selection & sel);

    llama_kv_cells cells_after(llama_seq_id seq_id, const llama_qfilter_selection & sel) const;

    //
    // archive
    //

    void init_archive(const llama_qfilter_params & params);
    void init_scorers();

    // sequences without used cells lose their history, but not what was set for their first batch
    void forget_empty();
    void forget_empty(stream & st) const;

    // sequences with used cells have begun
    void note_begun();

    // the index of the worker that has a layer
    size_t worker_of(const llama_qfilter_layer & layer) const;

    size_t archive_row_size() const { return store->n_bytes_block/llama_qfilter_archive::n_block; }

    // waits until all copies to the archive are done
    void archive_sync() const;

    // copies to the archive all rows that it lacks and whose position is the same in all heads
    void archive_rows(llama_seq_id seq_id);

    // the archive's block for a position; older blocks may be dropped for it. nullptr: out of memory
    uint8_t * archive_block(llama_seq_id seq_id, llama_pos pos);

    // false: nothing can be archived any more
    bool archives() const { return store && !store_stopped; }

    // the first position from which all rows up to the last compacted one are in the archive
    llama_pos archive_begin(llama_seq_id seq_id) const;

    // can the cells be filled so that the sequence can go on at p0? recr_saved: the recurrent part will be restored
    bool can_fill(llama_seq_id seq_id, llama_pos p0, llama_pos begin, bool recr_saved) const;

    // rows of windowed layers that a state has
    uint32_t n_saved(llama_seq_id seq_id) const;

    // do the windowed layers still have all rows that position p0 sees?
    bool can_cut_window(llama_seq_id seq_id, llama_pos p0) const;

    // at most n rows for each head: those that always stay, the last n_window before p0, the given rows (ascending), then rows that are in the
    // cells; if no rows are given, also the newest others
    filling plan(llama_seq_id seq_id, llama_pos p0, uint32_t n, uint32_t n_window, const std::vector<llama_pos> & rows) const;

    // fills all cells or changes nothing, except that the sequence is cleared if rows may already have moved
    // LLAMA_QFILTER_REFUSED: a part of the memory can't be cut at p0
    llama_qfilter_result fill(llama_seq_id seq_id, filling f, const std::vector<uint8_t> & recr_state);

    // cut all parts at p0, the bounded one as far as upstream can; recr_state: state of the recurrent part at p0, or empty
    bool cut_parts(llama_seq_id seq_id, llama_pos p0, const std::vector<uint8_t> & recr_state);

    bool rewind(llama_seq_id seq_id, llama_pos p0);

    // the positions to bring back for a question, at most n_rows: the n_least with the largest weights, rows around its words,
    // and rows that its queries look at closely
    llama_qfilter_result choose(
            const llama_qfilter_asked & asked, uint32_t n_least, uint32_t n_rows, uint32_t n_window, std::vector<llama_pos> & rows);

    void note_tokens  (const llama_batch & batch);
    void note_question(const llama_batch & batch);

    std::unique_ptr<llama_qfilter_asked> end_question();

    // why the question can't be used; "": it can, and the sequence ends with it
    std::string why_no_question(const llama_qfilter_asked * question, llama_seq_id seq_id) const;

    // for each query of each KV head: log of the sum of exp(logit) over the question's own n rows of K, up to the query's token
    std::vector<std::vector<float>> own_sums(
            const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, const std::vector<float> & rows, uint32_t n) const;
};

// a context's memory as a bounded memory; nullptr: it is not one
llama_memory_qfilter * llama_memory_qfilter_of(llama_memory_t mem);

// set what llama_qfilter_last_error() returns; note_error() also logs it
void llama_qfilter_set_error (const std::string & message);
void llama_qfilter_note_error(const std::string & message);

//
// called by llama_context
//

// like model.create_memory(), bounded if params is set
llama_memory_i * llama_qfilter_create_memory(
        const llama_model          & model,
        const llama_memory_params  & params_mem,
        const llama_cparams        & cparams,
        const llama_qfilter_params * params);

// what llama_decode() shall return when the memory could not be prepared for a batch
int32_t llama_qfilter_decode_error(llama_memory_t mem);

// upstream's llama_init_from_model(), which now takes our parameters; defined in llama-context.cpp
llama_context * llama_qfilter_init_context(llama_model * model, llama_context_params cparams, const llama_qfilter_params * params);
