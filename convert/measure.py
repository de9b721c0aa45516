"""How well filters fit a model: figures over sequences that they were not calibrated on.

A filter is good if `key . filter` ranks keys in the same order as later queries weigh them.
"""

from __future__ import annotations

import numpy as np

from ..config import QFilterError
from .calibrate import group_mean

MIN_DISTANCE = 64


class Fit:
    """Takes in held-out sequences, one attention call after another.

    directions, means: layer -> [n_head, head_dim], what calibration found: v1 and mean query
    filters: layer -> [n_head_kv, head_dim]
    All in the layout of the queries and keys that come in; other layers are ignored."""

    def __init__(self, directions, means, filters):
        self._directions, self._means, self._filters = directions, means, filters
        self._sums = {layer: np.zeros((3, len(v1))) for layer, v1 in directions.items()}
        self._n_queries = dict.fromkeys(filters, 0)
        self._ranks = {layer: [] for layer in filters}
        self._open: dict[int, _Sequence] = {}

    def add(self, call) -> None:
        """The next attention call (see capture_llama.Attention) of the sequence being read."""
        layer = call.layer
        if layer not in self._filters:
            return
        queries, keys = call.queries(), call.keys()
        if not (np.isfinite(queries).all() and np.isfinite(keys).all()):
            raise QFilterError(
                f"the model computes NaN or infinite keys in layer {layer}: its weights are "
                "damaged, download it again"
            )
        self._add_queries(layer, queries)
        if layer not in self._open:
            self._open[layer] = _Sequence(self._filters[layer])
        n_head_kv = len(keys)
        grouped = queries.reshape(n_head_kv, -1, *queries.shape[1:]).mean(1)
        self._open[layer].add(call.start, grouped, keys)

    def _add_queries(self, layer, queries):
        """Sums over queries [n_head, n_tokens, head_dim]: energy on v1, energy, |cosine| to mean"""
        v1, mean = self._directions[layer], self._means[layer]
        queries = queries.astype(np.float64)
        energy = np.einsum("hnd,hnd->hn", queries, queries)
        on_v1 = np.einsum("hnd,hd->hn", queries, v1) ** 2
        on_mean = np.abs(np.einsum("hnd,hd->hn", queries, mean))
        lengths = np.sqrt(energy) * np.linalg.norm(mean, axis=-1)[:, None]
        cosines = on_mean / np.maximum(lengths, np.finfo(float).tiny)
        self._sums[layer] += [on_v1.sum(-1), energy.sum(-1), cosines.sum(-1)]
        self._n_queries[layer] += queries.shape[1]

    def end_sequence(self) -> None:
        for layer, sequence in self._open.items():
            self._ranks[layer].append(sequence.correlations())
        self._open.clear()

    def figures(self) -> dict[str, np.ndarray]:
        """Figures float32, one number per KV head of all layers in turn, layers ascending:

        energy: share of the queries' energy on v1, mean over the query heads of the group
        mean_cosine: mean |cosine| of the queries to the mean query, over the group
        spearman: rank correlation between key.filter and the mean attention logit that queries at
            least MIN_DISTANCE positions later give the key, mean over sequences
        spearman_knorm: the same for minus the key's norm"""
        rows = {"energy": [], "mean_cosine": [], "spearman": [], "spearman_knorm": []}
        for layer in sorted(self._filters):
            on_v1, energy, cosine = self._sums[layer]
            n_head_kv = len(self._filters[layer])
            share = on_v1 / np.maximum(energy, np.finfo(float).tiny)
            rows["energy"].append(group_mean(share[:, None], n_head_kv)[:, 0])
            cosine = cosine / max(self._n_queries[layer], 1)
            rows["mean_cosine"].append(group_mean(cosine[:, None], n_head_kv)[:, 0])
            ranks = _defined_mean(self._ranks[layer])
            rows["spearman"].append(ranks[0])
            rows["spearman_knorm"].append(ranks[1])
        return {name: np.concatenate(values).astype(np.float32) for name, values in rows.items()}


class _Sequence:
    """One layer's keys of one sequence: their scores, and the logits that later queries give them.

    The mean logit of a key over later queries is its product with the mean of these queries, so
    sums of queries are enough, and no attention matrix is computed."""

    def __init__(self, filters):
        self._filters = filters
        n_head_kv = len(filters)
        self._scores = np.zeros((n_head_kv, 0))
        self._norms = np.zeros((n_head_kv, 0))
        self._logits = np.zeros((n_head_kv, 0))
        self._counts = np.zeros(0)

    def add(self, start, queries, keys):
        """queries: [n_head_kv, n, head_dim], means over the group, of the positions from `start`;
        keys: [n_head_kv, start + n, head_dim]"""
        n = queries.shape[1]
        new = keys[:, self._scores.shape[1] :]  # none where another layer attends the same keys
        self._scores = np.append(self._scores, np.einsum("hnd,hd->hn", new, self._filters), axis=1)
        self._norms = np.append(self._norms, np.linalg.norm(new, axis=-1), axis=1)
        self._logits = np.append(self._logits, np.zeros(new.shape[:2]), axis=1)
        self._counts = np.append(self._counts, np.zeros(new.shape[1]))
        # later[:, i]: sum of the queries from index i on
        later = np.zeros((len(queries), n + 1, queries.shape[2]))
        later[:, :n] = np.cumsum(queries[:, ::-1], axis=1, dtype=np.float64)[:, ::-1]
        first = np.clip(np.arange(start + n) + MIN_DISTANCE - start, 0, n)
        self._logits += np.einsum("hnd,hnd->hn", keys, later[:, first])
        self._counts += n - first

    def correlations(self) -> np.ndarray:
        """[2, n_head_kv]: Spearman of the scores, and of minus the norms, with the mean logits."""
        seen = self._counts > 0
        if seen.sum() < 2:
            return np.full((2, len(self._filters)), np.nan)
        mean = self._logits[:, seen] / self._counts[seen]
        return np.stack(
            [spearman(self._scores[:, seen], mean), spearman(-self._norms[:, seen], mean)]
        )


def _defined_mean(values):
    """Mean over the first axis of what is not NaN."""
    values = np.array(values)
    counts = np.isfinite(values).sum(0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis of [n_head, n]; NaN where one side is constant."""
    x, y = (np.stack([_ranks(row) for row in rows]) for rows in (a, b))
    x, y = (r - r.mean(-1, keepdims=True) for r in (x, y))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(scale > 0, (x * y).sum(-1) / np.where(scale > 0, scale, 1), np.nan)


def _ranks(values):
    """Ranks of [n] numbers; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
