// states and archives of sequences as bytes

#include "llama-memory-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>

static const uint32_t LLAMA_QFILTER_STATE_MAGIC   = 0x746c6671; // "qflt"
static const uint32_t LLAMA_QFILTER_STATE_VERSION = 3;

static const llama_pos LLAMA_QFILTER_STATE_MARGIN = 32;

void llama_memory_qfilter::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id != -1 && !has(seq_id)) {
        throw std::runtime_error(format("no sequence %d", seq_id));
    }

    const uint32_t head[] = { LLAMA_QFILTER_STATE_MAGIC, LLAMA_QFILTER_STATE_VERSION, n_cells, n_keep, n_sink, n_window, (uint32_t) policy.policy, n_head_all };

    // run pending copies of sequences
    lctx->memory_update(false);

    const uint32_t is0 = seq_id < 0 ? 0              : seq_id;
    const uint32_t is1 = seq_id < 0 ? streams.size() : is0 + 1;
    const uint32_t ns  = is1 - is0;

    io.write(head, sizeof(head));
    const uint64_t hash = vectors.hash ^ learned.hash;

    io.write(&hash, sizeof(hash));
    io.write(&ns, sizeof(ns));

    // for the same context all cells of windowed layers: bit-identical sums of attention need the same cells in the same order.
    // for another one those that this many positions before the last one see: rewinding goes as far
    const llama_pos margin = seq_id != -1 && resize ? LLAMA_QFILTER_STATE_MARGIN : std::numeric_limits<llama_pos>::max();

    if (kv_swa) {
        kv_swa->qfilter_margin = margin;
    }

    for (uint32_t is = is0; is < is1; ++is) {
        // for bit-identical results, new tokens have to go to the same cells
        uint32_t extra[3] = { n_saved(is), kv_swa ? kv_swa->v_heads[is] : 0, streams[is].n_first };

        const auto & st = get_stream(is);

        if (extra[0] > 0 && extra[0] == st.swa[0]) {
            extra[1] = st.swa[1]; // restored, no batch since then
        }

        st.table.write(io, extra);
    }

    mem->state_write(io, seq_id, flags & ~LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
}

uint32_t llama_memory_qfilter::n_saved(llama_seq_id seq_id) const {
    if (!kv_swa) {
        return 0;
    }

    const auto & cells = kv_swa->v_cells[seq_id];

    const llama_pos last = std::max(0, cells.seq_pos_max(seq_id) - kv_swa->qfilter_margin);

    uint32_t res = 0;

    for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
        res += !llama_hparams::is_masked_swa(kv_swa->n_swa, kv_swa->swa_type, pos, last);
    }

    return res;
}

void llama_memory_qfilter::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    try {
        read_state(io, seq_id, flags);
    } catch (const std::exception & err) {
        llama_qfilter_set_error(err.what()); // upstream logs it
        throw;
    }
}

