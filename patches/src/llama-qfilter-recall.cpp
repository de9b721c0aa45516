#include "llama-qfilter-recall.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// graph nodes and leaves per head, at most
static const size_t LLAMA_QFILTER_SCORER_TENSORS = 40;

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

    // CUDA says that it supports a product with a part of such a row, but then aborts
    if (layer.k[0]->type == GGML_TYPE_IQ4_NL && !on_host) {
        return false;
    }

    for (const auto type : { BUILD_ALL, BUILD_BESIDE, BUILD_SUMS, BUILD_SHARES, BUILD_LOOKS }) {
        build(type, layer, queries, 256, 4);

        if (const auto * bad = graph.unsupported(backend)) {
            LLAMA_LOG_WARN("%s: %s can't score archived rows of %s (%s): the CPU does\n", __func__,
                    ggml_backend_name(backend), ggml_type_name(layer.k[0]->type), ggml_op_desc(bad));
            return false;
        }
    }

    return true;
}

// log of the sum of exp(logit) over the rows, for each query
//   kq: [n_rows, n], p: its softmax, returns [1, n]
ggml_tensor * llama_qfilter_scorer::sums(ggml_context * ctx, ggml_tensor * kq, ggml_tensor * p) {
    if (on_host) {
        ggml_tensor * args[] = { kq, p };

        // log(sum) = x - log(p) for any row; most exact for the row with the largest p
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

    // log(sum) = c + log(sum(exp(x - c))). c is the mean of x weighted by p: at most log(n_rows) less than the largest x
    ggml_tensor * x = ggml_scale(ctx, kq, scale);
    ggml_tensor * c = ggml_sum_rows(ctx, ggml_mul(ctx, p, x));

    return ggml_add(ctx, c, ggml_log(ctx, ggml_sum_rows(ctx, ggml_exp(ctx, ggml_sub(ctx, x, c)))));
}

// 1 if the query looks at the row, else 0
static ggml_tensor * llama_qfilter_looks_at(ggml_context * ctx, ggml_tensor * p) {
    return ggml_step(ctx, ggml_scale_bias(ctx, p, 1.0f, -llama_qfilter_looks::min_weight));
}

// for each query, the sum of the weights of the rows that it looks at
//   p: [n_rows, n], returns [1, n]
ggml_tensor * llama_qfilter_scorer::shares(ggml_context * ctx, ggml_tensor * p) {
    if (on_host) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, 1, p->ne[1], 1, 1, &p, 1, [](ggml_tensor * dst, int ith, int nth, void * data) {
            const ggml_tensor * p = dst->src[0];

            for (int64_t i = ith; i < p->ne[1]; i += nth) {
                const float * x = (const float *) p->data + i*p->ne[0];

                float sum = 0.0f;
                for (int64_t r = *(const uint32_t *) data; r < p->ne[0]; ++r) {
                    sum += x[r] > llama_qfilter_looks::min_weight ? x[r] : 0.0f;
                }
                ((float *) dst->data)[i] = sum;
            }
        }, GGML_N_TASKS_MAX, &n_sink);
    }

    ggml_tensor * x = ggml_mul(ctx, p, llama_qfilter_looks_at(ctx, p));

    if (n_sink >= p->ne[0]) {
        return ggml_scale(ctx, ggml_sum_rows(ctx, x), 0.0f);
    }

    return ggml_sum_rows(ctx, ggml_cont(ctx, ggml_view_2d(ctx, x, p->ne[0] - n_sink, p->ne[1], x->nb[1], n_sink*sizeof(float))));
}

