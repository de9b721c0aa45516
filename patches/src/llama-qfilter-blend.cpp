// the scores of qblend, kvdiff and learned, and their key part, which is the score of keydiff: large for rows whose value and
// key both differ from the others, and for their neighbours

#include "llama-qfilter-policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

// compile a function for several CPUs, where the loader can choose between them
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#    define LLAMA_QFILTER_ANY_CPU __attribute__((target_clones("avx2", "default")))
#else
#    define LLAMA_QFILTER_ANY_CPU
#endif

#if defined(__GNUC__)
#    define LLAMA_QFILTER_INLINE inline __attribute__((always_inline))
#else
#    define LLAMA_QFILTER_INLINE inline
#endif

std::vector<ggml_tensor *> llama_qfilter_blend_parts(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    // evicting a row changes the output by weight*(output - value)
    std::vector<ggml_tensor *> res = { llama_qfilter_square(ctx, ggml_sub(ctx, v, llama_qfilter_mean(ctx, v))) };

    if (f) {
        res.push_back(llama_qfilter_dot(ctx, k, ggml_reshape_2d(ctx, f, f->ne[0], f->ne[3])));
    }
    res.push_back(llama_qfilter_likeness(ctx, k)); // comes last because it makes copies of k

    return res;
}

//
// the same on the CPU: reads each row straight from the cache and computes all parts of all its heads at once
//

static const int64_t LLAMA_QFILTER_N_CHUNK = 128; // rows; fixed, so that sums do not depend on the number of threads

// the sum of 16 lanes; compilers turn loops over lanes into vector instructions
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
    float rest = 0.0f;
    for (; i < n; ++i) {
        rest += x[i]*y[i];
    }
    return llama_qfilter_lanes(lanes) + rest;
}

static LLAMA_QFILTER_INLINE float llama_qfilter_vec_distance(const float * x, const float * y, int64_t n) {
    float lanes[16] = {};

    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            lanes[j] += (x[i + j] - y[i + j])*(x[i + j] - y[i + j]);
        }
    }
    float rest = 0.0f;
    for (; i < n; ++i) {
        rest += (x[i] - y[i])*(x[i] - y[i]);
    }
    return llama_qfilter_lanes(lanes) + rest;
}

// ggml's own conversion is not compiled for several CPUs, and would take longer than all the rest
static LLAMA_QFILTER_INLINE void llama_qfilter_vec_from_f16(const ggml_fp16_t * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t h = x[i];

        uint32_t bits = (h & 0x7fff) << 13;

        float f;
        memcpy(&f, &bits, sizeof(f));
        f *= 0x1p112f; // corrects the exponent bias; denormals become normal numbers
        memcpy(&bits, &f, sizeof(f));

        bits |= (h & 0x8000) << 16;
        bits |= (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;

        memcpy(y + i, &bits, sizeof(f));
    }
}

// a row of the cache in F32
static LLAMA_QFILTER_INLINE const float * llama_qfilter_row(const ggml_tensor * t, int32_t cell, float * buf) {
    const void * x = (const char *) t->data + cell*t->nb[1];

    switch (t->type) {
        case GGML_TYPE_F32: return (const float *) x;
        case GGML_TYPE_F16: llama_qfilter_vec_from_f16((const ggml_fp16_t *) x, buf, t->ne[0]); return buf;
        default:            ggml_get_type_traits(t->type)->to_float(x, buf, t->ne[0]);          return buf;
    }
}

// the rows of a layer and the chunks that nodes work in
struct llama_qfilter_blend_rows {
    const ggml_tensor * k;
    const ggml_tensor * v; // nullptr: only the keys are used

    const int32_t * cells;

    int64_t n_rows;
    int64_t n_head;
    int64_t n_embd_k;
    int64_t n_embd_v;

    llama_qfilter_blend_rows(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * idx, int64_t n_head) :
        k(k), v(v), cells((const int32_t *) idx->data), n_rows(idx->ne[0]), n_head(n_head),
        n_embd_k(k->ne[0]/n_head), n_embd_v(v ? v->ne[0]/n_head : 0) {
    }

    int64_t n_embd()   const { return n_head*(n_embd_k + n_embd_v); }
    int64_t n_chunks() const { return (n_rows + LLAMA_QFILTER_N_CHUNK - 1)/LLAMA_QFILTER_N_CHUNK; }

    int64_t begin(int64_t chunk) const { return chunk*LLAMA_QFILTER_N_CHUNK; }
    int64_t end  (int64_t chunk) const { return std::min(begin(chunk + 1), n_rows); }
};

