"""Lends this machine's GPUs, or its CPU if there is none, to `qfllama serve --rpc` on another.

    CMAKE_ARGS="-DGGML_RPC=on" pip install ./patches     # the same version on both
    python examples/rpc_server.py 0.0.0.0:50052

Whoever reaches the port can use this machine's memory: only in a network that you trust.
"""

import ctypes
import os
import sys
from pathlib import Path

import llama_cpp

CPU = 0  # ggml_backend_dev_type


def library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob(f"*{name}.*"))))


def devices() -> list[int]:
    """ggml_backend_dev_t of every GPU; of the CPU, if there is none."""
    ggml, base = library("ggml"), library("ggml-base")
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    every = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    return [d for d in every if base.ggml_backend_dev_type(d) != CPU] or every[:1]


def main(endpoint: str) -> None:
    lent = devices()
    start = library("ggml-rpc").ggml_backend_rpc_start_server
    start.restype = None
    start.argtypes = [
        ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    array = (ctypes.c_void_p * len(lent))(*lent)
    start(endpoint.encode(), None, os.cpu_count() or 1, len(lent), array)


if __name__ == "__main__":
    if len(sys.argv) != 2 or ":" not in sys.argv[1]:
        sys.exit("usage: python rpc_server.py HOST:PORT, for example 0.0.0.0:50052")
    try:
        main(sys.argv[1])
    except StopIteration:
        sys.exit('this engine has no RPC: CMAKE_ARGS="-DGGML_RPC=on" pip install ./patches')
