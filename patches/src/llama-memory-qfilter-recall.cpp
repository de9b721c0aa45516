// recall: the queries of a question are recorded while it is read, then the rows that they look at come back from the archive

#include "llama-memory-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"
#include "llama-qfilter-words.h"

#include "qfilter-calibration.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

// a row that is looked at brings neighbours along: an eighth of the rows that fit, between these limits, after it, and a third
// of that before it. more come after it because a question points at the start of what it wants
static const uint32_t LLAMA_QFILTER_RECALL_AFTER_MIN = 16;
static const uint32_t LLAMA_QFILTER_RECALL_AFTER_MAX = 24;

// rows come back around the question's words: an eighth of the rows that fit on each side, between these limits, for places
// with at least this share of the best place's score. together they take at most half of the rows: the rest is for the newest
static const uint32_t LLAMA_QFILTER_RECALL_NEAR_MIN = 16;
static const uint32_t LLAMA_QFILTER_RECALL_NEAR_MAX = 48;
static const float    LLAMA_QFILTER_RECALL_NEAR     = 1.0f/3;

// at most this many of the newest rows stay in any case
static const uint32_t LLAMA_QFILTER_RECALL_NEWEST = 64;

// a row comes back if a query gives this share of its attention to it and a few others. other rows, by weight, only fill a
// quarter of the rows that fit, at least LEAST: more of them would distract
static const float    LLAMA_QFILTER_RECALL_SHARE = 0.7f;
static const uint32_t LLAMA_QFILTER_RECALL_LEAST = 64;

//
// states in memory
//

namespace {

class llama_qfilter_io_write : public llama_io_write_i {
public:
    void write(const void * src, size_t size) override {
        data.insert(data.end(), (const uint8_t *) src, (const uint8_t *) src + size);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        data.resize(data.size() + size);
        ggml_backend_tensor_get(tensor, data.data() + data.size() - size, offset, size);
    }

    size_t n_bytes() override { return data.size(); }

    std::vector<uint8_t> data;
};

class llama_qfilter_io_read : public llama_io_read_i {
public:
    explicit llama_qfilter_io_read(const std::vector<uint8_t> & data) : data(data) {}

    void read(void * dst, size_t size) override {
        memcpy(dst, take(size), size);
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        ggml_backend_tensor_set(tensor, take(size), offset, size);
    }

    size_t n_bytes() override { return pos; }

private:
    const uint8_t * take(size_t size) {
        if (size > data.size() - pos) {
            throw std::runtime_error("a state ends too early");
        }
        pos += size;
        return data.data() + pos - size;
    }

    const std::vector<uint8_t> & data;

    size_t pos = 0;
};

}

bool llama_memory_qfilter::cut_parts(llama_seq_id seq_id, llama_pos p0, const std::vector<uint8_t> & recr_state) {
    if (recr_state.empty()) {
        return mem->seq_rm(seq_id, p0, -1);
    }

    kv.seq_rm(seq_id, p0, -1);
    if (kv_swa) {
        kv_swa->seq_rm(seq_id, p0, -1);
    }

    llama_qfilter_io_read io(recr_state);

    recr->state_read(io, seq_id);

    return true;
}

//
// the question
//

static bool llama_qfilter_eval(ggml_tensor * t, bool ask, void * data) {
    return ((llama_memory_qfilter *) data)->eval(t, ask);
}

// upstream sets the callback only when it builds a graph, not when it reuses one
static void llama_qfilter_set_eval(llama_context * lctx, ggml_backend_sched_eval_callback cb, void * data) {
    auto & cparams = const_cast<llama_cparams &>(lctx->get_cparams());

    cparams.cb_eval           = cb;
    cparams.cb_eval_user_data = data;

    ggml_backend_sched_set_eval_callback(lctx->get_sched(), cb, data);
}

int32_t llama_memory_qfilter::question(llama_seq_id seq_id) {
    end_question();

    if (seq_id == -1) {
        return 0;
    }
    if (!has(seq_id)) {
        return -1;
    }

    auto res = std::make_unique<llama_qfilter_asked>();

    res->seq_id = seq_id;
    res->layers.resize(layers.size());

    for (size_t i = 0; i < layers.size(); ++i) {
        res->layers[i].heads.resize(layers[i].n_head);
    }

    if (recr) {
        lctx->memory_update(false);
        lctx->synchronize();

        llama_qfilter_io_write io;
        recr->state_write(io, seq_id);

        res->recr = std::move(io.data);
    }

    res->cb      = lctx->get_cparams().cb_eval;
    res->cb_data = lctx->get_cparams().cb_eval_user_data;

    asked = std::move(res);

    llama_qfilter_set_eval(lctx, llama_qfilter_eval, this);

    return 0;
}

