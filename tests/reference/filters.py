"""Filters for tests, in the layout of llama.cpp's K rows: [n_layer, n_head_kv, head_dim]."""

import numpy as np
import torch

from reference.cache import BoundedCache
from reference.engine import run, split
from reference.model import Model


def random_filters(n_layer: int, n_head_kv: int, head_dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in random directions, float32."""
    v = np.random.default_rng(seed).standard_normal((n_layer, n_head_kv, head_dim))
    return (v / np.linalg.norm(v, axis=-1, keepdims=True)).astype(np.float32)


def query_filters(model: Model, tokens, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The paper's filters (arXiv 2503.02812) from the queries of these tokens, and the mean queries
    before RoPE, float32.

    Per query head the first right singular vector of its queries after RoPE, the sign so that
    most queries project positively on it; then the mean over the heads that share a KV head.
    """
    queries = [[] for _ in range(model.shape.n_layer)]
    model.on_query = lambda layer, *both: queries[layer].append(both)
    try:
        run(model, tokens, split(len(tokens), [chunk]), BoundedCache())
    finally:
        model.on_query = None
    filters, means = [], []
    for layer in queries:
        plain, q = (torch.cat(some, dim=1).double() for some in zip(*layer, strict=True))
        means.append(plain.mean(1).view(model.shape.n_head_kv, -1, plain.shape[-1]).mean(1))
        v1 = torch.linalg.svd(q, full_matrices=False).Vh[:, 0]  # [n_head, head_dim]
        majority = torch.sign((q @ v1[:, :, None]).sign().sum(1) + 0.5)  # [n_head, 1]
        filters.append((v1 * majority).view(model.shape.n_head_kv, -1, v1.shape[-1]).mean(1))
    return tuple(torch.stack(rows).float().numpy() for rows in (filters, means))
