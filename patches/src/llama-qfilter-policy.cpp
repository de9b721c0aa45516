#include "llama-qfilter-policy.h"

#include "ggml.h"

#include <initializer_list>

ggml_tensor * llama_qfilter_dot(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v) {
    k = ggml_permute(ctx, k, 0, 2, 1, 3);                   // [n_embd_head, n_rows, n_head]
    v = ggml_reshape_3d(ctx, v, v->ne[0], 1, v->ne[1]);     // [n_embd_head, 1, n_head]

    ggml_tensor * s = ggml_mul_mat(ctx, k, v);              // [n_rows, 1, n_head]
    ggml_prec_set_acc(s, GGML_PREC_F32);

    return ggml_reshape_2d(ctx, s, s->ne[0], s->ne[2]);
}

// the paper's score (arXiv 2503.02812, section 3): <k, v1>, averaged over the query heads of a group; or <k, q> with the
// expected query q
static std::vector<ggml_tensor *> llama_qfilter_score_qfilters(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    GGML_UNUSED(v);

    return { llama_qfilter_dot(ctx, k, ggml_reshape_2d(ctx, f, f->ne[0], f->ne[3])) };
}

ggml_tensor * llama_qfilter_square(ggml_context * ctx, ggml_tensor * x) {
    ggml_tensor * cur = ggml_sum_rows(ctx, ggml_sqr(ctx, x)); // [1, n_head, n_rows]

    return ggml_transpose(ctx, ggml_reshape_2d(ctx, cur, x->ne[1], x->ne[2]));
}

// second order: log E[exp(<q, k>)] for each query head, for normally distributed q. take the softmax over the rows, then the
// mean over the query heads of a group, times |v|: what the row is expected to add to the output
//   f: for each KV head, first n_rep rows that are multiplied with k, then n_rank rows for each query head, whose products
//      with k are squared. this order differs from that of its dimensions, which only give the counts
static std::vector<ggml_tensor *> llama_qfilter_score_qfilters2(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    const int64_t n_embd = f->ne[0];
    const int64_t n_rep  = f->ne[1];
    const int64_t n_rank = f->ne[2] - 1;
    const int64_t n_head = f->ne[3];
    const int64_t n_rows = k->ne[2];

    // [n_embd, n_rows, n_head]
    k = n_head == 1 ? ggml_reshape_3d(ctx, k, n_embd, n_rows, 1) : ggml_cont(ctx, ggml_permute(ctx, k, 0, 2, 1, 3));

    ggml_tensor * f1 = ggml_view_3d(ctx, f, n_embd, n_rep, n_head, f->nb[1], f->nb[3], 0);
    ggml_tensor * f2 = ggml_view_3d(ctx, f, n_embd, n_rank*n_rep, n_head, f->nb[1], f->nb[3], n_rep*f->nb[1]);

    ggml_tensor * s1 = ggml_mul_mat(ctx, f1, k); // [n_rep, n_rows, n_head]
    ggml_tensor * s2 = ggml_mul_mat(ctx, f2, k); // [n_rank*n_rep, n_rows, n_head]
    ggml_prec_set_acc(s1, GGML_PREC_F32);
    ggml_prec_set_acc(s2, GGML_PREC_F32);

    s2 = ggml_reshape_4d(ctx, ggml_sqr(ctx, s2), n_rank, n_rep, n_rows, n_head);
    s2 = ggml_reshape_3d(ctx, ggml_sum_rows(ctx, s2), n_rep, n_rows, n_head);

    ggml_tensor * cur = ggml_add(ctx, s1, s2);

    cur = ggml_cont(ctx, ggml_permute(ctx, cur, 1, 0, 2, 3));                    // [n_rows, n_rep, n_head]
    cur = ggml_soft_max(ctx, cur);
    cur = ggml_cont(ctx, ggml_permute(ctx, cur, 1, 0, 2, 3));                    // [n_rep, n_rows, n_head]
    cur = ggml_reshape_2d(ctx, ggml_sum_rows(ctx, cur), n_rows, n_head);         // ranks rows like the mean

    return { ggml_mul(ctx, cur, ggml_sqrt(ctx, ggml_cont(ctx, llama_qfilter_square(ctx, v)))) };
}

// keys with a small norm attract attention (arXiv 2406.11430): -|k|^2
static std::vector<ggml_tensor *> llama_qfilter_score_knorm(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    GGML_UNUSED(v);
    GGML_UNUSED(f);

    return { ggml_scale(ctx, ggml_cont(ctx, llama_qfilter_square(ctx, k)), -1.0f) };
}

ggml_tensor * llama_qfilter_mean(ggml_context * ctx, ggml_tensor * x) {
    ggml_tensor * cur = ggml_cont(ctx, ggml_permute(ctx, x, 1, 2, 0, 3)); // [n_rows, n_embd_head, n_head]

    return ggml_reshape_2d(ctx, ggml_mean(ctx, cur), x->ne[0], x->ne[1]);
}

