#include "qfilter-file.h"

#include "common.h"

#include "ggml.h"
#include "gguf.h"
#include "hash/hash.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>

static const uint32_t COMMON_QFILTER_VERSION = 3;

static const char * COMMON_QFILTER_AGAIN = "run `qfllama convert` again";

struct common_qfilter_gguf {
    std::string path;

    ggml_context * meta = nullptr;
    gguf_context * gguf = nullptr;

    explicit common_qfilter_gguf(const std::string & path) : path(path) {
        gguf = gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ &meta });
        if (!gguf) {
            throw std::runtime_error("cannot read " + path + ": it is not a GGUF file, or it is damaged");
        }
    }

    ~common_qfilter_gguf() {
        gguf_free(gguf);
        ggml_free(meta);
    }

    common_qfilter_gguf(const common_qfilter_gguf &) = delete;

    int64_t find(const std::string & name) const {
        return gguf_find_key(gguf, ("qfilters." + name).c_str());
    }

    // the id of a key with this type; for an array, type is that of its elements
    int64_t need(const std::string & name, gguf_type type, bool is_array) const {
        const int64_t id = find(name);

        const bool fits = id >= 0 && (gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY) == is_array &&
            (is_array ? gguf_get_arr_type(gguf, id) : gguf_get_kv_type(gguf, id)) == type;
        if (!fits) {
            throw std::runtime_error(string_format("%s: qfilters.%s %s; %s", path.c_str(), name.c_str(),
                        id < 0 ? "is missing" : "has the wrong type", COMMON_QFILTER_AGAIN));
        }

        return id;
    }

    uint32_t u32(const std::string & name) const {
        return gguf_get_val_u32(gguf, need(name, GGUF_TYPE_UINT32, false));
    }

    std::string str(const std::string & name) const {
        return gguf_get_val_str(gguf, need(name, GGUF_TYPE_STRING, false));
    }

    template <typename T>
    std::vector<T> array(const std::string & name, gguf_type type) const {
        const int64_t id   = need(name, type, true);
        const auto *  data = (const T *) gguf_get_arr_data(gguf, id);

        return std::vector<T>(data, data + gguf_get_arr_n(gguf, id));
    }
};

// the paths of all files of a model, which may be split
static std::vector<std::string> common_qfilter_parts(const std::string & path) {
    const common_qfilter_gguf first(path);

    const int64_t id = gguf_find_key(first.gguf, "split.count");
    const int     n  = id >= 0 && gguf_get_kv_type(first.gguf, id) == GGUF_TYPE_UINT16 ? gguf_get_val_u16(first.gguf, id) : 1;

    std::vector<std::string> res = { path };
    std::vector<char>        name(path.size() + 64);

    if (n > 1) {
        if (llama_split_prefix(name.data(), name.size(), path.c_str(), 0, n) == 0) {
            throw std::runtime_error(path + " is not the first part of a split model: give that one");
        }
        const std::string prefix = name.data();

        for (int i = 1; i < n; ++i) {
            llama_split_path(name.data(), name.size(), prefix.c_str(), i, n);
            res.push_back(name.data());
        }
    }

    return res;
}

template <typename T>
static void common_qfilter_put(std::string & out, T value) {
    out.append((const char *) &value, sizeof(value));
}

// the fingerprint of a model's tensors, see qfllama/fingerprint.py
static std::string common_qfilter_fingerprint(const std::string & path) {
    static const size_t n_sample = 4096;

    std::map<std::string, std::string> tensors; // by name

    for (const auto & part : common_qfilter_parts(path)) {
        const common_qfilter_gguf file(part);

        std::ifstream in(part, std::ios::binary);
        std::string   sample;

        for (int64_t i = 0; i < gguf_get_n_tensors(file.gguf); ++i) {
            const std::string name = gguf_get_tensor_name(file.gguf, i);
            const auto *      t    = ggml_get_tensor(file.meta, name.c_str());
            const uint32_t    n    = ggml_n_dims(t);

            auto & out = tensors[name];

            common_qfilter_put(out, (uint64_t) name.size());
            out += name;
            common_qfilter_put(out, (uint32_t) t->type);
            common_qfilter_put(out, n);
            for (uint32_t j = 0; j < n; ++j) {
                common_qfilter_put(out, (uint64_t) t->ne[j]);
            }

            const size_t n_bytes = gguf_get_tensor_size(file.gguf, i);
            sample.resize(std::min(n_bytes, n_sample));

            in.seekg(gguf_get_data_offset(file.gguf) + gguf_get_tensor_offset(file.gguf, i) + (n_bytes - sample.size())/2);
            if (!in.read(sample.data(), sample.size())) {
                throw std::runtime_error("cannot read " + part + ": it is truncated");
            }
            out += sample;
        }
    }

    std::string all;
    for (const auto & it : tensors) {
        all += it.second;
    }

    return hash_sha256_hex(all.data(), all.size());
}

