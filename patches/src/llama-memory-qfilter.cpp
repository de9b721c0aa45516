#include "llama-memory-qfilter.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

// the number of allocated cells is a multiple of the padding of llama_kv_cache::get_n_kv()
static const uint32_t LLAMA_QFILTER_PAD = 256;

//
// the parts of a memory
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

// the KV cache that grows with the context; nullptr: there is none, or its kind can't be bounded
static llama_kv_cache * llama_qfilter_cache_of(llama_memory_i * mem) {
    if (auto * iswa = llama_qfilter_iswa_of(mem)) {
        return iswa->get_base();
    }

    auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem);
    if (hybrid && !dynamic_cast<llama_memory_hybrid_idx *>(mem)) {
        return hybrid->get_mem_attn();
    }

    return dynamic_cast<llama_kv_cache *>(mem);
}

llama_memory_qfilter * llama_memory_qfilter_of(llama_memory_t mem) {
    return dynamic_cast<llama_memory_qfilter *>(mem);
}

static const llama_qfilter_policy_info & llama_qfilter_policy_get(int32_t policy) {
    const auto * info = llama_qfilter_policy_find(policy);
    if (!info) {
        throw std::runtime_error(format("unknown policy %d", policy));
    }
    return *info;
}

//
// llama_memory_qfilter
//

std::unique_ptr<llama_memory_i> llama_memory_qfilter::create(
        const llama_model         & model,
        const llama_memory_params & params_mem_in,
        const llama_cparams       & cparams_in,
              uint32_t              n_cells) {
    llama_memory_params params_mem = params_mem_in;
    llama_cparams       cparams    = cparams_in;

    if (n_cells == 0) {
        throw std::runtime_error("n_cells is 0");
    }

    const uint32_t n_ctx_seq = cparams_in.n_ctx_seq;
    const uint32_t n_alloc   = std::min<uint32_t>(GGML_PAD(std::min(n_cells, n_ctx_seq), LLAMA_QFILTER_PAD), n_ctx_seq);

    cparams.n_ctx_seq = n_alloc;

    // with swa_full, upstream would make the windowed part as large as the other one; it never makes it larger
    params_mem.swa_full = false;

    if (model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        const uint32_t n_alloc_swa = GGML_PAD(model.hparams.n_swa + cparams.n_ubatch, LLAMA_QFILTER_PAD);

        cparams.n_ctx_seq = std::min(std::max(n_alloc, n_alloc_swa), n_ctx_seq);
    }

    std::unique_ptr<llama_memory_i> mem(model.create_memory(params_mem, cparams));

    auto * kv = llama_qfilter_cache_of(mem.get());
    if (!kv || kv->layers.empty()) {
        throw std::runtime_error(format("the cache of %s models can't be bounded", model.arch_name().c_str()));
    }
    if (kv->v_trans) {
        throw std::runtime_error("Flash Attention is off for this model: the V cache is stored transposed");
    }

    auto * iswa = llama_qfilter_iswa_of(mem.get());
    if (iswa && kv->get_size() > n_alloc) {
        // the window needs more cells than the bound allows: make the other cache again, with fewer cells
        std::map<int32_t, int32_t> ils; // layer -> layer whose cells it uses
        for (const auto & [il, ikv] : kv->map_layer_ids) {
            ils[il] = kv->layers[ikv].il;
        }

        iswa->kv_base.reset();
        iswa->kv_base = std::make_unique<llama_kv_cache>(
                model, model.hparams, params_mem.type_k, params_mem.type_v,
                false, cparams.offload_kqv, cparams.kv_unified, n_alloc, cparams.n_seq_max, 1,
                0, LLAMA_SWA_TYPE_NONE, nullptr,
                [&](int32_t il) { return ils.count(il) > 0; },
                [&](int32_t il) { return ils.count(il) > 0 && ils[il] != il ? ils[il] : -1; },
                nullptr);
    }

    return mem;
}