// the weight and the share of each row, each the largest over all queries
//   p: [n_rows, n], shares: [1, n], returns [n_rows, 2]
ggml_tensor * llama_qfilter_scorer::looks(ggml_context * ctx, ggml_tensor * p, ggml_tensor * shares) {
    if (on_host) {
        ggml_tensor * args[] = { p, shares };

        return ggml_custom_4d(ctx, GGML_TYPE_F32, p->ne[0], 2, 1, 1, args, 2, [](ggml_tensor * dst, int ith, int nth, void *) {
            const ggml_tensor * p = dst->src[0];

            const int64_t r0 = p->ne[0]*ith/nth;
            const int64_t r1 = p->ne[0]*(ith + 1)/nth;

            float * weights = (float *) dst->data;
            float * shares  = (float *) dst->data + p->ne[0];

            std::fill(weights + r0, weights + r1, 0.0f);
            std::fill(shares  + r0, shares  + r1, 0.0f);

            for (int64_t i = 0; i < p->ne[1]; ++i) {
                const float * x = (const float *) p->data + i*p->ne[0];
                const float   s = ((const float *) dst->src[1]->data)[i];

                for (int64_t r = r0; r < r1; ++r) {
                    const float y = x[r] > llama_qfilter_looks::min_weight ? s : 0.0f;

                    weights[r] = weights[r] > x[r] ? weights[r] : x[r];
                    shares [r] = shares [r] > y    ? shares [r] : y;
                }
            }
        }, GGML_N_TASKS_MAX, nullptr);
    }

    const auto largest = [&](ggml_tensor * x) { return ggml_pool_2d(ctx, x, GGML_OP_POOL_MAX, 1, x->ne[1], 1, x->ne[1], 0, 0); };

    return ggml_concat(ctx, largest(p), largest(ggml_mul(ctx, llama_qfilter_looks_at(ctx, p), shares)), 1);
}

void llama_qfilter_scorer::build(
        build_type type, const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, uint32_t n_rows, uint32_t n_sink) {
    auto * ctx = graph.start(layer.n_head*LLAMA_QFILTER_SCORER_TENSORS + 1);

    const ggml_tensor * kc = layer.k[0];

    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_input(t);
        return t;
    };

    ggml_tensor * k = input(kc->type, kc->ne[0], n_rows);

    scale = queries.softcap != 0.0f ? queries.softcap : queries.scale;

    this->n_sink = n_sink;

    std::vector<ggml_tensor *> factors;
    std::vector<ggml_tensor *> given;

    graph.inputs.push_back(k);

    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        ggml_tensor * q = input(GGML_TYPE_F32, layer.n_embd_k, queries.n(layer, ih));

        graph.inputs.push_back(q);

        ggml_tensor * kh = ggml_view_2d(ctx, k, layer.n_embd_k, n_rows, k->nb[1], ggml_row_size(k->type, ih*layer.n_embd_k));

        ggml_tensor * kq = ggml_mul_mat(ctx, kh, q);
        ggml_prec_set_acc(kq, GGML_PREC_F32);

        if (queries.softcap != 0.0f) {
            kq = ggml_tanh(ctx, ggml_scale(ctx, kq, queries.scale/queries.softcap));
        }

        ggml_tensor * cur = ggml_soft_max_ext(ctx, kq, nullptr, scale, 0.0f);

        if (type == BUILD_BESIDE || type == BUILD_SHARES || type == BUILD_LOOKS) {
            ggml_tensor * f = input(GGML_TYPE_F32, 1, q->ne[1]);

            factors.push_back(f);

            if (type == BUILD_BESIDE) {
                f = ggml_sigmoid(ctx, ggml_sub(ctx, sums(ctx, kq, cur), f));
            }
            cur = ggml_mul(ctx, cur, f);
        }

        switch (type) {
            case BUILD_BESIDE:
            case BUILD_ALL:    cur = looks(ctx, cur, shares(ctx, cur)); break;
            case BUILD_SUMS:   cur = sums(ctx, kq, cur);                break;
            case BUILD_SHARES: cur = shares(ctx, cur);                  break;
            case BUILD_LOOKS:
                given.push_back(input(GGML_TYPE_F32, 1, q->ne[1]));
                cur = looks(ctx, cur, given.back());
                break;
        }

        ggml_set_output(cur);
        ggml_build_forward_expand(graph.gf, cur);

        graph.outputs.push_back(cur);
    }

    graph.inputs.insert(graph.inputs.end(), factors.begin(), factors.end());
    graph.inputs.insert(graph.inputs.end(), given.begin(),   given.end());
}

