#include "llama-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

static const uint32_t LLAMA_QFILTER_STATE_MAGIC   = 0x746c6671; // "qflt"
static const uint32_t LLAMA_QFILTER_STATE_VERSION = 2;

// cells are allocated in steps of what llama_kv_cache::get_n_kv() pads to
static const uint32_t LLAMA_QFILTER_PAD = 256;

// room for a group of heads: two F32 copies of its keys that a policy has at once, and for the rest
static const size_t LLAMA_QFILTER_MAX_COPIES = 3;

// layers whose scores are held at once by the CPU: others are given all at once, it costs them more to be given work
static const uint32_t LLAMA_QFILTER_MAX_LAYERS = 8;

// the positions that queries are expected at: a few hundred, of which every 16th is looked at
static const uint32_t LLAMA_QFILTER_AHEAD      = 256;
static const uint32_t LLAMA_QFILTER_AHEAD_STEP = 16;

// graph nodes and leaves per group of heads, at most
static const size_t LLAMA_QFILTER_MAX_TENSORS = 96;

//
// llama_qfilter
//

static llama_kv_cache_iswa * llama_qfilter_iswa_of(llama_memory_i * mem) {
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
        return hybrid->get_mem_attn();
    }

    return dynamic_cast<llama_kv_cache_iswa *>(mem);
}

static llama_memory_recurrent * llama_qfilter_recr_of(llama_memory_i * mem) {
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
        return hybrid->get_mem_recr();
    }

    auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem);

    return hybrid ? hybrid->get_mem_recr() : nullptr;
}

llama_kv_cache * llama_qfilter::cache_of(llama_memory_i * mem) {
    if (auto * iswa = llama_qfilter_iswa_of(mem)) {
        return iswa->get_base();
    }

    auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem);
    if (hybrid && !dynamic_cast<llama_memory_hybrid_idx *>(mem)) {
        return hybrid->get_mem_attn();
    }

    return dynamic_cast<llama_kv_cache *>(mem);
}

llama_memory_i * llama_qfilter::create_memory(
        const llama_model         & model,
        const llama_memory_params & params_mem_in,
        const llama_cparams       & cparams_in,
              uint32_t              n_cells) {
    llama_memory_params params_mem = params_mem_in;
    llama_cparams       cparams    = cparams_in;

    const uint32_t n_alloc = std::min<uint32_t>(GGML_PAD(n_cells, LLAMA_QFILTER_PAD), cparams_in.n_ctx_seq);

    cparams.n_ctx_seq = n_alloc;

    // upstream makes the windowed part as large as the other one when swa_full is set, and never larger
    params_mem.swa_full = false;

    if (model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        const uint32_t n_alloc_swa = GGML_PAD(model.hparams.n_swa + cparams.n_ubatch, LLAMA_QFILTER_PAD);

        cparams.n_ctx_seq = std::min(std::max(n_alloc, n_alloc_swa), cparams_in.n_ctx_seq);
    }

    std::unique_ptr<llama_memory_i> mem(model.create_memory(params_mem, cparams));

    auto * kv = cache_of(mem.get());
    if (!kv || kv->layers.empty()) {
        throw std::runtime_error(format("qfilter: the cache of %s models can't be bounded", model.arch_name().c_str()));
    }

    auto * iswa = llama_qfilter_iswa_of(mem.get());
    if (iswa && kv->get_size() > n_alloc) {
        // the window needs more cells than the bound allows: the same cache again, smaller
        std::map<int32_t, int32_t> ils; // layer -> layer whose cells it uses
        for (const auto & [il, ikv] : kv->map_layer_ids) {
            ils[il] = kv->layers[ikv].il;
        }

        const bool v_trans = kv->v_trans;

        iswa->kv_base.reset();
        iswa->kv_base = std::make_unique<llama_kv_cache>(
                model, model.hparams, params_mem.type_k, params_mem.type_v,
                v_trans, cparams.offload_kqv, cparams.kv_unified, n_alloc, cparams.n_seq_max, 1,
                0, LLAMA_SWA_TYPE_NONE, nullptr,
                [&](int32_t il) { return ils.count(il) > 0; },
                [&](int32_t il) { return ils.count(il) > 0 && ils[il] != il ? ils[il] : -1; },
                nullptr);
    }

    return mem.release();
}

llama_qfilter::llama_qfilter(llama_memory_i & mem, const llama_cparams & cparams, const llama_qfilter_params & params) :
    mem(mem), kv(*cache_of(&mem)), kv_swa(llama_qfilter_iswa_of(&mem) ? llama_qfilter_iswa_of(&mem)->get_swa() : nullptr),
    recr(llama_qfilter_recr_of(&mem)),
    n_ctx_seq(cparams.n_ctx_seq),
    n_cells(std::min(params.n_cells, cparams.n_ctx_seq)), n_keep(params.n_keep), n_sink(params.n_sink), n_window(params.n_window),
    flags(params.flags), seed(params.seed), policy(llama_qfilter_policy_get(params.policy)), n_rank(params.n_rank) {

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
        n_head_max = std::max(n_head_max, n_head_kv(ikv));
    }

    streams.resize(kv.n_stream);

    if (kv_swa) {
        // upstream leaves out what the next token does not see; the same sums take the same cells
        kv_swa->qfilter_window = true;
    }

    load_filters(params);
}

uint32_t llama_qfilter::n_head_kv(int32_t ikv) const {
    return kv.hparams.n_head_kv(kv.layers[ikv].il);
}

uint32_t llama_qfilter::head_dim(const ggml_tensor * t, int32_t ikv) const {
    return t->ne[0]/n_head_kv(ikv);
}

