"""What was installed from wheels works as it is: `make wheel-check` runs this in a clean environment."""

import sys
from collections import defaultdict
from importlib.metadata import distribution
from pathlib import Path

import llama_cpp
import pytest
from docs_model import SPECIAL, write_model
from serving import server

from qfllama import Llama, QFilterConfig

pytestmark = pytest.mark.wheel

MAX_LENGTH = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(path)
    return path


PROMPT = [len(SPECIAL) + (i * i) % 251 for i in range(600)]


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
