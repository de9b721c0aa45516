"""The header of a GGUF file: where every key, tensor info and the tensor data lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
Only the header is read and no tensor is decoded, so a file of any size and any tensor type opens
in the time it takes to walk over its vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import QFilterError

STRING, ARRAY = 8, 9
U32, I32, F32, I64 = 4, 5, 6, 11
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
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


@dataclass(frozen=True)
class Field:
    """One key-value pair: bytes [start, end) of the file, of which the value is [value, end)."""

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
    """Read the header of the GGUF file at `path`.

    Raises QFilterError when the file can't be read, is no GGUF, or ends before its tensors do."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise QFilterError(f"{path}: not a GGUF file; give a .gguf model")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buf:
                header = _parse(path, buf)
                _check_complete(path, header, len(buf))
                return header
    except OSError as error:
        raise QFilterError(f"cannot read {path}: {error.strerror}") from None
    except (struct.error, OverflowError, UnicodeDecodeError):
        raise QFilterError(
            f"{path}: the header is truncated or damaged; download or copy the file again"
        ) from None


def _parse(path, buf) -> Header:
    (version,) = struct.unpack_from("<I", buf, 4)
    if version not in (2, 3):
        what = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
        raise QFilterError(f"{path} {what}; convert it to GGUF version 3, little endian")
    n_tensors, n_fields = struct.unpack_from("<QQ", buf, 8)
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
        if field.type != U32 or alignment == 0 or alignment & (alignment - 1):
            raise QFilterError(
                f"{path}: general.alignment is not a power of two; "
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
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", buf, end)[0]
        else:
            raise QFilterError(f"{path}: array of unknown type {item}; the file is damaged")
    else:
        raise QFilterError(f"{path}: key of unknown type {kind}; the file is damaged")
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


def tensor_bytes(info: TensorInfo) -> int:
    """Size of a tensor's data in bytes; 0 for a type newer than the installed gguf package."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = {int(k): v for k, v in GGML_QUANT_SIZES.items()}.get(info.type, (1, 0))
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
