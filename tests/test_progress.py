"""How long commands say that they will take, against a clock of the test's own."""

import io
import json
import re

import docs_model
import pytest
from click.testing import CliRunner

from qfllama import progress
from qfllama.cli import main

LINE = re.compile(r"(.+): (\d+) %, about ([\d,]+) (s|min) left")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    docs_model.write_model(path)
    return path


@pytest.fixture
def clock(monkeypatch):
    """What `time.monotonic` says, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(steps: int, seconds: float, clock, capsys) -> list[tuple]:
    """What is shown of so many steps of so many seconds each, as (percent, number, unit)."""
    with progress.progress("work", steps) as bar:
        for _ in range(steps):
            clock[0] += seconds
            bar.update(1)
    found = capsys.readouterr().err.splitlines()
    return [(int(m[2]), int(m[3]), m[4]) for m in map(LINE.fullmatch, found)]


def test_long_work_has_a_line_soon_and_one_at_each_quarter(clock, capsys):
    assert lines_of(1000, 1.0, clock, capsys) == [
        (1, 16, "min"), (25, 12, "min"), (50, 8, "min"), (75, 4, "min"),
    ]  # fmt: skip


def test_work_that_begins_slowly_skips_the_quarters_that_have_passed(clock, capsys):
    assert lines_of(3, 15.0, clock, capsys) == [(33, 30, "s"), (66, 15, "s")]


def test_short_work_has_no_line(clock, capsys):
    assert lines_of(100, 0.09, clock, capsys) == []


def test_work_of_unknown_size_has_one_line(clock, capsys):
    with progress.progress("work") as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update(5)
    assert capsys.readouterr().err == "work: under way\n"


def test_a_terminal_gets_a_bar_with_the_time_that_is_left(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with progress.progress("work", 4) as bar:
        bar.update(1)
        bar.refresh()
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("work  25 %|") and last.rstrip().endswith("left")


COMMANDS = [
    ("convert {model} -o {out} --max-seq-len 64 --num-sequences 4", "reading calibration text"),
    ("bench {model} --policy knorm --max-length 96 --positions 128 --prompts 32 --n-ctx 512 "
     "--types f16 --stock-types f16 --decode 8 --repeat 1 --json -", "measuring"),
    ("eval ppl {model} --policy full --texts 1 --length 600 --json {out}", "reading"),
    ("eval needle {model} --policy full --lengths 600 --documents 1", "questions about documents"),
    ("eval kld {model} --policy knorm --ratio 2 --texts 1 --length 512", "reading beside full f16"),
    ("compress {model} --policy knorm --file {text} -o {out}", "reading"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "title"), COMMANDS, ids=[c.split(" {")[0] for c, _ in COMMANDS]
)
def test_commands_that_take_long_say_how_far_they_are(tiny, tmp_path, monkeypatch, command, title):
    monkeypatch.setattr(progress, "QUIET", 0.0)
    text = tmp_path / "text.txt"
    text.write_text("The sky is blue. " * 60)
    words = command.format(model=tiny, out=tmp_path / "out", text=text).split()
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    shown = [m for m in map(LINE.fullmatch, result.stderr.splitlines()) if m and m[1] == title]
    assert 1 <= len(shown) <= progress.LINES, result.stderr
    percents = [int(m[2]) for m in shown]
    assert percents == sorted(percents) and percents[-1] < 100
    if "--json -" in command:
        json.loads(result.stdout)
