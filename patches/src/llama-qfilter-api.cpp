#include "llama-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <stdexcept>

//
// between llama_context and the caches
//

static llama_qfilter * llama_qfilter_of(llama_memory_t mem) {
    auto * kv = llama_qfilter::cache_of(mem);

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

    std::unique_ptr<llama_memory_i> mem(llama_qfilter::create_memory(model, params_mem, cparams, params->n_cells));

    llama_qfilter::cache_of(mem.get())->qfilter = std::make_shared<llama_qfilter>(*mem, cparams, *params);

    return mem.release();
}

int32_t llama_qfilter_make_room(llama_memory_t mem, const llama_batch & batch) {
    auto * qf = llama_qfilter_of(mem);

    return qf ? qf->make_room(batch) : 0;
}

bool llama_qfilter_seq_rm(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto * qf = llama_qfilter_of(mem);

    return !qf || qf->can_rm(seq_id, p0, p1);
}

bool llama_qfilter_seq_cp(llama_memory_t mem, llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos & p0, llama_pos & p1) {
    auto * qf = llama_qfilter_of(mem);

    return !qf || qf->seq_cp(seq_id_src, seq_id_dst, p0, p1);
}

bool llama_qfilter_seq_keep(llama_memory_t mem, llama_seq_id seq_id) {
    const auto * qf = llama_qfilter_of(mem);

    if (qf && !qf->has(seq_id)) {
        LLAMA_LOG_ERROR("%s: no sequence %d\n", __func__, seq_id);
        return false;
    }

    return true;
}

bool llama_qfilter_seq_move(llama_memory_t mem) {
    if (llama_qfilter_of(mem)) {
        LLAMA_LOG_ERROR("%s: positions of a bounded cache can't be changed\n", __func__);
        return false;
    }

    return true;
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
        /*.seed        =*/ 0,
        /*.n_filters   =*/ 0,
        /*.filters     =*/ nullptr,
        /*.n_rank      =*/ 0,
        /*.moments     =*/ nullptr,
        /*.queries     =*/ nullptr,
    };
}

// empty: supported
static std::string llama_qfilter_refusal(const llama_model & model) {
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
    if (hparams.is_mla()) {
        return arch + " models use multi-head latent attention (MLA): their cache has no keys per head";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return arch + " models use ALiBi: the distance to every key would have to be known per head";
    }
    if (hparams.router_layer >= 0) {
        return arch + " models route by a layer of the cache: it must not be evicted";
    }
    if (hparams.indexer_head_size > 0 || model.arch == LLM_ARCH_MINIMAX_M3 || model.arch == LLM_ARCH_DEEPSEEK4) {
        return arch + " models choose keys with an indexer of their own: its cache would have to lose the same rows";
    }

    int32_t n_evict = 0;
    for (int32_t il = 0; il < (int32_t) hparams.n_layer(); ++il) {
        n_evict += llama_qfilter_layer_evicts(&model, il);
    }
    if (n_evict == 0) {
        return arch + ": every layer of this model is windowed: its cache does not grow";
    }

    return "";
}

// empty: rows of this type can be cached
static std::string llama_qfilter_refusal(const llama_model & model, ggml_type type, const char * name, bool is_v) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            break;
        default:
            return format("%s = %s: use f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl", name,
                    type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name(type) : "unknown");
    }

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        const uint32_t n_embd_head = is_v ? model.hparams.n_embd_head_v(il) : model.hparams.n_embd_head_k(il);

        if (model.hparams.n_head_kv(il) > 0 && n_embd_head % ggml_blck_size(type) != 0) {
            return format("%s = %s: its blocks of %d don't divide a head of %u: use f16", name, ggml_type_name(type),
                    (int) ggml_blck_size(type), n_embd_head);
        }
    }

    return "";
}

// the same for a context
static std::string llama_qfilter_refusal(const llama_model & model, const llama_context_params & cparams) {
    std::string refusal = llama_qfilter_refusal(model);
    if (refusal.empty()) {
        refusal = llama_qfilter_refusal(model, cparams.type_k, "type_k", false);
    }
    if (refusal.empty()) {
        refusal = llama_qfilter_refusal(model, cparams.type_v, "type_v", true);
    }
    if (!refusal.empty()) {
        return refusal;
    }

    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return "split_mode = tensor spreads a row over devices: use split_mode = layer or none";
    }
    if (cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        return "Flash Attention is disabled: the V cache would be stored transposed";
    }
    if (cparams.embeddings || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || cparams.ctx_other) {
        return "only contexts that generate text are supported, not embeddings or draft contexts";
    }
    if (cparams.n_seq_max > 1 && cparams.kv_unified) {
        return "n_seq_max > 1 needs kv_unified = false: every sequence has its own cells";
    }

    return "";
}

static bool llama_qfilter_answer(const std::string & refusal, char * why, size_t size) {
    if (why && size > 0) {
        snprintf(why, size, "%s", refusal.c_str());
    }

    return refusal.empty();
}

bool llama_qfilter_supported(const llama_model * model, llama_context_params cparams, char * why, size_t size) {
    return llama_qfilter_answer(llama_qfilter_refusal(*model, cparams), why, size);
}

bool llama_qfilter_model_supported(const llama_model * model, char * why, size_t size) {
    return llama_qfilter_answer(llama_qfilter_refusal(*model), why, size);
}

bool llama_qfilter_layer_evicts(const llama_model * model, int32_t il) {
    const auto & hparams = model->hparams;

    // falcon-h1 has both in every layer
    const bool is_recr = il >= 0 && il < (int32_t) hparams.n_layer() && hparams.is_recr(il) && model->arch != LLM_ARCH_FALCON_H1;

    return il >= 0 && il < (int32_t) hparams.n_layer() && hparams.n_head_kv(il) > 0 &&
        !hparams.is_swa(il) && !is_recr && hparams.has_kv(il);
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

    return qf ? qf->compress(seq_id, n_keep) : -1;
}

int32_t llama_qfilter_kept(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) {
    const auto * qf = llama_qfilter_of(ctx->get_memory());

    return qf ? qf->kept(seq_id, il, ih, out, capacity) : -1;
}

size_t llama_qfilter_rows(llama_context * ctx, llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) {
    const auto * qf = llama_qfilter_of(ctx->get_memory());

    return qf ? qf->rows(seq_id, il, is_v, out, size) : 0;
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
