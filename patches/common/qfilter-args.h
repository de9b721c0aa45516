// the bounded cache for programs with a command line, such as llama-server
#pragma once

#include "llama.h"

#include <cstdint>
#include <string>
#include <vector>

struct common_arg;
struct common_params;

struct common_qfilter_params {
    int32_t max_length    =  0; // most cells a sequence may use; 0: not bounded, and all other fields are ignored
    int32_t window_length = -1; // last positions, always kept; -1: max_length/8, at most 512
    int32_t sinks         =  4; // first positions, always kept
    int32_t interval      = -1; // cells freed by one eviction; -1: max_length/8, at least 64 and at most 512
    int32_t seed          =  0; // for the policy random

    std::string policy; // empty: the policy that the file names, else qblend

    bool        archive           = true; // keep evicted rows in host memory
    std::string archive_dir;              // keep them in a file in this folder instead
    int32_t     archive_limit_mib = -1;   // over all sequences; -1: half of the host memory

    bool    recall         = true; // after a prompt, bring back the rows that its last tokens look at
    int32_t recall_queries = 64;   // at most this many last tokens

    std::string state; // a file of `qfllama compress` that every conversation starts from

    bool bounded() const { return max_length > 0; }
};

// the command line options
std::vector<common_arg> common_qfilter_args();

// adjust other parameters to a bounded cache: batches, streams, Flash Attention. false, with a note in the log: one of them
// can't be used with a bounded cache
bool common_qfilter_prepare(common_params & params);

// the n_ctx for which memory is estimated: cells, not positions
uint32_t common_qfilter_n_ctx_fit(const common_params & params, uint32_t n_ctx);

// like llama_init_from_model(), with a bounded cache if params ask for one. n_ctx 0: the model's training context for each
// sequence. writes the name of the policy to params. returns nullptr, with a note in the log, if it fails
llama_context * common_qfilter_init(llama_model * model, llama_context_params cparams, common_params & params);
