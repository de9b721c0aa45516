#include "llama-qfilter-table.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <stdexcept>

llama_qfilter_order::llama_qfilter_order(const std::set<std::pair<llama_pos, uint32_t>> & seq_pos) {
    cells.reserve(seq_pos.size());
    pos.reserve(seq_pos.size());

    for (const auto & [p, cell] : seq_pos) {
        cells.push_back(cell);
        pos.push_back(p);
    }
}

uint32_t llama_qfilter_table::rank_p0(const llama_qfilter_order & order) const {
    return std::lower_bound(order.pos.begin(), order.pos.end(), p0) - order.pos.begin();
}

llama_qfilter_table llama_qfilter_table::after(const llama_qfilter_selection & sel, uint32_t n_head_all, bool has_learned) const {
    const auto & order = sel.order;

    // after a cut, the window may include rows that an earlier eviction compacted: they stay in the table
    uint32_t n_tab = sel.n_best;
    while (sel.n_sink + n_tab < sel.n_keep() && order.pos[sel.rank_cell(sel.n_sink + n_tab)] < p1) {
        n_tab++;
    }

    llama_qfilter_table res;

    res.p0 = order.pos[sel.n_sink];
    res.p1 = std::max(p1, order.pos[order.n() - sel.n_window - 1] + 1);
    res.n  = n_tab;
    res.pos.resize((size_t) n_head_all*n_tab);
    res.learned.resize(has_learned ? res.pos.size() : 0);

    return res;
}

void llama_qfilter_table::update(const llama_qfilter_selection & sel, uint32_t ih, const std::vector<float> & learned, llama_qfilter_table & res) const {
    const uint32_t r0 = rank_p0(sel.order);

    for (uint32_t i = 0; i < res.n; ++i) {
        const uint32_t rank = sel.rank(ih, sel.n_sink + i);

        res.pos[(size_t) ih*res.n + i] = get(sel.order, r0, ih, rank);
        if (!learned.empty()) {
            res.learned[(size_t) ih*res.n + i] = learned[(size_t) ih*sel.order.n() + rank];
        }
    }
}

void llama_qfilter_table::write(llama_io_write_i & io, const uint32_t extra[3]) const {
    io.write(&p0, sizeof(p0));
    io.write(&p1, sizeof(p1));
    io.write(&n,  sizeof(n));

    io.write(extra, 3*sizeof(extra[0]));

    if (!pos.empty()) {
        io.write(pos.data(), pos.size()*sizeof(llama_pos));
    }
    if (!learned.empty()) {
        io.write(learned.data(), learned.size()*sizeof(float));
    }
}

void llama_qfilter_table::read(llama_io_read_i & io, uint32_t extra[3], uint32_t n_head_all, uint32_t n_cells, bool has_learned) {
    io.read(&p0, sizeof(p0));
    io.read(&p1, sizeof(p1));
    io.read(&n,  sizeof(n));

    io.read(extra, 3*sizeof(extra[0]));

    if (n > n_cells) {
        throw std::runtime_error(format("the state does not fit into %u cells", n_cells));
    }
    if (p0 < 0 || p1 < p0 || n > (uint32_t) (p1 - p0)) {
        throw std::runtime_error(format("the state is damaged: %u rows for the positions [%d, %d)", n, p0, p1));
    }

    pos.resize((size_t) n_head_all*n);
    if (!pos.empty()) {
        io.read(pos.data(), pos.size()*sizeof(llama_pos));
    }

    for (size_t i = 0; i < pos.size(); ++i) {
        const llama_pos prev = i % n == 0 ? -1 : pos[i - 1];

        if (pos[i] <= prev || pos[i] >= p1) {
            throw std::runtime_error(format("the state is damaged: a row of position %d after %d, before %d", pos[i], prev, p1));
        }
    }

    if (has_learned && !pos.empty()) {
        learned.resize(pos.size());
        io.read(learned.data(), learned.size()*sizeof(float));
    }
}

void llama_qfilter_table::check(const llama_qfilter_order & order, uint32_t n_sink) const {
    uint32_t n_in = 0;

    for (uint32_t i = 0; i < order.n(); ++i) {
        if (order.pos[i] <= (i == 0 ? -1 : order.pos[i - 1])) {
            throw std::runtime_error(format("the state is damaged: two cells of position %d", order.pos[i]));
        }
        n_in += covers(order.pos[i]);
    }

    if (n_in != n || p1 > (order.n() == 0 ? 0 : order.pos.back() + 1)) {
        throw std::runtime_error(format("the state is damaged: %u cells for %u rows up to position %d", n_in, n, p1));
    }

    // the rows of the table come right after the sinks, in every head
    const uint32_t r0 = rank_p0(order);

    if (p1 > 0 && r0 != n_sink) {
        throw std::runtime_error(format("the state is damaged: %u cells before position %d, not %u", r0, p0, n_sink));
    }

    for (size_t i = 0; i < pos.size(); i += n) {
        if (r0 > 0 && pos[i] <= order.pos[r0 - 1]) {
            throw std::runtime_error(format("the state is damaged: a row of position %d among the sinks", pos[i]));
        }
    }
}
