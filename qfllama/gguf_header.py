"""The header of a GGUF file: where every key, tensor info and the tensor data lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
Only the header is read and no tensor is decoded, so a file of any size and any tensor type opens
in the time it takes to walk over its vocabulary.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .config import QFilterError

STRING, ARRAY = 8, 9
U16, U32, I32, F32, I64 = 2, 4, 5, 6, 11
SCALARS = {
    0: "B",
    1: "b",
    U16: "H",
    3: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    7: "?",
    10: "Q",
    I64: "q",
    12: "d",
}
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20  # far above any in use; a damaged one would mean gigabytes of padding
MIN_FIELD, MIN_TENSOR, MIN_STRING = 13, 24, 8  # bytes that each takes at least in a header
REMEMBERED = 8  # headers; a large vocabulary takes 10 MB
SETTLED_NS = 1_000_000_000  # a file written later may change again and keep its time and size
PART_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class Field:
    """One key-value pair: bytes [start, end) of the file; the value is [value, end)."""

    type: int
    start: int
    value: int
    end: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` as in ggml (fastest dimension first), `offset` from the data section."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """A scanned header. `raw` holds its bytes: keys up to `infos`, tensor infos up to `infos_end`,
    padding up to `data`, the byte of the file at which the tensor data starts."""

    raw: bytes
    version: int
    fields: dict[str, Field]
    tensors: list[TensorInfo]
    infos: int
    infos_end: int
    data: int
    alignment: int

    def get(self, key, default=None):
        """Value of `key`: int, float, bool, str, list of str or numpy array; default if absent."""
        field = self.fields.get(key)
        if field is None:
            return default
        if field.type == STRING:
            return _string(self.raw, field.value)[0]
        if field.type == ARRAY:
            return self._array(field)
        return struct.unpack_from("<" + SCALARS[field.type], self.raw, field.value)[0]

    def type_of(self, key):
        """GGUF type of `key`: a number, or (ARRAY, type of its items); None if it is absent."""
        field = self.fields.get(key)
        if field is None or field.type != ARRAY:
            return field and field.type
        return ARRAY, struct.unpack_from("<I", self.raw, field.value)[0]

    def _array(self, field):
        kind, count = struct.unpack_from("<IQ", self.raw, field.value)
        pos = field.value + 12
        if kind != STRING:
            return np.frombuffer(self.raw, "<" + SCALARS[kind], count, pos).copy()
        items = []
        for _ in range(count):
            item, pos = _string(self.raw, pos)
            items.append(item)
        return items


def scan(path) -> Header:
    """Read the header of the GGUF file at `path`. Headers of the last few files are remembered as
    long as the files don't change, so nobody may change what this returns.

    Raises QFilterError when the file can't be read, is no GGUF, or ends before its tensors do."""
    path = Path(path)
    at = status(path)
    if time.time_ns() - at.st_mtime_ns < SETTLED_NS:
        return _read(path)
    return _remembered(path, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)


@lru_cache(REMEMBERED)
def _remembered(path, *_) -> Header:
    """`_read`, once for each state of a file."""
    return _read(path)


def _read(path) -> Header:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise QFilterError(f"{path}: not a GGUF file; give a .gguf model")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buf:
                header = _parse(path, buf)
                _check_complete(path, header, len(buf))
                return header
    except OSError as error:
        raise _unreadable(path, error) from None
    except (struct.error, OverflowError, UnicodeDecodeError):
        raise QFilterError(
            f"{path}: the header is truncated or damaged; download or copy the file again"
        ) from None


def status(path) -> os.stat_result:
    """os.stat of a model's file. QFilterError if it doesn't exist, or is a folder, pipe or device:
    opening a pipe would wait for its writer."""
    try:
        at = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if stat.S_ISDIR(at.st_mode):
        raise QFilterError(f"{path} is a folder; give a .gguf model")
    if not stat.S_ISREG(at.st_mode):
        raise QFilterError(f"{path} is not a regular file; give a .gguf model")
    return at


def _unreadable(path, error: OSError) -> QFilterError:
    """What to say about a model that can't be opened."""
    if isinstance(error, FileNotFoundError):
        return QFilterError(f"{path} does not exist; check the path")
    return QFilterError(f"cannot read {path}: {error.strerror}")


def _parse(path, buf) -> Header:
    (version,) = struct.unpack_from("<I", buf, 4)
    if version not in (2, 3):
        what = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
        raise QFilterError(f"{path} {what}; convert it to GGUF version 3, little endian")
    n_tensors, n_fields = struct.unpack_from("<QQ", buf, 8)
    if n_tensors * MIN_TENSOR + n_fields * MIN_FIELD > len(buf):
        raise struct.error("more keys and tensors than the file has room for")
    fields, pos = {}, 24
    for _ in range(n_fields):
        start = pos
        key, pos = _string(buf, pos)
        (kind,) = struct.unpack_from("<I", buf, pos)
        end = _skip_value(path, buf, kind, pos + 4)
        fields[key] = Field(kind, start, pos + 4, end)
        pos = end
    infos, tensors = pos, []
    for _ in range(n_tensors):
        info, pos = _tensor_info(buf, pos)
        tensors.append(info)
    alignment = DEFAULT_ALIGNMENT
    if field := fields.get("general.alignment"):
        (alignment,) = struct.unpack_from("<I", buf, field.value)
        if (
            field.type != U32
            or alignment == 0
            or alignment & (alignment - 1)
            or (alignment > MAX_ALIGNMENT)
        ):
            raise QFilterError(
                f"{path}: general.alignment is not a power of two up to {MAX_ALIGNMENT:,}; "
                "the file is damaged, download or copy it again"
            )
    data = pos + -pos % alignment
    return Header(buf[:data], version, fields, tensors, infos, pos, data, alignment)


