"""The bounded KV cache: what is kept when the next chunk does not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

# ---- policies: score(head) -> [n] float64, large = keep


@dataclass
class Head:
    """What a policy may look at: the rows of one KV head.

    keys: [n, head_dim] float64; positions: [n]; filter: [head_dim] or None, for policies that
    look ahead the query that is expected next;
    layer: of the model; index: of the KV head; seed: of the cache; values: [n, head_dim];
    moments: [query heads of this KV head, 1 + rank, head_dim] or None.
    """

    keys: np.ndarray
    positions: np.ndarray
    filter: np.ndarray | None
    layer: int
    index: int
    seed: int
    values: np.ndarray | None = None
    moments: np.ndarray | None = None


def score_qfilters(head: Head) -> np.ndarray:
    """Projection of the key on its head's filter."""
    return head.keys @ head.filter


def score_knorm(head: Head) -> np.ndarray:
    """Minus the L2 norm of the key."""
    return -np.sqrt((head.keys**2).sum(-1))


def score_streaming(head: Head) -> np.ndarray:
    """All alike: the newest win."""
    return np.zeros(len(head.keys))


def score_keydiff(head: Head) -> np.ndarray:
    """Minus the cosine of the key with the mean of the head's normalized keys
    (arXiv 2504.15364)."""
    directions = head.keys / np.linalg.norm(head.keys, axis=-1, keepdims=True)
    mean = directions.mean(0)
    return -directions @ mean / np.linalg.norm(mean)


def score_random(head: Head) -> np.ndarray:
    """A hash of seed, layer, head and position: 24 bits of four rounds of splitmix64."""
    mask, scores = 2**64 - 1, []
    for position in head.positions.tolist():
        x = 0
        for value in (head.seed, head.layer, head.index, position):
            x = (x + value + 0x9E3779B97F4A7C15) & mask
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            x ^= x >> 31
        scores.append((x >> 40) / 2**24)
    return np.array(scores)


def score_qfilters2(head: Head) -> np.ndarray:
    """The weight that a key is expected to get, times the length of its value. Per query head the
    softmax of log E[exp(q.k)], then the mean over the query heads."""
    expected = np.zeros(len(head.keys))
    for mean, *directions in head.moments.astype(np.float64):
        logits = head.keys @ mean
        for direction in directions:
            logits = logits + (head.keys @ direction) ** 2
        weights = np.exp(logits - logits.max())
        expected += weights / weights.sum() / len(head.moments)
    return expected * np.linalg.norm(head.values, axis=-1)


def standard(x: np.ndarray) -> np.ndarray:
    """Less its mean, divided by its deviation."""
    return (x - x.mean()) / x.std()


def blend(head: Head, by_key: np.ndarray) -> np.ndarray:
    """How far the value is from the mean value, and a score of the key, for a row and its neighbours:
    the mean of five positions, at the ends of fewer, and 0.3 times its own."""
    order = np.argsort(head.positions)
    far = np.linalg.norm(head.values - head.values.mean(0), axis=-1)
    own = (standard(far) + by_key)[order]
    scores = np.empty(len(own))
    for i, row in enumerate(order):
        scores[row] = own[max(0, i - 2) : i + 3].mean() + 0.3 * own[i]
    return scores


def score_qblend(head: Head) -> np.ndarray:
    """A quarter each of the filter's and of KeyDiff's."""
    return blend(head, 0.25 * standard(score_qfilters(head)) + 0.25 * standard(score_keydiff(head)))


def score_kvdiff(head: Head) -> np.ndarray:
    """Half of KeyDiff's."""
    return blend(head, 0.5 * standard(score_keydiff(head)))


POLICIES = {
    "qfilters": score_qfilters,
    "knorm": score_knorm,
    "streaming": score_streaming,
    "keydiff": score_keydiff,
    "random": score_random,
    "qfilters2": score_qfilters2,
    "qblend": score_qblend,
    "kvdiff": score_kvdiff,
    "qahead": score_qfilters,
    "learned": score_qblend,  # and what `BoundedCache.learn` says
}

AHEAD = range(0, 256, 16)
"""The next positions, at which the query before RoPE is expected."""


# ---- selection, the same for all policies


