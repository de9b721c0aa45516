#include "llama-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

static const uint32_t LLAMA_QFILTER_STATE_MAGIC   = 0x746c6671; // "qflt"
static const uint32_t LLAMA_QFILTER_STATE_VERSION = 1;

// cells are allocated in steps of what llama_kv_cache::get_n_kv() pads to
static const uint32_t LLAMA_QFILTER_PAD = 256;

//
// scores, one function per policy
//
//   k: cached keys [n_embd_head_k, n_head_kv, n_cells], rows of one head follow each other at k->nb[2]
//   f: filters     [n_embd_head_k*n_head_kv, n_head_kv], block-diagonal
//   returns        [n_cells, n_head_kv] F32, nullptr: all scores are equal
//

typedef ggml_tensor * (*llama_qfilter_score_t)(ggml_context * ctx, ggml_tensor * k, ggml_tensor * f, bool per_head);

// the paper's score (arXiv 2503.02812, section 3): <k, v1>, averaged over the query heads of a group
static ggml_tensor * llama_qfilter_score_qfilters(ggml_context * ctx, ggml_tensor * k, ggml_tensor * f, bool per_head) {
    const int64_t n_embd_head = k->ne[0];
    const int64_t n_head      = k->ne[1];
    const int64_t n_cells     = k->ne[2];

    if (per_head) {
        ggml_tensor * kh = ggml_permute(ctx, k, 0, 2, 1, 3); // [n_embd_head, n_cells, n_head]

        // the blocks on the diagonal of f
        ggml_tensor * fh = ggml_view_3d(ctx, f, n_embd_head, 1, n_head, f->nb[1], f->nb[1] + n_embd_head*f->nb[0], 0);

        ggml_tensor * s = ggml_mul_mat(ctx, kh, fh); // [n_cells, 1, n_head]
        ggml_prec_set_acc(s, GGML_PREC_F32);

        return ggml_reshape_2d(ctx, s, n_cells, n_head);
    }

    ggml_tensor * k2 = ggml_view_2d(ctx, k, n_embd_head*n_head, n_cells, k->nb[2], 0);

    ggml_tensor * s = ggml_mul_mat(ctx, k2, f); // [n_cells, n_head]
    ggml_prec_set_acc(s, GGML_PREC_F32);

    return s;
}

// keys with a small norm attract attention (arXiv 2406.11430): -|k|^2
static ggml_tensor * llama_qfilter_score_knorm(ggml_context * ctx, ggml_tensor * k, ggml_tensor * f, bool per_head) {
    GGML_UNUSED(f);
    GGML_UNUSED(per_head);

    const int64_t n_embd_head = k->ne[0];
    const int64_t n_head      = k->ne[1];
    const int64_t n_cells     = k->ne[2];

    ggml_tensor * cur = ggml_view_2d(ctx, k, n_embd_head*n_head, n_cells, k->nb[2], 0);

    if (cur->type != GGML_TYPE_F32) {
        cur = ggml_cast(ctx, cur, GGML_TYPE_F32);
    }
    cur = ggml_sqr(ctx, cur);
    cur = ggml_reshape_3d(ctx, cur, n_embd_head, n_head, n_cells);
    cur = ggml_sum_rows(ctx, cur);                 // [1, n_head, n_cells]
    cur = ggml_scale(ctx, cur, -1.0f);
    cur = ggml_reshape_2d(ctx, cur, n_head, n_cells);

    return ggml_cont(ctx, ggml_transpose(ctx, cur)); // [n_cells, n_head]
}

static const struct {
    llama_qfilter_policy  policy;
    const char *          name;
    bool                  needs_filters;
    llama_qfilter_score_t score; // nullptr: all scores are equal, so the newest rows stay
} LLAMA_QFILTER_POLICIES[] = {
    { LLAMA_QFILTER_POLICY_QFILTERS,  "qfilters",  true,  llama_qfilter_score_qfilters },
    { LLAMA_QFILTER_POLICY_KNORM,     "knorm",     false, llama_qfilter_score_knorm    },
    { LLAMA_QFILTER_POLICY_STREAMING, "streaming", false, nullptr                      },
};

static llama_qfilter_policy llama_qfilter_policy_check(int32_t policy) {
    for (const auto & p : LLAMA_QFILTER_POLICIES) {
        if (p.policy == policy) {
            return p.policy;
        }
    }
    throw std::runtime_error(format("qfilter: unknown policy %d", policy));
}

//
// llama_qfilter
//

llama_qfilter::llama_qfilter(llama_kv_cache & kv, const llama_cparams & cparams, const llama_qfilter_params & params) :
    kv(kv),
    n_ctx_seq(cparams.n_ctx_seq),
    n_cells(std::min(params.n_cells, cparams.n_ctx_seq)), n_keep(params.n_keep), n_sink(params.n_sink), n_window(params.n_window),
    flags(params.flags), policy(llama_qfilter_policy_check(params.policy)) {

    if (kv.v_trans) {
        throw std::runtime_error("qfilter: Flash Attention is off for this model: the V cache is stored transposed");
    }

    if (n_cells < n_ctx_seq) {
        if (n_keep < n_keep_min() || n_keep >= n_cells) {
            throw std::runtime_error(format("qfilter: n_keep (%u) must be at least n_sink (%u) + n_window (%u, at least 1) and less than n_cells (%u)",
                        n_keep, n_sink, n_window, n_cells));
        }

        if (cparams.n_batch > n_cells - n_keep) {
            throw std::runtime_error(format("qfilter: n_batch (%u) must be at most n_cells - n_keep (%u)", cparams.n_batch, n_cells - n_keep));
        }
    }

    for (int32_t ikv = 0; ikv < (int32_t) kv.layers.size(); ++ikv) {
        head_offs.push_back(n_head_all);
        n_head_all += n_head_kv(ikv);
    }

    streams.resize(kv.n_stream);

    load_filters(params);
}

uint32_t llama_qfilter::n_head_kv(int32_t ikv) const {
    return kv.hparams.n_head_kv(kv.layers[ikv].il);
}

uint32_t llama_qfilter::head_dim(const ggml_tensor * t, int32_t ikv) const {
    return t->ne[0]/n_head_kv(ikv);
}

uint32_t llama_qfilter::n_keep_min() const {
    return n_sink + std::max(1u, n_window); // the newest position has to stay: batches go on from it
}

bool llama_qfilter::needs_scores() const {
    return LLAMA_QFILTER_POLICIES[policy].score != nullptr;
}

// FNV-1a
static uint64_t llama_qfilter_hash(uint64_t hash, const void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i])*0x100000001b3ull;
    }
    return hash;
}

void llama_qfilter::load_filters(const llama_qfilter_params & params) {
    filters.resize(kv.layers.size());
    filters_hash = 0xcbf29ce484222325ull;

    if (!LLAMA_QFILTER_POLICIES[policy].needs_filters) {
        return;
    }

    // llama.cpp rotates the keys of a quantized cache in blocks of n_rot, see llama_kv_cache::build_input_k_rot()
    uint32_t n_rot = 0;
    if (kv.attn_rot_k) {
        n_rot = 64;
        while (kv.n_embd_head_k_all % (2*n_rot) == 0) {
            n_rot *= 2;
        }
    }

    for (size_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        const uint32_t il = kv.layers[ikv].il;
        const size_t   n  = kv.layers[ikv].k->ne[0];

        if (n == 0) {
            continue; // no attention in this layer
        }

        const float * src = params.filters && il < params.n_filters ? params.filters[il] : nullptr;
        if (!src) {
            throw std::runtime_error(format("qfilter: layer %u has no filter", il));
        }

        float sum = 0.0f;
        for (size_t i = 0; i < n; ++i) {
            sum += fabsf(src[i]);
        }
        if (!std::isfinite(sum)) {
            throw std::runtime_error(format("qfilter: the filter of layer %u has values that are not finite", il));
        }

        filters_hash = llama_qfilter_hash(filters_hash, src, n*sizeof(float));

        auto & dst = filters[ikv];
        dst.assign(src, src + n);

        if (n_rot > 0) {
            const auto & rot = kv.attn_rot_hadamard.at(n_rot);

            for (size_t i = 0; i < n; ++i) {
                const size_t i0 = i/n_rot*n_rot;

                float cur = 0.0f;
                for (size_t j = 0; j < n_rot; ++j) {
                    cur += rot[(i - i0)*n_rot + j]*src[i0 + j];
                }
                dst[i] = cur;
            }
        }
    }
}

void llama_qfilter::init(llama_context * lctx) {
    auto * sched = lctx->get_sched();

    const int n_backends = ggml_backend_sched_get_n_backends(sched);

    for (int32_t ikv = 0; ikv < (int32_t) kv.layers.size(); ++ikv) {
        if (n_head_kv(ikv) == 0) {
            continue;
        }

        auto * buffer = kv.layers[ikv].k->buffer;
        auto * dev    = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));

        // plain CPU buffers name no device: the CPU is the scheduler's last backend
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, n_backends - 1);
        for (int i = 0; i < n_backends; ++i) {
            if (dev && ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i)) == dev) {
                backend = ggml_backend_sched_get_backend(sched, i);
                break;
            }
        }

        auto it = std::find_if(workers.begin(), workers.end(), [&](const worker & w) { return w.backend == backend; });
        if (it == workers.end()) {
            worker w;
            w.backend  = backend;
            w.on_host  = ggml_backend_buffer_is_host(buffer) && !(flags & LLAMA_QFILTER_FLAG_GRAPH_GATHER);
            w.per_head = true;
            w.galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));

            workers.push_back(std::move(w));
            it = workers.end() - 1;
        }

        it->ikvs.push_back(ikv);
    }

    filters_dev.resize(kv.layers.size(), nullptr);

    for (auto & w : workers) {
        init_worker(w);
    }
}

ggml_context_ptr llama_qfilter::new_context(size_t n_tensors) {
    ctx_mem.resize(std::max(ctx_mem.size(), n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false)));

    return ggml_context_ptr(ggml_init({
        /*.mem_size   =*/ ctx_mem.size(),
        /*.mem_buffer =*/ ctx_mem.data(),
        /*.no_alloc   =*/ true,
    }));
}

// graph nodes and leaves per layer, at most
static const size_t LLAMA_QFILTER_MAX_TENSORS = 16;

static const ggml_tensor * llama_qfilter_unsupported_op(ggml_backend_t backend, ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            return ggml_graph_node(gf, i);
        }
    }
    return nullptr;
}

