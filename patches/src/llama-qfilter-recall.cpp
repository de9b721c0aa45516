#include "llama-qfilter-recall.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// graph nodes and leaves per head, at most
static const size_t LLAMA_QFILTER_SCORER_TENSORS = 24;

llama_qfilter_scorer::llama_qfilter_scorer(ggml_backend_t backend, bool on_host, const llama_qfilter_threads & threads, size_t n_bytes_part) :
    backend(backend), on_host(on_host), n_bytes_part(n_bytes_part), threads(threads), galloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend))) {
}

size_t llama_qfilter_scorer::n_bytes() const {
    return graph.n_bytes() + ggml_gallocr_get_buffer_size(galloc.get(), 0);
}

bool llama_qfilter_scorer::supports(const llama_qfilter_layer & layer) {
    llama_qfilter_queries queries;

    queries.heads.assign(layer.n_head, std::vector<float>((size_t) layer.n_rep*layer.n_embd_k));
    queries.softcap = 1.0f;

    for (const auto type : { BUILD_ALL, BUILD_SUMS, BUILD_WEIGHTS }) {
        build(type, layer, queries, 256);

        if (const auto * bad = graph.unsupported(backend)) {
            LLAMA_LOG_WARN("%s: %s can't score archived rows of %s (%s): the CPU does\n", __func__,
                    ggml_backend_name(backend), ggml_type_name(layer.k[0]->type), ggml_op_desc(bad));
            return false;
        }
    }

    return true;
}

// kq: [n_rows, n], p: its softmax -> [1, n]
ggml_tensor * llama_qfilter_scorer::sums(ggml_context * ctx, ggml_tensor * kq, ggml_tensor * p) {
    if (on_host) {
        ggml_tensor * args[] = { kq, p };

        // log(sum) = x - log(p) for any row; the largest p is exact
        return ggml_custom_4d(ctx, GGML_TYPE_F32, 1, kq->ne[1], 1, 1, args, 2, [](ggml_tensor * dst, int ith, int nth, void * data) {
            const int64_t n_rows = dst->src[0]->ne[0];

            for (int64_t i = ith; i < dst->ne[1]; i += nth) {
                const float * x = (const float *) dst->src[0]->data + i*n_rows;
                const float * p = (const float *) dst->src[1]->data + i*n_rows;

                const int64_t j = std::max_element(p, p + n_rows) - p;

                ((float *) dst->data)[i] = *(const float *) data*x[j] - logf(p[j]);
            }
        }, GGML_N_TASKS_MAX, &scale);
    }

    // log(sum) = c + log(sum(exp(x - c))), where c, the mean of x by p, is less than log(n_rows) below the largest x
    ggml_tensor * x = ggml_scale(ctx, kq, scale);
    ggml_tensor * c = ggml_sum_rows(ctx, ggml_mul(ctx, p, x));

    return ggml_add(ctx, c, ggml_log(ctx, ggml_sum_rows(ctx, ggml_exp(ctx, ggml_sub(ctx, x, c)))));
}

// p: [n_rows, n], factors: [1, n] or nullptr -> [n_rows]
ggml_tensor * llama_qfilter_scorer::largest(ggml_context * ctx, ggml_tensor * p, ggml_tensor * factors) {
    if (on_host) {
        ggml_tensor * args[] = { p, factors };

        return ggml_custom_4d(ctx, GGML_TYPE_F32, p->ne[0], 1, 1, 1, args, factors ? 2 : 1, [](ggml_tensor * dst, int ith, int nth, void *) {
            const ggml_tensor * p = dst->src[0];
            const ggml_tensor * f = dst->src[1];

            const int64_t r0 = p->ne[0]*ith/nth;
            const int64_t r1 = p->ne[0]*(ith + 1)/nth;

            float * out = (float *) dst->data;

            std::fill(out + r0, out + r1, 0.0f);

            for (int64_t i = 0; i < p->ne[1]; ++i) {
                const float * x = (const float *) p->data + i*p->ne[0];
                const float   m = f ? ((const float *) f->data)[i] : 1.0f;

                for (int64_t r = r0; r < r1; ++r) {
                    const float y = m*x[r];

                    out[r] = out[r] > y ? out[r] : y;
                }
            }
        }, GGML_N_TASKS_MAX, nullptr);
    }

    if (factors) {
        p = ggml_mul(ctx, p, factors);
    }

    return ggml_pool_2d(ctx, p, GGML_OP_POOL_MAX, 1, p->ne[1], 1, p->ne[1], 0, 0);
}

void llama_qfilter_scorer::build(build_type type, const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, uint32_t n_rows) {
    auto * ctx = graph.start(layer.n_head*LLAMA_QFILTER_SCORER_TENSORS + 1);

    const ggml_tensor * kc = layer.k[0];

    ggml_tensor * k = ggml_new_tensor_2d(ctx, kc->type, kc->ne[0], n_rows);
    ggml_set_input(k);

    graph.inputs.push_back(k);

    scale = queries.softcap != 0.0f ? queries.softcap : queries.scale;

    std::vector<ggml_tensor *> factors;

    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        ggml_tensor * q = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layer.n_embd_k, queries.n(layer, ih));
        ggml_set_input(q);

        graph.inputs.push_back(q);

        ggml_tensor * kh = ggml_view_2d(ctx, k, layer.n_embd_k, n_rows, k->nb[1], ggml_row_size(k->type, ih*layer.n_embd_k));

        ggml_tensor * kq = ggml_mul_mat(ctx, kh, q);

        if (queries.softcap != 0.0f) {
            kq = ggml_tanh(ctx, ggml_scale(ctx, kq, queries.scale/queries.softcap));
        }

        ggml_tensor * cur = ggml_soft_max_ext(ctx, kq, nullptr, scale, 0.0f);

        if (type == BUILD_SUMS) {
            cur = sums(ctx, kq, cur);
        } else {
            ggml_tensor * f = nullptr;

            if (type == BUILD_WEIGHTS) {
                f = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, q->ne[1]);
                ggml_set_input(f);

                factors.push_back(f);
            }
            cur = largest(ctx, cur, f);
        }

        ggml_set_output(cur);
        ggml_build_forward_expand(graph.gf, cur);

        graph.outputs.push_back(cur);
    }

    graph.inputs.insert(graph.inputs.end(), factors.begin(), factors.end());
}

