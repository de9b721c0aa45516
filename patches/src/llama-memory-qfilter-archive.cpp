// the archive of evicted rows. they come back when a sequence is cut back to an earlier position, or when a question looks at
// them

#include "llama-memory-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

void llama_memory_qfilter::init_archive(const llama_qfilter_params & params) {
    if (params.n_bytes_archive == 0) {
        return;
    }

    size_t size = 0;

    for (const auto & layer : layers) {
        llama_qfilter_archive_layer l = { 0, 0, layer.k[0]->nb[1], layer.v[0]->nb[1] };

        l.k   = size;
        size += l.n_bytes_k*llama_qfilter_archive::n_block;
        l.v   = size;
        size += l.n_bytes_v*llama_qfilter_archive::n_block;

        store_layers.push_back(l);
    }

    const uint64_t n_bytes_min = (uint64_t) size*((n_sink + llama_qfilter_archive::n_block - 1)/llama_qfilter_archive::n_block + 2);

    if (params.n_bytes_archive < n_bytes_min) {
        throw std::runtime_error(format("an archive of %llu bytes is too small: of this cache it needs at least %llu",
                    (unsigned long long) params.n_bytes_archive, (unsigned long long) n_bytes_min));
    }

    // devices copy faster from their own type of host memory
    auto * buft = ggml_backend_buffer_get_type(layers[0].k[0]->buffer);
    auto * dev  = ggml_backend_buft_get_device(buft);

    store = std::make_unique<llama_qfilter_archive_store>(size, params.n_bytes_archive, params.archive_dir ? params.archive_dir : "",
            dev && !ggml_backend_buft_is_host(buft) ? ggml_backend_dev_host_buffer_type(dev) : nullptr);
}

void llama_memory_qfilter::init_scorers() {
    const size_t n_bytes_part = flags & LLAMA_QFILTER_FLAG_SMALL_PARTS ? 32*1024 : 64*1024*1024;

    for (size_t i = 0; i < workers.size(); ++i) {
        const bool on_host = is_on_host(workers[i]->layers[0]);

        auto scorer = std::make_unique<llama_qfilter_scorer>(workers[i]->backend, on_host, threads, n_bytes_part);

        if (!on_host && !std::all_of(workers[i]->layers.begin(), workers[i]->layers.end(), [&](const auto & l) { return scorer->supports(l); })) {
            scorer = std::make_unique<llama_qfilter_scorer>(threads.backend, true, threads, n_bytes_part);
        }
        scorers.push_back(std::move(scorer));
    }
}

void llama_memory_qfilter::forget_empty(stream & st) const {
    const uint32_t n_first = st.begun ? 0 : st.n_first;

    st = stream();
    st.n_first = n_first;
}

void llama_memory_qfilter::note_begun() {
    for (size_t is = 0; is < streams.size(); ++is) {
        streams[is].begun = streams[is].begun || kv.v_cells[is].get_used() > 0;
    }
}

void llama_memory_qfilter::forget_empty() {
    for (size_t is = 0; is < streams.size(); ++is) {
        if (kv.v_cells[is].get_used() == 0) {
            forget_empty(streams[is]);
        }
    }
}

//
// archive
//

uint8_t * llama_memory_qfilter::archive_block(llama_seq_id seq_id, llama_pos pos) {
    while (true) {
        if (auto * data = streams[seq_id].archive.write(pos, *store)) {
            return data;
        }

        // the sequence with the most blocks gives up its oldest one, to which rows may still be copied
        std::vector<size_t> order(streams.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return streams[a].archive.n_blocks() > streams[b].archive.n_blocks(); });

        archive_sync();

        if (!store->full() || std::none_of(order.begin(), order.end(), [&](size_t is) { return streams[is].archive.drop_oldest(n_first(is)); })) {
            if (!streams[seq_id].incomplete) {
                LLAMA_LOG_WARN("qfilter: no memory for the archive, it ends at position %d of sequence %d\n", pos, seq_id);
            }
            return nullptr;
        }
    }
}

void llama_memory_qfilter::archive_sync() const {
    for (const auto & w : workers) {
        ggml_backend_synchronize(w->backend);
    }
}