void llama_qfilter::init_worker(worker & w) {
    const char * name = ggml_backend_name(w.backend);

    // filters, block-diagonal
    if (LLAMA_QFILTER_POLICIES[policy].needs_filters) {
        ggml_context_ptr ctx(ggml_init({ w.ikvs.size()*ggml_tensor_overhead(), nullptr, true }));

        for (const int32_t ikv : w.ikvs) {
            filters_dev[ikv] = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, kv.layers[ikv].k->ne[0], n_head_kv(ikv));
        }

        auto * buft = ggml_backend_buffer_get_type(kv.layers[w.ikvs[0]].k->buffer);

        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            throw std::runtime_error(format("qfilter: no memory for the filters on %s", name));
        }
        ggml_backend_buffer_clear(buf.get(), 0);

        for (const int32_t ikv : w.ikvs) {
            ggml_tensor * f = filters_dev[ikv];

            const size_t n = head_dim(kv.layers[ikv].k, ikv);
            for (uint32_t ih = 0; ih < n_head_kv(ikv); ++ih) {
                ggml_backend_tensor_set(f, filters[ikv].data() + ih*n, ih*(f->nb[1] + n*f->nb[0]), n*sizeof(float));
            }
        }

        ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    // the graphs at their largest: what can't run or doesn't fit shall say so now
    if (needs_scores()) {
        const ggml_tensor * bad = nullptr;

        for (const bool per_head : { true, false }) {
            w.per_head = per_head;

            auto ctx = new_context(w.ikvs.size()*LLAMA_QFILTER_MAX_TENSORS);

            std::vector<ggml_tensor *> outs;
            auto * gf = build_score_graph(ctx.get(), w, 0, kv.get_size(), outs);

            bad = llama_qfilter_unsupported_op(w.backend, gf);
            if (!bad) {
                if (!ggml_gallocr_reserve(w.galloc.get(), gf)) {
                    throw std::runtime_error(format("qfilter: no memory to score on %s", name));
                }
                break;
            }
        }

        if (bad) {
            throw std::runtime_error(format("qfilter: %s can't score a %s cache (%s)", name,
                        ggml_type_name(kv.type_k()), ggml_op_desc(bad)));
        }
    }

    if (!w.on_host) {
        for (const int32_t ikv : w.ikvs) {
            for (const auto * t : { kv.layers[ikv].k, kv.layers[ikv].v }) {
                if (ggml_row_size(t->type, head_dim(t, ikv)) % sizeof(int32_t) != 0) {
                    throw std::runtime_error(format("qfilter: rows of %s with head_dim %u can't be moved on %s: use another cache type",
                                ggml_type_name(t->type), head_dim(t, ikv), name));
                }
            }
        }

        auto ctx = new_context(w.ikvs.size()*LLAMA_QFILTER_MAX_TENSORS);

        std::vector<ggml_tensor *> idxs;
        auto * gf = build_gather_graph(ctx.get(), w, 0, kv.get_size(), idxs);

        if (const auto * bad = llama_qfilter_unsupported_op(w.backend, gf)) {
            throw std::runtime_error(format("qfilter: %s can't move rows (%s)", name, ggml_op_desc(bad)));
        }
        if (!ggml_gallocr_reserve(w.galloc.get(), gf)) {
            throw std::runtime_error(format("qfilter: no memory to move rows on %s", name));
        }

        test_worker(w);
    }
}

// a device that copies integers as floats may change bits: try it on those that are NaN or denormal as floats
void llama_qfilter::test_worker(worker & w) {
    const uint32_t rows[4][4] = {
        { 0x00000001, 0x007fffff, 0x80000001, 0x807fffff },
        { 0x7f800001, 0xff800001, 0x7fc00001, 0xffffffff },
        { 0x00000000, 0x80000000, 0x00010001, 0x7fffffff },
        { 0x3f800000, 0x12345678, 0x00008000, 0x0000ffff },
    };
    const int32_t order[4] = { 3, 1, 0, 2 };

    ggml_context_ptr ctx_t(ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }));

    ggml_tensor * src = ggml_new_tensor_2d(ctx_t.get(), GGML_TYPE_I32, 4, 4);
    ggml_tensor * idx = ggml_new_tensor_1d(ctx_t.get(), GGML_TYPE_I32, 4);

    auto * buft = ggml_backend_buffer_get_type(kv.layers[w.ikvs[0]].k->buffer);

    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx_t.get(), buft));
    if (!buf) {
        throw std::runtime_error(format("qfilter: no memory to move rows on %s", ggml_backend_name(w.backend)));
    }

    ggml_backend_tensor_set(src, rows,  0, sizeof(rows));
    ggml_backend_tensor_set(idx, order, 0, sizeof(order));

    auto ctx = new_context(LLAMA_QFILTER_MAX_TENSORS);

    auto * gf = ggml_new_graph_custom(ctx.get(), LLAMA_QFILTER_MAX_TENSORS, false);
    ggml_build_forward_expand(gf, ggml_cpy(ctx.get(), ggml_get_rows(ctx.get(), src, idx), src));

    uint32_t moved[4][4] = {};

    if (ggml_gallocr_alloc_graph(w.galloc.get(), gf) && ggml_backend_graph_compute(w.backend, gf) == GGML_STATUS_SUCCESS) {
        ggml_backend_tensor_get(src, moved, 0, sizeof(moved));
    }

    for (int i = 0; i < 4; ++i) {
        if (memcmp(moved[i], rows[order[i]], sizeof(rows[0])) != 0) {
            throw std::runtime_error(format("qfilter: %s does not move rows bit by bit", ggml_backend_name(w.backend)));
        }
    }
}

//
// hooks of llama_kv_cache
//

bool llama_qfilter::has(llama_seq_id seq_id) const {
    return seq_id >= 0 && (size_t) seq_id < streams.size();
}

bool llama_qfilter::fits(const std::vector<llama_ubatch> & ubatches) {
    std::vector<uint32_t> n_new(streams.size(), 0);

    for (auto & st : streams) {
        st.n_lack = 0;
    }

    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (ubatch.pos[i] >= (llama_pos) n_ctx_seq) {
                return false; // eviction does not help
            }
            n_new[kv.seq_to_stream[ubatch.seq_id[i][0]]]++;
        }
    }

    bool res = true;

    for (size_t is = 0; is < streams.size(); ++is) {
        const uint32_t n_used = kv.v_cells[is].get_used();

        if (n_new[is] > 0 && n_used + n_new[is] > n_cells) {
            streams[is].n_lack = n_used + n_new[is] - n_cells;
            res = false;
        }
    }

    return res;
}

