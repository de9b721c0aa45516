"""llama.cpp's log while a model or a context is made: its errors become part of our messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
from llama_cpp._logger import llama_log_callback

ERROR = 4  # enum ggml_log_level; not among the names of llama-cpp-python

_callbacks = [llama_log_callback]
"""Blocks nest: the last callback gets the log."""


@contextmanager
def errors(verbose: bool = False) -> Iterator[list[str]]:
    """Yields a list that collects the lines of llama.cpp's errors in the block. The log itself is
    dropped; with `verbose` it goes where it went before."""
    lines, before = [], _callbacks[-1]

    @llama_cpp.llama_log_callback
    def collect(level, text, user_data):
        if level == ERROR:
            lines.append(" ".join(text.decode("utf-8", "replace").split()))
        if verbose:
            before(level, text, user_data)

    _callbacks.append(collect)
    try:
        llama_cpp.llama_log_set(collect, None)
        yield lines
    finally:
        _callbacks.remove(collect)
        llama_cpp.llama_log_set(_callbacks[-1], None)