void llama_memory_qfilter::read_state(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id != -1 && !has(seq_id)) {
        throw std::runtime_error(format("no sequence %d", seq_id));
    }

    uint32_t head[8];
    uint64_t hash;
    uint32_t ns;

    io.read(head, sizeof(head[0]));
    if (head[0] != LLAMA_QFILTER_STATE_MAGIC) {
        throw std::runtime_error("the state was saved by a context without a bounded cache");
    }

    io.read(head + 1, sizeof(head) - sizeof(head[0]));
    io.read(&hash, sizeof(hash));
    io.read(&ns, sizeof(ns));

    if (head[1] != LLAMA_QFILTER_STATE_VERSION) {
        throw std::runtime_error(format("the state's version is %u, this build reads %u", head[1], LLAMA_QFILTER_STATE_VERSION));
    }

    // a sequence fits into a cache of another size, but n_sink must match: the table of true positions starts after the sinks
    const bool resize = seq_id != -1 && this->resize;

    if (!resize && (head[2] != n_cells || head[3] != n_keep || head[5] != n_window)) {
        throw std::runtime_error(format("the state was saved with n_cells = %u, n_keep = %u, n_window = %u; this context has %u, %u, %u",
                    head[2], head[3], head[5], n_cells, n_keep, n_window));
    }
    if (head[7] != n_head_all || ns != (seq_id < 0 ? streams.size() : 1)) {
        throw std::runtime_error("the state was saved by another model or for another number of sequences");
    }

    std::vector<stream> read(ns);

    for (auto & st : read) {
        uint32_t extra[3];
        st.table.read(io, extra, n_head_all, n_cells, policy.learned);

        st.swa[0]  = extra[0];
        st.swa[1]  = extra[1];
        st.n_first = extra[2];

        if (st.swa[0] > 0 && !kv_swa) {
            throw std::runtime_error("the state was saved by a model with windowed layers");
        }
        if (kv_swa && st.swa[0] > kv_swa->get_size()) {
            throw std::runtime_error(format("its windowed layers have %u positions, those of this context have room for %u, their window "
                        "and an interval: use a larger interval", st.swa[0], kv_swa->get_size()));
        }

        // a sequence that lost nothing does not depend on policy, filters or n_sink
        if (resize && st.table.p1 == 0) {
            continue;
        }
        if (head[4] != n_sink) {
            throw std::runtime_error(format("the state was saved with n_sink = %u; this context has %u", head[4], n_sink));
        }
        if (head[6] != (uint32_t) policy.policy || hash != (vectors.hash ^ learned.hash)) {
            throw std::runtime_error("the state was saved with another policy or other filters");
        }
        if (st.table.p1 > 0 && n_keep_min(st.n_first, n_window) > n_keep) {
            throw std::runtime_error(format("the first %u positions of the state always stay, with the window more than the %u cells "
                        "that an eviction leaves", st.n_first, n_keep));
        }
    }

    lctx->memory_update(false); // pending copies would overwrite what is restored now

    // with an earlier position of the same sequence: rows evicted before it are in its archive
    stream before;
    const bool keep = seq_id != -1 && (keep_archive || (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY));
    if (keep) {
        archive_sync();
        before = streams[seq_id];
    }

    // upstream leaves the old cells when the state has none
    forget(seq_id);

    // restore all parts of the memory, or none
    try {
        mem->state_read(io, seq_id, flags & ~LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);

        check_state(seq_id, read);
    } catch (...) {
        forget(seq_id);
        throw;
    }

    for (auto & st : read) {
        st.incomplete = st.table.p1 > 0; // a state does not contain evicted rows

        if (keep) {
            st.archive    = std::move(before.archive);
            st.incomplete = st.incomplete && (before.incomplete || before.table.p1 < st.table.p1);
            st.archive.rm(kv.seq_pos_max(seq_id) + 1, std::numeric_limits<llama_pos>::max());
        }
    }

    for (size_t i = 0; i < read.size(); ++i) {
        const llama_seq_id is = std::max(seq_id, 0) + i;

        streams[is] = std::move(read[i]);
        keep_first(is, streams[is].n_first); // as many as this context can
    }
}

