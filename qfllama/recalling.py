"""Bringing evicted rows back while a `Llama` answers."""

from __future__ import annotations

import functools
import time
import warnings
from dataclasses import dataclass

import llama_cpp
import numpy as np

from qfllama.config import EngineError, QFilterError, QFilterWarning
from qfllama.turns import in_turn, stream_in_turn

LEAST_QUESTION = 16
"""Fewest tokens of a question, even if fewer tokens of the prompt are new. A template puts the last
token before the answer: alone it looks at nothing in particular."""


@dataclass(frozen=True)
class Recalled:
    """What a recall did.

    Attributes:
        positions: those that came back, ascending: int32 [n].
        archived: how many positions the archive has.
        seconds: time that it took, with the second reading of the question.
    """

    positions: np.ndarray
    archived: int
    seconds: float


class Recalling(llama_cpp.Llama):
    """The part of `qfllama.Llama` that recalls; it needs the rest.

    Attributes:
        recalled: what the latest recall did; None if the latest prompt had none.
    """

    recalled: Recalled | None = None
    _warned = False  # that the archive has stopped
    _is_prompt = False  # is what eval() gets next the end of a prompt?

    @functools.wraps(llama_cpp.Llama.generate)
    def _generate(self, tokens, *args, **kwargs):
        self._is_prompt, self.recalled = True, None
        self._begin(tokens)
        try:
            yield from super().generate(tokens, *args, **kwargs)
        finally:
            self._is_prompt = False

    generate = stream_in_turn(_generate)

    @in_turn
    def recall(self) -> np.ndarray:
        """Bring back what the newest `recall_queries` tokens look at; they are read twice more.

        Answers do this by themselves, see `QFilterConfig.recall`.

        Returns:
            the positions that came back: int32, ascending.

        Raises:
            QFilterError: no bounded cache, no archive, or the model's layers can't go back.
            RuntimeError: the engine failed; what it lost doesn't count as read any more.
        """
        self._need_archive()
        n = min(self.qfilter_config.recall_queries, self.n_tokens)
        if n > 0 and self.rewind_limit() > self.n_tokens - n:
            raise QFilterError(
                f"this cache can't be cut back by {n} tokens to read them as a question: its "
                "windowed or recurrent layers can't; recall happens after prompts"
            )
        self._read_as_question([], n)
        return self.recalled.positions if self.recalled else np.empty(0, np.int32)

    def _need_archive(self) -> None:
        self._need_bound()
        if not self.qfilter_config.archive:
            raise QFilterError("this cache has no archive: make it with archive=True")

    def _eval_recalling(self, tokens) -> None:
        """`eval` of a bounded cache, with recall as the config wants it."""
        config, is_prompt = self.qfilter_config, self._is_prompt
        self._is_prompt = False
        tokens = list(tokens)
        if is_prompt and tokens and self._ctx.may_recall(len(tokens)):
            # not the first token: it stays where it is
            more = min(config.recall_queries, LEAST_QUESTION) - len(tokens)
            self._read_as_question(tokens, max(0, min(more, self.n_tokens - 1)))
        elif config.recall == "always" and len(tokens) == 1 and self._is_full():
            self._read_as_question([], min(config.recall_queries, self.n_tokens - 1))
            self._eval_bounded(tokens)
        else:
            self._eval_bounded(tokens)

    def _check_archive(self) -> None:
        """Say once that the archive has stopped."""
        if self._warned or not self.qfilter_config.archive or not self._is_full():
            return
        if self._ctx.stats().archive_stopped:
            self._warned = True
            warnings.warn(
                "there was no memory for the archive: what is evicted from here on is gone; use a "
                "smaller archive_limit, or an archive in a folder",
                QFilterWarning,
                3,
            )

    def _is_full(self) -> bool:
        return self._ctx.used() >= self.qfilter_config.max_length

    def _read_as_question(self, tokens: list[int], n_back: int) -> None:
        """Read tokens, the last of them as a question. The n_back tokens before them, which have
        been read already, become a part of it."""
        n_before = self.n_tokens
        back = self.input_ids[n_before - n_back : n_before].tolist()
        self.n_tokens -= n_back
        if n_back > 0 and not self._cut():
            self.n_tokens, back = n_before, []
        tokens = [*back, *tokens]
        if not tokens:
            return  # recurrent layers can't go back
        question = tokens[-self.qfilter_config.recall_queries :]
        self._eval_bounded(tokens[: len(tokens) - len(question)])
        with self._ctx.asking():
            self._eval_bounded(question)
        start = time.perf_counter()
        try:
            n = self._ctx.recall()
        except EngineError as error:
            if self._ctx.n_past() != self.n_tokens:
                self._recount_after_failure()
                raise
            warnings.warn(f"{error}; the answer uses what is in the cache", QFilterWarning, 2)
            return
        except BaseException:  # Ctrl-C: the question has been taken back
            self._recount_after_failure()
            raise
        if n > 0:
            positions = self._ctx.recalled()
            self.n_tokens -= n
            self._eval_bounded(question[-n:])
            archived = self._ctx.seq_stats().n_archived
            self.recalled = Recalled(positions, archived, time.perf_counter() - start)
