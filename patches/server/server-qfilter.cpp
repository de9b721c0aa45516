#include "server-qfilter.h"

#include "server-task.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <stdexcept>

// a question has at least this many tokens, even if fewer tokens of the prompt are new: see qfllama/recalling.py
static const int32_t SERVER_QFILTER_LEAST_QUESTION = 16;

// starting again from --state is preferred to cutting the cache back if at most this many tokens have to be read again
static const int32_t SERVER_QFILTER_SHORT = 64;

//
// statistics
//

void server_qfilter_stats::add_to(common_json & timings) const {
    if (!bounded) {
        return;
    }

    timings["kv_cells"]  = n_cells;
    timings["reread"]    = n_reread;
    timings["recalled"]  = n_recalled;
    timings["recall_ms"] = t_recall_us/1000.0;
}

std::string server_qfilter_metrics::to_metrics() const {
    if (stats.struct_size == 0) {
        return "";
    }

    const uint64_t n_bytes_saved = stats.n_bytes_kv_full > stats.n_bytes_kv ? stats.n_bytes_kv_full - stats.n_bytes_kv : 0;

    const struct {
        const char * name;
        const char * type;
        const char * help;
        double       value;
    } items[] = {
        { "kv_evictions_total",         "counter", "Evictions of one conversation",                            (double) stats.n_evictions },
        { "kv_dropped_cells_total",     "counter", "Cells that evictions freed",                               (double) stats.n_dropped },
        { "kv_eviction_seconds_total",  "counter", "Time spent on evictions",                                  (stats.t_score_us + stats.t_select_us + stats.t_gather_us)/1e6 },
        { "kv_recalls_total",           "counter", "Questions that evicted tokens were brought back for",      (double) stats.n_recalls },
        { "kv_recalled_tokens_total",   "counter", "Tokens that were brought back",                            (double) n_recalled },
        { "kv_recall_seconds_total",    "counter", "Time spent on it, without reading questions once more",    stats.t_recall_us/1e6 },
        { "kv_reread_tokens_total",     "counter", "Tokens read again since the cache could not go back to them", (double) n_reread },
        { "kv_cells_used",              "gauge",   "Cells in use",                                             (double) stats.n_cells_used },
        { "kv_cells",                   "gauge",   "Cells of all conversations",                               (double) stats.n_cells },
        { "kv_bytes",                   "gauge",   "Bytes of the KV cache",                                    (double) stats.n_bytes_kv },
        { "kv_saved_bytes",             "gauge",   "Bytes that the whole cache would need more",               (double) n_bytes_saved },
        { "kv_archived_tokens",         "gauge",   "Tokens in the archive",                                    (double) stats.n_archived },
        { "kv_archive_bytes",           "gauge",   "Bytes of host memory, or of a file, that hold them",       (double) stats.n_bytes_archive },
    };

    std::string res;
    for (const auto & item : items) {
        res += string_format("# HELP llamacpp:%s %s\n# TYPE llamacpp:%s %s\nllamacpp:%s %.17g\n",
                item.name, item.help, item.name, item.type, item.name, item.value);
    }
    return res;
}

common_json server_qfilter_props(const common_params & params) {
    const auto & qf = params.qfilter;
    if (!qf.bounded()) {
        return nullptr;
    }

    return common_json::object({
        { "max_length",    qf.max_length    },
        { "window_length", qf.window_length },
        { "sinks",         qf.sinks         },
        { "interval",      qf.interval      },
        { "policy",        qf.policy        },
        { "archive",       qf.archive       },
        { "recall",        qf.archive && qf.recall },
    });
}

uint64_t server_qfilter::update(int32_t id, server_qfilter_stats & stats) const {
    if (!bounded) {
        return 0;
    }

    stats.bounded = true;
    stats.n_cells = seq_stats(id).n_cells_used;

    return stats.n_cells;
}

void server_qfilter::update(server_qfilter_metrics & metrics) const {
    metrics.stats.struct_size = sizeof(metrics.stats);

    if (!bounded || !llama_qfilter_get_stats(ctx, &metrics.stats)) {
        metrics.stats.struct_size = 0;
    }

    metrics.n_reread   = n_reread;
    metrics.n_recalled = n_recalled;
}

llama_qfilter_seq_stats server_qfilter::seq_stats(int32_t id) const {
    llama_qfilter_seq_stats res = {};

    res.struct_size = sizeof(res);
    llama_qfilter_get_seq_stats(ctx, id, &res);

    return res;
}