void llama_qfilter::clear() {
    std::fill(streams.begin(), streams.end(), stream());
}

bool llama_qfilter::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !has(seq_id)) {
        return true; // no cells to remove
    }

    if (p0 < 0) {
        p0 = 0;
    }

    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }

    // every sequence has a stream of its own; -1 matches all of them
    const size_t is0 = seq_id < 0 ? 0              : seq_id;
    const size_t is1 = seq_id < 0 ? streams.size() : is0 + 1;

    const auto is_whole = [&](size_t is) {
        const auto & cells = kv.v_cells[is];

        return cells.get_used() == 0 || (p0 <= cells.seq_pos_min(is) && p1 > cells.seq_pos_max(is));
    };

    for (size_t is = is0; is < is1; ++is) {
        if (p0 < streams[is].p1 && !is_whole(is)) {
            LLAMA_LOG_DEBUG("%s: seq %d: positions before %d are compacted, can't remove [%d, %d)\n", __func__, (int) is, streams[is].p1, p0, p1);
            return false;
        }
    }

    for (size_t is = is0; is < is1; ++is) {
        if (is_whole(is)) {
            streams[is] = stream();
        }
    }

    return true;
}

bool llama_qfilter::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (!has(seq_id_src) || !has(seq_id_dst)) {
        LLAMA_LOG_ERROR("%s: no sequence %d or %d: raise n_seq_max\n", __func__, seq_id_src, seq_id_dst);
        return false;
    }

    if (seq_id_src == seq_id_dst) {
        return true;
    }

    const auto & cells = kv.v_cells[seq_id_src];

    if (cells.get_used() > 0 && (p0 > cells.seq_pos_min(seq_id_src) || (p1 >= 0 && p1 <= cells.seq_pos_max(seq_id_src)))) {
        LLAMA_LOG_ERROR("%s: a bounded cache copies whole sequences only, not [%d, %d)\n", __func__, p0, p1);
        return false;
    }

    streams[seq_id_dst] = streams[seq_id_src];

    return true;
}

void llama_qfilter::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    if (seq_id != -1 && !has(seq_id)) {
        throw std::runtime_error(format("no sequence %d", seq_id));
    }

    const uint32_t head[] = { LLAMA_QFILTER_STATE_MAGIC, LLAMA_QFILTER_STATE_VERSION, n_cells, n_keep, n_sink, n_window, (uint32_t) policy, n_head_all };

    io.write(head, sizeof(head));
    io.write(&filters_hash, sizeof(filters_hash));

    const uint32_t is0 = seq_id < 0 ? 0              : seq_id;
    const uint32_t is1 = seq_id < 0 ? streams.size() : is0 + 1;
    const uint32_t ns  = is1 - is0;

    io.write(&ns, sizeof(ns));

    for (uint32_t is = is0; is < is1; ++is) {
        const auto & st = streams[is];

        io.write(&st.p0, sizeof(st.p0));
        io.write(&st.p1, sizeof(st.p1));
        io.write(&st.n,  sizeof(st.n));
        io.write(st.pos.data(), st.pos.size()*sizeof(llama_pos));
    }
}

void llama_qfilter::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
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
    if (head[2] != n_cells || head[3] != n_keep || head[4] != n_sink || head[5] != n_window) {
        throw std::runtime_error(format("the state was saved with n_cells = %u, n_keep = %u, n_sink = %u, n_window = %u; this context has %u, %u, %u, %u",
                    head[2], head[3], head[4], head[5], n_cells, n_keep, n_sink, n_window));
    }
    if (head[6] != (uint32_t) policy || hash != filters_hash) {
        throw std::runtime_error("the state was saved with another policy or other filters");
    }
    if (head[7] != n_head_all || ns != (seq_id < 0 ? streams.size() : 1)) {
        throw std::runtime_error("the state was saved by another model or for another number of sequences");
    }

    staged.assign(ns, stream());

    for (auto & st : staged) {
        io.read(&st.p0, sizeof(st.p0));
        io.read(&st.p1, sizeof(st.p1));
        io.read(&st.n,  sizeof(st.n));

        if (st.n > n_cells) {
            throw std::runtime_error("the state is damaged");
        }

        st.pos.resize((size_t) n_head_all*st.n);
        io.read(st.pos.data(), st.pos.size()*sizeof(llama_pos));
    }

    // upstream leaves the old cells when the state has none
    kv.seq_rm(seq_id, -1, -1);
}

void llama_qfilter::state_apply(llama_seq_id seq_id) {
    const size_t is0 = seq_id < 0 ? 0 : seq_id;

    for (size_t i = 0; i < staged.size(); ++i) {
        const auto & st = staged[i];
        const auto & sp = kv.v_cells[is0 + i].seq_pos_get(is0 + i);

        const auto n = std::count_if(sp.begin(), sp.end(), [&](const auto & cell) { return cell.first >= st.p0 && cell.first < st.p1; });
        if (n != st.n) {
            kv.seq_rm(seq_id, -1, -1);
            throw std::runtime_error("the state is damaged");
        }
    }

    for (size_t i = 0; i < staged.size(); ++i) {
        streams[is0 + i] = std::move(staged[i]);
    }
    staged.clear();
}

//
// graphs
//

