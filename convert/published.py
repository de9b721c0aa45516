"""Filters as the authors of Q-Filters publish them on the Hugging Face hub, in and out.

The format (github.com/NathanGodey/qfilters, read by kvpress's QFilterPress too) is a folder that
huggingface_hub's PyTorchModelHubMixin writes: config.json with num_layers, num_kv_heads and
kv_head_dim, and model.safetensors with one tensor `q_filters` [n_layer, n_head_kv, head_dim]. It
differs from ours (qfllama.metadata) in three ways:

  sign    they store -v1 and keep the keys with the smallest projection
  layout  of transformers' heads; ours is that of the rows of llama.cpp's K cache
  layers  every layer of the model; ours only those whose cache evicts
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import llama_cpp
import numpy as np

from .. import __version__, gguf_header, metadata
from ..config import QFilterError
from . import layout, native_model
from .text import one_line, reason

TENSOR = "q_filters"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_URL = re.compile(r"https://huggingface\.co/(?P<id>\w[\w.-]*/\w[\w.-]*)/?")

_REORDERED = """
    arcee arctic baichuan bailingmoe chameleon deci deepseek granite granite_swa granitehybrid
    granitemoe graniteswitch internlm2 llada llama llama-embed minicpm mistral3 muse-glimmer
    nanbeige olmo smollm3 xverse
