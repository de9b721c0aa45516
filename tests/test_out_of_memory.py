"""What convert says where memory runs out while llama.cpp loads or runs a model."""

import os
import subprocess
import sys

import pytest
from qfllama.convert import native_model

from qfllama.config import QFilterError

SHORT_OF_MEMORY = """
import contextlib, resource, sys
import llama_cpp
from pathlib import Path
from qfllama.config import QFilterError
from qfllama.convert import native_model

path, step = sys.argv[1:]
mode = llama_cpp.LLAMA_LOAD_MODE_NONE if step == "read" else llama_cpp.LLAMA_LOAD_MODE_MMAP

def limit():
    page, used = resource.getpagesize(), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used * page + (60 << 20),) * 2)

if step != "run":
    limit()
try:
    with native_model.loaded(path, load_mode=mode) as model:
        limit()
        native_model.context(model, 8192, 64)  # keys and values of 180 MiB
except QFilterError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures its memory as Linux does")
@pytest.mark.parametrize("step", ["read", "map", "run"])
def test_too_little_memory_is_one_line_with_the_options_that_help(smollm2, step):
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, smollm2, step],
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # threads reserve address space otherwise
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "--max-seq-len" in done.stdout
    assert "another file" not in done.stdout
    assert "--backend" not in done.stdout


def test_a_damaged_file_is_not_blamed_on_memory(smollm2, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(smollm2.read_bytes()[:1_000_000])
    refused = pytest.raises(QFilterError, match="give another file")
    with refused as error, native_model.loaded(tmp_path / "cut.gguf"):
        pass
    assert "--n-gpu-layers" not in str(error.value)
