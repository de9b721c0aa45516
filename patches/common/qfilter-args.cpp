#include "qfilter-args.h"

#include "qfilter-file.h"
#include "qfilter.h"

#include "arg.h"
#include "common.h"
#include "log.h"
#include "speculative.h"

#include <algorithm>
#include <stdexcept>

static common_arg common_qfilter_arg(common_arg arg, const char * env) {
    arg.set_examples({ LLAMA_EXAMPLE_SERVER });
    arg.set_env(env);
    return arg;
}

// a whole number that is at least 0
static int32_t common_qfilter_number(int value) {
    if (value < 0) {
        throw std::invalid_argument("must be 0 or more");
    }
    return value;
}

std::vector<common_arg> common_qfilter_args() {
    return {
        common_qfilter_arg({ { "--max-length" }, "N",
            "most cells of the KV cache a conversation may use: each layer and KV head keeps the keys that later queries will "
            "care about (default: 0, the whole cache)",
            [](common_params & params, int value) { params.qfilter.max_length = common_qfilter_number(value); }
        }, "LLAMA_ARG_QF_MAX_LENGTH"),
        common_qfilter_arg({ { "--window-length" }, "N",
            "newest tokens that are always kept (default: an eighth of --max-length, at most 512)",
            [](common_params & params, int value) { params.qfilter.window_length = common_qfilter_number(value); }
        }, "LLAMA_ARG_QF_WINDOW_LENGTH"),
        common_qfilter_arg({ { "--sinks" }, "N",
            "first tokens that are always kept (default: 4)",
            [](common_params & params, int value) { params.qfilter.sinks = common_qfilter_number(value); }
        }, "LLAMA_ARG_QF_SINKS"),
        common_qfilter_arg({ { "--interval" }, "N",
            "cells that an eviction frees, and with it the largest batch (default: an eighth of --max-length, 64 to 512)",
            [](common_params & params, int value) {
                if (value < 1) {
                    throw std::invalid_argument("must be 1 or more");
                }
                params.qfilter.interval = value;
            }
        }, "LLAMA_ARG_QF_INTERVAL"),
        common_qfilter_arg({ { "--policy" }, "NAME",
            "how a key is scored: qblend, qfilters, learned, keydiff, streaming, ... (default: the best one for the model, which "
            "the file names)",
            [](common_params & params, const std::string & value) { params.qfilter.policy = value; }
        }, "LLAMA_ARG_QF_POLICY"),
        common_qfilter_arg({ { "--archive" }, { "--no-archive" },
            "keep what is evicted in memory of the host, from where it comes back when a question looks at it (default: on)",
            [](common_params & params, bool value) { params.qfilter.archive = value; }
        }, "LLAMA_ARG_QF_ARCHIVE"),
        common_qfilter_arg({ { "--archive-dir" }, "DIR",
            "keep it in a file in this folder instead",
            [](common_params & params, const std::string & value) { params.qfilter.archive_dir = value; }
        }, "LLAMA_ARG_QF_ARCHIVE_DIR"),
        common_qfilter_arg({ { "--archive-limit" }, "MiB",
            "most MiB of the archive; at the limit the oldest tokens leave it, except the first ones that always stay (default: half of the memory)",
            [](common_params & params, int value) { params.qfilter.archive_limit_mib = common_qfilter_number(value); }
        }, "LLAMA_ARG_QF_ARCHIVE_LIMIT"),
        common_qfilter_arg({ { "--recall" }, { "--no-recall" },
            "bring back, before an answer, what the end of the prompt looks at (default: on)",
            [](common_params & params, bool value) { params.qfilter.recall = value; }
        }, "LLAMA_ARG_QF_RECALL"),
        common_qfilter_arg({ { "--recall-queries" }, "N",
            "how many last tokens of a prompt are the question (default: 64)",
            [](common_params & params, int value) {
                if (value < 1) {
                    throw std::invalid_argument("must be 1 or more");
                }
                params.qfilter.recall_queries = value;
            }
        }, "LLAMA_ARG_QF_RECALL_QUERIES"),
        common_qfilter_arg({ { "--policy-seed" }, "N",
            "seed of the policy random (default: 0)",
            [](common_params & params, int value) { params.qfilter.seed = common_qfilter_number(value); }
        }, "LLAMA_ARG_QF_POLICY_SEED"),
        common_qfilter_arg({ { "--state" }, "FILE",
            "start every conversation that begins with the text of this file of `qfllama compress` from it, without reading it again",
            [](common_params & params, const std::string & value) { params.qfilter.state = value; }
        }, "LLAMA_ARG_QF_STATE"),
    };
}

// fills in the sizes that were left at their defaults
static void common_qfilter_complete(common_qfilter_params & qf) {
    if (qf.window_length < 0) {
        qf.window_length = std::min(qf.max_length/8, 512);
    }
    if (qf.interval < 0) {
        qf.interval = std::clamp(qf.max_length/8, 64, 512);
    }

    const int64_t least = (int64_t) qf.sinks + std::max(1, qf.window_length) + qf.interval;
    if (qf.max_length < least) {
        throw std::invalid_argument(string_format(
            "--max-length %d is too small for --sinks %d + --window-length %d + --interval %d: use at least %lld, or lower the others",
            qf.max_length, qf.sinks, qf.window_length, qf.interval, (long long) least));
    }
}

