"""What a bounded cache is, as plainly as possible: lists of rows.

Rows are the bytes that the engine stored when their position was decoded. From then on the model
alone says where they are, and which of them an eviction keeps: it computes the scores from those
bytes, in float64.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

N_REP = 2
"""Query heads of a KV head."""


class Mismatch(AssertionError):
    """Engine and model differ."""


def need(condition, message: str) -> None:
    if not condition:
        raise Mismatch(message)


@dataclass
class Settings:
    """Of a context. Sizes are per sequence."""

    n_seq: int = 1
    n_ctx: int = 256
    n_cells: int = 64
    n_keep: int = 48
    n_sink: int = 4
    n_window: int = 8
    n_batch: int = 16
    n_ubatch: int = 16
    policy: str = "knorm"
    filters: int = 0  # seed of the filters
    seed: int = 0  # of the policy "random"
    type_k: str = "f16"
    type_v: str = "f16"
    flags: int = 0
    archive: bool = False

    @property
    def bound(self) -> int:
        return min(self.n_cells, self.n_ctx)


class Row(NamedTuple):
    """K and V of one KV head at one position, as stored."""

    position: int
    k: bytes
    v: bytes


@dataclass
class Sequence:
    """cells: the positions that llama.cpp goes by, ascending. heads: (layer, KV head) -> rows,
    as many as cells, ascending by position. Positions below `compacted` can't be cut without the
    archive: position -> (layer, KV head) -> row. lossy: rows are gone that it does not have. behind:
    rows of the archive that a state came from, which only the scores of learned filters still know."""

    cells: list[int] = field(default_factory=list)
    heads: dict[tuple[int, int], list[Row]] = field(default_factory=dict)
    compacted: int = 0
    archive: dict[int, dict[tuple[int, int], Row]] = field(default_factory=dict)
    behind: dict[int, dict[tuple[int, int], Row]] = field(default_factory=dict)
    lossy: bool = False
    n_first: int = 0  # first positions that always stay, as sinks do
    least_sinks: int = 0
    archives: bool = False

    @property
    def n_sink(self) -> int:
        return max(self.least_sinks, self.n_first)

    @property
    def first(self) -> int:
        return self.cells[0] if self.cells else -1

    @property
    def last(self) -> int:
        return self.cells[-1] if self.cells else -1

    @property
    def start(self) -> int:
        """From here on it is all of the sequence. Without sinks no cell tells where that began."""
        return 0 if self.compacted and not self.n_sink else self.first

    def adopt(self, n: int) -> None:
        """The engine may have forgotten `n_first`: it says that n positions stay."""
        if n == self.least_sinks:
            self.n_first = 0

    def can_remove(self, p0: int, p1: int) -> bool:
        if not self.cells or p0 >= p1 or (p0 <= self.start and p1 > self.last):
            return True  # nothing, or the whole sequence
        return self.can_cut(p0) if p1 > self.last else p0 >= self.compacted

    def can_cut(self, p0: int) -> bool:
        """Can decoding go on at p0, after the last row that is left? That must not be a sink."""
        left = [-1] + [p for p in self.cells if p < p0]
        lost = self.compacted and left[-1] < self.compacted - 1
        return p0 > self.last or (p0 >= self.compacted and not lost)

    @property
    def rewind_limit(self) -> int:
        return next(p0 for p0 in range(self.last + 2) if self.can_cut(p0) or self.can_fill(p0))

    @property
    def archive_begin(self) -> int:
        """From here on, up to `compacted`, all positions are in the archive."""
        begin = self.compacted
        while begin - 1 in self.archive:
            begin -= 1
        return begin

    def can_fill(self, p0: int) -> bool:
        """Can the cells be filled from the archive, to go on at p0?"""
        if not self.archives or not self.compacted or p0 > self.last:
            return False
        return p0 >= self.archive_begin and (p0 <= self.compacted or p0 - 1 in self.cells)

    def whole(self) -> dict[int, int]:
        """Position -> place of the rows whose positions are the same in all heads."""
        return {
            p: i
            for i, p in enumerate(self.cells)
            if p >= self.compacted or (self.compacted and i < self.n_sink)
        }

    def to_archive(self) -> None:
        if self.archives:
            for position, i in self.whole().items():
                rows = {head: rows[i] for head, rows in self.heads.items()}
                self.archive.setdefault(position, rows)

    def fill(self, p0: int, n: int, n_window: int, rows: list[int]) -> None:
        """Go on at p0, with n rows of every head: sinks, window, `rows`, what has no copy, what is
        there, the newest."""
        whole = self.whole()
        shared = sorted(p for p in self.archive.keys() | whole.keys() if p < p0)
        own = {h: [r.position for r in rs if r.position < p0] for h, rs in self.heads.items()}
        n_min = min(len(shared) + len(set(o) - set(shared)) for o in own.values())
        complete = n_min == len(shared) and n_min <= n and not self.lossy
        n = min(n, n_min)
        sinks = [p for p in self.cells if p < p0][: min(self.n_sink, n)]
        n_window, n_last = min(n_window, n - len(sinks), len(shared)), 0
        while n_last < n_window and shared[-1 - n_last] == p0 - 1 - n_last:
            n_last += 1
        always = sorted({*sinks, *shared[len(shared) - n_last :], *rows})
        if rows:  # no others come from the archive
            n = min(n, *(len({*always, *o}) for o in own.values()))
        for head, held in self.heads.items():
            known = {row.position: row for row in held}
            chosen = list(always)
            lost = [p for p in own[head] if p not in self.archive]
            for more in (lost, own[head], shared):
                for p in reversed(more):
                    if len(chosen) < n and p not in chosen:
                        chosen.append(p)
            self.heads[head] = [
                known[p] if p in known else self.archive[p][head] for p in sorted(chosen)
            ]
        n_rest = n - len(sinks)
        self.cells = [*sinks, *range(p0 - n_rest, p0)]
        complete = complete and self.cells == shared  # no positions in between were removed
        self.compacted = 0 if complete or not n_rest else p0 - n_last
        self.archive = {p: row for p, row in self.archive.items() if p < p0}

    def remove(self, p0: int, p1: int) -> None:
        if not self.cells or (p0 <= self.start and p1 > self.last):
            self.clear()
            return
        self.archive = {p: row for p, row in self.archive.items() if not p0 <= p < p1}
        self.cells = [p for p in self.cells if not p0 <= p < p1]
        for head, rows in self.heads.items():
            self.heads[head] = [r for r in rows if not p0 <= r.position < p1]

    def clear(self) -> None:
        if self.cells:  # before the first batch it is for what comes
            self.n_first = 0
        self.cells, self.heads, self.compacted = [], {head: [] for head in self.heads}, 0
        self.archive, self.lossy = {}, False


class Cache:
    """The sequences of one context.

    Args:
        shape: layers, KV heads, head_dim; weight: float32 [n_layer, n_head_kv, head_dim].
    """

    def __init__(self, settings: Settings, shape: tuple[int, int, int], weight: np.ndarray):
        self.settings, self.head_dim, self.weight = settings, shape[2], weight
        self.head_ids = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
        self.sequences = [self.empty() for _ in range(settings.n_seq)]
        self.n_evictions = self.n_dropped = 0
        self.n_rows = self.n_near_ties = 0  # rows chosen by scores, and those adopted
        self.n_rewinds = self.n_recalls = 0

    def empty(self) -> Sequence:
        return Sequence(
            heads={head: [] for head in self.head_ids},
            least_sinks=self.settings.n_sink,
            archives=self.settings.archive,
        )

    # -- operations

    def lacks_room(self, seq: int, n: int) -> bool:
        return n > 0 and len(self.sequences[seq].cells) + n > self.settings.bound

    def append(self, seq: int, start: int, rows: dict[tuple[int, int], list[Row]]) -> None:
        """The rows of new positions from `start` on, as the engine stored them."""
        sequence = self.sequences[seq]
        for head, new in rows.items():
            expected = list(range(start, start + len(new)))
            need([r.position for r in new] == expected, f"head {head}: new rows are not at the end")
            sequence.heads[head] += new
        sequence.cells += range(start, start + len(new))

    def seq_rm(self, seq: int, p0: int, p1: int) -> bool:
        p0, p1 = max(p0, 0), p1 if p1 >= 0 else 1 << 31
        if seq >= len(self.sequences):
            return (
                len(self.sequences) == 1
            )  # llama.cpp: one stream serves all ids, three only three
        chosen = self.sequences if seq < 0 else [self.sequences[seq]]
        if not all(s.can_remove(p0, p1) for s in chosen):
            if len(chosen) > 1 or p1 <= chosen[0].last or not chosen[0].can_fill(p0):
                return False
            self.n_rewinds += 1
            chosen[0].to_archive()
            chosen[0].fill(p0, self.settings.n_keep, self.settings.n_window, [])
            return True
        for sequence in chosen:
            sequence.remove(p0, p1)
        return True

    def seq_cp(self, source: int, target: int, p0: int, p1: int) -> None:
        if source == target or max(source, target) >= len(self.sequences):
            return
        sequence = self.sequences[source]
        if sequence.cells and (p0 > sequence.first or 0 <= p1 <= sequence.last):
            return  # parts of a sequence are not copied
        self.sequences[target] = deepcopy(sequence) if sequence.cells else self.empty()

    def keep_first(self, seq: int, n: int) -> int:
        """Returns how many positions always stay."""
        sequence, settings = self.sequences[seq], self.settings
        if not sequence.compacted:
            sequence.n_first = min(n, max(0, settings.n_keep - settings.n_window) // 2)
        return sequence.n_sink

    def clear(self) -> None:
        for sequence in self.sequences:
            sequence.clear()

    # -- eviction

    def evict(self, seq: int, n_keep: int, claimed: dict[tuple[int, int], list[int]]) -> None:
        """Leave n_keep rows of every head. claimed: the positions that the engine says it kept,
        which count where scores are too close to tell."""
        settings, sequence = self.settings, self.sequences[seq]
        sequence.to_archive()
        cells, n = sequence.cells, len(sequence.cells)
        scores = Scores(self, settings, sequence)
        for (layer, head), rows in sequence.heads.items():
            inner = range(sequence.n_sink, n - settings.n_window)
            score, error = scores(layer, head, rows)
            best = sorted(inner, key=lambda i: (score[i], i), reverse=True)
            chosen = set(best[: n_keep - sequence.n_sink - settings.n_window])
            theirs = [i for i, row in enumerate(rows) if row.position in claimed[layer, head]]
            theirs = set(theirs) & set(inner)
            need(len(theirs) == len(chosen), f"layer {layer} head {head} kept other rows")
            for i in theirs - chosen:
                for j in chosen - theirs:
                    need(
                        error[i] + error[j] > 0 and score[i] + error[i] >= score[j] - error[j],
                        f"layer {layer} head {head} kept position {rows[i].position} with score "
                        f"{score[i]:.9g} and dropped {rows[j].position} with {score[j]:.9g}, "
                        f"errors up to {error[i]:.1g} and {error[j]:.1g}",
                    )
            self.n_rows += len(chosen)
            self.n_near_ties += len(theirs - chosen)
            sequence.heads[layer, head] = [
                row for i, row in enumerate(rows) if i not in inner or i in theirs
            ]
        sequence.compacted = max(sequence.compacted, cells[n - settings.n_window - 1] + 1)
        sequence.cells = cells[: sequence.n_sink] + cells[n - n_keep + sequence.n_sink :]
        self.n_evictions += 1
        self.n_dropped += n - n_keep


class Scores:
    """Scores of rows in float64, and by how much those of the engine may differ from them.

    Called with layer, head and rows; returns two float64 arrays [len(rows)].
    """

    def __init__(self, cache: Cache, settings: Settings, sequence: Sequence):
        self.cache, self.settings, self.n_sink = cache, settings, sequence.n_sink
        self.archive, self.whole = sequence.behind | sequence.archive, sequence.whole()
        self.heads = dict(sequence.heads)  # as they are now
        self.next_position = sequence.last + 1
        self.method = getattr(self, settings.policy)

    def __call__(self, layer, head, rows):
        self.rows = rows
        positions = np.array([row.position for row in rows])
        keys = decode([row.k for row in rows], self.settings.type_k)
        self.values = decode([row.v for row in rows], self.settings.type_v)
        return self.method(layer, head, positions, keys)

    def qfilters(self, layer, head, positions, keys):
        return self._project(keys, self.cache.weight[layer, head].astype(np.float64))

    def qahead(self, layer, head, positions, keys):
        """The weight in reverse is the mean query before RoPE."""
        query = self.cache.weight[layer, head, ::-1].astype(np.float64)
        ahead = np.mean([rope(query, self.next_position + i) for i in range(0, 256, 16)], axis=0)
        # angles in float32
        wrong = (self.next_position + 256) * 2**-22 * np.linalg.norm(query)
        score, error = self._project(keys, ahead)
        return score, error + wrong * np.linalg.norm(keys, axis=-1)

    def _project(self, keys, weight):
        n, type_k = len(weight), self.settings.type_k
        quantized = type_k not in ("f32", "f16", "bf16")
        if quantized and n % 64 == 0:
            weight = rotate(weight)
        sizes = np.abs(keys) @ np.abs(weight)
        # sums of n products in float32; a rotated filter was rounded before
        error = n * 2**-23 * sizes + n * 2**-24 * np.abs(keys).sum(-1) * np.abs(weight).max()
        return keys @ weight, error

    def qfilters2(self, layer, head, positions, keys):
        rows = moments(self.cache.weight)[layer].astype(np.float64)
        n, type_k = keys.shape[1], self.settings.type_k
        if type_k not in ("f32", "f16", "bf16") and n % 64 == 0:
            rows = np.apply_along_axis(rotate, -1, rows)
        score, error = np.zeros(len(keys)), np.zeros(len(keys))
        for mean, *directions in rows[head * N_REP : (head + 1) * N_REP]:
            products = np.stack([keys @ direction for direction in directions])
            sizes = np.stack([np.abs(keys) @ np.abs(direction) for direction in directions])
            logits = keys @ mean + (products**2).sum(0)
            # of sums of n products in float32, and of squares of such
            rounding = np.abs(keys) @ np.abs(mean) + 2 * (np.abs(products) * sizes).sum(0)
            rounding = n * 2**-22 * (rounding + np.abs(logits))
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            score += weights
            error += weights * 2 * (rounding + rounding.max() + 2**-18)
        lengths = np.linalg.norm(self.values, axis=-1)
        return score * lengths, error * lengths

    def knorm(self, layer, head, positions, keys):
        squares = (keys**2).sum(-1)
        return -squares, keys.shape[1] * 2**-23 * squares

    def keydiff(self, layer, head, positions, keys):
        unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        mean = unit.mean(0)
        length = np.linalg.norm(mean)
        n, head_dim = keys.shape
        return -unit @ mean / length, np.full(n, (n + 3 * head_dim) * 2**-23 / length)

    def kvdiff(self, layer, head, positions, keys):
        return self._blend([(0.5, *self.keydiff(layer, head, positions, keys))])

    def qblend(self, layer, head, positions, keys):
        return self._blend(
            [
                (0.25, *self.keydiff(layer, head, positions, keys)),
                (0.25, *self.qfilters(layer, head, positions, keys)),
            ]
        )

    def _blend(self, parts):
        """With the distance of the values from their mean, for five rows and once more for the own."""
        n, head_dim = self.values.shape
        far = np.linalg.norm(self.values - self.values.mean(0), axis=-1)
        size = np.linalg.norm(self.values, axis=-1)
        parts = [(1, far, (n + head_dim) * 2**-23 * (size + size.mean())), *parts]
        own, error = np.zeros(n), np.zeros(n)
        for weight, score, wrong in parts:
            deviation = score.std() + 1e-30
            z = (score - score.mean()) / deviation
            rounding = n * 2**-23 * np.abs(score).mean() / deviation
            wrong = (wrong + wrong.mean()) / deviation
            own += weight * z
            error += weight * (wrong + rounding + np.abs(z) * (wrong.mean() + n * 2**-23))
        pooled = [
            [x[max(0, i - 2) : i + 3].mean() + 0.3 * x[i] for i in range(n)] for x in (own, error)
        ]
        return np.array(pooled[0]), np.array(pooled[1]) + 2**-20

    def learned(self, layer, head, positions, keys):
        """With what the learned filters said of a row while all heads had those of its position."""
        score, error = self.qblend(layer, head, positions, keys)
        inner = slice(self.n_sink, len(score) - self.settings.n_window)
        found = [self._learned_of(layer, head, row) for row in self.rows[inner]]
        total = wrong = 0
        for x, e in ((score[inner], error[inner]), np.array(found).T):
            deviation, n = x.std() + 1e-30, len(x)
            z = (x - x.mean()) / deviation
            e = (e + e.mean() + n * 2**-23 * np.abs(x).mean()) / deviation
            total, wrong = total + z, wrong + e + np.abs(z) * (e.mean() + n * 2**-23)
        score[inner], error[inner] = total, wrong + 2**-20
        return score, error

    def _learned_of(self, layer, head, row):
        """A number, and by how much the engine's may differ."""
        key = (self.settings.filters, self.settings.type_k, self.settings.type_v, layer, head, row)
        if key not in LEARNED:
            n_head_kv = self.cache.weight.shape[1]
            if row.position in self.whole:
                i = self.whole[row.position]
                rows = [self.heads[layer, h][i] for h in range(n_head_kv)]
            else:
                rows = [self.archive[row.position][layer, h] for h in range(n_head_kv)]
            keys = decode([r.k for r in rows], self.settings.type_k)
            values = decode([r.v for r in rows], self.settings.type_v)
            if self._rotated(self.settings.type_k, keys):
                keys = np.apply_along_axis(rotate, -1, keys)
            if self._rotated(self.settings.type_v, values):
                values = np.apply_along_axis(rotate, -1, values)
            keys = np.array([rope(k, -row.position) for k in keys])
            x = np.concatenate([keys.ravel(), values.ravel()])
            weight = learned(self.cache.weight)[layer, head].astype(np.float64)
            size = np.abs(x) @ np.abs(weight)
            turned = row.position * 2**-22 * np.abs(keys).sum() * np.abs(weight).max()
            LEARNED[key] = x @ weight, len(x) * 2**-22 * size + turned
        return LEARNED[key]

    @staticmethod
    def _rotated(kind, rows):
        """Does llama.cpp rotate them before it stores them?"""
        return kind not in ("f32", "f16", "bf16") and rows.shape[1] % 64 == 0

    def streaming(self, layer, head, positions, keys):
        return np.zeros(len(positions)), np.zeros(len(positions))

    def random(self, layer, head, positions, keys):
        scores = [splitmix(self.settings.seed, layer, head, int(p)) for p in positions]
        return np.array(scores), np.zeros(len(positions))