void llama_memory_qfilter::archive_rows(llama_seq_id seq_id) {
    if (!archives()) {
        return;
    }

    const int64_t t_start = ggml_time_us();

    auto & st = streams[seq_id];

    const auto order = order_of(seq_id);

    // rows that are adjacent both in the cells and in a block
    struct run {
        llama_pos pos;
        uint32_t  cell;
        uint32_t  n;
    };

    std::vector<run> runs;

    for (uint32_t r = 0; r < order.n(); ++r) {
        const llama_pos pos = order.pos[r];

        if (st.table.covers(pos) || !st.archive.takes(pos, n_first(seq_id))) {
            continue;
        }
        if (!runs.empty() && runs.back().pos + (llama_pos) runs.back().n == pos && runs.back().cell + runs.back().n == order.cells[r] &&
                pos % llama_qfilter_archive::n_block != 0) {
            runs.back().n++;
        } else {
            runs.push_back({ pos, order.cells[r], 1 });
        }
    }

    for (const auto & run : runs) {
        uint8_t * block = archive_block(seq_id, run.pos);
        if (!block) {
            // if it is full, others that end leave their blocks
            store_stopped = !store->full();
            st.incomplete = true;
            break;
        }

        const size_t i0 = run.pos % llama_qfilter_archive::n_block;

        const auto copy = [&](size_t i, const std::function<void(const ggml_tensor * t, uint8_t * dst, size_t offset, size_t size)> & fn) {
            const auto & l = store_layers[i];

            fn(layers[i].k[seq_id], block + l.k + i0*l.n_bytes_k, run.cell*l.n_bytes_k, run.n*l.n_bytes_k);
            fn(layers[i].v[seq_id], block + l.v + i0*l.n_bytes_v, run.cell*l.n_bytes_v, run.n*l.n_bytes_v);
        };

        std::vector<size_t> on_host;

        for (size_t i = 0; i < layers.size(); ++i) {
            if (is_on_host(layers[i])) {
                on_host.push_back(i);
                continue;
            }
            auto * backend = workers[worker_of(layers[i])]->backend;

            copy(i, [&](const ggml_tensor * t, uint8_t * dst, size_t offset, size_t size) { ggml_backend_tensor_get_async(backend, t, dst, offset, size); });
        }

        const auto copy_host = [&](size_t i) {
            copy(on_host[i], [](const ggml_tensor * t, uint8_t * dst, size_t offset, size_t size) { memcpy(dst, (const uint8_t *) t->data + offset, size); });
        };

        if (!threads.run(on_host.size(), [&](size_t i, int) { copy_host(i); })) {
            for (size_t i = 0; i < on_host.size(); ++i) {
                copy_host(i);
            }
        }

        for (uint32_t i = 0; i < run.n; ++i) {
            st.archive.set(run.pos + i);
        }

        stats.n_bytes_archive_written += run.n*archive_row_size();
    }

    stats.t_archive_us += ggml_time_us() - t_start;
}

size_t llama_memory_qfilter::worker_of(const llama_qfilter_layer & layer) const {
    return std::find_if(workers.begin(), workers.end(), [&](const auto & w) {
        return std::any_of(w->layers.begin(), w->layers.end(), [&](const auto & l) { return l.il == layer.il; });
    }) - workers.begin();
}

size_t llama_memory_qfilter::archived(llama_seq_id seq_id, llama_pos pos, int32_t il, bool is_v, void * out, size_t size) {
    const auto * layer = find_layer(il);

    if (!has(seq_id) || !layer || !get_stream(seq_id).archive.has(pos)) {
        return 0;
    }

    archive_sync();

    const auto & l = store_layers[layer - layers.data()];

    const size_t n_bytes = is_v ? l.n_bytes_v : l.n_bytes_k;

    if (out && size >= n_bytes) {
        memcpy(out, get_stream(seq_id).archive.row(pos, is_v ? l.v : l.k, n_bytes), n_bytes);
    }

    return n_bytes;
}

//
// filling
//

llama_pos llama_memory_qfilter::archive_begin(llama_seq_id seq_id) const {
    const auto & st = get_stream(seq_id);

    return st.archive.begin(st.table.p1);
}

bool llama_memory_qfilter::can_fill(llama_seq_id seq_id, llama_pos p0, llama_pos begin, bool recr_saved) const {
    const auto & st = get_stream(seq_id);

    if (!store || st.table.p1 == 0 || p0 < begin) {
        return false;
    }
    if (p0 > st.table.p1) {
        // the position before p0 has to be in the cells: the next batch follows it
        const auto & sp = kv.v_cells[seq_id].seq_pos_get(seq_id);
        const auto   it = sp.lower_bound({ p0 - 1, 0 });

        if (it == sp.end() || it->first != p0 - 1) {
            return false;
        }
    }

    return can_cut_window(seq_id, p0) && (!recr || recr_saved || recr->seq_pos_max(seq_id) < p0);
}

