"""`Holding`: which tokens each KV head of a bounded cache holds, which are archived, which came back."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qfllama import native
from qfllama.config import QFilterConfig
from qfllama.llama import Llama


@dataclass(frozen=True)
class Holding:
    """What a bounded cache holds of the n positions that were read.

    Attributes:
        config: of the cache.
        texts: the text of each token. A character made of several tokens is in the last of them.
        heads: (layer, KV head) of each row of `kept`, for all layers that evict.
        kept: bool [heads, n]: does the head hold this position in a cell?
        archived: bool [n]: does the archive have a copy of this position, for all heads?
        recalled: bool [n]: did the question bring this position back?
        n_first: first positions that always stay: sinks, or all before the first user message.
        before: bool [heads, n before]: `kept` before the question; None: there was none.
    """

    config: QFilterConfig
    texts: list[str]
    heads: list[tuple[int, int]]
    kept: np.ndarray
    archived: np.ndarray
    recalled: np.ndarray
    n_first: int
    before: np.ndarray | None = None


def holding(llm: Llama, before: np.ndarray | None = None) -> Holding:
    """What the cache of `llm` holds now.

    Args:
        before: what `kept` gave before a question was asked.
    """
    n, recalled = llm.n_tokens, llm.recalled
    return Holding(
        config=llm.qfilter_config,
        texts=list(_texts(llm, llm.input_ids[:n].tolist())),
        heads=heads(llm),
        kept=kept(llm),
        archived=_marks(n, llm._ctx.archived_positions(n)),
        recalled=_marks(n, recalled.positions if recalled else []),
        n_first=llm._ctx.seq_stats().n_first,
        before=before,
    )


def heads(llm: Llama) -> list[tuple[int, int]]:
    """(layer, KV head) of all heads that evict."""
    layers = native.evicting_layers(llm._model.model)
    return [(layer, head) for layer in layers for head in range(llm._ctx.n_head_kv(layer))]


def kept(llm: Llama) -> np.ndarray:
    """Which positions each of `heads` holds: bool [heads, n]."""
    return np.stack([_marks(llm.n_tokens, llm.kept_positions(*head)) for head in heads(llm)])


def _marks(n: int, positions) -> np.ndarray:
    marks = np.zeros(n, bool)
    marks[positions] = True
    return marks


def _texts(llm: Llama, tokens: list[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(llm.detokenize([token], special=True))
