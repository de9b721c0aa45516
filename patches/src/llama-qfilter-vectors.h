#pragma once

#include "qfilter.h"

#include "llama-qfilter-policy.h"

#include "ggml-backend.h"

#include <cstdint>
#include <functional>
#include <vector>

// FNV-1a
constexpr uint64_t LLAMA_QFILTER_HASH_INIT = 0xcbf29ce484222325ull;

uint64_t llama_qfilter_hash(uint64_t hash, const void * data, size_t size);

// the vectors of a kind for a layer, or nullptr
const llama_qfilter_vectors * llama_qfilter_find(const llama_qfilter_params & params, int32_t kind, int32_t il);

// the layer whose cached K the tensor holds, or -1
int32_t llama_qfilter_layer_of(const ggml_tensor * k);

// a layer whose rows are evicted
struct llama_qfilter_layer {
    int32_t il; // in the model

    uint32_t n_head;   // KV heads
    uint32_t n_rep;    // query heads of a KV head
    uint32_t head0;    // its first KV head among those of all layers
    uint32_t n_embd_k; // of a head
    uint32_t n_embd_v;

    // [n_embd_k*n_head, n_cells] and [n_embd_v*n_head, n_cells] for each stream
    std::vector<ggml_tensor *> k;
    std::vector<ggml_tensor *> v;

    ggml_tensor * vectors = nullptr; // of the policy, on the device of k
};

//
// llama_qfilter_rope
//

// how RoPE turns the queries of a layer by their positions, read from a context's graph
struct llama_qfilter_rope {
    // call it before the context decodes. false: the graph changes the queries again after RoPE, or RoPE is not found
    bool init(llama_context * lctx, int32_t il);

    // x: [n_embd_head, n_rows, n_pos]; back: undo RoPE instead of applying it
    bool turn(bool back, const llama_pos * pos, int64_t n_pos, int64_t n_rows, float * x) const;

    // a: [n_embd_head, n_rows, n_pos], b: see positions(), c: the factors, or nullptr
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, bool back) const;

    // positions in the layout that RoPE takes
    std::vector<int32_t> positions(bool back, const llama_pos * pos, int64_t n_pos) const;

    bool operator==(const llama_qfilter_rope & other) const;

    ggml_backend_t backend_cpu = nullptr;

    int64_t n_embd_head = 0; // 0: no RoPE in this layer
    int32_t op_params[GGML_MAX_OP_PARAMS/sizeof(int32_t)];

    std::vector<float> factors; // the frequencies are divided by them
};

//
// llama_qfilter_vector_store
//

// how llama.cpp rotates the rows of a quantized cache, in blocks of n_rot numbers: see llama_kv_cache::build_input_k_rot()
// and build_input_v_rot(). the matrix is its own inverse
struct llama_qfilter_rotation {
    uint32_t n_rot = 0; // 0: not at all

    const std::vector<float> * matrix = nullptr; // [n_rot, n_rot]

    void apply(float * x, size_t n) const;
};

// the vectors that a policy scores with, of all layers
class llama_qfilter_vector_store {
public:
    // throws std::runtime_error if the policy needs vectors that a layer does not have, or that are of another shape
    void load(
            const llama_qfilter_policy_info        & policy,
            const llama_qfilter_params             & params,
            const std::vector<llama_qfilter_layer> & layers,
                  llama_qfilter_rotation             rotation);

    // needed for queries, which are before RoPE. throws std::runtime_error if the graph does not show how RoPE turns them
    void init_ropes(llama_context * lctx, const std::vector<llama_qfilter_layer> & layers);

    bool empty() const { return kind < 0; }

    // shape of a layer's vectors, see llama_qfilter_policy_info::score
    void shape(const llama_qfilter_layer & layer, int64_t ne[4]) const;

    // sets layer.vectors of all layers, for queries at the positions from pos on; other kinds do not depend on pos
    bool set(const std::vector<llama_qfilter_layer> & layers, llama_pos pos) const;

    // do the vectors depend on the position?
    bool turns() const { return kind == LLAMA_QFILTER_KIND_QUERIES; }

    uint64_t hash = LLAMA_QFILTER_HASH_INIT; // of the vectors as given, or of the seed

private:
    int32_t  kind = -1; // enum llama_qfilter_kind, -1: none
    uint32_t rank = 0;  // of moments

    llama_qfilter_rotation rotation;

    std::vector<std::vector<float>> data; // for each layer, rotated as the cached K; queries are before RoPE and not rotated

    std::vector<llama_qfilter_rope>  ropes; // of the queries of each layer
    std::vector<std::vector<size_t>> same;  // groups of layers with the same rope
};
