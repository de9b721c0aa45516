#pragma once

#include "llama.h"

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

class llama_io_write_i;
class llama_io_read_i;

// the rows of a sequence by ascending position. the rank of a row is its place in this order
struct llama_qfilter_order {
    std::vector<uint32_t>  cells; // [n]
    std::vector<llama_pos> pos;   // [n] positions of the cells

    llama_qfilter_order() = default;
    llama_qfilter_order(const std::set<std::pair<llama_pos, uint32_t>> & seq_pos);

    uint32_t n() const { return cells.size(); }
};

// the rows that an eviction keeps: of n rows the ranks [0, n_sink), n_best of those in between, and [n - n_window, n)
struct llama_qfilter_selection {
    llama_qfilter_order order;

    uint32_t n_sink   = 0;
    uint32_t n_window = 0;
    uint32_t n_best   = 0;

    std::vector<uint32_t> best; // [n_head_all, n_best] ranks, ascending

    bool same = false; // do all heads keep the same rows?

    uint32_t n_keep() const { return n_sink + n_best + n_window; }

    // the rank of the i-th row that head ih keeps
    uint32_t rank(uint32_t ih, uint32_t i) const {
        return i < n_sink ? i : i < n_sink + n_best ? best[(size_t) ih*n_best + i - n_sink] : order.n() - n_keep() + i;
    }

    // cell positions are written as if the newest rows had been kept: the rank of the row whose position the i-th cell gets
    uint32_t rank_cell(uint32_t i) const {
        return i < n_sink ? i : order.n() - n_keep() + i;
    }
};

// the true positions of a sequence's rows
//
// after an eviction a cell holds rows of different positions, one per KV head. so the cells with positions in [p0, p1) hold
// rows of other positions. all heads have the same number of rows, each in ascending order of position
struct llama_qfilter_table {
    llama_pos p0 = 0;
    llama_pos p1 = 0;

    uint32_t n = 0; // cells in [p0, p1)

    std::vector<llama_pos> pos; // [n_head_all, n] by rank

    std::vector<float> learned; // their scores from learned filters, or empty

    // does the cell with this position hold rows of other positions?
    bool covers(llama_pos pos_cell) const { return pos_cell >= p0 && pos_cell < p1; }

    // the position of a head's row; r0: see rank_p0()
    llama_pos get(const llama_qfilter_order & order, uint32_t r0, uint32_t ih, uint32_t rank) const {
        return covers(order.pos[rank]) ? pos[(size_t) ih*n + rank - r0] : order.pos[rank];
    }

    // the first rank whose cell is not before p0
    uint32_t rank_p0(const llama_qfilter_order & order) const;

    // the table after an eviction; update() still has to write the rows of each head
    llama_qfilter_table after(const llama_qfilter_selection & sel, uint32_t n_head_all, bool has_learned) const;

    // learned: [n_head_all, n] learned scores by rank, only needed for rows that go into the table; or empty
    void update(const llama_qfilter_selection & sel, uint32_t ih, const std::vector<float> & learned, llama_qfilter_table & res) const;

    // extra: three numbers of the caller, written between the header and the rows
    void write(llama_io_write_i & io, const uint32_t extra[3]) const;

    // throws std::runtime_error if the data is impossible for n_head_all heads and at most n_cells cells
    void read(llama_io_read_i & io, uint32_t extra[3], uint32_t n_head_all, uint32_t n_cells, bool has_learned);

    // throws std::runtime_error if the table does not fit these cells
    void check(const llama_qfilter_order & order, uint32_t n_sink) const;
};
