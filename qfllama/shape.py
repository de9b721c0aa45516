"""The shape of a model, read from the header of its GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import gguf_header
from .config import QFilterError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS, llama-hparams.h


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
    position_table: bool = False
    """Each position has an embedding of its own, as in GPT-2: there are none beyond n_ctx_train."""

    def check_positions(self, n_ctx: int) -> None:
        """QFilterError if llama.cpp would crash at the last of n_ctx positions."""
        if self.position_table and 0 < -(-self.n_ctx_train // 256) * 256 < n_ctx:
            raise QFilterError(
                f"{self.name} has a table of {self.n_ctx_train:,} positions and can't read {n_ctx:,} "
                "tokens: use fewer"
            )

    def heads(self, layer: int) -> tuple[int, int]:
        """(query heads, KV heads) of a layer."""
        counts = (self.n_head, self.n_head_kv)
        return tuple(n if isinstance(n, int) else n[layer] for n in counts)


def beyond_training(n_ctx: int, n_ctx_train: int) -> str | None:
    """The warning if n_ctx is larger than what a model was trained for; else None."""
    if not 0 < n_ctx_train < n_ctx:
        return None
    return (
        f"n_ctx is {n_ctx:,} and the model was trained for {n_ctx_train:,} positions: beyond them its "
        "answers are usually garbage, in a bounded cache as in the full one; use a smaller n_ctx"
    )


def model_shape(path) -> ModelShape:
    """Shape of the model in the GGUF file at `path`, which may be any part of a split model.
    QFilterError if it is no language model."""
    return shape_of(*gguf_header.scan_first(path))


def shape_of(path, header) -> ModelShape:
    """As `model_shape`, of a header that was scanned."""
    arch = header.get("general.architecture")
    if not isinstance(arch, str) or not arch.isprintable():
        raise QFilterError(
            f"{path} has no general.architecture: not a language model; "
            "give the GGUF of a text model"
        )

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

    n_layer = one("block_count")
    if not 0 < n_layer <= MAX_LAYERS:
        raise QFilterError(f"{path} says that it has {n_layer} layers; download the file again")

    def per_layer(value, key="attention.head_count"):
        values = np.ravel(value).tolist()
        if np.ndim(value) != 0 and len(values) < n_layer:
            raise QFilterError(
                f"{path}: {arch}.{key} has {len(values)} numbers for {n_layer} layers; "
                "download the file again"
            )
        return values[0] if len(set(values)) == 1 else values

    n_head = per_layer(need("attention.head_count"))
    n_head_max = n_head if isinstance(n_head, int) else max(n_head)
    return ModelShape(
        architecture=arch,
        name=str(header.get("general.name", Path(path).stem)),
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=per_layer(need("attention.head_count_kv", n_head), "attention.head_count_kv"),
        head_dim=one("attention.key_length", one("embedding_length") // max(n_head_max, 1)),
        n_ctx_train=one("context_length", 0),
        position_table=any(info.name == "position_embd.weight" for info in header.tensors),
    )