// query heads of a KV head
uint32_t llama_qfilter::n_rep(int32_t ikv) const {
    return kv.hparams.n_head(kv.layers[ikv].il)/n_head_kv(ikv);
}

uint32_t llama_qfilter::n_filter_rows(int32_t ikv) const {
    switch (policy.needs) {
        case LLAMA_QFILTER_NEEDS_NOTHING: return 0;
        case LLAMA_QFILTER_NEEDS_FILTERS:
        case LLAMA_QFILTER_NEEDS_QUERIES:
        case LLAMA_QFILTER_NEEDS_EITHER:  return 1;
        case LLAMA_QFILTER_NEEDS_MOMENTS: return n_rep(ikv)*(1 + n_rank);
    }
    GGML_ABORT("fatal error");
}

uint32_t llama_qfilter::n_keep_min() const {
    return n_sink + std::max(1u, n_window); // the newest position has to stay: batches go on from it
}

// the heads of a layer whose keys are copied at once
uint32_t llama_qfilter::n_head_group(const worker & w, int32_t ikv) const {
    const auto & layer = kv.layers[ikv];

    const uint32_t n_head = n_head_kv(ikv);

    if (!w.by_group) {
        return n_head;
    }
    if (w.on_host) {
        return 1; // the copy of one head stays in the CPU's cache
    }

    // an eviction shall not need more memory than K and V of two layers
    const size_t n_bytes      = 2*(layer.k->nb[1] + layer.v->nb[1]);
    const size_t n_bytes_copy = (LLAMA_QFILTER_MAX_COPIES*layer.k->ne[0] + n_head*n_filter_rows(ikv))*sizeof(float);

    return std::max<size_t>(1, std::min<size_t>(n_head, n_head*n_bytes/n_bytes_copy));
}

// cells that were emptied since have no history
const llama_qfilter::stream & llama_qfilter::get_stream(uint32_t is) const {
    static const stream none;

    return kv.v_cells[is].get_used() == 0 ? none : streams[is];
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

    if (policy.score_pos) {
        filters_hash = llama_qfilter_hash(filters_hash, &seed, sizeof(seed));
    }
    if (policy.needs == LLAMA_QFILTER_NEEDS_NOTHING) {
        return;
    }

    const bool is_moments = policy.needs == LLAMA_QFILTER_NEEDS_MOMENTS;
    const bool is_queries = policy.needs == LLAMA_QFILTER_NEEDS_QUERIES || (policy.needs == LLAMA_QFILTER_NEEDS_EITHER && params.queries);

    const auto * srcs = is_moments ? params.moments : is_queries ? params.queries : params.filters;
    const auto * what = is_moments ? "moments"      : is_queries ? "query"        : "filter";

    if (is_queries) {
        ropes.resize(kv.layers.size());
        filters_hash = llama_qfilter_hash(filters_hash, "queries", 7);
    }

    if (is_moments && n_rank == 0) {
        throw std::runtime_error(format("qfilter: policy %s needs moments of rank 1 at least", policy.name));
    }

    for (size_t ikv = 0; ikv < kv.layers.size(); ++ikv) {
        const uint32_t il = kv.layers[ikv].il;

        if (n_head_kv(ikv) == 0) {
            continue; // no attention in this layer
        }

        const size_t n_embd_head = head_dim(kv.layers[ikv].k, ikv);
        const size_t n           = n_head_kv(ikv)*n_filter_rows(ikv)*n_embd_head;

        const float * src = srcs && il < params.n_filters ? srcs[il] : nullptr;
        if (!src) {
            throw std::runtime_error(format("qfilter: layer %u has no %s", il, what));
        }

        float sum = 0.0f;
        for (size_t i = 0; i < n; ++i) {
            sum += fabsf(src[i]);
        }
        if (!std::isfinite(sum)) {
            throw std::runtime_error(format("qfilter: the %s of layer %u has values that are not finite", what, il));
        }

        filters_hash = llama_qfilter_hash(filters_hash, src, n*sizeof(float));

        auto & dst = filters[ikv];
        dst.assign(src, src + n);

        if (is_moments) {
            // the first rows of the query heads of a KV head together, see llama_qfilter_score_qfilters2()
            for (size_t i = 0; i < n/n_embd_head; ++i) {
                const size_t n_group = n_filter_rows(ikv);
                const size_t ir = i % n_group/(1 + n_rank);
                const size_t ij = i % (1 + n_rank);
                const size_t to = ij == 0 ? ir : n_rep(ikv) + ir*n_rank + ij - 1;

                memcpy(&dst[(i/n_group*n_group + to)*n_embd_head], src + i*n_embd_head, n_embd_head*sizeof(float));
            }
        }

        if (!is_queries) {
            rotate_rows(dst.data(), n);
        }
    }
}

// as llama.cpp rotates the keys of a quantized cache, in blocks of n_rot: see llama_kv_cache::build_input_k_rot()
void llama_qfilter::rotate_rows(float * x, size_t n) const {
    if (!kv.attn_rot_k) {
        return;
    }

    size_t n_rot = 64;
    while (kv.n_embd_head_k_all % (2*n_rot) == 0) {
        n_rot *= 2;
    }

    const auto & rot = kv.attn_rot_hadamard.at(n_rot);

    const std::vector<float> plain(x, x + n);

    for (size_t i = 0; i < n; ++i) {
        const size_t i0 = i/n_rot*n_rot;

        float cur = 0.0f;
        for (size_t j = 0; j < n_rot; ++j) {
            cur += rot[(i - i0)*n_rot + j]*plain[i0 + j];
        }
        x[i] = cur;
    }
}