//
// start
//

bool server_qfilter::init(llama_context * ctx, const common_params & params, int32_t n_slots) {
    llama_qfilter_stats stats = {};
    stats.struct_size = sizeof(stats);

    const auto & qf = params.qfilter;

    this->ctx = ctx;

    bounded = llama_qfilter_get_stats(ctx, &stats);
    if (!bounded) {
        return true;
    }

    n_cells         = qf.max_length;
    interval        = qf.interval;
    n_bytes_archive = stats.n_bytes_archive_limit;
    recall_queries  = qf.recall && n_bytes_archive > 0 ? std::min(qf.recall_queries, std::max(1, n_cells/2)) : 0;

    questions.assign(n_slots, -1);

    try {
        if (!qf.state.empty() && start.empty()) { // it is already loaded when the server wakes from sleep
            load_start(qf.state);
        }
    } catch (const std::exception & err) {
        SRV_ERR("%s\n", err.what());
        return false;
    }

    return true;
}

// the same as zlib.crc32()
static uint32_t server_qfilter_crc32(uint32_t crc, const void * data, size_t size) {
    static const auto table = [] {
        std::array<uint32_t, 256> res;
        for (uint32_t i = 0; i < res.size(); ++i) {
            res[i] = i;
            for (int j = 0; j < 8; ++j) {
                res[i] = (res[i] >> 1) ^ (res[i] & 1 ? 0xedb88320u : 0);
            }
        }
        return res;
    }();

    crc = ~crc;
    for (size_t i = 0; i < size; ++i) {
        crc = (crc >> 8) ^ table[(crc ^ ((const uint8_t *) data)[i]) & 0xff];
    }
    return ~crc;
}

// the format is described in qfllama/state.py. `qfllama serve` has checked that the file belongs to the model; the engine
// checks the state
void server_qfilter::load_start(const std::string & path) {
    std::ifstream in(path, std::ios::binary);

    char     magic[8];
    uint32_t head[2]; // version, CRC-32
    uint64_t sizes[4] = { 0, 0, 0, 0 };

    if (!in.read(magic, sizeof(magic)) || memcmp(magic, "QFSTATE", 8) != 0 || !in.read((char *) head, sizeof(head))) {
        throw std::runtime_error(path + " is not a state file: make one with `qfllama compress`");
    }
    if (head[0] < 1 || head[0] > 2) {
        throw std::runtime_error(string_format("%s has version %u, this program reads versions up to 2: upgrade", path.c_str(), head[0]));
    }

    const auto pos = in.tellg();
    in.seekg(0, std::ios::end);
    const uint64_t n_left = in.tellg() - pos;
    in.seekg(pos);

    const size_t n_sizes = head[0] == 1 ? 3 : 4;
    in.read((char *) sizes, n_sizes*sizeof(sizes[0]));

    uint64_t n_all = n_sizes*sizeof(sizes[0]);
    bool     fits  = (bool) in;
    for (const auto size : sizes) {
        fits   = fits && size <= n_left;
        n_all += fits ? size : 0;
    }
    if (!fits || n_all != n_left || sizes[1] % sizeof(llama_token) != 0) {
        throw std::runtime_error(path + " is truncated or damaged: make it again with `qfllama compress`");
    }

    std::string about(sizes[0], 0);

    start.resize(sizes[1]/sizeof(llama_token));
    start_state.resize(sizes[2]);
    start_archive.resize(sizes[3]);

    in.read(about.data(),                  sizes[0]);
    in.read((char *) start.data(),         sizes[1]);
    in.read((char *) start_state.data(),   sizes[2]);
    in.read((char *) start_archive.data(), sizes[3]);
    if (!in) {
        throw std::runtime_error("cannot read " + path);
    }

    try {
        const json chat = json::parse(about).at("extra").at("chat");

        start_header = json_value(chat, "header", std::string());
        start_system = json_value(chat, "system", std::string());
    } catch (const std::exception & err) {
        throw std::runtime_error(path + " holds no document for a chat: make one with `qfllama compress`");
    }

    uint32_t crc = 0;
    crc = server_qfilter_crc32(crc, sizes,                n_sizes*sizeof(sizes[0]));
    crc = server_qfilter_crc32(crc, about.data(),         sizes[0]);
    crc = server_qfilter_crc32(crc, start.data(),         sizes[1]);
    crc = server_qfilter_crc32(crc, start_state.data(),   sizes[2]);
    crc = server_qfilter_crc32(crc, start_archive.data(), sizes[3]);
    if (crc != head[1] || start.empty()) {
        throw std::runtime_error(path + " is truncated or damaged: make it again with `qfllama compress`");
    }

    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    if (std::any_of(start.begin(), start.end(), [&](llama_token token) { return token < 0 || token >= n_vocab; })) {
        throw std::runtime_error(path + " has tokens that the model does not have: make it again with `qfllama compress`");
    }

    if (start.size() >= llama_n_ctx_seq(ctx)) {
        throw std::runtime_error(string_format("%s has %zu tokens, a conversation %u: use a larger -c", path.c_str(), start.size(), llama_n_ctx_seq(ctx)));
    }
    if (n_bytes_archive == 0) {
        start_archive.clear();
    }

    // restore the state once to see that it works
    if (llama_qfilter_state_seq_set_data(ctx, start_state.data(), start_state.size(), 0, LLAMA_QFILTER_STATE_RESIZE) == 0) {
        throw std::runtime_error(path + " can't be used: " + llama_qfilter_last_error());
    }
    const bool fits_tokens = llama_memory_seq_pos_max(llama_get_memory(ctx), 0) + 1 == (llama_pos) start.size();

    llama_memory_seq_rm(llama_get_memory(ctx), 0, -1, -1);
    if (!fits_tokens) {
        throw std::runtime_error(path + " has another number of tokens than its state: make it again with `qfllama compress`");
    }

    SRV_INF("conversations start from %s: %zu tokens\n", path.c_str(), start.size());
}