// the sources of the three nodes (sums, means, parts); each node has the first few of them
enum llama_qfilter_blend_src {
    LLAMA_QFILTER_BLEND_K,
    LLAMA_QFILTER_BLEND_V, // the same tensor as K: only the keys are used
    LLAMA_QFILTER_BLEND_IDX,
    LLAMA_QFILTER_BLEND_SUMS,
    LLAMA_QFILTER_BLEND_MEANS,
    LLAMA_QFILTER_BLEND_F,
    LLAMA_QFILTER_BLEND_N,
};

static llama_qfilter_blend_rows llama_qfilter_blend_rows_of(ggml_tensor * const * src, void * n_head) {
    auto * k = src[LLAMA_QFILTER_BLEND_K];
    auto * v = src[LLAMA_QFILTER_BLEND_V];

    return { k, v == k ? nullptr : v, src[LLAMA_QFILTER_BLEND_IDX], (intptr_t) n_head };
}

// for the rows of a chunk: 1/|k| for each row and head, and the sums of normalized keys and of values
LLAMA_QFILTER_ANY_CPU
static void llama_qfilter_blend_sum(const llama_qfilter_blend_rows & rows, int64_t chunk, float * lengths, float * sums, float * buf) {
    float * sums_v = sums + rows.n_head*rows.n_embd_k;

    std::fill(sums, sums + rows.n_embd(), 0.0f);

    for (int64_t r = rows.begin(chunk); r < rows.end(chunk); ++r) {
        const float * k = llama_qfilter_row(rows.k, rows.cells[r], buf);

        for (int64_t ih = 0; ih < rows.n_head; ++ih) {
            const float * kh  = k    + ih*rows.n_embd_k;
            float       * sum = sums + ih*rows.n_embd_k;

            const float scale = 1.0f/std::max(std::sqrt(llama_qfilter_vec_dot(kh, kh, rows.n_embd_k)), 1e-12f);

            for (int64_t i = 0; i < rows.n_embd_k; ++i) {
                sum[i] += kh[i]*scale;
            }
            lengths[r*rows.n_head + ih] = scale;
        }

        if (rows.v) {
            const float * v = llama_qfilter_row(rows.v, rows.cells[r], buf);

            for (int64_t i = 0; i < rows.n_head*rows.n_embd_v; ++i) {
                sums_v[i] += v[i];
            }
        }
    }
}

// computes the parts for the rows of a chunk
//   parts: [n_rows, n_head, n_parts], f: [n_embd_k] for each head, stride_f apart, or nullptr
LLAMA_QFILTER_ANY_CPU
static void llama_qfilter_blend_score(
        const llama_qfilter_blend_rows & rows, int64_t chunk, const float * lengths, const float * means,
        const float * f, int64_t stride_f, float * parts, float * buf) {
    const float * means_v = means + rows.n_head*rows.n_embd_k;

    const int64_t n_part = rows.n_head*rows.n_rows;

    for (int64_t r = rows.begin(chunk); r < rows.end(chunk); ++r) {
        const float * k = llama_qfilter_row(rows.k, rows.cells[r], buf);

        for (int64_t ih = 0; ih < rows.n_head; ++ih) {
            const float * kh  = k     + ih*rows.n_embd_k;
            float       * out = parts + ih*rows.n_rows + r;

            if (f) {
                out += n_part;
                *out = llama_qfilter_vec_dot(kh, f + ih*stride_f, rows.n_embd_k);
            }
            out[n_part] = llama_qfilter_vec_dot(kh, means + ih*rows.n_embd_k, rows.n_embd_k)*lengths[r*rows.n_head + ih];
        }

        if (rows.v) {
            const float * v = llama_qfilter_row(rows.v, rows.cells[r], buf);

            for (int64_t ih = 0; ih < rows.n_head; ++ih) {
                parts[ih*rows.n_rows + r] =
                    llama_qfilter_vec_distance(v + ih*rows.n_embd_v, means_v + ih*rows.n_embd_v, rows.n_embd_v);
            }
        }
    }
}

static std::vector<float> llama_qfilter_blend_buf(const llama_qfilter_blend_rows & rows) {
    return std::vector<float>(rows.n_head*std::max(rows.n_embd_k, rows.n_embd_v));
}

// dst: [n_head*n_rows + n_chunks*n_embd]: 1/|k| of each row and head, then the sums of each chunk
static void llama_qfilter_blend_op_sums(ggml_tensor * dst, int ith, int nth, void * n_head) {
    const auto rows = llama_qfilter_blend_rows_of(dst->src, n_head);

    auto buf = llama_qfilter_blend_buf(rows);

    float * lengths = (float *) dst->data;

    for (int64_t chunk = ith; chunk < rows.n_chunks(); chunk += nth) {
        llama_qfilter_blend_sum(rows, chunk, lengths, lengths + rows.n_head*rows.n_rows + chunk*rows.n_embd(), buf.data());
    }
}

