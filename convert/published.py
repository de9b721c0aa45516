"""Filters as the authors of Q-Filters publish them on the Hugging Face hub, in and out.

The format (github.com/NathanGodey/qfilters, read by kvpress's QFilterPress too) is a folder that
huggingface_hub's PyTorchModelHubMixin writes: config.json with num_layers, num_kv_heads and
kv_head_dim, and model.safetensors with one tensor `q_filters` [n_layer, n_head_kv, head_dim]. It
differs from ours (qfllama.schema) in three ways:

  sign    they store -v1 and keep the keys with the smallest projection
  layout  of transformers' heads; ours is that of the rows of llama.cpp's K cache
  layers  every layer of the model; ours only those whose cache evicts
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import __version__, gguf_header, schema
from ..config import QFilterError
from ..filters import Filters, span
from ..shape import model_shape
from . import layout, native_model
from .published_card import card
from .published_hub import CARD, CONFIG, HUB_ID, WEIGHTS, check_packages, download
from .text import one_line

TENSOR = "q_filters"

_REORDERED = """
    arcee arctic baichuan bailingmoe chameleon deci deepseek granite granite_swa granitehybrid
    granitemoe graniteswitch internlm2 llada llama llama-embed minicpm mistral3 muse-glimmer
    nanbeige olmo smollm3 xverse
