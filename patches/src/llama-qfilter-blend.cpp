// the scores of qblend, kvdiff and learned: rows whose value is unlike the others and whose key is, too, and their neighbours

#include "llama-qfilter-policy.h"

#include <algorithm>
#include <cmath>
#include <vector>

// the second and third pass over rows are ours: let the compiler use what the CPU has, where it can choose when we are loaded
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#    define LLAMA_QFILTER_ANY_CPU __attribute__((target_clones("arch=haswell", "default")))
#else
#    define LLAMA_QFILTER_ANY_CPU
#endif

#if defined(__GNUC__)
#    define LLAMA_QFILTER_INLINE inline __attribute__((always_inline))
#else
#    define LLAMA_QFILTER_INLINE inline
#endif

std::vector<ggml_tensor *> llama_qfilter_blend_parts(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    // an evicted row changes the output by (the output less its value) times its weight
    std::vector<ggml_tensor *> res = { llama_qfilter_square(ctx, ggml_sub(ctx, v, llama_qfilter_mean(ctx, v))) };

    ggml_tensor * proj = f ? llama_qfilter_dot(ctx, k, ggml_reshape_2d(ctx, f, f->ne[0], f->ne[3])) : nullptr;

    res.push_back(llama_qfilter_likeness(ctx, k));
    if (f) {
        res.push_back(proj);
    }

    return res;
}

//
// the same on the CPU: keys and values of a head are read twice, whatever is computed of them
//

static const int64_t LLAMA_QFILTER_N_CHUNK = 128; // rows; sums do not depend on the number of threads

// in lanes, which compilers turn into vectors
static LLAMA_QFILTER_INLINE float llama_qfilter_lanes(float * lanes) {
    for (int w = 8; w > 0; w /= 2) {
        for (int j = 0; j < w; ++j) {
            lanes[j] += lanes[j + w];
        }
    }
    return lanes[0];
}

static LLAMA_QFILTER_INLINE float llama_qfilter_vec_dot(const float * x, const float * y, int64_t n) {
    float lanes[16] = {};

    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            lanes[j] += x[i + j]*y[i + j];
        }
    }
    for (; i < n; ++i) {
        lanes[i % 16] += x[i]*y[i];
    }
    return llama_qfilter_lanes(lanes);
}

static LLAMA_QFILTER_INLINE float llama_qfilter_vec_distance(const float * x, const float * y, int64_t n) {
    float lanes[16] = {};

    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            lanes[j] += (x[i + j] - y[i + j])*(x[i + j] - y[i + j]);
        }
    }
    for (; i < n; ++i) {
        lanes[i % 16] += (x[i] - y[i])*(x[i] - y[i]);
    }
    return llama_qfilter_lanes(lanes);
}

// the keys and values of a group of heads, and where a node puts what it computes of them
struct llama_qfilter_blend_rows {
    const float * k;
    const float * v;

    int64_t n_embd_k;
    int64_t n_embd_v;
    int64_t n_head;
    int64_t n_rows;

    llama_qfilter_blend_rows(const ggml_tensor * k, const ggml_tensor * v, bool only_keys) :
        k((const float *) k->data), v((const float *) v->data),
        n_embd_k(k->ne[0]), n_embd_v(only_keys ? 0 : v->ne[0]), n_head(k->ne[1]), n_rows(k->ne[2]) {
    }

    int64_t n_chunks() const { return (n_rows + LLAMA_QFILTER_N_CHUNK - 1)/LLAMA_QFILTER_N_CHUNK; }

    const float * key  (int64_t ih, int64_t r) const { return k + (r*n_head + ih)*n_embd_k; }
    const float * value(int64_t ih, int64_t r) const { return v + (r*n_head + ih)*n_embd_v; }

    // fn(head, chunk) for the part of them that is the thread's
    template <typename F>
    void each_chunk(int ith, int nth, const F & fn) const {
        for (int64_t i = ith; i < n_head*n_chunks(); i += nth) {
            fn(i/n_chunks(), i % n_chunks());
        }
    }
};

static float llama_qfilter_blend_scale(float square) {
    return 1.0f/std::max(std::sqrt(square), 1e-12f);
}