"""
REORDERED = frozenset(_REORDERED.split())
"""Architectures for which upstream's converter brings the rows of the Q and K weights from halves
to pairs side by side (vendor/llama.cpp/conversion/*.py)."""

_AS_THEY_ARE = """
    chatglm cohere2 cohere2moe command-r ernie4_5 ernie4_5-moe glm4 llama4 maincoder starcoder
"""
AS_THEY_ARE = frozenset(_AS_THEY_ARE.split())
"""Architectures whose RoPE in ggml pairs 2i with 2i + 1 and whose rows the converter leaves alone:
transformers rotates the same pairs (starcoder: none at all)."""


def load(spec, gguf, note=None, *, order=None) -> metadata.Filters:
    """Published filters for the model in the GGUF file `gguf`, ready to be written into it.

    spec: a folder, a .safetensors file, or a hub id (user/name)
    note: called with lines for the user
    order: indices [head_dim] that bring a head from transformers' layout to that of the K rows of
        `gguf`, or a dict with one such array per layer; by the architecture where not given
    Raises QFilterError for filters that can't be had, are damaged, or are those of another model.
    """
    check_packages()
    shape = metadata.model_shape(gguf)
    n_layer = _n_layer(gguf, shape)
    file, revision = _find(str(spec), n_layer, shape)
    weight = _read(file)
    _check_shape(spec, weight.shape, n_layer, shape)
    orders = _orders(gguf, n_layer, order)
    layers = evicting_layers(gguf, n_layer)
    _check_numbers(spec, weight, layers)
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
    weight = np.stack([-weight[layer][:, orders[layer]] for layer in layers])
    return metadata.Filters(weight, layers, provenance)


def save(filters, gguf, folder, *, force=False, repo=None, order=None, note=None) -> Path:
    """Write the filters of the GGUF file `gguf` as a folder in the published format; returns it.

    Layers that have none get zeros, as the format has a row for every layer. kvpress skips the
    windowed layers of Gemma3ForConditionalGeneration and never reads them there; elsewhere all keys
    of such a layer would score the same, so the card shows a press that leaves these layers alone.

    The folder appears complete or not at all. force: replace our files in a folder that has any,
    and leave the others. repo: hub id that the model card names. order, note: as for `load`."""
    check_packages()
    folder = check_folder(folder, force=force)
    gguf, _ = gguf_header.scan_first(gguf)  # where all keys are, and what llama.cpp loads
    shape = metadata.model_shape(gguf)
    n_layer = _n_layer(gguf, shape)
    metadata.check_fits(
        filters, n_layer=n_layer, n_head_kv=shape.n_head_kv, head_dim=shape.head_dim
    )
    orders = _orders(gguf, n_layer, order)
    weight = np.zeros((n_layer, *filters.weight.shape[1:]), np.float32)
    for row, layer in zip(filters.weight, filters.layers, strict=True):
        weight[layer][:, orders[layer]] = -row
    if note and len(filters.layers) < n_layer:
        note(
            f"{n_layer - len(filters.layers)} layers out of {n_layer} have no filter and get "
            "zeros: use the export only in a way that leaves these layers alone; README.md shows "
            "one for kvpress"
        )
    try:
        _write_folder(folder, weight, _card(filters, gguf, shape, n_layer, repo))
    except OSError as error:
        raise QFilterError(
            f"cannot write {folder}: {error.strerror}; make room or give another folder"
        ) from None
    return folder


def check_packages() -> None:
    """QFilterError unless what reads and writes the published format is installed."""
    missing = [name for name in ("safetensors", "huggingface_hub") if find_spec(name) is None]
    if missing:
        raise QFilterError(
            f"published filters need the packages {', '.join(missing)}; install them with "
            "`pip install 'qfllama[convert]'`"
        )


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
    """Layers of the model in transformers: without those that only draft tokens, which come last."""
    header = gguf_header.scan(gguf)
    return shape.n_layer - int(header.get(f"{shape.architecture}.nextn_predict_layers", 0))


# --- layout


def head_order(gguf) -> np.ndarray:
    """Indices [head_dim] with which a head in transformers' layout becomes one in the layout of
    the K rows of the GGUF file `gguf`: cached = vector[..., indices].

    By the architecture, as there is no checkpoint to compare with. All that matters is whether the
    converter moved the rows, which it does for models whose RoPE in ggml is interleaved; with any
    other kind of RoPE, or none, they are where they were. QFilterError for an architecture of
    which it is not known."""
    shape = metadata.model_shape(gguf)
    arch = shape.architecture
    if arch in REORDERED:
        return layout.interleaved(shape.head_dim)
    # upstream re-orders glm4 and glm4moe the other way round where they have M-RoPE
    sections = np.ravel(gguf_header.scan(gguf).get(f"{arch}.rope.dimension_sections", 0))
    moved = arch in ("glm4", "glm4moe") and sections.any()
    if not moved and (arch in AS_THEY_ARE or _rope_type(gguf) != llama_cpp.LLAMA_ROPE_TYPE_NORM):
        return layout.halves(shape.head_dim)
    kind = f"{arch} model with M-RoPE" if moved else f"{arch} model"
    raise QFilterError(
        f"{gguf} is a {kind}: the order of its heads in published filters is not known; "
        "calibrate with `qfllama convert` instead"
    )


def _rope_type(gguf):
    """llama.cpp's llama_rope_type of the model in a GGUF file, which needs no weights."""
    with native_model.loaded(gguf, vocab_only=True) as model:
        return llama_cpp.llama_model_rope_type(model.model)


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
    folder = _download(spec, [CONFIG])
    _check_config(spec, folder / CONFIG, n_layer, shape)
    revision = folder.name
    path = _download(spec, [CONFIG, WEIGHTS], revision) / WEIGHTS
    if not path.is_file():
        raise QFilterError(f"{spec} on the hub has no {WEIGHTS}; give other filters")
    return path, revision


def _check_config(spec, path, n_layer, shape):
    """QFilterError unless config.json is that of filters for this model: the weights of anything
    else are not worth a download."""
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
        open(file, "rb").close()  # safe_open says of whatever goes wrong that there is no file
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


def _check_numbers(spec, weight, layers):
    """QFilterError unless all filters of `layers` are finite and not zero."""
    if not np.isfinite(weight).all():
        raise QFilterError(
            f"the filters of {spec} contain NaN or infinite numbers; download them again"
        )
    for layer in layers:
        for head, row in enumerate(weight[layer]):
            if not row.any():
                raise QFilterError(
                    f"the filter of layer {layer}, KV head {head} of {spec} is all zero; give "
                    "other filters"
                )


# --- out


def _write_folder(folder, weight, card):
    """Write the three files beside `folder`, or within it if it exists, and move them there: a
    folder that exists stays the same one, as it may be somebody's current one or a mount point."""
    from safetensors.numpy import save as packed

    n_layer, n_head_kv, head_dim = weight.shape
    config = {"kv_head_dim": head_dim, "num_kv_heads": n_head_kv, "num_layers": n_layer}
    where = folder.resolve()
    exists = where.is_dir()
    empty = exists and not any(where.iterdir())
    place = where if exists else where.parent
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{where.name}.") as room:
        fresh = Path(room) / "filters"
        fresh.mkdir()
        # save_file would make a file that nobody else may read
        (fresh / WEIGHTS).write_bytes(packed({TENSOR: weight}, metadata={"format": "pt"}))
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


def _card(filters, gguf, shape, n_layer, repo):
    """The model card: what hub and reader should know, and how to use the filters."""
    header = gguf_header.scan(gguf)
    base = _base_model(header)
    front = ["tags:", "- q-filters", "- kv-cache", "- kvpress", "- qfllama"]
    front += ["library_name: qfllama"]
    front += [f"base_model: {base}"] if base else []
    name = " ".join(shape.name.split())
    _, n_head_kv, head_dim = filters.weight.shape
    rows = [f"| {key.replace('_', ' ')} | {_cell(v)} |" for key, v in filters.calibration.items()]
    missing = sorted(set(range(n_layer)) - set(filters.layers))
    gaps = (
        f"\nLayers {', '.join(map(str, missing))} have no filter (zeros): they have a sliding "
        "window or no cache of keys,\nwhich needs none. Leave them out when you compress.\n"
        if missing
        else ""
    )
    return CARD_TEXT.format(
        front="\n".join(front),
        name=name,
        base=base or "the model",
        shape=f"{n_layer} layers x {n_head_kv} KV heads x {head_dim}",
        rows="\n".join(rows) or "| | not recorded |",
        gaps=gaps,
        skip=CARD_SKIP if missing else "",
        where=repo or "THIS_FOLDER",
    )


def _cell(value):
    """A value as one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _base_model(header):
    """Hub id of the model that a GGUF file was made of, as far as its metadata tells; None."""
    for key in ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url"):
        if match := HUB_URL.fullmatch(str(header.get(key, ""))):
            return match["id"]
    return None


CARD_TEXT = """\
---
{front}
---

# Q-filters for {name}

Directions that tell which cached keys of {name} will hardly be looked at again
([Q-Filters](https://arxiv.org/abs/2503.02812)): one per layer and KV head, {shape},
after RoPE, in the head layout of transformers. As with the filters published by the authors the
keys with the *smallest* projection stay.
{gaps}
| made from | |
|---|---|
{rows}

## Use

With llama.cpp through qfllama:

```sh
qfllama convert MODEL.gguf -o MODEL-qf.gguf --filters {where}
qfllama chat MODEL-qf.gguf --max-length 4096
```

With [kvpress](https://github.com/NVIDIA/kvpress) and {base} in transformers:

```python
from kvpress import QFilterPress
from kvpress.presses.qfilter_press import QFilters


class Press(QFilterPress):
    def post_init_from_model(self, model):
        filters = QFilters.from_pretrained("{where}").q_filters
        self.q_filters = filters.to(model.device, model.dtype)
{skip}

with Press(compression_ratio=0.5)(model):
    model(input_ids, past_key_values=cache)
```
"""

CARD_SKIP = """
    def forward_hook(self, module, input, kwargs, output):
        if not self.q_filters[module.layer_idx].any():  # a layer without filter stays whole
            return output
        return super().forward_hook(module, input, kwargs, output)
"""


# --- the hub


def _download(name, files, revision=None):
    """Folder in huggingface_hub's cache (.../<revision>) with such of `files` as the repository
    `name` has. From the cache alone where the hub can't be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - the hub, the network or the disk
        raise QFilterError(
            f"{name} is no file or folder here and cannot be downloaded from the Hugging Face hub: "
            f"{reason(error)}; check the name and the network"
        ) from None


def check_upload(repo) -> None:
    """QFilterError unless `repo` is a hub id and there is a token to write to the hub with."""
    check_packages()
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repo):
        raise QFilterError(f"{repo} is no hub id; give --upload user/name")
    if get_token() is None:
        raise QFilterError(
            "uploading needs a token of the Hugging Face hub; log in with `hf auth login`"
        )


def upload(folder, repo, *, private=False) -> str:
    """Upload what `save` wrote to the hub repository `repo`, which is created if need be; returns
    its address. QFilterError if that fails; `folder` stays."""
    check_upload(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    api = HfApi()
    again = f"try again with `hf upload {repo} {folder}`"
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        # create_repo leaves a repository that exists as public as it is
        if private and not api.model_info(repo).private:
            raise QFilterError(f"{repo} exists and is public; give another name with --upload")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            commit_message="Q-filters",
        )
    except QFilterError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub, the network or the token
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            again = f"log in with `hf auth login` as one who may write, then {again}"
        raise QFilterError(f"cannot upload to {repo}: {reason(error)}; {again}") from None
    return str(address)
