#include "qfilter.h"

#include "llama-memory-qfilter.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>

//
// errors
//

static thread_local std::string llama_qfilter_error;

void llama_qfilter_set_error(const std::string & message) {
    llama_qfilter_error = message;
}

void llama_qfilter_note_error(const std::string & message) {
    LLAMA_LOG_ERROR("qfilter: %s\n", message.c_str());

    llama_qfilter_set_error(message);
}

const char * llama_qfilter_last_error() {
    return llama_qfilter_error.c_str();
}

uint32_t llama_qfilter_abi_version() {
    return LLAMA_QFILTER_ABI_VERSION;
}

// the bounded memory of a context; nullptr, with an error set: it has none
static llama_memory_qfilter * llama_qfilter_memory(const llama_context * ctx) {
    llama_qfilter_error.clear();

    auto * mem = ctx ? llama_memory_qfilter_of(ctx->get_memory()) : nullptr;
    if (!mem) {
        llama_qfilter_error = "the context has no bounded cache";
    }

    return mem;
}

//
// called by llama_context
//

llama_memory_i * llama_qfilter_create_memory(
        const llama_model          & model,
        const llama_memory_params  & params_mem,
        const llama_cparams        & cparams,
        const llama_qfilter_params * params) {
    // this architecture shares the memory of another context, see llama_model::create_memory()
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && llama_memory_qfilter_of(params_mem.mem_other)) {
        throw std::runtime_error("a draft context can't share a bounded cache");
    }
    if (!params) {
        return model.create_memory(params_mem, cparams);
    }

    try {
        return new llama_memory_qfilter(model, params_mem, cparams, *params);
    } catch (const std::exception & err) {
        llama_qfilter_set_error(err.what()); // upstream logs it
        throw;
    }
}

int32_t llama_qfilter_decode_error(llama_memory_t mem) {
    const auto * qf = llama_memory_qfilter_of(mem);

    return qf && qf->decode_error() != 0 ? qf->decode_error() : -2;
}

//
// C API: policies
//

const char * llama_qfilter_policy_name(int32_t policy) {
    const auto * info = llama_qfilter_policy_find(policy);

    return info ? info->name : nullptr;
}

int32_t llama_qfilter_policy_needs(int32_t policy, int32_t i) {
    const auto * info = llama_qfilter_policy_find(policy);

    for (int32_t j = 0; info && j <= i; ++j) {
        if (info->needs[j] < 0) {
            return -1;
        }
    }

    return info && i >= 0 ? info->needs[i] : -1;
}

bool llama_qfilter_policy_learned(int32_t policy) {
    const auto * info = llama_qfilter_policy_find(policy);

    return info && info->learned;
}

//
// C API: contexts
//

// copies the fields of a struct that both sides know; its first field is its size
template <typename T>
static void llama_qfilter_copy(T & dst, const T & src, size_t struct_size) {
    memset((void *) &dst, 0, struct_size);
    memcpy((void *) &dst, (const void *) &src, std::min(struct_size, sizeof(T)));
}

void llama_qfilter_params_init(llama_qfilter_params * params, size_t struct_size) {
    if (!params || struct_size < sizeof(params->struct_size)) {
        return;
    }

    llama_qfilter_params res = {};

    res.struct_size = struct_size;
    res.n_cells     = 4096;
    res.n_keep      = 3584;
    res.n_sink      = 4;
    res.n_window    = 1024;
    res.policy      = LLAMA_QFILTER_POLICY_QBLEND;

    llama_qfilter_copy(*params, res, struct_size);
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
    return llama_qfilter_answer(model ? llama_qfilter_refusal(*model, cparams) : "there is no model", why, size);
}

bool llama_qfilter_model_supported(const llama_model * model, char * why, size_t size) {
    return llama_qfilter_answer(model ? llama_qfilter_refusal(*model) : "there is no model", why, size);
}

bool llama_qfilter_layer_evicts(const llama_model * model, int32_t il) {
    if (!model) {
        return false;
    }

    const auto & hparams = model->hparams;

    // every layer of falcon-h1 is recurrent and has attention
    const bool is_recr = il >= 0 && il < (int32_t) hparams.n_layer() && hparams.is_recr(il) && model->arch != LLM_ARCH_FALCON_H1;

    return il >= 0 && il < (int32_t) hparams.n_layer() && hparams.n_head_kv(il) > 0 &&
        !hparams.is_swa(il) && !is_recr && hparams.has_kv(il);
}