llama_memory_qfilter::llama_memory_qfilter(
        const llama_model          & model,
        const llama_memory_params  & params_mem,
        const llama_cparams        & cparams,
        const llama_qfilter_params & params) :
    mem(create(model, params_mem, cparams, params.n_cells)), kv(*llama_qfilter_cache_of(mem.get())),
    kv_swa(llama_qfilter_iswa_of(mem.get()) ? llama_qfilter_iswa_of(mem.get())->get_swa() : nullptr),
    recr(llama_qfilter_recr_of(mem.get())),
    n_ctx_seq(cparams.n_ctx_seq),
    n_cells(std::min(params.n_cells, cparams.n_ctx_seq)), n_keep(params.n_keep), n_sink(params.n_sink), n_window(params.n_window),
    flags(params.flags), seed(params.seed), policy(llama_qfilter_policy_get(params.policy)) {

    if (n_cells < n_ctx_seq) {
        if (n_keep >= n_cells || n_keep < n_keep_min(n_sink, n_window)) {
            throw std::runtime_error(format("n_keep (%u) must be at least n_sink (%u) + n_window (%u, at least 1) and less than n_cells (%u)",
                        n_keep, n_sink, n_window, n_cells));
        }

        if (cparams.n_batch > n_cells - n_keep) {
            throw std::runtime_error(format("n_batch (%u) must be at most n_cells - n_keep (%u)", cparams.n_batch, n_cells - n_keep));
        }
    }

    for (const auto & layer : kv.layers) {
        const uint32_t n_head = kv.hparams.n_head_kv(layer.il);

        if (n_head == 0) {
            continue; // no attention in this layer
        }

        layers.push_back({
            /*.il       =*/ (int32_t) layer.il,
            /*.n_head   =*/ n_head,
            /*.n_rep    =*/ kv.hparams.n_head(layer.il)/n_head,
            /*.head0    =*/ n_head_all,
            /*.n_embd_k =*/ (uint32_t) layer.k->ne[0]/n_head,
            /*.n_embd_v =*/ (uint32_t) layer.v->ne[0]/n_head,
            /*.k        =*/ layer.k_stream,
            /*.v        =*/ layer.v_stream,
        });
        n_head_all += n_head;
    }

    streams.resize(kv.n_stream);

    init_archive(params);

    llama_qfilter_rotation rotation;
    llama_qfilter_rotation rotation_v;

    if (kv.attn_rot_k) {
        rotation.n_rot = 64;
        while (kv.n_embd_head_k_all % (2*rotation.n_rot) == 0) {
            rotation.n_rot *= 2;
        }
        rotation.matrix = &kv.attn_rot_hadamard.at(rotation.n_rot);
    }
    if (kv.attn_rot_v) {
        rotation_v.n_rot  = 64;
        rotation_v.matrix = &kv.attn_rot_hadamard.at(rotation_v.n_rot);
    }

    vectors.load(policy, params, layers, rotation);

    if (policy.learned) {
        learned.load(params, layers, rotation, rotation_v);
    }
}

llama_memory_qfilter::~llama_memory_qfilter() = default;

void llama_memory_qfilter::init(llama_context * lctx) {
    this->lctx = lctx;

    auto * sched = lctx->get_sched();

    const int n_backends = ggml_backend_sched_get_n_backends(sched);

    threads.backend = ggml_backend_sched_get_backend(sched, n_backends - 1); // the CPU
    threads.update(lctx);

    vectors.init_ropes(lctx, layers);

    if (!vectors.empty()) {
        // the vectors lie on the device of the keys
        for (auto & layer : layers) {
            ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));

            int64_t ne[4];
            vectors.shape(layer, ne);

            layer.vectors = ggml_new_tensor(ctx.get(), GGML_TYPE_F32, 4, ne);

            ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(layer.k[0]->buffer)));
            if (!buf) {
                throw std::runtime_error(format("no memory for the vectors of layer %d", layer.il));
            }
            ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
        }

        vectors.set(layers, 0);
    }

    for (const auto & layer : layers) {
        auto * buffer = layer.k[0]->buffer;
        auto * dev    = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));

        // plain CPU buffers have no device
        ggml_backend_t backend = threads.backend;
        for (int i = 0; i < n_backends; ++i) {
            if (dev && ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i)) == dev) {
                backend = ggml_backend_sched_get_backend(sched, i);
                break;
            }
        }

        auto it = std::find_if(workers.begin(), workers.end(), [&](const auto & w) { return w->backend == backend; });
        if (it == workers.end()) {
            workers.push_back(is_on_host(layer) ?
                    llama_qfilter_worker::on_host(backend, policy, threads) :
                    llama_qfilter_worker::on_device(backend, policy, threads));
            it = workers.end() - 1;
        }

        (*it)->layers.push_back(layer);
    }

    for (auto & w : workers) {
        w->init(n_cells);
    }

    if (!learned.empty()) {
        learned.init(lctx);

        for (auto & w : workers) {
            learned.check(w->backend, learned_rows(*w, 0), std::min(n_cells, llama_qfilter_learned::n_rows_max));
        }
    }

    init_scorers();
}

