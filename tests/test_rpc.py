"""Layers and their KV cache on a second device: an RPC server of llama.cpp on this machine.

Its memory is not the host's, so rows are scored and moved by ggml graphs over there. It computes
with the same code as the CPU here: everything has to be equal to the bit. Needs a build with
GGML_RPC=ON (`make test-rpc`).
"""

import ctypes
import socket
import subprocess
import sys
import time

import devices
import numpy as np
import pytest
import tiny_models
from devices import N_LAYER, POLICIES
from llama_cpp import _ggml

HEAD_DIM = 32

LIBRARY = _ggml.libggml_base_path / "libggml-rpc.so"
pytestmark = pytest.mark.skipif(
    not LIBRARY.is_file(), reason="llama.cpp was built without GGML_RPC: `make test-rpc`"
)

SERVER = """
import ctypes, sys
from llama_cpp._ggml import libggml, libggml_base_path
libggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
devices = (ctypes.c_void_p * 1)(libggml.ggml_backend_dev_by_type(0))  # the CPU
start = ctypes.CDLL(str(libggml_base_path / "libggml-rpc.so")).ggml_backend_rpc_start_server
start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
start(sys.argv[1].encode(), None, 1, 1, devices)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def device():
    """The server's device, as a ggml_backend_dev_t."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert server.poll() is None, "the server ended"
        time.sleep(0.1)
    add_server = ctypes.CDLL(str(LIBRARY)).ggml_backend_rpc_add_server
    add_server.restype, add_server.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    yield devices.device_of(add_server(f"127.0.0.1:{port}".encode()))
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return devices.write_model(tmp_path_factory.mktemp("rpc"), HEAD_DIM)


@pytest.mark.parametrize("type_k", ["f32", "f16", "q5_1"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n_layers", [2, N_LAYER + 1], ids=["half of the layers", "all layers"])
def test_a_second_device_keeps_the_same_rows_and_computes_the_same_logits(
    path, device, n_layers, policy, type_k
):
    there, here = devices.load(path, device, n_layers), devices.load(path, None, 0)
    runs = (devices.run(model, HEAD_DIM, policy, type_k) for model in (there, here))
    for (logits, kept, rows), (logits_cpu, kept_cpu, rows_cpu) in zip(*runs, strict=True):
        assert all(map(np.array_equal, kept, kept_cpu))
        assert all(map(np.array_equal, rows, rows_cpu))
        np.testing.assert_array_equal(logits, logits_cpu)
    there.close()
    here.close()


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_layers_over_there_whose_cache_is_here_keep_the_rope_of_each_layer(
    device, tmp_path, type_k
):
    """What attention needs of the cache is copied. Of four layers the last has no RoPE."""
    tiny_models.write("smollm3", tmp_path / "smollm3", head_dim=64)
    (path,) = tiny_models.convert([tmp_path / "smollm3"])
    there, here = devices.load(path, device, N_LAYER + 1), devices.load(path, None, 0)
    runs = [devices.run(model, 64, "qahead", type_k, offload_kqv=False) for model in (there, here)]
    for (_, kept, _), (_, kept_cpu, _) in zip(*runs, strict=True):
        assert all(map(np.array_equal, kept, kept_cpu))
    there.close()
    here.close()


def test_rows_that_are_not_whole_words_can_not_be_moved_there(path, device):
    """q8_0 with head_dim 32: 34 bytes. In host memory they can."""
    model = devices.load(path, device, N_LAYER + 1)
    with pytest.raises(ValueError):
        devices.run(model, HEAD_DIM, "knorm", "q8_0")
    model.close()
