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
WEIGHT, SHARE = 0.1, 0.7
"""A query looks at a row that gets a larger weight; rows come back if a query gives this share of
its attention to those that it looks at, sinks not counted."""
LEAST, LEAST_SHARE = 64, 4
"""How many rows come back in any case: 64 or 1 / 4 of them."""
NEAR = 16, 48
"""How far around a word of the question rows come back: an eighth of the rows, at least and at most
these."""
NEAR_SHARE, NEAR_ROWS = 1 / 3, 2
"""They come back where this part of what the best place has is near, and are 1 / 2 of the rows."""


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
class Looks:
    """How the queries of all layers and heads look at rows.

    weights: [n] the largest weight that a query gives to the row
    query, row, weight: of every weight above WEIGHT / 2
    """

    weights: np.ndarray
    query: np.ndarray
    row: np.ndarray
    weight: np.ndarray

    def shares(self, sinks: int, least: float = WEIGHT) -> np.ndarray:
        """[n] the largest share that a query gives to all rows that it looks at, this one included."""
        at = self.weight > least
        counted = at & (self.row >= sinks)
        given = np.bincount(
            self.query[counted], self.weight[counted], self.query.max(initial=0) + 1
        )
        result = np.zeros(len(self.weights))
        np.maximum.at(result, self.row[at], given[self.query[at]])
        return result