//
// going on from what the cache has
//

size_t server_qfilter::n_reusable(llama_context * ctx, int32_t id, const server_prompt & prompt, size_t n_same) {
    const int64_t limit = id < 0 ? prompt.n_rewind : llama_qfilter_rewind_limit(ctx, id); // -1: not bounded

    if (n_same >= prompt.tokens.size() || (int64_t) n_same >= limit) {
        return n_same;
    }

    size_t res = 0;
    for (const auto & checkpoint : prompt.checkpoints) {
        if ((size_t) checkpoint.n_tokens <= n_same) {
            res = std::max<size_t>(res, checkpoint.n_tokens);
        }
    }
    return res;
}

llama_pos server_qfilter::rewind_limit(int32_t id) const {
    return std::max(0, llama_qfilter_rewind_limit(ctx, id));
}

bool server_qfilter::may_recall(int32_t id, int32_t n) const {
    const auto stats = seq_stats(id);

    const bool incomplete = stats.pos_max + 1 > (int64_t) stats.n_cells_used;

    return recall_queries > 0 && (incomplete || (int64_t) stats.n_cells_used + n > n_cells);
}

bool server_qfilter::begins_with_start(const server_tokens & input) const {
    if (start.empty() || start.size() >= input.size()) {
        return false;
    }

    const auto & tokens = input.get_tokens();

    return std::equal(start.begin(), start.end(), tokens.begin());
}

server_tokens server_qfilter::begin(const llama_vocab * vocab, const json & prompt, bool is_chat, server_tokens && plain) const {
    if (!is_chat || start_header.empty() || !prompt.is_string() || begins_with_start(plain)) {
        return std::move(plain);
    }

    const auto text = prompt.get<std::string>();
    const auto end  = server_qfilter_header_end(text, start_header);
    if (end == std::string::npos) {
        throw std::invalid_argument("conversations of this server start from a document that was read with " +
                (start_system.empty() ? "no system prompt: leave out the system message" : "another system prompt: send the message \"" + start_system + "\""));
    }

    // see Conversation._tokenize_on() in qfllama/conversation.py
    const auto more  = "\n\n" + text.substr(end);
    const auto colon = common_tokenize(vocab, ":", false, true);

    auto rest = common_tokenize(vocab, ":" + more, false, true);
    if (rest.size() >= colon.size() && std::equal(colon.begin(), colon.end(), rest.begin())) {
        rest.erase(rest.begin(), rest.begin() + colon.size());
    } else {
        rest = common_tokenize(vocab, more, false, true);
    }

    llama_tokens all = start;
    all.insert(all.end(), rest.begin(), rest.end());

    return server_tokens(all, false);
}

