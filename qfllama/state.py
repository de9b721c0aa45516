"""Saved contents of a bounded cache: prompt files and the caches of `Llama.set_cache`.

A prompt file (`book.qfstate`) is a prompt that was read once and compressed. Little endian:

    8 bytes   "QFSTATE\\0"
    u32       version, 1, or 2 with an archive; readers refuse newer ones
    u32       CRC-32 of everything after it
    u64 x 3   bytes of the JSON, the tokens and the sequence state; x 4: also of the archive
    JSON      "settings" (see `mismatch`), "cells" (used), "extra" (from the writer)
    i32[]     the tokens at positions 0, 1, ...
    bytes     the sequence as llama_qfilter_state_seq_get_data() gives it for a cache of any size
    bytes     with an archive: as llama_qfilter_archive_get_data() gives it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
import weakref
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from llama_cpp import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache, LlamaDiskCache, LlamaRAMCache

from qfllama import gguf_header, schema
from qfllama.config import QFilterConfig, QFilterError
from qfllama.files import replacing
from qfllama.filters import Filters

MAGIC = b"QFSTATE\0"
VERSION = 2
HEAD = struct.Struct("<II")  # after the magic: version, CRC-32
SIZES = {1: struct.Struct("<3Q"), 2: struct.Struct("<4Q")}
"""Bytes of the parts, by version."""
MAX_JSON = 1 << 26
N_SAMPLES, SAMPLE_BYTES = 64, 4096

SIZE_NAMES = ("max_length", "window_length", "interval")
"""Settings that may differ between a prompt file and the cache it is loaded into."""
NO_SETTINGS = ("archive", "archive_limit", "recall", "recall_queries")
"""Fields of QFilterConfig that a saved cache doesn't depend on."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as a bounded cache holds it.

    Attributes:
        settings: of the Llama that read it, see `mismatch`.
        tokens: int32 [n]; the cache holds positions 0 to n - 1, or what was kept of them.
        cells: cells that it needs.
        data: the sequence state; b"" if only the header was read.
        extra: what the writer wants to know again, plain JSON values.
        archive: what was evicted; b"" if that was not saved.
    """

    settings: dict
    tokens: np.ndarray
    cells: int
    data: bytes
    extra: dict = field(default_factory=dict)
    archive: bytes = b""


def model_identity(path) -> str:
    """A fingerprint of the model in the GGUF file at `path`; fast for a model of any size.

    SHA-256 over all keys except the filters (a converted copy is the same model), the list of
    tensors, and 64 samples of 4 KiB spread over the tensor data of each part.
    """
    digest = hashlib.sha256()
    for part in gguf_header.parts(path):
        header = gguf_header.scan(part)
        for key in sorted(header.fields):
            if not key.startswith(schema.PREFIX):
                at = header.fields[key]
                digest.update(header.raw[at.start : at.end])
        digest.update(header.raw[header.infos : header.infos_end])
        n_bytes = os.path.getsize(part) - header.data
        digest.update(struct.pack("<q", n_bytes))
        with open(part, "rb") as file:
            for i in range(N_SAMPLES):
                file.seek(header.data + max(0, n_bytes - SAMPLE_BYTES) * i // (N_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def filters_identity(filters: Filters | None) -> str | None:
    """SHA-256 of the filters; None for policies that need none."""
    if filters is None:
        return None
    digest = hashlib.sha256(json.dumps([int(layer) for layer in filters.layers]).encode())
    for kind, dtype in (("filters", "<f4"), ("moments", "<f2"), ("queries", "<f4")):
        for rows in filters.vectors.get(kind, {}).values():
            digest.update(np.ascontiguousarray(rows, dtype=dtype).tobytes())
    return digest.hexdigest()


def mismatch(theirs: dict, ours: dict, leave_out: tuple[str, ...] = ()) -> str | None:
    """How the settings of a saved cache differ from those of a Llama, in a few words; or None.

    Settings: model and filters (fingerprints), run (RoPE, LoRA, overrides), type_k, type_v, and
    those of QFilterConfig.
    """
    for name, value in ours.items():
        if name in leave_out or theirs.get(name) == value:
            continue
        if name in ("model", "filters"):
            return f"it was made with {'another model' if name == 'model' else 'other filters'}"
        if name == "run":
            return "it was made with other RoPE, LoRA or override settings"
        return f"its {name} is {theirs.get(name)}, here it is {value}"
    return None


# -- prompt files


def write_prompt(path, prompt: Prompt) -> int:
    """Write a prompt file, which appears complete or not at all; an old one is replaced.

    Returns:
        its size in bytes.

    Raises:
        QFilterError: it can't be written.
    """
    path = Path(path)
    head = {"settings": prompt.settings, "cells": prompt.cells, "extra": prompt.extra}
    parts = [
        json.dumps(head).encode(),
        np.ascontiguousarray(prompt.tokens, dtype="<i4").tobytes(),
        prompt.data,
        *([prompt.archive] if prompt.archive else []),
    ]
    version = 2 if prompt.archive else 1
    sizes = SIZES[version].pack(*map(len, parts))
    crc = zlib.crc32(sizes)
    for part in parts:
        crc = zlib.crc32(part, crc)
    try:
        with replacing([path]) as (file,):
            file.write(MAGIC + HEAD.pack(version, crc) + sizes)
            for part in parts:
                file.write(part)
    except OSError as error:
        raise QFilterError(
            f"cannot write {path}: {error.strerror}; make room or give another output file"
        ) from None
    return len(MAGIC) + HEAD.size + len(sizes) + sum(map(len, parts))


def read_prompt(path, header_only: bool = False) -> Prompt:
    """Read a prompt file; with `header_only` without the state, which may be large.

    Raises:
        QFilterError: not a prompt file, of a newer version, truncated or damaged.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise QFilterError(f"{path} is not a file: check the path")
        with open(path, "rb") as file:
            return _parse(path, file, header_only)
    except OSError as error:
        raise QFilterError(f"cannot read {path}: {error.strerror}; check the path") from None


