"""A model whose cache can't be bounded: every command names the file and the reason, and nothing that
its user could do in vain (filters, lengths)."""

from pathlib import Path

import headers
import pytest
from click.testing import CliRunner

from qfllama.cli import main

QUESTIONS = Path(__file__).parents[1] / "benchmarks" / "questions" / "questions.jsonl"
COMMANDS = [
    "bench {model}",
    "chat {model} --prompt hi",
    "chat {model} --prompt hi --policy kvdiff",
    "compress {model} --file {text} -o {out}",
    "convert {model} -o {out}",
    "eval ladder {model}",
    "eval needle {model} --policy qfilters",
    "eval questions {model} --questions {questions}",
    "plan {model}",
    "serve {model}",
    "view {model} --file {text} -o {out}",
]


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    return headers.bloom(tmp_path_factory.mktemp("bloom") / "bloom.gguf")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_not_supported_is_refused_for_that_reason(bloom, tmp_path, command):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("One two three.")
    words = command.format(model=bloom, text=text, out=out, questions=QUESTIONS).split()
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert str(bloom) in result.stderr and "ALiBi" in result.stderr
    assert "qfllama convert" not in result.stderr and not out.exists()


def test_inspect_shows_it_and_does_not_send_it_to_convert(bloom):
    result = CliRunner().invoke(main, ["inspect", str(bloom)])
    assert result.exit_code == 0 and "2 layers" in result.stdout
    assert "ALiBi" in result.stdout and "qfllama convert" not in result.stdout
