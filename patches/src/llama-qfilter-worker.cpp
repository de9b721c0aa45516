#include "llama-qfilter-worker.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <stdexcept>

// graph nodes and leaves per group of heads, at most
static const size_t LLAMA_QFILTER_MAX_TENSORS = 96;

// pieces that each row of a layer is moved in: one per head, or the whole row if all heads keep the same rows
static uint32_t llama_qfilter_n_moved(const llama_qfilter_layer & layer, bool same) {
    return same ? 1 : layer.n_head;
}

//
// llama_qfilter_threads
//

void llama_qfilter_threads::update(const llama_context * lctx) {
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto * fn  = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");

    n = lctx->n_threads() > 0 ? lctx->n_threads() : GGML_DEFAULT_N_THREADS; // as upstream's graphs

    if (fn) {
        fn(backend, n);
    }
}

bool llama_qfilter_threads::run(size_t n_tasks, const std::function<void(size_t i, int ith)> & fn) const {
    struct work {
        const std::function<void(size_t i, int ith)> & fn;

        const size_t n;

        std::atomic<size_t> next;
        std::atomic<size_t> n_done;
    } work = { fn, n_tasks, { 0 }, { 0 } };

    llama_qfilter_graph graph;

    auto * ctx = graph.start(1);

    ggml_tensor * node = ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1, nullptr, 0,
        [](ggml_tensor *, int ith, int, void * data) {
            auto & w = *(struct work *) data;

            for (size_t i = w.next++; i < w.n; i = w.next++) {
                w.fn(i, ith);
                w.n_done++;
            }
        }, GGML_N_TASKS_MAX, &work);

    int32_t unused;
    node->data = &unused;

    ggml_build_forward_expand(graph.gf, node);

    // a graph of one node runs to its end even if it is aborted: so count the tasks, and ignore the status
    ggml_backend_graph_compute(backend, graph.gf);

    return work.n_done == n_tasks;
}

//
// llama_qfilter_graph
//

ggml_context * llama_qfilter_graph::start(size_t n_tensors) {
    inputs.clear();
    outputs.clear();

    ctx.reset();

    mem.resize(std::max(mem.size(), n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false)));

    ctx.reset(ggml_init({
        /*.mem_size   =*/ mem.size(),
        /*.mem_buffer =*/ mem.data(),
        /*.no_alloc   =*/ true,
    }));

    gf = ggml_new_graph_custom(ctx.get(), n_tensors, false);

    return ctx.get();
}

const ggml_tensor * llama_qfilter_graph::unsupported(ggml_backend_t backend) const {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            return ggml_graph_node(gf, i);
        }
    }
    return nullptr;
}

uint64_t llama_qfilter_graph::n_nodes() const {
    uint64_t n = 0;

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        switch (ggml_graph_node(gf, i)->op) {
            case GGML_OP_NONE:
            case GGML_OP_RESHAPE:
            case GGML_OP_VIEW:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE: break;
            default:                n++;
        }
    }
    return n;
}

bool llama_qfilter_graph::alloc(ggml_gallocr_t galloc) {
    return ggml_gallocr_reserve(galloc, gf) && ggml_gallocr_alloc_graph(galloc, gf);
}

llama_qfilter_result llama_qfilter_graph::scores(ggml_backend_t backend, std::vector<float> & out) {
    const auto status = ggml_backend_graph_compute(backend, gf);
    if (status == GGML_STATUS_ABORTED) {
        return LLAMA_QFILTER_ABORTED;
    }
    if (status != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to compute the scores: %d\n", __func__, status);
        return LLAMA_QFILTER_FAILED;
    }

    out.clear();
    for (auto * t : outputs) {
        out.resize(out.size() + ggml_nelements(t));
        ggml_backend_tensor_get(t, out.data() + out.size() - ggml_nelements(t), 0, ggml_nbytes(t));
    }

    return LLAMA_QFILTER_DONE;
}

//
// llama_qfilter_worker
//