// queries before RoPE as those of the positions from pos on, in the mean
bool llama_qfilter::turn_filters(llama_pos pos) {
    std::vector<llama_pos> ahead;
    for (uint32_t i = 0; i < LLAMA_QFILTER_AHEAD; i += LLAMA_QFILTER_AHEAD_STEP) {
        ahead.push_back(pos + i);
    }

    for (const auto & ikvs : rope_ikvs) {
        std::vector<float> plain;
        for (const int32_t ikv : ikvs) {
            plain.insert(plain.end(), filters[ikv].begin(), filters[ikv].end());
        }

        std::vector<float> turned;
        for (size_t i = 0; i < ahead.size(); ++i) {
            turned.insert(turned.end(), plain.begin(), plain.end());
        }

        if (!ropes[ikvs[0]].turn(false, ahead.data(), ahead.size(), plain.size()/head_dim(kv.layers[ikvs[0]].k, ikvs[0]), turned.data())) {
            return false;
        }

        std::vector<float> mean(plain.size(), 0.0f);
        for (size_t i = 0; i < turned.size(); ++i) {
            mean[i % mean.size()] += turned[i]/ahead.size();
        }

        float * data = mean.data();
        for (const int32_t ikv : ikvs) {
            rotate_rows(data, filters[ikv].size());
            ggml_backend_tensor_set(filters_dev[ikv], data, 0, ggml_nbytes(filters_dev[ikv]));

            data += filters[ikv].size();
        }
    }

    return true;
}

void llama_qfilter::init(llama_context * lctx) {
    this->lctx = lctx;

    auto * sched = lctx->get_sched();

    const int n_backends = ggml_backend_sched_get_n_backends(sched);

    backend_cpu = ggml_backend_sched_get_backend(sched, n_backends - 1);

    for (int32_t ikv = 0; ikv < (int32_t) kv.layers.size(); ++ikv) {
        if (n_head_kv(ikv) == 0) {
            continue;
        }

        if (!ropes.empty()) {
            if (!ropes[ikv].init(lctx, kv.layers[ikv].il)) {
                throw std::runtime_error(format("qfilter: policy %s can't tell how RoPE turns the queries of layer %u: use another policy",
                            policy.name, kv.layers[ikv].il));
            }

            auto same = std::find_if(rope_ikvs.begin(), rope_ikvs.end(), [&](const auto & ikvs) { return ropes[ikvs[0]] == ropes[ikv]; });
            if (same == rope_ikvs.end()) {
                same = rope_ikvs.insert(same, { {} });
            }
            same->push_back(ikv);
        }

        auto * buffer = kv.layers[ikv].k->buffer;
        auto * dev    = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));

        // plain CPU buffers name no device
        ggml_backend_t backend = backend_cpu;
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
            w.by_group = true;
            w.n_layers = w.on_host ? LLAMA_QFILTER_MAX_LAYERS : kv.layers.size();
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

void llama_qfilter::set_n_threads() {
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_cpu));
    auto * fn  = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");

    if (fn) {
        fn(backend_cpu, lctx->n_threads());
    }
}

void llama_qfilter::parallel(size_t n, const std::function<void(size_t i, int ith)> & fn) {
    struct work {
        const std::function<void(size_t i, int ith)> & fn;

        const size_t n;

        std::atomic<size_t> next;
    } work = { fn, n, { 0 } };

    auto ctx = new_context(1);

    // a graph of one node has run in full even if it was aborted
    ggml_tensor * node = ggml_custom_4d(ctx.get(), GGML_TYPE_I32, 1, 1, 1, 1, nullptr, 0,
        [](ggml_tensor *, int ith, int, void * data) {
            auto & w = *(struct work *) data;

            for (size_t i = w.next++; i < w.n; i = w.next++) {
                w.fn(i, ith);
            }
        }, GGML_N_TASKS_MAX, &work);

    int32_t unused;
    node->data = &unused;

    auto * gf = ggml_new_graph_custom(ctx.get(), 1, false);
    ggml_build_forward_expand(gf, node);

    ggml_backend_graph_compute(backend_cpu, gf);
}

// ggml_gallocr_alloc_graph() alone places a graph as it did the one before if the sizes fit, but which nodes share memory
// depends on their order, and that on the number of rows
static bool llama_qfilter_alloc(ggml_gallocr_t galloc, ggml_cgraph * gf) {
    return ggml_gallocr_reserve(galloc, gf) && ggml_gallocr_alloc_graph(galloc, gf);
}

static const ggml_tensor * llama_qfilter_unsupported_op(ggml_backend_t backend, ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            return ggml_graph_node(gf, i);
        }
    }
    return nullptr;
}

void llama_qfilter::init_worker(worker & w) {
    if (policy.needs != LLAMA_QFILTER_NEEDS_NOTHING) {
        ggml_context_ptr ctx(ggml_init({ w.ikvs.size()*ggml_tensor_overhead(), nullptr, true }));

        for (const int32_t ikv : w.ikvs) {
            const int64_t n_embd_head = head_dim(kv.layers[ikv].k, ikv);
            const int64_t n_rep       = policy.needs == LLAMA_QFILTER_NEEDS_MOMENTS ? this->n_rep(ikv) : 1;

            filters_dev[ikv] = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, n_embd_head, n_rep, n_filter_rows(ikv)/n_rep, n_head_kv(ikv));
        }

        auto * buft = ggml_backend_buffer_get_type(kv.layers[w.ikvs[0]].k->buffer);

        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            throw std::runtime_error(format("qfilter: no memory for the filters on %s", ggml_backend_name(w.backend)));
        }

        for (const int32_t ikv : w.ikvs) {
            ggml_backend_tensor_set(filters_dev[ikv], filters[ikv].data(), 0, ggml_nbytes(filters_dev[ikv]));
        }

        ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    // the graphs at their largest: what can't run or doesn't fit shall say so now
    if (policy.score) {
        init_score(w);
    }
    if (!w.on_host) {
        init_gather(w);
    }
}

