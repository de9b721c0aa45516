#pragma once

#include "llama-qfilter-table.h"
#include "llama-qfilter-vectors.h"

#include "ggml-cpp.h"

#include <functional>
#include <memory>
#include <vector>

// result of a call of the engine, as llama_decode() returns it
enum llama_qfilter_result {
    LLAMA_QFILTER_DONE    =  0,
    LLAMA_QFILTER_NO_ROOM =  1,
    LLAMA_QFILTER_ABORTED =  2,
    LLAMA_QFILTER_REFUSED = -1,
    LLAMA_QFILTER_NO_MEM  = -2,
    LLAMA_QFILTER_FAILED  = -3,
};

// the CPU backend of a context, used as a thread pool
struct llama_qfilter_threads {
    ggml_backend_t backend = nullptr;
    int32_t        n       = 1;

    // use as many threads as the context has now
    void update(const llama_context * lctx);

    // runs fn(i, ith) for i in [0, n_tasks), ith < n; false: not all of them have run
    bool run(size_t n_tasks, const std::function<void(size_t i, int ith)> & fn) const;
};

// our own graph, outside of the context's scheduler: all of it runs on one backend
struct llama_qfilter_graph {
    ggml_context * start(size_t n_tensors); // drops what was built before

    // the first node that the backend can't compute, or nullptr
    const ggml_tensor * unsupported(ggml_backend_t backend) const;

    // allocates memory for its nodes. ggml_gallocr_alloc_graph() alone would reuse the placement of the previous graph if the
    // sizes fit, but which nodes may share memory depends on their order, and their order depends on the number of rows
    bool alloc(ggml_gallocr_t galloc);

    // computes it and reads all outputs, F32, one after the other
    llama_qfilter_result scores(ggml_backend_t backend, std::vector<float> & out);

    // nodes that compute something
    uint64_t n_nodes() const;

    size_t n_bytes() const { return mem.capacity(); }

    ggml_cgraph * gf = nullptr;

    std::vector<ggml_tensor *> inputs;
    std::vector<ggml_tensor *> outputs;

private:
    std::vector<uint8_t> mem;

    ggml_context_ptr ctx;
};

// scores and moves the rows of all layers whose K and V lie on one device
class llama_qfilter_worker {
public:
    llama_qfilter_worker(ggml_backend_t backend, const llama_qfilter_policy_info & policy, const llama_qfilter_threads & threads);

    virtual ~llama_qfilter_worker() = default;

    // the CPU reads and copies rows itself
    static std::unique_ptr<llama_qfilter_worker> on_host(
            ggml_backend_t backend, const llama_qfilter_policy_info & policy, const llama_qfilter_threads & threads);

    // graphs on the device's own backend read and copy rows
    static std::unique_ptr<llama_qfilter_worker> on_device(
            ggml_backend_t backend, const llama_qfilter_policy_info & policy, const llama_qfilter_threads & threads);

    // builds all graphs at their largest, so that an unsupported op or a lack of memory shows when the context is made
    // throws std::runtime_error
    virtual void init(uint32_t n_cells);

    // scores layers [i0, i0 + n_layers_at_once()) of the worker: [n_rows, n_head, n_parts] by rank, one layer after the other
    llama_qfilter_result score(size_t i0, uint32_t is, const llama_qfilter_order & order, std::vector<float> & scores);

    // layers whose scores are in memory at once
    virtual size_t n_layers_at_once() const = 0;

    // moves the rows that stay to the first cells of stream is, in two steps: first all that can fail without harm, then the rows
    virtual llama_qfilter_result prepare_move(uint32_t is, const llama_qfilter_selection & sel) = 0;
    virtual llama_qfilter_result move        (uint32_t is, const llama_qfilter_selection & sel) = 0;

    virtual size_t n_bytes() const; // allocated

    uint64_t n_nodes = 0; // computed by the graphs of the last eviction

    const ggml_backend_t backend;

    std::vector<llama_qfilter_layer> layers;

    uint32_t n_parts = 1; // of a score, see llama_qfilter_policy_info::score

protected:
    // may the policy's score_cpu be used, if it has one? it takes all rows of a layer at once
    virtual bool is_cpu() const = 0;

    // heads of a layer whose rows are copied at once
    virtual uint32_t n_heads_at_once(const llama_qfilter_layer & layer) const = 0;

    // can the backend read the rows of only some heads of a layer? if not, it reads those of all heads
    bool by_group = true;

    ggml_gallocr_ptr galloc;

    llama_qfilter_graph graph;

    const llama_qfilter_policy_info & policy;

    const llama_qfilter_threads & threads;

private:
    void build_score(size_t i0, uint32_t is, uint32_t n_rows);
};
