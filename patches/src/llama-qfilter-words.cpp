// finds the words of a question in a text

#include "llama-qfilter-words.h"

#include "llama-vocab.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <unordered_map>

// the word of a token; "": it has none to search for
static std::string llama_qfilter_word(const llama_vocab & vocab, llama_token id) {
    std::string res;

    if (vocab.get_type() == LLAMA_VOCAB_TYPE_NONE || id < 0 || id >= (llama_token) vocab.n_tokens() ||
            vocab.is_control(id) || vocab.is_unknown(id)) {
        return res;
    }

    bool has_letters = false;

    // of ASCII only, whatever the locale is: other letters have more than one byte
    for (const unsigned char c : vocab.token_to_piece(id)) {
        const bool is_space = c == ' ' || (c >= '\t' && c <= '\r');
        const bool is_upper = c >= 'A' && c <= 'Z';

        if (!is_space) {
            res += is_upper ? c - 'A' + 'a' : c;
        }
        has_letters = has_letters || is_upper || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c >= 0x80;
    }

    return has_letters ? res : "";
}

std::vector<float> llama_qfilter_words(
        const llama_vocab & vocab, const std::vector<llama_token> & tokens, const std::vector<llama_token> & question, uint32_t n_near) {
    std::unordered_map<std::string, size_t> words; // of the question, numbered

    for (const llama_token id : question) {
        if (const auto word = llama_qfilter_word(vocab, id); !word.empty()) {
            words.emplace(word, words.size());
        }
    }

    std::vector<std::vector<size_t>> found(words.size()); // where each word is

    std::unordered_map<llama_token, size_t> numbers; // of a token's word; words.size(): not a word of the question

    for (size_t i = 0; i < tokens.size(); ++i) {
        auto it = numbers.find(tokens[i]);
        if (it == numbers.end()) {
            const auto word = words.find(llama_qfilter_word(vocab, tokens[i]));

            it = numbers.emplace(tokens[i], word == words.end() ? words.size() : word->second).first;
        }
        if (it->second < words.size()) {
            found[it->second].push_back(i);
        }
    }

    const size_t n_block  = 2*n_near; // tokens per block of the text: a word's frequency is the number of blocks with it
    const size_t n_blocks = (tokens.size() + n_block - 1)/n_block;

    std::vector<float> res(tokens.size(), 0.0f);

    for (const auto & at : found) {
        size_t n_with = 0;
        for (size_t i = 0; i < at.size(); ++i) {
            n_with += i == 0 || at[i]/n_block != at[i - 1]/n_block;
        }

        const float idf = std::log(1.0 + (n_blocks - n_with + 0.5)/(n_with + 0.5));

        size_t next = 0;
        for (const size_t i : at) {
            next = std::max(next, i - std::min<size_t>(i, n_near));

            for (; next < std::min<size_t>(tokens.size(), i + n_near + 1); ++next) {
                res[next] += idf;
            }
        }
    }

    return res;
}