llama_memory_qfilter::filling llama_memory_qfilter::plan(
        llama_seq_id seq_id, llama_pos p0, uint32_t n, uint32_t n_window, const std::vector<llama_pos> & rows) const {
    const auto & st    = get_stream(seq_id);
    const auto   order = order_of(seq_id);

    const uint32_t r0 = st.table.rank_p0(order);

    // positions that all heads can have
    std::vector<llama_pos> shared = st.archive.positions(0, p0);

    for (uint32_t r = 0; r < order.n() && order.pos[r] < p0; ++r) {
        if (!st.table.covers(order.pos[r]) && !st.archive.has(order.pos[r])) {
            shared.push_back(order.pos[r]);
        }
    }
    std::sort(shared.begin(), shared.end());

    // positions that each head has in the cells, ascending
    std::vector<std::vector<llama_pos>> own(n_head_all);

    for (uint32_t ih = 0; ih < n_head_all; ++ih) {
        for (uint32_t r = 0; r < order.n(); ++r) {
            const llama_pos pos = st.table.get(order, r0, ih, r);

            if (pos < p0) {
                own[ih].push_back(pos);
            }
        }
    }

    // the number of rows that every head can have: those at pos, and others of its own
    const auto n_with = [&](const std::vector<llama_pos> & pos) {
        size_t res = std::numeric_limits<size_t>::max();

        for (const auto & o : own) {
            res = std::min<size_t>(res, pos.size() + std::count_if(o.begin(), o.end(), [&](llama_pos p) {
                return !std::binary_search(pos.begin(), pos.end(), p);
            }));
        }
        return res;
    };

    const size_t n_min = n_with(shared);

    bool complete = n_min == shared.size() && n_min <= n && !st.incomplete && st.archive.pos_min == 0;

    filling f;

    f.p0 = p0;

    n = std::min<size_t>(n, n_min);

    const uint32_t n_first = std::min(std::min(this->n_first(seq_id), n), (uint32_t) (std::lower_bound(order.pos.begin(), order.pos.end(), p0) - order.pos.begin()));

    // kept in any case: the first positions, window, the given rows
    std::vector<llama_pos> always(order.pos.begin(), order.pos.begin() + n_first);

    n_window = std::min<size_t>({ n_window, n - n_first, shared.size() });

    uint32_t n_last = 0;
    while (n_last < n_window && shared[shared.size() - 1 - n_last] == p0 - 1 - (llama_pos) n_last) {
        n_last++;
    }

    always.insert(always.end(), shared.end() - n_last, shared.end());
    always.insert(always.end(), rows.begin(), rows.end());
    std::sort(always.begin(), always.end());
    always.erase(std::unique(always.begin(), always.end()), always.end());

    // if rows are given, no others come from the archive
    if (!rows.empty()) {
        n = std::min<size_t>(n, n_with(always));
    }

    const auto last = [&](uint32_t n) { return p0 - (llama_pos) n; };

    for (uint32_t i = 0; i < n; ++i) {
        f.cells.push_back(i < n_first ? order.pos[i] : last(n - i));
    }

    complete = complete && f.cells == shared; // false if positions in between were removed

    f.rows.resize((size_t) n_head_all*n);

    const bool done = threads.run(n_head_all, [&](size_t ih, int) {
        std::vector<llama_pos> res = always;

        const auto add = [&](const std::vector<llama_pos> & more) {
            const size_t n_old = res.size();

            for (auto it = more.rbegin(); it != more.rend() && res.size() < n; ++it) {
                if (!std::binary_search(res.begin(), res.begin() + n_old, *it)) {
                    res.push_back(*it);
                }
            }
            std::sort(res.begin(), res.end());
        };

        if (res.size() < n) {
            std::vector<llama_pos> lost; // would be lost for good: not in the archive

            std::copy_if(own[ih].begin(), own[ih].end(), std::back_inserter(lost), [&](llama_pos p) { return !st.archive.has(p); });

            add(lost);
            add(own[ih]);
        }
        if (res.size() < n) {
            add(shared);
        }

        std::copy(res.begin(), res.begin() + n, f.rows.begin() + ih*n);
    });
    if (!done) {
        throw std::runtime_error("aborted");
    }

    if (!complete && n > n_first) {
        f.table.p0 = f.cells[n_first];
        f.table.p1 = last(n_last);
        f.table.n  = n - n_first - n_last;

        for (uint32_t ih = 0; ih < n_head_all; ++ih) {
            const auto * pos = f.rows.data() + (size_t) ih*n + n_first;

            f.table.pos.insert(f.table.pos.end(), pos, pos + f.table.n);
        }
    }

    return f;
}