llama_context * llama_init_from_model(llama_model * model, llama_context_params cparams) {
    return llama_qfilter_init_context(model, cparams, nullptr);
}

// NULL, with a note: the parameters are refused
static llama_context * llama_qfilter_try_init(llama_model * model, llama_context_params cparams, const llama_qfilter_params * params_in) {
    if (!model) {
        llama_qfilter_note_error("model cannot be NULL");
        return nullptr;
    }
    if (!params_in || params_in->struct_size < offsetof(llama_qfilter_params, n_vectors) || params_in->struct_size > sizeof(llama_qfilter_params)) {
        llama_qfilter_note_error("the parameters are of another version of qfilter.h");
        return nullptr;
    }

    llama_qfilter_params params = {};
    memcpy((void *) &params, (const void *) params_in, params_in->struct_size);

    if (cparams.n_seq_max <= 1) {
        cparams.kv_unified = false; // there is one stream either way, but this refuses ids of other sequences
    }

    const std::string refusal = llama_qfilter_refusal(*model, cparams);
    if (!refusal.empty()) {
        llama_qfilter_note_error(refusal);
        return nullptr;
    }

    llama_context * ctx = llama_qfilter_init_context(model, cparams, &params);

    if (ctx) {
        try {
            llama_memory_qfilter_of(ctx->get_memory())->init(ctx);
        } catch (const std::exception & err) {
            llama_qfilter_note_error(err.what());
            llama_free(ctx);
            return nullptr;
        }
    }

    return ctx;
}

llama_context * llama_qfilter_init_from_model(llama_model * model, llama_context_params cparams, const llama_qfilter_params * params) {
    llama_qfilter_error.clear();

    auto * ctx = llama_qfilter_try_init(model, cparams, params);

    if (!ctx && llama_qfilter_error.empty()) {
        llama_qfilter_error = "llama.cpp made no context: its log says why";
    }

    return ctx;
}

//
// C API: sequences
//

int32_t llama_qfilter_compress(llama_context * ctx, llama_seq_id seq_id, uint32_t n_keep, uint32_t n_window) {
    return llama_qfilter_compress_scored(ctx, seq_id, n_keep, n_window, nullptr, 0);
}

int32_t llama_qfilter_compress_scored(
        llama_context * ctx, llama_seq_id seq_id, uint32_t n_keep, uint32_t n_window, const float * scores, size_t n_scores) {
    auto * qf = llama_qfilter_memory(ctx);

    try {
        return qf ? qf->compress(seq_id, n_keep, n_window, scores, n_scores) : -1;
    } catch (const std::exception & err) {
        llama_qfilter_note_error(err.what()); // before any row has moved
        return -2;
    }
}

int32_t llama_qfilter_keep_first(llama_context * ctx, llama_seq_id seq_id, uint32_t n) {
    auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->keep_first(seq_id, n) : -1;
}

int32_t llama_qfilter_room(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->room(seq_id) : -1;
}

llama_pos llama_qfilter_rewind_limit(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->rewind_limit(seq_id) : -1;
}

int32_t llama_qfilter_kept(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * out, size_t capacity) {
    const auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->kept(seq_id, il, ih, out, out ? capacity : 0) : -1;
}

size_t llama_qfilter_rows(llama_context * ctx, llama_seq_id seq_id, int32_t il, bool is_v, void * out, size_t size) {
    const auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->rows(seq_id, il, is_v, out, size) : 0;
}

int32_t llama_qfilter_question(llama_context * ctx, llama_seq_id seq_id) {
    auto * qf = llama_qfilter_memory(ctx);

    try {
        return qf ? qf->question(seq_id) : -1;
    } catch (const std::exception & err) {
        llama_qfilter_note_error(err.what());
        return -2;
    }
}

int32_t llama_qfilter_weights(llama_context * ctx, llama_seq_id seq_id, int32_t il, float * out, size_t capacity) {
    auto * qf = llama_qfilter_memory(ctx);

    try {
        return qf ? qf->weights(seq_id, il, out, capacity) : -1;
    } catch (const std::exception & err) {
        llama_qfilter_note_error(err.what());
        return -2;
    }
}