// dst: [n_embd]: means of normalized keys and of values; each thread computes some columns
static void llama_qfilter_blend_op_means(ggml_tensor * dst, int ith, int nth, void * n_head) {
    const auto rows = llama_qfilter_blend_rows_of(dst->src, n_head);

    const float * sums = (const float *) dst->src[LLAMA_QFILTER_BLEND_SUMS]->data + rows.n_head*rows.n_rows;

    float * out = (float *) dst->data;

    const int64_t n  = rows.n_embd();
    const int64_t i0 = n*ith/nth;
    const int64_t i1 = n*(ith + 1)/nth;

    std::fill(out + i0, out + i1, 0.0f);

    for (int64_t chunk = 0; chunk < rows.n_chunks(); ++chunk) {
        for (int64_t i = i0; i < i1; ++i) {
            out[i] += sums[chunk*n + i];
        }
    }
    for (int64_t i = i0; i < i1; ++i) {
        out[i] /= rows.n_rows;
    }
}

// dst: [n_rows, n_head, n_parts]
static void llama_qfilter_blend_op_parts(ggml_tensor * dst, int ith, int nth, void * n_head) {
    const auto rows = llama_qfilter_blend_rows_of(dst->src, n_head);

    const auto * f = dst->src[LLAMA_QFILTER_BLEND_F];

    auto buf = llama_qfilter_blend_buf(rows);

    for (int64_t chunk = ith; chunk < rows.n_chunks(); chunk += nth) {
        llama_qfilter_blend_score(rows, chunk,
                (const float *) dst->src[LLAMA_QFILTER_BLEND_SUMS]->data, (const float *) dst->src[LLAMA_QFILTER_BLEND_MEANS]->data,
                f ? (const float *) f->data : nullptr, f ? f->nb[3]/sizeof(float) : 0, (float *) dst->data, buf.data());
    }
}

std::vector<ggml_tensor *> llama_qfilter_blend_parts_cpu(
        ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f, ggml_tensor * idx, int64_t n_head) {
    void * arg = (void *) (intptr_t) n_head;

    ggml_tensor * src[LLAMA_QFILTER_BLEND_N] = { k, v ? v : k, idx, nullptr, nullptr, f };

    const auto rows = llama_qfilter_blend_rows_of(src, arg);

    const int n_parts = f ? 3 : 2;

    src[LLAMA_QFILTER_BLEND_SUMS] = ggml_custom_4d(ctx, GGML_TYPE_F32, n_head*rows.n_rows + rows.n_chunks()*rows.n_embd(), 1, 1, 1,
            src, LLAMA_QFILTER_BLEND_SUMS, llama_qfilter_blend_op_sums, GGML_N_TASKS_MAX, arg);
    src[LLAMA_QFILTER_BLEND_MEANS] = ggml_custom_4d(ctx, GGML_TYPE_F32, rows.n_embd(), 1, 1, 1,
            src, LLAMA_QFILTER_BLEND_MEANS, llama_qfilter_blend_op_means, GGML_N_TASKS_MAX, arg);

    ggml_tensor * parts = ggml_custom_4d(ctx, GGML_TYPE_F32, rows.n_rows, n_head, n_parts, 1,
            src, LLAMA_QFILTER_BLEND_F + (f ? 1 : 0), llama_qfilter_blend_op_parts, GGML_N_TASKS_MAX, arg);

    std::vector<ggml_tensor *> res;
    for (int i = 0; i < n_parts; ++i) {
        res.push_back(ggml_view_2d(ctx, parts, rows.n_rows, n_head, parts->nb[1], i*parts->nb[2]));
    }

    return res;
}

std::vector<ggml_tensor *> llama_qfilter_score_keydiff_cpu(
        ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f, ggml_tensor * idx, int64_t n_head) {
    GGML_UNUSED(v);
    GGML_UNUSED(f);

    return { ggml_scale(ctx, llama_qfilter_blend_parts_cpu(ctx, k, nullptr, nullptr, idx, n_head)[1], -1.0f) };
}

void llama_qfilter_add_standardized(const float * x, uint32_t n, float weight, float * y) {
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
    const float    weight = 0.25f; // of the filter part and the key part (twice that without filters); the value part has 1
    const float    self   = 0.3f;  // factor of a row's own sum, added to the mean over 5 adjacent rows
    const uint32_t reach  = 2;

    for (uint32_t i = 0; i < n; ++i) {
        out[i] = std::sqrt(parts[i]);
        tmp[i] = 0.0f;
    }

    llama_qfilter_add_standardized(out, n, 1.0f, tmp);
    if (n_parts > 2) {
        llama_qfilter_add_standardized(parts + n_stride, n, weight, tmp);
    }
    llama_qfilter_add_standardized(parts + (n_parts - 1)*n_stride, n, n_parts > 2 ? -weight : -2.0f*weight, tmp);

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
