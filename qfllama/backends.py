"""ggml's backends and devices, and whether they support Flash Attention of a given shape. Has
ctypes declarations of ggml.h and ggml-backend.h."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass

from llama_cpp._ggml import libggml as _lib

from qfllama.layers import PAD

KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}
"""enum ggml_backend_dev_type -> what people call it."""
F32, F16 = 0, 1  # enum ggml_type
SCRATCH = 1 << 16
"""Bytes for the descriptions of a few tensors."""


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def _declare(name: str, restype, *argtypes):
    fn = getattr(_lib, name)
    # a function object of our own: other packages declare the same functions differently
    return ctypes.cast(fn, ctypes.CFUNCTYPE(restype, *argtypes))


_reg_count = _declare("ggml_backend_reg_count", c_size_t)
_reg_get = _declare("ggml_backend_reg_get", c_void_p, c_size_t)
_reg_name = _declare("ggml_backend_reg_name", c_char_p, c_void_p)
_dev_count = _declare("ggml_backend_dev_count", c_size_t)
_dev_get = _declare("ggml_backend_dev_get", c_void_p, c_size_t)
_dev_name = _declare("ggml_backend_dev_name", c_char_p, c_void_p)
_dev_description = _declare("ggml_backend_dev_description", c_char_p, c_void_p)
_dev_type = _declare("ggml_backend_dev_type", c_int, c_void_p)
_dev_reg = _declare("ggml_backend_dev_backend_reg", c_void_p, c_void_p)
_dev_memory = _declare(
    "ggml_backend_dev_memory", None, c_void_p, ctypes.POINTER(c_size_t), ctypes.POINTER(c_size_t)
)
_dev_supports_op = _declare("ggml_backend_dev_supports_op", c_bool, c_void_p, c_void_p)
_version = _declare("ggml_version", c_char_p)
_commit = _declare("ggml_commit", c_char_p)
_init = _declare("ggml_init", c_void_p, _InitParams)
_free = _declare("ggml_free", None, c_void_p)
_new_tensor = _declare("ggml_new_tensor_4d", c_void_p, c_void_p, c_int, *[c_int64] * 4)
_permute = _declare("ggml_permute", c_void_p, c_void_p, c_void_p, *[c_int] * 4)
_flash_attn = _declare("ggml_flash_attn_ext", c_void_p, *[c_void_p] * 5, *[c_float] * 3)


@dataclass(frozen=True)
class Device:
    """A device of ggml's.

    Attributes:
        kind: one of the words of KINDS.
        free, total: memory in bytes; 0 where the device doesn't tell.
        handle: ggml_backend_dev_t.
    """

    name: str
    description: str
    kind: str
    backend: str
    free: int
    total: int
    handle: int


def versions() -> tuple[str, str]:
    """Version and commit of ggml, as they were compiled in."""
    return _text(_version()), _text(_commit())


def backends() -> list[str]:
    """Names of the backends that the engine was built with, or has loaded."""
    return [_text(_reg_name(_reg_get(i))) for i in range(_reg_count())]


def devices() -> list[Device]:
    """All devices, the CPU among them."""
    found = []
    for i in range(_dev_count()):
        handle = _dev_get(i)
        free, total = c_size_t(), c_size_t()
        _dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        kind = KINDS.get(_dev_type(handle), "device of another kind")
        name, description = _text(_dev_name(handle)), _text(_dev_description(handle))
        backend = _text(_reg_name(_dev_reg(handle)))
        found.append(Device(name, description, kind, backend, free.value, total.value, handle))
    return found


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace").strip()


def has_flash_attention(
    device: Device,
    *,
    n_head: int,
    n_head_kv: int,
    dim_k: int,
    dim_v: int,
    type_k: int,
    type_v: int,
    n_tokens: int,
    softcap: float = 0.0,
) -> bool:
    """Does a device say that it can compute Flash Attention of this shape? llama.cpp asks the same
    question; if the answer is no, it computes on the CPU.

    Args:
        dim_k, dim_v: numbers in a key and in a value of one head.
        type_k, type_v: ggml types of the cache.
        n_tokens: of a batch.
    """
    ctx = _init(_InitParams(SCRATCH, None, True))
    try:
        # as llama.cpp lays them out: heads of a row side by side, [dim, n_tokens or cells, heads]
        def laid_out(kind: int, dim: int, n_heads: int, n: int):
            return _permute(ctx, _new_tensor(ctx, kind, dim, n_heads, n, 1), 0, 2, 1, 3)

        q = laid_out(F32, dim_k, n_head, n_tokens)
        k = laid_out(type_k, dim_k, n_head_kv, PAD)
        v = laid_out(type_v, dim_v, n_head_kv, PAD)
        mask = _new_tensor(ctx, F16, PAD, n_tokens, 1, 1)
        op = _flash_attn(ctx, q, k, v, mask, dim_k**-0.5, 0.0, softcap)
        return bool(_dev_supports_op(device.handle, op))
    finally:
        _free(ctx)