"""
REORDERED = frozenset(_REORDERED.split())
"""Architectures for which upstream's converter re-orders the rows of the Q and K weights from
halves to interleaved pairs (vendor/llama.cpp/conversion/*.py)."""

_AS_THEY_ARE = """
    chatglm cohere2 cohere2moe command-r ernie4_5 ernie4_5-moe glm4 llama4 maincoder starcoder
"""
AS_THEY_ARE = frozenset(_AS_THEY_ARE.split())
"""Architectures whose RoPE in ggml pairs 2i with 2i + 1 and whose rows the converter leaves alone:
transformers rotates the same pairs (starcoder: none at all)."""


def load(spec, gguf, note=None, *, order=None) -> Filters:
    """Published filters for the model in the GGUF file `gguf`, ready to be written into it.

    spec: a folder, a .safetensors file, or a hub id (user/name)
    note: called with lines for the user
    order: indices [head_dim] that bring a head from transformers' layout to that of the K rows of
        `gguf`, or a dict with one such array per layer; default: by the architecture
    Raises QFilterError for filters that can't be had, are damaged, or belong to another model.
    """
    check_packages()
    shape = model_shape(gguf)
    n_layer = _n_layer(gguf, shape)
    file, revision = _find(str(spec), n_layer, shape)
    tensor = _read(file)
    _check_shape(spec, tensor.shape, n_layer, shape)
    orders = _orders(gguf, n_layer, order)
    layers = evicting_layers(gguf, n_layer)
    _check_numbers(spec, tensor, layers)
    if note and len(layers) < n_layer:
        note(f"using the filters of {len(layers)} layers out of {n_layer}: the others never evict")
    provenance = {
        "text": f"published: {spec if revision else Path(spec).name}",
        "route": "published",
        "filters_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tool": f"qfllama {__version__}",
    }
    if revision:
        provenance["revision"] = revision
    by_layer = {layer: -tensor[layer][:, orders[layer]] for layer in layers}
    return Filters({"filters": by_layer}, provenance, layout=native_model.rope_layout(gguf))


def save(filters, gguf, folder, *, force=False, repo=None, order=None, note=None) -> Path:
    """Write the filters of the GGUF file `gguf` as a folder in the published format; returns it.

    Layers without filters get zeros, as the format has a row for every layer. kvpress skips the
    windowed layers of Gemma3ForConditionalGeneration and never reads their zeros. In other models
    all keys of such a layer would score the same, so the card shows a press that skips it.

    The folder appears complete or not at all. force: in a folder that is not empty, replace our
    files and leave the others. repo: hub id for the model card. order, note: as for `load`."""
    check_packages()
    folder = check_folder(folder, force=force)
    gguf, _ = gguf_header.scan_first(gguf)  # where all keys are, and what llama.cpp loads
    shape = model_shape(gguf)
    n_layer = _n_layer(gguf, shape)
    schema.check_fits(filters, replace(shape, n_layer=n_layer))
    if len(set(filters.n_head_kv)) > 1 or len(set(filters.head_dim)) > 1:
        raise QFilterError(
            f"the filters of {gguf} can't be exported: its layers have {span(filters.n_head_kv)} "
            f"KV heads x {span(filters.head_dim)}, and the published format needs the same in all"
        )
    orders = _orders(gguf, n_layer, order)
    tensor = np.zeros((n_layer, filters.n_head_kv[0], filters.head_dim[0]), np.float32)
    for layer, rows in filters.vectors["filters"].items():
        tensor[layer][:, orders[layer]] = -rows
    if note and len(filters.layers) < n_layer:
        note(
            f"{n_layer - len(filters.layers)} layers out of {n_layer} have no filter and get "
            "zeros: use the export only in a way that leaves these layers alone; README.md shows "
            "one for kvpress"
        )
    try:
        _write_folder(folder, tensor, card(filters, gguf, shape, n_layer, repo))
    except OSError as error:
        raise QFilterError(
            f"cannot write {folder}: {error.strerror}; make room or give another folder"
        ) from None
    return folder


def check_folder(folder, *, force=False) -> Path:
    """The folder as a path; QFilterError unless it may be written: not there yet or empty (or
    `force`), in a folder that exists."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise QFilterError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise QFilterError(
            f"the folder {folder} is not empty; replace filters in it with --force or give another"
        )
    place = folder if folder.is_dir() else folder.absolute().parent
    if not place.is_dir():
        raise QFilterError(f"the folder {place} does not exist; create it first")
    if not os.access(place, os.W_OK):
        raise QFilterError(f"the folder {place} is not writable; give another folder")
    return folder


def evicting_layers(gguf, n_layer: int) -> list[int]:
    """The model layers that can have a filter."""
    return [layer for layer in native_model.evicting_layers(gguf) if layer < n_layer]


def _n_layer(gguf, shape):
    """Layers of the model in transformers: without the last ones that only draft tokens."""
    header = gguf_header.scan(gguf)
    return shape.n_layer - int(header.get(f"{shape.architecture}.nextn_predict_layers", 0))


# --- layout


def head_order(gguf) -> np.ndarray:
    """Indices [head_dim] that bring a head from transformers' layout to that of the K rows of the
    GGUF file `gguf`: cached = vector[..., indices].

    Goes by the architecture, as there is no checkpoint to compare with. The question is only
    whether the converter moved the rows. It does so for models whose RoPE in ggml is interleaved;
    with any other kind of RoPE, or none, the rows stay. QFilterError if that is not known for the
    architecture."""
    shape = model_shape(gguf)
    arch = shape.architecture
    if arch in REORDERED:
        return layout.interleaved(shape.head_dim)
    # upstream re-orders glm4 and glm4moe the other way round where they have M-RoPE
    sections = np.ravel(gguf_header.scan(gguf).get(f"{arch}.rope.dimension_sections", 0))
    moved = arch in ("glm4", "glm4moe") and sections.any()
    if not moved and (
        arch in AS_THEY_ARE or native_model.rope_layout(gguf, sections=False) != "norm"
    ):
        return layout.halves(shape.head_dim)
    kind = f"{arch} model with M-RoPE" if moved else f"{arch} model"
    raise QFilterError(
        f"{gguf} is a {kind}: the order of its heads in published filters is not known; "
        "calibrate with `qfllama convert` instead"
    )


def _orders(gguf, n_layer, order):
    """Indices [head_dim] per layer."""
    if isinstance(order, dict):
        return order
    if order is None:
        order = head_order(gguf)
    return dict.fromkeys(range(n_layer), order)


# --- in


def _find(spec, n_layer, shape):
    """(the safetensors file that `spec` means, its revision on the hub or None)."""
    path = Path(spec)
    if path.is_dir():
        path = path / WEIGHTS
        if not path.is_file():
            raise QFilterError(f"{spec} has no {WEIGHTS}; give a folder with published filters")
        return path, None
    if path.is_file():
        return path, None
    if path.exists():
        raise QFilterError(f"{spec} is a device or a pipe; give a folder or a .safetensors file")
    if path.suffix == ".safetensors" or not HUB_ID.fullmatch(spec):
        raise QFilterError(
            f"{spec} does not exist; give a folder or a .safetensors file with published filters, "
            "or their hub id (user/name)"
        )
    folder = download(spec, [CONFIG])
    _check_config(spec, folder / CONFIG, n_layer, shape)
    revision = folder.name
    path = download(spec, [CONFIG, WEIGHTS], revision) / WEIGHTS
    if not path.is_file():
        raise QFilterError(f"{spec} on the hub has no {WEIGHTS}; give other filters")
    return path, revision


def _check_config(spec, path, n_layer, shape):
    """QFilterError unless config.json is that of filters for this model; checked before the weights
    are downloaded."""
    try:
        config = json.loads(path.read_text("utf-8"))
        sizes = tuple(int(config[key]) for key in ("num_layers", "num_kv_heads", "kv_head_dim"))
    except (OSError, ValueError, KeyError, TypeError):
        raise QFilterError(
            f"{spec} has no published filters (num_layers, num_kv_heads and kv_head_dim in "
            f"{CONFIG}); give the hub id of some, such as nthngdy/Llama-3.1-8B_qfilt"
        ) from None
    _check_shape(spec, sizes, n_layer, shape)


def _read(file):
    """The tensor `q_filters` of a safetensors file, float32 [n_layer, n_head_kv, head_dim]."""
    from safetensors import SafetensorError, safe_open

    try:
        open(file, "rb").close()  # whatever is wrong, safe_open says that there is no file
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            if TENSOR not in names:
                raise QFilterError(
                    f"{file} has no tensor {TENSOR} (it has {', '.join(names[:3]) or 'none'}): "
                    "not published filters; give other ones"
                )
            kind = tensors.get_slice(TENSOR).get_dtype()
            if kind not in ("F64", "F32", "F16", "BF16"):
                raise QFilterError(f"{TENSOR} in {file} is of the type {kind}; give filters in F32")
            if kind != "BF16":
                with np.errstate(over="ignore"):  # infinite numbers are refused later
                    return tensors.get_tensor(TENSOR).astype(np.float32)
        with safe_open(file, framework="pt") as tensors:  # numpy has no bfloat16
            return tensors.get_tensor(TENSOR).float().numpy()
    except SafetensorError as error:
        raise QFilterError(f"{file} is damaged: {one_line(error)}; download it again") from None
    except OSError as error:
        raise QFilterError(f"cannot read {file}: {error.strerror or error}") from None


def _check_shape(spec, filters, n_layer, shape):
    """QFilterError unless `filters` is the shape that filters of this model have."""
    heads = set(np.ravel(shape.n_head_kv).tolist()) - {0}  # 0: a recurrent layer of a hybrid
    if tuple(filters) not in {(n_layer, n, shape.head_dim) for n in heads}:
        theirs = " x ".join(str(n) for n in filters)
        raise QFilterError(
            f"the filters of {spec} are those of another model: {theirs} (layers x KV heads x head "
            f"size), {shape.name} has {n_layer} x {'/'.join(map(str, sorted(heads)))} x "
            f"{shape.head_dim}; give filters of this model"
        )


def _check_numbers(spec, tensor, layers):
    """QFilterError unless all filters of `layers` are finite and not zero."""
    if not np.isfinite(tensor).all():
        raise QFilterError(
            f"the filters of {spec} contain NaN or infinite numbers; download them again"
        )
    for layer in layers:
        for head, row in enumerate(tensor[layer]):
            if not row.any():
                raise QFilterError(
                    f"the filter of layer {layer}, KV head {head} of {spec} is all zero; give "
                    "other filters"
                )


# --- out


def _write_folder(folder, tensor, card):
    """Write the three files beside `folder`, or in it if it exists, and move them there. A folder
    that exists is not replaced, as it may be a mount point or somebody's current folder."""
    from safetensors.numpy import save as packed

    n_layer, n_head_kv, head_dim = tensor.shape
    config = {"kv_head_dim": head_dim, "num_kv_heads": n_head_kv, "num_layers": n_layer}
    where = folder.resolve()
    exists = where.is_dir()
    empty = exists and not any(where.iterdir())
    place = where if exists else where.parent
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{where.name}.") as room:
        fresh = Path(room) / "filters"
        fresh.mkdir()
        # save_file would make a file that nobody else may read
        (fresh / WEIGHTS).write_bytes(packed({TENSOR: tensor}, metadata={"format": "pt"}))
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (fresh / CARD).write_text(card, "utf-8")
        if not exists:
            fresh.rename(where)
            return
        try:
            for file in sorted(fresh.iterdir()):
                os.replace(file, where / file.name)
        except BaseException:
            for name in (WEIGHTS, CONFIG, CARD) if empty else ():
                (where / name).unlink(missing_ok=True)
            raise
