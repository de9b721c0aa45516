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

// host memory in blocks of one size: anonymous, or a mapped file that has no name, so that a crash leaves nothing
class llama_qfilter_archive_store {
public:
    // dir: of the file, "": anonymous; buft: of anonymous memory that devices copy from faster, or nullptr
    // throws std::runtime_error if there can be no such file
    llama_qfilter_archive_store(size_t n_bytes_block, uint64_t n_bytes_limit, const std::string & dir, ggml_backend_buffer_type_t buft);

    ~llama_qfilter_archive_store();

    bool full() const { return n_bytes + n_bytes_block > n_bytes_limit; }

    // nullptr: full, or there is no memory. not to outlive the store
    std::shared_ptr<uint8_t> alloc();

    uint64_t n_bytes = 0; // of blocks that are in use

    const size_t   n_bytes_block;
    const uint64_t n_bytes_limit;

private:
    uint8_t * map_block();

    void free_block(uint8_t * data, ggml_backend_buffer_t buf);

    ggml_backend_buffer_type_t buft;

    int fd = -1;

    size_t n_bytes_mapped = 0; // of a block in the file

    uint64_t n_file = 0; // blocks in it

    std::vector<uint8_t *> free_blocks; // of the file, mapped
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

// every row of a sequence that was ever evicted, by position. copies share blocks until one of them writes
class llama_qfilter_archive {
public:
    static constexpr uint32_t n_block = 256; // positions

    bool has(llama_pos pos) const {
        const size_t ib = pos/n_block;

        return pos >= 0 && ib < blocks.size() && blocks[ib].has[pos % n_block];
    }

    // the i-th row of a tensor at offset, see llama_qfilter_archive_layer
    const uint8_t * row(llama_pos pos, size_t offset, size_t n_bytes_row) const {
        return blocks[pos/n_block].data.get() + offset + pos % n_block*n_bytes_row;
    }

    // the block of a position, to be written by this sequence alone; nullptr: the store has no more
    uint8_t * write(llama_pos pos, llama_qfilter_archive_store & store);

    void set(llama_pos pos) {
        n += !blocks[pos/n_block].has[pos % n_block];
        blocks[pos/n_block].has.set(pos % n_block);
    }

    // can positions be added? not those that were dropped
    bool takes(llama_pos pos, uint32_t n_sink) const { return !has(pos) && (pos >= pos_min || pos < (llama_pos) n_sink); }

    // remove the positions [p0, p1)
    void rm(llama_pos p0, llama_pos p1);

    // give the oldest block after the sinks back, but for the newest one. false: there is none
    bool drop_oldest(uint32_t n_sink);

    uint32_t n_blocks() const;

    // those that it has in [p0, p1), ascending
    std::vector<llama_pos> positions(llama_pos p0, llama_pos p1) const;

    // LLAMA_TOKEN_NULL: not known
    llama_token token(llama_pos pos) const { return pos < (llama_pos) tokens.size() ? tokens[pos] : LLAMA_TOKEN_NULL; }

    std::vector<llama_token> tokens; // of all positions that were read, also of those whose rows it does not have yet

    uint64_t n = 0; // positions

    llama_pos pos_min = 0; // those from the sinks up to it were dropped at the limit

private:
    struct block {
        std::shared_ptr<uint8_t> data;

        std::bitset<n_block> has;
    };

    std::vector<block> blocks;
};
