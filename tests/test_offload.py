"""How many layers go to the GPU: arithmetic on small files, with devices of any size."""

import gguf
import numpy as np
import pytest

from qfllama import Llama, QFilterError, offload
from qfllama.context import NoMemory, refused
from qfllama.engine import Model
from qfllama.offload import RESERVE, Cache, Device
from qfllama.shape import model_shape

N_LAYER, WIDTH, VOCAB = 4, 64, 1000
LAYER = 3 * WIDTH * WIDTH * 4  # bytes: three float32 matrices


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that writes a model of which only sizes matter."""

    def write(tied=False, heads=2):
        path = tmp_path_factory.mktemp("model") / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(N_LAYER)
        writer.add_context_length(4096)
        writer.add_embedding_length(WIDTH)
        writer.add_head_count(4)
        writer.add_head_count_kv(heads)
        writer.add_tensor("token_embd.weight", np.zeros((VOCAB, WIDTH), np.float32))
        for i in range(N_LAYER):
            for name in ("attn_q", "attn_k", "ffn_up"):
                writer.add_tensor(f"blk.{i}.{name}.weight", np.zeros((WIDTH, WIDTH), np.float32))
        if not tied:
            writer.add_tensor("output.weight", np.zeros((VOCAB, WIDTH), np.float32))
        writer.add_tensor("output_norm.weight", np.zeros(WIDTH, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


OUTPUT = (VOCAB * WIDTH + WIDTH) * 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_takes_the_bytes_of_its_tensors_and_the_output_its_own(write, tied):
    assert offload.layer_bytes(write(tied)) == [LAYER] * N_LAYER + [OUTPUT]


def test_keys_and_values_take_the_bytes_of_their_types_in_whole_blocks_of_cells(write):
    shape = model_shape(write(heads=2))
    row = 2 * 16  # KV heads of 64 / 4
    (half, *_) = offload.kv_bytes(shape, [Cache(256)])
    assert half == 256 * row * 2 * 2
    assert offload.kv_bytes(shape, [Cache(257)]) == [2 * half] * N_LAYER
    assert offload.kv_bytes(shape, [Cache(256), Cache(512)]) == [3 * half] * N_LAYER
    q8_0 = int(gguf.GGMLQuantizationType.Q8_0)
    assert offload.kv_bytes(shape, [Cache(256, q8_0, q8_0)])[0] == half * 34 // 64
    assert offload.kv_bytes(shape, []) == [0] * N_LAYER


def test_layers_with_heads_of_their_own_take_what_they_have(write):
    shape = model_shape(write(heads=[1, 2, 0, 4]))
    sizes = offload.kv_bytes(shape, [Cache(256)])
    assert [size / sizes[0] for size in sizes] == [1, 2, 0, 4]


@pytest.mark.parametrize("n", range(N_LAYER + 2))
def test_as_many_layers_as_fit_beside_their_cache_go_to_the_device(write, n):
    """The output first, then the layers from the last one on; one byte less and it is one less."""
    path, caches = write(), [Cache(1024)]
    (kv, *_) = offload.kv_bytes(model_shape(path), caches)
    needed = RESERVE + offload.buffer_bytes(path)
    needed += OUTPUT * (n > 0) + (LAYER + kv) * max(0, n - 1)
    found = offload.choose(path, "auto", caches, [Device("GPU", needed)])
    assert (found.n_layers, found.total, found.auto) == (n, N_LAYER + 1, True)
    assert str(found) == f"n_gpu_layers {n} of {N_LAYER + 1} (auto)"
    if n > 0:
        assert offload.choose(path, "auto", caches, [Device("GPU", needed - 1)]).n_layers == n - 1


def test_several_devices_count_together_less_the_gaps_between_them():
    sizes = [100, 100, 100, 100]
    one = [Device("GPU", RESERVE + 250)]
    assert offload.layers_that_fit(sizes, 0, one) == 2
    assert offload.layers_that_fit(sizes, 0, one * 2) == 4
    assert offload.layers_that_fit(sizes, 0, [Device("GPU", RESERVE + 199)] * 2) == 2
    assert offload.layers_that_fit(sizes, 0, [*one, Device("full", 0)]) == 1


def test_without_a_device_nothing_goes_anywhere(write):
    found = offload.choose(write(), "auto", [], [])
    assert (found.n_layers, found.total) == (0, None)
    assert [attempt.n_layers for attempt in found.attempts()] == [0]


def test_a_number_that_was_given_is_taken_and_tried_once(write):
    for given, taken in ((7, 7), (-1, -1), ("all", -1), (None, 0), (np.int64(3), 3)):
        found = offload.choose(write(), given)
        assert (found.n_layers, found.auto) == (taken, False)
        assert len(list(found.attempts())) == 1


def test_a_choice_is_tried_with_ever_fewer_layers():
    assert [a.n_layers for a in offload.Offload(33, 33, True).attempts()][:3] == [33, 24, 18]
    assert [a.n_layers for a in offload.Offload(33, 33, True).attempts()][-1] == 0


@pytest.mark.parametrize(
    "line",
    [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 7,605.33 MiB on device 0: "
        "cudaMalloc failed: out of memory",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "ggml_vulkan: Device memory allocation of size 5368709120 failed to allocate",
        "graph_reserve: failed to allocate compute buffers",
    ],
)
def test_too_little_memory_on_a_device_names_the_option_that_cures_it(line):
    gpu = [Device("CUDA0", 8 << 30)]
    error = refused("llama.cpp cannot load x.gguf", [line], 33, "give another file", gpu)
    assert isinstance(error, NoMemory)
    assert line in str(error) and "--n-gpu-layers" in str(error)
    assert "another file" not in str(error)
    for n_layers, found in ((0, gpu), (-1, [])):  # memory of the machine
        error = refused("llama.cpp cannot load x.gguf", [line], n_layers, "give another", found)
        assert "--n-gpu-layers" not in str(error)
    error = refused("llama.cpp cannot load x.gguf", ["wrong magic"], 33, "give another file", gpu)
    assert not isinstance(error, NoMemory) and "another file" in str(error)


@pytest.mark.parametrize("wanted", ["most", "", 1.5, True])
def test_what_is_no_number_of_layers_is_refused(smollm2, wanted):
    for make in (
        lambda: offload.choose(smollm2, wanted),
        lambda: Model(smollm2, n_gpu_layers=wanted),
    ):
        with pytest.raises(QFilterError, match="n_gpu_layers is .*auto"):
            make()


def test_auto_works_where_there_is_no_gpu_too(smollm2):
    llm = Llama(str(smollm2), n_gpu_layers="auto", n_ctx=256, n_threads=1, verbose=False)
    expected = 0 if not offload.devices() else llm.offload.n_layers
    assert llm.offload.n_layers == llm.model_params.n_gpu_layers == expected
    llm.close()