int32_t llama_qfilter_recall(llama_context * ctx, llama_seq_id seq_id, uint32_t n_rows) {
    auto * qf = llama_qfilter_memory(ctx);

    try {
        return qf ? qf->recall(seq_id, n_rows) : -1;
    } catch (const std::exception & err) {
        llama_qfilter_note_error(err.what()); // before any row has moved
        return -2;
    }
}

int32_t llama_qfilter_recalled(const llama_context * ctx, llama_seq_id seq_id, llama_pos * out, size_t capacity) {
    const auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->recalled(seq_id, out, out ? capacity : 0) : -1;
}

size_t llama_qfilter_archived(llama_context * ctx, llama_seq_id seq_id, llama_pos pos, int32_t il, bool is_v, void * out, size_t size) {
    auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->archived(seq_id, pos, il, is_v, out, size) : 0;
}

size_t llama_qfilter_archive_get_data(llama_context * ctx, llama_seq_id seq_id, uint8_t * dst, size_t size) {
    auto * qf = llama_qfilter_memory(ctx);

    return qf ? qf->archive_write(seq_id, dst, size) : 0;
}

size_t llama_qfilter_archive_set_data(llama_context * ctx, llama_seq_id seq_id, const uint8_t * src, size_t size) {
    auto * qf = llama_qfilter_memory(ctx);
    if (!qf || !src) {
        return 0;
    }

    try {
        qf->archive_read(seq_id, src, size);
        return size;
    } catch (const std::exception & err) {
        llama_qfilter_note_error(err.what());
        return 0;
    }
}

size_t llama_qfilter_state_seq_get_data(llama_context * ctx, uint8_t * dst, size_t size, llama_seq_id seq_id, uint32_t flags) {
    auto * qf = llama_qfilter_memory(ctx);
    if (!qf) {
        return 0;
    }

    qf->resize = flags & LLAMA_QFILTER_STATE_RESIZE;

    const size_t res = dst ? llama_state_seq_get_data(ctx, dst, size, seq_id) : llama_state_seq_get_size(ctx, seq_id);

    qf->resize = false;

    if (res == 0 && llama_qfilter_error.empty()) {
        llama_qfilter_error = "llama.cpp could not write the state: its log says why";
    }

    return res;
}

size_t llama_qfilter_state_seq_set_data(llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq_id, uint32_t flags) {
    auto * qf = llama_qfilter_memory(ctx);
    if (!qf) {
        return 0;
    }
    if (!src) {
        llama_qfilter_set_error("there is no state");
        return 0;
    }

    qf->resize       = flags & LLAMA_QFILTER_STATE_RESIZE;
    qf->keep_archive = flags & LLAMA_QFILTER_STATE_KEEP_ARCHIVE;

    const size_t res = llama_state_seq_set_data(ctx, src, size, seq_id);

    qf->resize       = false;
    qf->keep_archive = false;

    if (res == 0 && llama_qfilter_error.empty()) {
        llama_qfilter_error = "llama.cpp refused the state: its log says why";
    }

    return res;
}

//
// C API: statistics
//

bool llama_qfilter_get_stats(const llama_context * ctx, llama_qfilter_stats * stats) {
    const auto * qf = llama_qfilter_memory(ctx);
    if (!qf || !stats || stats->struct_size == 0) {
        return false;
    }

    llama_qfilter_stats res = {};
    qf->get_stats(res);

    res.struct_size = stats->struct_size;
    llama_qfilter_copy(*stats, res, res.struct_size);

    return true;
}

bool llama_qfilter_get_seq_stats(const llama_context * ctx, llama_seq_id seq_id, llama_qfilter_seq_stats * stats) {
    const auto * qf = llama_qfilter_memory(ctx);

    llama_qfilter_seq_stats res = {};

    if (!qf || !stats || stats->struct_size == 0 || !qf->get_stats(seq_id, res)) {
        return false;
    }

    res.struct_size = stats->struct_size;
    llama_qfilter_copy(*stats, res, res.struct_size);

    return true;
}
