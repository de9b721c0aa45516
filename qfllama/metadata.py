"""The qfilters.* keys of a GGUF file: read, check, write. No other file knows these keys.

    qfilters.version                               u32    1
    qfilters.layer_count, .head_count_kv, .head_dim  u32  shape of the weights
    qfilters.layers                                i32[]  model layers that have a filter
    qfilters.weight                                f32[]  row-major [layer][kv_head][head_dim]
    qfilters.calibration.*                         str, int  where the filters come from
    qfilters.quality.*                             f32[]  fit figures, per layer or layer and head

They are key-value pairs and never tensors: stock llama.cpp ignores keys it doesn't know and
refuses tensors it doesn't know.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import gguf_header
from .config import QFilterError
from .gguf_header import ARRAY, F32, I32, I64, STRING, U32

VERSION = 1
PREFIX = "qfilters."
COPY_CHUNK = 16 << 20
AGAIN = "run `qfllama convert` again"


@dataclass
class Filters:
    """Q-filters of one model, in the basis of a row of llama.cpp's K cache (after RoPE).

    weight: float32 [n_layer_with_filter, n_head_kv, head_dim]; unit vectors averaged over the
        query heads of a KV head and not normalised again; large projection = keep
    layers: the model layers these belong to, ascending, one per row of `weight`
    calibration: provenance, text or whole numbers (qfilters.calibration.*)
    quality: float32 [n_layer] or [n_layer, n_head_kv] fit figures (qfilters.quality.*)
    """

    weight: np.ndarray
    layers: list[int]
    calibration: dict[str, str | int] = field(default_factory=dict)
    quality: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelShape:
    """What a GGUF header says about its model. Head counts are lists where layers differ."""

    architecture: str
    name: str
    n_layer: int
    n_head: int | list[int]
    n_head_kv: int | list[int]
    head_dim: int
    n_ctx_train: int


def model_shape(path) -> ModelShape:
    """Shape of the model in the GGUF file at `path`. QFilterError if it is no language model."""
    return _shape_of(path, gguf_header.scan(path))


def _shape_of(path, header):
    arch = header.get("general.architecture")

    def need(key, default=None):
        value = header.get(f"{arch}.{key}", default)
        if value is None:
            raise QFilterError(
                f"{path} has no {arch}.{key}: not a language model with attention; "
                "give the GGUF of a text model"
            )
        if np.asarray(value).dtype.kind not in "iu" or np.size(value) == 0:
            raise QFilterError(f"{path}: {arch}.{key} is not a number; download the file again")
        return value

    def one(key, default=None):
        value = need(key, default)
        if np.ndim(value) != 0:
            raise QFilterError(f"{path}: {arch}.{key} is a list; download the file again")
        return int(value)

    def per_layer(value):
        values = sorted(set(np.ravel(value).tolist()))
        return values[0] if len(values) == 1 else np.ravel(value).tolist()

    n_head = per_layer(need("attention.head_count"))
    n_head_max = n_head if isinstance(n_head, int) else max(n_head)
    return ModelShape(
        architecture=arch,
        name=str(header.get("general.name", Path(path).stem)),
        n_layer=one("block_count"),
        n_head=n_head,
        n_head_kv=per_layer(need("attention.head_count_kv", n_head)),
        head_dim=one("attention.key_length", one("embedding_length") // max(n_head_max, 1)),
        n_ctx_train=one("context_length", 0),
    )


def read(path) -> Filters | None:
    """Filters stored in the GGUF file at `path`, None if there are none.

    Raises QFilterError for a file that is no GGUF, is truncated, or whose filters are newer than
    this program, incomplete, of an impossible shape, or not finite or zero."""
    header = gguf_header.scan(path)
    keys = [key for key in header.fields if key.startswith(PREFIX)]
    if not keys:
        return None
    version = _typed(path, header, "version", U32)
    if version > VERSION:
        raise QFilterError(
            f"{path} has filters of version {version}, this qfllama knows version "
            f"{VERSION}; upgrade with `pip install -U qfllama`"
        )
    shape = tuple(
        _typed(path, header, key, U32) for key in ("layer_count", "head_count_kv", "head_dim")
    )
    layers = _typed(path, header, "layers", (ARRAY, I32))
    weight = _typed(path, header, "weight", (ARRAY, F32))
    if weight.size != np.prod(shape, dtype=object):
        raise QFilterError(
            f"{path}: qfilters.weight has {weight.size} numbers, its shape is "
            f"{list(shape)}; {AGAIN}"
        )
    filters = Filters(weight.reshape(shape), layers.tolist())
    for key in keys:
        group, _, name = key.removeprefix(PREFIX).partition(".")
        if group == "calibration":
            filters.calibration[name] = value = header.get(key)
            if not isinstance(value, (str, int)):
                raise QFilterError(f"{path}: {key} is neither text nor a whole number; {AGAIN}")
        elif group == "quality":
            values = _typed(path, header, key.removeprefix(PREFIX), (ARRAY, F32))
            per_head = values.size == shape[0] * shape[1]
            filters.quality[name] = values.reshape(shape[:2]) if per_head else values
    _check_sound(path, filters)
    return filters


def _typed(path, header, key, kind):
    if header.type_of(PREFIX + key) != kind:
        state = "has the wrong type" if PREFIX + key in header.fields else "is missing"
        raise QFilterError(f"{path}: {PREFIX}{key} {state}; {AGAIN}")
    return header.get(PREFIX + key)


def _check_sound(where, filters):
    """QFilterError unless the weights are [n_layer, n_head_kv, head_dim], finite and not zero."""
    weight, layers = np.asarray(filters.weight), list(filters.layers)
    if weight.ndim != 3 or 0 in weight.shape:
        raise QFilterError(
            f"{where}: filters of shape {list(weight.shape)}, expected "
            f"[layers, KV heads, head size]; {AGAIN}"
        )
    if len(layers) != weight.shape[0] or layers != sorted(set(layers)) or layers[0] < 0:
        raise QFilterError(
            f"{where}: filters for {weight.shape[0]} layers, but qfilters.layers "
            f"lists {layers}; {AGAIN}"
        )
    if not np.isfinite(weight).all():
        raise QFilterError(f"{where}: filters contain NaN or infinite numbers; {AGAIN}")
    zero = np.argwhere(~weight.any(axis=2))
    if len(zero):
        layer, head = zero[0]
        raise QFilterError(
            f"{where}: the filter of layer {layers[layer]}, KV head {head} is all zero; {AGAIN}"
        )


def check_fits(
    filters: Filters, *, n_layer: int, n_head_kv: int | list[int], head_dim: int
) -> None:
    """QFilterError, naming both shapes, unless the filters belong to a model of this shape.

    n_head_kv: KV heads of every layer, or one number per model layer."""
    n_filter, heads, dim = filters.weight.shape
    uniform = np.ndim(n_head_kv) == 0
    fits = (
        filters.layers[-1] < n_layer
        and dim == head_dim
        and all(heads == (n_head_kv if uniform else n_head_kv[layer]) for layer in filters.layers)
    )
    if not fits:
        model_heads = n_head_kv if uniform else sorted(set(n_head_kv))
        raise QFilterError(
            f"the filters do not fit the model: {n_filter} layers (up to layer "
            f"{filters.layers[-1]}) x {heads} KV heads x {dim}, the model has {n_layer} layers x "
            f"{model_heads} KV heads x {head_dim}; {AGAIN} on this model"
        )


def check_target(src, dst, *, force=False) -> None:
    """QFilterError unless DST may be written: another file than SRC, in a folder that exists,
    and not there yet (or `force`)."""
    src, dst = Path(src), Path(dst)
    if dst.exists() and src.exists() and os.path.samefile(src, dst):
        raise QFilterError(
            f"{dst} is the input itself, which is never changed; give another output file"
        )
    if dst.is_dir():
        raise QFilterError(f"{dst} is a folder; give an output file")
    if dst.exists() and not dst.is_file():
        raise QFilterError(f"{dst} is a device or a pipe; give an output file")
    if dst.exists() and not force:
        raise QFilterError(f"{dst} exists; replace it with --force or give another output file")
    if not dst.parent.is_dir():
        raise QFilterError(f"the folder {dst.parent} does not exist; create it first")
    if not os.access(dst.parent, os.W_OK):
        raise QFilterError(f"the folder {dst.parent} is not writable; give another output file")


def check_source(src, *, force=False) -> None:
    """QFilterError if the GGUF file at SRC has filters already and they may not be replaced."""
    if not force and any(key.startswith(PREFIX) for key in gguf_header.scan(src).fields):
        raise QFilterError(f"{src} already has filters; replace them with --force")


def check_space(folder, n_bytes: int) -> None:
    """QFilterError unless `folder` has room for n_bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise QFilterError(
            f"not enough space in {folder}: {n_bytes / 2**20:,.0f} MiB needed, "
            f"{free / 2**20:,.0f} MiB free; make room or give another output file"
        )


