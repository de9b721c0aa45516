"""What was installed from wheels works as it is: `make wheel-check` runs this in a clean environment."""

import sys
from collections import defaultdict
from importlib.metadata import distribution
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from serving import server

from qfllama import Llama, QFilterConfig

pytestmark = pytest.mark.wheel

N_EMBD, N_HEAD, N_LAYER, HEAD_DIM, MAX_LENGTH = 64, 2, 2, 32, 256
FIRST_BYTE = 3
"""The token of the byte 0; those of other bytes follow."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama with random weights and a token for each byte."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(1024)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_EMBD)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), N_EMBD),
        "output": (len(tokens), N_EMBD),
        "output_norm": (),
    }
    for il in range(N_LAYER):
        square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes |= {f"blk.{il}.{name}": (N_EMBD, N_EMBD) for name in square}
        shapes |= {f"blk.{il}.{name}": () for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        array = random.normal(size=shape, scale=0.2) if shape else np.ones(N_EMBD)
        writer.add_tensor(f"{name}.weight", array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PROMPT = [FIRST_BYTE + (i * i) % 251 for i in range(600)]


@pytest.fixture(scope="module")
def answer(model) -> list[int]:
    """40 tokens after a prompt of 600, in 256 cells."""
    config = QFilterConfig(max_length=MAX_LENGTH, policy="knorm", recall=False)
    llm = Llama(
        str(model), qfilters=config, n_ctx=1024, n_threads=1, n_threads_batch=1, n_gpu_layers=0,
        verbose=False,
    )  # fmt: skip
    tokens = [token for token, _ in zip(llm.generate(PROMPT, temp=0), range(40), strict=False)]
    stats = llm.qfilter_stats()
    llm.close()
    assert stats["evictions"] > 0
    assert stats["cells_used"] <= MAX_LENGTH < len(PROMPT) <= stats["positions"]
    return tokens


def test_a_bounded_cache_generates(answer):
    assert len(answer) == 40
    assert len(set(answer)) > 1


def test_the_server_answers_as_python_does(model, answer, tmp_path):
    program = [str(Path(sys.executable).with_name("qfllama")), "serve", str(model)]
    options = ("--parallel", 1, "--n-ctx", 1024, "--max-length", MAX_LENGTH, "--policy", "knorm",
               "--recall", "off", "--threads", 1, "--n-gpu-layers", 0)  # fmt: skip
    with server(model, tmp_path, *options, program=program) as running:
        found = running.complete(PROMPT, 40)
        assert "<html" in running.get("/")
    assert found["timings"]["kv_cells"] <= MAX_LENGTH
    assert found["tokens"] == answer


def test_no_file_of_the_engine_is_there_twice():
    paths = defaultdict(list)
    for file in distribution("llama-cpp-python").files:
        if (file.size or 0) > 1000:
            paths[file.hash.value].append(file.name)
    assert {"libllama.so", "libllama.dylib", "llama.dll"} & {names[0] for names in paths.values()}
    assert [names for names in paths.values() if len(names) > 1] == []


def test_the_requirement_is_met_by_this_engine_alone():
    (required,) = [line for line in distribution("qfllama").requires if "llama-cpp-python=" in line]
    version = distribution("llama-cpp-python").version
    assert required == f"llama-cpp-python=={version}"
    assert llama_cpp.__version__ == version
