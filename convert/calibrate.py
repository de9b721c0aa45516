"""Queries -> second moments -> filters. Pure mathematics, no model code.

The recipe is that of Q-Filters (arXiv 2503.02812): collect queries after RoPE, take the first right
singular vector v1 of every query head's query matrix, turn it so that most queries project
positively on it, and average over the query heads that share a KV head.

v1 of a matrix Q is the top eigenvector of Q^T Q, so Q need not be kept: the sum of outer products
does, [n_layer, n_head, d, d] whatever the number of queries. Only the vote on the sign needs v1
beforehand; for it a bounded, evenly thinned part of the queries is kept.
"""

from __future__ import annotations

import numpy as np
import torch

from ..config import QFilterError

VOTE_BYTES = 256 << 20


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
    """What is kept of the queries of every layer and query head.

    second: float64 [n_layer, n_head, d, d], sum of outer products
    first: float64 [n_layer, n_head, d], sum
    votes: float32 [n_layer, n_head, n_votes, d], every query while they fit into `vote_bytes`,
        an evenly spread part of them otherwise
    """

    def __init__(self, n_layer, n_head, head_dim, num_samples, vote_bytes=VOTE_BYTES):
        fits = max(vote_bytes // (n_layer * n_head * head_dim * 4), 1)
        self.num_samples = num_samples
        self.n_votes = min(num_samples, fits)
        self.counts = [0] * n_layer
        self.first = torch.zeros(n_layer, n_head, head_dim, dtype=torch.float64)
        self.second = torch.zeros(n_layer, n_head, head_dim, head_dim, dtype=torch.float64)
        self.votes = torch.zeros(n_layer, n_head, self.n_votes, head_dim)

    def add(self, layer: int, queries: torch.Tensor) -> None:
        """Take in the next queries [n_head, n_tokens, head_dim] of one layer."""
        exact = queries.double()
        self.first[layer] += exact.sum(1)
        self.second[layer] += exact.transpose(1, 2) @ exact
        count = self.counts[layer] + torch.arange(queries.shape[1])
        # query i of num_samples gets the slot that is reached between i and i + 1
        slot = count * self.n_votes // self.num_samples
        chosen = (count + 1) * self.n_votes // self.num_samples > slot
        self.votes[layer][:, slot[chosen]] = queries[:, chosen].float()
        self.counts[layer] += queries.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.element_size() * t.nelement() for t in (self.first, self.second, self.votes))

    def directions(self) -> torch.Tensor:
        """v1 of every query head, float64 [n_layer, n_head, head_dim], unit length, with the sign
        on which most queries project positively (a draw goes to the mean query)."""
        if min(self.counts) == 0:
            raise QFilterError("some layers handed out no queries: this model is not supported")
        if not torch.isfinite(self.second).all():
            raise QFilterError(
                "the model computes NaN or infinite queries: its weights are "
                "damaged, download it again"
            )
        # numpy: torch's threads wait for each other at every one of these small matrices
        v1 = torch.from_numpy(np.linalg.eigh(self.second.numpy()).eigenvectors[..., -1])
        n_votes = min(self.counts) * self.n_votes // self.num_samples
        projections = torch.einsum("lhnd,lhd->lhn", self.votes[:, :, :n_votes], v1.float())
        majority = torch.sign(projections).sum(-1).double()
        on_mean = torch.einsum("lhd,lhd->lh", self.first, v1)
        sign = torch.where(majority != 0, majority, on_mean).sign()
        return v1 * torch.where(sign == 0, 1.0, sign)[..., None]

    def filters(self, n_head_kv: int) -> np.ndarray:
        """Filters float32 [n_layer, n_head_kv, head_dim] in the model's own head layout: the mean
        of the directions of the query heads that share a KV head, not normalised again."""
        directions = self.directions()
        n_layer, n_head, head_dim = directions.shape
        groups = directions.reshape(n_layer, n_head_kv, n_head // n_head_kv, head_dim)
        return groups.mean(2).float().numpy()