std::unique_ptr<llama_qfilter_asked> llama_memory_qfilter::end_question() {
    if (asked) {
        ggml_backend_sched_synchronize(lctx->get_sched());

        llama_qfilter_set_eval(lctx, asked->cb, asked->cb_data);
    }

    return std::move(asked);
}

void llama_memory_qfilter::note_tokens(const llama_batch & batch) {
    for (int32_t i = 0; store && i < batch.n_tokens; ++i) {
        for (int32_t is = 0; is < batch.n_seq_id[i]; ++is) {
            if (!has(batch.seq_id[i][is])) {
                continue; // upstream refuses it
            }
            auto & tokens = streams[batch.seq_id[i][is]].archive.tokens;

            tokens.resize(std::max<size_t>(tokens.size(), batch.pos[i] + 1), LLAMA_TOKEN_NULL);

            tokens[batch.pos[i]] = batch.token ? batch.token[i] : LLAMA_TOKEN_NULL;
        }
    }
}

void llama_memory_qfilter::note_question(const llama_batch & batch) {
    if (asked) {
        asked->n_batches++;
    }
    for (int32_t i = 0; asked && i < batch.n_tokens; ++i) {
        if (batch.n_seq_id[i] != 1 || batch.seq_id[i][0] != asked->seq_id) {
            asked->why_not = "it was read together with other sequences";
            return;
        }
        if (asked->n == 0) {
            asked->p0 = batch.pos[i];
        } else if (batch.pos[i] != asked->p0 + (llama_pos) asked->n) {
            asked->why_not = "its positions have gaps";
            return;
        }
        asked->n++;
    }
}

std::string llama_memory_qfilter::why_no_question(const llama_qfilter_asked * question, llama_seq_id seq_id) const {
    if (!question || question->seq_id != seq_id || question->n == 0) {
        return "no question was read";
    }
    if (!question->why_not.empty()) {
        return "the question can't be used, " + question->why_not;
    }
    if (kv.seq_pos_max(seq_id) != question->p0 + (llama_pos) question->n - 1) {
        return "the sequence does not end with the question";
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        for (uint32_t ih = 0; ih < layers[i].n_head; ++ih) {
            const size_t n = question->layers[i].n(layers[i], ih);

            if (n == 0 || n % question->n != 0) {
                return format("the queries of layer %d are not to be had", layers[i].il);
            }
        }
    }
    return "";
}

bool llama_memory_qfilter::eval(ggml_tensor * t, bool ask) {
    llama_qfilter_attn attn;

    const bool is_attn = llama_qfilter_attn_of(t, &attn);

    if (ask) {
        asked->cb_asks = asked->cb && asked->cb(t, true, asked->cb_data);

        return is_attn || asked->cb_asks;
    }

    for (size_t i = 0; is_attn && i < layers.size(); ++i) {
        if (layers[i].il != attn.il) {
            continue;
        }

        auto & queries = asked->layers[i];

        std::vector<float> data((size_t) attn.n_head*attn.n_tokens*attn.head_dim);
        llama_qfilter_attn_get(t, 0, data.data());

        const size_t n = data.size()/attn.n_head_kv; // query heads of a KV head are adjacent

        for (int64_t ih = 0; ih < attn.n_head_kv; ++ih) {
            queries.heads[ih].insert(queries.heads[ih].end(), data.begin() + ih*n, data.begin() + (ih + 1)*n);
        }

        queries.scale   = attn.kq_scale;
        queries.softcap = attn.softcap;
    }

    return asked->cb_asks ? asked->cb(t, false, asked->cb_data) : true;
}

//
// recall
//