llama_qfilter_worker::llama_qfilter_worker(
        ggml_backend_t backend, const llama_qfilter_policy_info & policy, const llama_qfilter_threads & threads) :
    backend(backend), galloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend))), policy(policy), threads(threads) {
}

size_t llama_qfilter_worker::n_bytes() const {
    return graph.n_bytes() + ggml_gallocr_get_buffer_size(galloc.get(), 0);
}

// for layers [i0, i0 + n_layers_at_once())
// input:  [n_rows] I32, the cell of each rank
// output: [n_rows, n_head, n_parts] F32 for each layer
void llama_qfilter_worker::build_score(size_t i0, uint32_t is, uint32_t n_rows) {
    const size_t i1 = std::min(i0 + n_layers_at_once(), layers.size());

    size_t n_head_sum = 0;
    for (size_t i = i0; i < i1; ++i) {
        n_head_sum += layers[i].n_head;
    }

    auto * ctx = graph.start(n_head_sum*LLAMA_QFILTER_MAX_TENSORS);

    ggml_tensor * idx = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    ggml_set_input(idx);

    graph.inputs.push_back(idx);

    ggml_tensor * out = nullptr;

    size_t n_out = 0; // rows of out that are written

    for (size_t i = i0; i < i1; ++i) {
        const auto & layer = layers[i];

        ggml_tensor * f = layer.vectors;

        const int64_t n_head  = layer.n_head;
        const bool    direct  = is_cpu() && policy.score_cpu;
        const int64_t n_group = by_group && !direct ? n_heads_at_once(layer) : n_head;

        for (int64_t ih = 0; ih < n_head; ih += n_group) {
            const int64_t n = std::min(n_group, n_head - ih);

            // always convert to F32: a product of two types would round the vectors to the type of the cache
            const auto rows = [&](ggml_tensor * t, int64_t n_embd_head) {
                t = ggml_view_2d(ctx, t, n*n_embd_head, t->ne[1], t->nb[1], ggml_row_size(t->type, ih*n_embd_head));

                return ggml_reshape_3d(ctx, ggml_get_rows(ctx, t, idx), n_embd_head, n, n_rows);
            };

            ggml_tensor * fg = f ? ggml_view_4d(ctx, f, f->ne[0], f->ne[1], f->ne[2], n, f->nb[1], f->nb[2], f->nb[3], ih*f->nb[3]) : nullptr;

            const auto cur = direct ?
                policy.score_cpu(ctx, layer.k[is], layer.v[is], fg, idx, n_head) :
                policy.score(ctx, rows(layer.k[is], layer.n_embd_k), rows(layer.v[is], layer.n_embd_v), fg);

            if (!out) {
                n_parts = cur.size();

                // one tensor, so that all scores are read at once. marked as input so that it shares no memory with other nodes
                out = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rows, n_head_sum*n_parts);
                ggml_set_input(out);
                ggml_set_output(out);
                graph.outputs.push_back(out);
            }

            for (size_t ip = 0; ip < cur.size(); ++ip) {
                ggml_tensor * dst = ggml_view_2d(ctx, out, n_rows, n, out->nb[1], (n_out + ip*n_head + ih)*out->nb[1]);

                ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, cur[ip], dst));
            }
        }
        n_out += n_head*n_parts;
    }
}

void llama_qfilter_worker::init(uint32_t n_cells) {
    if (!policy.score) {
        return;
    }

    const ggml_tensor * bad = nullptr;

    for (const bool by_group : { true, false }) {
        this->by_group = by_group;

        build_score(0, 0, n_cells); // sets n_parts
        build_score(0, 0, n_cells);

        bad = graph.unsupported(backend);
        if (!bad) {
            if (!graph.alloc(galloc.get())) {
                throw std::runtime_error(format("no memory to score on %s", ggml_backend_name(backend)));
            }
            return;
        }
    }

    throw std::runtime_error(format("%s can't score a %s cache (%s)", ggml_backend_name(backend),
                ggml_type_name(layers[0].k[0]->type), ggml_op_desc(bad)));
}

llama_qfilter_result llama_qfilter_worker::score(
        size_t i0, uint32_t is, const llama_qfilter_order & order, std::vector<float> & scores) {
    build_score(i0, is, order.n());

    if (!graph.alloc(galloc.get())) {
        LLAMA_LOG_ERROR("%s: failed to allocate the scores\n", __func__);
        return LLAMA_QFILTER_NO_MEM;
    }

    ggml_backend_tensor_set(graph.inputs[0], order.cells.data(), 0, ggml_nbytes(graph.inputs[0]));

    n_nodes += graph.n_nodes();

    return graph.scores(backend, scores);
}

//
// llama_qfilter_worker_host
//

class llama_qfilter_worker_host : public llama_qfilter_worker {
public:
    using llama_qfilter_worker::llama_qfilter_worker;

    bool is_cpu() const override { return backend == threads.backend; }

    // the scores of a few layers, and the copy of one head, stay in the CPU's cache
    size_t   n_layers_at_once()                               const override { return 8; }
    uint32_t n_heads_at_once(const llama_qfilter_layer &)     const override { return 1; }

    llama_qfilter_result prepare_move(uint32_t is, const llama_qfilter_selection & sel) override {
        // with ascending cells, no row moves to a later cell, so every row is read before its cell is written
        in_place = std::is_sorted(sel.order.cells.begin(), sel.order.cells.end());

        size_t n_bytes = 0;
        for (const auto & layer : layers) {
            n_bytes = std::max({ n_bytes, layer.k[is]->nb[1], layer.v[is]->nb[1] });
        }
        if (!in_place) {
            buf.resize(std::max(buf.size(), sel.n_keep()*n_bytes));
        }

        return LLAMA_QFILTER_DONE;
    }

    llama_qfilter_result move(uint32_t is, const llama_qfilter_selection & sel) override {
        const auto move_one = [&](size_t i) {
            const auto & layer = layers[i/2];

            move_rows(i % 2 == 0 ? layer.k[is] : layer.v[is], layer, sel);
        };

        if (in_place) {
            return threads.run(2*layers.size(), [&](size_t i, int) { move_one(i); }) ? LLAMA_QFILTER_DONE : LLAMA_QFILTER_FAILED;
        }

        for (size_t i = 0; i < 2*layers.size(); ++i) {
            move_one(i);
        }
        return LLAMA_QFILTER_DONE;
    }

    size_t n_bytes() const override { return llama_qfilter_worker::n_bytes() + buf.capacity(); }

private:
    void move_rows(ggml_tensor * t, const llama_qfilter_layer & layer, const llama_qfilter_selection & sel) {
        const uint32_t n_moved  = llama_qfilter_n_moved(layer, sel.same);
        const size_t   row_size = t->nb[1]/n_moved;

        uint8_t * data = (uint8_t *) t->data;
        uint8_t * dst  = in_place ? data : buf.data();

        for (uint32_t i = 0; i < sel.n_keep(); ++i) {
            for (uint32_t ih = 0; ih < n_moved; ++ih) {
                const uint32_t cell = sel.order.cells[sel.rank(layer.head0 + ih, i)];

                if (!in_place || cell != i) {
                    memcpy(dst + i*t->nb[1] + ih*row_size, data + cell*t->nb[1] + ih*row_size, row_size);
                }
            }
        }

        if (!in_place) {
            memcpy(data, dst, sel.n_keep()*t->nb[1]);
        }
    }

    bool in_place = true;

    std::vector<uint8_t> buf; // for the rows of one tensor that stay
};

//
// llama_qfilter_worker_device
//

class llama_qfilter_worker_device : public llama_qfilter_worker {
public:
    using llama_qfilter_worker::llama_qfilter_worker;

    bool is_cpu() const override { return false; }

    // many layers in one graph: launching a graph costs more than computing it. but the scores are in memory twice, so they
    // shall take at most a third of a layer each time
    size_t n_layers_at_once() const override {
        const auto & layer = layers[0];

        const size_t n_bytes_scores = layer.n_head*n_parts*sizeof(float); // for each row

        return std::clamp<size_t>((layer.k[0]->nb[1] + layer.v[0]->nb[1])/(3*n_bytes_scores), 1, layers.size());
    }

    // the copies that an eviction makes, besides the scores, shall not take more memory than K and V of four layers. for an F16
    // cache this allows all heads at once, which is faster: there the launch of a node costs more than its computation
    uint32_t n_heads_at_once(const llama_qfilter_layer & layer) const override {
        const size_t n_copies = 3; // F32 copies of keys or values that a policy needs at the same time

        const size_t n_vectors = layer.vectors ? layer.vectors->ne[1]*layer.vectors->ne[2] : 0;

        const size_t n_bytes      = 4*(layer.k[0]->nb[1] + layer.v[0]->nb[1]);
        const size_t n_bytes_copy = (n_copies*layer.n_head*std::max(layer.n_embd_k, layer.n_embd_v) + layer.n_head*n_vectors)*sizeof(float);

        const size_t n = std::max<size_t>(1, std::min<size_t>(layer.n_head, layer.n_head*n_bytes/n_bytes_copy));

        const size_t n_groups = (layer.n_head + n - 1)/n;

        return (layer.n_head + n_groups - 1)/n_groups;
    }

    void init(uint32_t n_cells) override {
        llama_qfilter_worker::init(n_cells);

        const char * name = ggml_backend_name(backend);

        for (const auto & layer : layers) {
            for (const auto * t : { layer.k[0], layer.v[0] }) {
                if (t->nb[1]/layer.n_head % sizeof(int32_t) != 0) {
                    throw std::runtime_error(format("rows of %s with head_dim %u can't be moved on %s: use another cache type",
                                ggml_type_name(t->type), (uint32_t) t->ne[0]/layer.n_head, name));
                }
            }
        }

        build_move(0, n_cells, false);

        if (const auto * bad = graph.unsupported(backend)) {
            throw std::runtime_error(format("%s can't move rows (%s)", name, ggml_op_desc(bad)));
        }
        if (!graph.alloc(galloc.get())) {
            throw std::runtime_error(format("no memory to move rows on %s", name));
        }

        test_bits();
        test_largest(n_cells);
    }

    llama_qfilter_result prepare_move(uint32_t is, const llama_qfilter_selection & sel) override {
        build_move(is, sel.n_keep(), sel.same);

        if (!graph.alloc(galloc.get())) {
            return LLAMA_QFILTER_NO_MEM;
        }

        std::vector<int32_t> data(ggml_nelements(graph.inputs[0]));
        std::vector<size_t>  begin(layers.size(), 0); // of each layer's data

        for (size_t i = 1; i < layers.size(); ++i) {
            begin[i] = begin[i - 1] + sel.n_keep()*llama_qfilter_n_moved(layers[i - 1], sel.same);
        }

        const bool done = threads.run(layers.size(), [&](size_t i, int) {
            const auto & layer = layers[i];

            const uint32_t n_head = llama_qfilter_n_moved(layer, sel.same);

            int32_t * dst = data.data() + begin[i];

            for (uint32_t ih = 0; ih < n_head; ++ih) {
                for (uint32_t r = 0; r < sel.n_keep(); ++r) {
                    dst[r*n_head + ih] = sel.order.cells[sel.rank(layer.head0 + ih, r)]*n_head + ih;
                }
            }
        });
        if (!done) {
            return LLAMA_QFILTER_FAILED;
        }
        ggml_backend_tensor_set(graph.inputs[0], data.data(), 0, ggml_nbytes(graph.inputs[0]));

        n_nodes += graph.n_nodes();

        return LLAMA_QFILTER_DONE;
    }