def _string(buf, pos):
    (length,) = struct.unpack_from("<Q", buf, pos)
    end = pos + 8 + length
    if end > len(buf):
        raise struct.error("string runs past the end")
    return bytes(buf[pos + 8 : end]).decode("utf-8", "surrogateescape"), end


def _skip_value(path, buf, kind, pos):
    """Where the value of type `kind` that starts at `pos` ends."""
    if kind in SCALARS:
        end = pos + struct.calcsize("<" + SCALARS[kind])
    elif kind == STRING:
        end = pos + 8 + struct.unpack_from("<Q", buf, pos)[0]
    elif kind == ARRAY:
        item, count = struct.unpack_from("<IQ", buf, pos)
        end = pos + 12
        if item in SCALARS:
            end += count * struct.calcsize("<" + SCALARS[item])
        elif item == STRING:
            if count * MIN_STRING > len(buf) - end:
                raise struct.error("more strings than the file has room for")
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", buf, end)[0]
        else:
            raise QFilterError(f"{path}: array of unknown type {item}; download or copy it again")
    else:
        raise QFilterError(f"{path}: key of unknown type {kind}; download or copy it again")
    if end > len(buf):
        raise struct.error("value runs past the end")
    return end


def _tensor_info(buf, pos):
    name, pos = _string(buf, pos)
    (n_dims,) = struct.unpack_from("<I", buf, pos)
    if n_dims > 8:
        raise struct.error("too many dimensions")
    *shape, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", buf, pos + 4)
    return TensorInfo(name, tuple(shape), kind, offset), pos + 4 + 8 * n_dims + 12


@lru_cache(1)
def _block_sizes():
    """Number of a ggml type -> (elements, bytes) of its blocks."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def tensor_bytes(info: TensorInfo) -> int:
    """Size of a tensor's data in bytes; 0 for a type newer than the installed gguf package."""
    block, size = _block_sizes().get(info.type, (1, 0))
    n_elements = 1
    for n in info.shape:
        n_elements *= n
    return n_elements // block * size


def _check_complete(path, header, file_size):
    end = max((t.offset + tensor_bytes(t) for t in header.tensors), default=0)
    if header.data + end > file_size and header.tensors:
        raise QFilterError(
            f"{path} is truncated: {file_size:,} of at least "
            f"{header.data + end:,} bytes; download or copy it again"
        )


def scan_first(path) -> tuple[Path, Header]:
    """The file with the metadata keys of the model that `path` belongs to, and its header: `path`
    itself, or the first part of a split model."""
    path = Path(path)
    header = scan(path)
    number, count = _place(path, header)
    if number == 0:
        return path, header
    first = _part_paths(path, number, count)[0]
    if not first.exists():
        raise QFilterError(
            f"{first} is missing, the first of the {count} parts of the model; "
            "put all parts into one folder"
        )
    return first, scan(first)


def parts(path) -> list[Path]:
    """All files of the model that the GGUF file at `path` belongs to, in order: [path] for a whole
    file, else every part of the split model, whichever of them was given.

    Raises QFilterError when a part is missing, truncated or of another model."""
    path = Path(path)
    header = scan(path)
    number, count = _place(path, header)
    if count == 1:
        return [path]
    paths = _part_paths(path, number, count)
    missing = [part for part in paths if not part.exists()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise QFilterError(
            f"{missing[0]}{others} of the {count} parts of the model is missing; "
            "put all parts into one folder"
        )
    headers = [header if part == path else scan(part) for part in paths]
    for i, (part, header) in enumerate(zip(paths, headers, strict=True)):
        if _place(part, header) != (i, count):
            raise QFilterError(
                f"{part} is not part {i + 1} of {count}, as its name says; download the parts again"
            )
    names = [tensor.name for header in headers for tensor in header.tensors]
    expected = headers[0].get("split.tensors.count", len(names))
    if len(set(names)) != len(names) or len(names) != expected:
        raise QFilterError(
            f"{paths[0]} and its other parts have {len(set(names))} tensors, the model has "
            f"{expected}; download the parts again"
        )
    return paths


def part_paths(path, count: int) -> list[Path]:
    """The names of all parts of a model that is to be written to `path`. llama.cpp finds several
    parts only as NAME-00001-of-00003.gguf, ...; for one part this is [path]."""
    path = Path(path)
    if count == 1:
        return [path]
    named = PART_NAME.fullmatch(path.name)
    prefix = named["prefix"] if named else path.name.removesuffix(".gguf")
    return [path.with_name(f"{prefix}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def _place(path, header):
    """(number from 0, count) of a file among the parts of its model; (0, 1) for a whole one."""
    count, number = header.get("split.count", 1), header.get("split.no", 0)
    if not all(type(value) is int for value in (count, number)) or not 0 <= number < max(count, 1):
        raise QFilterError(f"{path}: split.no or split.count is damaged; download it again")
    return number, max(count, 1)


def _part_paths(path, number, count):
    """All parts of the model, of which `path` is number `number`. QFilterError if llama.cpp would
    not find the others by its name."""
    paths = part_paths(path, count)
    if paths[number] != path:
        raise QFilterError(
            f"{path} is part {number + 1} of {count} of a model, but is not called "
            f"NAME-{number + 1:05d}-of-{count:05d}.gguf; rename it so, like all parts"
        )
    return paths
