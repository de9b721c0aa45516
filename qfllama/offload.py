"""How many layers of a model go to the GPU: as many as fit beside their KV cache.

llama.cpp offloads the output first, then the last layers. The file tells how much a layer takes;
the rest is estimated with a reserve. If a model is refused for lack of memory, fewer layers are
tried.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qfllama import gguf_header
from qfllama.config import QFilterError
from qfllama.shape import ModelShape, model_shape

AUTO = "auto"
RESERVE = 1 << 30
"""Bytes of each device that stay free, as in llama.cpp's own tools."""
BATCH = 512
"""Tokens that the buffers of a computation are estimated for."""
GPU, IGPU = 1, 2  # enum ggml_backend_dev_type


class Device(NamedTuple):
    """A GPU as llama.cpp sees it; `free` is in bytes."""

    name: str
    free: int


class Cache(NamedTuple):
    """A KV cache that the layers on the GPU bring along: cells, and ggml types of K and V."""

    n_cells: int
    type_k: int = int(GGMLQuantizationType.F16)
    type_v: int = int(GGMLQuantizationType.F16)


@dataclass(frozen=True)
class Offload:
    """How many layers go to the GPU.

    Attributes:
        n_layers: as llama.cpp counts, the output is one of them; negative: all.
        total: all layers; None where the number was given or there is no GPU.
        auto: was the number chosen here?
    """

    n_layers: int
    total: int | None = None
    auto: bool = False

    def __str__(self) -> str:
        return f"n_gpu_layers {self.n_layers} of {self.total}{' (auto)' if self.auto else ''}"

    def attempts(self) -> Iterator[Offload]:
        """This one and, where the number was chosen here, smaller ones down to 0."""
        n = self.n_layers
        yield self
        while self.auto and n > 0:
            n = n * 3 // 4
            yield Offload(n, self.total, True)


def devices() -> list[Device]:
    """The GPUs that llama.cpp would use; integrated ones only where there are no others."""
    from llama_cpp._ggml import libggml as ggml

    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_name.restype = ctypes.c_char_p
    found: dict[int, list[Device]] = {GPU: [], IGPU: []}
    for i in range(ggml.ggml_backend_dev_count()):
        device = ctypes.c_void_p(ggml.ggml_backend_dev_get(ctypes.c_size_t(i)))
        kind = ggml.ggml_backend_dev_type(device)
        if kind in found:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found[kind].append(Device(ggml.ggml_backend_dev_name(device).decode(), free.value))
    return found[GPU] or found[IGPU]


def choose(
    path,
    wanted: int | str | None,
    caches: Iterable[Cache] = (),
    found: list[Device] | None = None,
) -> Offload:
    """The layers of the GGUF model at `path` that go to the GPU.

    Args:
        wanted: "auto" for as many as fit; a number; negative or "all" for all; None is 0.
        caches: the KV caches that the layers bring along.
        found: the devices; None for those there are.

    Raises:
        QFilterError: `wanted` is none of these.
    """
    if wanted == "all":
        wanted = -1
    if wanted != AUTO and wanted is not None and (type(wanted) is bool or not _is_whole(wanted)):
        raise QFilterError(f'n_gpu_layers is {wanted!r}: use "auto", "all" or a whole number')
    if wanted != AUTO:
        return Offload(int(wanted or 0))
    found = devices() if found is None else found
    if not found:
        return Offload(0, auto=True)
    sizes = layer_bytes(path)
    for i, n_bytes in enumerate(kv_bytes(model_shape(path), caches)):
        sizes[i] += n_bytes
    return Offload(layers_that_fit(sizes, buffer_bytes(path), found), len(sizes), True)


def _is_whole(value) -> bool:
    return isinstance(value, (int, np.integer))


def layers_that_fit(sizes: list[int], buffers: int, found: list[Device]) -> int:
    """How many of the last layers fit the devices.

    Args:
        sizes: bytes of each layer with its cache, the output last.
        buffers: bytes that each device needs in addition.
    """
    room = sum(max(0, device.free - RESERVE - buffers) for device in found)
    # layers are not divided between devices: each further device may leave up to a layer unused
    room -= (len(found) - 1) * max(sizes)
    n = 0
    for size in reversed(sizes):
        room -= size
        if room < 0:
            break
        n += 1
    return n


def layer_bytes(path) -> list[int]:
    """Bytes of the weights of each layer of a GGUF model, and last of the output."""
    sizes = [0] * (model_shape(path).n_layer + 1)
    embedding, has_output = 0, False
    for part in gguf_header.parts(path):
        for tensor in gguf_header.scan(part).tensors:
            n_bytes = gguf_header.tensor_bytes(tensor)
            if layer := re.match(r"blk\.(\d+)\.", tensor.name):
                sizes[min(int(layer[1]), len(sizes) - 1)] += n_bytes
            elif tensor.name.startswith("token_embd"):  # stays with the CPU
                embedding += n_bytes
            else:
                has_output |= tensor.name == "output.weight"
                sizes[-1] += n_bytes
    sizes[-1] += 0 if has_output else embedding  # one matrix for both, and a copy for the output
    return sizes


def kv_bytes(shape: ModelShape, caches: Iterable[Cache]) -> list[int]:
    """Bytes of K and V that each layer takes in all of the caches."""
    heads = shape.n_head_kv
    heads = heads if isinstance(heads, list) else [heads] * shape.n_layer
    per_value = 0.0
    for cache in caches:
        for kind in (cache.type_k, cache.type_v):
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            per_value += -(-cache.n_cells // 256) * 256 * size / block
    return [int(n_head * shape.head_dim * per_value) for n_head in heads[: shape.n_layer]]


def buffer_bytes(path) -> int:
    """An estimate of what a computation needs on a device: for each token of a batch the logits,
    and room for what a layer computes on the way."""
    for part in gguf_header.parts(path):
        for tensor in gguf_header.scan(part).tensors:
            if tensor.name == "token_embd.weight":
                n_embd, n_vocab = tensor.shape
                return 4 * BATCH * (n_vocab + 16 * n_embd)
    return RESERVE
