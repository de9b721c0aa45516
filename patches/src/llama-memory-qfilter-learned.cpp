// scores of a sequence's rows from learned filters

#include "llama-memory-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

std::vector<llama_qfilter_learned::rows> llama_memory_qfilter::learned_rows(const llama_qfilter_worker & w, llama_seq_id seq_id) const {
    std::vector<llama_qfilter_learned::rows> res;

    for (size_t i = 0; i < layers.size(); ++i) {
        if (std::any_of(w.layers.begin(), w.layers.end(), [&](const auto & l) { return l.il == layers[i].il; })) {
            res.push_back({ i, layers[i].k[seq_id], layers[i].v[seq_id] });
        }
    }

    return res;
}

// copies found, [n_head, r1 - r0] for each layer, to the columns [r0, r1) of out, [n_head_all, n]
static void llama_qfilter_put(const std::vector<llama_qfilter_layer> & layers, const std::vector<llama_qfilter_learned::rows> & src,
        const std::vector<float> & found, size_t r0, size_t r1, size_t n, std::vector<float> & out) {
    const float * x = found.data();

    for (const auto & s : src) {
        const auto & layer = layers[s.i];

        for (size_t r = r0; r < r1; ++r) {
            for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
                out[(layer.head0 + ih)*n + r] = *x++;
            }
        }
    }
}

llama_qfilter_result llama_memory_qfilter::learn_cells(
        llama_seq_id seq_id, const std::vector<uint32_t> & cells, const std::vector<llama_pos> & pos, std::vector<float> & out) {
    const size_t n = pos.size();

    out.resize(n_head_all*n);

    std::vector<float> found;

    for (auto & w : workers) {
        const auto src = learned_rows(*w, seq_id);

        for (size_t r0 = 0; r0 < n; r0 += llama_qfilter_learned::n_rows_max) {
            const size_t r1 = std::min<size_t>(r0 + llama_qfilter_learned::n_rows_max, n);

            const auto res = learned.score(w->backend, false, src,
                    { cells.begin() + r0, cells.begin() + r1 }, { pos.begin() + r0, pos.begin() + r1 }, found);
            if (res != LLAMA_QFILTER_DONE) {
                return res;
            }
            llama_qfilter_put(layers, src, found, r0, r1, n, out);
        }
    }

    return LLAMA_QFILTER_DONE;
}

llama_qfilter_result llama_memory_qfilter::learn_archive(llama_seq_id seq_id, const std::vector<llama_pos> & pos, std::vector<float> & out) {
    const size_t n = pos.size();

    out.resize(n_head_all*n);
    if (n == 0) {
        return LLAMA_QFILTER_DONE;
    }

    std::vector<float>   found;
    std::vector<uint8_t> data;

    for (size_t r0 = 0; r0 < n; r0 += llama_qfilter_learned::n_rows_max) {
        const size_t r1 = std::min<size_t>(r0 + llama_qfilter_learned::n_rows_max, n);

        const std::vector<llama_pos> part(pos.begin() + r0, pos.begin() + r1);

        std::vector<uint32_t> idx(part.size());
        std::iota(idx.begin(), idx.end(), 0);

        for (size_t i = 0; i < layers.size(); ++i) {
            const auto & l = store_layers[i];

            data.resize(part.size()*(l.n_bytes_k + l.n_bytes_v));

            ggml_context_ptr ctx(ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }));

            const auto rows = [&](const ggml_tensor * like, size_t offset, size_t n_bytes, uint8_t * dst) {
                for (size_t j = 0; j < part.size(); ++j) {
                    memcpy(dst + j*n_bytes, streams[seq_id].archive.row(part[j], offset, n_bytes), n_bytes);
                }
                ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), like->type, like->ne[0], part.size());
                t->data = dst;

                return t;
            };

            const std::vector<llama_qfilter_learned::rows> src = {{
                i,
                rows(layers[i].k[seq_id], l.k, l.n_bytes_k, data.data()),
                rows(layers[i].v[seq_id], l.v, l.n_bytes_v, data.data() + part.size()*l.n_bytes_k),
            }};

            const auto res = learned.score(threads.backend, true, src, idx, part, found);
            if (res != LLAMA_QFILTER_DONE) {
                return res;
            }
            llama_qfilter_put(layers, src, found, r0, r1, n, out);
        }
    }

    return LLAMA_QFILTER_DONE;
}

