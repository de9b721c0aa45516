"""The archive keeps what a bounded cache evicts; recall brings back what a question looks at."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
import llama_cpp._internals as internals
import numpy as np

from qfllama import native
from qfllama.config import EngineError, QFilterConfig, QFilterError
from qfllama.machine import available_bytes

UNKNOWN_MEMORY = 4 << 30
"""Bytes that count as free if the system doesn't tell."""


def limit_bytes(config: QFilterConfig) -> int:
    """Most bytes for the archive of a cache that is made now; 0: no archive.

    Raises:
        QFilterError: `config.archive` is a name, but not of a folder.
    """
    if not config.archive:
        return 0
    if isinstance(config.archive, str) and not os.path.isdir(config.archive):
        raise QFilterError(f"{config.archive} is not a folder: make it, or give another archive")
    if config.archive_limit is not None:
        return config.archive_limit
    if isinstance(config.archive, str):
        return shutil.disk_usage(config.archive).free // 2
    free = available_bytes()
    return (UNKNOWN_MEMORY if free is None else free) // 2


class Archived(internals.LlamaContext):
    """The part of `context.Context` that is about the archive and saved states; it needs the rest."""

    def question(self, seq: int = 0) -> None:
        """Tokens that a sequence reads from now on are a question, until `recall`; with seq -1 this
        ends.

        Raises:
            EngineError: no such sequence.
        """
        if native.question(self.ctx, seq) < 0:
            raise EngineError(native.last_error().decode())

    @contextmanager
    def asking(self, seq: int = 0) -> Iterator[None]:
        """What is read in the block is the question of the next `recall`; if it fails, none."""
        self.question(seq)
        try:
            yield
        except BaseException:
            native.question(self.ctx, -1)
            raise

    def weights(self, layer: int, n_cells: int, seq: int = 0) -> np.ndarray:
        """The question's attention to the n_cells used before it, see llama_qfilter_weights: the
        largest weight that each query head of a layer gives to each row, float32 [n_head, n_cells].

        Raises:
            EngineError: there is no question, it was more than one batch, or llama.cpp failed.
        """
        size = max(0, native.weights(self.ctx, seq, layer, None, 0))
        out = np.empty(size, np.float32)
        if native.weights(self.ctx, seq, layer, out.ctypes.data_as(native.FLOATS), size) < 0:
            raise EngineError(native.last_error().decode())
        return out.reshape(-1, n_cells)

    def recall(self, seq: int = 0, n_rows: int = 0) -> int:
        """Cut the question off again and fill the cells with the rows that it looks at.

        Args:
            n_rows: most rows of each head; 0: as many as leave room for the question and some of
                the answer.

        Returns:
            how many tokens the question has, which must be read again; 0 if nothing was evicted:
            then nothing has changed.

        Raises:
            EngineError: llama.cpp failed; what the sequence has left is in `n_past`.
        """
        if (n := native.recall(self.ctx, seq, n_rows)) < 0:
            raise EngineError(native.last_error().decode())
        return n

    def recalled(self, seq: int = 0) -> np.ndarray:
        """The positions that the last recall brought back: int32, ascending."""
        n = max(0, native.recalled(self.ctx, seq, None, 0))
        out = np.empty(n, dtype=np.int32)
        native.recalled(self.ctx, seq, out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n)
        return out

    def read_question(self, tokens: list[int], seq: int = 0, n_rows: int = 0) -> np.ndarray:
        """Read tokens after those that a sequence has, with recall: the last `recall_queries` of
        them are the question, and are read again after the rows that they look at came back.
        `logits` then gives those after the last token. n_rows: as in `recall`.

        Returns:
            the positions that came back: int32, ascending.

        Raises:
            EngineError: llama.cpp failed.
        """
        n = min(len(tokens), self.config.recall_queries) if self.config else 0
        if n == 0 or not self.may_recall(len(tokens), seq):
            self.read(tokens, logits=True, seq=seq)
            return np.empty(0, dtype=np.int32)
        self.read(tokens[:-n], seq=seq)
        with self.asking(seq):
            self.read(tokens[-n:], logits=True, seq=seq)
        if self.recall(seq, n_rows) == 0:
            return np.empty(0, dtype=np.int32)
        self.read(tokens[-n:], logits=True, seq=seq)
        return self.recalled(seq)

    def may_recall(self, n_more: int, seq: int = 0) -> bool:
        """Is there anything to recall, or will there be once n_more tokens have been read?"""
        if self.config is None or not self.config.recalls:
            return False
        if self.stats().n_bytes_archive_limit == 0:  # there was no memory for one
            return False
        stats = self.seq_stats(seq)
        overflows = stats.n_cells_used + n_more > self.config.max_length
        return overflows or stats.n_archived > 0

    def archived_row(self, position: int, layer: int, seq: int = 0) -> tuple[bytes, bytes] | None:
        """K and V of a layer at a position as they were stored, all heads; None: not archived."""
        result = []
        for is_v in (False, True):
            size = native.archived(self.ctx, seq, position, layer, is_v, None, 0)
            out = ctypes.create_string_buffer(max(1, size))
            native.archived(self.ctx, seq, position, layer, is_v, out, size)
            result.append(out.raw[:size])
        return (result[0], result[1]) if result[0] else None

    def archived_positions(self, n: int, seq: int = 0) -> np.ndarray:
        """Those of the positions [0, n) that the archive has: int32, ascending."""
        layer = native.evicting_layers(self.model.model)[0]  # it has a position for all of them
        has = [native.archived(self.ctx, seq, p, layer, False, None, 0) > 0 for p in range(n)]
        return np.flatnonzero(has).astype(np.int32)

    def state(self, seq: int = 0, *, flags: int = 0) -> bytearray:
        """What a sequence holds, for `restore` of this or another context of the model.

        Args:
            flags: 0, or native.STATE_RESIZE for a state that also fits into a cache with a smaller
                interval: of windowed layers it has the rows that the last 32 positions see, so a
                restored sequence can go back that far.

        Raises:
            EngineError: llama.cpp failed.
        """
        if self.config is None:
            data = bytearray(llama_cpp.llama_state_seq_get_size(self.ctx, seq))
            n = llama_cpp.llama_state_seq_get_data(self.ctx, native.c_bytes(data), len(data), seq)
        else:
            data = bytearray(native.state_seq_get_data(self.ctx, None, 0, seq, flags))
            view = native.c_bytes(data)
            n = native.state_seq_get_data(self.ctx, view, len(data), seq, flags)
        if n == 0 or n != len(data):
            raise EngineError(f"the sequence can't be saved: {native.last_error().decode()}")
        return data

    def restore(self, data, archive=b"", *, seq: int = 0, flags: int = native.STATE_RESIZE) -> bool:
        """Load the state of a sequence of this or another context of the model. Its cache may have
        had another size, if the cells fit, and another policy, if nothing was evicted in it.

        Args:
            data: what `state` gave, bytes or bytearray.
            archive: what `archive_state` gave for it.
            flags: enum llama_qfilter_state_flag; 0: only from a cache of the same size.

        Returns:
            False if llama.cpp refused it (`native.last_error` says why); then the sequence is
            empty.
        """
        view, n = native.c_bytes(data), len(data)
        if self.config is None:
            return llama_cpp.llama_state_seq_set_data(self.ctx, view, n, seq) == n
        done = native.state_seq_set_data(self.ctx, view, n, seq, flags) == n
        return done and (not archive or self.restore_archive(archive, seq))

    def archive_state(self, seq: int = 0) -> bytearray:
        """The archive of a sequence, to be restored after its `state`; b"" if there is none."""
        data = bytearray(native.archive_get_data(self.ctx, seq, None, 0))
        if data:
            native.archive_get_data(self.ctx, seq, native.c_bytes(data), len(data))
        return data

    def restore_archive(self, data, seq: int = 0) -> bool:
        """False: llama.cpp refused it (`last_error` says why)."""
        n = len(data)
        return n > 0 and native.archive_set_data(self.ctx, seq, native.c_bytes(data), n) == n
