#include "llama-qfilter-archive.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#ifndef _WIN32
#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

//
// llama_qfilter_archive_store
//

llama_qfilter_archive_store::llama_qfilter_archive_store(
        size_t n_bytes_block, uint64_t n_bytes_limit, const std::string & dir, ggml_backend_buffer_type_t buft) :
    n_bytes_block(n_bytes_block), n_bytes_limit(n_bytes_limit), buft(buft) {
    if (dir.empty()) {
        return;
    }

#ifdef _WIN32
    throw std::runtime_error("an archive in a folder needs mmap(), which Windows does not have: use memory");
#else
    std::string name = dir + "/qfllama-archive-XXXXXX";

    fd = mkstemp(&name[0]);
    if (fd < 0) {
        throw std::runtime_error(format("no file for the archive in %s: %s", dir.c_str(), strerror(errno)));
    }
    unlink(name.c_str());
    fcntl(fd, F_SETFD, FD_CLOEXEC);

    const size_t n_page = sysconf(_SC_PAGESIZE);

    n_bytes_mapped = GGML_PAD(n_bytes_block, n_page);
#endif
}

llama_qfilter_archive_store::~llama_qfilter_archive_store() {
#ifndef _WIN32
    for (auto * data : free_blocks) {
        munmap(data, n_bytes_mapped);
    }
    if (fd >= 0) {
        close(fd);
    }
#endif
}

uint8_t * llama_qfilter_archive_store::map_block() {
#ifdef _WIN32
    return nullptr;
#else
    if (!free_blocks.empty()) {
        auto * data = free_blocks.back();
        free_blocks.pop_back();
        return data;
    }

    const off_t offset = n_file*n_bytes_mapped;

    // reserve the space now: writing to a mapped page on a full disk would raise a signal, not return an error
#ifdef __linux__
    if (posix_fallocate(fd, offset, n_bytes_mapped) != 0) {
        return nullptr;
    }
#else
    const std::vector<uint8_t> zeros(n_bytes_mapped);
    if (pwrite(fd, zeros.data(), zeros.size(), offset) != (ssize_t) zeros.size()) {
        return nullptr;
    }
#endif

    void * data = mmap(nullptr, n_bytes_mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
    if (data == MAP_FAILED) {
        return nullptr;
    }

    n_file++;
    return (uint8_t *) data;
#endif
}

void llama_qfilter_archive_store::free_block(uint8_t * data, ggml_backend_buffer_t buf) {
    n_bytes -= n_bytes_block;

    if (fd >= 0) {
        free_blocks.push_back(data);
    } else if (buf) {
        ggml_backend_buffer_free(buf);
    } else {
        free(data);
    }
}

std::shared_ptr<uint8_t> llama_qfilter_archive_store::alloc() {
    if (full()) {
        return nullptr;
    }

    ggml_backend_buffer_t buf = fd < 0 && buft ? ggml_backend_buft_alloc_buffer(buft, n_bytes_block) : nullptr;

    uint8_t * data = fd >= 0 ? map_block() : buf ? (uint8_t *) ggml_backend_buffer_get_base(buf) : (uint8_t *) malloc(n_bytes_block);
    if (!data) {
        return nullptr;
    }

    n_bytes += n_bytes_block;

    return std::shared_ptr<uint8_t>(data, [this, buf](uint8_t * data) { free_block(data, buf); });
}

//
// llama_qfilter_archive
//

llama_pos llama_qfilter_archive::begin(llama_pos pos) const {
    while (has(pos - 1)) {
        pos -= pos % n_block == 0 && blocks[pos/n_block - 1].has.all() ? n_block : 1;
    }

    return pos;
}

uint8_t * llama_qfilter_archive::write(llama_pos pos, llama_qfilter_archive_store & store) {
    const size_t ib = pos/n_block;

    if (ib >= blocks.size()) {
        blocks.resize(ib + 1);
    }

    auto & data = blocks[ib].data;

    if (!data) {
        data = store.alloc();
    } else if (data.use_count() > 1) {
        auto copy = store.alloc();
        if (!copy) {
            return nullptr;
        }
        memcpy(copy.get(), data.get(), store.n_bytes_block);
        data = std::move(copy);
    }

    return data.get();
}

void llama_qfilter_archive::rm(llama_pos p0, llama_pos p1) {
    for (size_t ib = std::max(p0, 0)/n_block; ib < blocks.size() && (llama_pos) (ib*n_block) < p1; ++ib) {
        auto & b = blocks[ib];

        for (uint32_t i = 0; i < n_block; ++i) {
            const llama_pos pos = ib*n_block + i;

            if (pos >= p0 && pos < p1 && b.has[i]) {
                b.has.reset(i);
                n--;
            }
        }
        if (b.has.none()) {
            b.data.reset();
        }
    }

    while (!blocks.empty() && !blocks.back().data) {
        blocks.pop_back();
    }
    if (p1 == std::numeric_limits<llama_pos>::max()) {
        pos_min = std::min(pos_min, p0);
    }
}

bool llama_qfilter_archive::drop_oldest(uint32_t n_first) {
    for (size_t ib = (n_first + n_block - 1)/n_block; ib + 1 < blocks.size(); ++ib) {
        auto & b = blocks[ib];

        if (b.data) {
            n -= b.has.count();
            b  = block();

            pos_min = (ib + 1)*n_block;
            return true;
        }
    }

    return false;
}

uint32_t llama_qfilter_archive::n_blocks() const {
    return std::count_if(blocks.begin(), blocks.end(), [](const block & b) { return b.data != nullptr; });
}

std::vector<llama_pos> llama_qfilter_archive::positions(llama_pos p0, llama_pos p1) const {
    std::vector<llama_pos> res;

    for (size_t ib = std::max(p0, 0)/n_block; ib < blocks.size() && (llama_pos) (ib*n_block) < p1; ++ib) {
        for (uint32_t i = 0; i < n_block && blocks[ib].has.any(); ++i) {
            const llama_pos pos = ib*n_block + i;

            if (pos >= p0 && pos < p1 && blocks[ib].has[i]) {
                res.push_back(pos);
            }
        }
    }

    return res;
}