bool server_qfilter::begin_at_start(int32_t id, server_prompt & prompt, const server_tokens & input) {
    if (!begins_with_start(input)) {
        return false;
    }

    prompt.clear();

    if (llama_qfilter_state_seq_set_data(ctx, start_state.data(), start_state.size(), id, LLAMA_QFILTER_STATE_RESIZE) == 0) {
        SRV_WRN("slot %d can't start from the state: %s\n", id, llama_qfilter_last_error());
        return false;
    }
    if (!start_archive.empty() && llama_qfilter_archive_set_data(ctx, id, start_archive.data(), start_archive.size()) == 0) {
        SRV_WRN("slot %d starts without the archive: %s\n", id, llama_qfilter_last_error());
    }

    prompt.tokens.insert(start);
    return true;
}

int32_t server_qfilter::reuse(
        int32_t id, server_prompt & prompt, const server_tokens & input, int32_t n_same, int32_t n_first, server_qfilter_stats & stats) {
    if (!bounded) {
        return n_same;
    }

    auto * mem = llama_get_memory(ctx);

    questions[id] = -1;

    const int32_t n = input.size();

    // the last token is always read again, for its logits. after a failure the cache may have fewer tokens than the prompt says
    const int32_t n_have   = llama_memory_seq_pos_max(mem, id) + 1;
    const int32_t n_wanted = std::max(0, std::min({ n_same, n - 1, n_have }));

    int32_t n_past = n_wanted;

    bool done = false;

    // a new conversation about the document of --state starts from that file, as the first one did
    if (n_wanted < n_have || n_have == 0) {
        done = n_wanted - (int32_t) start.size() <= SERVER_QFILTER_SHORT && begin_at_start(id, prompt, input);
    }
    if (done) {
        n_past = start.size();
    } else if (!prompt.tokens.empty()) {
        done = n_past > 0 && (n_past == n_have || (n_past >= rewind_limit(id) && llama_memory_seq_rm(mem, id, n_past, -1)));
    }

    while (!done && !prompt.checkpoints.empty()) {
        const auto & checkpoint = prompt.checkpoints.back();

        done = checkpoint.n_tokens > 0 && checkpoint.n_tokens <= n_wanted &&
            llama_qfilter_state_seq_set_data(ctx, checkpoint.data_tgt.data(), checkpoint.data_tgt.size(), id, LLAMA_QFILTER_STATE_KEEP_ARCHIVE) > 0;
        if (done) {
            n_past = checkpoint.n_tokens;
        } else {
            prompt.checkpoints.pop_back();
        }
    }

    if (!done && begin_at_start(id, prompt, input)) {
        done   = true;
        n_past = start.size();
    }

    if (!done) {
        llama_memory_seq_rm(mem, id, -1, -1);
        prompt.clear();
        n_past = 0;
    }

    stats.n_reread = n_wanted - n_past > SERVER_QFILTER_SHORT || start.empty() ? std::max(0, n_wanted - n_past) : 0;
    n_reread += stats.n_reread;

    if (may_recall(id, n - n_past)) {
        // a question has more than just the last token, but never the first one
        const int32_t n_back = std::max(1, n - std::min(recall_queries, SERVER_QFILTER_LEAST_QUESTION));

        if (n_back < n_past && n_back >= rewind_limit(id) && llama_memory_seq_rm(mem, id, n_back, -1)) {
            n_past = n_back;
        }

        questions[id] = n - std::min(recall_queries, n - n_past);
    }

    const int32_t n_stay = llama_qfilter_keep_first(ctx, id, n_first);

    if (n_past == 0 && n_stay < n_first) {
        SRV_WRN("slot %d: of %d tokens before the first user message only %d always stay: use a larger --max-length or --archive-limit\n",
                id, n_first, n_stay);
    }

    // checkpoints with tokens of the old prompt are of no use any more
    prompt.checkpoints.remove_if([&](const auto & checkpoint) { return checkpoint.n_tokens > n_past; });

    return n_past;
}

int32_t server_qfilter::n_batch(int32_t id, int32_t n_done, int32_t n) const {
    if (!bounded) {
        return n - n_done;
    }

    const int32_t room = llama_qfilter_room(ctx, id);

    const int32_t res = std::min(n - n_done, room > 0 ? room : interval);

    return n_done < questions[id] ? std::min(res, questions[id] - n_done) : res;
}

//
// recall
//

bool server_qfilter::decode(int32_t id, const server_tokens & input, int32_t begin, int32_t end) const {
    common_batch batch(ctx);

    while (begin < end) {
        const int32_t n = std::min(n_batch(id, begin, end), (int32_t) llama_n_batch(ctx));

        batch.clear();
        for (int32_t i = 0; i < n; ++i) {
            batch.add(input[begin + i], begin + i, id, false);
        }
        if (llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch.get()) != 0) {
            return false;
        }
        begin += n;
    }

    return true;
}

