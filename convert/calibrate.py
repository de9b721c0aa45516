"""Queries -> second moments -> filters. Pure mathematics, no model code.

The recipe is that of Q-Filters (arXiv 2503.02812): collect queries after RoPE, take the first right
singular vector v1 of every query head's query matrix, choose its sign so that most queries project
positively on it, and average over the query heads that share a KV head.

The second moments (policy qfilters2) come from the same sums. From the mean and the covariance of
normally distributed queries follows the logarithm of the mean of exp(logit) that a key gets.

v1 of a matrix Q is the top eigenvector of Q^T Q. So Q need not be kept: the sum of outer products
is enough, [n_layer, n_head, d, d] for any number of queries. Only the vote on the sign needs v1
first; for it a bounded part of the queries is kept, evenly spaced.
"""

from __future__ import annotations

import numpy as np

from ..config import QFilterError

MOMENT_BYTES = 96 << 20
VOTE_BYTES = 16 << 20


def sample_positions(lengths: list[int], num_samples: int, seed: int) -> list[np.ndarray]:
    """Draw the token positions whose queries are used, without replacement, from all sequences.

    lengths: tokens of each sequence. Returns the ascending positions in each sequence,
    min(num_samples, sum(lengths)) in all. The same positions serve every layer and head."""
    total = sum(lengths)
    drawn = np.random.default_rng(seed).choice(total, min(num_samples, total), replace=False)
    ends = np.cumsum(lengths)
    drawn.sort()
    parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    return [part - (end - n) for part, end, n in zip(parts, ends, lengths, strict=True)]


