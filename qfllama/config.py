"""The user's knobs, validated in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qfllama.policies import CALIBRATED  # noqa: F401
from qfllama.policies import NAMES as POLICIES

MIN_INTERVAL, MAX_INTERVAL = 64, 512
MAX_WINDOW = 512
MAX_LENGTH = 1 << 30  # cells and positions are 32-bit numbers
MAX_SEED = (1 << 32) - 1
OPTIONAL = ("window_length", "interval", "archive_limit")
NUMBERS = {
    "max_length": 1, "window_length": 0, "sinks": 0, "interval": 1, "seed": 0,
    "archive_limit": 1, "recall_queries": 1,
}  # fmt: skip
"""The whole numbers of a QFilterConfig, and the least of each."""
RECALL = ("prompt", "always")
"""When rows come back: after a prompt was read; after a prompt and at every eviction."""


class QFilterError(ValueError):
    """Something a user can fix; one line that ends in what to do."""


class EngineError(RuntimeError):
    """llama.cpp failed at something that it should be able to do; its log says more."""


class QFilterWarning(UserWarning):
    """Something that works, but not as its user may expect."""


class BoundsNothing(QFilterWarning):
    """A bound as large as the context, so that nothing is evicted."""


def _window(n_cells: int) -> int:
    """The default window of a cache."""
    return min(MAX_WINDOW, max(0, n_cells) // 8)


class _Default(int):
    """A size that nobody gave: `dataclasses.replace` works it out again."""


class _DefaultName(str):
    """A policy that nobody chose: the policy of the file takes precedence."""


@dataclass(frozen=True)
class QFilterConfig:
    """The bound of a KV cache and what is kept in it.

    All sizes are in tokens (cells of the cache, per sequence).

    Attributes:
        max_length: most cells a sequence may use.
        window_length: last positions, always kept; default `max_length // 8`, at most 512.
        sinks: first positions, always kept.
        interval: cells freed by one eviction, and with it the largest batch;
            default `max_length // 8`, at least 64 and at most 512.
        policy: one of `POLICIES`; those in `CALIBRATED` need filters in the file. Default: what
            `qfllama convert` found to be best for the model, else qblend.
        seed: for the policy `random`, at least 0.
        archive: where evicted rows are kept: in host memory (True), in a file in the folder of
            this name, or nowhere (False).
        archive_limit: most bytes of the archive; default: half of what is free when the cache is
            made. At the limit the oldest positions leave the archive, except the first ones that
            always stay.
        recall: "prompt": after a prompt was read, bring back the rows that its last tokens look at
            and the rows around the same words. "always": also at every eviction. False: never.
        recall_queries: the question is at most this many tokens at the end of a prompt.

    Raises:
        QFilterError: the sizes don't fit each other.
    """

    max_length: int = 4096
    window_length: int | None = None
    sinks: int = 4
    interval: int | None = None
    policy: str = _DefaultName("qblend")
    seed: int = 0
    archive: bool | str = True
    archive_limit: int | None = None
    recall: str | bool = "prompt"
    recall_queries: int = 64

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if type(value) is _Default:
                object.__setattr__(self, name, value := None)
            if type(value) is not int and (value is not None or name not in OPTIONAL):
                raise QFilterError(f"{name} is {value!r}: it must be a whole number")
        least_length = self._least_length()
        window_length, interval = self._sizes(self.max_length)
        object.__setattr__(self, "window_length", window_length)
        object.__setattr__(self, "interval", interval)

        if self.policy not in POLICIES:
            raise QFilterError(
                f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise QFilterError(f"seed is {self.seed}: use 0 to {MAX_SEED}")
        if self.max_length > MAX_LENGTH:
            raise QFilterError(f"max_length {self.max_length} is too large: use <= {MAX_LENGTH}")
        for name, least in NUMBERS.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise QFilterError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not isinstance(self.archive, (bool, str)) or self.archive == "":
            raise QFilterError(
                f"archive is {self.archive!r}: use True, False or the name of a folder"
            )
        if self.recall is not False and self.recall not in RECALL:
            raise QFilterError(
                f"recall is {self.recall!r}: use {', '.join(map(repr, RECALL))} or False"
            )
        if self.max_length < least_length:
            raise QFilterError(
                f"max_length {self.max_length} is too small for sinks {self.sinks} + "
                f"window_length {self.window_length} + interval {self.interval}: "
                f"use max_length >= {least_length}, or lower the others"
            )

    def _sizes(self, max_length: int) -> tuple[int, int]:
        """(window_length, interval), with the defaults for `max_length` if not given."""
        interval = min(MAX_INTERVAL, max(MIN_INTERVAL, max_length // 8))
        return (
            _Default(_window(max_length)) if self.window_length is None else self.window_length,
            _Default(interval) if self.interval is None else self.interval,
        )

    def _least_length(self) -> int:
        """The smallest max_length that holds sinks, window and interval; defaults grow with it."""
        least = 0
        while True:
            window_length, interval = self._sizes(least)
            # the newest position always stays: decoding goes on from it
            needed = self.sinks + max(1, window_length) + interval
            if least >= needed:
                return least
            least = needed

    def for_file(self, filters) -> QFilterConfig:
        """The same with the policy that a file asks for, if nobody chose one.

        Args:
            filters: `filters.Filters` of the file, or None.
        """
        chosen = filters.policy if filters is not None else None
        if chosen is None or type(self.policy) is not _DefaultName:
            return self
        return replace(self, policy=chosen)

    @property
    def recalls(self) -> bool:
        """Do rows come back when a question looks at them?"""
        return bool(self.archive and self.recall)

    @property
    def n_keep(self) -> int:
        """Cells left after an eviction."""
        return self.max_length - self.interval

    def window_of(self, n_cells: int) -> int:
        """Tokens of the window when a sequence is compressed to n_cells: `window_length` if it was
        given, else what is the default for as many cells."""
        given = type(self.window_length) is not _Default
        return self.window_length if given else _window(n_cells)