// sums over the rows of a chunk: of keys at unit length, and of values. lengths: [n] one over the length of a key
LLAMA_QFILTER_ANY_CPU
static void llama_qfilter_blend_sum(
        const llama_qfilter_blend_rows & rows, int64_t ih, int64_t r0, int64_t r1, float * lengths, float * sum_k, float * sum_v) {
    std::fill(sum_k, sum_k + rows.n_embd_k, 0.0f);
    std::fill(sum_v, sum_v + rows.n_embd_v, 0.0f);

    for (int64_t r = r0; r < r1; ++r) {
        const float * k = rows.key  (ih, r);
        const float * v = rows.value(ih, r);

        const float scale = llama_qfilter_blend_scale(llama_qfilter_vec_dot(k, k, rows.n_embd_k));

        for (int64_t i = 0; i < rows.n_embd_k; ++i) {
            sum_k[i] += k[i]*scale;
        }
        for (int64_t i = 0; i < rows.n_embd_v; ++i) {
            sum_v[i] += v[i];
        }
        *lengths++ = scale;
    }
}

// the parts of the rows of a chunk; parts: [n_rows] from the chunk's first on, those of a head n_stride apart
LLAMA_QFILTER_ANY_CPU
static void llama_qfilter_blend_score(
        const llama_qfilter_blend_rows & rows, int64_t ih, int64_t r0, int64_t r1,
        const float * lengths, const float * mean_k, const float * mean_v, const float * f, float * parts, int64_t n_stride) {
    for (int64_t r = r0; r < r1; ++r, ++parts) {
        const float * k = rows.key(ih, r);

        parts[0]        = llama_qfilter_vec_distance(rows.value(ih, r), mean_v, rows.n_embd_v);
        parts[n_stride] = llama_qfilter_vec_dot(k, mean_k, rows.n_embd_k)**lengths++;
        if (f) {
            parts[2*n_stride] = llama_qfilter_vec_dot(k, f, rows.n_embd_k);
        }
    }
}

// [n_rows + n_chunks*(n_embd_k + n_embd_v), n_head]: lengths and sums
static void llama_qfilter_blend_op_sums(ggml_tensor * dst, int ith, int nth, void * only_keys) {
    const llama_qfilter_blend_rows rows(dst->src[0], dst->src[1], only_keys);

    rows.each_chunk(ith, nth, [&](int64_t ih, int64_t ic) {
        const int64_t r0 = ic*LLAMA_QFILTER_N_CHUNK;

        float * out  = (float *) ((char *) dst->data + ih*dst->nb[1]);
        float * sums = out + rows.n_rows + ic*(rows.n_embd_k + rows.n_embd_v);

        llama_qfilter_blend_sum(rows, ih, r0, std::min(r0 + LLAMA_QFILTER_N_CHUNK, rows.n_rows), out + r0, sums, sums + rows.n_embd_k);
    });
}

// [n_embd_k + n_embd_v, n_head]: means of keys at unit length and of values
static void llama_qfilter_blend_op_means(ggml_tensor * dst, int, int, void * only_keys) {
    const llama_qfilter_blend_rows rows(dst->src[0], dst->src[1], only_keys);

    const int64_t n_embd = rows.n_embd_k + rows.n_embd_v;

    for (int64_t ih = 0; ih < rows.n_head; ++ih) {
        const float * sums = (const float *) ((const char *) dst->src[2]->data + ih*dst->src[2]->nb[1]) + rows.n_rows;

        float * out = (float *) ((char *) dst->data + ih*dst->nb[1]);

        std::copy(sums, sums + n_embd, out);
        for (int64_t ic = 1; ic < rows.n_chunks(); ++ic) {
            for (int64_t i = 0; i < n_embd; ++i) {
                out[i] += sums[ic*n_embd + i];
            }
        }

        for (int64_t i = 0; i < n_embd; ++i) {
            out[i] /= rows.n_rows;
        }
    }
}

// [n_rows, n_head, n_parts]
static void llama_qfilter_blend_op_parts(ggml_tensor * dst, int ith, int nth, void * only_keys) {
    const llama_qfilter_blend_rows rows(dst->src[0], dst->src[1], only_keys);

    const ggml_tensor * sums  = dst->src[2];
    const ggml_tensor * means = dst->src[3];
    const ggml_tensor * f     = dst->src[4];

    rows.each_chunk(ith, nth, [&](int64_t ih, int64_t ic) {
        const int64_t r0 = ic*LLAMA_QFILTER_N_CHUNK;

        const float * mean = (const float *) ((const char *) means->data + ih*means->nb[1]);

        llama_qfilter_blend_score(rows, ih, r0, std::min(r0 + LLAMA_QFILTER_N_CHUNK, rows.n_rows),
                (const float *) ((const char *) sums->data + ih*sums->nb[1]) + r0, mean, mean + rows.n_embd_k,
                f ? (const float *) ((const char *) f->data + ih*f->nb[3]) : nullptr,
                (float *) ((char *) dst->data + ih*dst->nb[1]) + r0, dst->nb[2]/sizeof(float));
    });
}

