"""Recall in the engine and in the torch reference, step by step, and what the engine's own numbers
would choose."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from reference.compare import logits_difference
from reference.recall import Queries, Question, Recall, asked, choose, fill, word

from qfllama import native_calibration

ROUNDED = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q8_0"}
"""Cache type -> what llama.cpp's CPU rounds queries to before it multiplies them with such rows."""
ANSWER_SHARE = 8
"""Which part of the cells is left for the answer, at most: 1 / 8."""


def n_rows_by_default(config, n_question: int) -> int:
    """All but the question, and some room for the answer."""
    n_free = min(config.interval // 2, config.max_length // ANSWER_SHARE)
    return max(config.sinks + 1, config.max_length - n_question - n_free)


def check_filling(kept, held, recalled, n: int, n_rows: int) -> None:
    """Beside what all heads got, each [heads, rows] has what it held [heads, cells], the newest
    first; n: positions before the question."""
    chosen = sorted(set.intersection(*map(set, kept.tolist())))
    assert set(recalled) <= set(chosen)
    before = held[:, held[0] < n]
    n_rows = min(n_rows, *(len({*chosen, *own}) for own in before))
    for rows, own in zip(kept, before, strict=True):
        np.testing.assert_array_equal(rows, fill(chosen, own, n_rows))


def words_of(model, tokens) -> list[bytes]:
    """What each token is searched by; see reference.recall.word."""
    known = {token: word(model.detokenize([token])) for token in set(tokens)}
    return [known[token] for token in tokens]


class Choices:
    """Recalls of the engine, next to those of a reference."""

    def __init__(self):
        self.choices: list[tuple[Recall, np.ndarray, np.ndarray]] = []

    def append(self, ours: Recall, held: np.ndarray, recalled: np.ndarray) -> None:
        """
        Args:
            held: [heads, cells] positions before the recall.
            recalled: what the engine says that it brought back: what it chose and some head did not
                hold.
        """
        everywhere = [(held == p).any(-1).all() for p in ours.positions]
        self.choices.append((ours, ~np.array(everywhere), np.isin(ours.positions, recalled)))

    def report(self, what: str, near_tie: float) -> tuple[float, int]:
        """The share of the positions brought back that are the same. Prints it (pytest -s).

        A recall that differs only in positions that rounding may decide on (see Recall.doubtful)
        doesn't count. Returns the share, and the number of these recalls.
        """
        differ = total = near_ties = 0
        for ours, missing, engine in self.choices:
            chosen = ours.choose() & missing
            other = engine != chosen
            if other.any() and not (other & ~ours.doubtful(near_tie)).any():
                near_ties += 1
                continue
            differ += other.sum()
            total += chosen.sum()
        share = 1 - differ / total if total else 0.0
        print(
            f"\n{what}: {len(self.choices)} recalls, {near_ties} decided by near ties, in the others "
            f"{differ} of {total} positions differ ({share:.3%} the same)"
        )
        return share, near_ties


class Own:
    """What the engine has to choose, from its own queries and the rows of its own archive.

    callback: cb_eval of the context.
    """

    def __init__(self, layers, dtype: str, softcap: float | None = None):
        """layers: ids of those that evict; dtype: the type of K."""
        self.layers, self.dtype, self.softcap = list(layers), dtype, softcap
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._note)
        self.question = None

    def ask(self, start: int) -> None:
        """From here on it is a question."""
        self.question = Question(start)

    def _note(self, tensor, ask, _) -> bool:
        attn = native_calibration.Attn()
        found = native_calibration.attn_of(tensor, ctypes.byref(attn)) and attn.il in self.layers
        if found and not ask and self.question:
            q = np.empty((attn.n_head, attn.n_tokens, attn.head_dim), np.float32)
            native_calibration.attn_get(tensor, 0, q.ctypes.data)
            kind = GGMLQuantizationType[ROUNDED[self.dtype]]
            q = torch.from_numpy(dequantize(quantize(q, kind), kind))
            index = self.layers.index(attn.il)
            self.question.queries.append(Queries(index, q, attn.kq_scale, self.softcap))
        return bool(found) or not ask

    def choose(self, context, tokens, n_rows: int) -> Recall:
        """After the engine's recall, which put all rows into the archive; tokens: all that were read
        up to the question's end."""
        question, self.question = self.question, None
        positions, config, keys = np.arange(question.start), context.config, []
        for index, layer in enumerate(self.layers):
            rows = [context.archived_row(int(p), layer)[0] for p in positions]
            data = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
            k = dequantize(data, GGMLQuantizationType[self.dtype.upper()]).astype(np.float32)
            head_dim = next(q.q.shape[-1] for q in question.queries if q.index == index)
            keys.append(torch.from_numpy(k.reshape(len(rows), -1, head_dim)).transpose(0, 1))
        words = words_of(context.model, tokens)
        return choose(question, keys, positions, words, n_rows, config.sinks, config.window_length)


