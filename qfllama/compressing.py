"""Compressing what a `Llama` has read, once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import llama_cpp
import numpy as np

from qfllama import state
from qfllama.config import QFilterError
from qfllama.turns import in_turn


class Compressed(NamedTuple):
    """What `Llama.compress` did.

    Attributes:
        before: cells used before.
        after: cells used after.
    """

    before: int
    after: int


class Compressing(llama_cpp.Llama):
    """The part of `qfllama.Llama` that compresses; it needs the rest."""

    @in_turn
    def compress(
        self,
        *,
        ratio: float | None = None,
        max_length: int | None = None,
        score: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Compressed:
        """Compress the cache now, to `1 / ratio` of its cells or to `max_length` cells.

        This is the paper's setting: the whole prompt is read at full size, then compressed once.
        The cache must hold the whole prompt, and the window should be small (without a
        `window_length` in the config it is an eighth of the cells that are left)::

            config = QFilterConfig(max_length=32768, window_length=64)
            llm = Llama("model-qf.gguf", n_ctx=32768, qfilters=config)
            llm.eval(llm.tokenize(text))
            llm.compress(ratio=8)

        Positions go on as if nothing had happened: `n_tokens` and `input_ids` stay, a prompt that
        begins with the same tokens is not read again, and the logits of the last position are
        still there. Only `rewind_limit` rises. The allocated memory stays the same; a smaller cache
        can load what is left from a file of `save_prompt`.

        Args:
            ratio: how many times fewer cells, at least 1.
            max_length: cells that are left, in place of `ratio`.
            score: "replay" keeps the rows that a repetition of the text looks at, in place of those
                that the policy chooses. Everything is read once more, in parts of up to 2,048
                tokens; the cache needs additional room for a part. See `replay`.
            progress: called with the number of tokens repeated since its last call.

        Returns:
            cells before and after; the same number if there was nothing to do.

        Raises:
            QFilterError: no bounded cache, not exactly one of ratio and max_length, fewer cells
                than sinks (or `keep_first`) and window take, or no room for a replay.
            RuntimeError: the engine failed; what it lost doesn't count as read any more.
        """
        self._need_bound()
        if score not in (None, "replay"):
            raise QFilterError(f"score is {score!r}: leave it out, or use 'replay'")
        self._need_cut()
        before = self._ctx.used()
        wanted = state.cells_wanted(before, ratio, max_length)
        if wanted >= before:
            return Compressed(before, before)
        config = self.qfilter_config
        first = self._ctx.seq_stats().n_first
        least = next(n for n in itertools.count(1) if n >= first + max(1, config.window_of(n)))
        if wanted < least:
            raise QFilterError(
                f"{wanted} cells can't hold the first {first} positions and a window of "
                f"{config.window_of(wanted)}: use a max_length >= {least} (of {before} cells a ratio "
                f"<= {math.floor(10 * before / least) / 10:g}), or a smaller window_length"
            )
        try:
            scores = self._replay(progress or (lambda n: None)) if score else None
            self._ctx.compress(wanted, scores=scores)
        except BaseException:
            self._recount_after_failure()
            raise
        return Compressed(before, self._ctx.used())

    def _replay(self, progress) -> np.ndarray:
        """See `replay.scores`. Afterwards the logits of the last token are computed again, except
        with recurrent layers, which can't go back."""
        from qfllama import replay

        tokens = self.input_ids[: self.n_tokens].tolist()
        found = replay.scores(
            self._ctx,
            tokens,
            lambda text: self.tokenize(text.encode(), add_bos=False),
            self._model_file,
            progress,
        )
        if self._ctx.kv_cache_seq_rm(0, len(tokens) - 1, -1):
            self._ctx.read(tokens[-1:], logits=True)
        else:
            self._requires_eval = True
        return found