def write(src, dst, filters: Filters, *, force=False, progress=None) -> None:
    """Copy the GGUF file SRC to DST with `filters` in its metadata.

    Everything else stays as it is: all other keys, the tensor infos and the tensor data are copied
    byte for byte, whatever the tensor types. DST appears complete or not at all.

    force: replace filters that SRC already has, and replace DST if it exists
    progress: called as progress(bytes_written, bytes_in_all)
    Raises QFilterError for filters that are not sound or don't fit SRC, no room, SRC == DST."""
    src, dst = Path(src), Path(dst)
    check_target(src, dst, force=force)
    check_source(src, force=force)
    header = gguf_header.scan(src)
    shape = _shape_of(src, header)
    _check_sound(src, filters)
    check_fits(filters, n_layer=shape.n_layer, n_head_kv=shape.n_head_kv, head_dim=shape.head_dim)

    head = _new_header(header, _pack(filters))
    total = len(head) + src.stat().st_size - header.data
    check_space(dst.parent, total)
    try:
        with _replacing(dst) as out, open(src, "rb") as data:
            out.write(head)
            data.seek(header.data)
            done = len(head)
            while chunk := data.read(COPY_CHUNK):
                out.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
    except OSError as error:
        raise QFilterError(
            f"cannot write {dst}: {error.strerror}; make room or give another output file"
        ) from None