llama_qfilter_result llama_memory_qfilter::choose(
        const llama_qfilter_asked & question, uint32_t n_least, uint32_t n_rows, uint32_t n_window, std::vector<llama_pos> & rows) {
    const auto & archive = streams[question.seq_id].archive;

    const auto pos = archive.positions(0, question.p0);

    const size_t n = pos.size();

    const uint32_t n_first = this->n_first(question.seq_id);

    archive_sync();

    std::vector<llama_qfilter_looks> looks; // by KV head, the maximum over all layers

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & l = store_layers[i];

        std::vector<llama_qfilter_run> runs;

        for (const llama_pos p : pos) {
            const uint8_t * row = archive.row(p, l.k, l.n_bytes_k);

            if (!runs.empty() && runs.back().data + runs.back().n*l.n_bytes_k == row) {
                runs.back().n++;
            } else {
                runs.push_back({ row, 1 });
            }
        }

        looks.resize(std::max<size_t>(looks.size(), layers[i].n_head), llama_qfilter_looks(n));

        const auto res = scorers[worker_of(layers[i])]->score(layers[i], question.layers[i], runs, n_first, {}, looks);
        if (res != LLAMA_QFILTER_DONE) {
            return res;
        }
    }

    auto & weights = looks[0].weights;
    auto & shares  = looks[0].shares;

    for (const auto & l : looks) {
        for (size_t i = 0; i < n; ++i) {
            weights[i] = std::max(weights[i], l.weights[i]);
            shares [i] = std::max(shares [i], l.shares [i]);
        }
    }

    // a row that is looked at brings its neighbours along
    const size_t n_after  = std::min(std::max(n_rows/8, LLAMA_QFILTER_RECALL_AFTER_MIN), LLAMA_QFILTER_RECALL_AFTER_MAX);
    const size_t n_before = n_after/3;

    std::vector<float> score(n);
    std::vector<float> share(n);

    for (size_t i = 0; i < n; ++i) {
        const size_t i0 = i - std::min(i, n_after);
        const size_t i1 = std::min(n, i + n_before + 1);

        score[i] = *std::max_element(weights.begin() + i0, weights.begin() + i1);
        share[i] = *std::max_element(shares .begin() + i0, shares .begin() + i1);

        // the first and the newest rows
        if (i < n_first || i + n_window >= n) {
            score[i] = INFINITY;
        }
    }

    std::vector<uint32_t> by_looks(n);
    std::iota(by_looks.begin(), by_looks.end(), 0);
    std::sort(by_looks.begin(), by_looks.end(), [&](uint32_t a, uint32_t b) { return score[a] > score[b] || (score[a] == score[b] && a > b); });

    std::vector<bool> chosen(n);

    // takes wanted rows in an order, until rows has n_max entries
    const auto take = [&](const std::vector<uint32_t> & order, size_t n_max, const std::function<bool(uint32_t)> & is_wanted) {
        for (size_t j = 0; j < n && rows.size() < n_max; ++j) {
            const uint32_t i = order[j];

            if (!chosen[i] && is_wanted(i)) {
                chosen[i] = true;
                rows.push_back(pos[i]);
            }
        }
    };

    take(by_looks, n_least, [](uint32_t) { return true; });

    // around the question's words
    std::vector<llama_token> tokens(n);
    std::vector<llama_token> words(question.n);

    std::transform(pos.begin(), pos.end(), tokens.begin(), [&](llama_pos p) { return archive.token(p); });

    for (uint32_t i = 0; i < question.n; ++i) {
        words[i] = archive.token(question.p0 + i);
    }

    const uint32_t n_near = std::min(std::max(n_rows/8, LLAMA_QFILTER_RECALL_NEAR_MIN), LLAMA_QFILTER_RECALL_NEAR_MAX);

    const auto worth = llama_qfilter_words(lctx->get_model().vocab, tokens, words, n_near);

    float worth_max = 0.0f;
    for (size_t i = n_first; i + n_window < n; ++i) {
        worth_max = std::max(worth_max, worth[i]);
    }

    auto by_words = by_looks; // equal ones stay in this order
    std::stable_sort(by_words.begin(), by_words.end(), [&](uint32_t a, uint32_t b) { return worth[a] > worth[b]; });
    take(by_words, std::min<size_t>(n_rows, rows.size() + n_rows/2), [&](uint32_t i) { return worth[i] > 0.0f && worth[i] >= LLAMA_QFILTER_RECALL_NEAR*worth_max; });

    take(by_looks, n_rows, [&](uint32_t i) { return share[i] >= LLAMA_QFILTER_RECALL_SHARE; });

    std::sort(rows.begin(), rows.end());

    return LLAMA_QFILTER_DONE;
}

