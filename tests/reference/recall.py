"""Recall: every row that was ever stored stays in an archive, and a question chooses from it.

Weights are float64, and of all rows at once.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from reference.cache import BoundedCache
from reference.families import FamilyCache

AFTER = 16, 24
"""How many positions after it a position brings along that is looked at: an eighth of the rows, at
least and at most these; and a third of that before it."""
NEWEST, NEWEST_SHARE = 64, 4
"""How many of the last positions always stay, at most, and at most which part of the rows: 1 / 4."""
WEIGHT, LEAST, LEAST_SHARE = 0.7, 64, 4
"""Positions come back whose score is not smaller; and 64 or 1 / 4 of the rows whatever they score."""


@dataclass
class Queries:
    """Those of a question's tokens in one layer, after RoPE: [n_head, n, head_dim].

    index: of the layer whose rows they look at, as the cache counts; softcap: None if there is none.
    """

    index: int
    q: torch.Tensor
    scale: float
    softcap: float | None


@dataclass
class Question:
    """start: its first position; state: what layers without attention held before it."""

    start: int
    queries: list[Queries] = field(default_factory=list)
    state: object = None


@dataclass
class Recall:
    """What one recall saw and did.

    positions: [n] of the archive before the question, ascending
    weights, scores: [n] of the same rows, the scores with the neighbours
    chosen: [n_rows] positions, ascending
    always: those of them that are sinks or among the newest
    last_chosen, first_left: lowest score of the others that were chosen, highest of the rest
    n_least, n_rows: how many are chosen at least, and at most
    """

    positions: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray
    always: np.ndarray
    last_chosen: float
    first_left: float
    n_least: int
    n_rows: int

    def number_is_right(self, near: float = 0.01) -> bool:
        """Is it right to stop after those that were chosen, up to rounding?"""
        n = len(self.chosen)
        if not self.n_least <= n <= self.n_rows:
            return False
        enough = n == self.n_rows or self.first_left < WEIGHT * (1 + near)
        return enough and (n == self.n_least or self.last_chosen >= WEIGHT * (1 - near))

    def gap(self, position: int) -> float:
        """By how much the score of a position would have to change for the other choice: 0.01 is
        one percent. Infinite for sinks, the newest and positions that are not there."""
        i = np.searchsorted(self.positions, position)
        if i == len(self.positions) or self.positions[i] != position or position in self.always:
            return np.inf
        if position in self.chosen:
            return np.log(self.scores[i] / self.first_left)
        return np.log(self.last_chosen / self.scores[i])


def look(queries: Queries, keys: torch.Tensor) -> np.ndarray:
    """The largest weight that each row gets from any query of any head.

    keys [n_head_kv, rows, head_dim]; returns [rows].
    """
    q, k = queries.q.double(), keys.double()
    logits = q @ k.repeat_interleave(len(q) // len(k), dim=0).transpose(1, 2) * queries.scale
    if queries.softcap:
        logits = queries.softcap * torch.tanh(logits / queries.softcap)
    return logits.softmax(-1).amax((0, 1)).numpy()


def spread(weights: np.ndarray, n_rows: int) -> np.ndarray:
    """The score of each row: the largest weight of those that bring it along."""
    after = int(np.clip(n_rows // 8, *AFTER))
    before = after // 3
    return np.array(
        [weights[max(0, i - after) : i + before + 1].max() for i in range(len(weights))]
    )


def choose(
    question: Question,
    keys: list[torch.Tensor],
    positions: np.ndarray,
    n_rows: int,
    sinks: int,
    window_length: int,
    n_chosen: int,
) -> Recall:
    """Which n_chosen rows the question wants to have, of at most n_rows.

    keys: for each layer [n_head_kv, n, head_dim], of all rows before the question; positions: [n].
    """
    weights = np.zeros(len(positions))
    for queries in question.queries:
        weights = np.maximum(weights, look(queries, keys[queries.index]))
    scores = spread(weights, n_rows)
    newest = min(window_length, NEWEST, (n_rows - sinks) // NEWEST_SHARE)
    by_age = np.arange(len(scores))
    always = (by_age < sinks) | (by_age >= len(scores) - newest)
    best_first = np.lexsort((-by_age, -scores, ~always))  # on a tie the newest
    chosen = np.isin(by_age, best_first[:n_chosen])
    n_rows = min(n_rows, len(scores))
    return Recall(
        positions,
        weights,
        scores,
        positions[chosen],
        positions[always],
        scores[chosen & ~always].min(initial=np.inf),
        scores[~chosen].max(initial=0),
        min(n_rows, sinks + newest + max(LEAST, n_rows // LEAST_SHARE)),
        n_rows,
    )


class Archived(BoundedCache):
    """A BoundedCache that forgets nothing.

    archive: for each layer K, V [n_head_kv, n, head_dim] as stored and positions [n].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.archive = []

    def append(self, layer, k, v, positions):
        super().append(layer, k, v, positions)
        k, v = (rows[:, -len(positions) :] for rows in self.rows(layer)[:2])
        if layer == len(self.archive):
            self.archive.append((k, v, positions))
        else:
            old_k, old_v, old = self.archive[layer]
            k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
            self.archive[layer] = k, v, torch.cat([old, positions])

    def cut(self, start: int) -> None:
        """Forget all from position `start` on. The cells stay as they are."""
        for layer, (k, v, positions) in enumerate(self.archive):
            n = int((positions < start).sum())
            self.archive[layer] = k[:, :n], v[:, :n], positions[:n]

    def choose(self, question: Question, n_rows: int, n_chosen: int) -> Recall:
        """See `choose`. The question's own rows leave the archive."""
        self.cut(question.start)
        keys, positions = [k for k, *_ in self.archive], self.archive[0][2].numpy()
        return choose(question, keys, positions, n_rows, self.sinks, self.window_length, n_chosen)

    def recall(self, question: Question, positions: np.ndarray) -> None:
        """Go on where the question began, with the rows of these positions in all heads."""
        self.cut(question.start)
        for layer, (k, v, all_positions) in enumerate(self.archive):
            rows = torch.searchsorted(all_positions, torch.as_tensor(positions))
            self.k[layer], self.v[layer] = k[:, rows], v[:, rows]
            self.positions[layer] = all_positions[rows].expand(len(k), -1)


class ArchivedFamily(Archived, FamilyCache):
    """The same for layers that evict; the others go back to where they were."""

    def cut(self, start):
        super().cut(start)
        for layer, (k, v, positions) in self.windowed.items():
            n = int((positions[0] < start).sum())
            self.windowed[layer] = k[:, :n], v[:, :n], positions[:, :n]

    def recall(self, question, positions):
        super().recall(question, positions)
        self.state = question.state


@contextmanager
def asked(model, cache: Archived, start: int) -> Iterator[Question]:
    """What the model reads within is a question that begins at position `start`."""
    question = Question(start, state=copy.deepcopy(getattr(cache, "state", None)))
    model.on_query = lambda index, _, q: question.queries.append(
        Queries(index, q, *model.logit_scale(index))
    )
    try:
        yield question
    finally:
        model.on_query = None
