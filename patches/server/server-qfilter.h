// the bounded cache in llama-server: what a conversation can go on from, and what a question brings back
#pragma once

#include "server-common.h"

#include "server-qfilter-stats.h"

#include <string>
#include <vector>

struct server_prompt;

struct server_qfilter {
    // false, with a note in the log: the file of --state can't be used
    bool init(llama_context * ctx, const common_params & params, int32_t n_slots);

    // the tokens of a prompt: plain, but for chats where conversations start from a document. that goes before the first message
    // throws std::invalid_argument if the prompt can't follow it. called by any thread
    server_tokens begin(const llama_vocab * vocab, const json & prompt, bool is_chat, server_tokens && plain) const;

    // prepare a slot for a new prompt, of which it has the first n_same tokens: cut it back, or restore what is nearest. returns
    // the tokens that need not be read again
    int32_t reuse(int32_t id, server_prompt & prompt, const server_tokens & input, int32_t n_same, server_qfilter_stats & stats);

    // tokens of a prompt of n that may be read in one batch, where n_done have been read: an eviction falls where it would fall
    // token by token, and a question is read by itself
    int32_t n_batch(int32_t id, int32_t n_done, int32_t n) const;

    // does the question at the end of a prompt come next?
    bool asks(int32_t id, int32_t n_done) const { return bounded && n_done == questions[id]; }

    // read it, and bring back what it looks at. the sequence then is as if the question had not been read yet
    // false: it could not be made so, all has to be read again
    bool recall(int32_t id, std::vector<common_adapter_lora_info> & lora, const server_tokens & input, server_qfilter_stats & stats);

    // make checkpoints? an archive makes them unnecessary where no layer is windowed
    bool needs_checkpoints() const { return bounded && n_bytes_archive == 0; }

    // after a decode: the context must not be asked while it computes
    // returns the cells that a slot uses, 0: the cache is not bounded
    uint64_t update(int32_t id, server_qfilter_stats & stats) const;
    void update(server_qfilter_metrics & metrics) const;

    // of the first n_same tokens of a prompt, which a new one shares, so many need not be read again. id: of the slot that has
    // it, -1: it is in the prompt cache
    static size_t n_reusable(llama_context * ctx, int32_t id, const server_prompt & prompt, size_t n_same);

    // why the engine refused something, in brackets, or nothing
    static std::string reason();

    //
    // states, with their archives behind them; like upstream's functions if the cache is not bounded
    //

    static size_t size(llama_context * ctx, llama_seq_id id);
    static size_t get (llama_context * ctx,       uint8_t * dst, size_t size, llama_seq_id id);
    static size_t set (llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id id); // 0: refused

    // the archive of a slot behind its state in a file, whose first n bytes are upstream's. returns the bytes of the file
    static size_t save_archive(llama_context * ctx, llama_seq_id id, const std::string & path, size_t n);
    static size_t load_archive(llama_context * ctx, llama_seq_id id, const std::string & path, size_t n);

private:
    llama_context * ctx = nullptr;

    bool     bounded         = false;
    int32_t  n_cells         = 0;
    int32_t  interval        = 0;
    int32_t  recall_queries  = 0; // 0: nothing is recalled
    uint64_t n_bytes_archive = 0;

    uint64_t n_reread   = 0;
    uint64_t n_recalled = 0;

    std::vector<int32_t> questions; // by slot: where it begins, -1: there is none, or it was asked

    // what --state has
    llama_tokens         start;
    std::string          start_header; // what a chat template puts before the document; empty: not known
    std::string          start_system;
    std::vector<uint8_t> start_state;
    std::vector<uint8_t> start_archive;

    void load_start(const std::string & path);

    bool begins_with_start(const server_tokens & input) const;

    // false: the prompt does not begin with it, or it was refused
    bool begin_at_start(int32_t id, server_prompt & prompt, const server_tokens & input);

    bool decode(int32_t id, const server_tokens & input, int32_t begin, int32_t end) const;

    // is there something that n more tokens may look at?
    bool may_recall(int32_t id, int32_t n) const;

    llama_qfilter_seq_stats seq_stats(int32_t id) const;

    llama_pos rewind_limit(int32_t id) const;
};