// throws std::invalid_argument for options that can't be used with a bounded cache
static void common_qfilter_check(common_params & params) {
    auto & qf = params.qfilter;
    if (!qf.bounded()) {
        if (!qf.state.empty()) {
            throw std::invalid_argument("--state needs a bounded cache: give --max-length, too");
        }
        return;
    }

    common_qfilter_complete(qf);

    if (!params.mmproj.path.empty()) {
        throw std::invalid_argument("--mmproj can't be used with --max-length: images can't be read into a bounded cache");
    }
    if (params.embedding) {
        throw std::invalid_argument("--embedding can't be used with --max-length: leave one of them out");
    }

    const auto & types = params.speculative.types;
    const bool   mtp   = std::find(types.begin(), types.end(), COMMON_SPECULATIVE_TYPE_DRAFT_MTP) != types.end();

    if (params.speculative.has_dft() || mtp) {
        throw std::invalid_argument("a draft model can't be used with --max-length: leave it out, or use --spec-type ngram-simple");
    }

    params.n_batch  = std::min(params.n_batch, qf.interval);
    params.n_ubatch = std::min(params.n_ubatch, params.n_batch);

    params.kv_unified = false; // every sequence has its own cells

    const int32_t n_draft = common_speculative_n_max(&params.speculative);
    if ((int64_t) params.n_parallel*(1 + n_draft) > params.n_batch) {
        throw std::invalid_argument(string_format("-np %d with %d drafted tokens each takes more than a batch of --interval %d has: use a larger "
                    "interval, fewer slots or fewer drafts", params.n_parallel, n_draft, qf.interval));
    }

    if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO) {
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    }
}

bool common_qfilter_prepare(common_params & params) {
    try {
        common_qfilter_check(params);
        return true;
    } catch (const std::exception & err) {
        LOG_ERR("no bounded cache: %s\n", err.what());
        return false;
    }
}

uint32_t common_qfilter_n_ctx_fit(const common_params & params, uint32_t n_ctx) {
    if (!params.qfilter.bounded()) {
        return n_ctx;
    }

    const int64_t n_cells = (int64_t) params.qfilter.max_length*params.n_parallel;

    return n_ctx > 0 ? std::min<int64_t>(n_cells, n_ctx) : std::min<int64_t>(n_cells, INT32_MAX);
}

// most bytes of host memory for the archive, 0: no archive
static uint64_t common_qfilter_archive_bytes(const common_qfilter_params & qf) {
    if (!qf.archive) {
        return 0;
    }
    if (qf.archive_limit_mib >= 0) {
        return (uint64_t) qf.archive_limit_mib << 20;
    }

    size_t free  = 0;
    size_t total = 0;

    if (auto * dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {
        ggml_backend_dev_memory(dev, &free, &total);
    }

    return free > 0 ? free/2 : 4ull << 30;
}

llama_context * common_qfilter_init(llama_model * model, llama_context_params cparams, common_params & params) {
    auto & qf = params.qfilter;
    if (!qf.bounded()) {
        return llama_init_from_model(model, cparams);
    }

    const uint32_t n_seq = std::max(1u, cparams.n_seq_max);

    cparams.n_ctx = params.n_ctx > 0 ? params.n_ctx : llama_model_n_ctx_train(model)*n_seq;

    try {
        const auto file = common_qfilter_read(model, params.model.path, qf.policy);

        llama_qfilter_params bound;
        llama_qfilter_params_init(&bound, sizeof(bound));

        bound.n_cells   = qf.max_length;
        bound.n_keep    = qf.max_length - qf.interval;
        bound.n_sink    = qf.sinks;
        bound.n_window  = qf.window_length;
        bound.policy    = file.policy;
        bound.seed      = qf.seed;
        bound.n_vectors = file.vectors.size();
        bound.vectors   = file.vectors.data();

        bound.n_bytes_archive = common_qfilter_archive_bytes(qf);
        bound.archive_dir     = qf.archive_dir.empty() ? nullptr : qf.archive_dir.c_str();

        auto * ctx = llama_qfilter_init_from_model(model, cparams, &bound);
        if (!ctx) {
            throw std::runtime_error(llama_qfilter_last_error());
        }

        qf.policy = llama_qfilter_policy_name(file.policy);

        if ((uint32_t) qf.max_length >= llama_n_ctx_seq(ctx)) {
            LOG_WRN("--max-length %d bounds nothing: a conversation has %u positions at most; use a smaller one, or a larger -c\n",
                    qf.max_length, llama_n_ctx_seq(ctx));
        }
        LOG_INF("bounded cache: %d cells for each of %u conversations of %u positions, policy %s, archive of %.0f MiB\n",
                qf.max_length, n_seq, llama_n_ctx_seq(ctx), qf.policy.c_str(), bound.n_bytes_archive/1024.0/1024.0);

        return ctx;
    } catch (const std::exception & err) {
        LOG_ERR("no bounded cache: %s\n", err.what());
        return nullptr;
    }
}
