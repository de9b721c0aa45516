#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

struct llama_vocab;

// how many words of a question are near each token of a text, rare words counting more: for each token, the sum of the inverse
// document frequencies of the question's different words that occur within n_near tokens of it (BM25 without counts). a word
// is a token without case and spaces
std::vector<float> llama_qfilter_words(
        const llama_vocab              & vocab,
        const std::vector<llama_token> & tokens, // of the text, LLAMA_TOKEN_NULL: unknown
        const std::vector<llama_token> & question,
              uint32_t                   n_near);
