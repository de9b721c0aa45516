"""How likely the right answer is in a context, and what the model answers itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qfllama.config import EngineError
from qfllama.engine import Context

ROWS = 64
"""Rows of logits handled at once: a vocabulary of 150,000 makes temporary arrays of 40 MB."""


class Mark:
    """A position in a context, to go `back` to after reading at most n_tokens more."""

    def __init__(self, context: Context, n_tokens: int):
        self.context = context
        self._n_past = context.n_past()
        evicts = context.used() + n_tokens > context.config.max_length
        moves = evicts or context.model.forgets or context.may_recall(n_tokens)
        self._state = context.state() if moves else None
        self._archive = context.archive_state() if moves and context.config.recalls else b""

    def back(self) -> None:
        """Forget what was read since.

        Raises:
            EngineError: llama.cpp refused.
        """
        context = self.context
        if self._state is not None:
            done = context.restore(self._state, self._archive)
        else:
            done = context.kv_cache_seq_rm(0, self._n_past, -1)
        if not done:
            raise EngineError(f"the cache can't be cut back to position {self._n_past:,}")


@dataclass(frozen=True)
class Score:
    """How likely an answer was, read token by token whatever the model would have written.

    nll: mean negative log likelihood of its tokens in nats
    n_right: tokens that are the model's first choice
    """

    nll: float
    n_tokens: int
    n_right: int

    @property
    def right(self) -> bool:
        """Would greedy decoding have given the answer?"""
        return self.n_right == self.n_tokens


def nll(logits: np.ndarray, targets) -> np.ndarray:
    """Negative log likelihood in nats.

    Args:
        logits: float32 [n, n_vocab]; targets: token ids [n].

    Returns:
        float64 [n].
    """
    result = np.empty(len(logits))
    for i in range(0, len(logits), ROWS):
        rows, ids = logits[i : i + ROWS], np.asarray(targets[i : i + ROWS])
        top = rows.max(axis=1)
        total = np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64)
        result[i : i + ROWS] = top + np.log(total) - rows[np.arange(len(rows)), ids]
    return result


def divergence(logits: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far other distributions are from these: KL(softmax(logits) || softmax(others)) in nats, and
    whether both have the same first choice.

    Args:
        logits, others: float32 [n, n_vocab].

    Returns:
        float64 [n], bool [n]. Rounding leaves about 1e-7; equal logits give exactly 0.
    """
    result = np.empty(len(logits))
    for i in range(0, len(logits), ROWS):
        ours, theirs = logits[i : i + ROWS], others[i : i + ROWS]
        weights, log_total = _softmax(ours)
        _, their_log_total = _softmax(theirs)
        mean = (weights * (ours - theirs)).sum(axis=1, dtype=np.float64)
        result[i : i + ROWS] = mean - log_total + their_log_total
    return result, logits.argmax(axis=1) == others.argmax(axis=1)


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 [n, n_vocab], and the logarithm of what they were divided by:
    float64 [n]."""
    top = logits.max(axis=1)
    weights = np.exp(logits - top[:, None])
    total = weights.sum(axis=1, dtype=np.float64)
    weights /= total[:, None]
    return weights, top + np.log(total)


def score(context: Context, question: list[int], answer: list[int]) -> Score:
    """Read question and answer; returns how likely the answer was."""
    losses, n_right, done = [], 0, 0
    for logits in answers(context, question, answer[:-1]):
        targets = answer[done : done + len(logits)]
        losses.append(nll(logits, targets))
        n_right += int((logits.argmax(axis=1) == targets).sum())
        done += len(logits)
    return Score(float(np.concatenate(losses).mean()), len(answer), n_right)


def answers(context: Context, question: list[int], more: list[int]) -> Iterator[np.ndarray]:
    """Yields the logits after the question and after each of `more`, as float32 [n, n_vocab]. Rows
    that the question looks at come back first, if the context's config recalls."""
    if not context.may_recall(len(question)):
        yield from context.outputs(question + more, len(question) - 1)
        return
    # a compressed cache stays as small as it is
    n_rows = context.used() if context.used() < context.config.n_keep else 0
    context.read_question(question, n_rows=n_rows)
    yield context.logits()[None]
    yield from context.outputs(more)


def generate(context: Context, question: list[int], n_tokens: int, enough=None) -> str:
    """Read the question and answer it greedily, with at most n_tokens tokens.

    Args:
        enough: is the text so far all that is wanted? Called after each token.
    """
    answer: list[int] = []
    text, read = "", answers(context, question, [])
    while len(answer) < n_tokens:
        *_, logits = read
        token = int(logits[-1].argmax())
        if context.model.ends(token):
            break
        answer.append(token)
        text, read = context.model.text(answer), context.outputs([token])
        if enough is not None and enough(text):
            break
    return text
