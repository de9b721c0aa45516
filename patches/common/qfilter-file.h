// the vectors that `qfllama convert` puts into a GGUF file, see qfllama/schema.py
#pragma once

#include "qfilter.h"

#include <string>
#include <vector>

struct common_qfilter_file {
    int32_t policy = -1; // enum llama_qfilter_policy

    std::vector<llama_qfilter_vectors> vectors; // point to data

    std::vector<std::vector<float>> data;
};

// read the vectors that a policy needs from the file of a model; an empty name: the policy that the file names, else qblend
// throws std::runtime_error, with one line that says what to do, if the file has no filters or is damaged, or if its filters
// are of a newer version or were made for other weights
common_qfilter_file common_qfilter_read(const llama_model * model, const std::string & path, const std::string & policy);
