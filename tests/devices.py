"""Bounded contexts with layers and their KV cache on a second device, to be compared with contexts
on the CPU alone."""

import ctypes

import bounded
import llama_cpp
import llama_cpp._internals as internals
import numpy as np
import tiny_models
from llama_cpp import _ggml

from qfllama.context import cache_type

N_LAYER, N_HEAD, N_HEAD_KV = 4, 6, 2
POLICIES = ["qfilters", "qfilters2", "qahead", "qblend", "knorm", "keydiff", "streaming"]
BATCHES = np.random.default_rng(1).integers(3, 380, (20, 8)).tolist()
"""Enough for 14 evictions with the sizes of `bounded.config`."""


def write_model(folder, head_dim):
    """The path of a small GGUF."""
    path = folder / f"heads-of-{head_dim}"
    tiny_models.write_llama(path, n_layer=N_LAYER, n_head_kv=N_HEAD_KV, head_dim=head_dim)
    return tiny_models.convert([path])[0]


def first_of(backend: str):
    """The first device (ggml_backend_dev_t) of a backend that llama.cpp was built with, or None if
    it has none. The backend is not there: LookupError."""
    ggml, pointer = _ggml.libggml, ctypes.c_void_p
    ggml.ggml_backend_reg_by_name.restype = pointer
    ggml.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
    registered = pointer(ggml.ggml_backend_reg_by_name(backend.encode()))
    if not registered:
        raise LookupError(backend)
    return device_of(registered) if ggml.ggml_backend_reg_dev_count(registered) else None


def device_of(registered):
    """The first device of a ggml_backend_reg_t."""
    get = _ggml.libggml.ggml_backend_reg_dev_get
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
    return get(registered, 0)


def load(path, device, n_layers) -> internals.LlamaModel:
    """A model of which the last n_layers are on a device. No device: all of it is on the CPU, which
    upstream would not choose by itself where there is another one."""
    params = llama_cpp.llama_model_default_params()
    devices = (ctypes.c_void_p * 2)(device, None)
    params.devices = ctypes.cast(devices, ctypes.c_void_p).value
    params.n_gpu_layers = n_layers
    return internals.LlamaModel(path_model=str(path), params=params, verbose=False)


def context(model, head_dim, policy, type_k, type_v="f16", **kwargs) -> bounded.Bounded:
    """A bounded context with random filters: 48 rows, of which 8 go at a time."""
    weight = np.random.default_rng(0).normal(size=(N_LAYER, N_HEAD_KV, head_dim))
    weight /= np.linalg.norm(weight, axis=-1, keepdims=True)
    moments = tiny_models.some_moments(N_LAYER, N_HEAD, head_dim)
    return bounded.Bounded(
        model,
        bounded.config(policy=policy),
        type_k=type_k,
        type_v=type_v,
        weight=dict(enumerate(weight.astype(np.float32))),
        moments=dict(enumerate(moments)) if policy == "qfilters2" else None,
        queries=dict(enumerate(10 * weight.astype(np.float32))) if policy == "qahead" else None,
        **kwargs,
    )


def kept(llm) -> list[np.ndarray]:
    """The positions of all layers' heads."""
    return [llm.kept(il, ih) for il in range(N_LAYER) for ih in range(N_HEAD_KV)]


def rows(llm) -> list[np.ndarray]:
    """All layers' K and V as stored."""
    return [stored for il in range(N_LAYER) for stored in llm.rows(il)]


def remember(llm, seen: dict) -> None:
    """Checks that a row seen before has the bytes it had.

    seen: (K or V, layer, head, position) -> bytes"""
    for il in range(N_LAYER):
        for name, stored in zip("KV", llm.rows(il), strict=True):
            stored = stored.reshape(len(stored), N_HEAD_KV, -1)
            for ih in range(N_HEAD_KV):
                for pos, row in zip(llm.kept(il, ih).tolist(), stored[:, ih], strict=True):
                    data = row.tobytes()
                    assert seen.setdefault((name, il, ih, pos), data) == data


def run(model, head_dim, policy, type_k, type_v="f16", **kwargs):
    """After every batch: the logits, the positions and the rows. Rows that stay don't change."""
    result, seen = [], {}
    with context(model, head_dim, policy, type_k, type_v, **kwargs) as llm:
        for tokens in BATCHES:
            assert llm.decode(tokens) == 0
            remember(llm, seen)
            result.append((llm.logits(), kept(llm), rows(llm)))
        assert llm.stats().n_evictions >= 10
    return result


def stock_logits(model, type_k, type_v) -> np.ndarray:
    """float32 [n_batches, n_vocab]: what upstream's context, which keeps everything, computes."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 8, 8
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k, params.type_v = cache_type(type_k), cache_type(type_v)
    llm, result = internals.LlamaContext(model=model, params=params, verbose=False), []
    for tokens in BATCHES:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        result.append(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).copy())
    llm.close()
    return np.array(result)