def select(
    scores: np.ndarray, positions: np.ndarray, n_keep: int, sinks: int, window_length: int
) -> np.ndarray:
    """Which n_keep of one head's rows stay: their indices, ascending by position.

    scores, positions: [n], positions distinct. The first `sinks` and the last `window_length`
    rows by position stay; of the rest the best by score, on a tie the newest; NaN is the worst.
    """
    by_position = np.argsort(positions)
    n = len(by_position)
    candidates = by_position[sinks : n - window_length]
    value = np.where(np.isnan(scores), -np.inf, scores)[candidates]
    best_first = candidates[np.lexsort((-positions[candidates], -value))]
    best = best_first[: n_keep - sinks - window_length]
    kept = np.concatenate([by_position[:sinks], best, by_position[n - window_length :]])
    return kept[np.argsort(positions[kept])]


# ---- how rows are stored: [..., head_dim] float32 in, what the cache gives back out


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """Rows [..., 64] times the orthonormal Hadamard matrix, which is its own inverse.

    llama.cpp does this to K and V before it quantizes a cache whose head_dim is a multiple of 64.
    ValueError for another head_dim (its K is rotated by a larger matrix if one fits).
    """
    if rows.shape[-1] != 64:
        raise ValueError("a quantized cache is implemented for head_dim 64 only")
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 64:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    return rows @ (hadamard / 8)


def store_q8_0(rows: torch.Tensor) -> torch.Tensor:
    """Rotated, as blocks of Q8_0, rotated back. llama.cpp leaves the rows rotated and rotates
    queries and the attention's output instead: the same."""
    blocks = quantize(rotate(rows).numpy(), GGMLQuantizationType.Q8_0)
    return rotate(torch.from_numpy(dequantize(blocks, GGMLQuantizationType.Q8_0)))


STORE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": lambda rows: rows,
    "float16": lambda rows: rows.half().float(),
    "q8_0": store_q8_0,
}


def decode(data: np.ndarray, dtype: str, n_head_kv: int) -> torch.Tensor:
    """llama.cpp's cached rows of one layer as what they stand for: float32, not rotated.

    data: uint8 [n_cells, row_bytes], a row holds all KV heads; dtype: a name of STORE.
    Returns [n_head_kv, n_cells, head_dim].
    """
    if dtype == "q8_0":
        rows = torch.from_numpy(dequantize(data, GGMLQuantizationType.Q8_0))
    else:
        rows = torch.from_numpy(data.view(dtype).astype(np.float32))
    rows = rows.view(len(data), n_head_kv, -1).transpose(0, 1)
    return rotate(rows) if dtype == "q8_0" else rows