    llama_qfilter_result move(uint32_t, const llama_qfilter_selection &) override {
        return ggml_backend_graph_compute(backend, graph.gf) == GGML_STATUS_SUCCESS ? LLAMA_QFILTER_DONE : LLAMA_QFILTER_FAILED;
    }

private:
    // a view of a stream's cache tensor as integers, so that rows are moved and never converted: [n_ints, n_rows]
    static ggml_tensor * view_i32(ggml_context * ctx, ggml_tensor * t, int64_t n_ints, int64_t n_rows) {
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

    // input: [n_moved*n_rows] I32 for each layer: cell*n_moved + head, in the order of the destination
    void build_move(uint32_t is, uint32_t n_rows, bool same) {
        auto * ctx = graph.start(layers.size()*LLAMA_QFILTER_MAX_TENSORS);

        int64_t n_idx = 0;
        for (const auto & layer : layers) {
            n_idx += n_rows*llama_qfilter_n_moved(layer, same);
        }

        ggml_tensor * idx_all = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_idx);
        ggml_set_input(idx_all);

        graph.inputs.push_back(idx_all);

        size_t offset = 0;

        for (const auto & layer : layers) {
            const int64_t n = llama_qfilter_n_moved(layer, same);

            ggml_tensor * idx = ggml_view_1d(ctx, idx_all, n*n_rows, offset);

            offset += ggml_nbytes(idx);

            for (auto * t : { layer.k[is], layer.v[is] }) {
                const int64_t n_ints = t->nb[1]/n/sizeof(int32_t);

                ggml_tensor * src = view_i32(ctx, t, n_ints, n*t->ne[1]);
                ggml_tensor * dst = view_i32(ctx, t, n_ints, n*n_rows);

                // two steps: all rows are read before any cell is written
                ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, ggml_get_rows(ctx, src, idx), dst));
            }
        }
    }

    // a device that copies integers as floats may change bits: test it with integers that are NaN or denormal as floats
    void test_bits() {
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

        auto * buft = ggml_backend_buffer_get_type(layers[0].k[0]->view_src->buffer);

        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx_t.get(), buft));
        if (!buf) {
            throw std::runtime_error(format("no memory to move rows on %s", ggml_backend_name(backend)));
        }

        ggml_backend_tensor_set(src, rows,  0, sizeof(rows));
        ggml_backend_tensor_set(idx, order, 0, sizeof(order));

        auto * ctx = graph.start(LLAMA_QFILTER_MAX_TENSORS);

        ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, ggml_get_rows(ctx, src, idx), src));

        uint32_t moved[4][4] = {};

        if (graph.alloc(galloc.get()) && ggml_backend_graph_compute(backend, graph.gf) == GGML_STATUS_SUCCESS) {
            ggml_backend_tensor_get(src, moved, 0, sizeof(moved));
        }

        for (int i = 0; i < 4; ++i) {
            if (memcmp(moved[i], rows[order[i]], sizeof(rows[0])) != 0) {
                throw std::runtime_error(format("%s does not move rows bit by bit", ggml_backend_name(backend)));
            }
        }
    }

    // run every graph once at its largest size: a backend may report that it supports an op, but fail at this size. all rows stay
    void test_largest(uint32_t n_cells) {
        llama_qfilter_selection all;

        all.n_window = n_cells;
        all.same     = !policy.score && !policy.score_pos;
        all.order.cells.resize(n_cells);
        all.order.pos.resize(n_cells);
        std::iota(all.order.cells.begin(), all.order.cells.end(), 0);
        std::iota(all.order.pos.begin(),   all.order.pos.end(),   0);

        std::vector<float> scores;

        if ((policy.score && score(0, 0, all.order, scores) != LLAMA_QFILTER_DONE) ||
            prepare_move(0, all) != LLAMA_QFILTER_DONE || move(0, all) != LLAMA_QFILTER_DONE) {
            throw std::runtime_error(format("%s can't evict from %u cells", ggml_backend_name(backend), n_cells));
        }
    }
};

std::unique_ptr<llama_qfilter_worker> llama_qfilter_worker::on_host(
        ggml_backend_t backend, const llama_qfilter_policy_info & policy, const llama_qfilter_threads & threads) {
    return std::make_unique<llama_qfilter_worker_host>(backend, policy, threads);
}

std::unique_ptr<llama_qfilter_worker> llama_qfilter_worker::on_device(
        ggml_backend_t backend, const llama_qfilter_policy_info & policy, const llama_qfilter_threads & threads) {
    return std::make_unique<llama_qfilter_worker_device>(backend, policy, threads);
}