class QueryMoments:
    """Sums over the queries of every query head, and some of the queries.

    counts: layer -> number of queries taken in
    first: layer -> float64 [n_head, d], their sum
    second: layer -> [n_head, d, d], the sum of their outer products; float64, or float32 for a
        model so large that this would take more than MOMENT_BYTES
    votes: layer -> float16 [n_head, n_votes, d], every query (at unit length) while they fit into
        `vote_bytes`, an evenly spread part of them otherwise
    """

    def __init__(self, n_layer: int, num_samples: int, vote_bytes=VOTE_BYTES):
        self.n_layer = n_layer
        self.num_samples = num_samples
        self.vote_bytes = vote_bytes
        self.counts: dict[int, int] = {}
        self.first: dict[int, np.ndarray] = {}
        self.second: dict[int, np.ndarray] = {}
        self.votes: dict[int, np.ndarray] = {}

    def add(self, layer: int, queries: np.ndarray) -> None:
        """Take in the next queries [n_head, n_tokens, head_dim] of one layer."""
        if layer not in self.counts:
            self._start(layer, *queries.shape[::2])
        exact = queries.astype(np.float64)
        self.first[layer] += exact.sum(1)
        self.second[layer] += exact.transpose(0, 2, 1) @ exact
        count = self.counts[layer] + np.arange(queries.shape[1])
        # query i of num_samples gets the slot that is reached between i and i + 1
        n_votes = self.votes[layer].shape[1]
        slot = count * n_votes // self.num_samples
        chosen = (count + 1) * n_votes // self.num_samples > slot
        chosen &= slot < n_votes  # a layer whose keys other layers attend gets more queries
        voters = exact[:, chosen]
        lengths = np.linalg.norm(voters, axis=-1, keepdims=True)
        self.votes[layer][:, slot[chosen]] = voters / np.maximum(lengths, np.finfo(float).tiny)
        self.counts[layer] += queries.shape[1]

    def _start(self, layer, n_head, head_dim):
        per_query = self.n_layer * n_head * head_dim
        n_votes = min(self.num_samples, max(self.vote_bytes // (2 * per_query), 1))
        exact = 8 * per_query * head_dim <= MOMENT_BYTES
        self.counts[layer] = 0
        self.first[layer] = np.zeros((n_head, head_dim))
        self.second[layer] = np.zeros(
            (n_head, head_dim, head_dim), np.float64 if exact else np.float32
        )
        self.votes[layer] = np.zeros((n_head, n_votes, head_dim), np.float16)

    @property
    def nbytes(self) -> int:
        arrays = (self.first, self.second, self.votes)
        return sum(array.nbytes for of_layer in arrays for array in of_layer.values())

    def means(self) -> dict[int, np.ndarray]:
        """layer -> the mean query [n_head, head_dim]."""
        return {layer: total / self.counts[layer] for layer, total in self.first.items()}

    def second_order(self, rank: int, scale: dict[int, float]) -> dict[int, np.ndarray]:
        """layer -> float64 [n_head, 1 + rank, head_dim]: for every query head the mean query and
        the first `rank` principal directions of its covariance, scaled to rows r with

            log E[exp(scale * q.k)] = k.r[0] + sum_j (k.r[j])^2    for normally distributed q

        without the directions left out. scale: layer -> factor of q.k before the softmax."""
        means = self.means()
        return {
            layer: _log_mean_exp_rows(
                mean, self.second[layer] / self.counts[layer], rank, scale[layer]
            )
            for layer, mean in means.items()
        }

    def directions(self) -> dict[int, np.ndarray]:
        """layer -> v1 of every query head, float64 [n_head, head_dim], unit length, with the sign
        on which most queries project positively (in a tie the mean query decides)."""
        if not self.counts:
            raise QFilterError("the model handed out no queries: it is not supported")
        return {layer: self._directions(layer) for layer in sorted(self.counts)}

    def _directions(self, layer):
        if not np.isfinite(self.second[layer]).all():
            raise QFilterError(
                "the model computes NaN or infinite queries: its weights are "
                "damaged, download it again"
            )
        if not self.second[layer].any(axis=(1, 2)).all():
            raise QFilterError(
                f"all queries of a head in layer {layer} are zero: the weights are damaged, "
                "download the model again"
            )
        v1 = np.linalg.eigh(self.second[layer].astype(np.float64)).eigenvectors[..., -1]
        room = self.votes[layer].shape[1]
        n_votes = min(self.counts[layer] * room // self.num_samples, room)
        votes = self.votes[layer][:, :n_votes].astype(np.float64)
        majority = np.sign(np.einsum("hnd,hd->hn", votes, v1)).sum(-1)
        on_mean = np.einsum("hd,hd->h", self.first[layer], v1)
        sign = np.sign(np.where(majority != 0, majority, on_mean))
        return v1 * np.where(sign == 0, 1.0, sign)[:, None]


class MeanQueries:
    """The mean query of every KV head before RoPE. RoPE is linear, so at any position it turns this
    into the mean query of that position."""

    def __init__(self):
        self._sums: dict[int, np.ndarray] = {}
        self._counts: dict[int, int] = {}

    def add(self, layer: int, queries: np.ndarray) -> None:
        """Take in the next queries [n_head_kv, n_tokens, head_dim] of one layer, means over the
        query heads of the group."""
        self._sums[layer] = self._sums.get(layer, 0) + queries.sum(1, dtype=np.float64)
        self._counts[layer] = self._counts.get(layer, 0) + queries.shape[1]

    def means(self) -> dict[int, np.ndarray]:
        """layer -> float64 [n_head_kv, head_dim]"""
        return {layer: total / self._counts[layer] for layer, total in self._sums.items()}


def _log_mean_exp_rows(mean, square, rank, scale):
    """mean: [n_head, d], square: mean outer products [n_head, d, d]; see `second_order`"""
    covariance = square - mean[:, :, None] * mean[:, None, :]
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))  # ascending
    rank = min(rank, mean.shape[1])
    lengths = scale * np.sqrt(np.maximum(values[:, : -rank - 1 : -1], 0) / 2)
    rows = vectors[:, :, : -rank - 1 : -1] * lengths[:, None, :]
    return np.concatenate([scale * mean[:, None], rows.transpose(0, 2, 1)], axis=1)


def group_mean(vectors: np.ndarray, n_head_kv: int) -> np.ndarray:
    """Filters [n_head_kv, head_dim] of a layer: the mean of the vectors [n_head, head_dim] of the
    query heads that share a KV head, not normalised again."""
    n_head, head_dim = vectors.shape
    return vectors.reshape(n_head_kv, n_head // n_head_kv, head_dim).mean(1)