def _new_header(header, pairs):
    """Header bytes of SRC with its qfilters.* keys replaced by `pairs` (packed keys)."""
    kept = [
        header.raw[f.start : f.end]
        for key, f in header.fields.items()
        if not key.startswith(PREFIX)
    ]
    head = b"".join(
        [
            b"GGUF",
            struct.pack("<IQQ", header.version, len(header.tensors), len(kept) + len(pairs)),
            *kept,
            *pairs,
            header.raw[header.infos : header.infos_end],
        ]
    )
    return head + bytes(-len(head) % header.alignment)


def _pack(filters):
    """The qfilters.* keys as packed GGUF key-value pairs."""
    n_layer, n_head_kv, head_dim = filters.weight.shape
    pairs = [
        _pair("version", U32, VERSION),
        _pair("layer_count", U32, n_layer),
        _pair("head_count_kv", U32, n_head_kv),
        _pair("head_dim", U32, head_dim),
        _pair("layers", (ARRAY, I32), np.asarray(filters.layers, "<i4")),
        _pair("weight", (ARRAY, F32), np.asarray(filters.weight, "<f4")),
    ]
    for name, value in filters.calibration.items():
        pairs.append(_pair(f"calibration.{name}", STRING if isinstance(value, str) else I64, value))
    for name, value in filters.quality.items():
        pairs.append(_pair(f"quality.{name}", (ARRAY, F32), np.asarray(value, "<f4")))
    return pairs


def _pair(key, kind, value):
    name = (PREFIX + key).encode()
    head = struct.pack("<Q", len(name)) + name
    if kind == STRING:
        text = value.encode("utf-8", "surrogateescape")
        return head + struct.pack("<IQ", STRING, len(text)) + text
    if isinstance(kind, tuple):
        return head + struct.pack("<IIQ", *kind, value.size) + value.tobytes()
    return head + struct.pack("<I" + gguf_header.SCALARS[kind], kind, value)


@contextmanager
def _replacing(dst):
    """A binary file beside DST that becomes DST when the block ends, and vanishes if it fails."""
    handle, temporary = tempfile.mkstemp(dir=dst.parent, prefix=f".{dst.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, dst)
    except BaseException:
        os.unlink(temporary)
        raise