// normalizes every row of x. reshaped to two dimensions because CUDA's grid is limited to 65,535 for the third
//   x: [n_embd, n_head, n_rows]
static ggml_tensor * llama_qfilter_unit(ggml_context * ctx, ggml_tensor * x) {
    const float eps = 1e-12f;

    ggml_tensor * cur = ggml_l2_norm(ctx, ggml_reshape_2d(ctx, x, x->ne[0], x->ne[1]*x->ne[2]), eps);

    return ggml_reshape_3d(ctx, cur, x->ne[0], x->ne[1], x->ne[2]);
}

ggml_tensor * llama_qfilter_likeness(ggml_context * ctx, ggml_tensor * k) {
    k = llama_qfilter_unit(ctx, k);

    return llama_qfilter_dot(ctx, k, llama_qfilter_mean(ctx, k));
}

// keys that differ from the others stay (arXiv 2504.15364, section 3)
static std::vector<ggml_tensor *> llama_qfilter_score_keydiff(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * f) {
    GGML_UNUSED(v);
    GGML_UNUSED(f);

    return { ggml_scale(ctx, llama_qfilter_likeness(ctx, k), -1.0f) };
}

// uniform in [0, 1): a baseline for the other policies. a position has the same score at every eviction, so the rows that
// stay do not depend on how the tokens were split into batches
static float llama_qfilter_score_random(uint32_t seed, uint32_t il, uint32_t ih, llama_pos pos) {
    uint64_t x = 0;

    for (const uint64_t v : { (uint64_t) seed, (uint64_t) il, (uint64_t) ih, (uint64_t) pos }) {
        // splitmix64
        x += v + 0x9e3779b97f4a7c15ull;
        x  = (x ^ (x >> 30))*0xbf58476d1ce4e5b9ull;
        x  = (x ^ (x >> 27))*0x94d049bb133111ebull;
        x ^= x >> 31;
    }

    return (float) (x >> 40)*0x1p-24f;
}

// indexed by enum llama_qfilter_policy
static const llama_qfilter_policy_info LLAMA_QFILTER_POLICIES[] = {
    // policy, name, needs, learned, score, score_cpu, score_pos
    { LLAMA_QFILTER_POLICY_QFILTERS,  "qfilters",  { LLAMA_QFILTER_KIND_FILTERS, -1 },                             false, llama_qfilter_score_qfilters,  nullptr,                       nullptr                    },
    { LLAMA_QFILTER_POLICY_KNORM,     "knorm",     { -1 },                                                         false, llama_qfilter_score_knorm,     nullptr,                       nullptr                    },
    { LLAMA_QFILTER_POLICY_STREAMING, "streaming", { -1 },                                                         false, nullptr,                       nullptr,                       nullptr                    },
    { LLAMA_QFILTER_POLICY_KEYDIFF,   "keydiff",   { -1 },                                                         false, llama_qfilter_score_keydiff,   llama_qfilter_score_keydiff_cpu, nullptr                    },
    { LLAMA_QFILTER_POLICY_RANDOM,    "random",    { -1 },                                                         false, nullptr,                       nullptr,                       llama_qfilter_score_random },
    { LLAMA_QFILTER_POLICY_QFILTERS2, "qfilters2", { LLAMA_QFILTER_KIND_MOMENTS, -1 },                             false, llama_qfilter_score_qfilters2, nullptr,                       nullptr                    },
    { LLAMA_QFILTER_POLICY_QBLEND,    "qblend",    { LLAMA_QFILTER_KIND_QUERIES, LLAMA_QFILTER_KIND_FILTERS, -1 }, false, llama_qfilter_blend_parts,     llama_qfilter_blend_parts_cpu, nullptr                    },
    { LLAMA_QFILTER_POLICY_KVDIFF,    "kvdiff",    { -1 },                                                         false, llama_qfilter_blend_parts,     llama_qfilter_blend_parts_cpu, nullptr                    },
    { LLAMA_QFILTER_POLICY_QAHEAD,    "qahead",    { LLAMA_QFILTER_KIND_QUERIES, -1 },                             false, llama_qfilter_score_qfilters,  nullptr,                       nullptr                    },
    { LLAMA_QFILTER_POLICY_LEARNED,   "learned",   { LLAMA_QFILTER_KIND_QUERIES, LLAMA_QFILTER_KIND_FILTERS, -1 }, true,  llama_qfilter_blend_parts,     llama_qfilter_blend_parts_cpu, nullptr                    },
};

const llama_qfilter_policy_info * llama_qfilter_policy_find(int32_t policy) {
    const int32_t n = sizeof(LLAMA_QFILTER_POLICIES)/sizeof(LLAMA_QFILTER_POLICIES[0]);

    if (policy < 0 || policy >= n) {
        return nullptr;
    }
    GGML_ASSERT(LLAMA_QFILTER_POLICIES[policy].policy == policy);

    return &LLAMA_QFILTER_POLICIES[policy];
}