class Both:
    """The engine and the reference, which read the same batches.

    At an eviction the reference goes on with what the engine kept. At a recall it notes its own
    choice and goes on with the engine's. So both always choose from the same positions.

    Attributes:
        choices: of all recalls; own_choices: the same, next to what `own` would choose.
        came_back: how many positions each of them brought back.
        logits, differences: of the last token of each batch: the reference's, and the largest
            difference of one.
    """

    def __init__(self, context, model, cache, layers, own: Own | None = None):
        """layers: ids of the layers that evict."""
        self.context, self.model, self.cache, self.layers = context, model, cache, layers
        self.own, self.choices, self.own_choices = own, Choices(), Choices()
        self.came_back, self.logits, self.differences = [], [], []
        self.tokens = []

    def held(self) -> np.ndarray:
        """[n_layer, n_head_kv, rows]: the positions that the engine holds."""
        heads = range(len(self.cache.k[0]))
        return np.array([[self.context.kept(il, ih) for ih in heads] for il in self.layers])

    def read(self, tokens, size: int) -> None:
        for i in range(0, len(tokens), size):
            self._read_batch(tokens[i : i + size])

    def _read_batch(self, tokens) -> None:
        start, n = len(self.tokens), len(tokens)
        fits = self.cache.fits(n)
        assert self.context.decode(tokens) == 0
        if not fits:
            self.cache.evict(start, self.held()[..., :-n])
        theirs = self.model.forward(tokens, range(start, start + n), self.cache, last_only=True)
        assert np.array_equal(self.held(), self.cache.all_positions())
        self.logits.append(theirs.numpy()[0])
        self.differences.append(logits_difference(self.context.logits(), self.logits[-1]))
        self.tokens = [*self.tokens, *tokens]

    def ask(self, tokens, size: int, n_rows: int = 0) -> None:
        """Read a question, recall, read the question again."""
        context, before = self.context, self.tokens
        context.question()
        if self.own:
            self.own.ask(len(before))
        with asked(self.model, self.cache, len(before)) as question:
            self.read(tokens, size)
        held = self.cache.all_positions()
        held = held.reshape(-1, held.shape[-1])
        assert context.recall(n_rows=n_rows) == len(tokens)
        n_rows = n_rows or n_rows_by_default(context.config, len(tokens))
        recalled = context.recalled()
        self.came_back.append(len(recalled))

        words = words_of(context.model, self.tokens)
        ours, kept = self.cache.choose(question, words, n_rows), self.held()
        self.choices.append(ours, held, recalled)
        if self.own:
            self.own_choices.append(self.own.choose(context, self.tokens, n_rows), held, recalled)
        check_filling(kept.reshape(len(held), -1), held, recalled, len(before), n_rows)
        self.cache.recall(question, kept)
        self.tokens = before
        self.read(tokens, size)

    def report(self, what: str, near_tie: float) -> tuple[float, int, np.ndarray]:
        """As that of the choices, and the differences of logits in deviations of the logits."""
        share, near_ties = self.choices.report(what, near_tie)
        difference = np.array(self.differences) / np.std(self.logits)
        print(
            f"{np.mean(self.came_back):.0f} positions came back; logits differ by "
            f"{np.quantile(difference, 0.9):.1e} of their deviation in nine of ten batches, "
            f"{difference.max():.1e} in the worst"
        )
        return share, near_ties, difference