void llama_qfilter::init_score(worker & w) {
    const ggml_tensor * bad = nullptr;

    for (const bool by_group : { true, false }) {
        w.by_group = by_group;

        auto ctx = new_context(n_score_tensors(w));

        ggml_tensor * idx = nullptr;
        std::vector<ggml_tensor *> outs;
        auto * gf = build_score_graph(ctx.get(), w, 0, 0, n_cells, &idx, outs);

        bad = llama_qfilter_unsupported_op(w.backend, gf);
        if (!bad) {
            if (!ggml_gallocr_reserve(w.galloc.get(), gf)) {
                throw std::runtime_error(format("qfilter: no memory to score on %s", ggml_backend_name(w.backend)));
            }
            return;
        }
    }

    throw std::runtime_error(format("qfilter: %s can't score a %s cache (%s)", ggml_backend_name(w.backend),
                ggml_type_name(kv.type_k()), ggml_op_desc(bad)));
}

void llama_qfilter::init_gather(worker & w) {
    const char * name = ggml_backend_name(w.backend);

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
    auto * gf = build_gather_graph(ctx.get(), w, 0, n_cells, idxs);

    if (const auto * bad = llama_qfilter_unsupported_op(w.backend, gf)) {
        throw std::runtime_error(format("qfilter: %s can't move rows (%s)", name, ggml_op_desc(bad)));
    }
    if (!ggml_gallocr_reserve(w.galloc.get(), gf)) {
        throw std::runtime_error(format("qfilter: no memory to move rows on %s", name));
    }

    test_worker(w);
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

    if (llama_qfilter_alloc(w.galloc.get(), gf) && ggml_backend_graph_compute(w.backend, gf) == GGML_STATUS_SUCCESS) {
        ggml_backend_tensor_get(src, moved, 0, sizeof(moved));
    }

    for (int i = 0; i < 4; ++i) {
        if (memcmp(moved[i], rows[order[i]], sizeof(rows[0])) != 0) {
            throw std::runtime_error(format("qfilter: %s does not move rows bit by bit", ggml_backend_name(w.backend)));
        }
    }
}

//
// checks before a memory is changed
//

bool llama_qfilter::has(llama_seq_id seq_id) const {
    return seq_id >= 0 && (size_t) seq_id < streams.size();
}

bool llama_qfilter::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (seq_id >= 0 && !has(seq_id)) {
        return (size_t) seq_id < kv.seq_to_stream.size(); // no cells to remove
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

    for (size_t is = is0; is < is1; ++is) {
        const auto & cells = kv.v_cells[is];
        const auto & st    = get_stream(is);

        if (cells.get_used() == 0 || (p0 <= cells.seq_pos_min(is) && p1 > cells.seq_pos_max(is))) {
            continue; // the whole sequence
        }

        if (p0 < st.p1) {
            LLAMA_LOG_DEBUG("%s: seq %d: positions before %d are compacted, can't remove [%d, %d)\n", __func__, (int) is, st.p1, p0, p1);
            return false;
        }

        // to remove nothing at p0 is refused where removing from there on would be
        const bool is_cut = p0 <= cells.seq_pos_max(is) && (p1 > cells.seq_pos_max(is) || p0 == p1);

        // the next position would be one that was compacted
        const auto & sp = cells.seq_pos_get(is);
        const auto   it = std::find_if(sp.begin(), sp.end(), [&](const auto & cell) { return cell.first >= st.p0; });

        if (st.p1 > 0 && is_cut && (it == sp.end() || it->first >= p0)) {
            LLAMA_LOG_DEBUG("%s: seq %d: nothing after the sinks would be left, can't remove [%d, %d)\n", __func__, (int) is, p0, p1);
            return false;
        }

        // upstream refuses by itself what is not empty
        if (recr && is_cut && p0 == p1 && p0 <= recr->seq_pos_max(is)) {
            return false;
        }

        // a sequence that goes on at p0 sees what is in the window there
        if (kv_swa && is_cut) {
            const llama_pos pos_min = kv_swa->v_cells[is].seq_pos_min(is);

            if (pos_min > 0 && !llama_hparams::is_masked_swa(kv_swa->n_swa, kv_swa->swa_type, pos_min - 1, p0)) {
                LLAMA_LOG_DEBUG("%s: seq %d: positions before %d have left the windowed layers, can't remove [%d, %d)\n", __func__, (int) is, pos_min, p0, p1);
                return false;
            }
        }
    }

    return true;
}

bool llama_qfilter::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos & p0, llama_pos & p1) {
    if (!has(seq_id_src) || !has(seq_id_dst)) {
        LLAMA_LOG_ERROR("%s: no sequence %d or %d: raise n_seq_max\n", __func__, seq_id_src, seq_id_dst);
        return false;
    }

    if (seq_id_src == seq_id_dst) {
        return false; // nothing to do
    }

    const auto & cells = kv.v_cells[seq_id_src];

    if (cells.get_used() > 0 && (p0 > cells.seq_pos_min(seq_id_src) || (p1 >= 0 && p1 <= cells.seq_pos_max(seq_id_src)))) {
        LLAMA_LOG_ERROR("%s: a bounded cache copies whole sequences only, not [%d, %d)\n", __func__, p0, p1);
        return false;
    }

    p0 = -1;
    p1 = -1;

    streams[seq_id_dst] = get_stream(seq_id_src);

    return true;
}

//
// state
//

void llama_qfilter::clear(llama_seq_id seq_id) {
    if (seq_id < 0) {
        mem.clear(false); // recurrent parts have no sequence -1 to remove
    } else {
        mem.seq_rm(seq_id, -1, -1);
    }
}