@dataclass
class Recall:
    """What one recall saw and chose.

    positions: [n] of the archive before the question, ascending
    scores: [n] the largest weights of the same rows, or of those that bring them along
    always: [n] is it a sink or among the newest?
    near: [n] what of the question's words is near, see `near`
    n_least, n_rows: how many are chosen at least, and at most
    """

    positions: np.ndarray
    looks: Looks
    scores: np.ndarray
    always: np.ndarray
    near: np.ndarray
    sinks: int
    n_least: int
    n_rows: int

    def choose(self, least: float = WEIGHT, share: float = SHARE) -> np.ndarray:
        """[n] is it chosen?"""
        chosen = self._most_looked_at()
        # around the question's words
        chosen[self._near(chosen)[: self._n_near(chosen)]] = True
        # where a query searches
        looked_at = spread(self.looks.shares(self.sinks, least), self.n_rows) >= share
        more = self._by_looks()
        more = more[looked_at[more] & ~chosen[more]]
        chosen[more[: self.n_rows - chosen.sum()]] = True
        return chosen

    def _by_looks(self) -> np.ndarray:
        """Rows by how they are looked at, on a tie the newest first."""
        return np.lexsort((-np.arange(len(self.scores)), -self.scores, ~self.always))

    def _most_looked_at(self) -> np.ndarray:
        chosen = np.zeros(len(self.scores), bool)
        chosen[self._by_looks()[: self.n_least]] = True
        return chosen

    def _near(self, chosen) -> np.ndarray:
        """Rows around the question's words that are not chosen, the best first."""
        best = self.near[~self.always].max(initial=0)
        order = self._by_looks()
        order = order[np.argsort(-self.near[order], kind="stable")]
        near = (self.near > 0) & (self.near >= np.float32(NEAR_SHARE) * best)
        return order[near[order] & ~chosen[order]]

    def _n_near(self, chosen) -> int:
        return min(self.n_rows - chosen.sum(), self.n_rows // NEAR_ROWS)

    def doubtful(self, near: float) -> np.ndarray:
        """[n] might it be chosen or not if numbers were different by this part of them?"""
        chosen = self.choose()
        doubtful = np.zeros(len(chosen), bool)
        for a in (1 - near, 1, 1 + near):
            for b in (1 - near, 1, 1 + near):
                doubtful |= self.choose(WEIGHT * a, SHARE * b) != chosen
        first = self._most_looked_at()
        others, n_near = self._near(first), self._n_near(first)
        if n_near < len(others):  # among equal words scores decide
            last = self.near[others[n_near]]
            at = others[self.near[others] == last]
            doubtful[at] |= np.abs(np.log(self.scores[at] / self.scores[others[n_near]])) < near
        # scores near those at which it stops, but for one that all of them have
        ranked = np.sort(self.scores[~self.always])[::-1]
        n_always = self.always.sum()
        for n in (self.n_least - n_always, chosen.sum() - n_always):
            for bound in ranked[max(0, n - 1) : n + 1]:
                close = np.abs(np.log(self.scores / bound)) < near
                if np.ptp(self.scores[close & ~self.always]) > 0:
                    doubtful |= close
        return doubtful & ~self.always


def fill(chosen, own, n: int) -> np.ndarray:
    """The positions of n rows of a head: those chosen, and the newest that it has."""
    others = [position for position in own if position not in chosen]
    return np.sort([*chosen, *others[len(others) - (n - len(chosen)) :]])


def look(queries: Queries, keys: torch.Tensor) -> tuple[np.ndarray, tuple]:
    """The largest weight that each row gets from any query of any head, and all that are not small.

    keys [n_head_kv, rows, head_dim]; returns [rows], and of each the query's number, row, weight.
    """
    q, k = queries.q.double(), keys.double()
    logits = q @ k.repeat_interleave(len(q) // len(k), dim=0).transpose(1, 2) * queries.scale
    if queries.softcap:
        logits = queries.softcap * torch.tanh(logits / queries.softcap)
    weights = logits.softmax(-1).flatten(0, 1).numpy()
    query, row = np.nonzero(weights > WEIGHT / 2)
    return weights.max(0), (query, row, weights[query, row])


def spread(weights: np.ndarray, n_rows: int) -> np.ndarray:
    """The score of each row: the largest weight of those that bring it along."""
    after = int(np.clip(n_rows // 8, *AFTER))
    before = after // 3
    return np.array(
        [weights[max(0, i - after) : i + before + 1].max() for i in range(len(weights))]
    )


def word(piece: bytes) -> bytes:
    """What a token is searched by; b"" for one that a text can't be searched for."""
    piece = b"".join(piece.split()).lower()
    return piece if any(c >= 0x80 or chr(c).isalnum() for c in piece) else b""


def near(words: list[bytes], asked: list[bytes], n_near: int) -> np.ndarray:
    """[n] for each of the words the inverse document frequencies of the different words of the
    question, `asked`, of which one is at most n_near words away; float32."""
    words, blocks = np.array(words, object), np.arange(len(words)) // (2 * n_near)
    n_blocks, result = len(set(blocks)), np.zeros(len(words), np.float32)
    for one in dict.fromkeys(asked):
        at = np.flatnonzero(words == one) if one else np.array([], int)
        n_with = len(set(blocks[at]))
        idf = np.float32(np.log(1 + (n_blocks - n_with + 0.5) / (n_with + 0.5)))
        close = np.zeros(len(words), bool)
        for i in at:
            close[max(0, i - n_near) : i + n_near + 1] = True
        result[close] += idf
    return result


def choose(
    question: Question,
    keys: list[torch.Tensor],
    positions: np.ndarray,
    words: list[bytes],
    n_rows: int,
    sinks: int,
    window_length: int,
) -> Recall:
    """Which rows the question wants to have, at most n_rows.

    keys: for each layer [n_head_kv, n, head_dim], of all rows before the question; positions: [n];
    words: of all positions, the question's behind the others.
    """
    weights, found, n_queries = np.zeros(len(positions)), [], 0
    for queries in question.queries:
        largest, (query, row, weight) = look(queries, keys[queries.index])
        weights = np.maximum(weights, largest)
        found.append((query + n_queries, row, weight))
        n_queries += queries.q.shape[0] * queries.q.shape[1]
    looks = Looks(weights, *(np.concatenate(part) for part in zip(*found, strict=True)))
    n_near = int(np.clip(n_rows // 8, *NEAR))
    newest = min(window_length, NEWEST, (n_rows - sinks) // NEWEST_SHARE)
    age = np.arange(len(weights))
    return Recall(
        positions,
        looks,
        spread(weights, n_rows),
        (age < sinks) | (age >= len(age) - newest),
        near([words[p] for p in positions], words[question.start :], n_near),
        sinks,
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

    def choose(self, question: Question, words: list[bytes], n_rows: int) -> Recall:
        """See `choose`. The question's own rows leave the archive."""
        self.cut(question.start)
        keys, positions = [k for k, *_ in self.archive], self.archive[0][2].numpy()
        return choose(question, keys, positions, words, n_rows, self.sinks, self.window_length)

    def recall(self, question: Question, positions: np.ndarray) -> None:
        """Go on where the question began, with the rows of these positions [n_layer, n_head_kv, n]."""
        self.cut(question.start)
        for layer, (k, v, all_positions) in enumerate(self.archive):
            rows = torch.searchsorted(all_positions, torch.as_tensor(positions[layer]))
            heads = torch.arange(len(k))[:, None]
            self.k[layer], self.v[layer] = k[heads, rows], v[heads, rows]
            self.positions[layer] = all_positions[rows]


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