@dataclass
class Eviction:
    """What one eviction saw and did, for every layer and KV head.

    n_seen:        positions evaluated before it
    positions:     [n_layer, n_head_kv, n_used] of the rows before it, ascending
    scores:        [n_layer, n_head_kv, n_used] of the same rows
    chosen:        [n_layer, n_head_kv, n_keep] positions that the policy keeps, ascending
    kept:          [n_layer, n_head_kv, n_keep] positions that stayed (differs if forced)
    last_kept:     [n_layer, n_head_kv] lowest score among the chosen candidates
    first_dropped: [n_layer, n_head_kv] highest score among those not chosen
    sinks, window_length: how many rows at each end were no candidates
    """

    n_seen: int
    positions: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray
    kept: np.ndarray
    last_kept: np.ndarray
    first_dropped: np.ndarray
    sinks: int
    window_length: int

    def candidates(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of the rows that could be dropped: [n] each."""
        inner = slice(self.sinks, self.positions.shape[-1] - self.window_length)
        return self.positions[layer, head, inner], self.scores[layer, head, inner]


class BoundedCache:
    """Keys, values and positions per layer: [n_head_kv, rows, head_dim] and [n_head_kv, rows].

    Each KV head has its own rows, all heads the same number of them, ascending by position.
    max_length: most rows a head may have, None for no bound. n_keep: rows left by an eviction.
    policy: a name of POLICIES. filters: [n_layer, n_head_kv, head_dim], for qfilters.
    queries: the same before RoPE, for qahead, and for qblend instead of filters.
    rope: (layer, rows [n, head_dim], positions [n]) -> the rows after RoPE.
    moments: [n_layer, n_head, 1 + rank, head_dim], for qfilters2.
    learned: per layer [n_head_kv, n_head_kv*(head_dim + head_dim of V)], for learned.
    seed: for random. layers: ids of the layers in the model, if they are not 0, 1, 2, ...
    dtype: a name of STORE, how K and V rows are rounded when they are stored.
    """

    def __init__(
        self,
        max_length: int | None = None,
        n_keep: int | None = None,
        sinks: int = 4,
        window_length: int | None = None,
        policy: str = "streaming",
        filters: np.ndarray | None = None,
        dtype: str = "float32",
        seed: int = 0,
        layers: Sequence[int] | None = None,
        moments: np.ndarray | None = None,
        queries: np.ndarray | None = None,
        rope: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        learned: Sequence[np.ndarray] | None = None,
    ):
        if max_length is not None:
            n_keep = max_length - default_interval(max_length) if n_keep is None else n_keep
            window_length = min(max_length // 8, 512) if window_length is None else window_length
            if not sinks + window_length <= n_keep < max_length:
                raise ValueError(f"{sinks} + {window_length} <= {n_keep} < {max_length} is false")
        self.looks_ahead = policy == "qahead" or (
            policy in ("qblend", "learned") and queries is not None
        )
        if (
            (policy in ("qfilters", "qblend") and filters is None and not self.looks_ahead)
            or (policy == "qfilters2" and moments is None)
            or (policy == "qahead" and queries is None)
            or (policy == "learned" and learned is None)
        ):
            raise ValueError(f"the policy {policy} needs filters")
        self.max_length, self.n_keep = max_length, n_keep
        self.sinks, self.window_length = sinks, window_length
        self.score, self.store, self.dtype = POLICIES[policy], STORE[dtype], dtype
        self.filters, self.moments, self.seed, self.layers = filters, moments, seed, layers
        self.queries, self.rope = queries, rope
        self.filters_learned = learned if policy == "learned" else None
        self.learned: list[torch.Tensor] = []
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []

    @property
    def n_used(self) -> int:
        return self.k[0].shape[1] if self.k else 0

    def fits(self, n: int) -> bool:
        """Whether n more rows fit without an eviction."""
        return self.max_length is None or self.n_used + n <= self.max_length

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """Store a chunk's rows: k, v [n_head_kv, n, head_dim], positions [n], newer than all."""
        k, v = self.store(k), self.store(v)
        if self.filters_learned is not None:
            self.learn(layer, k, v, positions)
        positions = positions.expand(len(k), -1)
        if layer == len(self.k):
            self.k.append(k)
            self.v.append(v)
            self.positions.append(positions)
        else:
            self.k[layer] = torch.cat([self.k[layer], k], dim=1)
            self.v[layer] = torch.cat([self.v[layer], v], dim=1)
            self.positions[layer] = torch.cat([self.positions[layer], positions], dim=1)

    def learn(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """What the learned filters say of new rows: of all heads' keys before RoPE and values."""
        n, head_dim = len(positions), k.shape[-1]
        # row i of a turn: what RoPE makes of the i-th unit vector
        basis = torch.eye(head_dim).repeat(n, 1)
        turns = self.rope(layer, basis, positions.repeat_interleave(head_dim))
        turns = turns.view(n, head_dim, head_dim)
        plain = torch.linalg.solve(turns.double(), k.double().transpose(0, 1), left=False)
        inputs = torch.cat([plain.flatten(1), v.double().transpose(0, 1).flatten(1)], dim=1)
        weights = torch.from_numpy(self.filters_learned[layer].astype(np.float64))
        found = weights @ inputs.T
        if layer == len(self.learned):
            self.learned.append(found)
        else:
            self.learned[layer] = torch.cat([self.learned[layer], found], dim=1)

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K and V [n_head_kv, rows, head_dim] as stored, positions [n_head_kv, rows]."""
        return self.k[layer], self.v[layer], self.positions[layer]

    def all_positions(self) -> np.ndarray:
        """[n_layer, n_head_kv, rows]"""
        return torch.stack(self.positions).numpy()

    def expected_query(self, layer: int, head: int, n_seen: int) -> np.ndarray:
        """[head_dim] float64: the mean query at the positions after n_seen."""
        query = torch.from_numpy(self.queries[layer][head])
        positions = n_seen + torch.tensor(AHEAD)
        turned = self.rope(layer, query.expand(len(positions), -1), positions)
        return turned.double().mean(0).numpy()

    def all_scores(self, n_seen: int) -> np.ndarray:
        """[n_layer, n_head_kv, rows] float64, of an eviction at position n_seen"""
        scores = np.empty((len(self.k), *self.k[0].shape[:2]))
        for layer, head in np.ndindex(scores.shape[:2]):
            filter = None
            if self.looks_ahead:
                filter = self.expected_query(layer, head, n_seen)
            elif self.filters is not None:
                filter = self.filters[layer][head].astype(np.float64)
            moments = None
            if self.moments is not None:
                n_rep = len(self.moments[layer]) // scores.shape[1]
                moments = self.moments[layer][head * n_rep : (head + 1) * n_rep]
            scores[layer, head] = self.score(
                Head(
                    self.k[layer][head].double().numpy(),
                    self.positions[layer][head].numpy(),
                    filter,
                    layer if self.layers is None else self.layers[layer],
                    head,
                    self.seed,
                    self.v[layer][head].double().numpy(),
                    moments,
                )
            )
            if self.filters_learned is not None:
                inner = slice(self.sinks, scores.shape[-1] - self.window_length)
                learned = self.learned[layer][head].numpy()[inner]
                scores[layer, head, inner] = standard(scores[layer, head, inner]) + standard(
                    learned
                )
        return scores

    def evict(self, n_seen: int, forced: np.ndarray | None = None) -> Eviction:
        """Every head keeps n_keep of its rows: those of `select`, or the forced positions.

        forced: [n_layer, n_head_kv, n_keep] positions. ValueError if a head does not have one.
        """
        positions, scores = self.all_positions(), self.all_scores(n_seen)
        shape = (*positions.shape[:2], self.n_keep)
        if forced is not None and forced.shape != shape:
            raise ValueError(f"positions to keep of shape {forced.shape}, expected {shape}")
        chosen, kept = np.empty(shape, int), np.empty(shape, int)
        last_kept, first_dropped = np.empty(shape[:2]), np.empty(shape[:2])
        for at in np.ndindex(shape[:2]):
            rows = select(scores[at], positions[at], self.n_keep, self.sinks, self.window_length)
            chosen[at] = positions[at][rows]
            last_kept[at], first_dropped[at] = self.boundary(scores[at], rows)
            kept[at] = chosen[at] if forced is None else np.sort(forced[at])
        for layer in range(shape[0]):
            self.keep(layer, kept[layer])
        return Eviction(
            n_seen,
            positions,
            scores,
            chosen,
            kept,
            last_kept,
            first_dropped,
            self.sinks,
            self.window_length,
        )

    def boundary(self, scores: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
        """Lowest score of the candidates in `rows` (ascending), highest of those that are not."""
        candidates = np.arange(self.sinks, len(scores) - self.window_length)
        inside = np.isin(candidates, rows)
        last_kept = scores[candidates[inside]].min(initial=np.inf)
        return last_kept, scores[candidates[~inside]].max(initial=-np.inf)

    def keep(self, layer: int, kept: np.ndarray) -> None:
        """Drop the layer's rows that are not at the positions kept [n_head_kv, n_keep]."""
        k, v, positions = self.rows(layer)
        rows = torch.searchsorted(positions.contiguous(), torch.from_numpy(kept))
        rows = rows.clamp(max=positions.shape[1] - 1)
        if not torch.equal(positions.gather(1, rows), torch.from_numpy(kept)):
            raise ValueError(f"layer {layer}: a head is to keep positions that it does not have")
        at = rows[:, :, None].expand(-1, -1, k.shape[2])
        self.k[layer], self.v[layer] = k.gather(1, at), v.gather(1, at)
        self.positions[layer] = torch.from_numpy(kept)
        if self.filters_learned is not None:
            self.learned[layer] = self.learned[layer].gather(1, rows)


def default_interval(max_length: int) -> int:
    """Rows freed by an eviction when nothing else is asked for: max_length - n_keep."""
    return min(512, max(64, max_length // 8))
