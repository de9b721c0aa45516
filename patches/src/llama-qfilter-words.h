#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

struct llama_vocab;

// how many of a question's words are near each token of a text, and how rare they are there: for each the inverse document
// frequencies of the different words of the question that occur within n_near tokens of it (BM25 without counts). a word is a
// token without case and spaces
std::vector<float> llama_qfilter_words(
        const llama_vocab              & vocab,
        const std::vector<llama_token> & tokens, // of the text, LLAMA_TOKEN_NULL: not known
        const std::vector<llama_token> & question,
              uint32_t                   n_near);