ggml_tensor * llama_qfilter::build_score(ggml_context * ctx, const worker & w, int32_t ikv, uint32_t is, uint32_t n_span) const {
    ggml_tensor * k = kv.layers[ikv].k_stream[is];

    const int64_t n_embd_head = head_dim(k, ikv);

    k = ggml_view_3d(ctx, k, n_embd_head, n_head_kv(ikv), n_span, ggml_row_size(k->type, n_embd_head), k->nb[1], 0);

    return LLAMA_QFILTER_POLICIES[policy].score(ctx, k, filters_dev[ikv], w.per_head);
}

ggml_cgraph * llama_qfilter::build_score_graph(
        ggml_context * ctx, const worker & w, uint32_t is, uint32_t n_span, std::vector<ggml_tensor *> & outs) const {
    auto * gf = ggml_new_graph_custom(ctx, w.ikvs.size()*LLAMA_QFILTER_MAX_TENSORS, false);

    for (const int32_t ikv : w.ikvs) {
        ggml_tensor * cur = build_score(ctx, w, ikv, is, n_span);

        ggml_set_output(cur);
        ggml_build_forward_expand(gf, cur);

        outs.push_back(cur);
    }

    return gf;
}

// the rows of a stream's cache tensor seen as integers, so that they are moved and never converted: [n_ints, n_rows]
static ggml_tensor * llama_qfilter_view_i32(ggml_context * ctx, ggml_tensor * t, int64_t n_ints, int64_t n_rows) {
    ggml_tensor * res = ggml_view_1d(ctx, t, ggml_blck_size(t->type), 0);

    res->type  = GGML_TYPE_I32;
    res->ne[0] = n_ints;
    res->ne[1] = n_rows;
    res->nb[0] = sizeof(int32_t);
    res->nb[1] = res->nb[0]*n_ints;
    res->nb[2] = res->nb[1]*n_rows;
    res->nb[3] = res->nb[2];

    GGML_ASSERT(res->nb[2] <= ggml_nbytes(t));

    return res;
}

// idxs: one input per layer, [n_head_kv*n_rows] I32, cell*n_head_kv + head in the order of the destination
ggml_cgraph * llama_qfilter::build_gather_graph(
        ggml_context * ctx, const worker & w, uint32_t is, uint32_t n_rows, std::vector<ggml_tensor *> & idxs) const {
    auto * gf = ggml_new_graph_custom(ctx, w.ikvs.size()*LLAMA_QFILTER_MAX_TENSORS, false);

    for (const int32_t ikv : w.ikvs) {
        const auto & layer = kv.layers[ikv];

        const int64_t n_head = n_head_kv(ikv);

        ggml_tensor * idx = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_head*n_rows);
        ggml_set_input(idx);

        idxs.push_back(idx);

        for (auto * t : { layer.k_stream[is], layer.v_stream[is] }) {
            const int64_t n_ints = ggml_row_size(t->type, head_dim(t, ikv))/sizeof(int32_t);

            ggml_tensor * src = llama_qfilter_view_i32(ctx, t, n_ints, n_head*t->ne[1]);
            ggml_tensor * dst = llama_qfilter_view_i32(ctx, t, n_ints, n_head*n_rows);

            // two steps: rows are read before their place is written
            ggml_build_forward_expand(gf, ggml_cpy(ctx, ggml_get_rows(ctx, src, idx), dst));
        }
    }

    return gf;
}

//
// eviction
//

int32_t llama_qfilter::evict(llama_context * lctx) {
    int32_t res = 0;

    for (size_t is = 0; is < streams.size() && res >= 0 && res != 2; ++is) {
        if (streams[is].n_lack > 0) {
            const int32_t ret = compact(lctx, is, n_keep);
            res = ret == 0 ? res : ret;
        }
    }

    for (auto & st : streams) {
        st.n_lack = 0;
    }

    return res;
}

int32_t llama_qfilter::compress(llama_context * lctx, llama_seq_id seq_id, uint32_t n_keep) {
    if (!has(seq_id)) {
        LLAMA_LOG_ERROR("%s: no sequence %d\n", __func__, seq_id);
        return -1;
    }
    if (n_keep < n_keep_min()) {
        LLAMA_LOG_ERROR("%s: n_keep (%u) must be at least n_sink (%u) + n_window (%u, at least 1)\n", __func__, n_keep, n_sink, n_window);
        return -1;
    }

    lctx->memory_update(false); // pending copies

    const int32_t ret = compact(lctx, seq_id, n_keep);

    return ret == 1 ? 0 : ret == 0 ? 1 : ret == 2 ? -1 : ret;
}

llama_pos llama_qfilter::true_pos(const stream & st, uint32_t ih, llama_pos pos, uint32_t rank) const {
    return pos < st.p0 || pos >= st.p1 ? pos : st.pos[(size_t) ih*st.n + rank];
}