// rows [i0, i0 + n_rows), with the graph that was built for them
llama_qfilter_result llama_qfilter_scorer::compute(
        const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, const std::vector<llama_qfilter_run> & k, uint32_t i0, uint32_t n_rows) {
    ggml_tensor * dst = graph.inputs[0];

    struct piece {
        const uint8_t * src;
        size_t          offset;
        size_t          n_bytes;
    };

    std::vector<piece> pieces;

    uint32_t i = 0;
    for (const auto & run : k) {
        const uint32_t j0 = std::max(i, i0);
        const uint32_t j1 = std::min(i + run.n, i0 + n_rows);

        if (j0 < j1) {
            pieces.push_back({ run.data + (j0 - i)*dst->nb[1], (j0 - i0)*dst->nb[1], (j1 - j0)*dst->nb[1] });
        }
        i += run.n;
    }

    if (on_host) {
        if (!threads.run(pieces.size(), [&](size_t i, int) { memcpy((uint8_t *) dst->data + pieces[i].offset, pieces[i].src, pieces[i].n_bytes); })) {
            return LLAMA_QFILTER_ABORTED;
        }
    } else {
        for (const auto & p : pieces) {
            ggml_backend_tensor_set_async(backend, dst, p.src, p.offset, p.n_bytes);
        }
    }

    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        ggml_backend_tensor_set(graph.inputs[1 + ih], queries.heads[ih].data(), 0, ggml_nbytes(graph.inputs[1 + ih]));
    }

    const auto status = ggml_backend_graph_compute(backend, graph.gf);

    return status == GGML_STATUS_SUCCESS ? LLAMA_QFILTER_DONE : status == GGML_STATUS_ABORTED ? LLAMA_QFILTER_ABORTED : LLAMA_QFILTER_FAILED;
}

llama_qfilter_result llama_qfilter_scorer::score(
        const llama_qfilter_layer            & layer,
        const llama_qfilter_queries          & queries,
        const std::vector<llama_qfilter_run> & k,
              std::vector<float>             & weights) {
    const uint32_t n_rows = weights.size();

    size_t n_queries = 1;
    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        n_queries = std::max(n_queries, queries.n(layer, ih));
    }

    // a head's product and its softmax are there at once
    const size_t   n_bytes_row = layer.k[0]->nb[1] + 2*n_queries*sizeof(float);
    const uint32_t n_chunk     = std::max<size_t>(1, n_bytes_part/n_bytes_row);

    // for each head: of the softmax in each part, and in all of them
    std::vector<std::vector<float>> parts;
    std::vector<std::vector<float>> all(layer.n_head);

    const auto run = [&](build_type type, const std::function<void(uint32_t i0, uint32_t n)> & before, const std::function<void(uint32_t i0, uint32_t n)> & after) {
        for (uint32_t i0 = 0; i0 < n_rows; i0 += n_chunk) {
            const uint32_t n = std::min(n_chunk, n_rows - i0);

            build(type, layer, queries, n);

            if (!graph.alloc(galloc.get())) {
                return LLAMA_QFILTER_NO_MEM;
            }
            before(i0, n);

            const auto res = compute(layer, queries, k, i0, n);
            if (res != LLAMA_QFILTER_DONE) {
                return res;
            }
            after(i0, n);
        }
        return LLAMA_QFILTER_DONE;
    };

    const auto nothing = [](uint32_t, uint32_t) {};

    const auto get = [](const ggml_tensor * t) {
        std::vector<float> res(ggml_nelements(t));
        ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));
        return res;
    };

    const auto take_weights = [&](uint32_t i0, uint32_t n) {
        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            const auto w = get(graph.outputs[ih]);

            for (uint32_t i = 0; i < n; ++i) {
                weights[i0 + i] = std::max(weights[i0 + i], w[i]);
            }
        }
    };

    if (n_rows <= n_chunk) {
        return run(BUILD_ALL, nothing, take_weights);
    }

    const auto res = run(BUILD_SUMS, nothing, [&](uint32_t, uint32_t) {
        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            parts.push_back(get(graph.outputs[ih]));
        }
    });
    if (res != LLAMA_QFILTER_DONE) {
        return res;
    }

    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        for (size_t iq = 0; iq < queries.n(layer, ih); ++iq) {
            double x_max = -INFINITY;
            double sum   = 0.0;

            for (size_t i = ih; i < parts.size(); i += layer.n_head) {
                x_max = std::max<double>(x_max, parts[i][iq]);
            }
            for (size_t i = ih; i < parts.size(); i += layer.n_head) {
                sum += std::exp(parts[i][iq] - x_max);
            }
            all[ih].push_back(x_max + std::log(sum));
        }
    }

    return run(BUILD_WEIGHTS, [&](uint32_t i0, uint32_t) {
        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            auto factors = parts[i0/n_chunk*layer.n_head + ih];

            for (size_t iq = 0; iq < factors.size(); ++iq) {
                factors[iq] = std::exp(factors[iq] - all[ih][iq]);
            }

            ggml_tensor * f = graph.inputs[1 + layer.n_head + ih];
            ggml_backend_tensor_set(f, factors.data(), 0, ggml_nbytes(f));
        }
    }, take_weights);
}