// throws std::runtime_error unless a context could have these cells, and the tables fit them
void llama_memory_qfilter::check_state(llama_seq_id seq_id, const std::vector<stream> & read) const {
    for (size_t i = 0; i < read.size(); ++i) {
        const llama_seq_id is = std::max(seq_id, 0) + i;

        const auto order  = order_of(is);
        const auto n_used = kv.v_cells[is].get_used();

        if (n_used > n_cells) {
            throw std::runtime_error(format("the state does not fit into %u cells", n_cells));
        }
        if (n_used != order.n() || (n_used > 0 && order.pos.back() >= (llama_pos) n_ctx_seq)) {
            throw std::runtime_error(format("the state is damaged: %u cells, of which %u have positions, up to %d of %u",
                        n_used, order.n(), order.n() == 0 ? -1 : order.pos.back(), n_ctx_seq));
        }
        read[i].table.check(order, std::max(n_sink, read[i].n_first));

        // all parts have read the same tokens
        const llama_pos pos_max = kv.seq_pos_max(is);

        // with chunked attention, a cut at the start of a chunk leaves an empty window
        const bool has_swa = kv_swa && kv_swa->v_cells[is].get_used() > 0;

        if (has_swa) {
            const llama_qfilter_order order_swa(kv_swa->v_cells[is].seq_pos_get(is));

            if (order_swa.n() != kv_swa->v_cells[is].get_used()) {
                throw std::runtime_error("the state is damaged: cells of the window have no position");
            }
            llama_qfilter_table().check(order_swa, 0);
        }
        if ((has_swa && kv_swa->seq_pos_max(is) != pos_max) || (recr && recr->seq_pos_max(is) != pos_max)) {
            throw std::runtime_error("the state is damaged: its parts end at different positions");
        }
    }
}

//
// archive
//

static const uint32_t LLAMA_QFILTER_ARCHIVE_MAGIC   = 0x616c6671; // "qfla"
static const uint32_t LLAMA_QFILTER_ARCHIVE_VERSION = 2;

struct llama_qfilter_archive_head {
    uint32_t  magic;
    uint32_t  version;
    uint64_t  n_bytes_row; // all layers
    uint64_t  n;           // positions
    uint64_t  n_tokens;
    llama_pos pos_min;
    uint32_t  incomplete;
};

// calls fn(pos, n, offset, n_bytes_row) for each tensor of each layer, for each run of n adjacent positions from pos on
template <typename F>
static void llama_qfilter_archive_each(
        const std::vector<llama_pos> & pos, const std::vector<llama_qfilter_archive_layer> & layers, F fn) {
    for (size_t i0 = 0, i1; i0 < pos.size(); i0 = i1) {
        i1 = i0 + 1;
        while (i1 < pos.size() && pos[i1] == pos[i1 - 1] + 1 && pos[i1] % llama_qfilter_archive::n_block != 0) {
            i1++;
        }
        for (const auto & l : layers) {
            fn(pos[i0], i1 - i0, l.k, l.n_bytes_k);
            fn(pos[i0], i1 - i0, l.v, l.n_bytes_v);
        }
    }
}

size_t llama_memory_qfilter::archive_write(llama_seq_id seq_id, uint8_t * dst, size_t size) {
    if (!has(seq_id)) {
        return 0;
    }
    if (!store) {
        llama_qfilter_set_error("there is no archive to save");
        return 0;
    }

    archive_sync();

    const auto & st = get_stream(seq_id);

    const auto pos = st.archive.positions(0, std::numeric_limits<llama_pos>::max());

    const size_t n_bytes_row = archive_row_size();
    const size_t n_tokens    = std::min<size_t>(st.archive.tokens.size(), kv.seq_pos_max(seq_id) + 1); // others were removed

    const llama_qfilter_archive_head head = {
        LLAMA_QFILTER_ARCHIVE_MAGIC, LLAMA_QFILTER_ARCHIVE_VERSION, n_bytes_row, (uint64_t) pos.size(), (uint64_t) n_tokens,
        st.archive.pos_min, st.incomplete };

    const size_t n_bytes = sizeof(head) + pos.size()*(sizeof(llama_pos) + n_bytes_row) + n_tokens*sizeof(llama_token);

    if (!dst || size < n_bytes) {
        return n_bytes;
    }

    const auto put = [&](const void * src, size_t n) {
        memcpy(dst, src, n);
        dst += n;
    };

    put(&head, sizeof(head));
    if (!pos.empty()) {
        put(pos.data(), pos.size()*sizeof(llama_pos));
    }
    if (n_tokens > 0) {
        put(st.archive.tokens.data(), n_tokens*sizeof(llama_token));
    }

    llama_qfilter_archive_each(pos, store_layers, [&](llama_pos p, size_t n, size_t offset, size_t n_bytes_row) {
        put(st.archive.row(p, offset, n_bytes_row), n*n_bytes_row);
    });

    return n_bytes;
}

