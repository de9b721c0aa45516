#pragma once

#include "llama-qfilter-worker.h"

#include <vector>

// the queries of a question's tokens, from all layers that attend to the rows of one layer
struct llama_qfilter_queries {
    // [n, n_embd_k] for each KV head, exactly as attention sees them (after RoPE)
    std::vector<std::vector<float>> heads;

    float scale   = 0.0f;
    float softcap = 0.0f; // 0: none

    size_t n(const llama_qfilter_layer & layer, uint32_t ih) const { return heads[ih].size()/layer.n_embd_k; }
};

// adjacent rows
struct llama_qfilter_run {
    const uint8_t * data;

    uint32_t n;
};

// how queries look at rows: for each row, the largest value over all queries
struct llama_qfilter_looks {
    explicit llama_qfilter_looks(size_t n_rows) : weights(n_rows, 0.0f), shares(n_rows, 0.0f) {}

    std::vector<float> weights; // the weight that a query gives to the row
    std::vector<float> shares;  // the share of its attention that a query gives to all rows that it looks at, if this is one

    // a query looks at a row that gets at least this weight
    static constexpr float min_weight = 0.1f;
};

// computes how much attention queries give to rows in host memory
class llama_qfilter_scorer {
public:
    // on_host: the backend is the CPU, which computes in host memory; n_bytes_part: most bytes for rows and their results
    llama_qfilter_scorer(ggml_backend_t backend, bool on_host, const llama_qfilter_threads & threads, size_t n_bytes_part);

    // can the backend compute it for this layer?
    bool supports(const llama_qfilter_layer & layer);

    // raises the looks of each KV head to what its queries give to the rows, in a softmax over all of these rows
    // k: rows as they are in the cache, with all heads of a row adjacent; the first n_sink rows do not count for shares
    // others: for each query of a head, log of the sum of exp(logit) over the other rows that it sees, or empty. if given, only
    // the weights are valid
    llama_qfilter_result score(
            const llama_qfilter_layer             & layer,
            const llama_qfilter_queries           & queries,
            const std::vector<llama_qfilter_run>  & k,
                  uint32_t                          n_sink,
            const std::vector<std::vector<float>> & others,
                  std::vector<llama_qfilter_looks> & looks);

    size_t n_bytes() const;

private:
    enum build_type {
        BUILD_ALL,    // -> looks at all rows
        BUILD_BESIDE, // -> the same, with other rows in the softmax
        BUILD_SUMS,   // -> for each query: log of the sum of exp(logit) over a part of the rows
        // these two multiply the weights within a part by a factor for each query
        BUILD_SHARES, // -> for each query: its share for the rows of a part that it looks at
        BUILD_LOOKS,  // -> looks at a part of the rows, given the shares over all parts
    };

    void build(build_type type, const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, uint32_t n_rows, uint32_t n_sink);

    ggml_tensor * sums  (ggml_context * ctx, ggml_tensor * kq, ggml_tensor * p);
    ggml_tensor * shares(ggml_context * ctx, ggml_tensor * p);
    ggml_tensor * looks (ggml_context * ctx, ggml_tensor * p, ggml_tensor * shares);

    llama_qfilter_result compute(
            const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, const std::vector<llama_qfilter_run> & k, uint32_t i0, uint32_t n_rows);

    const ggml_backend_t backend;
    const bool           on_host;
    const size_t         n_bytes_part;

    const llama_qfilter_threads & threads;

    ggml_gallocr_ptr galloc;

    // inputs: K, then for each head its queries, then for each its factors (or others), then for each its shares
    // outputs: one for each head
    llama_qfilter_graph graph;

    float    scale  = 0.0f; // factor of the logits in the softmax
    uint32_t n_sink = 0;    // first rows of a part, which do not count for shares
};
