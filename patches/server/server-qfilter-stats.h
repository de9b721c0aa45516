// a bounded cache in the server's JSON: `timings`, /metrics, /props, what a chat consists of
#pragma once

#include "json.h"
#include "llama.h"
#include "qfilter.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct common_chat_msg;
struct common_params;
struct server_task_result;

// of one request
struct server_qfilter_stats {
    bool bounded = false;

    uint64_t n_cells    = 0; // cells that the conversation uses
    uint64_t n_reread   = 0; // tokens that had been read before but had to be read again
    uint64_t n_recalled = 0; // positions that came back for the answer

    int64_t t_recall_us = 0; // including the time to read the question for the recall

    void add_to(common_json & timings) const;
};

// of the server, taken after a decode because the context must not be queried while it computes
struct server_qfilter_metrics {
    llama_qfilter_stats stats = {};

    uint64_t n_reread   = 0;
    uint64_t n_recalled = 0;

    // Prometheus text; empty: the cache is not bounded
    std::string to_metrics() const;
};

// settings of the bounded cache; null: the cache is not bounded
common_json server_qfilter_props(const common_params & params);

// of the messages of a chat: the system prompt, and how the first user message and the one after it begin
common_json server_qfilter_texts(const std::vector<common_chat_msg> & messages);

// the answer to requests that are still waiting when the server ends
std::unique_ptr<server_task_result> server_qfilter_stopped();