// throws std::runtime_error if the filters can't be used with this model. files before version 3 lack the keys for this
static void common_qfilter_check(const common_qfilter_gguf & file, const llama_model * model) {
    const char * path = file.path.c_str();

    if (file.find("requires") >= 0) {
        const int64_t id = file.need("requires", GGUF_TYPE_STRING, true);

        for (size_t i = 0; i < gguf_get_arr_n(file.gguf, id); ++i) {
            const std::string name = gguf_get_arr_str(file.gguf, id, i);
            if (name != "queries" && name != "moments") {
                throw std::runtime_error(string_format("the filters in %s require %s, which this version does not know: upgrade", path, name.c_str()));
            }
        }
    }

    const char * layout = "none";
    switch (llama_model_rope_type(model)) {
        case LLAMA_ROPE_TYPE_NONE:   layout = "none";   break;
        case LLAMA_ROPE_TYPE_NORM:   layout = "norm";   break;
        case LLAMA_ROPE_TYPE_NEOX:   layout = "neox";   break;
        case LLAMA_ROPE_TYPE_MROPE:  layout = "mrope";  break;
        case LLAMA_ROPE_TYPE_IMROPE: layout = "imrope"; break;
        case LLAMA_ROPE_TYPE_VISION: layout = "vision"; break;
    }
    if (file.str("layout") != layout) {
        throw std::runtime_error(string_format("the filters in %s are for rotary pairs in the layout %s, this model has %s: %s", path,
                    file.str("layout").c_str(), layout, COMMON_QFILTER_AGAIN));
    }

    if (file.str("fingerprint") != common_qfilter_fingerprint(file.path)) {
        throw std::runtime_error(string_format("the filters in %s were made for other weights (another fine-tune or quantization): "
                    "run `qfllama convert` on this file", path));
    }
}

// one number for each layer
static std::vector<uint32_t> common_qfilter_sizes(const common_qfilter_gguf & file, const std::string & name, uint32_t version, size_t n_layer) {
    if (version < 3) {
        return std::vector<uint32_t>(n_layer, file.u32(name));
    }

    auto res = file.array<uint32_t>(name, GGUF_TYPE_UINT32);
    if (res.size() != n_layer) {
        throw std::runtime_error(string_format("%s: qfilters.%s has %zu numbers for %zu layers; %s", file.path.c_str(), name.c_str(),
                    res.size(), n_layer, COMMON_QFILTER_AGAIN));
    }
    return res;
}

// append the vectors of one kind to res
static void common_qfilter_add(common_qfilter_file & res, const common_qfilter_gguf & file, int32_t kind, uint32_t version) {
    const auto   layers  = file.array<int32_t>("layers", GGUF_TYPE_INT32);
    const size_t n_layer = layers.size();

    auto n_rows = common_qfilter_sizes(file, kind == LLAMA_QFILTER_KIND_MOMENTS ? "head_count" : "head_count_kv", version, n_layer);
    auto n_embd = common_qfilter_sizes(file, kind == LLAMA_QFILTER_KIND_LEARNED ? "learned_width" : "head_dim",   version, n_layer);

    std::string name;
    switch (kind) {
        case LLAMA_QFILTER_KIND_FILTERS: name = version < 3 ? "weight" : "filters"; break;
        case LLAMA_QFILTER_KIND_QUERIES: name = "queries"; break;
        case LLAMA_QFILTER_KIND_MOMENTS: name = "moments"; break;
        case LLAMA_QFILTER_KIND_LEARNED: name = "learned"; break;
    }
    if (kind == LLAMA_QFILTER_KIND_MOMENTS) {
        for (auto & n : n_rows) {
            n *= 1 + file.u32("rank");
        }
    }

    std::vector<float> all;
    if (kind == LLAMA_QFILTER_KIND_MOMENTS || kind == LLAMA_QFILTER_KIND_LEARNED) {
        for (const uint16_t bits : file.array<uint16_t>(name, GGUF_TYPE_UINT16)) {
            all.push_back(ggml_fp16_to_fp32(bits));
        }
    } else {
        all = file.array<float>(name, GGUF_TYPE_FLOAT32);
    }

    uint64_t n_all = 0;
    for (size_t i = 0; i < n_layer; ++i) {
        n_all += (uint64_t) n_rows[i]*n_embd[i];
    }
    if (n_layer == 0 || n_all == 0 || n_all != all.size()) {
        throw std::runtime_error(string_format("%s: qfilters.%s has %zu numbers, the shapes of its layers take %llu; %s", file.path.c_str(),
                    name.c_str(), all.size(), (unsigned long long) n_all, COMMON_QFILTER_AGAIN));
    }

    size_t begin = 0;
    for (size_t i = 0; i < n_layer; ++i) {
        std::vector<float> rows(all.begin() + begin, all.begin() + begin + (size_t) n_rows[i]*n_embd[i]);
        begin += rows.size();

        for (uint32_t j = 0; j < n_rows[i]; ++j) {
            const auto * row = rows.data() + (size_t) j*n_embd[i];

            const bool finite = std::all_of(row, row + n_embd[i], [](float x) { return std::isfinite(x); });
            const bool zero   = std::all_of(row, row + n_embd[i], [](float x) { return x == 0.0f; });

            // a learned filter that explains nothing is 0
            if (!finite || (zero && kind != LLAMA_QFILTER_KIND_MOMENTS && kind != LLAMA_QFILTER_KIND_LEARNED)) {
                throw std::runtime_error(string_format("%s: the %s of layer %d are %s; %s", file.path.c_str(), name.c_str(), layers[i],
                            finite ? "all zero" : "not finite", COMMON_QFILTER_AGAIN));
            }
        }

        res.data.push_back(std::move(rows));
        res.vectors.push_back({ kind, layers[i], n_rows[i], n_embd[i], res.data.back().data() });
    }
}

