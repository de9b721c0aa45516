"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

MODEL = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model: $QFLLAMA_TEST_MODEL or models/SmolLM2-135M-Instruct.Q4_1.gguf."""
    path = Path(os.environ.get("QFLLAMA_TEST_MODEL", MODEL))
    if not path.is_file():
        pytest.fail(f"no model at {path}: run `make demo` or set QFLLAMA_TEST_MODEL", pytrace=False)
    return path
