"""Keeping what comes before the first user message: system prompt, tools, what a template adds.

An eviction or a recall may otherwise drop it, and the model no longer does what it was told.
"""

from __future__ import annotations

import bisect
import functools
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import llama_cpp

from qfllama.config import QFilterError, QFilterWarning
from qfllama.turns import in_turn

if TYPE_CHECKING:
    from llama_cpp._internals import LlamaModel

LOOKED_FOR = 64
"""Bytes of a message that are looked for in a prompt."""
MORE = 1 << 16
"""Bytes of a prompt, besides the system prompt, in which they are looked for."""


class Beginning(llama_cpp.Llama):
    """The part of `qfllama.Llama` that keeps the beginning of a prompt; it needs the rest."""

    _messages: list | None = None  # of the chat completion that is about to begin
    _completed: list | None = None  # of the one whose prompt is about to be read
    _n_first: int | None = None  # for the next eval()

    @in_turn
    def keep_first(self, n: int) -> int:
        """From now on, always keep the first n positions, as sinks are kept.

        `create_chat_completion` and `Conversation` do this with all that comes before the first
        user message. Call it for other prompts, before the cache evicts anything; afterwards it
        changes nothing. It ends when the cache is emptied (`reset`). A saved state includes it.

        Args:
            n: tokens, at least 0.

        Returns:
            how many positions always stay: at least the sinks, and at most half of the cells that an
            eviction leaves, without the window; less if the archive is small. If these are fewer
            than n, there is a QFilterWarning.

        Raises:
            QFilterError: no bounded cache, or n is negative.
        """
        self._need_bound()
        if n < 0:
            raise QFilterError(f"n is {n}: use a number of tokens, at least 0")
        n = min(n, self.n_ctx())
        whole = self._ctx.used() == self._ctx.n_past()
        kept = self._ctx.keep_first(n)
        if kept < n and whole and self.qfilter_config.max_length < self.n_ctx():
            warnings.warn(
                f"the prompt begins with {n:,} tokens that should always stay, and this cache can "
                f"keep {kept:,} of them: use a larger max_length or archive_limit",
                QFilterWarning,
                stacklevel=3,
            )
        return kept

    @in_turn
    @functools.wraps(llama_cpp.Llama.create_chat_completion)
    def create_chat_completion(self, messages, *args, **kwargs):
        self._messages = list(messages)
        try:
            return super().create_chat_completion(self._messages, *args, **kwargs)
        finally:
            self._messages = None

    @functools.wraps(llama_cpp.Llama._create_completion)
    def _create_completion(self, *args, **kwargs):
        # a stream begins after this call has ended
        return self._turns.stream(self._complete(self._messages, args, kwargs))

    def _complete(self, messages: list | None, args, kwargs):
        self._completed = messages
        try:
            yield from super()._create_completion(*args, **kwargs)
        finally:
            self._completed = self._n_first = None

    def _begin(self, tokens) -> None:
        """A prompt is about to be read: what of it will be kept is known when the cache has been
        cut back to what it shares with the prompt."""
        if self._completed and self.qfilter_config is not None:
            self._n_first = before_user(self._model, tokens, self._completed)

    def _keep_beginning(self) -> None:
        n, self._n_first = self._n_first, None
        if n is not None:
            self.keep_first(n)


def before_user(model: LlamaModel, tokens: Iterable[int], messages: list) -> int:
    """How many tokens of a prompt come before the text of the first user message.

    A short text may be in the system prompt or the tools, too: it is looked for from behind.

    Args:
        tokens: the prompt.
        messages: what the prompt was made from.

    Returns:
        the number. Up to the end of the system prompt, if the user's text does not come after it; 0
        if the system prompt is not found either.
    """
    system, user, after = _texts(messages)
    text, ends = bytearray(), []
    begin = -1 if system else 0  # where the system prompt ends
    first = stop = -1  # the first place of the user's text, and that of the message after it
    for token in tokens:
        seen = max(0, len(text) - LOOKED_FOR)
        text += model.detokenize([token], special=True)
        ends.append(len(text))
        if begin < 0:
            found = text.find(system, max(0, seen - len(system)))
            begin = found + len(system) if found >= 0 else -1
        if begin >= 0 and first < 0 and user:
            first = text.find(user, max(begin, seen))
        if first >= 0 and after:
            stop = text.find(after, max(first + len(user), seen))
        found_all = begin >= 0 and not user or stop >= 0 or first >= 0 and len(user) >= LOOKED_FOR
        if found_all or len(text) > MORE + len(system):
            break
    if first >= 0 and len(user) < LOOKED_FOR:
        first = text.rfind(user, begin, stop if stop >= 0 else len(text))
    return bisect.bisect_right(ends, max(begin, first, 0))


def _texts(messages: list) -> tuple[bytes, bytes, bytes]:
    """The last of the system messages that come first, how the user begins, and how the message
    after that begins; b"": none."""
    texts = [(_get(message, "role"), _text(_get(message, "content"))) for message in messages]
    n = next(
        (i for i, (role, _) in enumerate(texts) if role not in ("system", "developer")), len(texts)
    )
    system = next((text for _, text in reversed(texts[:n]) if text), b"")
    user, after = [*(text[:LOOKED_FOR] for _, text in texts[n : n + 2]), b"", b""][:2]
    return system, user, after


def _get(message, name: str):
    """Of a dict, or of an object that a template can read as well."""
    return message.get(name) if isinstance(message, dict) else getattr(message, name, None)


def _text(content) -> bytes:
    """Content is a text, or a list of parts, of which the texts count."""
    if isinstance(content, list):
        parts = [_get(part, "text") for part in content]
        content = parts[0] if parts else None  # how it begins
    return content.strip().encode("utf-8", "replace") if isinstance(content, str) else b""
