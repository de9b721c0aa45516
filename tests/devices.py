"""Devices that hold layers and their KV cache, and the CPU contexts that they are compared with."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import bounded
import llama_cpp
import llama_cpp._internals as internals
import numpy as np
import pytest
import tiny_models
from llama_cpp import _ggml

from qfllama import native
from qfllama.context import cache_type

BACKENDS = ["graph", "RPC", "Vulkan", "CUDA"]
RPC_LIBRARY = _ggml.libggml_base_path / "libggml-rpc.so"
REQUIRED = os.environ.get("QFLLAMA_TEST_BACKEND")
"""A backend whose tests must not be skipped: the make recipe of its build sets this."""

VECTORS = {
    "qfilters": "weight",
    "qfilters2": "moments",
    "qahead": "queries",
    "qblend": "queries",
    "learned": "queries",
    "knorm": None,
    "keydiff": None,
    "kvdiff": None,
    "streaming": None,
    "random": None,
}
"""Policy -> what the tests give it; learned ones besides."""
BATCHES = np.random.default_rng(1).integers(3, tiny_models.VOCAB, (20, 8)).tolist()
"""Enough for 14 evictions with the sizes of `bounded.config`."""


@dataclass(frozen=True)
class Backend:
    """A place for layers and their cache that is compared with the CPU's host path.

    device: ggml_backend_dev_t, or None for the CPU
    flags: of the bounded context
    exact: it computes with the CPU's code, so everything has to be equal to the bit
    other_rows: share of the rows that a session may keep differently, because keys of deeper
        layers differ by rounding
    """

    name: str
    device: int | None = None
    flags: int = 0
    exact: bool = True
    other_rows: float = 0.0

    def load(self, path, n_layers=99) -> internals.LlamaModel:
        """A model whose last n_layers are there."""
        return load(path, self.device, n_layers)


@contextmanager
def backend(name: str):
    """A Backend; skips the test if the build under test or this machine lacks it."""
    if name == "graph":
        yield Backend(name, flags=native.FLAG_GRAPH_GATHER)
    elif name == "RPC":
        with rpc_device() as device:
            yield Backend(name, device)
    else:
        # of 6,720 rows 42 differed on CUDA (NVIDIA H200), of 53,760 rows 6 on Vulkan (llvmpipe)
        other_rows = {"Vulkan": 0.002, "CUDA": 0.01}[name]
        yield Backend(name, first_of(name), exact=False, other_rows=other_rows)


def missing(name: str, why: str):
    """Skip, unless this backend was asked for by name."""
    (pytest.fail if name == REQUIRED else pytest.skip)(f"{name}: {why}")


def first_of(name: str) -> int:
    """The first device of a backend."""
    ggml = _ggml.libggml
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_reg_dev_count.argtypes = [ctypes.c_void_p]
    registered = ggml.ggml_backend_reg_by_name(name.encode())
    if not registered:
        missing(name, f"llama.cpp was built without it: `make test-{name.lower()}`")
    if not ggml.ggml_backend_reg_dev_count(registered):
        missing(
            name,
            "there is no such device (Vulkan: GGML_VK_VISIBLE_DEVICES=0 takes a software driver)",
        )
    return device_of(registered)


def device_of(registered) -> int:
    """The first device of a ggml_backend_reg_t."""
    get = _ggml.libggml.ggml_backend_reg_dev_get
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
    return get(registered, 0)


RPC_SERVER = """
import ctypes, sys
from llama_cpp._ggml import libggml, libggml_base_path
libggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
devices = (ctypes.c_void_p * 1)(libggml.ggml_backend_dev_by_type(0))  # the CPU
start = ctypes.CDLL(str(libggml_base_path / "libggml-rpc.so")).ggml_backend_rpc_start_server
start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
start(sys.argv[1].encode(), None, 1, 1, devices)
"""


@contextmanager
def rpc_server():
    """HOST:PORT of an RPC server on this machine: another process, whose memory is not ours."""
    if not RPC_LIBRARY.is_file():
        missing("RPC", "llama.cpp was built without it: `make test-rpc`")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", RPC_SERVER, f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def rpc_device():
    """The device of an RPC server."""
    with rpc_server() as address:
        add_server = ctypes.CDLL(str(RPC_LIBRARY)).ggml_backend_rpc_add_server
        add_server.restype, add_server.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        yield device_of(add_server(address.encode()))


def load(path, device=None, n_layers=0) -> internals.LlamaModel:
    """A model whose last n_layers are on a device. Without a device all of it is on the CPU, which
    llama.cpp does not choose by itself where there is another device."""
    params = llama_cpp.llama_model_default_params()
    devices = (ctypes.c_void_p * 2)(device, None)
    params.devices = ctypes.cast(devices, ctypes.c_void_p).value
    params.n_gpu_layers = n_layers if device else 0
    return internals.LlamaModel(path_model=str(path), params=params, verbose=False)


@dataclass(frozen=True)
class Shape:
    """Of the layers that evict: their ids in the model, and their heads."""

    layers: tuple[int, ...]
    head_dim: int
    n_head: int = 6
    n_head_kv: int = 2

    def vectors(self, policy: str) -> dict:
        """Random vectors of the kind that the policy needs, as arguments of Bounded."""
        kind = VECTORS[policy]
        if kind is None:
            return {}
        n_layer = len(self.layers)
        if kind == "moments":
            rows = tiny_models.some_moments(n_layer, self.n_head, self.head_dim)
        else:
            rng = np.random.default_rng(0)
            rows = rng.normal(size=(n_layer, self.n_head_kv, self.head_dim)).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
            rows *= 10 if kind == "queries" else 1
        vectors = {kind: dict(zip(self.layers, rows, strict=True))}
        if policy == "learned":
            size = (n_layer, self.n_head_kv, 2 * self.n_head_kv * self.head_dim)
            rows = np.random.default_rng(3).normal(size=size).astype(np.float32)
            vectors["learned"] = dict(zip(self.layers, rows, strict=True))
        return vectors

    def context(self, model, policy, types=("f16", "f16"), sizes=None, **kwargs) -> bounded.Bounded:
        """A bounded context: of 48 rows, of which 8 go at a time, unless `sizes` says otherwise."""
        return bounded.Bounded(
            model,
            bounded.config(policy=policy, **(sizes or {})),
            type_k=types[0],
            type_v=types[1],
            **self.vectors(policy),
            **kwargs,
        )

    def kept(self, llm, seq=0) -> list[np.ndarray]:
        """Of every layer's heads: int32 [n], the positions."""
        return [llm.kept(il, ih, seq) for il in self.layers for ih in range(self.n_head_kv)]

    def rows(self, llm, seq=0) -> list[np.ndarray]:
        """Of every layer K and V as stored: uint8 [n, row_bytes]."""
        return [stored for il in self.layers for stored in llm.rows(il, seq)]

    def remember(self, llm, seen: dict, seq=0) -> None:
        """Checks that every row that was seen before has the bytes that it had.

        seen: (K or V, layer, head, position) -> bytes"""
        for il in self.layers:
            for name, stored in zip("KV", llm.rows(il, seq), strict=True):
                stored = stored.reshape(len(stored), self.n_head_kv, -1)
                for ih in range(self.n_head_kv):
                    kept = llm.kept(il, ih, seq).tolist()
                    for pos, row in zip(kept, stored[:, ih], strict=True):
                        data = row.tobytes()
                        assert seen.setdefault((name, il, ih, pos), data) == data


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, ours, theirs))


def stock_logits(model, types) -> np.ndarray:
    """float32 [n_batches, n_vocab]: what upstream's context, which keeps everything, computes."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 8, 8
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k, params.type_v = map(cache_type, types)
    llm, result = internals.LlamaContext(model=model, params=params, verbose=False), []
    for tokens in BATCHES:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        result.append(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).copy())
    llm.close()
    return np.array(result)