llama_qfilter_result llama_memory_qfilter::learn(llama_seq_id seq_id, const llama_qfilter_order & order, uint32_t n_window) {
    const auto & table = streams[seq_id].table;

    const uint32_t n  = order.n();
    const uint32_t r0 = table.rank_p0(order);

    std::vector<uint32_t>  ranks;
    std::vector<uint32_t>  cells;
    std::vector<llama_pos> pos;

    for (uint32_t r = n_first(seq_id); r < n - n_window; ++r) {
        if (!table.covers(order.pos[r])) {
            ranks.push_back(r);
            cells.push_back(order.cells[r]);
            pos.push_back(order.pos[r]);
        }
    }

    std::vector<float> found;

    const auto res = learn_cells(seq_id, cells, pos, found);
    if (res != LLAMA_QFILTER_DONE) {
        return res;
    }

    scores_learned.assign((size_t) n_head_all*n, NAN);

    for (uint32_t ih = 0; ih < n_head_all; ++ih) {
        float * out = scores_learned.data() + (size_t) ih*n;

        for (uint32_t r = 0; r < n; ++r) {
            if (table.covers(order.pos[r])) {
                out[r] = table.learned[(size_t) ih*table.n + r - r0];
            }
        }
        for (size_t i = 0; i < ranks.size(); ++i) {
            out[ranks[i]] = found[ih*ranks.size() + i];
        }
    }

    return LLAMA_QFILTER_DONE;
}

llama_qfilter_result llama_memory_qfilter::learn(llama_seq_id seq_id, filling & f) {
    const auto & st    = streams[seq_id];
    const auto   order = order_of(seq_id);

    const auto find = [](const llama_pos * begin, const llama_pos * end, llama_pos p) {
        const auto * it = std::lower_bound(begin, end, p);

        return it != end && *it == p ? it - begin : -1;
    };

    // the number of a row that a head holds already
    const auto held = [&](size_t i) {
        const auto * tab = st.table.pos.data() + i/f.table.n*st.table.n;

        return find(tab, tab + st.table.n, f.table.pos[i]);
    };

    std::vector<llama_pos> wanted; // by heads that do not hold them
    for (size_t i = 0; i < f.table.pos.size(); ++i) {
        if (held(i) < 0) {
            wanted.push_back(f.table.pos[i]);
        }
    }
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());

    std::vector<uint32_t>  cells;
    std::vector<llama_pos> pos_cells;
    std::vector<llama_pos> pos_archive;

    for (uint32_t r = 0; r < order.n(); ++r) {
        if (!st.table.covers(order.pos[r]) && std::binary_search(wanted.begin(), wanted.end(), order.pos[r])) {
            cells.push_back(order.cells[r]);
            pos_cells.push_back(order.pos[r]);
        }
    }
    for (const llama_pos p : wanted) {
        if (st.archive.has(p) && !std::binary_search(pos_cells.begin(), pos_cells.end(), p)) {
            pos_archive.push_back(p);
        }
    }

    std::vector<float> found_cells;
    std::vector<float> found_archive;

    auto res = learn_cells(seq_id, cells, pos_cells, found_cells);
    if (res == LLAMA_QFILTER_DONE) {
        res = learn_archive(seq_id, pos_archive, found_archive);
    }
    if (res != LLAMA_QFILTER_DONE) {
        return res;
    }

    f.table.learned.resize(f.table.pos.size());

    for (size_t i = 0; i < f.table.pos.size(); ++i) {
        const size_t    ih = i/f.table.n;
        const llama_pos p  = f.table.pos[i];

        const auto here     = held(i);
        const auto cell     = find(pos_cells.data(), pos_cells.data() + pos_cells.size(), p);
        const auto archived = find(pos_archive.data(), pos_archive.data() + pos_archive.size(), p);

        f.table.learned[i] =
            here     >= 0 ? st.table.learned[ih*st.table.n + here] :
            cell     >= 0 ? found_cells[ih*pos_cells.size() + cell] :
            archived >= 0 ? found_archive[ih*pos_archive.size() + archived] : NAN;
    }

    return LLAMA_QFILTER_DONE;
}
