"""One call at a time: whose turn it is on a `Llama` that several threads use.

A call is a turn of its thread, and calls within it are part of it. A stream (an answer that comes
piece by piece) keeps all others out from its first piece to its last, or until it is closed;
between two pieces nothing is computed. Meanwhile all other calls wait, whichever thread takes the
next piece. There are two exceptions:

- Code that leaves its own stream unfinished (`break`) and calls again would wait for itself. So its
  call ends that stream; taking another piece of it is then an error. Calls of the same code share
  a context (`contextvars`): each thread, asyncio task and `asyncio.to_thread` has its own.
- A call in the thread of a running event loop does not wait for a stream: the loop would stand
  still, and with it perhaps the code that takes the pieces. It is an error.

A process made by fork() has no engine: every call in it is an error.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from qfllama.config import QFilterError

_marks: ContextVar[dict[int, object]] = ContextVar("qfllama_streams")
"""id of a Turns -> mark of the stream whose latest piece this context took."""


class _Stream:
    """What is known of an open stream."""

    def __init__(self, pieces: Generator):
        self.pieces = pieces
        self.ended = False
        self.mark = object()  # changes with the context that takes the pieces


class Turns:
    """Whose turn it is on one object."""

    def __init__(self):
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._thread: int | None = None  # the one that computes now
        self._depth = 0  # calls within calls of that thread
        self._stream: _Stream | None = None

    @property
    def forked(self) -> bool:
        """Is this a copy that fork() made?"""
        return os.getpid() != self._pid

    @contextmanager
    def call(self) -> Iterator[None]:
        """The block is a turn of this thread.

        Raises:
            QFilterError: the object belongs to another process, or waiting would never end.
        """
        self._begin(None)
        try:
            yield
        finally:
            self._end()

    def stream(self, pieces: Generator) -> Generator:
        """Yields `pieces`; nobody else gets a turn between the first and the last."""
        stream = _Stream(pieces)
        sent = None
        try:
            while True:
                self._begin(stream)
                try:
                    piece = pieces.send(sent)
                except StopIteration:
                    return
                finally:
                    self._end()
                sent = yield piece
        finally:
            self._close(stream)

    def _begin(self, stream: _Stream | None) -> None:
        if self.forked:
            raise QFilterError(
                "this Llama was made in another process, and fork() copies no engine: make one here"
            )
        me = threading.get_ident()
        with self._changed:
            if self._thread == me:
                self._depth += 1
                return
            patience = 1.0
            while self._thread is not None or self._stream not in (None, stream):
                if self._thread is None and self._end_own(self._stream):
                    continue
                if not self._changed.wait(patience):
                    self._free_left_streams()
                    patience *= 2
            if stream is not None:
                if stream.ended:
                    raise QFilterError(
                        "this stream was ended by a later call of the same code on its Llama: take "
                        "all of it first, or read the prompt again"
                    )
                self._stream = stream
                self._mark(stream)
            self._thread, self._depth = me, 1

    def _free_left_streams(self) -> None:
        """Collect garbage, without the lock, as it can run any code. Web servers leave a stream in
        a cycle of references when a client goes away: only this ends such a stream."""
        self._changed.release()
        try:
            gc.collect()
        finally:
            self._changed.acquire()

    def _end(self) -> None:
        with self._changed:
            self._depth -= 1
            if self._depth == 0:
                self._thread = None
                self._changed.notify_all()

    def _mark(self, stream: _Stream) -> None:
        """The pieces of the stream are taken by this context."""
        marks = _marks.get({})
        if marks.get(id(self)) is not stream.mark:
            stream.mark = object()
            _marks.set({**marks, id(self): stream.mark})

    def _end_own(self, stream: _Stream) -> bool:
        """End an open stream if it belongs to the code that calls; False if it doesn't.

        Raises:
            QFilterError: it doesn't, and waiting for it would stop an event loop.
        """
        if _marks.get({}).get(id(self)) is stream.mark:
            stream.ended = True
            self._close(stream)
            return True
        if _in_event_loop():
            raise QFilterError(
                "a stream is open on this Llama, and waiting for it here would stop the event "
                "loop: close the stream, or call from another thread (asyncio.to_thread)"
            )
        return False

    def _close(self, stream: _Stream) -> None:
        if self.forked:
            return
        stream.pieces.close()
        with self._changed:
            if self._stream is stream:
                self._stream = None
                self._changed.notify_all()


def _in_event_loop() -> bool:
    try:
        return asyncio.get_running_loop() is not None
    except RuntimeError:
        return False


def in_turn(method: Callable) -> Callable:
    """Makes each call of a method a turn; its object needs `_turns`."""

    @functools.wraps(method)
    def waiting(self, *args, **kwargs):
        with self._turns.call():
            return method(self, *args, **kwargs)

    return waiting


def stream_in_turn(method: Callable) -> Callable:
    """The same for a method that gives a generator."""

    @functools.wraps(method)
    def waiting(self, *args, **kwargs):
        return self._turns.stream(method(self, *args, **kwargs))

    return waiting