int32_t llama_memory_qfilter::recall(llama_seq_id seq_id, uint32_t n_rows) {
    const auto question = end_question();

    if (!has(seq_id)) {
        return -1;
    }

    auto & st = streams[seq_id];

    st.recalled.clear();

    const auto refuse = [&](const std::string & why) {
        llama_qfilter_note_error("nothing is recalled: " + why);
        return -1;
    };

    if (const auto why = why_no_question(question.get(), seq_id); !why.empty()) {
        return refuse(why);
    }
    if (!store) {
        return refuse("there is no archive");
    }
    if (st.table.p1 == 0) {
        return 0; // nothing was evicted
    }

    const uint32_t n_first = this->n_first(seq_id);

    const uint32_t n_min = n_first + 1;
    const uint32_t n_max = n_cells - std::min(n_cells, question->n);

    if (n_rows == 0) {
        // room for the answer: half of what an eviction frees, but at most an eighth of the cells
        const uint32_t n_free = std::min((n_cells - std::min(n_cells, n_keep))/2, n_cells/8);

        n_rows = std::max(n_min, n_max - std::min(n_max, n_free));
    }
    if (n_rows < n_min || n_rows > n_max) {
        return refuse(format("%u rows and a question of %u tokens don't fit into %u cells", n_rows, question->n, n_cells));
    }

    const int64_t t_start = ggml_time_us();

    lctx->memory_update(false); // pending copies

    ggml_backend_sched_synchronize(lctx->get_sched());

    threads.update(lctx);

    archive_rows(seq_id);

    if (!can_fill(seq_id, question->p0, archive_begin(seq_id), !question->recr.empty())) {
        return refuse(format("the sequence can't go on at position %d", question->p0));
    }

    const uint32_t n_newest = std::min({ n_window, LLAMA_QFILTER_RECALL_NEWEST, (n_rows - n_first)/4 });

    // if some evicted rows are not in the archive, half of the rows are left for those that the cells still have
    const bool     is_whole = archives() && !st.incomplete && st.archive.pos_min == 0;
    const uint32_t n_choose = is_whole ? n_rows : std::max(n_first + n_newest, n_rows/2);
    const uint32_t n_least  = std::min(n_choose, n_first + n_newest + std::max(n_rows/4, LLAMA_QFILTER_RECALL_LEAST));

    std::vector<llama_pos> rows;

    const auto res = choose(*question, n_least, n_choose, n_newest, rows);
    if (res != LLAMA_QFILTER_DONE) {
        llama_qfilter_note_error(format("nothing is recalled: %s",
                    res == LLAMA_QFILTER_ABORTED ? "aborted" : res == LLAMA_QFILTER_NO_MEM ? "out of memory" : "the graph failed"));
        return res == LLAMA_QFILTER_ABORTED ? -1 : res;
    }

    // positions that some head did not have
    std::vector<llama_pos> recalled;

    const auto order = order_of(seq_id);

    for (const llama_pos pos : rows) {
        bool there = !st.table.covers(pos) && std::binary_search(order.pos.begin(), order.pos.end(), pos);

        if (!there) {
            there = st.table.n > 0;
            for (auto tab = st.table.pos.begin(); there && tab != st.table.pos.end(); tab += st.table.n) {
                there = std::binary_search(tab, tab + st.table.n, pos);
            }
        }
        if (!there) {
            recalled.push_back(pos);
        }
    }

    const auto filled = fill(seq_id, plan(seq_id, question->p0, n_rows, n_newest, rows), question->recr);
    if (filled != LLAMA_QFILTER_DONE) {
        return filled == LLAMA_QFILTER_REFUSED ? refuse("a part of the memory can't be cut") :
               filled == LLAMA_QFILTER_ABORTED ? refuse("aborted") : filled;
    }

    st.incomplete = st.incomplete || !archives();
    st.recalled   = std::move(recalled);

    stats.n_recalls   += 1;
    stats.t_recall_us += ggml_time_us() - t_start;

    return question->n;
}

int32_t llama_memory_qfilter::recalled(llama_seq_id seq_id, llama_pos * out, size_t capacity) const {
    if (!has(seq_id)) {
        return -1;
    }

    const auto & rows = get_stream(seq_id).recalled;

    std::copy(rows.begin(), rows.begin() + std::min(rows.size(), capacity), out);

    return rows.size();
}