// computes the graph that was built for rows [i0, i0 + n_rows)
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
        const llama_qfilter_layer             & layer,
        const llama_qfilter_queries           & queries,
        const std::vector<llama_qfilter_run>  & k,
              uint32_t                          n_sink,
        const std::vector<std::vector<float>> & others,
              std::vector<llama_qfilter_looks> & looks) {
    const uint32_t n_rows = looks[0].weights.size();

    size_t n_queries = 1;
    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        n_queries = std::max(n_queries, queries.n(layer, ih));
    }

    // per head, the product, its softmax and two results of it are in memory at once
    const size_t   n_bytes_row = layer.k[0]->nb[1] + 4*n_queries*sizeof(float);
    const uint32_t n_chunk     = std::max<size_t>(1, n_bytes_part/n_bytes_row);

    // a number for each query of each head
    using per_query = std::vector<std::vector<float>>;

    const auto get = [](const ggml_tensor * t) {
        std::vector<float> res(ggml_nelements(t));
        ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));
        return res;
    };

    const auto set = [&](size_t i, const per_query & x) {
        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            ggml_backend_tensor_set(graph.inputs[i + ih], x[ih].data(), 0, ggml_nbytes(graph.inputs[i + ih]));
        }
    };

    // builds and computes a graph for each part of the rows
    const auto run = [&](build_type type, const std::function<void(size_t part)> & before, const std::function<void(size_t part)> & after) {
        for (size_t part = 0; part*n_chunk < n_rows; ++part) {
            const uint32_t i0 = part*n_chunk;
            const uint32_t n  = std::min(n_chunk, n_rows - i0);

            build(type, layer, queries, n, n_sink - std::min(n_sink, i0));

            if (!graph.alloc(galloc.get())) {
                return LLAMA_QFILTER_NO_MEM;
            }
            before(part);

            const auto res = compute(layer, queries, k, i0, n);
            if (res != LLAMA_QFILTER_DONE) {
                return res;
            }
            after(part);
        }
        return LLAMA_QFILTER_DONE;
    };

    const auto nothing = [](size_t) {};

    const auto take_looks = [&](size_t part) {
        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            const auto found = get(graph.outputs[ih]);

            const size_t n = found.size()/2;

            for (size_t i = 0; i < n; ++i) {
                float & w = looks[ih].weights[part*n_chunk + i];
                float & s = looks[ih].shares [part*n_chunk + i];

                w = std::max(w, found[i]);
                s = std::max(s, found[n + i]);
            }
        }
    };

    if (n_rows <= n_chunk) {
        return others.empty() ? run(BUILD_ALL, nothing, take_looks) : run(BUILD_BESIDE, [&](size_t) { set(1 + layer.n_head, others); }, take_looks);
    }

    // for each part: first log of its sum of exp(logit), then its factor, the part's share of the softmax over all rows
    std::vector<per_query> factors;

    auto res = run(BUILD_SUMS, nothing, [&](size_t) {
        factors.emplace_back();
        for (const auto * t : graph.outputs) {
            factors.back().push_back(get(t));
        }
    });
    if (res != LLAMA_QFILTER_DONE) {
        return res;
    }

    per_query shares;

    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        shares.emplace_back(queries.n(layer, ih), 0.0f);

        for (size_t iq = 0; iq < shares[ih].size(); ++iq) {
            const double x_others = others.empty() ? -INFINITY : others[ih][iq];

            double x_max = x_others;
            double sum   = 0.0;

            for (const auto & f : factors) {
                x_max = std::max<double>(x_max, f[ih][iq]);
            }
            for (const auto & f : factors) {
                sum += std::exp(f[ih][iq] - x_max);
            }
            sum += std::exp(x_others - x_max);

            for (auto & f : factors) {
                f[ih][iq] = std::exp(f[ih][iq] - (x_max + std::log(sum)));
            }
        }
    }

    res = !others.empty() ? LLAMA_QFILTER_DONE : run(BUILD_SHARES, [&](size_t part) { set(1 + layer.n_head, factors[part]); }, [&](size_t) {
        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            const auto found = get(graph.outputs[ih]);

            for (size_t iq = 0; iq < found.size(); ++iq) {
                shares[ih][iq] += found[iq];
            }
        }
    });
    if (res != LLAMA_QFILTER_DONE) {
        return res;
    }

    return run(BUILD_LOOKS, [&](size_t part) {
        set(1 + layer.n_head, factors[part]);
        set(1 + 2*layer.n_head, shares);
    }, take_looks);
}
