"""Keeping what comes before the first user message: system prompt, tools, what a template adds.

An eviction or a recall may otherwise drop it, and the model no longer does what it was told.
"""

from __future__ import annotations

import bisect
import functools
import warnings
from collections.abc import Iterable

import llama_cpp

from qfllama.config import QFilterError, QFilterWarning
from qfllama.turns import in_turn

LOOKED_FOR = 64
"""Characters of the first user message that are looked for in a prompt."""
MORE = 1 << 16
"""Bytes of a prompt, besides the system prompt, in which they are looked for."""


class Beginning(llama_cpp.Llama):
    """The part of `qfllama.Llama` that keeps the beginning of a prompt; it needs the rest."""

    _messages: list[dict] | None = None  # of the chat completion that is about to begin
    _completed: list[dict] | None = None  # of the one whose prompt is read; None: not a completion
    _n_first: int | None = None  # for the next eval()

    @in_turn
    def keep_first(self, n: int) -> int:
        """From now on, always keep the first n positions, as sinks are kept.

        `create_chat_completion` and `Conversation` do this with all that comes before the first
        user message. Call it for other prompts, after `reset` and before the cache evicts anything;
        afterwards it changes nothing. It ends with the next `reset`. A saved state includes it.

        Args:
            n: tokens, at least 0.

        Returns:
            how many positions always stay: at least the sinks, and at most half of the cells that an
            eviction leaves, without the window. If these are fewer than n, there is a
            QFilterWarning.

        Raises:
            QFilterError: no bounded cache, or n is negative.
        """
        self._need_bound()
        if n < 0:
            raise QFilterError(f"n is {n}: use a number of tokens, at least 0")
        whole = self._ctx.used() == self._ctx.n_past()
        kept = self._ctx.keep_first(n)
        if kept < n and whole and self.qfilter_config.max_length < self.n_ctx():
            warnings.warn(
                f"the prompt begins with {n:,} tokens that should always stay, and this cache can "
                f"keep {kept:,} of them: use a larger max_length",
                QFilterWarning,
                stacklevel=3,
            )
        return kept

    @in_turn
    @functools.wraps(llama_cpp.Llama.create_chat_completion)
    def create_chat_completion(self, messages, *args, **kwargs):
        self._messages = list(messages)
        try:
            return super().create_chat_completion(messages, *args, **kwargs)
        finally:
            self._messages = None

    @functools.wraps(llama_cpp.Llama._create_completion)
    def _create_completion(self, *args, **kwargs):
        # a stream begins after this call has ended
        return self._turns.stream(self._complete(self._messages or [], args, kwargs))

    def _complete(self, messages: list[dict], args, kwargs):
        self._completed = messages
        try:
            yield from super()._create_completion(*args, **kwargs)
        finally:
            self._completed = None

    def _begin(self, tokens) -> None:
        """A prompt is about to be read: what of it will be kept is known when the cache has been
        cut back to what it shares with the prompt."""
        if self._completed is not None and self.qfilter_config is not None:
            self._n_first = before_user(self, tokens, self._completed)

    def _keep_beginning(self) -> None:
        n, self._n_first = self._n_first, None
        if n is not None:
            self.keep_first(n)


def before_user(llm: llama_cpp.Llama, tokens: Iterable[int], messages: list[dict]) -> int:
    """How many tokens of a prompt come before the text of the first user message.

    Args:
        tokens: the prompt.
        messages: what the prompt was made from; only contents that are strings are looked for.

    Returns:
        the number. Up to the end of the system prompt, if the user's text does not come after it; 0
        if the system prompt is not found either.
    """
    text, ends = bytearray(), []
    system, user = _texts(messages)
    looked_for = [one for one in (system, user) if one]
    n, at, limit = 0, 0, MORE + len(system)
    for token in tokens:
        if not looked_for or len(text) > limit:
            break
        text += llm.detokenize([token], special=True)
        ends.append(len(text))
        while looked_for and (found := text.find(looked_for[0], at)) >= 0:
            one = looked_for.pop(0)
            at = found + len(one)
            n = bisect.bisect_right(ends, at if one is system else found)
    return n


def _texts(messages: list[dict]) -> tuple[bytes, bytes]:
    """The last of the system messages that come first, and how the user begins; b"": none."""
    system = b""
    for message in messages:
        content = message.get("content")
        text = content.strip().encode() if isinstance(content, str) else b""
        if message.get("role") not in ("system", "developer"):
            return system, text[:LOOKED_FOR]
        system = text or system
    return system, b""
