// the bounded cache in programs that take their parameters from a command line, llama-server among them
#pragma once

#include "llama.h"

#include <cstdint>
#include <string>
#include <vector>

struct common_arg;
struct common_params;

struct common_qfilter_params {
    int32_t max_length    =  0; // most cells a sequence may use; 0: the whole cache, and nothing else here matters
    int32_t window_length = -1; // last positions, always kept; -1: max_length/4
    int32_t sinks         =  4; // first positions, always kept
    int32_t interval      = -1; // cells freed by one eviction; -1: max_length/4, at least 64 and at most 512
    int32_t seed          =  0; // of the policy random

    std::string policy; // empty: that of the file, else qblend

    bool        archive           = true; // keep what is evicted in host memory
    std::string archive_dir;              // in a file in this folder instead
    int32_t     archive_limit_mib = -1;   // of all sequences; -1: half of the memory

    bool    recall         = true; // bring back after a prompt what its end looks at
    int32_t recall_queries = 64;   // tokens of that end, at most

    std::string state; // what every conversation starts from, a file of `qfllama compress`

    bool bounded() const { return max_length > 0; }
};

// the command line options
std::vector<common_arg> common_qfilter_args();

// make other parameters fit a bounded cache: batches, streams, Flash Attention. false, with a note in the log: one of them
// can't be used with it
bool common_qfilter_prepare(common_params & params);

// the n_ctx for which memory is estimated: cells, not positions
uint32_t common_qfilter_n_ctx_fit(const common_params & params, uint32_t n_ctx);

// like llama_init_from_model(), with a bounded cache if that is wanted. n_ctx 0: what the model was trained for, for each
// sequence. the policy is named in params then. nullptr, with a note in the log
llama_context * common_qfilter_init(llama_model * model, llama_context_params cparams, common_params & params);
