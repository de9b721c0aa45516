// the bounded cache in llama-server: reuse of what the cache has, and recall for questions
#pragma once

#include "server-common.h"

#include "server-qfilter-stats.h"

#include <string>
#include <vector>

struct server_prompt;

struct server_qfilter {
    // false, with a note in the log: the file given with --state can't be used
    bool init(llama_context * ctx, const common_params & params, int32_t n_slots);

    // the tokens of a prompt: those in plain, except for chats that start from a document. the document goes before the first
    // message. throws std::invalid_argument if the prompt can't follow the document. may be called by any thread
    server_tokens begin(const llama_vocab * vocab, const json & prompt, bool is_chat, server_tokens && plain) const;

    // how many tokens of a prompt come before the text of the first user message: system prompt, tools. texts: see
    // server_qfilter_texts(), null for a prompt that is no chat
    static int32_t before_user(const llama_vocab * vocab, const server_tokens & input, const json & texts);

    // prepare a slot for a new prompt; it already has the first n_same tokens of it. cut the slot back, or restore the nearest
    // checkpoint or --state. the first n_first tokens will always stay. returns the number of tokens that need not be read again
    int32_t reuse(int32_t id, server_prompt & prompt, const server_tokens & input, int32_t n_same, int32_t n_first, server_qfilter_stats & stats);

    // how many tokens of a prompt may be read in the next batch; the prompt has n, and n_done have been read. evictions come at
    // the same positions as when reading token by token, and a question gets its own batches
    int32_t n_batch(int32_t id, int32_t n_done, int32_t n) const;

    // is the question at the end of the prompt to be read next?
    bool asks(int32_t id, int32_t n_done) const { return bounded && n_done == questions[id]; }

    // read the question, bring back the rows that it looks at, and remove the question, as if it had not been read yet
    // false: the question could not be removed, the whole prompt has to be read again
    bool recall(int32_t id, std::vector<common_adapter_lora_info> & lora, const server_tokens & input, server_qfilter_stats & stats);

    // make checkpoints? they are unnecessary with an archive, if no layer is windowed
    bool needs_checkpoints() const { return bounded && n_bytes_archive == 0; }

    // call them after a decode: the context must not be queried while it computes
    // the first one returns the cells that a slot uses, 0: the cache is not bounded
    uint64_t update(int32_t id, server_qfilter_stats & stats) const;
    void update(server_qfilter_metrics & metrics) const;

    // a new prompt shares the first n_same tokens of this prompt: how many of them need not be read again? id: the slot that
    // holds this prompt, -1: it is in the prompt cache
    static size_t n_reusable(llama_context * ctx, int32_t id, const server_prompt & prompt, size_t n_same);

    // the engine's last error in brackets, or an empty string
    static std::string reason();

    //
    // states, each followed by its archive; like upstream's functions if the cache is not bounded
    //

    static size_t size(llama_context * ctx, llama_seq_id id);
    static size_t get (llama_context * ctx,       uint8_t * dst, size_t size, llama_seq_id id);
    static size_t set (llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id id); // 0: refused

    // append a slot's archive to a file, or read it from there; the first n bytes of the file are upstream's state
    // returns the bytes of the file
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

    std::vector<int32_t> questions; // by slot: where its question begins, -1: no question, or it was asked already

    // contents of the file given with --state
    llama_tokens         start;
    std::string          start_header; // what a chat template puts before the document; empty: unknown
    std::string          start_system;
    std::vector<uint8_t> start_state;
    std::vector<uint8_t> start_archive;

    void load_start(const std::string & path);

    bool begins_with_start(const server_tokens & input) const;

    // false: the prompt does not begin with the document, or the engine refused its state
    bool begin_at_start(int32_t id, server_prompt & prompt, const server_tokens & input);

    bool decode(int32_t id, const server_tokens & input, int32_t begin, int32_t end) const;

    // after n more tokens, could there be evicted rows to recall?
    bool may_recall(int32_t id, int32_t n) const;

    llama_qfilter_seq_stats seq_stats(int32_t id) const;

    llama_pos rewind_limit(int32_t id) const;
};

// where this header ends, if a prompt begins with it; npos: it does not. templates put the day into it: another day makes no difference
size_t server_qfilter_header_end(const std::string & text, const std::string & header);