bool server_qfilter::recall(int32_t id, std::vector<common_adapter_lora_info> & lora, const server_tokens & input, server_qfilter_stats & stats) {
    const int32_t n      = input.size();
    const int32_t n_done = questions[id];

    questions[id] = -1; // asked

    common_set_adapter_lora(ctx, lora);

    const int64_t t_start = ggml_time_us();

    auto * mem = llama_get_memory(ctx);

    bool done = llama_qfilter_question(ctx, id) >= 0;
    if (done) {
        done = decode(id, input, n_done, n);
        if (done) {
            const int32_t n_again = llama_qfilter_recall(ctx, id, 0);

            done = n_again >= 0;

            stats.n_recalled = n_again > 0 ? std::max(0, llama_qfilter_recalled(ctx, id, nullptr, 0)) : 0;
        } else {
            llama_qfilter_question(ctx, -1);
        }
    }
    if (!done) {
        SRV_WRN("slot %d: no recall: %s\n", id, llama_qfilter_last_error());
    }

    stats.t_recall_us = ggml_time_us() - t_start;
    n_recalled += stats.n_recalled;

    // if nothing was brought back, the question is still in the cache; it is removed and read once more all the same
    const llama_pos pos_next = llama_memory_seq_pos_max(mem, id) + 1;

    if (pos_next == n_done || (pos_next > n_done && llama_memory_seq_rm(mem, id, n_done, -1))) {
        return true;
    }

    stats.n_reread += n_done;
    n_reread       += n_done;

    return false;
}

std::string server_qfilter::reason() {
    const std::string why = llama_qfilter_last_error();

    return why.empty() ? "" : " (" + why + ")";
}

//
// states
//

size_t server_qfilter::size(llama_context * ctx, llama_seq_id id) {
    return llama_state_seq_get_size_ext(ctx, id, LLAMA_STATE_SEQ_FLAGS_NONE) + llama_qfilter_archive_get_data(ctx, id, nullptr, 0);
}

size_t server_qfilter::get(llama_context * ctx, uint8_t * dst, size_t size, llama_seq_id id) {
    const size_t n = llama_state_seq_get_data_ext(ctx, dst, size, id, LLAMA_STATE_SEQ_FLAGS_NONE);

    return n + (n < size ? llama_qfilter_archive_get_data(ctx, id, dst + n, size - n) : 0);
}

size_t server_qfilter::set(llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id id) {
    const size_t n = llama_state_seq_set_data_ext(ctx, src, size, id, LLAMA_STATE_SEQ_FLAGS_NONE);
    if (n == 0 || n == size) {
        return n;
    }

    if (llama_qfilter_archive_set_data(ctx, id, src + n, size - n) == 0) {
        SRV_WRN("slot %d goes on without its archive: %s\n", id, llama_qfilter_last_error());
    }
    return size;
}

size_t server_qfilter::save_archive(llama_context * ctx, llama_seq_id id, const std::string & path, size_t n) {
    std::vector<uint8_t> data(llama_qfilter_archive_get_data(ctx, id, nullptr, 0));
    if (n == 0 || data.empty()) {
        return n;
    }

    llama_qfilter_archive_get_data(ctx, id, data.data(), data.size());

    std::ofstream out(path, std::ios::binary | std::ios::app);
    if (!out.write((const char *) data.data(), data.size()).flush()) {
        return 0;
    }
    return n + data.size();
}

size_t server_qfilter::load_archive(llama_context * ctx, llama_seq_id id, const std::string & path, size_t n) {
    if (n == 0 || llama_qfilter_archive_get_data(ctx, id, nullptr, 0) == 0) {
        return n; // the context has no archive
    }

    std::ifstream in(path, std::ios::binary);
    in.seekg(n);

    const std::vector<uint8_t> data((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (data.empty()) {
        return n;
    }

    if (llama_qfilter_archive_set_data(ctx, id, data.data(), data.size()) == 0) {
        SRV_WRN("slot %d goes on without its archive: %s\n", id, llama_qfilter_last_error());
    }
    return n + data.size();
}

std::unique_ptr<server_task_result> server_qfilter_stopped() {
    auto res = std::make_unique<server_task_result_error>();
    res->err_type = ERROR_TYPE_UNAVAILABLE;
    res->err_msg  = "the server is ending";
    return res;
}