// what evict() returns; without room to make: 0
int32_t llama_qfilter::compact(llama_context * lctx, llama_seq_id seq_id, uint32_t n_keep) {
    const uint32_t is = seq_id;

    const auto & cells = kv.v_cells[is];

    // cells in the order of their positions
    std::vector<uint32_t> order;
    for (const auto & it : cells.seq_pos_get(seq_id)) {
        order.push_back(it.second);
    }

    if (order.size() <= n_keep) {
        return 0;
    }

    ggml_backend_sched_synchronize(lctx->get_sched());

    const int64_t t_start = ggml_time_us();

    // score and select; only reads, so it may be aborted

    const uint32_t n_span = cells.used_max_p1();

    std::vector<rows_t> rows(kv.layers.size());

    int64_t t_select = 0;

    for (auto & w : workers) {
        std::vector<ggml_tensor *> outs;

        auto ctx = new_context(w.ikvs.size()*LLAMA_QFILTER_MAX_TENSORS);

        if (needs_scores()) {
            auto * gf = build_score_graph(ctx.get(), w, is, n_span, outs);

            if (!ggml_gallocr_alloc_graph(w.galloc.get(), gf)) {
                LLAMA_LOG_ERROR("%s: failed to allocate the scores\n", __func__);
                return -2;
            }

            const auto status = ggml_backend_graph_compute(w.backend, gf);
            if (status == GGML_STATUS_ABORTED) {
                return 2;
            }
            if (status != GGML_STATUS_SUCCESS) {
                LLAMA_LOG_ERROR("%s: failed to compute the scores: %d\n", __func__, status);
                return -3;
            }
        }

        for (size_t i = 0; i < w.ikvs.size(); ++i) {
            scores.assign((size_t) n_span*n_head_kv(w.ikvs[i]), 0.0f);
            if (needs_scores()) {
                ggml_backend_tensor_get(outs[i], scores.data(), 0, ggml_nbytes(outs[i]));
            }

            const int64_t t0 = ggml_time_us();
            select(w.ikvs[i], scores.data(), n_span, order, n_keep, rows[w.ikvs[i]]);
            t_select += ggml_time_us() - t0;
        }
    }

    const int64_t t_scored = ggml_time_us();

    // move

    const auto cells_of = [&](const rows_t & ranks) {
        rows_t res = ranks;
        for (auto & head : res) {
            for (auto & r : head) {
                r = order[r];
            }
        }
        return res;
    };

    for (auto & w : workers) {
        std::vector<rows_t> src;
        for (const int32_t ikv : w.ikvs) {
            src.push_back(cells_of(rows[ikv]));
        }

        if (w.on_host) {
            for (size_t i = 0; i < w.ikvs.size(); ++i) {
                gather_host(w.ikvs[i], is, src[i]);
            }
        } else if (!gather_graph(w, is, n_keep, src)) {
            LLAMA_LOG_ERROR("%s: failed to move rows, sequence %d is cleared\n", __func__, seq_id);
            kv.seq_rm(seq_id, -1, -1);
            return -3;
        }
    }

    update_cells(seq_id, order, n_keep, rows);

    stats.n_evictions += 1;
    stats.n_dropped   += order.size() - n_keep;
    stats.t_score_us  += t_scored - t_start - t_select;
    stats.t_select_us += t_select;
    stats.t_gather_us += ggml_time_us() - t_scored;

    return 1;
}

// score: [n_head_kv][n_span] by cell; rows: ranks in order, ascending
void llama_qfilter::select(
        int32_t ikv, const float * score, uint32_t n_span, const std::vector<uint32_t> & order, uint32_t n_keep, rows_t & rows) const {
    const uint32_t n      = order.size();
    const uint32_t n_cand = n - n_sink - n_window; // ranks [n_sink, n - n_window)
    const uint32_t n_best = n_keep - n_sink - n_window;

    struct cand {
        float    score;
        uint32_t rank;
    };

    std::vector<cand> cands(n_cand);

    rows.assign(n_head_kv(ikv), {});

    for (uint32_t ih = 0; ih < rows.size(); ++ih) {
        const float * s = score + (size_t) ih*n_span;

        for (uint32_t i = 0; i < n_cand; ++i) {
            const float cur = s[order[n_sink + i]];

            cands[i] = { std::isnan(cur) ? -INFINITY : cur, n_sink + i };
        }

        // ties: the newest wins
        std::nth_element(cands.begin(), cands.begin() + n_best, cands.end(), [](const cand & a, const cand & b) {
            return a.score > b.score || (a.score == b.score && a.rank > b.rank);
        });

        auto & res = rows[ih];
        res.reserve(n_keep);

        for (uint32_t r = 0; r < n_sink; ++r) {
            res.push_back(r);
        }
        for (uint32_t i = 0; i < n_best; ++i) {
            res.push_back(cands[i].rank);
        }
        std::sort(res.begin() + n_sink, res.end());
        for (uint32_t r = n - n_window; r < n; ++r) {
            res.push_back(r);
        }
    }
}

// rows: the cell of each row
void llama_qfilter::gather_host(int32_t ikv, uint32_t is, const rows_t & rows) {
    const uint32_t n_rows = rows[0].size();

    for (auto * t : { kv.layers[ikv].k_stream[is], kv.layers[ikv].v_stream[is] }) {
        const size_t row_size = ggml_row_size(t->type, head_dim(t, ikv));

        copy_buf.resize(n_rows*t->nb[1]);

        for (uint32_t i = 0; i < n_rows; ++i) {
            for (uint32_t ih = 0; ih < rows.size(); ++ih) {
                memcpy(copy_buf.data() + i*t->nb[1] + ih*row_size, (const char *) t->data + rows[ih][i]*t->nb[1] + ih*row_size, row_size);
            }
        }

        memcpy(t->data, copy_buf.data(), copy_buf.size());

        stats.n_bytes_moved += copy_buf.size();
    }
}

bool llama_qfilter::gather_graph(worker & w, uint32_t is, uint32_t n_rows, const std::vector<rows_t> & rows) {
    auto ctx = new_context(w.ikvs.size()*LLAMA_QFILTER_MAX_TENSORS);

    std::vector<ggml_tensor *> idxs;
    auto * gf = build_gather_graph(ctx.get(), w, is, n_rows, idxs);

    if (!ggml_gallocr_alloc_graph(w.galloc.get(), gf)) {
        return false;
    }

    for (size_t il = 0; il < w.ikvs.size(); ++il) {
        const uint32_t n_head = rows[il].size();

        std::vector<int32_t> data(ggml_nelements(idxs[il]));
        for (uint32_t i = 0; i < n_rows; ++i) {
            for (uint32_t ih = 0; ih < n_head; ++ih) {
                data[i*n_head + ih] = rows[il][ih][i]*n_head + ih;
            }
        }
        ggml_backend_tensor_set(idxs[il], data.data(), 0, ggml_nbytes(idxs[il]));

        const auto & layer = kv.layers[w.ikvs[il]];
        stats.n_bytes_moved += n_rows*(layer.k->nb[1] + layer.v->nb[1]);
    }

    return ggml_backend_graph_compute(w.backend, gf) == GGML_STATUS_SUCCESS;
}

