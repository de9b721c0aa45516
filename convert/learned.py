"""Learned filters predict, from the rows of a text alone, which rows its repetition will look at.

A text is read, and read again after a request to repeat it. The score of a row of the first reading
is the largest weight that the second one gives it, times the norm of what its value adds to the
output. This is the score of KVzip+ (arXiv 2505.23416; 2601.07891, section 3). A linear map is
fitted to the logarithm of that score. Its input is what the cache holds at a position: the keys
before RoPE and the values of all KV heads of the layer. As in Q-Filters there is one filter per
layer and KV head, but with a better target. The least squares need only sums over rows, so memory
does not grow with the text.
"""

from __future__ import annotations

import random
import sysconfig
from contextlib import closing
from itertools import starmap
from pathlib import Path

import numpy as np

from ..config import QFilterError
from ..shape import model_shape
from . import layout, text
from .capture_llama import LlamaModel

REQUEST = "\n\nRepeat the previous context exactly.\n\n"
LENGTH = 800
"""Most tokens of a text that is read twice."""
SINKS = 8
"""The first rows of a text are left out, since everything looks at them."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Added to the diagonal, relative to each input's variance; the held-out texts decide which."""
FLAT = 1e-6
"""Least variance that counts, relative to the mean: some numbers of Gemma 3's keys are always 0."""
TINY = 1e-12
AT_ONCE = 64 << 20
"""Bytes of the weights of attention that are computed at once."""


