#include "llama-memory-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <cmath>

int32_t llama_memory_qfilter::make_room(const llama_batch & batch) {
    if (!batch.token && kv.hparams.n_pos_per_embd() > 1) {
        llama_qfilter_note_error("a bounded cache takes text only: tokens of an image share a position");
        return LLAMA_QFILTER_REFUSED;
    }

    std::vector<uint32_t>  n_new(streams.size(), 0);
    std::vector<llama_pos> last (streams.size(), -1);

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        const llama_seq_id seq_id = batch.seq_id[i][0];

        if (seq_id < 0 || (size_t) seq_id >= streams.size()) {
            continue; // upstream refuses it
        }
        if (batch.pos[i] <= last[seq_id]) {
            // upstream allows equal positions, but then the rows would have no order
            llama_qfilter_note_error(format("position %d comes twice in a batch", batch.pos[i]));
            return LLAMA_QFILTER_REFUSED;
        }
        if (batch.pos[i] >= (llama_pos) n_ctx_seq) {
            llama_qfilter_note_error(format("position %d is beyond the context of %u", batch.pos[i], n_ctx_seq));
            return LLAMA_QFILTER_NO_ROOM; // eviction does not help
        }
        last[seq_id] = batch.pos[i];
        n_new[seq_id]++;
    }

    note_begun();

    for (size_t is = 0; is < streams.size(); ++is) {
        const uint32_t n_used = kv.v_cells[is].get_used();

        auto & st = streams[is];

        if (n_used == 0) {
            forget_empty(st);
        }
        if (st.swa[0] > 0 && kv_swa->v_cells[is].get_used() == st.swa[0]) {
            kv_swa->v_heads[is] = st.swa[1] % kv_swa->get_size();
        }
        st.swa[0] = 0;

        if (n_new[is] == 0 || n_used + n_new[is] <= n_cells) {
            continue;
        }
        if ((uint64_t) n_keep + n_new[is] > n_cells || n_keep < n_keep_min(n_first(is), n_window)) {
            llama_qfilter_note_error(format("sequence %d: no room for %u tokens", (int) is, n_new[is]));
            return LLAMA_QFILTER_NO_ROOM;
        }

        const auto res = evict(is, n_keep, n_window);
        if (res != LLAMA_QFILTER_DONE && res != LLAMA_QFILTER_REFUSED) {
            return res;
        }
    }

    return LLAMA_QFILTER_DONE;
}

int32_t llama_memory_qfilter::decode_error() const {
    return error;
}

int32_t llama_memory_qfilter::compress(llama_seq_id seq_id, uint32_t n_keep, uint32_t n_window, const float * given, size_t n_given) {
    if (!has(seq_id)) {
        return -1;
    }
    if (n_keep < n_keep_min(n_first(seq_id), n_window)) {
        llama_qfilter_note_error(format("n_keep (%u) must be at least the first positions that stay (%u) + n_window (%u, at least 1)", n_keep, n_first(seq_id), n_window));
        return -1;
    }

    const size_t n_scores = (size_t) n_head_all*kv.v_cells[seq_id].get_used();

    if (n_given != (given ? n_scores : 0)) {
        llama_qfilter_note_error(format("%zu scores were given, the rows of all heads are %zu", n_given, n_scores));
        return -1;
    }

    lctx->memory_update(false); // pending copies

    switch (const auto res = evict(seq_id, n_keep, n_window, given)) {
        case LLAMA_QFILTER_REFUSED: return  1;
        case LLAMA_QFILTER_ABORTED: return -1;
        default:                    return res;
    }
}