// rows: ranks in order
void llama_qfilter::update_cells(llama_seq_id seq_id, const std::vector<uint32_t> & order, uint32_t n_keep, const std::vector<rows_t> & rows) {
    auto & cells = kv.v_cells[seq_id];
    auto & st    = streams[seq_id];

    const uint32_t n      = order.size();
    const uint32_t n_best = n_keep - n_sink - n_window;

    const auto pos_of = [&](uint32_t rank) { return cells.pos_get(order[rank]); };

    // ranks of the rows that an earlier eviction left start here
    uint32_t r0 = 0;
    while (r0 < n && pos_of(r0) < st.p0) {
        r0++;
    }

    // after a cut, the window may reach into the rows that an earlier eviction left: they stay in the table
    uint32_t n_tab = n_best;
    while (n_sink + n_tab < n_keep && pos_of(n - n_keep + n_sink + n_tab) < st.p1) {
        n_tab++;
    }

    stream st_new;

    st_new.p0 = pos_of(n_sink);
    st_new.p1 = std::max(st.p1, pos_of(n - n_window - 1) + 1);
    st_new.n  = n_tab;
    st_new.pos.resize((size_t) n_head_all*n_tab);

    for (size_t ikv = 0; ikv < rows.size(); ++ikv) {
        for (uint32_t ih = 0; ih < rows[ikv].size(); ++ih) {
            const uint32_t ih_all = head_offs[ikv] + ih;

            for (uint32_t i = 0; i < n_tab; ++i) {
                const uint32_t rank = rows[ikv][ih][n_sink + i];

                st_new.pos[(size_t) ih_all*n_tab + i] = true_pos(st, ih_all, pos_of(rank), rank - r0);
            }
        }
    }

    // the cells look as if the newest candidates had been kept
    std::vector<uint32_t> src;
    std::vector<uint32_t> dst;

    for (uint32_t i = 0; i < n_keep; ++i) {
        src.push_back(order[i < n_sink ? i : n - n_keep + i]);
        dst.push_back(i);
    }

    const auto cells_new = cells.cp(src);

    for (const uint32_t i : order) {
        cells.rm(i);
    }
    cells.set(dst, cells_new);

    kv.v_heads[seq_id] = n_keep;

    st = std::move(st_new);
}

//
// what callers can see
//

int32_t llama_qfilter::kept(llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) const {
    const auto it = kv.map_layer_ids.find(il);

    if (!has(seq_id) || it == kv.map_layer_ids.end() || ih < 0 || ih >= (int32_t) n_head_kv(it->second)) {
        return -1;
    }

    const auto & st = streams[seq_id];

    size_t   n    = 0;
    uint32_t rank = 0; // among the rows that an eviction left

    for (const auto & cell : kv.get_cells(seq_id).seq_pos_get(seq_id)) {
        const llama_pos pos = true_pos(st, head_offs[it->second] + ih, cell.first, rank);

        if (cell.first >= st.p0 && cell.first < st.p1) {
            rank++;
        }
        if (n < capacity) {
            out[n] = pos;
        }
        n++;
    }

    return n;
}

size_t llama_qfilter::rows(llama_context * lctx, llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) const {
    const auto it = kv.map_layer_ids.find(il);

    if (!has(seq_id) || it == kv.map_layer_ids.end()) {
        return 0;
    }

    lctx->memory_update(false); // pending copies

    const auto & layer = kv.layers[it->second];
    const auto & order = kv.get_cells(seq_id).seq_pos_get(seq_id);

    ggml_tensor * t = is_v ? layer.v_stream[seq_id] : layer.k_stream[seq_id];

    const size_t n_bytes = order.size()*t->nb[1];

    if (out && size >= n_bytes) {
        lctx->synchronize();

        size_t offs = 0;
        for (const auto & cell : order) {
            ggml_backend_tensor_get(t, (char *) out + offs, cell.second*t->nb[1], t->nb[1]);
            offs += t->nb[1];
        }
    }

    return n_bytes;
}

void llama_qfilter::get_stats(llama_qfilter_stats & res) const {
    res = stats;

    for (const auto & cells : kv.v_cells) {
        res.n_cells_used += cells.get_used();
    }
    res.n_cells       = n_cells*kv.n_stream;
    res.n_cells_alloc = kv.get_size()*kv.n_stream;
    res.n_bytes_kv    = kv.total_size();
}

//
// between llama_context and the caches
//

static llama_qfilter * llama_qfilter_of(llama_memory_t mem) {
    auto * kv = dynamic_cast<llama_kv_cache *>(mem);

    return kv ? kv->qfilter.get() : nullptr;
}

