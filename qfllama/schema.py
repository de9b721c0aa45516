"""The qfilters.* keys of a GGUF file: read, check, pack. No other file knows these keys.

    qfilters.version        u32    3
    qfilters.requires       str[]  what a reader has to understand: "queries", "moments"; absent:
                                   neither of them
    qfilters.layout         str    how RoPE pairs the numbers of a row of K: one of LAYOUTS
    qfilters.fingerprint    str    of the tensors that the filters were made for (fingerprint.py)
    qfilters.layers         i32[]  model layers that have filters, ascending
    qfilters.head_count_kv  u32[]  KV heads, one number per entry of `layers`
    qfilters.head_dim       u32[]  as head_count_kv
    qfilters.filters        f32[]  [n_head_kv][head_dim] of each layer, one layer after another
    qfilters.queries        f32[]  mean queries before RoPE, shaped as `filters`; optional
    qfilters.head_count     u32[]  query heads, as head_count_kv; only with moments
    qfilters.rank           u32    only with moments
    qfilters.moments        u16[]  bits of float16, [n_head][1 + rank][head_dim] of each layer;
                                   optional
    qfilters.learned_width  u32[]  numbers of a learned filter, as head_count_kv; only with learned
    qfilters.learned        u16[]  bits of float16, [n_head_kv][learned_width] of each layer; optional
    qfilters.policy         str    what a test found to be best for the model; optional
    qfilters.calibration.*  str, int  where the filters come from:
        text, route (torch, llama or published), model_sha256, tool         str
        sequences, held_out (sequences among them that only the quality was measured on),
        tokens, samples (queries per head), seed                            int
    qfilters.quality.*      f32[]  how well the filters fit, [n_head_kv] of each layer, NaN where
                                   undefined:
        energy          0..1   share of the energy of held-out queries that lies on v1, mean over
                               the query heads of the KV head
        mean_cosine     0..1   mean |cosine| of held-out queries to the mean query
        spearman        -1..1  rank correlation between k.filter and the mean attention logit that
                               held-out queries at least 64 positions later give each key
        spearman_knorm  -1..1  the same for minus the norm of the key
        learned         ..1    how well the learned filter predicts what a repetition looks at (R^2
                               on held-out text)
        any other name         kept and shown; one number per KV head, per layer, or any size

Versions 1 and 2, which are still read, have neither `requires`, `layout` nor `fingerprint`; their
filters are called `weight`, all layers have the same shape, and layer_count, head_count_kv,
head_dim and head_count are single numbers. Version 2 has moments, version 1 has none.

They are key-value pairs and never tensors: stock llama.cpp ignores keys it doesn't know and
refuses tensors it doesn't know.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from . import gguf_header
from .config import QFilterError
from .filters import LAYOUTS, OPTIONAL, REQUIRED, VERSION, Filters
from .fingerprint import fingerprint
from .gguf_header import ARRAY, F32, I32, I64, STRING, U16, U32
from .policies import BY_NAME
from .shape import ModelShape
from .terminal import escaped

PREFIX = "qfilters."
AGAIN = "run `qfllama convert` again"
PROVENANCE = {
    "text": str,
    "route": str,
    "model_sha256": str,
    "tool": str,
    "sequences": int,
    "held_out": int,
    "tokens": int,
    "samples": int,
    "seed": int,
}
QUALITY = {
    "energy": (0.0, 1.0),
    "mean_cosine": (0.0, 1.0),
    "spearman": (-1.0, 1.0),
    "spearman_knorm": (-1.0, 1.0),
}
"""The figures of this schema: least and largest value."""
ROUNDING = 1e-3


# -- reading


def read(path, *, compare=True) -> Filters | None:
    """The filters in a GGUF file; `docs/metadata.md` describes its keys.

    Args:
        path: of the file, or of any part of a split model.
        compare: refuse filters that were made for other tensors than those in the file.

    Returns:
        the filters; None: the file has none.

    Raises:
        QFilterError: the file is no GGUF or truncated, or its filters are newer than this program,
            incomplete, of an impossible shape, not finite, zero, or of other tensors.
    """
    path, header = gguf_header.scan_first(path)
    keys = [key for key in header.fields if key.startswith(PREFIX)]
    if not keys:
        return None
    version = _typed(path, header, "version", U32)
    if version > VERSION:
        raise QFilterError(
            f"{path} has filters of version {version}, this qfllama knows version "
            f"{VERSION}; upgrade with `pip install -U qfllama`"
        )
    filters = (_read_uniform if version < 3 else _read_layers)(path, header, version)
    for key in keys:
        group, _, name = key.removeprefix(PREFIX).partition(".")
        if group == "calibration":
            filters.calibration[name] = header.get(key)
        elif group == "quality":
            filters.quality[name] = _typed(path, header, f"quality.{name}", (ARRAY, F32))
    check_sound(path, filters)
    if compare and filters.fingerprint not in (None, fingerprint(path)):
        raise QFilterError(
            f"the filters in {path} were made for other weights (another fine-tune or "
            f"quantization): run `qfllama convert {path} -o OUT.gguf --force` on this file"
        )
    return filters


def _read_layers(path, header, version):
    requires = []
    if PREFIX + "requires" in header.fields:
        requires = _typed(path, header, "requires", (ARRAY, STRING))
    if unknown := [name for name in requires if name not in REQUIRED]:
        raise QFilterError(
            f"the filters in {path} require {escaped(', '.join(unknown))}, which this qfllama does "
            "not know; upgrade with `pip install -U qfllama`"
        )
    layers = _layers(path, header)

    def sizes(key):
        numbers = _typed(path, header, key, (ARRAY, U32)).tolist()
        if len(numbers) != len(layers):
            raise QFilterError(
                f"{path}: {PREFIX}{key} has {len(numbers)} numbers for {len(layers)} layers; {AGAIN}"
            )
        return numbers

    dims = sizes("head_dim")
    shapes = list(zip(sizes("head_count_kv"), dims, strict=True))
    vectors = {"filters": _by_layer(path, header, "filters", F32, layers, shapes)}
    if "queries" in requires or PREFIX + "queries" in header.fields:
        vectors["queries"] = _by_layer(path, header, "queries", F32, layers, shapes)
    if "moments" in requires or PREFIX + "moments" in header.fields:
        n_rows = 1 + _typed(path, header, "rank", U32)
        shapes = [(n, n_rows, dim) for n, dim in zip(sizes("head_count"), dims, strict=True)]
        vectors["moments"] = _by_layer(path, header, "moments", U16, layers, shapes)
    if PREFIX + "learned" in header.fields:
        shapes = list(zip(sizes("head_count_kv"), sizes("learned_width"), strict=True))
        vectors["learned"] = _by_layer(path, header, "learned", U16, layers, shapes)
    layout, of_tensors = (_typed(path, header, key, STRING) for key in ("layout", "fingerprint"))
    policy = _typed(path, header, "policy", STRING) if PREFIX + "policy" in header.fields else None
    if policy not in BY_NAME or not BY_NAME[policy].works_with(vectors):
        policy = None  # of a newer qfllama
    return Filters(vectors, layout=layout, fingerprint=of_tensors, policy=policy, version=version)


def _read_uniform(path, header, version):
    """Versions 1 and 2, in which all layers have the same shape."""
    n_layer, n_head_kv, head_dim = (
        _typed(path, header, key, U32) for key in ("layer_count", "head_count_kv", "head_dim")
    )
    layers = _layers(path, header)
    if len(layers) != n_layer:
        raise QFilterError(
            f"{path}: {PREFIX}layers has {len(layers)} numbers for {n_layer} layers; {AGAIN}"
        )
    shapes = [(n_head_kv, head_dim)] * n_layer
    vectors = {"filters": _by_layer(path, header, "weight", F32, layers, shapes)}
    if PREFIX + "queries" in header.fields:
        vectors["queries"] = _by_layer(path, header, "queries", F32, layers, shapes)
    if version > 1:
        n_head, rank = (_typed(path, header, key, U32) for key in ("head_count", "rank"))
        shapes = [(n_head, 1 + rank, head_dim)] * n_layer
        vectors["moments"] = _by_layer(path, header, "moments", U16, layers, shapes)
    return Filters(vectors, version=version)


def _layers(path, header):
    layers = _typed(path, header, "layers", (ARRAY, I32)).tolist()
    _check_layers(path, layers)
    return layers


def _by_layer(path, header, key, kind, layers, shapes):
    """Layer -> its part of the array `key`, in its shape; 16-bit numbers as float16."""
    values = _typed(path, header, key, (ARRAY, kind))
    sizes = [math.prod(shape) for shape in shapes]
    if values.size != sum(sizes):
        raise QFilterError(
            f"{path}: {PREFIX}{key} has {values.size} numbers, the shapes of its layers take "
            f"{sum(sizes)}; {AGAIN}"
        )
    values = values.view(np.float16) if kind == U16 else values
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
    return {
        layer: part.reshape(shape) for layer, part, shape in zip(layers, parts, shapes, strict=True)
    }


def _typed(path, header, key, kind):
    if header.type_of(PREFIX + key) != kind:
        state = "has the wrong type" if PREFIX + key in header.fields else "is missing"
        raise QFilterError(f"{path}: {PREFIX}{escaped(key)} {state}; {AGAIN}")
    return header.get(PREFIX + key)


# -- checks


def check_sound(where, filters: Filters) -> None:
    """QFilterError unless all vectors have their shape (see `Filters`), are finite and not zero,
    and layout, provenance and figures are as in the schema."""
    layers = filters.layers
    _check_layers(where, layers)
    for kind, by_layer in filters.vectors.items():
        if kind not in ("filters", *OPTIONAL) or list(by_layer) != layers:
            raise QFilterError(f"{where}: {kind} are not those of the layers {layers}; {AGAIN}")
        for layer, rows in by_layer.items():
            _check_rows(f"{where}: the {kind} of layer {layer}", kind, rows, filters, layer)
    if filters.layout not in LAYOUTS.values() and (filters.layout or filters.version >= 3):
        raise QFilterError(
            f"{where}: qfilters.layout is {escaped(filters.layout)}, not one of "
            f"{', '.join(LAYOUTS.values())}; upgrade with `pip install -U qfllama`"
        )
    for name, value in filters.calibration.items():
        kinds = PROVENANCE.get(name, (str, int))
        if not isinstance(value, kinds) or isinstance(value, bool):
            what = "text" if kinds is str else "a whole number"
            what = "text or a whole number" if kinds == (str, int) else what
            raise QFilterError(
                f"{where}: qfilters.calibration.{escaped(name)} is not {what}; {AGAIN}"
            )
    for name in filters.quality.keys() & QUALITY.keys():
        _check_figures(where, name, np.ravel(filters.quality[name]), sum(filters.n_head_kv))


def _check_layers(where, layers):
    if not layers or layers != sorted(set(layers)) or layers[0] < 0:
        raise QFilterError(
            f"{where}: qfilters.layers lists {escaped(layers)}, which are no layers in ascending "
            f"order; {AGAIN}"
        )


def _check_rows(what, kind, rows, filters, layer):
    """QFilterError unless the vectors of one kind and layer are sound; what: their name in it."""
    shape, expected = np.shape(rows), "[n_head_kv, head_dim]"
    fits = len(shape) == 2 and 0 not in shape
    if kind != "filters":
        n_head_kv, head_dim = expected = filters.vectors["filters"][layer].shape
        fits = shape == expected
    if kind == "moments":
        expected = f"[a multiple of {n_head_kv}, 1 + {filters.rank}, {head_dim}], rank at least 1"
        fits = len(shape) == 3 and shape[0] > 0 and shape[0] % n_head_kv == 0
        fits = fits and shape[1:] == (1 + max(filters.rank, 1), head_dim)
    if kind == "learned":
        expected = f"[{n_head_kv}, {n_head_kv} x (head_dim of K and of V)]"
        fits = len(shape) == 2 and shape[0] == n_head_kv and shape[1] % n_head_kv == 0
        fits = fits and shape[1] > n_head_kv * head_dim
    if not fits:
        raise QFilterError(f"{what} have the shape {list(shape)}, expected {expected}; {AGAIN}")
    if not np.isfinite(rows).all():
        raise QFilterError(f"{what} contain NaN or infinite numbers; {AGAIN}")
    may_be_zero = kind in ("moments", "learned")  # a learned filter that explains nothing is
    zero = [] if may_be_zero else np.flatnonzero(~np.any(rows, axis=-1))
    if len(zero):
        raise QFilterError(f"{what} are all zero for KV head {zero[0]}; {AGAIN}")


def _check_figures(where, name, values, n_head_kv):
    """QFilterError unless every KV head has a figure, and all are in their range."""
    if values.size != n_head_kv:
        raise QFilterError(
            f"{where}: qfilters.quality.{name} has {values.size} numbers for {n_head_kv} KV heads; "
            f"{AGAIN}"
        )
    least, largest = QUALITY[name]
    inside = (values >= least - ROUNDING) & (values <= largest + ROUNDING)
    if not (np.isnan(values) | inside).all():
        raise QFilterError(
            f"{where}: qfilters.quality.{name} is not between {least:g} and {largest:g}; {AGAIN}"
        )


def check_fits(filters: Filters, shape: ModelShape) -> None:
    """QFilterError, naming both shapes, unless the filters belong to a model of this shape."""
    for layer, rows in filters.vectors["filters"].items():
        n_head, n_head_kv = shape.heads(layer) if layer < shape.n_layer else (0, 0)
        if rows.shape != (n_head_kv, shape.head_dim):
            raise QFilterError(
                f"the filters do not fit the model: they are for {len(rows)} KV heads x "
                f"{rows.shape[1]} in layer {layer}, the model has {n_head_kv} KV heads x "
                f"{shape.head_dim} there ({shape.n_layer} layers); {AGAIN} on this model"
            )
        moments = filters.vectors.get("moments")
        if moments and len(moments[layer]) != n_head:
            raise QFilterError(
                f"the filters do not fit the model: they are for {len(moments[layer])} query heads "
                f"in layer {layer}, the model has {n_head}; {AGAIN} on this model"
            )


def check_layout(filters, rope_type):
    """QFilterError if filters are in another basis than the K rows of the running llama.cpp."""
    here = LAYOUTS.get(rope_type, f"rope type {rope_type}")
    if filters.layout not in (None, here):
        raise QFilterError(
            f"the filters are for rotary pairs in the layout {filters.layout}, this llama.cpp has "
            f"{here} for the model: run `qfllama convert --force` on this file again"
        )


def check_source(src, *, force=False) -> None:
    """QFilterError if the GGUF file at SRC has filters already and they may not be replaced."""
    _, header = gguf_header.scan_first(src)
    if not force and any(key.startswith(PREFIX) for key in header.fields):
        raise QFilterError(f"{src} already has filters; replace them with --force")


# -- writing


def pack(filters: Filters) -> list[bytes]:
    """The qfilters.* keys as packed GGUF key-value pairs, in the newest version."""
    moments = filters.vectors.get("moments")
    pairs = [_pair("version", U32, VERSION)]
    if filters.requires:
        pairs.append(_pair("requires", (ARRAY, STRING), filters.requires))
    pairs += [
        _pair("layout", STRING, filters.layout),
        _pair("fingerprint", STRING, filters.fingerprint),
        _pair("layers", (ARRAY, I32), np.asarray(filters.layers, "<i4")),
        _pair("head_count_kv", (ARRAY, U32), np.asarray(filters.n_head_kv, "<u4")),
        _pair("head_dim", (ARRAY, U32), np.asarray(filters.head_dim, "<u4")),
        _pair("filters", (ARRAY, F32), _joined(filters.vectors["filters"], "<f4")),
    ]
    if filters.policy:
        pairs.append(_pair("policy", STRING, filters.policy))
    if "queries" in filters.vectors:
        pairs.append(_pair("queries", (ARRAY, F32), _joined(filters.vectors["queries"], "<f4")))
    if moments:
        n_head = [len(rows) for rows in moments.values()]
        pairs += [
            _pair("head_count", (ARRAY, U32), np.asarray(n_head, "<u4")),
            _pair("rank", U32, filters.rank),
            _pair("moments", (ARRAY, U16), _joined(moments, "<f2")),
        ]
    if learned := filters.vectors.get("learned"):
        widths = [rows.shape[1] for rows in learned.values()]
        pairs += [
            _pair("learned_width", (ARRAY, U32), np.asarray(widths, "<u4")),
            _pair("learned", (ARRAY, U16), _joined(learned, "<f2")),
        ]
    for name, value in filters.calibration.items():
        pairs.append(_pair(f"calibration.{name}", STRING if isinstance(value, str) else I64, value))
    for name, value in filters.quality.items():
        pairs.append(_pair(f"quality.{name}", (ARRAY, F32), np.asarray(value, "<f4")))
    return pairs


def _joined(by_layer, dtype):
    return np.concatenate([np.asarray(rows, dtype).ravel() for rows in by_layer.values()])


def _pair(key, kind, value):
    head = _string(PREFIX + key)
    if kind == STRING:
        return head + struct.pack("<I", STRING) + _string(value)
    if kind == (ARRAY, STRING):
        texts = b"".join(map(_string, value))
        return head + struct.pack("<IIQ", *kind, len(value)) + texts
    if isinstance(kind, tuple):
        return head + struct.pack("<IIQ", *kind, value.size) + value.tobytes()
    return head + struct.pack("<I" + gguf_header.SCALARS[kind], kind, value)


def _string(text):
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw
