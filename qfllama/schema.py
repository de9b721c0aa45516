"""The qfilters.* keys of a GGUF file: read, check, write. No other file knows these keys.

    qfilters.version                               u32    2 if there are moments, else 1
    qfilters.layer_count, .head_count_kv, .head_dim  u32  shape of the weights
    qfilters.layers                                i32[]  model layers that have a filter
    qfilters.weight                                f32[]  row-major [layer][kv_head][head_dim]
    qfilters.queries                               f32[]  mean queries before RoPE, shape of the
                                                   weights; optional
    qfilters.head_count, qfilters.rank             u32    shape of the moments (version 2)
    qfilters.moments                               u16[]  bits of float16, row-major
                                                   [layer][head][1 + rank][head_dim]
    qfilters.calibration.*                         str, int  where the filters come from:
        text, route (torch, llama or published), model_sha256, tool         str
        sequences, held_out (sequences among them that only the quality was measured on),
        tokens, samples (queries per head), seed                            int
    qfilters.quality.*                             f32[]  how well the filters fit, row-major
                                                   [layer][kv_head], NaN where undefined:
        energy          0..1   share of the energy of held-out queries that lies on v1, mean over
                               the query heads of the KV head
        mean_cosine     0..1   mean |cosine| of held-out queries to the mean query
        spearman        -1..1  rank correlation between k.filter and the mean attention logit that
                               held-out queries at least 64 positions later give each key
        spearman_knorm  -1..1  the same for minus the norm of the key
        any other name         kept and shown; [layer][kv_head] or [layer]

They are key-value pairs and never tensors: stock llama.cpp ignores keys it doesn't know and
refuses tensors it doesn't know.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from . import gguf_header
from .config import CALIBRATED, QFilterError
from .gguf_header import ARRAY, F32, I32, I64, STRING, U16, U32
from .shape import ModelShape
from .terminal import escaped

VERSION = 2
PREFIX = "qfilters."
AGAIN = "run `qfllama convert` again"
ROUTES = ("torch", "llama", "published")
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


@dataclass
class Filters:
    """Q-filters of one model, in the basis of a row of llama.cpp's K cache (after RoPE).

    weight: float32 [n_layer_with_filter, n_head_kv, head_dim]; unit vectors averaged over the
        query heads of a KV head and not normalised again; large projection = keep
    layers: the model layers these belong to, ascending, one per row of `weight`
    calibration: provenance, text or whole numbers (qfilters.calibration.*)
    quality: float32 fit figures (qfilters.quality.*): those in QUALITY [n_layer_with_filter,
        n_head_kv], others also [n_layer_with_filter] or of any size
    moments: float16 [n_layer_with_filter, n_head, 1 + rank, head_dim], for every query head the
        rows r with log E[exp(logit of key k)] = k.r[0] + sum_j (k.r[j])^2 over its queries; None:
        the filters are of the first order only
    queries: float32, shape of `weight`: the mean query before RoPE, mean over the query heads of
        the KV head; not of unit length. None: not known
    """

    weight: np.ndarray
    layers: list[int]
    calibration: dict[str, str | int] = field(default_factory=dict)
    quality: dict[str, np.ndarray] = field(default_factory=dict)
    moments: np.ndarray | None = None
    queries: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Directions per query head in the moments, 0 without moments."""
        return 0 if self.moments is None else self.moments.shape[2] - 1

    @property
    def version(self) -> int:
        """Of the schema that these filters are written in."""
        return 1 if self.moments is None else 2

    def by_layer(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Model layer -> float32 row of `weight`, `moments` or `queries`."""
        return {
            layer: np.ascontiguousarray(row, dtype=np.float32)
            for layer, row in zip(self.layers, rows, strict=True)
        }


def read(path) -> Filters | None:
    """Filters stored in the GGUF file at `path` (for a split model, of which `path` may be any
    part: in its first part), None if there are none.

    Raises QFilterError for a file that is no GGUF, is truncated, or whose filters are newer than
    this program, incomplete, of an impossible shape, or not finite or zero."""
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
    shape = tuple(
        _typed(path, header, key, U32) for key in ("layer_count", "head_count_kv", "head_dim")
    )
    layers = _typed(path, header, "layers", (ARRAY, I32))
    weight = _shaped(path, header, "weight", F32, shape)
    filters = Filters(weight, layers.tolist())
    if PREFIX + "queries" in header.fields:
        filters.queries = _shaped(path, header, "queries", F32, shape)
    if version > 1:
        filters.moments = _read_moments(path, header, shape)
    for key in keys:
        group, _, name = key.removeprefix(PREFIX).partition(".")
        if group == "calibration":
            filters.calibration[name] = header.get(key)
        elif group == "quality":
            values = _typed(path, header, key.removeprefix(PREFIX), (ARRAY, F32))
            per_head = values.size == shape[0] * shape[1]
            filters.quality[name] = values.reshape(shape[:2]) if per_head else values
    check_sound(path, filters)
    return filters


def _read_moments(path, header, shape):
    n_head, rank = (_typed(path, header, key, U32) for key in ("head_count", "rank"))
    shape = (shape[0], n_head, 1 + rank, shape[2])
    return _shaped(path, header, "moments", U16, shape).view(np.float16)


def _shaped(path, header, key, kind, shape):
    """The array of numbers of a key in the shape that other keys say."""
    values = _typed(path, header, key, (ARRAY, kind))
    if values.size != np.prod(shape, dtype=object):
        raise QFilterError(
            f"{path}: {PREFIX}{key} has {values.size} numbers, its shape is {list(shape)}; {AGAIN}"
        )
    return values.reshape(shape)


def _typed(path, header, key, kind):
    if header.type_of(PREFIX + key) != kind:
        state = "has the wrong type" if PREFIX + key in header.fields else "is missing"
        raise QFilterError(f"{path}: {PREFIX}{escaped(key)} {state}; {AGAIN}")
    return header.get(PREFIX + key)


def check_sound(where, filters):
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
            f"lists {escaped(layers)}; {AGAIN}"
        )
    if not np.isfinite(weight).all():
        raise QFilterError(f"{where}: filters contain NaN or infinite numbers; {AGAIN}")
    zero = np.argwhere(~weight.any(axis=2))
    if len(zero):
        layer, head = zero[0]
        raise QFilterError(
            f"{where}: the filter of layer {layers[layer]}, KV head {head} is all zero; {AGAIN}"
        )
    if filters.moments is not None:
        _check_moments(where, np.asarray(filters.moments), weight.shape)
    if filters.queries is not None:
        _check_queries(where, np.asarray(filters.queries), weight.shape)
    for name, value in filters.calibration.items():
        kinds = PROVENANCE.get(name, (str, int))
        if not isinstance(value, kinds) or isinstance(value, bool):
            what = "text" if kinds is str else "a whole number"
            what = "text or a whole number" if kinds == (str, int) else what
            raise QFilterError(
                f"{where}: qfilters.calibration.{escaped(name)} is not {what}; {AGAIN}"
            )
    for name, values in filters.quality.items():
        _check_figures(where, name, np.asarray(values), weight.shape[:2])


def _check_moments(where, moments, shape):
    """QFilterError unless moments are finite and [n_layer, n_head, 1 + rank, head_dim], n_head a
    multiple of n_head_kv and the rank at least 1. shape: of the weights."""
    n_layer, n_head_kv, head_dim = shape
    if moments.ndim != 4 or moments.shape[0] != n_layer or moments.shape[3] != head_dim:
        raise QFilterError(
            f"{where}: moments of shape {list(moments.shape)}, expected [{n_layer}, heads, "
            f"1 + rank, {head_dim}]; {AGAIN}"
        )
    n_head, rank = moments.shape[1], moments.shape[2] - 1
    if n_head == 0 or n_head % n_head_kv != 0 or rank < 1:
        raise QFilterError(
            f"{where}: moments of rank {rank} for {n_head} query heads and {n_head_kv} KV heads "
            f"make no sense; {AGAIN}"
        )
    if not np.isfinite(moments).all():
        raise QFilterError(f"{where}: moments contain NaN or infinite numbers; {AGAIN}")


def _check_queries(where, queries, shape):
    """QFilterError unless mean queries are finite and have the shape of the weights."""
    if queries.shape != shape:
        raise QFilterError(
            f"{where}: mean queries of shape {list(queries.shape)}, expected {list(shape)}; {AGAIN}"
        )
    if not np.isfinite(queries).all() or not queries.any(axis=2).all():
        raise QFilterError(f"{where}: mean queries contain NaN, infinite numbers or zero; {AGAIN}")


def _check_figures(where, name, values, shape):
    """QFilterError unless quality figures of a known name are [n_layer, n_head_kv] and in range."""
    if name not in QUALITY:
        return
    if values.shape != shape:
        raise QFilterError(
            f"{where}: qfilters.quality.{name} has {values.size} numbers for {shape[0]} layers x "
            f"{shape[1]} KV heads; {AGAIN}"
        )
    least, largest = QUALITY[name]
    if not (
        np.isnan(values) | ((values >= least - ROUNDING) & (values <= largest + ROUNDING))
    ).all():
        raise QFilterError(
            f"{where}: qfilters.quality.{name} is not between {least:g} and {largest:g}; {AGAIN}"
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


def check_policy(path, filters: Filters | None, policy: str) -> None:
    """Raises QFilterError if the file at `path`, with these filters, lacks what a policy needs."""
    if policy not in CALIBRATED:
        return
    if filters is None:
        raise QFilterError(
            f"{path} has no filters for the policy {policy}: make them with "
            f"`qfllama convert {path} -o OUT.gguf`, or use another policy (kvdiff needs none)"
        )
    if policy == "qfilters2" and filters.moments is None:
        raise QFilterError(
            f"{path} has filters of the first order only: make new ones with "
            f"`qfllama convert {path} -o OUT.gguf --force`, or use another policy (qblend)"
        )
    if policy == "qahead" and filters.queries is None:
        raise QFilterError(
            f"{path} has no mean queries, which the policy qahead needs: use another policy "
            f"(qblend), or calibrate with `qfllama convert {path} -o OUT.gguf --force`, which says "
            "so if this model can have none"
        )


def for_policy(filters: Filters | None, policy: str, shape: ModelShape) -> dict[str, dict]:
    """What `BoundedContext` needs for the policy: weight, moments or queries of each layer.

    qblend takes the queries of a file that has them, else the weights.

    Raises:
        QFilterError: they don't belong to a model of this shape.
    """
    if policy not in CALIBRATED:
        return {}
    check_fits_model(filters, shape)
    if policy == "qfilters2":
        return {"moments": filters.by_layer(filters.moments)}
    if policy == "qahead" or (policy == "qblend" and filters.queries is not None):
        return {"queries": filters.by_layer(filters.queries)}
    return {"weight": filters.by_layer(filters.weight)}


def check_fits_model(filters: Filters, shape: ModelShape) -> None:
    """`check_fits` for a model whose header was read; its query heads count, too."""
    check_fits(filters, n_layer=shape.n_layer, n_head_kv=shape.n_head_kv, head_dim=shape.head_dim)
    if filters.moments is None:
        return
    n_head = filters.moments.shape[1]
    heads = shape.n_head if isinstance(shape.n_head, list) else [shape.n_head] * shape.n_layer
    if any(heads[layer] != n_head for layer in filters.layers):
        raise QFilterError(
            f"the filters do not fit the model: they are for {n_head} query heads, the model has "
            f"{sorted({heads[layer] for layer in filters.layers})}; {AGAIN} on this model"
        )


def check_source(src, *, force=False) -> None:
    """QFilterError if the GGUF file at SRC has filters already and they may not be replaced."""
    _, header = gguf_header.scan_first(src)
    if not force and any(key.startswith(PREFIX) for key in header.fields):
        raise QFilterError(f"{src} already has filters; replace them with --force")


def pack(filters) -> list[bytes]:
    """The qfilters.* keys as packed GGUF key-value pairs."""
    n_layer, n_head_kv, head_dim = filters.weight.shape
    pairs = [
        _pair("version", U32, filters.version),
        _pair("layer_count", U32, n_layer),
        _pair("head_count_kv", U32, n_head_kv),
        _pair("head_dim", U32, head_dim),
        _pair("layers", (ARRAY, I32), np.asarray(filters.layers, "<i4")),
        _pair("weight", (ARRAY, F32), np.asarray(filters.weight, "<f4")),
    ]
    if filters.queries is not None:
        pairs.append(_pair("queries", (ARRAY, F32), np.asarray(filters.queries, "<f4")))
    if filters.moments is not None:
        moments = np.ascontiguousarray(filters.moments, "<f2")
        pairs += [
            _pair("head_count", U32, moments.shape[1]),
            _pair("rank", U32, filters.rank),
            _pair("moments", (ARRAY, U16), moments.view("<u2").ravel()),
        ]
    for name, value in filters.calibration.items():
        pairs.append(_pair(f"calibration.{name}", STRING if isinstance(value, str) else I64, value))
    for name, value in filters.quality.items():
        pairs.append(_pair(f"quality.{name}", (ARRAY, F32), np.asarray(value, "<f4")))
    return pairs


def _pair(key, kind, value):
    name = (PREFIX + key).encode("utf-8", "surrogateescape")
    head = struct.pack("<Q", len(name)) + name
    if kind == STRING:
        text = value.encode("utf-8", "surrogateescape")
        return head + struct.pack("<IQ", STRING, len(text)) + text
    if isinstance(kind, tuple):
        return head + struct.pack("<IIQ", *kind, value.size) + value.tobytes()
    return head + struct.pack("<I" + gguf_header.SCALARS[kind], kind, value)