//
// llama_memory_i
//

llama_memory_context_ptr llama_memory_qfilter::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    llama_qfilter_set_error("");

    try {
        note_question(balloc.get_batch());

        error = make_room(balloc.get_batch());

        if (error == 0) {
            note_tokens(balloc.get_batch());
        }
    } catch (const std::exception & err) {
        llama_qfilter_note_error(err.what());
        error = LLAMA_QFILTER_NO_MEM;
    }

    return error == 0 ? mem->init_batch(balloc, n_ubatch, embd_all) : nullptr;
}

llama_memory_context_ptr llama_memory_qfilter::init_full() {
    return mem->init_full();
}

llama_memory_context_ptr llama_memory_qfilter::init_update(llama_context * lctx, bool optimize) {
    return mem->init_update(lctx, optimize);
}

bool llama_memory_qfilter::get_can_shift() const {
    return false;
}

void llama_memory_qfilter::clear(bool data) {
    note_begun();

    mem->clear(data);

    forget_empty();
}

bool llama_memory_qfilter::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (can_rm(seq_id, p0, p1)) {
        note_begun();

        if (!mem->seq_rm(seq_id, p0, p1)) {
            return false;
        }
        for (size_t is = std::max(seq_id, 0); is < (seq_id < 0 ? streams.size() : std::min<size_t>(seq_id + 1, streams.size())); ++is) {
            streams[is].archive.rm(std::max(p0, 0), p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1);
        }
        forget_empty();
        return true;
    }

    // not possible in the cells alone: fill them from the archive
    if (seq_id == -1 && streams.size() == 1) {
        seq_id = 0;
    }

    return seq_id >= 0 && (size_t) seq_id < streams.size() && p0 > 0 && (p1 < 0 || p1 > kv.seq_pos_max(seq_id)) &&
        can_fill(seq_id, p0, archive_begin(seq_id), false) && rewind(seq_id, p0);
}

void llama_memory_qfilter::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (!has(seq_id_src) || !has(seq_id_dst)) {
        return;
    }
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const auto & cells = kv.v_cells[seq_id_src];

    if (cells.get_used() > 0 && (p0 > cells.seq_pos_min(seq_id_src) || (p1 >= 0 && p1 <= cells.seq_pos_max(seq_id_src)))) {
        llama_qfilter_note_error(format("a bounded cache copies whole sequences only, not [%d, %d)", p0, p1));
        return;
    }

    streams[seq_id_dst] = get_stream(seq_id_src);

    streams[seq_id_dst].n_evictions = 0;
    streams[seq_id_dst].n_dropped   = 0;
    streams[seq_id_dst].recalled.clear();

    mem->seq_cp(seq_id_src, seq_id_dst, -1, -1);
}

void llama_memory_qfilter::seq_keep(llama_seq_id seq_id) {
    if (!has(seq_id)) {
        return;
    }

    note_begun();

    mem->seq_keep(seq_id);

    forget_empty();
}

void llama_memory_qfilter::seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos) {
    llama_qfilter_note_error("positions of a bounded cache can't be changed");
}

void llama_memory_qfilter::seq_div(llama_seq_id, llama_pos, llama_pos, int) {
    llama_qfilter_note_error("positions of a bounded cache can't be changed");
}

llama_pos llama_memory_qfilter::seq_pos_min(llama_seq_id seq_id) const {
    return mem->seq_pos_min(seq_id);
}

