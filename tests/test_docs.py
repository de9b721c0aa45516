"""The code in README and docs is run as far as it can be here, and the site of `make docs` builds."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import docs_model
import pytest
from click.testing import CliRunner

import qfllama
from qfllama import engine
from qfllama.cli import main

ROOT = Path(__file__).parents[1]
MADE = ("docs/help.md", "docs/api/c.md")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "patches" / "README.md"]
    + [*(ROOT / "docs").rglob("*.md")]
)
PAGES = [page for page in PAGES if page not in MADE]

TEXTS = {
    "": "what a program prints",
    "cpp": "a policy for the engine: trying it means to build the engine",
    "nginx": "there is no nginx",
    "{eval-rst}": "for the site: `test_the_site_builds_without_a_warning`",
}
"""Kinds of blocks that are not run, and why."""
NOT_RUN = {
    ("docs/serving.md", "from openai import OpenAI"): "needs a server and a package",
    ("docs/serving.md", "from langchain_openai import ChatOpenAI"): "needs a server and a package",
    (
        "docs/evaluating.md",
        "import lm_eval",
    ): "downloads a task: tests/test_examples.py has one of its own",
}
"""Python that is only compiled: (page, its first line) -> why."""
OTHER_PROGRAMS = {
    "docker": "there is none",
    "sudo": "changes the machine",
    "serve": "needs Ray: tests/test_ray_serve.py runs the same program",
    **dict.fromkeys(
        ("cd", "export", "ln", "for", "do", "done", "grep", "python3", "."), "no program of ours"
    ),
}
"""Commands in shell blocks that nothing is checked of, and why."""
RUN = ("chat", "compress", "inspect", "plan")
"""Verbs of qfllama that are run; the command lines of others are parsed."""


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    code: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    fenced = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in fenced]


def with_kind(kind: str) -> list[str]:
    return [page for page in PAGES if any(block.kind == kind for block in blocks(page))]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    docs_model.fill(folder)
    command = ["compress", "model-qf.gguf", "--file", "book.txt", "--max-length", "1024"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run([*command, "--archive", "-o", "book.qfstate"])
    return folder


def run(words: list[str]) -> None:
    done = CliRunner().invoke(main, words, input="Hello\n")
    assert done.exit_code == 0, f"qfllama {shlex.join(words)}: {done.output}"


# -- Python


@pytest.mark.parametrize("page", with_kind("python"))
def test_the_python_of_a_page_runs(page, files, monkeypatch):
    monkeypatch.chdir(files)
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block.kind == "python":
            # its own lines in a traceback
            code = compile("\n" * block.line + block.code, ROOT / page, "exec")
            if (page, block.code.split("\n")[0]) not in NOT_RUN:
                exec(code, names)


def test_what_is_said_not_to_run_is_there():
    found = {(b.page, b.code.split("\n")[0]) for page in PAGES for b in blocks(page)}
    assert found >= set(NOT_RUN)
    kinds = {block.kind for page in PAGES for block in blocks(page)}
    assert kinds - {"python", "sh"} == set(TEXTS)


# -- the shell


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command of a shell block, without what follows a `#`."""
    code = re.sub(r"(^|\s)# .*$", "", code.replace("\\\n", " "), flags=re.MULTILINE)
    words = shlex.shlex(code, posix=True, punctuation_chars="\n;|&")
    words.whitespace, words.whitespace_split, words.commenters = " \t", True, ""
    command: list[str] = []
    for word in [*words, "\n"]:
        if word.strip("\n;|&"):
            command.append(word)
        elif command:
            yield command
            command = []


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words after `qfllama` name, and its arguments."""
    command: click.Command = main
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])
        assert found, f"qfllama has no {words[0]}"
        command, words = found, words[1:]
    return command, words


def check_qfllama(words: list[str]) -> None:
    command, rest = find(words)
    command.make_context(command.name, list(rest)).close()
    if words[0] in RUN:
        run([*words, "--force"] if words[0] == "compress" else words)


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(" ".join(targets).split()), (
        f"make {words}"
    )


def check_pip(words: list[str]) -> None:
    """Folders and extras of this repository."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    known = re.findall(r"^([\w-]+) = \[", project.partition(".optional-")[2], re.MULTILINE)
    for folder, extras in re.findall(
        r"^(\.[\w/]*)(?:\[([\w,]+)\])?$", "\n".join(words), re.MULTILINE
    ):
        assert (ROOT / folder / "pyproject.toml").is_file(), folder
        assert set(extras.split(",")) - {""} <= set(known), extras


def check_python(words: list[str]) -> None:
    """A program of ours, whose source has the options."""
    source = (ROOT / words[0]).read_text("utf-8")
    for option in words[1:]:
        assert not option.startswith("--") or f'"{option}"' in source, f"{words[0]}: {option}"


def check_curl(words: list[str]) -> None:
    """The body is JSON; tests/test_serve.py sends such requests."""
    if "-d" in words:
        json.loads(words[words.index("-d") + 1])


def check_mkdir(words: list[str]) -> None:
    Path(words[-1]).mkdir(exist_ok=True)


CHECKS = {
    "mkdir": check_mkdir,
    "curl": check_curl,
    "qfllama": check_qfllama,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
}


@pytest.mark.parametrize("page", with_kind("sh"))
def test_the_command_lines_of_a_page_are_right(page, files, monkeypatch):
    monkeypatch.chdir(files)
    for block in blocks(page):
        for words in commands(block.code) if block.kind == "sh" else []:
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            if not words or words[0] in OTHER_PROGRAMS:
                continue
            try:
                CHECKS[words[0]](words[1:])
            except (
                click.ClickException,
                AssertionError,
                LookupError,
                ValueError,
                OSError,
            ) as error:
                text = error.format_message() if isinstance(error, click.ClickException) else error
                pytest.fail(f"{page}:{block.line}: {shlex.join(words)}: {text}", pytrace=False)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_a_sentence_exist_with_their_options(page):
    text = (ROOT / page).read_text("utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`((?:qfllama|make)\s[^`]+)`", text):
        program, *words = code.split()
        if program == "make":
            check_make(words)
            continue
        command, rest = find(words)
        known = {option for param in command.params for option in param.opts}
        used = {word for word in rest[: [*rest, "--"].index("--")] if word.startswith("-")}
        assert used <= known | {"--help"}, f"{page}: `{code}`"


# -- the reference


def test_every_function_of_the_c_header_has_a_heading():
    header = (ROOT / "patches" / "include" / "qfilter.h").read_text("utf-8")
    headings = re.findall(r"^### (.*)$", (ROOT / "docs/api/c.md").read_text("utf-8"), re.MULTILINE)
    declared = set(re.findall(r"\b(llama_qfilter_\w+)\(", header))
    assert declared and declared <= set(", ".join(headings).split(", "))


def test_the_site_builds_without_a_warning(tmp_path):
    """Links and their targets, docstrings, and a place for every public name."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the site needs the extra docs: pip install '.[docs]'")
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs"]
    done = subprocess.run([*command, ROOT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "objects.inv", "rb") as file:
        found = InventoryFile.load(file, "", lambda base, path: path)
    names = {
        name.split(".")[-1] for kind in found if kind.startswith("py:") for name in found[kind]
    }
    assert names >= {name for name in {*qfllama.__all__, *engine.__all__} if "__" not in name}
    assert names >= {"cells_that_fit", "compress", "recall", "save_prompt", "ask"}