llama_qfilter_result llama_memory_qfilter::fill(llama_seq_id seq_id, filling f, const std::vector<uint8_t> & recr_state) {
    auto & st = streams[seq_id];

    const auto     order = order_of(seq_id);
    const uint32_t r0    = st.table.rank_p0(order);

    archive_sync();

    if (!learned.empty()) {
        const auto res = learn(seq_id, f);
        if (res != LLAMA_QFILTER_DONE) {
            return res;
        }
    }

    // where each row is: its cell, or -1: in the archive
    std::vector<int32_t> src(f.rows.size());

    const bool host = std::all_of(layers.begin(), layers.end(), [&](const auto & l) { return is_on_host(l); });

    bool found = true;

    for (uint32_t ih = 0; ih < n_head_all; ++ih) {
        uint32_t r = 0;

        for (uint32_t i = 0; i < f.n(); ++i) {
            const llama_pos pos = f.rows[(size_t) ih*f.n() + i];

            while (r < order.n() && st.table.get(order, r0, ih, r) < pos) {
                r++;
            }

            const bool in_cell    = r < order.n() && st.table.get(order, r0, ih, r) == pos;
            const bool in_archive = st.archive.has(pos);

            // read as little as possible from devices
            src[(size_t) ih*f.n() + i] = in_cell && (host || !in_archive) ? (int32_t) order.cells[r] : -1;

            found = found && (in_cell || in_archive);
        }
    }

    GGML_ASSERT(found);

    // whatever may fail comes before the first change

    size_t n_bytes_row = 0;
    for (const auto & l : store_layers) {
        n_bytes_row = std::max({ n_bytes_row, l.n_bytes_k, l.n_bytes_v });
    }

    std::vector<std::vector<uint8_t>> bufs(threads.n);
    for (auto & buf : bufs) {
        buf.resize(n_bytes_row*f.n());
    }

    const uint32_t n_used = order.n() == 0 ? 0 : *std::max_element(order.cells.begin(), order.cells.end()) + 1;

    std::vector<uint8_t> old(host ? 0 : n_bytes_row*n_used);

    llama_kv_cells cells;
    cells.resize(kv.get_size());

    for (uint32_t i = 0; i < f.n(); ++i) {
        cells.pos_set(i, f.cells[i]);
        cells.seq_add(i, seq_id);
    }

    if (!cut_parts(seq_id, f.p0, recr_state)) {
        return LLAMA_QFILTER_REFUSED;
    }

    const auto write = [&](size_t i, int ith) {
        const auto & layer = layers[i/2];
        const auto & l     = store_layers[i/2];

        ggml_tensor * t = i % 2 == 0 ? layer.k[seq_id] : layer.v[seq_id];

        const size_t n_bytes = (i % 2 == 0 ? l.n_bytes_k : l.n_bytes_v);
        const size_t offset  = (i % 2 == 0 ? l.k : l.v);
        const size_t n_head  = n_bytes/layer.n_head;

        const bool is_host = is_on_host(layer);

        const auto * from = is_host ? (const uint8_t *) t->data : old.data();
        const auto * here = src.data() + (size_t) layer.head0*f.n();

        if (!is_host && std::any_of(here, here + (size_t) layer.n_head*f.n(), [](int32_t cell) { return cell >= 0; })) {
            ggml_backend_tensor_get(t, old.data(), 0, n_used*n_bytes);
        }

        uint8_t * dst = bufs[ith].data();

        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            const auto * pos  = f.rows.data() + (size_t) (layer.head0 + ih)*f.n();
            const auto * cell = here + (size_t) ih*f.n();

            for (uint32_t j = 0; j < f.n(); ++j) {
                const uint8_t * row = cell[j] >= 0 ? from + cell[j]*n_bytes : st.archive.row(pos[j], offset, n_bytes);

                memcpy(dst + j*n_bytes + ih*n_head, row + ih*n_head, n_head);
            }
        }

        if (is_host) {
            memcpy(t->data, dst, f.n()*n_bytes);
        } else {
            ggml_backend_tensor_set(t, dst, 0, f.n()*n_bytes);
        }
    };

    if (host) {
        if (!threads.run(2*layers.size(), write)) {
            llama_qfilter_note_error(format("failed to fill the cells, sequence %d is cleared", seq_id));
            forget(seq_id);
            return LLAMA_QFILTER_FAILED;
        }
    } else {
        for (size_t i = 0; i < 2*layers.size(); ++i) {
            write(i, 0);
        }
    }

    kv.v_cells[seq_id] = std::move(cells);
    kv.v_heads[seq_id] = f.n();

    st.table = f.table;
    st.archive.rm(f.p0, std::numeric_limits<llama_pos>::max());

    return LLAMA_QFILTER_DONE;
}

bool llama_memory_qfilter::rewind(llama_seq_id seq_id, llama_pos p0) {
    lctx->memory_update(false); // pending copies

    ggml_backend_sched_synchronize(lctx->get_sched());

    threads.update(lctx);

    try {
        archive_rows(seq_id);

        return fill(seq_id, plan(seq_id, p0, n_keep, n_window, {}), {}) == LLAMA_QFILTER_DONE;
    } catch (const std::exception & err) {
        llama_qfilter_note_error(err.what()); // before any row has moved
        return false;
    }
}