llama_memory_i * llama_qfilter_create_memory(
        const llama_model          & model,
        const llama_memory_params  & params_mem,
        const llama_cparams        & cparams,
        const llama_qfilter_params * params) {
    if (!params) {
        return model.create_memory(params_mem, cparams);
    }

    // only the cache is small: everything else goes on to see the logical context
    llama_cparams cparams_mem = cparams;
    cparams_mem.n_ctx_seq = std::min<uint32_t>(GGML_PAD(params->n_cells, LLAMA_QFILTER_PAD), cparams.n_ctx_seq);

    std::unique_ptr<llama_memory_i> mem(model.create_memory(params_mem, cparams_mem));

    auto * kv = dynamic_cast<llama_kv_cache *>(mem.get());
    if (!kv) {
        throw std::runtime_error(format("qfilter: the cache of %s models can't be bounded", model.arch_name().c_str()));
    }

    kv->qfilter = std::make_shared<llama_qfilter>(*kv, cparams, *params);

    return mem.release();
}

int32_t llama_qfilter_evict(llama_context * lctx) {
    auto * qf = llama_qfilter_of(lctx->get_memory());

    return qf ? qf->evict(lctx) : 0;
}

//
// C API
//

llama_qfilter_params llama_qfilter_default_params() {
    return {
        /*.struct_size =*/ sizeof(llama_qfilter_params),
        /*.n_cells     =*/ 4096,
        /*.n_keep      =*/ 3584,
        /*.n_sink      =*/ 4,
        /*.n_window    =*/ 1024,
        /*.policy      =*/ LLAMA_QFILTER_POLICY_QFILTERS,
        /*.flags       =*/ 0,
        /*.n_filters   =*/ 0,
        /*.filters     =*/ nullptr,
    };
}

// empty: supported
static std::string llama_qfilter_refusal(const llama_model & model, const llama_context_params & cparams) {
    const auto & hparams = model.hparams;
    const auto   arch    = model.arch_name();

    if (hparams.vocab_only) {
        return "the model was loaded with vocab_only: there is nothing to run";
    }
    if (llama_model_has_encoder(&model) || !hparams.causal_attn) {
        return arch + " models are encoders: there is no cache that grows";
    }
    if (llama_model_is_recurrent(&model)) {
        return arch + " models are recurrent: they have no keys to evict";
    }
    if (llama_model_is_hybrid(&model)) {
        return arch + " models are hybrid (recurrent and attention layers): not supported";
    }
    if (hparams.is_mla()) {
        return arch + " models use multi-head latent attention (MLA): their cache has no keys per head";
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return arch + " models have sliding-window layers: not supported";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return arch + " models use ALiBi: the distance to every key would have to be known per head";
    }
    if (hparams.router_layer >= 0) {
        return arch + " models route by a layer of the cache: it must not be evicted";
    }
    if (hparams.n_pos_per_embd() > 1) {
        return arch + " models use multi-dimensional positions (M-RoPE): not supported";
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return "split_mode = tensor spreads a row over devices: use split_mode = layer or none";
    }
    if (cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        return "Flash Attention is disabled: the V cache would be stored transposed";
    }
    if (cparams.embeddings || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return "only contexts that generate text are supported, not embeddings or draft contexts";
    }
    if (cparams.n_seq_max > 1 && cparams.kv_unified) {
        return "n_seq_max > 1 needs kv_unified = false: every sequence has its own cells";
    }

    return "";
}

bool llama_qfilter_supported(const llama_model * model, llama_context_params cparams, char * why, size_t size) {
    const std::string refusal = llama_qfilter_refusal(*model, cparams);

    if (why && size > 0) {
        snprintf(why, size, "%s", refusal.c_str());
    }

    return refusal.empty();
}

llama_context * llama_init_from_model(llama_model * model, llama_context_params cparams) {
    return llama_qfilter_init_context(model, cparams, nullptr);
}

llama_context * llama_qfilter_init_from_model(llama_model * model, llama_context_params cparams, const llama_qfilter_params * params) {
    if (!model) {
        LLAMA_LOG_ERROR("%s: model cannot be NULL\n", __func__);
        return nullptr;
    }
    if (!params || params->struct_size != sizeof(llama_qfilter_params)) {
        LLAMA_LOG_ERROR("%s: the parameters are of another version of qfilter.h\n", __func__);
        return nullptr;
    }

    if (cparams.n_seq_max <= 1) {
        cparams.kv_unified = false; // one stream either way; this way ids of other sequences are refused
    }

    const std::string refusal = llama_qfilter_refusal(*model, cparams);
    if (!refusal.empty()) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, refusal.c_str());
        return nullptr;
    }

    llama_context * ctx = llama_qfilter_init_context(model, cparams, params);

    if (ctx) {
        try {
            llama_qfilter_of(ctx->get_memory())->init(ctx);
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
            llama_free(ctx);
            return nullptr;
        }
    }

    return ctx;
}

int32_t llama_qfilter_compress(llama_context * ctx, llama_seq_id seq_id, uint32_t n_keep) {
    auto * qf = llama_qfilter_of(ctx->get_memory());

    return qf ? qf->compress(ctx, seq_id, n_keep) : -1;
}

int32_t llama_qfilter_kept(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) {
    const auto * qf = llama_qfilter_of(ctx->get_memory());

    return qf ? qf->kept(seq_id, il, ih, out, capacity) : -1;
}

size_t llama_qfilter_rows(llama_context * ctx, llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) {
    const auto * qf = llama_qfilter_of(ctx->get_memory());

    return qf ? qf->rows(ctx, seq_id, il, is_v, out, size) : 0;
}

bool llama_qfilter_get_stats(const llama_context * ctx, llama_qfilter_stats * stats) {
    const auto * qf = llama_qfilter_of(ctx->get_memory());

    if (!qf || stats->struct_size != sizeof(llama_qfilter_stats)) {
        return false;
    }

    qf->get_stats(*stats);
    stats->struct_size = sizeof(llama_qfilter_stats);

    return true;
}
