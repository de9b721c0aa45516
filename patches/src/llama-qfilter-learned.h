#pragma once

#include "llama-qfilter-worker.h"

#include <map>
#include <utility>
#include <vector>

//
// llama_qfilter_learned
//

// learned filters: a linear map from what the cache holds at a position, keys before RoPE and values of all KV heads of a
// layer, to a number for each head. a row gets it once, while all heads still have the rows of its position
class llama_qfilter_learned {
public:
    // a layer's rows of some positions
    struct rows {
        size_t i; // the layer among those that evict

        ggml_tensor * k; // [n_embd_k*n_head, n]
        ggml_tensor * v; // [n_embd_v*n_head, n]
    };

    // throws std::runtime_error if a layer has none, or of another shape. how the cached rows are rotated: see llama_qfilter_rotation
    void load(
            const llama_qfilter_params             & params,
            const std::vector<llama_qfilter_layer> & layers,
                  llama_qfilter_rotation             rotation_k,
                  llama_qfilter_rotation             rotation_v);

    // throws std::runtime_error if the context's graph does not show how RoPE turns the keys, or there is no memory
    void init(llama_context * lctx);

    bool empty() const { return weights.empty(); }

    // at once, so that their copies take little memory
    static constexpr uint32_t n_rows_max = 1024;

    // throws std::runtime_error if the backend can't score n rows
    void check(ggml_backend_t backend, const std::vector<rows> & src, uint32_t n);

    // the rows idx of k and v, which are of the positions pos; on_host: k and v are the CPU's
    // out: [n_head, n] for each of src, one after the other
    llama_qfilter_result score(
            ggml_backend_t                 backend,
            bool                           on_host,
            const std::vector<rows>      & src,
            const std::vector<uint32_t>  & idx,
            const std::vector<llama_pos> & pos,
            std::vector<float>           & out);

    size_t n_bytes() const;

    uint64_t hash = 0; // of the filters as given

private:
    void build(bool on_host, const std::vector<rows> & src, const std::vector<llama_pos> & pos_rows);

    std::vector<int32_t> positions(const std::vector<llama_pos> & pos) const;

    ggml_gallocr_t galloc(ggml_backend_t backend);

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1, const void * data);

    std::vector<llama_qfilter_layer> layers;

    std::vector<std::vector<float>> weights; // [n_head, n_embd_k*n_head + n_embd_v*n_head] of each layer, V as the cache has it

    std::vector<ggml_tensor *> tensors; // the same beside the keys

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::vector<llama_qfilter_rope> ropes;

    llama_qfilter_rotation rotation; // of K

    llama_qfilter_graph graph;

    ggml_context * ctx = nullptr; // of the graph

    std::vector<std::pair<ggml_tensor *, const void *>> inputs; // and where their data is

    std::vector<int32_t> pos_graph; // as RoPE takes them

    std::map<ggml_backend_t, ggml_gallocr_ptr> gallocs;
};