llama_pos llama_memory_qfilter::seq_pos_max(llama_seq_id seq_id) const {
    return mem->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_memory_qfilter::memory_breakdown() const {
    return mem->memory_breakdown();
}

//
// what may be changed
//

uint32_t llama_memory_qfilter::n_first(llama_seq_id seq_id) const {
    return std::max(n_sink, streams[seq_id].n_first);
}

uint64_t llama_memory_qfilter::n_keep_min(uint32_t n_first, uint32_t n_window) {
    return (uint64_t) n_first + std::max(1u, n_window); // the newest position has to stay: the next batch follows it
}

bool llama_memory_qfilter::has(llama_seq_id seq_id) const {
    if (seq_id >= 0 && (size_t) seq_id < streams.size()) {
        return true;
    }

    llama_qfilter_set_error(format("no sequence %d: n_seq_max is %zu", seq_id, streams.size()));
    return false;
}

llama_qfilter_order llama_memory_qfilter::order_of(llama_seq_id seq_id) const {
    return llama_qfilter_order(kv.v_cells[seq_id].seq_pos_get(seq_id));
}

const llama_qfilter_layer * llama_memory_qfilter::find_layer(int32_t il) const {
    const auto it = std::find_if(layers.begin(), layers.end(), [&](const auto & l) { return l.il == il; });

    return it == layers.end() ? nullptr : &*it;
}

bool llama_memory_qfilter::is_on_host(const llama_qfilter_layer & layer) const {
    return ggml_backend_buffer_is_host(layer.k[0]->buffer) && !(flags & LLAMA_QFILTER_FLAG_GRAPH_GATHER);
}

const llama_memory_qfilter::stream & llama_memory_qfilter::get_stream(llama_seq_id seq_id) const {
    static const stream none;

    return kv.v_cells[seq_id].get_used() == 0 ? none : streams[seq_id];
}

bool llama_memory_qfilter::can_cut(llama_seq_id seq_id, llama_pos p0) const {
    const auto & cells = kv.v_cells[seq_id];
    const auto & table = get_stream(seq_id).table;

    if (p0 > cells.seq_pos_max(seq_id)) {
        return true; // nothing to cut
    }

    if (p0 < table.p1) {
        LLAMA_LOG_DEBUG("%s: seq %d: positions before %d are compacted, can't cut at %d\n", __func__, seq_id, table.p1, p0);
        return false;
    }

    if (table.p1 > 0) {
        // a row after the sinks has to be left, or the sequence would go on at a compacted position
        const auto & sp = cells.seq_pos_get(seq_id);
        const auto   it = sp.lower_bound({ table.p0, 0 });

        if (it == sp.end() || it->first >= p0) {
            LLAMA_LOG_DEBUG("%s: seq %d: nothing after the sinks would be left, can't cut at %d\n", __func__, seq_id, p0);
            return false;
        }
    }

    return can_cut_window(seq_id, p0);
}

bool llama_memory_qfilter::can_cut_window(llama_seq_id seq_id, llama_pos p0) const {
    const llama_pos pos_min = kv_swa ? kv_swa->v_cells[seq_id].seq_pos_min(seq_id) : 0;

    if (pos_min > 0 && !llama_hparams::is_masked_swa(kv_swa->n_swa, kv_swa->swa_type, pos_min - 1, p0)) {
        LLAMA_LOG_DEBUG("%s: seq %d: positions before %d have left the windowed layers, can't cut at %d\n", __func__, seq_id, pos_min, p0);
        return false;
    }

    return true;
}

bool llama_memory_qfilter::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (seq_id >= (llama_seq_id) streams.size()) {
        return (size_t) seq_id < kv.seq_to_stream.size(); // no cells to remove
    }
    if (seq_id < -1) {
        return false;
    }

    p0 = p0 < 0 ? 0 : p0;
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    // every sequence has a stream of its own; -1 matches all of them
    const size_t is0 = seq_id < 0 ? 0              : seq_id;
    const size_t is1 = seq_id < 0 ? streams.size() : is0 + 1;

    for (size_t is = is0; is < is1; ++is) {
        const auto & cells = kv.v_cells[is];

        const auto & table = get_stream(is).table;

        // without sinks the first cell is compacted: its position is not the first one of the sequence
        const llama_pos pos_min = table.p1 > 0 && table.p0 <= cells.seq_pos_min(is) ? 0 : cells.seq_pos_min(is);

        if (cells.get_used() == 0 || p0 >= p1 || (p0 <= pos_min && p1 > cells.seq_pos_max(is))) {
            continue; // nothing to remove, or the whole sequence
        }
        if (p0 < table.p1 || (p1 > cells.seq_pos_max(is) && !can_cut(is, p0))) {
            return false;
        }
    }

    return true;
}