void llama_memory_qfilter::archive_read(llama_seq_id seq_id, const uint8_t * src, size_t size) {
    if (!has(seq_id)) {
        throw std::runtime_error(format("no sequence %d", seq_id));
    }
    if (!archives()) {
        throw std::runtime_error("there is no archive to restore to");
    }

    const size_t n_bytes_row = archive_row_size();

    llama_qfilter_archive_head head;

    const size_t n_bytes_version = offsetof(llama_qfilter_archive_head, n_bytes_row);

    if (size >= n_bytes_version) {
        memcpy(&head, src, n_bytes_version);

        if (head.magic != LLAMA_QFILTER_ARCHIVE_MAGIC || head.version != LLAMA_QFILTER_ARCHIVE_VERSION) {
            throw std::runtime_error("this is no archive, or one of another version");
        }
    }
    if (size < sizeof(head)) {
        throw std::runtime_error("the archive is damaged: it ends too early");
    }
    memcpy(&head, src, sizeof(head));

    if (head.n_bytes_row != n_bytes_row) {
        throw std::runtime_error("the archive was saved by another model, or with another cache type");
    }
    const llama_pos pos_max = kv.seq_pos_max(seq_id);

    if (head.n > size/n_bytes_row || head.n_tokens > (uint64_t) pos_max + 1 ||
            size != sizeof(head) + head.n*(sizeof(llama_pos) + n_bytes_row) + head.n_tokens*sizeof(llama_token)) {
        throw std::runtime_error("the archive is damaged: it has another size");
    }

    std::vector<llama_pos> pos(head.n);
    if (!pos.empty()) {
        memcpy(pos.data(), src + sizeof(head), pos.size()*sizeof(llama_pos));
    }

    for (size_t i = 0; i < pos.size(); ++i) {
        if (pos[i] <= (i == 0 ? -1 : pos[i - 1]) || pos[i] > pos_max) {
            throw std::runtime_error(format("the archive is not of this sequence: it has position %d, after which %d is the last", pos[i], pos_max));
        }
    }
    if (head.pos_min < 0 || head.pos_min > pos_max + 1) {
        throw std::runtime_error("the archive is damaged: it begins beyond the sequence");
    }

    const uint8_t * data = src + sizeof(head) + pos.size()*sizeof(llama_pos);

    std::vector<llama_token> tokens(head.n_tokens);
    if (!tokens.empty()) {
        memcpy(tokens.data(), data, tokens.size()*sizeof(llama_token));
        data += tokens.size()*sizeof(llama_token);
    }

    auto & st = streams[seq_id];

    st.archive = llama_qfilter_archive();

    llama_pos block_pos = -1;
    uint8_t * block     = nullptr;

    llama_qfilter_archive_each(pos, store_layers, [&](llama_pos p, size_t n, size_t offset, size_t n_bytes) {
        if (p != block_pos) {
            block     = archive_block(seq_id, p);
            block_pos = p;
        }
        if (!block) {
            st.archive    = llama_qfilter_archive();
            st.incomplete = st.table.p1 > 0;

            throw std::runtime_error("no memory for the archive");
        }
        memcpy(block + offset + p % llama_qfilter_archive::n_block*n_bytes, data, n*n_bytes);
        data += n*n_bytes;

        for (size_t i = 0; i < n; ++i) {
            st.archive.set(p + i);
        }
    });

    st.archive.tokens  = std::move(tokens);
    st.archive.pos_min = std::max(st.archive.pos_min, head.pos_min);
    st.incomplete      = head.incomplete;
}