void llama_qfilter::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    if (seq_id != -1 && !has(seq_id)) {
        throw std::runtime_error(format("no sequence %d", seq_id));
    }

    const uint32_t head[] = { LLAMA_QFILTER_STATE_MAGIC, LLAMA_QFILTER_STATE_VERSION, n_cells, n_keep, n_sink, n_window, (uint32_t) policy.policy, n_head_all };

    // copies of sequences that are still to be made
    lctx->memory_update(false);

    io.write(head, sizeof(head));
    io.write(&filters_hash, sizeof(filters_hash));

    const uint32_t is0 = seq_id < 0 ? 0              : seq_id;
    const uint32_t is1 = seq_id < 0 ? streams.size() : is0 + 1;
    const uint32_t ns  = is1 - is0;

    io.write(&ns, sizeof(ns));

    for (uint32_t is = is0; is < is1; ++is) {
        const auto & st = get_stream(is);

        io.write(&st.p0, sizeof(st.p0));
        io.write(&st.p1, sizeof(st.p1));
        io.write(&st.n,  sizeof(st.n));

        // upstream goes on from the first cell; windowed layers that go on from the same one compute the same to the bit
        const uint32_t swa[2] = { kv_swa ? kv_swa->v_cells[is].get_used() : 0, kv_swa ? kv_swa->v_heads[is] : 0 };
        io.write(swa, sizeof(swa));

        if (!st.pos.empty()) {
            io.write(st.pos.data(), st.pos.size()*sizeof(llama_pos));
        }
    }
}

void llama_qfilter::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
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

    // a sequence is the same in a cache of another size, but n_sink: the table of true positions starts after the sinks
    const bool resize = seq_id != -1 && (flags & LLAMA_QFILTER_STATE_SEQ_FLAGS_RESIZE);

    if (!resize && (head[2] != n_cells || head[3] != n_keep || head[5] != n_window)) {
        throw std::runtime_error(format("the state was saved with n_cells = %u, n_keep = %u, n_window = %u; this context has %u, %u, %u",
                    head[2], head[3], head[5], n_cells, n_keep, n_window));
    }
    if (head[7] != n_head_all || ns != (seq_id < 0 ? streams.size() : 1)) {
        throw std::runtime_error("the state was saved by another model or for another number of sequences");
    }

    staged.assign(ns, stream());

    for (auto & st : staged) {
        io.read(&st.p0, sizeof(st.p0));
        io.read(&st.p1, sizeof(st.p1));
        io.read(&st.n,  sizeof(st.n));

        uint32_t swa[2];
        io.read(swa, sizeof(swa));
        st.n_swa    = swa[0];
        st.head_swa = swa[1];

        if (st.n_swa > 0 && !kv_swa) {
            throw std::runtime_error("the state was saved by a model with windowed layers");
        }
        if (st.n > n_cells) {
            throw std::runtime_error(format("the state does not fit into %u cells", n_cells));
        }

        st.pos.resize((size_t) n_head_all*st.n);
        if (!st.pos.empty()) {
            io.read(st.pos.data(), st.pos.size()*sizeof(llama_pos));
        }

        // a sequence that lost nothing is the same whatever would have decided
        if (resize && st.p1 == 0) {
            continue;
        }
        if (head[4] != n_sink) {
            throw std::runtime_error(format("the state was saved with n_sink = %u; this context has %u", head[4], n_sink));
        }
        if (head[6] != (uint32_t) policy.policy || hash != filters_hash) {
            throw std::runtime_error("the state was saved with another policy or other filters");
        }
    }

    lctx->memory_update(false); // or they would be made later, over what is restored now

    // upstream leaves the old cells when the state has none
    clear(seq_id);
}