// v: nullptr, the part of the values means nothing
static std::vector<ggml_tensor *> llama_qfilter_blend_ops(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    static char only_keys;

    void * arg = v ? nullptr : &only_keys;

    ggml_tensor * args[5] = { k, v ? v : k, nullptr, nullptr, f };

    const llama_qfilter_blend_rows rows(args[0], args[1], arg);

    const int64_t n_embd  = rows.n_embd_k + rows.n_embd_v;
    const int     n_parts = f ? 3 : 2;

    args[2] = ggml_custom_4d(ctx, GGML_TYPE_F32, rows.n_rows + rows.n_chunks()*n_embd, rows.n_head, 1, 1,
            args, 2, llama_qfilter_blend_op_sums, GGML_N_TASKS_MAX, arg);
    args[3] = ggml_custom_4d(ctx, GGML_TYPE_F32, n_embd, rows.n_head, 1, 1,
            args, 3, llama_qfilter_blend_op_means, 1, arg);

    ggml_tensor * parts = ggml_custom_4d(ctx, GGML_TYPE_F32, rows.n_rows, rows.n_head, n_parts, 1,
            args, f ? 5 : 4, llama_qfilter_blend_op_parts, GGML_N_TASKS_MAX, arg);

    std::vector<ggml_tensor *> res;
    for (int i = 0; i < n_parts; ++i) {
        res.push_back(ggml_view_2d(ctx, parts, rows.n_rows, rows.n_head, parts->nb[1], i*parts->nb[2]));
    }

    return res;
}

std::vector<ggml_tensor *> llama_qfilter_blend_parts_cpu(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    return llama_qfilter_blend_ops(ctx, k, v, f);
}

std::vector<ggml_tensor *> llama_qfilter_score_keydiff_cpu(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    GGML_UNUSED(v);
    GGML_UNUSED(f);

    return { ggml_scale(ctx, llama_qfilter_blend_ops(ctx, k, nullptr, nullptr)[1], -1.0f) };
}

// y += weight*(x less its mean, divided by its deviation)
static void llama_qfilter_blend_add(const float * x, uint32_t n, float weight, float * y) {
    double sum = 0.0;
    for (uint32_t i = 0; i < n; ++i) {
        sum += x[i];
    }
    const float mean = sum/n;

    double square = 0.0;
    for (uint32_t i = 0; i < n; ++i) {
        square += (x[i] - mean)*(x[i] - mean);
    }
    const float scale = weight/std::sqrt((float) (square/n) + 1e-12f);

    for (uint32_t i = 0; i < n; ++i) {
        y[i] += (x[i] - mean)*scale;
    }
}

void llama_qfilter_blend(const float * parts, size_t n_stride, uint32_t n_parts, uint32_t n, float * tmp, float * out) {
    const float    weight = 0.25f; // of filter and keys, that of values is 1. without filters that of the keys counts twice
    const float    self   = 0.3f;  // how much more a row counts than the 5 neighbours that it is one of
    const uint32_t reach  = 2;

    for (uint32_t i = 0; i < n; ++i) {
        out[i] = std::sqrt(parts[i]);
        tmp[i] = 0.0f;
    }

    llama_qfilter_blend_add(out,              n, 1.0f,                                 tmp);
    llama_qfilter_blend_add(parts + n_stride, n, n_parts > 2 ? -weight : -2.0f*weight, tmp);
    if (n_parts > 2) {
        llama_qfilter_blend_add(parts + 2*n_stride, n, weight, tmp);
    }

    for (uint32_t i = 0; i < n; ++i) {
        const uint32_t i0 = i - std::min(i, reach);
        const uint32_t i1 = std::min(i + reach + 1, n);

        float sum = 0.0f;
        for (uint32_t j = i0; j < i1; ++j) {
            sum += tmp[j];
        }
        out[i] = sum/(i1 - i0) + self*tmp[i];
    }
}
