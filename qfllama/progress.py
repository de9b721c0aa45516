"""Progress of long work on stderr: a bar on a terminal, elsewhere a few plain lines."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"
QUIET = 10.0
"""Seconds of work before the first line, if stderr is no terminal."""
LINES = 4
"""Most lines in that case."""


def progress(title: str, total: int | None = None, *, shown: bool = True) -> tqdm | Lines:
    """A context in which `update(n)` says that n more steps are done.

    Args:
        total: number of all steps; None for bytes whose total is not known.
    """
    if shown and not sys.stderr.isatty():
        return Lines(title, total)
    form = {"bar_format": BAR} if total else {"unit": "B", "unit_scale": True}
    return tqdm(total=total, desc=title, disable=not shown, **form)


class Lines:
    """A line when the work turns out to take a while, then one for each part of it. Has the members
    of a tqdm bar that are used here: n, total, update."""

    def __init__(self, title: str, total: int | None):
        self.title, self.total, self.n = title, total, 0
        self._start, self._shown = time.monotonic(), -1

    def update(self, n: int = 1) -> None:
        self.n += n
        seconds = time.monotonic() - self._start
        part = LINES * self.n // self.total if self.total else 0
        if seconds >= QUIET and self._shown < part < LINES and self.n > 0:
            self._shown = part
            print(f"{self.title}: {self._done(seconds)}", file=sys.stderr, flush=True)

    def _done(self, seconds: float) -> str:
        if not self.total:
            return "under way"
        left = seconds * (self.total - self.n) / self.n
        words = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        return f"{100 * self.n // self.total} %, about {words} left"

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error) -> None:
        pass