llama_qfilter_result llama_memory_qfilter::evict(llama_seq_id seq_id, uint32_t n_keep, uint32_t n_window, const float * given) {
    llama_qfilter_selection sel;

    sel.order    = order_of(seq_id);
    sel.n_sink   = n_first(seq_id);
    sel.n_window = n_window;
    sel.n_best   = n_keep - sel.n_sink - n_window;

    if (sel.order.n() <= n_keep) {
        return LLAMA_QFILTER_REFUSED;
    }

    sel.best.resize((size_t) n_head_all*sel.n_best);
    sel.same = !given && !policy.score && !policy.score_pos;

    ggml_backend_sched_synchronize(lctx->get_sched());

    threads.update(lctx);

    archive_rows(seq_id);

    const int64_t t_start = ggml_time_us();

    if (vectors.turns() && !vectors.set(layers, sel.order.pos.back() + 1)) {
        llama_qfilter_note_error("failed to turn the queries");
        return LLAMA_QFILTER_NO_MEM;
    }

    // score and select: nothing is written, so this may be aborted

    if (!learned.empty()) {
        const auto res = learn(seq_id, sel.order, n_window);
        if (res != LLAMA_QFILTER_DONE) {
            llama_qfilter_note_error("the learned filters could not be computed");
            return res;
        }
    }

    int64_t t_select = 0;

    if (sel.same) {
        for (size_t i = 0; i < sel.best.size(); ++i) {
            sel.best[i] = sel.order.n() - n_window - sel.n_best + i % sel.n_best; // the newest
        }
    }

    for (auto & w : workers) {
        w->n_nodes = 0;

        for (size_t i0 = 0; i0 < w->layers.size() && !sel.same; i0 += w->n_layers_at_once()) {
            if (given) {
                scores.clear();
                for (size_t i = i0; i < std::min(i0 + w->n_layers_at_once(), w->layers.size()); ++i) {
                    const auto & layer = w->layers[i];

                    const float * s = given + (size_t) layer.head0*sel.order.n();
                    scores.insert(scores.end(), s, s + (size_t) layer.n_head*sel.order.n());
                }
            } else if (policy.score) {
                const auto res = w->score(i0, seq_id, sel.order, scores);
                if (res != LLAMA_QFILTER_DONE) {
                    llama_qfilter_note_error(format("no scores from %s: %s", ggml_backend_name(w->backend),
                                res == LLAMA_QFILTER_ABORTED ? "aborted" : res == LLAMA_QFILTER_NO_MEM ? "out of memory" : "the graph failed"));
                    return res;
                }
            } else {
                score_by_pos(*w, i0, seq_id, sel.order);
            }

            const int64_t t0 = ggml_time_us();
            if (!select(*w, i0, given || !policy.score ? 1 : w->n_parts, !given && !scores_learned.empty(), sel)) {
                llama_qfilter_note_error("failed to select rows");
                return LLAMA_QFILTER_FAILED;
            }
            t_select += ggml_time_us() - t0;
        }
    }

    const int64_t t_scored = ggml_time_us();

    // move: the steps that can fail without harm come first, on all devices

    for (auto & w : workers) {
        const auto res = w->prepare_move(seq_id, sel);
        if (res != LLAMA_QFILTER_DONE) {
            llama_qfilter_note_error(format("%s to move rows on %s: nothing was evicted",
                        res == LLAMA_QFILTER_NO_MEM ? "no memory" : "failed", ggml_backend_name(w->backend)));
            return res;
        }
    }

    auto cells = cells_after(seq_id, sel);
    auto table = streams[seq_id].table.after(sel, n_head_all, !scores_learned.empty());

    if (!threads.run(n_head_all, [&](size_t ih, int) { streams[seq_id].table.update(sel, ih, scores_learned, table); })) {
        llama_qfilter_note_error("failed to note what stays");
        return LLAMA_QFILTER_FAILED;
    }

    for (auto & w : workers) {
        const auto res = w->move(seq_id, sel);
        if (res != LLAMA_QFILTER_DONE) {
            llama_qfilter_note_error(format("failed to move rows, sequence %d is cleared", seq_id));
            forget(seq_id);
            return res;
        }
    }

    streams[seq_id].incomplete = streams[seq_id].incomplete || !archives();

    kv.v_cells[seq_id]    = std::move(cells);
    kv.v_heads[seq_id]    = n_keep;
    streams[seq_id].table = std::move(table);

    for (const auto & layer : layers) {
        stats.n_bytes_moved += n_keep*(layer.k[0]->nb[1] + layer.v[0]->nb[1]);
    }

    const uint32_t n_dropped = sel.order.n() - n_keep;

    stats.n_evictions += 1;
    stats.n_dropped   += n_dropped;
    stats.t_score_us  += t_scored - t_start - t_select;
    stats.t_select_us += t_select;
    stats.t_gather_us += ggml_time_us() - t_scored;

    stats.n_graph_nodes = 0;
    for (const auto & w : workers) {
        stats.n_graph_nodes += w->n_nodes;
    }

    streams[seq_id].n_evictions += 1;
    streams[seq_id].n_dropped   += n_dropped;

    return LLAMA_QFILTER_DONE;
}

void llama_memory_qfilter::forget(llama_seq_id seq_id) {
    if (seq_id < 0) {
        clear(false); // recurrent parts can't remove sequence -1
        return;
    }

    mem->seq_rm(seq_id, -1, -1);

    streams[seq_id] = stream();

    // a damaged state may leave used cells without a position
    for (auto * part : { &kv, kv_swa }) {
        if (part && part->v_cells[seq_id].get_used() > 0) {
            part->v_cells[seq_id].reset();
        }
    }
}