class ValueNorms:
    """The norm of what the value of a row adds to the output, for every query head."""

    def __init__(self, output_weights):
        """output_weights: layer -> the weight [n_embd, n_head*head_dim] behind attention."""
        self._weights = output_weights
        self._squares: dict[int, np.ndarray] = {}

    def of(self, layer: int, values: np.ndarray, n_head: int) -> np.ndarray:
        """Norms [n_head, n] for the values [n_head_kv, n, head_dim]."""
        n_head_kv, _, dim = values.shape
        if layer not in self._squares:
            weights = self._weights(layer).reshape(-1, n_head, dim).transpose(1, 0, 2)
            self._squares[layer] = weights.transpose(0, 2, 1) @ weights
        values = np.repeat(values, n_head // n_head_kv, axis=0)
        squares = np.einsum("hnd,hnd->hn", values @ self._squares[layer], values)
        return np.sqrt(np.maximum(squares, 0))


class Repetition:
    """Observes a text while it is read twice: its rows, and what they are worth, once it has been
    read and `finish` was called. Layers that attend the keys of another one add to what its rows
    are worth, with the norms of its values.

    rows: layer -> float32 [n, n_head_kv*(head_dim + head_dim of V)], keys before RoPE, then values
    worth: layer -> float32 [n, n_head_kv], logarithms
    """

    def __init__(self, model, norms: ValueNorms, layers, n: int, start: int):
        """n: tokens of the text; its repetition is at [start, start + n)."""
        self._model, self._norms, self._layers = model, norms, set(layers)
        self._n, self._start = n, start
        self._largest: dict[int, np.ndarray] = {}
        self._cached: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.rows: dict[int, np.ndarray] = {}
        self.worth: dict[int, np.ndarray] = {}

    def add(self, call) -> None:
        """The next attention call (capture_llama.Attention)."""
        end = call.start + call.n_tokens
        if call.layer not in self._layers or end <= self._start:
            return
        queries = call.queries(np.arange(max(self._start - call.start, 0), call.n_tokens))
        keys = call.keys()
        largest = np.concatenate(
            [
                _largest_weights(group, key, end - queries.shape[1], call.scale, call.softcap)
                for group, key in zip(np.split(queries, len(keys)), keys, strict=True)
            ]
        )[:, : self._n]
        before = self._largest.get(call.layer)
        self._largest[call.layer] = largest if before is None else np.maximum(before, largest)
        if end == self._start + self._n:
            self._cached[call.layer] = keys[:, : self._n], call.values()[:, : self._n]

    def finish(self) -> None:
        """Raises QFilterError if llama.cpp's graph does not show what is needed."""
        for layer in sorted(self._cached):
            self._finish(layer, *self._cached.pop(layer))

    def _finish(self, layer, keys, values):
        largest = self._largest.pop(layer)
        worth = largest * self._norms.of(layer, values, len(largest))
        worth = worth.reshape(len(keys), -1, self._n).max(1)
        self.worth[layer] = np.log(np.maximum(worth, TINY)).T
        keys = self._model.before_rope(layer, np.arange(self._n), keys)
        if keys is None:
            raise QFilterError(
                f"llama.cpp's graph does not show how RoPE turns the keys of layer {layer}, which "
                "learned filters need; leave out --filters learned"
            )
        parts = [x.transpose(1, 0, 2).reshape(self._n, -1) for x in (keys, values)]
        self.rows[layer] = np.concatenate(parts, axis=1)


def _largest_weights(queries, keys, start, scale, softcap):
    """[n_head, n_keys]: the largest weight that the queries [n_head, n, head_dim] give to each of
    the keys [n_keys, head_dim]. The first query is at position `start`."""
    n_head, n, _ = queries.shape
    step = max(1, AT_ONCE // (4 * n_head * len(keys)))
    result = np.zeros((n_head, len(keys)), np.float32)
    for i in range(0, n, step):
        part = queries[:, i : i + step]
        logits = (part * scale) @ keys.T
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        positions = start + i + np.arange(part.shape[1])
        logits[:, np.arange(len(keys)) > positions[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        np.maximum(result, weights.max(1), out=result)
    return result


class Sums:
    """The sums over all rows of a layer that least squares need."""

    def __init__(self):
        self._sums: dict[int, list[np.ndarray]] = {}

    def add(self, rows: dict[int, np.ndarray], worth: dict[int, np.ndarray]) -> None:
        """The rows of a text; see `Repetition`."""
        for layer, x in rows.items():
            x, y = _rows(x, worth[layer])
            if layer not in self._sums:
                n_in, n_out = x.shape[1], y.shape[1]
                self._sums[layer] = [np.zeros((n_in, n_in)), np.zeros((n_in, n_out))]
            self._sums[layer][0] += x.T @ x
            self._sums[layer][1] += x.T @ y

    def solve(self, layer: int, ridge: float) -> np.ndarray:
        """[1 + n_in, n_head_kv], the constant last."""
        square, product = self._sums[layer]
        mean = square[-1] / square[-1, -1]
        spread = square.diagonal() - square[-1, -1] * mean**2
        penalty = ridge * np.maximum(spread, FLAT * spread.mean())
        penalty[-1] = 0  # the constant
        return np.linalg.solve(square + np.diag(penalty), product)

    @property
    def layers(self) -> list[int]:
        return sorted(self._sums)


class HeldOut:
    """Rows that the fit does not see."""

    def __init__(self):
        self._rows: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, rows: dict[int, np.ndarray], worth: dict[int, np.ndarray]) -> None:
        """The rows of a text; see `Repetition`."""
        for layer, x in rows.items():
            self._rows.setdefault(layer, []).append((x, worth[layer]))

    def explained(self, layer: int, weights: np.ndarray) -> np.ndarray:
        """R^2 of weights on these rows, for every KV head; 0 if all of a head's are worth the same."""
        x, y = map(np.concatenate, zip(*starmap(_rows, self._rows[layer]), strict=True))
        spread = y.var(0)
        error = ((y - x @ weights) ** 2).mean(0)
        known = spread > FLAT * np.square(y).mean(0)
        return np.where(known, 1 - error / np.where(known, spread, 1), 0)


def _rows(x, y):
    """A text's rows with a constant, and what they are worth, without the sinks; float64."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return x[SINKS:].astype(np.float64), y[SINKS:].astype(np.float64)


def solve(fitted: Sums, held_out: HeldOut) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Layer -> filters float32 [n_head_kv, n_in], the largest number of each 1; and the held-out R^2
    of every KV head of all layers in turn. A filter that explains nothing is 0."""
    filters, quality = {}, []
    for layer in fitted.layers:
        tried = [fitted.solve(layer, ridge) for ridge in RIDGES]
        explained = [held_out.explained(layer, weights) for weights in tried]
        best = int(np.argmax([found.mean() for found in explained]))
        weights = tried[best][:-1].T * (explained[best] > 0)[:, None]
        largest = np.abs(weights).max(1, keepdims=True)
        filters[layer] = (weights / np.where(largest > 0, largest, 1)).astype(np.float32)
        quality.append(explained[best])
    return filters, np.concatenate(quality)


def code() -> text.Source:
    """Source code that comes with every Python: its standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 4000)
    pieces = (path.read_text("utf-8", "replace")[:8000] + "\n\n" for path in paths[::3])
    return text.Source("standard library", pieces)


def tables(seed: int = 0) -> text.Source:
    """Numbers as they stand in tables, lists, sentences and JSON, by chance."""
    return text.Source("tables", _lines(random.Random(seed)))


def _lines(rng):
    words = [
        "order",
        "price",
        "total",
        "weight",
        "room",
        "phone",
        "code",
        "north",
        "south",
        "east",
        "west",
        "alpha",
        "beta",
        "gamma",
    ]
    while True:
        word, other, n = (
            rng.choice(words),
            rng.choice(words),
            rng.randrange(10 ** rng.randint(1, 7)),
        )
        row = " | ".join(str(rng.randrange(10 ** rng.randint(1, 6))) for _ in range(5))
        yield rng.choice(
            [
                f"{row}\n",
                f"{word}: {n}\n",
                f"The {word} of the {other} is {n / 100:.2f}, its number is {n}.\n",
                f'{{"{word}": {n}, "{other}": "{rng.choice(words)}"}}\n',
            ]
        )


def texts(gguf, sequences: list[list[int]], n: int, seed: int) -> list[list[int]]:
    """n texts that are read twice: about three fifths are calibration texts, the others are code,
    numbers and tables, which a repetition looks at in other ways."""
    n_code, n_tables = n // 4, n // 7
    length = LENGTH
    if n_ctx_train := model_shape(gguf).n_ctx_train:
        length = max(1, min(length, (n_ctx_train - n_read([])) // 2))
    own = [tokens[:length] for tokens in sequences[: n - n_code - n_tables]]
    length = max(map(len, own))
    found = [own]
    for source, count in ((code(), n_code), (tables(seed), n_tables)):
        found.append(text.sequences(gguf, [source], count, length) if count else [])
    # in turns, so that each kind is among those held out
    order = [(i / len(part), tokens) for part in found for i, tokens in enumerate(part)]
    return [tokens for _, tokens in sorted(order, key=lambda pair: pair[0])]


def n_read(tokens: list[int]) -> int:
    """About how many tokens are read for a text."""
    return 2 * len(tokens) + 16


def in_turn(filters, n_bytes: int) -> list[list[int]]:
    """The layers in groups, whose sums take n_bytes or less. A group reads all texts."""
    groups, taken = [], n_bytes
    for layer, rows in sorted(filters.vectors["filters"].items()):
        size = 8 * (2 * rows.size + 1) ** 2
        if taken + size > n_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(layer)
        taken += size
    return groups


def add(filters, gguf, groups, texts, n_held_out: int, n_gpu_layers, progress) -> float:
    """Give the filters of a GGUF file learned ones, too; see `calibrate`. Returns the mean R^2."""
    longest = max(map(n_read, texts))
    with closing(LlamaModel(gguf, longest + 256, n_gpu_layers)) as model:
        weights = layout.Weights(gguf).output
        parts = [
            calibrate(model, weights, layers, texts, n_held_out, progress) for layers in groups
        ]
    filters.vectors["learned"] = {
        il: rows.astype(np.float16) for found, _ in parts for il, rows in found.items()
    }
    explained = np.concatenate([quality for _, quality in parts])
    filters.quality["learned"] = explained.astype(np.float32)
    return explained.mean()


def calibrate(model, output_weights, layers, sequences, n_held_out: int, progress):
    """Learned filters of a model.

    Args:
        model: a capture_llama.LlamaModel that can read each of the sequences twice.
        output_weights: layer -> the weight [n_embd, n_head*head_dim] behind attention.
        layers: whose rows are evicted.
        sequences: tokens of the texts; the last n_held_out choose the ridge.
        progress: called with the number of tokens read since its last call.

    Returns:
        layer -> filters float32 [n_head_kv, n_in]; and R^2 on the held-out texts, for every KV head
        of all layers in turn.

    Raises:
        QFilterError: llama.cpp's graph does not show what is needed, or a weight is missing.
    """
    request, norms = model.tokens(REQUEST), ValueNorms(output_weights)
    n_first = len(sequences) - n_held_out
    fitted, held_out = Sums(), HeldOut()
    for i, tokens in enumerate(sequences):
        start = len(tokens) + len(request)
        seen = Repetition(model, norms, layers, len(tokens), start)
        model.read(tokens + request + tokens, seen.add, progress)
        seen.finish()
        (fitted if i < n_first else held_out).add(seen.rows, seen.worth)
    return solve(fitted, held_out)
