#include "llama-qfilter-learned.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

// graph nodes and leaves per layer, at most
static const size_t LLAMA_QFILTER_LEARNED_TENSORS = 32;

void llama_qfilter_learned::load(
        const llama_qfilter_params             & params,
        const std::vector<llama_qfilter_layer> & layers,
              llama_qfilter_rotation             rotation_k,
              llama_qfilter_rotation             rotation_v) {
    this->layers   = layers;
    this->rotation = rotation_k;

    hash = LLAMA_QFILTER_HASH_INIT;

    for (const auto & layer : layers) {
        const auto * src = llama_qfilter_find(params, LLAMA_QFILTER_KIND_LEARNED, layer.il);

        const uint32_t n_k = layer.n_head*layer.n_embd_k;
        const uint32_t n_v = layer.n_head*layer.n_embd_v;

        if (!src) {
            throw std::runtime_error(format("layer %d has no learned filters", layer.il));
        }
        if (!src->data || src->n_rows != layer.n_head || src->n_embd != n_k + n_v) {
            throw std::runtime_error(format("the learned filters of layer %d are %u rows of %u numbers, the model needs %u of %u",
                        layer.il, src->n_rows, src->n_embd, layer.n_head, n_k + n_v));
        }

        const size_t n = (size_t) src->n_rows*src->n_embd;

        if (!std::all_of(src->data, src->data + n, [](float x) { return std::isfinite(x); })) {
            throw std::runtime_error(format("the learned filters of layer %d have values that are not finite", layer.il));
        }

        hash = llama_qfilter_hash(hash, src->data, n*sizeof(float));

        weights.emplace_back(src->data, src->data + n);

        for (uint32_t ih = 0; ih < layer.n_head; ++ih) {
            rotation_v.apply(weights.back().data() + ih*(n_k + n_v) + n_k, n_v);
        }
    }
}

void llama_qfilter_learned::init(llama_context * lctx) {
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & layer = layers[i];

        ropes.emplace_back();

        if (!ropes[i].init(lctx, layer.il)) {
            throw std::runtime_error(format("the graph does not show how RoPE turns the keys of layer %d: "
                        "use a policy that needs no learned filters", layer.il));
        }

        // the weights lie on the device of the keys
        ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));

        tensors.push_back(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, weights[i].size()/layer.n_head, layer.n_head));

        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(layer.k[0]->buffer)));
        if (!buf) {
            throw std::runtime_error(format("no memory for the learned filters of layer %d", layer.il));
        }
        ggml_backend_tensor_set(tensors[i], weights[i].data(), 0, ggml_nbytes(tensors[i]));

        ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }
}

ggml_tensor * llama_qfilter_learned::input(ggml_type type, int64_t ne0, int64_t ne1, const void * data) {
    ggml_tensor * res = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(res);

    inputs.emplace_back(res, data);

    return res;
}

