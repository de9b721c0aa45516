// how a question looks at the rows in the cells. if the question repeats the text, this tells how much each row is worth

#include "llama-memory-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// rows of a K cache in float32
static std::vector<float> llama_qfilter_floats(const ggml_tensor * k, const uint8_t * rows, uint32_t n) {
    std::vector<float> res(n*k->ne[0]);

    const auto to_float = ggml_get_type_traits(k->type)->to_float;

    for (uint32_t i = 0; i < n; ++i) {
        if (to_float) {
            to_float(rows + i*k->nb[1], res.data() + i*k->ne[0], k->ne[0]);
        } else {
            memcpy(res.data() + i*k->ne[0], rows + i*k->nb[1], k->ne[0]*sizeof(float));
        }
    }

    return res;
}

std::vector<std::vector<float>> llama_memory_qfilter::own_sums(
        const llama_qfilter_layer & layer, const llama_qfilter_queries & queries, const std::vector<float> & rows, uint32_t n) const {
    const size_t n_embd = layer.n_embd_k;
    const size_t n_row  = rows.size()/n;

    std::vector<std::vector<float>> res(layer.n_head);

    for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
        res[ih].resize(queries.n(layer, ih));
    }

    const bool done = threads.run(layer.n_head*res[0].size(), [&](size_t task, int) {
        const size_t ih = task/res[0].size();
        const size_t iq = task%res[0].size();

        const float * q = queries.heads[ih].data() + iq*n_embd;

        std::vector<float> x(iq%n + 1);

        for (size_t j = 0; j < x.size(); ++j) {
            const float * row = rows.data() + j*n_row + ih*n_embd;

            float kq = 0.0f;
            for (size_t d = 0; d < n_embd; ++d) {
                kq += q[d]*row[d];
            }
            kq *= queries.scale;

            x[j] = queries.softcap != 0.0f ? queries.softcap*std::tanh(kq/queries.softcap) : kq;
        }

        const float x_max = *std::max_element(x.begin(), x.end());

        float sum = 0.0f;
        for (const float y : x) {
            sum += std::exp(y - x_max);
        }
        res[ih][iq] = x_max + std::log(sum);
    });

    return done ? res : std::vector<std::vector<float>>();
}

int32_t llama_memory_qfilter::weights(llama_seq_id seq_id, int32_t il, float * out, size_t capacity) {
    const auto refuse = [&](const std::string & why) {
        llama_qfilter_note_error("no weights: " + why);
        return -1;
    };

    if (!has(seq_id) || !find_layer(il)) {
        return refuse(format("there is no sequence %d, or no layer %d that evicts", seq_id, il));
    }
    if (const auto why = why_no_question(asked.get(), seq_id); !why.empty()) {
        return refuse(why);
    }
    if (asked->n_batches != 1 || asked->n > lctx->get_cparams().n_ubatch) {
        return refuse("the question was read in several batches");
    }

    const auto & layer   = *find_layer(il);
    const auto & queries = asked->layers[&layer - layers.data()];

    const uint32_t n_question = asked->n;
    const size_t   n_blocks   = queries.n(layer, 0)/n_question; // query heads per KV head, in all layers that attend to it
    const size_t   n_rep      = layer.n_rep;

    const auto order = order_of(seq_id);

    // the rows of the question are the last ones in all heads
    const uint32_t n = std::lower_bound(order.pos.begin(), order.pos.end(), asked->p0) - order.pos.begin();

    if (order.n() - n != n_question || get_stream(seq_id).table.p1 > asked->p0) {
        return refuse("rows of the question were evicted");
    }

    const size_t n_out = layer.n_head*n_rep*n;

    if (n_out > INT32_MAX) {
        return refuse("too many rows");
    }
    if (!out || capacity < n_out || n == 0) {
        return n_out;
    }

    lctx->memory_update(false); // pending copies

    ggml_backend_sched_synchronize(lctx->get_sched());

    threads.update(lctx);

    const ggml_tensor * kc = layer.k[seq_id];

    std::vector<uint8_t> k(order.n()*kc->nb[1]);

    for (uint32_t r0 = 0, r1; r0 < order.n(); r0 = r1) {
        for (r1 = r0 + 1; r1 < order.n() && order.cells[r1] == order.cells[r1 - 1] + 1; ++r1) {}

        ggml_backend_tensor_get(kc, k.data() + r0*kc->nb[1], order.cells[r0]*kc->nb[1], (r1 - r0)*kc->nb[1]);
    }

    const std::vector<llama_qfilter_run> runs = { { k.data(), n } };
    const auto                           own  = llama_qfilter_floats(kc, k.data() + n*kc->nb[1], n_question);

    std::fill(out, out + n_out, 0.0f);

    for (size_t ib = 0; ib < n_blocks; ++ib) {
        llama_qfilter_queries part;

        part.scale   = queries.scale;
        part.softcap = queries.softcap;

        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            const auto begin = queries.heads[ih].begin() + ib*n_question*layer.n_embd_k;

            part.heads.emplace_back(begin, begin + n_question*layer.n_embd_k);
        }

        const auto others = own_sums(layer, part, own, n_question);
        if (others.empty()) {
            return refuse("aborted");
        }

        std::vector<llama_qfilter_looks> looks(layer.n_head, llama_qfilter_looks(n));

        const auto res = scorers[worker_of(layer)]->score(layer, part, runs, 0, others, looks);
        if (res != LLAMA_QFILTER_DONE) {
            return refuse(res == LLAMA_QFILTER_ABORTED ? "aborted" : res == LLAMA_QFILTER_NO_MEM ? "out of memory" : "the graph failed");
        }

        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            float * dst = out + (ih*n_rep + ib%n_rep)*n;

            for (uint32_t r = 0; r < n; ++r) {
                dst[r] = std::max(dst[r], looks[ih].weights[r]);
            }
        }
    }

    return n_out;
}