void llama_qfilter::state_apply(llama_seq_id seq_id) {
    const size_t is0 = seq_id < 0 ? 0 : seq_id;

    for (size_t i = 0; i < staged.size(); ++i) {
        const auto & st = staged[i];
        const auto & sp = kv.v_cells[is0 + i].seq_pos_get(is0 + i);

        const auto n = std::count_if(sp.begin(), sp.end(), [&](const auto & cell) { return cell.first >= st.p0 && cell.first < st.p1; });
        if (n != st.n) {
            clear(seq_id);
            throw std::runtime_error("the state is damaged");
        }
        if (kv.v_cells[is0 + i].get_used() > n_cells) {
            clear(seq_id);
            throw std::runtime_error(format("the state does not fit into %u cells", n_cells));
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

size_t llama_qfilter::n_score_tensors(const worker & w) const {
    return std::min<size_t>(w.n_layers, w.ikvs.size())*n_head_max*LLAMA_QFILTER_MAX_TENSORS;
}

// layers [i0, i0 + n_layers) of a worker
// idx:  input, [n_rows] I32, the cell of each rank
// outs: [n_rows, n_head] F32 for each group of heads
ggml_cgraph * llama_qfilter::build_score_graph(
        ggml_context * ctx, const worker & w, size_t i0, uint32_t is, uint32_t n_rows,
        ggml_tensor ** idx, std::vector<ggml_tensor *> & outs) const {
    auto * gf = ggml_new_graph_custom(ctx, n_score_tensors(w), false);

    *idx = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    ggml_set_input(*idx);

    for (size_t i = i0; i < std::min(i0 + w.n_layers, w.ikvs.size()); ++i) {
        const int32_t ikv = w.ikvs[i];

        ggml_tensor * f = filters_dev[ikv];

        const int64_t n_head  = n_head_kv(ikv);
        const int64_t n_group = n_head_group(w, ikv);

        for (int64_t ih = 0; ih < n_head; ih += n_group) {
            const int64_t n = std::min(n_group, n_head - ih);

            // always to F32: a product of two types would round the filters to the type of the cache
            const auto rows = [&](ggml_tensor * t) {
                const int64_t n_embd_head = head_dim(t, ikv);

                t = ggml_view_2d(ctx, t, n*n_embd_head, t->ne[1], t->nb[1], ggml_row_size(t->type, ih*n_embd_head));

                return ggml_reshape_3d(ctx, ggml_get_rows(ctx, t, *idx), n_embd_head, n, n_rows);
            };

            ggml_tensor * kg = rows(kv.layers[ikv].k_stream[is]);
            ggml_tensor * vg = rows(kv.layers[ikv].v_stream[is]);
            ggml_tensor * fg = f ? ggml_view_4d(ctx, f, f->ne[0], f->ne[1], f->ne[2], n, f->nb[1], f->nb[2], f->nb[3], ih*f->nb[3]) : nullptr;

            ggml_tensor * cur = policy.score(ctx, kg, vg, fg);

            ggml_set_output(cur);
            ggml_build_forward_expand(gf, cur);

            outs.push_back(cur);
        }
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

int32_t llama_qfilter::make_room(const llama_batch & batch) {
    if (!batch.token && kv.hparams.n_pos_per_embd() > 1) {
        LLAMA_LOG_ERROR("%s: a bounded cache takes text only: tokens of an image share a position\n", __func__);
        return -1;
    }

    std::vector<uint32_t> n_new(streams.size(), 0);

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (!has(batch.seq_id[i][0])) {
            continue; // upstream's to refuse
        }
        if (batch.pos[i] >= (llama_pos) n_ctx_seq) {
            LLAMA_LOG_WARN("%s: position %d is beyond the context of %u\n", __func__, batch.pos[i], n_ctx_seq);
            return 1; // eviction does not help
        }
        n_new[batch.seq_id[i][0]]++;
    }

    for (size_t is = 0; is < streams.size(); ++is) {
        const uint32_t n_used = kv.v_cells[is].get_used();

        if (n_used == 0) {
            streams[is] = stream();
        }
        if (streams[is].n_swa > 0 && kv_swa->v_cells[is].get_used() == streams[is].n_swa) {
            kv_swa->v_heads[is] = streams[is].head_swa % kv_swa->get_size();
        }
        streams[is].n_swa = 0;
        if (n_new[is] == 0 || n_used + n_new[is] <= n_cells) {
            continue;
        }
        if (n_keep + n_new[is] > n_cells) {
            LLAMA_LOG_WARN("%s: sequence %d: no room for %u tokens\n", __func__, (int) is, n_new[is]);
            return 1;
        }

        const int32_t ret = evict(is, n_keep);
        if (ret > 0 || ret < -1) {
            return ret;
        }
    }

    return 0;
}

int32_t llama_qfilter::compress(llama_seq_id seq_id, uint32_t n_keep) {
    if (!has(seq_id)) {
        LLAMA_LOG_ERROR("%s: no sequence %d\n", __func__, seq_id);
        return -1;
    }
    if (n_keep < n_keep_min()) {
        LLAMA_LOG_ERROR("%s: n_keep (%u) must be at least n_sink (%u) + n_window (%u, at least 1)\n", __func__, n_keep, n_sink, n_window);
        return -1;
    }

    lctx->memory_update(false); // pending copies

    const int32_t ret = evict(seq_id, n_keep);

    return ret == -1 ? 1 : ret == 2 ? -1 : ret;
}

int32_t llama_qfilter::evict(llama_seq_id seq_id, uint32_t n_keep) {
    eviction ev;

    ev.seq_id = seq_id;
    ev.n_keep = n_keep;
    ev.n_best = n_keep - n_sink - n_window;

    for (const auto & it : kv.v_cells[seq_id].seq_pos_get(seq_id)) {
        ev.order.push_back(it.second);
    }

    if (ev.order.size() <= n_keep) {
        return -1;
    }

    ev.best.resize((size_t) n_head_all*ev.n_best);

    ggml_backend_sched_synchronize(lctx->get_sched());

    set_n_threads();

    const int64_t t_start = ggml_time_us();

    if (!turn_filters(kv.v_cells[seq_id].seq_pos_max(seq_id) + 1)) {
        LLAMA_LOG_ERROR("%s: failed to turn the queries\n", __func__);
        return -2;
    }

    // score and select; only reads, so it may be aborted

    int64_t t_select = 0;

    for (auto & w : workers) {
        for (size_t i0 = 0; i0 < w.ikvs.size(); i0 += w.n_layers) {
            if (policy.score) {
                const int32_t ret = score_layers(w, i0, ev);
                if (ret != 0) {
                    return ret;
                }
            } else {
                score_by_pos(w, i0, ev);
            }

            const int64_t t0 = ggml_time_us();
            select_layers(w, i0, ev);
            t_select += ggml_time_us() - t0;
        }
    }

    const int64_t t_scored = ggml_time_us();

    // move

    for (auto & w : workers) {
        if (w.on_host) {
            gather_host(w, ev);
        } else if (!gather_graph(w, ev)) {
            LLAMA_LOG_ERROR("%s: failed to move rows, sequence %d is cleared\n", __func__, seq_id);
            clear(seq_id);
            return -3;
        }

        for (const int32_t ikv : w.ikvs) {
            stats.n_bytes_moved += n_keep*(kv.layers[ikv].k->nb[1] + kv.layers[ikv].v->nb[1]);
        }
    }

    update_cells(ev);

    stats.n_evictions += 1;
    stats.n_dropped   += ev.order.size() - n_keep;
    stats.t_score_us  += t_scored - t_start - t_select;
    stats.t_select_us += t_select;
    stats.t_gather_us += ggml_time_us() - t_scored;

    return 0;
}

// fills scores: [n_head, n] by rank, for the heads of layers [i0, i0 + n_layers) one after the other
// returns what llama_decode shall return
int32_t llama_qfilter::score_layers(worker & w, size_t i0, const eviction & ev) {
    const uint32_t n = ev.order.size();

    auto ctx = new_context(n_score_tensors(w));

    ggml_tensor * idx = nullptr;
    std::vector<ggml_tensor *> outs;
    auto * gf = build_score_graph(ctx.get(), w, i0, ev.seq_id, n, &idx, outs);

    if (!llama_qfilter_alloc(w.galloc.get(), gf)) {
        LLAMA_LOG_ERROR("%s: failed to allocate the scores\n", __func__);
        return -2;
    }

    ggml_backend_tensor_set(idx, ev.order.data(), 0, ggml_nbytes(idx));

    const auto status = ggml_backend_graph_compute(w.backend, gf);
    if (status == GGML_STATUS_ABORTED) {
        return 2;
    }
    if (status != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to compute the scores: %d\n", __func__, status);
        return -3;
    }

    scores.clear();
    for (auto * out : outs) {
        scores.resize(scores.size() + ggml_nelements(out));
        ggml_backend_tensor_get(out, scores.data() + scores.size() - ggml_nelements(out), 0, ggml_nbytes(out));
    }

    return 0;
}

// the same for a policy that looks at positions
void llama_qfilter::score_by_pos(worker & w, size_t i0, const eviction & ev) {
    const auto & st = get_stream(ev.seq_id);

    const uint32_t n  = ev.order.size();
    const uint32_t r0 = rank_p0(ev, st);

    scores.clear();

    for (size_t i = i0; i < std::min(i0 + w.n_layers, w.ikvs.size()); ++i) {
        const int32_t ikv = w.ikvs[i];

        for (uint32_t ih = 0; ih < n_head_kv(ikv); ++ih) {
            for (uint32_t r = 0; r < n; ++r) {
                scores.push_back(policy.score_pos(seed, kv.layers[ikv].il, ih, true_pos(ev, st, r0, head_offs[ikv] + ih, r)));
            }
        }
    }
}

// from scores to ev.best
void llama_qfilter::select_layers(worker & w, size_t i0, eviction & ev) {
    const uint32_t n      = ev.order.size();
    const uint32_t n_cand = n - n_sink - n_window; // ranks [n_sink, n - n_window)

    struct cand {
        float    score;
        uint32_t rank;
    };

    std::vector<uint32_t> heads; // in stream::pos
    for (size_t i = i0; i < std::min(i0 + w.n_layers, w.ikvs.size()); ++i) {
        for (uint32_t ih = 0; ih < n_head_kv(w.ikvs[i]); ++ih) {
            heads.push_back(head_offs[w.ikvs[i]] + ih);
        }
    }

    std::vector<cand> cands_all((size_t) lctx->n_threads()*n_cand);

    const uint64_t n_bytes = ev.best.size()*sizeof(uint32_t) + ev.order.size()*sizeof(uint32_t) + cands_all.size()*sizeof(cand);
    stats.n_bytes_scratch = std::max(stats.n_bytes_scratch, n_bytes);

    parallel(heads.size(), [&](size_t i, int ith) {
        const float * s = scores.data() + i*n + n_sink;

        auto * cands = cands_all.data()  + (size_t) ith*n_cand;
        auto * best  = ev.best.data() + (size_t) heads[i]*ev.n_best;

        for (uint32_t r = 0; r < n_cand; ++r) {
            cands[r] = { std::isnan(s[r]) ? -INFINITY : s[r], n_sink + r };
        }

        // ties: the newest wins
        std::nth_element(cands, cands + ev.n_best, cands + n_cand, [](const cand & a, const cand & b) {
            return a.score > b.score || (a.score == b.score && a.rank > b.rank);
        });

        for (uint32_t r = 0; r < ev.n_best; ++r) {
            best[r] = cands[r].rank;
        }
        std::sort(best, best + ev.n_best);
    });
}

// the rank of the i-th row that stays
uint32_t llama_qfilter::rank_of(const eviction & ev, uint32_t ih_all, uint32_t i) const {
    if (i < n_sink) {
        return i;
    }
    if (i < n_sink + ev.n_best) {
        return ev.best[(size_t) ih_all*ev.n_best + i - n_sink];
    }
    return ev.order.size() - ev.n_keep + i;
}

void llama_qfilter::gather_host(const worker & w, const eviction & ev) {
    // as long as no cell is before the place of its rank, rows are read before their place is written
    const bool in_place = std::is_sorted(ev.order.begin(), ev.order.end());

    const auto gather = [&](size_t i, uint8_t * buf) {
        const int32_t ikv   = w.ikvs[i/2];
        const auto &  layer = kv.layers[ikv];

        gather_rows(i % 2 == 0 ? layer.k_stream[ev.seq_id] : layer.v_stream[ev.seq_id], ikv, ev, buf);
    };

    if (in_place) {
        parallel(2*w.ikvs.size(), [&](size_t i, int) { gather(i, nullptr); });
        return;
    }

    for (size_t i = 0; i < 2*w.ikvs.size(); ++i) {
        const auto & layer = kv.layers[w.ikvs[i/2]];

        copy_buf.resize(ev.n_keep*std::max(layer.k->nb[1], layer.v->nb[1]));
        gather(i, copy_buf.data());
    }
}

// buf: nullptr, or room for the rows that stay
void llama_qfilter::gather_rows(ggml_tensor * t, int32_t ikv, const eviction & ev, uint8_t * buf) const {
    const size_t row_size = ggml_row_size(t->type, head_dim(t, ikv));

    uint8_t * data = (uint8_t *) t->data;
    uint8_t * dst  = buf ? buf : data;

    for (uint32_t i = 0; i < ev.n_keep; ++i) {
        for (uint32_t ih = 0; ih < n_head_kv(ikv); ++ih) {
            const uint32_t cell = ev.order[rank_of(ev, head_offs[ikv] + ih, i)];

            if (buf || cell != i) {
                memcpy(dst + i*t->nb[1] + ih*row_size, data + cell*t->nb[1] + ih*row_size, row_size);
            }
        }
    }

    if (buf) {
        memcpy(data, buf, ev.n_keep*t->nb[1]);
    }
}

bool llama_qfilter::gather_graph(worker & w, const eviction & ev) {
    auto ctx = new_context(w.ikvs.size()*LLAMA_QFILTER_MAX_TENSORS);

    std::vector<ggml_tensor *> idxs;
    auto * gf = build_gather_graph(ctx.get(), w, ev.seq_id, ev.n_keep, idxs);

    if (!llama_qfilter_alloc(w.galloc.get(), gf)) {
        return false;
    }

    std::vector<int32_t> data;

    for (size_t i = 0; i < w.ikvs.size(); ++i) {
        const int32_t ikv = w.ikvs[i];

        data.clear();
        for (uint32_t r = 0; r < ev.n_keep; ++r) {
            for (uint32_t ih = 0; ih < n_head_kv(ikv); ++ih) {
                data.push_back(ev.order[rank_of(ev, head_offs[ikv] + ih, r)]*n_head_kv(ikv) + ih);
            }
        }
        ggml_backend_tensor_set(idxs[i], data.data(), 0, ggml_nbytes(idxs[i]));
    }

    return ggml_backend_graph_compute(w.backend, gf) == GGML_STATUS_SUCCESS;
}

// the first rank of the rows that an earlier eviction left
uint32_t llama_qfilter::rank_p0(const eviction & ev, const stream & st) const {
    const auto & cells = kv.v_cells[ev.seq_id];

    uint32_t r0 = 0;
    while (r0 < ev.order.size() && cells.pos_get(ev.order[r0]) < st.p0) {
        r0++;
    }

    return r0;
}

llama_pos llama_qfilter::true_pos(const eviction & ev, const stream & st, uint32_t r0, uint32_t ih_all, uint32_t rank) const {
    const llama_pos pos = kv.v_cells[ev.seq_id].pos_get(ev.order[rank]);

    return pos < st.p0 || pos >= st.p1 ? pos : st.pos[(size_t) ih_all*st.n + rank - r0];
}

void llama_qfilter::update_cells(const eviction & ev) {
    auto & cells = kv.v_cells[ev.seq_id];
    auto & st    = streams[ev.seq_id];

    const uint32_t n = ev.order.size();

    const auto pos_of = [&](uint32_t rank) { return cells.pos_get(ev.order[rank]); };

    const uint32_t r0 = rank_p0(ev, st);

    // after a cut, the window may reach into the rows that an earlier eviction left: they stay in the table
    uint32_t n_tab = ev.n_best;
    while (n_sink + n_tab < ev.n_keep && pos_of(n - ev.n_keep + n_sink + n_tab) < st.p1) {
        n_tab++;
    }

    stream st_new;

    st_new.p0 = pos_of(n_sink);
    st_new.p1 = std::max(st.p1, pos_of(n - n_window - 1) + 1);
    st_new.n  = n_tab;
    st_new.pos.resize((size_t) n_head_all*n_tab);

    for (uint32_t ih = 0; ih < n_head_all; ++ih) {
        for (uint32_t i = 0; i < n_tab; ++i) {
            st_new.pos[(size_t) ih*n_tab + i] = true_pos(ev, st, r0, ih, rank_of(ev, ih, n_sink + i));
        }
    }

    // the cells look as if the newest candidates had been kept
    std::vector<uint32_t> src;
    std::vector<uint32_t> dst;

    for (uint32_t i = 0; i < ev.n_keep; ++i) {
        src.push_back(ev.order[i < n_sink ? i : n - ev.n_keep + i]);
        dst.push_back(i);
    }

    const auto cells_new = cells.cp(src);

    for (const uint32_t i : ev.order) {
        cells.rm(i);
    }
    cells.set(dst, cells_new);

    kv.v_heads[ev.seq_id] = ev.n_keep;

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

    const auto & st = get_stream(seq_id);

    const llama_pos * pos_true = st.pos.data() + (size_t) (head_offs[it->second] + ih)*st.n;

    size_t n = 0;

    for (const auto & cell : kv.get_cells(seq_id).seq_pos_get(seq_id)) {
        const llama_pos pos = cell.first >= st.p0 && cell.first < st.p1 ? *pos_true++ : cell.first;

        if (n < capacity) {
            out[n] = pos;
        }
        n++;
    }

    return n;
}

size_t llama_qfilter::rows(llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) const {
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

    for (const auto & [_, n_bytes] : mem.memory_breakdown()) {
        res.n_bytes_kv += n_bytes;
    }

    const uint64_t n_bytes_cells = kv.total_size();

    res.n_bytes_kv_full = res.n_bytes_kv - n_bytes_cells + n_bytes_cells/kv.get_size()*n_ctx_seq;

    res.n_bytes_scratch += scores.capacity()*sizeof(float) + copy_buf.capacity() + ctx_mem.capacity();
    for (const auto & w : workers) {
        res.n_bytes_scratch += ggml_gallocr_get_buffer_size(w.galloc.get(), 0);
    }
}
