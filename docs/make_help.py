"""Write docs/help.md: the help texts of all commands, as the program prints them.

python docs/make_help.py            # writes it
python docs/make_help.py --check    # exit code 1 if it is out of date
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["COLUMNS"] = "100"

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from qfllama.cli import main  # noqa: E402

TARGET = Path(__file__).with_name("help.md")


def commands(group: click.Group, words: list[str]) -> Iterator[list[str]]:
    """The words of every command, those of commands within commands after them."""
    yield words
    for name in sorted(group.list_commands(None)):
        command = group.get_command(None, name)
        if isinstance(command, click.Group):
            yield from commands(command, [*words, name])
        else:
            yield [*words, name]


def text() -> str:
    parts = ["# Commands\n\nMade by `make docs` from the program itself.\n"]
    for words in commands(main, []):
        result = CliRunner().invoke(main, [*words, "--help"], prog_name="qfllama")
        title = " ".join(["qfllama", *words])
        parts.append(f"## {title}\n\n```\n{result.stdout.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text("utf-8") != text() and "docs/help.md is out of date: make docs")
    TARGET.write_text(text(), "utf-8")
