"""Fixtures that several test files share."""

import os
import shutil
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from qfllama import Llama

MODEL = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model: $QFLLAMA_TEST_MODEL or models/SmolLM2-135M-Instruct.Q4_1.gguf."""
    path = Path(os.environ.get("QFLLAMA_TEST_MODEL", MODEL))
    if not path.is_file():
        pytest.fail(f"no model at {path}: run `make demo` or set QFLLAMA_TEST_MODEL", pytrace=False)
    return path


@pytest.fixture(scope="session")
def smollm2_filtered() -> Path:
    """The same with filters, as `make demo` converts it."""
    path = MODEL.with_name("smollm2-qfilters.gguf")
    if not path.is_file():
        pytest.fail(f"no model at {path}: run `make demo`", pytrace=False)
    return path


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread: small models gain nothing from more, and lose much beside others."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser():
    """Chromium, which playwright drives: $QFLLAMA_TEST_BROWSER, or one on the path. Without one, or
    without playwright, the tests are skipped."""
    driver = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install 'qfllama[browser]'"
    )
    names = [os.environ.get("QFLLAMA_TEST_BROWSER", ""), "chromium", "chromium-browser"]
    program = next(filter(None, map(shutil.which, [*names, "google-chrome"])), None)
    if program is None:
        pytest.skip("no browser: install chromium or set QFLLAMA_TEST_BROWSER")
    sandbox = [] if os.name != "posix" or os.geteuid() else ["--no-sandbox"]  # root has none
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=sandbox)
        yield started
        started.close()


def watched_sizes(monkeypatch, name: str) -> list[int]:
    """How many tokens each call of the method `name` gets, of any Llama, from here on."""
    sizes, read = [], getattr(Llama, name)

    def watched(self, tokens):
        sizes.append(len(tokens))
        read(self, tokens)

    monkeypatch.setattr(Llama, name, watched)
    return sizes


def last_logits(llm: llama_cpp.Llama) -> np.ndarray:
    """float32 [n_vocab] of the last position evaluated."""
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()
