#pragma once

#include "llama.h"

#include "ggml-backend.h"

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

//
// llama_qfilter_archive_store
//

// host memory in blocks of equal size: anonymous, or mapped from an unlinked file (it has no name), so a crash leaves nothing
class llama_qfilter_archive_store {
public:
    // dir: folder of the file, "": anonymous memory; buft: type of anonymous memory that devices copy from faster, or nullptr
    // throws std::runtime_error if the file can't be made
    llama_qfilter_archive_store(size_t n_bytes_block, uint64_t n_bytes_limit, const std::string & dir, ggml_backend_buffer_type_t buft);

    ~llama_qfilter_archive_store();

    bool full() const { return n_bytes + n_bytes_block > n_bytes_limit; }

    // nullptr: full, or out of memory. a block must not outlive the store
    std::shared_ptr<uint8_t> alloc();

    uint64_t n_bytes = 0; // of blocks in use

    const size_t   n_bytes_block;
    const uint64_t n_bytes_limit;

private:
    uint8_t * map_block();

    void free_block(uint8_t * data, ggml_backend_buffer_t buf);

    ggml_backend_buffer_type_t buft;

    int fd = -1;

    size_t n_bytes_mapped = 0; // of a block in the file

    uint64_t n_file = 0; // blocks in the file

    std::vector<uint8_t *> free_blocks; // of the file, still mapped
};

//
// llama_qfilter_archive
//

// where the rows of a layer are in a block
struct llama_qfilter_archive_layer {
    size_t k;
    size_t v;

    size_t n_bytes_k; // of a row, all heads
    size_t n_bytes_v;
};

// the evicted rows of a sequence, by position. copies of a sequence share blocks until one of them writes
class llama_qfilter_archive {
public:
    static constexpr uint32_t n_block = 256; // positions

    bool has(llama_pos pos) const {
        const size_t ib = pos/n_block;

        return pos >= 0 && ib < blocks.size() && blocks[ib].has[pos % n_block];
    }

    // the first of the positions that are all here up to before pos
    llama_pos begin(llama_pos pos) const;

    // the i-th row of a tensor at offset, see llama_qfilter_archive_layer
    const uint8_t * row(llama_pos pos, size_t offset, size_t n_bytes_row) const {
        return blocks[pos/n_block].data.get() + offset + pos % n_block*n_bytes_row;
    }

    // the block of a position, for this sequence alone to write to; nullptr: the store has no more blocks
    uint8_t * write(llama_pos pos, llama_qfilter_archive_store & store);

    void set(llama_pos pos) {
        n += !blocks[pos/n_block].has[pos % n_block];
        blocks[pos/n_block].has.set(pos % n_block);
    }

    // can this position be added? false if it is there already, or was dropped at the limit
    bool takes(llama_pos pos, uint32_t n_first) const { return !has(pos) && (pos >= pos_min || pos < (llama_pos) n_first); }

    // remove the positions [p0, p1)
    void rm(llama_pos p0, llama_pos p1);

    // give back the oldest block after the first n_first positions, but never the newest block. false: there is none to give
    bool drop_oldest(uint32_t n_first);

    uint32_t n_blocks() const;

    // the archived positions in [p0, p1), ascending
    std::vector<llama_pos> positions(llama_pos p0, llama_pos p1) const;

    // LLAMA_TOKEN_NULL: unknown
    llama_token token(llama_pos pos) const { return pos < (llama_pos) tokens.size() ? tokens[pos] : LLAMA_TOKEN_NULL; }

    std::vector<llama_token> tokens; // of all positions that were read, also of those whose rows are not archived yet

    uint64_t n = 0; // positions

    llama_pos pos_min = 0; // positions from those that always stay up to here were dropped at the limit

private:
    struct block {
        std::shared_ptr<uint8_t> data;

        std::bitset<n_block> has;
    };

    std::vector<block> blocks;
};