// fills scores, see llama_qfilter_worker::score(), for a policy that looks at positions
void llama_memory_qfilter::score_by_pos(const llama_qfilter_worker & w, size_t i0, llama_seq_id seq_id, const llama_qfilter_order & order) {
    const auto & table = get_stream(seq_id).table;

    const uint32_t r0 = table.rank_p0(order);

    scores.clear();

    for (size_t i = i0; i < std::min(i0 + w.n_layers_at_once(), w.layers.size()); ++i) {
        const auto & layer = w.layers[i];

        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            for (uint32_t r = 0; r < order.n(); ++r) {
                scores.push_back(policy.score_pos(seed, layer.il, ih, table.get(order, r0, layer.head0 + ih, r)));
            }
        }
    }
}

// fills sel.best from scores. false: not completed
bool llama_memory_qfilter::select(
        const llama_qfilter_worker & w, size_t i0, uint32_t n_parts, bool with_learned, llama_qfilter_selection & sel) {
    const uint32_t n      = sel.order.n();
    const uint32_t n_cand = n - sel.n_sink - sel.n_window; // ranks [n_sink, n - n_window)

    struct cand {
        float    score;
        uint32_t rank;
    };

    struct head {
        uint32_t ih; // among the heads of all layers

        const float * scores; // [n], its first part

        size_t n_stride; // from one part to the next
    };

    std::vector<head> heads;

    const float * scores_layer = scores.data();

    for (size_t i = i0; i < std::min(i0 + w.n_layers_at_once(), w.layers.size()); ++i) {
        const size_t n_layer = (size_t) w.layers[i].n_head*n;

        for (uint32_t ih = 0; ih < w.layers[i].n_head; ++ih) {
            heads.push_back({ w.layers[i].head0 + ih, scores_layer + ih*n, n_layer });
        }
        scores_layer += n_parts*n_layer;
    }

    std::vector<cand>  cands_all((size_t) threads.n*n_cand);
    std::vector<float> blended((size_t) (n_parts > 1 || with_learned ? threads.n : 0)*2*n);

    const uint64_t n_bytes =
        (sel.best.size() + sel.order.n())*sizeof(uint32_t) + cands_all.size()*sizeof(cand) + blended.size()*sizeof(float);
    stats.n_bytes_scratch = std::max(stats.n_bytes_scratch, n_bytes);

    return threads.run(heads.size(), [&](size_t i, int ith) {
        const float * s = heads[i].scores;

        float * tmp = blended.data() + (size_t) ith*2*n;

        if (n_parts > 1) {
            llama_qfilter_blend(s, heads[i].n_stride, n_parts, n, tmp + n, tmp);
            s = tmp;
        }
        s += sel.n_sink;

        const uint32_t ih = heads[i].ih;

        auto * cands = cands_all.data() + (size_t) ith*n_cand;
        auto * best  = sel.best.data()  + (size_t) ih*sel.n_best;

        if (with_learned) {
            float * sum = tmp + n;

            std::fill(sum, sum + n_cand, 0.0f);
            llama_qfilter_add_standardized(s, n_cand, 1.0f, sum);
            llama_qfilter_add_standardized(scores_learned.data() + (size_t) ih*n + sel.n_sink, n_cand, 1.0f, sum);
            s = sum;
        }
        for (uint32_t r = 0; r < n_cand; ++r) {
            cands[r] = { std::isnan(s[r]) ? -INFINITY : s[r], sel.n_sink + r };
        }

        // ties: the newest wins
        std::nth_element(cands, cands + sel.n_best, cands + n_cand, [](const cand & a, const cand & b) {
            return a.score > b.score || (a.score == b.score && a.rank > b.rank);
        });

        for (uint32_t r = 0; r < sel.n_best; ++r) {
            best[r] = cands[r].rank;
        }
        std::sort(best, best + sel.n_best);
    });
}

// the cells after an eviction: positions as if the newest candidates had been kept, from the first cell on
llama_kv_cells llama_memory_qfilter::cells_after(llama_seq_id seq_id, const llama_qfilter_selection & sel) const {
    llama_kv_cells cells = kv.v_cells[seq_id];

    std::vector<uint32_t> src;
    std::vector<uint32_t> dst;

    for (uint32_t i = 0; i < sel.n_keep(); ++i) {
        src.push_back(sel.order.cells[sel.rank_cell(i)]);
        dst.push_back(i);
    }

    const auto cells_new = cells.cp(src);

    for (const uint32_t i : sel.order.cells) {
        cells.rm(i);
    }
    cells.set(dst, cells_new);

    return cells;
}

//
// what callers can see
//

