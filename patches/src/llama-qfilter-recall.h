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

// how much of their attention queries give to rows that lie in host memory
class llama_qfilter_scorer {
public:
    // on_host: the backend is the CPU, and its memory the host's; n_bytes_part: at most, for rows and what is computed from them
    llama_qfilter_scorer(ggml_backend_t backend, bool on_host, const llama_qfilter_threads & threads, size_t n_bytes_part);

    // can the backend do it for this layer?
    bool supports(const llama_qfilter_layer & layer);

    // weights[i] = max(weights[i], the largest weight that a query gives to row i in the softmax over all rows)
    // k: all heads of a row one after the other, as they are in the cache
    llama_qfilter_result score(
            const llama_qfilter_layer            & layer,
            const llama_qfilter_queries          & queries,
            const std::vector<llama_qfilter_run> & k,
                  std::vector<float>             & weights);

    size_t n_bytes() const;

private:
    enum build_type {
        BUILD_ALL,     // -> weights of all rows
        BUILD_SUMS,    // -> for each query the logarithm of the sum of the exponentials over a part of the rows
        BUILD_WEIGHTS, // -> weights of a part of the rows; those within it are to be multiplied by a factor for each query
    };

    void build(build_type type, const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, uint32_t n_rows);

    ggml_tensor * sums   (ggml_context * ctx, ggml_tensor * kq, ggml_tensor * p);
    ggml_tensor * largest(ggml_context * ctx, ggml_tensor * p, ggml_tensor * factors);

    llama_qfilter_result compute(
            const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, const std::vector<llama_qfilter_run> & k, uint32_t i0, uint32_t n_rows);

    const ggml_backend_t backend;
    const bool           on_host;
    const size_t         n_bytes_part;

    const llama_qfilter_threads & threads;

    ggml_gallocr_ptr galloc;

    llama_qfilter_graph graph; // inputs: K, the queries of each head, for BUILD_WEIGHTS the factors of each; outputs: of each

    float scale = 0.0f; // of what goes into the softmax
};
