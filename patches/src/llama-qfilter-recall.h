#pragma once

#include "llama-qfilter-worker.h"

#include <vector>

// the queries of a question's tokens, of the layers that attend the rows of one layer
struct llama_qfilter_queries {
    // for each KV head [n, n_embd_k], after RoPE and whatever else attention sees
    std::vector<std::vector<float>> heads;

    float scale   = 0.0f;
    float softcap = 0.0f; // 0: none

    size_t n(const llama_qfilter_layer & layer, uint32_t ih) const { return heads[ih].size()/layer.n_embd_k; }
};

// rows that lie one after the other
struct llama_qfilter_run {
    const uint8_t * data;

    uint32_t n;
};

// how queries look at rows, for each row the largest over all queries
struct llama_qfilter_looks {
    explicit llama_qfilter_looks(size_t n_rows) : weights(n_rows, 0.0f), shares(n_rows, 0.0f) {}

    std::vector<float> weights; // the weight that a query gives to the row
    std::vector<float> shares;  // what a query that looks at few rows gives to all of them together, if the row is among them

    // a query looks at a row that gets at least this weight
    static constexpr float min_weight = 0.1f;
};

// how much of their attention queries give to rows that lie in host memory
class llama_qfilter_scorer {
public:
    // on_host: the backend is the CPU, and its memory the host's; n_bytes_part: at most, for rows and what is computed from them
    llama_qfilter_scorer(ggml_backend_t backend, bool on_host, const llama_qfilter_threads & threads, size_t n_bytes_part);

    // can the backend do it for this layer?
    bool supports(const llama_qfilter_layer & layer);

    // adds to the looks of each KV head what its queries give to rows in the softmax over all of them
    // k: all heads of a row one after the other, as they are in the cache; the first n_sink rows count for no share
    // others: for each query of a head the logarithm of what rows that it sees besides add to the sum, or empty. with them only
    // the weights count
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
        BUILD_BESIDE, // -> the same beside others
        BUILD_SUMS,   // -> for each query the logarithm of the sum of the exponentials over a part of the rows
        // the weights within a part are to be multiplied by a factor for each query
        BUILD_SHARES, // -> for each query what it gives to the rows of a part that it looks at
        BUILD_LOOKS,  // -> looks at a part of the rows, from the shares of all parts
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

    llama_qfilter_graph graph; // inputs: K, the queries of each head, then for each the factors, or what others add, then the shares; outputs: of each

    float    scale  = 0.0f; // of what goes into the softmax
    uint32_t n_sink = 0;    // first rows of a part that count for no share
};