int32_t llama_memory_qfilter::keep_first(llama_seq_id seq_id, uint32_t n) {
    if (!has(seq_id)) {
        return -1;
    }

    // the true positions of compacted rows start behind those that always stay
    if (get_stream(seq_id).table.p1 == 0) {
        uint64_t n_most = n_keep > n_window ? (n_keep - n_window)/2 : 0;

        if (store) {
            // an archive at its limit needs blocks for what comes next
            const uint64_t n_blocks = store->n_bytes_limit/store->n_bytes_block/streams.size();

            n_most = std::min<uint64_t>(n_most, (std::max<uint64_t>(n_blocks, 2) - 2)*llama_qfilter_archive::n_block);
        }
        streams[seq_id].n_first = std::min<uint64_t>(n, n_most);
    }

    return n_first(seq_id);
}

int32_t llama_memory_qfilter::room(llama_seq_id seq_id) const {
    return has(seq_id) ? n_cells - std::min(n_cells, kv.v_cells[seq_id].get_used()) : -1;
}

llama_pos llama_memory_qfilter::rewind_limit(llama_seq_id seq_id) const {
    if (!has(seq_id)) {
        return -1;
    }

    // recurrent parts can't go back to an earlier position, except for the few with a snapshot (n_rs_seq)
    llama_pos low  = recr ? recr->seq_pos_max(seq_id) : -1; // refused
    llama_pos high = kv.seq_pos_max(seq_id) + 1;            // allowed

    const llama_pos begin = archive_begin(seq_id);

    while (high - low > 1) {
        const llama_pos mid = low + (high - low)/2;

        (can_cut(seq_id, mid) || can_fill(seq_id, mid, begin, false) ? high : low) = mid;
    }

    return high;
}

int32_t llama_memory_qfilter::kept(llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) const {
    const auto * layer = find_layer(il);

    if (!has(seq_id) || !layer || ih < 0 || ih >= (int32_t) layer->n_head) {
        return -1;
    }

    const auto & table = get_stream(seq_id).table;

    const auto     order = order_of(seq_id);
    const uint32_t r0    = table.rank_p0(order);

    for (uint32_t r = 0; r < order.n() && r < capacity; ++r) {
        out[r] = table.get(order, r0, layer->head0 + ih, r);
    }

    return order.n();
}

size_t llama_memory_qfilter::rows(llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) const {
    const auto * layer = find_layer(il);

    if (!has(seq_id) || !layer) {
        return 0;
    }

    lctx->memory_update(false); // pending copies

    const auto order = order_of(seq_id);

    const ggml_tensor * t = is_v ? layer->v[seq_id] : layer->k[seq_id];

    const size_t n_bytes = order.n()*t->nb[1];

    if (out && size >= n_bytes) {
        lctx->synchronize();

        for (uint32_t r = 0; r < order.n(); ++r) {
            ggml_backend_tensor_get(t, (char *) out + r*t->nb[1], order.cells[r]*t->nb[1], t->nb[1]);
        }
    }

    return n_bytes;
}

void llama_memory_qfilter::get_stats(llama_qfilter_stats & res) const {
    res = stats;

    for (const auto & cells : kv.v_cells) {
        res.n_cells_used += cells.get_used();
    }
    res.n_cells       = n_cells*kv.n_stream;
    res.n_cells_alloc = kv.get_size()*kv.n_stream;

    for (const auto & [_, n_bytes] : mem->memory_breakdown()) {
        res.n_bytes_kv += n_bytes;
    }

    const uint64_t n_bytes_cells = kv.total_size();

    res.n_bytes_kv_full = res.n_bytes_kv - n_bytes_cells + n_bytes_cells/kv.get_size()*n_ctx_seq;

    res.n_bytes_scratch += (scores.capacity() + scores_learned.capacity())*sizeof(float) + learned.n_bytes();
    for (const auto & w : workers) {
        res.n_bytes_scratch += w->n_bytes();
    }
    for (const auto & s : scorers) {
        res.n_bytes_scratch += s->n_bytes();
    }

    for (const auto & st : streams) {
        res.n_archived += st.archive.n;
    }
    res.n_bytes_archive       = store ? store->n_bytes       : 0;
    res.n_bytes_archive_limit = store ? store->n_bytes_limit : 0;
    res.archive_stopped       = store_stopped;
}

bool llama_memory_qfilter::get_stats(llama_seq_id seq_id, llama_qfilter_seq_stats & res) const {
    if (!has(seq_id)) {
        return false;
    }

    const auto & st = get_stream(seq_id);

    res.n_evictions  = st.n_evictions;
    res.n_dropped    = st.n_dropped;
    res.n_cells_used = kv.v_cells[seq_id].get_used();
    res.pos_max      = kv.seq_pos_max(seq_id);
    res.n_archived   = st.archive.n;
    res.pos_archived = archive_begin(seq_id);
    res.n_recalled   = st.recalled.size();
    res.n_first      = n_first(seq_id);

    return true;
}