// outputs: [n_head, n] for each layer; inputs[0]: [n] I32, indices of the rows
void llama_qfilter_learned::build(bool on_host, const std::vector<rows> & src, const std::vector<llama_pos> & pos_rows) {
    const int64_t n = pos_rows.size();

    ctx = graph.start((src.size() + 1)*LLAMA_QFILTER_LEARNED_TENSORS);

    inputs.clear();
    pos_graph = positions(pos_rows);

    ggml_tensor * idx = input(GGML_TYPE_I32, n, 1, nullptr);
    ggml_tensor * pos = input(GGML_TYPE_I32, pos_graph.size(), 1, pos_graph.data());
    ggml_tensor * rot = rotation.n_rot > 0 ? input(GGML_TYPE_F32, rotation.n_rot, rotation.n_rot, rotation.matrix->data()) : nullptr;

    for (const auto & s : src) {
        const auto & layer = layers[s.i];
        const auto & rope  = ropes[s.i];

        const int64_t n_k = layer.n_head*layer.n_embd_k;
        const int64_t n_v = layer.n_head*layer.n_embd_v;

        ggml_tensor * w = tensors[s.i];
        if (on_host) {
            w = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_k + n_v, layer.n_head);
            w->data = weights[s.i].data();
        }

        ggml_tensor * k = ggml_get_rows(ctx, s.k, idx); // F32
        ggml_tensor * v = ggml_get_rows(ctx, s.v, idx);

        if (rot) {
            // undo the rotation: the matrix is its own inverse
            k = ggml_mul_mat(ctx, rot, ggml_reshape_2d(ctx, k, rotation.n_rot, n_k*n/rotation.n_rot));
            ggml_prec_set_acc(k, GGML_PREC_F32);
        }

        if (rope.n_embd_head > 0) {
            ggml_tensor * factors = rope.factors.empty() ? nullptr : input(GGML_TYPE_F32, rope.factors.size(), 1, rope.factors.data());

            k = rope.build(ctx, ggml_reshape_3d(ctx, k, layer.n_embd_k, layer.n_head, n), pos, factors, true);
        }

        k = ggml_reshape_2d(ctx, k, n_k, n);

        ggml_tensor * cur_k = ggml_mul_mat(ctx, ggml_view_2d(ctx, w, n_k, layer.n_head, w->nb[1], 0), k);
        ggml_tensor * cur_v = ggml_mul_mat(ctx, ggml_view_2d(ctx, w, n_v, layer.n_head, w->nb[1], n_k*sizeof(float)), v);
        ggml_prec_set_acc(cur_k, GGML_PREC_F32);
        ggml_prec_set_acc(cur_v, GGML_PREC_F32);

        ggml_tensor * cur = ggml_add(ctx, cur_k, cur_v);

        ggml_set_output(cur);
        ggml_build_forward_expand(graph.gf, cur);

        graph.outputs.push_back(cur);
    }
}

// all layers with RoPE take positions in the same layout
std::vector<int32_t> llama_qfilter_learned::positions(const std::vector<llama_pos> & pos) const {
    const auto it = std::find_if(ropes.begin(), ropes.end(), [](const auto & rope) { return rope.n_embd_head > 0; });

    return it == ropes.end() ? pos : it->positions(true, pos.data(), pos.size());
}

void llama_qfilter_learned::check(ggml_backend_t backend, const std::vector<rows> & src, uint32_t n) {
    build(false, src, std::vector<llama_pos>(n));

    if (const auto * bad = graph.unsupported(backend)) {
        throw std::runtime_error(format("%s can't compute learned filters (%s)", ggml_backend_name(backend), ggml_op_desc(bad)));
    }
    if (!graph.alloc(galloc(backend))) {
        throw std::runtime_error(format("no memory for learned filters on %s", ggml_backend_name(backend)));
    }
}

llama_qfilter_result llama_qfilter_learned::score(
        ggml_backend_t                 backend,
        bool                           on_host,
        const std::vector<rows>      & src,
        const std::vector<uint32_t>  & idx,
        const std::vector<llama_pos> & pos,
        std::vector<float>           & out) {
    build(on_host, src, pos);

    if (!graph.alloc(galloc(backend))) {
        LLAMA_LOG_ERROR("%s: failed to allocate the scores\n", __func__);
        return LLAMA_QFILTER_NO_MEM;
    }

    inputs[0].second = idx.data();

    for (const auto & [t, data] : inputs) {
        if (t->buffer) { // without a buffer, no node reads it
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
    }

    return graph.scores(backend, out);
}

ggml_gallocr_t llama_qfilter_learned::galloc(ggml_backend_t backend) {
    auto & res = gallocs[backend];
    if (!res) {
        res.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    }
    return res.get();
}

size_t llama_qfilter_learned::n_bytes() const {
    size_t res = graph.n_bytes();

    for (const auto & [_, galloc] : gallocs) {
        res += ggml_gallocr_get_buffer_size(galloc.get(), 0);
    }

    return res;
}