def _parse(path, file, header_only) -> Prompt:
    damaged = QFilterError(f"{path} is truncated or damaged: make it again with `qfllama compress`")
    start = file.read(len(MAGIC) + HEAD.size)
    if not start.startswith(MAGIC):
        raise QFilterError(f"{path} is not a state file: make one with `qfllama compress`")
    if len(start) < len(MAGIC) + HEAD.size:
        raise damaged
    version, crc = HEAD.unpack(start[len(MAGIC) :])
    if version not in SIZES:
        raise QFilterError(
            f"{path} has version {version}, this qfllama reads versions up to {VERSION}: "
            "upgrade with `pip install -U qfllama`"
        )
    sizes = file.read(SIZES[version].size)
    if len(sizes) < SIZES[version].size:
        raise damaged
    n_bytes = SIZES[version].unpack(sizes)
    whole = len(start) + len(sizes) + sum(n_bytes)
    if os.fstat(file.fileno()).st_size != whole or n_bytes[0] > MAX_JSON:
        raise damaged
    wanted = n_bytes[:2] if header_only else n_bytes
    parts = [file.read(n) for n in wanted] + [b""] * (4 - len(wanted))
    if not header_only:
        found = zlib.crc32(sizes)
        for part in parts:
            found = zlib.crc32(part, found)
        if found != crc:
            raise damaged
    try:
        head = json.loads(parts[0])
        prompt = Prompt(
            settings=dict(head["settings"]),
            tokens=np.frombuffer(parts[1], "<i4").astype(np.int32),
            cells=int(head["cells"]),
            data=parts[2],
            extra=dict(head["extra"]),
            archive=parts[3],
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise damaged from None
    if not 0 < prompt.cells <= len(prompt.tokens):
        raise damaged
    return prompt


def config_for(prompt: Prompt, room: int = QFilterConfig.max_length, **sizes) -> QFilterConfig:
    """The bound of a cache that holds `prompt` and grows from there.

    Args:
        room: cells in addition to the prompt's, if `max_length` isn't given.
        sizes: max_length, window_length, interval as in `QFilterConfig`.

    Raises:
        QFilterError: the prompt doesn't fit, or the sizes don't fit each other.
    """
    max_length = sizes.pop("max_length", None) or prompt.cells + room
    if max_length < prompt.cells:
        raise QFilterError(
            f"the state has {prompt.cells:,} cells, max_length is {max_length:,}: "
            f"use max_length >= {prompt.cells}"
        )
    shared = {f.name for f in dataclasses.fields(QFilterConfig)} - set(SIZE_NAMES)
    shared = {name: prompt.settings[name] for name in shared & set(prompt.settings)}
    return QFilterConfig(max_length=max_length, **shared, **sizes)


def cells_wanted(before: int, ratio: float | None, max_length: int | None) -> int:
    """How many of `before` cells to keep, by exactly one of `ratio` and `max_length`.

    Raises:
        QFilterError: both or none are given, or the value is not valid.
    """
    if (ratio is None) == (max_length is None):
        raise QFilterError("give either ratio or max_length")
    if ratio is None:
        if type(max_length) is not int or max_length < 1:
            raise QFilterError(f"max_length is {max_length!r}: use a whole number from 1 on")
        return max_length
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
        raise QFilterError(f"ratio is {ratio!r}: use a number from 1 on, 8 keeps an eighth")
    return math.ceil(before / ratio)


# -- the caches of Llama.set_cache


class OwnStates(BaseLlamaCache):
    """`Llama.set_cache` puts this between a bounded Llama and a cache of saved states.

    A lookup finds the state that saves most reading. This Llama must be able to load it and to cut
    it back to what it shares with the prompt; states of a stock Llama, or saved with other
    settings, are skipped. If the Llama already holds the best one, nothing is found. Nothing is
    removed: LlamaDiskCache itself drops what it finds, and with it the document that the next
    question is about.
    """

    def __init__(self, inner: BaseLlamaCache, llm):
        self.inner = inner
        self.settings = llm.settings()
        self._llm = weakref.ref(llm)  # it holds us

    @property
    def cache_size(self) -> int:
        return self.inner.cache_size

    def __contains__(self, key) -> bool:
        return self._find(list(key)) is not None

    def __setitem__(self, key, state: LlamaState) -> None:
        self.inner[key] = state

    def __getitem__(self, key) -> LlamaState:
        """The state to load for a prompt; KeyError if none is better than the live cache."""
        state = self._find(list(key))
        if state is None:
            raise KeyError("no state that fits")
        if llm := self._llm():
            # upstream goes by the common tokens, and would keep a live cache that can't be cut back
            try:
                llm.load_state(state)
            except RuntimeError as error:  # saved with a larger n_ctx, or without logits
                raise KeyError(str(error)) from None
        return state

    def _find(self, key: list[int]) -> LlamaState | None:
        llm = self._llm()
        live = usable_prefix(llm.input_ids[: llm.n_tokens], key, llm.rewind_limit()) if llm else 0
        for state in self._candidates(key):
            bounded = getattr(state, "qfilters", None)
            if bounded is None or mismatch(bounded["settings"], self.settings):
                continue
            if usable_prefix(state.input_ids, key, bounded["rewind_limit"]) > live:
                return state
        return None

    def _candidates(self, key: list[int]) -> Iterator[LlamaState]:
        """Saved states that share a beginning with `key`, the longest first."""
        inner = self.inner
        if isinstance(inner, LlamaRAMCache):
            entries = inner.cache_state
        elif isinstance(inner, LlamaDiskCache):
            entries = inner.cache
        else:
            with suppress(KeyError):
                yield inner[key]
            return
        shared = {entry: common_prefix(entry, key) for entry in list(entries)}
        for entry in sorted(shared, key=shared.get, reverse=True):
            if shared[entry] > 0 and (state := entries.get(entry)) is not None:
                yield state


def usable_prefix(tokens, prompt: list[int], rewind_limit: int) -> int:
    """How many positions of a cache that has read `tokens` need not be read again for `prompt`.

    At least one token of the prompt must be read, for the logits. A cache that can't be cut back
    that far is of no use: 0.
    """
    n = min(common_prefix(tokens, prompt), len(prompt) - 1)
    return n if n >= rewind_limit else 0


def common_prefix(a, b) -> int:
    """How many tokens two sequences share at their beginning."""
    n = min(len(a), len(b))
    differ = np.asarray(a[:n]) != np.asarray(b[:n])
    return int(differ.argmax()) if differ.any() else n
