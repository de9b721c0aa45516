#pragma once

#include "llama-qfilter-worker.h"

#include <map>
#include <utility>
#include <vector>

//
// llama_qfilter_learned
//

// learned filters: for each layer, a linear map from the keys (before RoPE) and values of all KV heads at a position to one
// score per head. a row is scored once, while all heads still hold the rows of its position
class llama_qfilter_learned {
public:
    // a layer's rows of some positions
    struct rows {
        size_t i; // the layer among those that evict

        ggml_tensor * k; // [n_embd_k*n_head, n]
        ggml_tensor * v; // [n_embd_v*n_head, n]
    };

    // rotation_k, rotation_v: of the cached rows, see llama_qfilter_rotation
    // throws std::runtime_error if a layer has no learned filter, or one of another shape
    void load(
            const llama_qfilter_params             & params,
            const std::vector<llama_qfilter_layer> & layers,
                  llama_qfilter_rotation             rotation_k,
                  llama_qfilter_rotation             rotation_v);

    // throws std::runtime_error if the context's graph does not show how RoPE turns the keys, or if out of memory
    void init(llama_context * lctx);

    bool empty() const { return weights.empty(); }

    // rows scored at once at most, so that their copies take little memory
    static constexpr uint32_t n_rows_max = 1024;

    // throws std::runtime_error if the backend can't score n rows
    void check(ggml_backend_t backend, const std::vector<rows> & src, uint32_t n);

    // score the rows idx of k and v, which have the positions pos; on_host: k and v lie in the CPU's memory
    // out: [n_head, n] for each entry of src, one after the other
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

    std::vector<std::vector<float>> weights; // [n_head, n_embd_k*n_head + n_embd_v*n_head] per layer, V rotated as in the cache

    std::vector<ggml_tensor *> tensors; // the same weights, on the device of the keys

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::vector<llama_qfilter_rope> ropes;

    llama_qfilter_rotation rotation; // of K

    llama_qfilter_graph graph;

    ggml_context * ctx = nullptr; // of the graph

    std::vector<std::pair<ggml_tensor *, const void *>> inputs; // each with its data

    std::vector<int32_t> pos_graph; // positions in the layout that RoPE takes

    std::map<ggml_backend_t, ggml_gallocr_ptr> gallocs;
};