LEARNED: dict = {}
"""What `Scores.learned` knows of rows."""


def learned(weight: np.ndarray) -> np.ndarray:
    """Learned filters out of others [n_layer, n_head_kv, head_dim]: float32 [n_layer, n_head_kv,
    n_head_kv * 2 * head_dim], all parts different."""
    parts = [np.roll(weight, 5 * i + 1, axis=-1) for i in range(2 * weight.shape[1])]
    return np.ascontiguousarray(np.concatenate(parts, axis=-1))


def moments(weight: np.ndarray) -> np.ndarray:
    """Second-order filters of rank 2 out of first-order ones [n_layer, n_head_kv, head_dim]: float32
    [n_layer, n_head_kv * N_REP, 3, head_dim], all rows different."""
    rows = [
        np.stack([np.roll(weight[:, i // N_REP], 3 * i + j, axis=-1) for j in range(3)], axis=1)
        for i in range(weight.shape[1] * N_REP)
    ]
    return np.ascontiguousarray(np.stack(rows, axis=1))


def rope(vector: np.ndarray, position: int) -> np.ndarray:
    """RoPE of neighbouring pairs, as Llama models in GGUF have it, base 10,000."""
    pairs = vector[0::2] + 1j * vector[1::2]
    turned = pairs * np.exp(1j * position * 10000.0 ** (-np.arange(len(pairs)) / len(pairs)))
    return np.stack([turned.real, turned.imag], axis=-1).ravel()


def splitmix(*values: int) -> float:
    """Values chained through splitmix64, as a number in [0, 1) of 24 bits."""
    x, ones = 0, (1 << 64) - 1
    for value in values:
        x = (x + value + 0x9E3779B97F4A7C15) & ones
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ones
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ones
        x ^= x >> 31
    return (x >> 40) / (1 << 24)


def rotate(weight: np.ndarray) -> np.ndarray:
    """By the largest orthonormal Hadamard matrix of 64 or more that divides the row: llama.cpp
    stores quantized keys like that."""
    n = 64
    while len(weight) % (2 * n) == 0:
        n *= 2
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return (weight.reshape(-1, n) @ (matrix / np.sqrt(n))).reshape(-1)


def decode(rows: list[bytes], type_name: str) -> np.ndarray:
    """Stored rows of one head as float64 [len(rows), head_dim]."""
    data = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    values = dequantize(data, GGMLQuantizationType[type_name.upper()])
    return values.astype(np.float64)
