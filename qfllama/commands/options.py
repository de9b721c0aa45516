"""One definition of every option that several commands have, and the types of their values."""

from __future__ import annotations

import math
import re
from pathlib import Path

import click

from qfllama.config import MAX_LENGTH, POLICIES, QFilterConfig
from qfllama.machine import n_threads

IN_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT_FILE = click.Path(dir_okay=False, path_type=Path)


class ModelFile(click.Path):
    """The file of a model; if it isn't there, every command shows the same message."""

    def __init__(self):
        super().__init__(path_type=Path)

    def convert(self, value, param, ctx) -> Path:
        from qfllama.gguf_header import status

        path = super().convert(value, param, ctx)
        status(path)
        return path


class CommaList(click.ParamType):
    """Values with commas between them, each once, as a tuple.

    Args:
        kind: int, float or str.
        least: the smallest number that is allowed.
        choices: the words that are allowed.
        none: is the word `none` an empty list?
    """

    def __init__(self, kind: type = str, *, least=None, choices=None, none: bool = False):
        self.kind, self.least, self.choices, self.none = kind, least, choices, none
        self.name = "text,..." if kind is str else "number,..."

    def convert(self, value, param, ctx) -> tuple:
        if isinstance(value, tuple):
            return value
        if self.none and value == "none":
            return ()
        try:
            found = tuple(dict.fromkeys(self.kind(word) for word in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, say 2,4,8.", param, ctx)
        for item in found:
            if self.choices is not None and item not in self.choices:
                self.fail(f"{item!r} is none of {', '.join(self.choices)}.", param, ctx)
            if self.least is not None and not self.least <= item <= MAX_LENGTH:
                self.fail(f"{item} is not in the range x>={self.least}.", param, ctx)
        return found


class GpuLayers(click.ParamType):
    """auto, all or a number of layers; all becomes -1."""

    name = "auto|all|number"

    def convert(self, value, param, ctx) -> str | int:
        if value in ("auto", "all"):
            return value if value == "auto" else -1
        try:
            number = int(value)
        except ValueError:
            number = -2
        if not -1 <= number < 1 << 31:
            self.fail(f"{value!r} is none of auto, all and a number of layers.", param, ctx)
        return number


class MaxLength(click.IntRange):
    """A number of cells, or auto."""

    name = "number or auto"

    def convert(self, value, param, ctx) -> str | int:
        return value if value == "auto" else super().convert(value, param, ctx)


UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Size(click.ParamType):
    """A number of bytes: 8GiB, 500M, 1048576; units are powers of 1,024."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if not found or not 1 <= (n := float(found[1]) * (1 << UNITS[found[2].upper()])) < 1 << 62:
            self.fail(f"{value!r} is not a size, say 8GiB.", param, ctx)
        return int(n)


def archive_of(archive: str | None, limit: int | None, recall: str | None) -> dict:
    """--archive, --archive-limit and --recall as fields of QFilterConfig; those not given are
    None."""
    words = {"ram": True, "off": False}
    return {
        "archive": words.get(archive, archive),
        "archive_limit": limit,
        "recall": False if recall == "off" else recall,
    }


class Finite(click.FloatRange):
    """A number in a range; `nan` and `inf` are refused."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


SHARED = {
    # a default of None: the command has to know whether the option was given
    "policy": (
        ("--policy",),
        {
            "type": click.Choice(POLICIES),
            "help": "What decides which cells are kept.  [default: what convert found to be best, "
            f"else {QFilterConfig.policy}]",
        },
    ),
    "max-length": (
        ("--max-length",),
        {"type": click.IntRange(1), "help": "Cells of the cache.  [default: 4096]"},
    ),
    "window-length": (
        ("--window-length",),
        {
            "type": click.IntRange(0),
            "help": "Newest positions that are always kept.  [default: max-length / 8, at most "
            "512]",
        },
    ),
    "sinks": (
        ("--sinks",),
        {
            "type": click.IntRange(0),
            "help": f"First positions that are always kept.  [default: {QFilterConfig.sinks}]",
        },
    ),
    "interval": (
        ("--interval",),
        {
            "type": click.IntRange(1),
            "help": "Cells that an eviction frees.  [default: max-length / 8, 64 to 512]",
        },
    ),
    "n-ctx": (
        ("--n-ctx",),
        {
            "type": click.IntRange(0, MAX_LENGTH),
            "default": 0,
            "help": "Most positions of a conversation.  [default: as many as the model was trained "
            "for]",
        },
    ),
    "n-gpu-layers": (
        ("--n-gpu-layers",),
        {
            "type": GpuLayers(),
            "default": "auto",
            "help": "Layers on the GPU: a number, all, or auto for as many as fit.  "
            "[default: auto]",
        },
    ),
    "threads": (
        ("--threads", "n_threads"),
        {
            "type": click.IntRange(1),
            "default": n_threads,
            "help": "CPU threads.  [default: one for each CPU of this process]",
        },
    ),
    "type-k": (("--type-k",), {"help": "Type of the cached K: f16, q8_0, ...  [default: f16]"}),
    "type-v": (("--type-v",), {"help": "Type of the cached V.  [default: f16]"}),
    "archive": (
        ("--archive",),
        {
            "metavar": "ram|off|DIR",
            "help": "Where evicted rows are kept for recall: in memory, nowhere, or in a file in "
            "this folder.  [default: ram]",
        },
    ),
    "archive-limit": (
        ("--archive-limit",),
        {
            "type": Size(),
            "help": "Largest size of the archive, say 8GiB.  [default: half of what is free]",
        },
    ),
    "recall": (
        ("--recall",),
        {
            "type": click.Choice(("prompt", "always", "off")),
            "help": "When evicted rows that a question looks at come back: after a prompt, also at "
            f"every eviction, or never.  [default: {QFilterConfig.recall}]",
        },
    ),
    "seed": (("--seed",), {"type": click.IntRange(0, 2**32 - 2)}),
    "system": (("--system",), {"help": "System prompt."}),
    "json": (
        ("--json", "json_file"),
        {"type": OUT_FILE, "metavar": "FILE.json", "help": "Write all figures to this file."},
    ),
    "plot": (
        ("--plot", "image"),
        {"type": OUT_FILE, "metavar": "FILE.png", "help": "Draw them (.png, .svg or .pdf)."},
    ),
    "verbose": (("--verbose",), {"is_flag": True, "help": "Show the engine's log."}),
}


def option(name: str, **changes):
    """The option `--name` of a command. `changes` replace its attributes in this command, for a
    reason that the help tells."""
    names, attributes = SHARED[name]
    return click.option(*names, **(attributes | changes))


def model_argument(command):
    """MODEL, a GGUF file."""
    return click.argument("model", type=ModelFile())(command)
