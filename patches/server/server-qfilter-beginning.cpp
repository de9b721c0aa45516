// what comes before the first user message: see qfllama/beginning.py

#include "server-qfilter.h"

#include "chat.h"
#include "common.h"

#include <algorithm>
#include <regex>
#include <string>

// bytes of a message that are looked for, and of a prompt, besides the system prompt, in which they are looked for
static const size_t SERVER_QFILTER_LOOKED_FOR = 64;
static const size_t SERVER_QFILTER_MORE       = 1 << 16;

// a cut text may be shorter by the rest of a character
static const size_t SERVER_QFILTER_CUT = SERVER_QFILTER_LOOKED_FOR - 3;

static std::string server_qfilter_text(const common_chat_msg & message) {
    const auto & text = !message.content.empty() || message.content_parts.empty() ? message.content : message.content_parts[0].text;

    const char * space = " \t\n\v\f\r";

    const size_t i0 = text.find_first_not_of(space);

    return i0 == std::string::npos ? "" : text.substr(i0, text.find_last_not_of(space) + 1 - i0);
}

static std::string server_qfilter_begin(const common_chat_msg & message) {
    auto res = server_qfilter_text(message);

    if (res.size() > SERVER_QFILTER_LOOKED_FOR) {
        size_t n = SERVER_QFILTER_LOOKED_FOR;
        while (n > SERVER_QFILTER_CUT && (res[n] & 0xc0) == 0x80) {
            n--;
        }
        res.resize(n);
    }
    return res;
}

common_json server_qfilter_texts(const std::vector<common_chat_msg> & messages) {
    std::string system;

    size_t i = 0;
    for (; i < messages.size() && (messages[i].role == "system" || messages[i].role == "developer"); ++i) {
        auto text = server_qfilter_text(messages[i]);
        if (!text.empty()) {
            system = std::move(text);
        }
    }

    common_json res = common_json::array();

    res.push_back(system);
    for (size_t j = i; j < i + 2; ++j) {
        res.push_back(j < messages.size() ? server_qfilter_begin(messages[j]) : "");
    }
    return res;
}

int32_t server_qfilter::before_user(const llama_vocab * vocab, const server_tokens & input, const json & texts) {
    if (!texts.is_array() || texts.size() != 3) {
        return 0; // not a chat
    }

    const auto system = texts[0].get<std::string>();
    const auto user   = texts[1].get<std::string>();
    const auto after  = texts[2].get<std::string>();

    const auto npos = std::string::npos;

    std::string         text;
    std::vector<size_t> ends; // of the tokens

    size_t begin = system.empty() ? 0 : npos; // where the system prompt ends
    size_t first = npos;                      // the first place of the user's text
    size_t stop  = npos;                      // the place of the message after it

    for (size_t i = 0; i < input.size() && input[i] != LLAMA_TOKEN_NULL; ++i) {
        const size_t seen = text.size() - std::min(text.size(), SERVER_QFILTER_LOOKED_FOR);

        text += common_token_to_piece(vocab, input[i], true);
        ends.push_back(text.size());

        if (begin == npos) {
            const size_t found = text.find(system, seen - std::min(seen, system.size()));
            begin = found == npos ? npos : found + system.size();
        }
        if (begin != npos && first == npos && !user.empty()) {
            first = text.find(user, std::max(begin, seen));
        }
        if (first != npos && !after.empty()) {
            stop = text.find(after, std::max(first + user.size(), seen));
        }

        const bool found_all = (begin != npos && user.empty()) || stop != npos || (first != npos && user.size() > SERVER_QFILTER_CUT);
        if (found_all || text.size() > SERVER_QFILTER_MORE + system.size()) {
            break;
        }
    }

    // a short text may be in the system prompt or the tools, too
    if (first != npos && user.size() <= SERVER_QFILTER_CUT) {
        const size_t last = text.rfind(user, stop == npos ? npos : stop - std::min(stop, user.size()));
        first = last == npos || last < begin ? first : last;
    }

    const size_t end = first != npos ? first : begin != npos ? begin : 0;

    return std::upper_bound(ends.begin(), ends.end(), end) - ends.begin();
}

size_t server_qfilter_header_end(const std::string & text, const std::string & header) {
    static const std::regex date(
        "([A-Z][a-z]+day,? )?([0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{1,2} [A-Z][a-z]+ [0-9]{4}|[A-Z][a-z]+ [0-9]{1,2}, [0-9]{4})");

    size_t at   = 0; // in text
    auto   rest = header.begin();

    while (true) {
        std::smatch old;
        const bool dated = std::regex_search(rest, header.end(), old, date);
        const auto part  = std::string(rest, dated ? old[0].first : header.end());

        if (text.compare(at, part.size(), part) != 0) {
            return std::string::npos;
        }
        at += part.size();

        std::smatch now;
        if (!dated) {
            return at;
        }
        if (!std::regex_search(text.begin() + at, text.end(), now, date, std::regex_constants::match_continuous)) {
            return std::string::npos;
        }
        at  += now.length();
        rest = old[0].second;
    }
}