static int32_t common_qfilter_policy(const std::string & name) {
    std::string names;
    for (int32_t i = 0; const char * known = llama_qfilter_policy_name(i); ++i) {
        if (name == known) {
            return i;
        }
        names += std::string(names.empty() ? "" : ", ") + known;
    }

    throw std::runtime_error("unknown policy " + name + ": choose one of " + names);
}

common_qfilter_file common_qfilter_read(const llama_model * model, const std::string & path, const std::string & policy) {
    static const char * keys[] = { "filters", "queries", "moments", "learned" }; // by enum llama_qfilter_kind

    const common_qfilter_gguf file(path);

    const bool     any     = file.find("version") >= 0;
    const uint32_t version = any ? file.u32("version") : COMMON_QFILTER_VERSION;
    if (version > COMMON_QFILTER_VERSION) {
        throw std::runtime_error(string_format("%s has filters of version %u, this program knows version %u: upgrade", path.c_str(), version,
                    COMMON_QFILTER_VERSION));
    }

    const auto has = [&](int32_t kind) {
        return any && file.find(kind == LLAMA_QFILTER_KIND_FILTERS && version < 3 ? "weight" : keys[kind]) >= 0;
    };
    const auto takes = [&](int32_t policy, int32_t & kind) { // false: the file lacks something
        int32_t i = 0;
        while ((kind = llama_qfilter_policy_needs(policy, i)) >= 0 && !has(kind)) {
            ++i;
        }
        return (i == 0 || kind >= 0) && (!llama_qfilter_policy_learned(policy) || (kind >= 0 && has(LLAMA_QFILTER_KIND_LEARNED)));
    };

    common_qfilter_file res;
    int32_t kind = -1;

    if (policy.empty()) {
        // an unknown policy, named by a newer version, is not an error
        const std::string named = any && file.find("policy") >= 0 ? file.str("policy") : "";
        for (int32_t i = 0; const char * known = llama_qfilter_policy_name(i); ++i) {
            if (named == known && takes(i, kind)) {
                res.policy = i;
            }
        }
    }
    if (res.policy < 0) {
        res.policy = common_qfilter_policy(policy.empty() ? "qblend" : policy);
    }

    if (!takes(res.policy, kind)) {
        throw std::runtime_error(string_format("%s %s the policy %s: run `qfllama convert` on it, or use --policy keydiff, which needs none",
                    path.c_str(), any ? "lacks filters that are needed by" : "has no filters for", llama_qfilter_policy_name(res.policy)));
    }
    if (kind < 0) {
        return res; // the policy needs no vectors
    }

    if (version >= 3) {
        common_qfilter_check(file, model);
    }
    common_qfilter_add(res, file, kind, version);
    if (llama_qfilter_policy_learned(res.policy)) {
        common_qfilter_add(res, file, LLAMA_QFILTER_KIND_LEARNED, version);
    }

    return res;
}
