"""Documents with questions about them, and the text that they are made of."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qfllama.config import QFilterError

if TYPE_CHECKING:
    from qfllama.engine import Model

VERSION = 1
"""Goes up when documents or questions change: results of other versions don't count any more."""

Count = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Question:
    """What is asked at the end of a document.

    text: ends where the model goes on
    answers: all of them make the answer, in this order
    labels: plain JSON values that go into the result, such as the depth of the answer
    """

    text: str
    answers: tuple[str, ...]
    labels: dict = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return " " + ", ".join(self.answers)


@dataclass(frozen=True)
class Document:
    """A text to read once, and questions that are asked one by one, each right after it.

    length: wanted number of tokens; it has at most a few more or less
    number: which one of this task and length
    n_first: first tokens that always stay in a bounded cache, as far as it allows
    """

    task: str
    length: int
    number: int
    text: str
    questions: tuple[Question, ...]
    n_first: int = 0

    def tokens(self, model: Model) -> list[int]:
        """What is read before the questions."""
        return model.tokens(self.text, start=True)


# -- text

WORDS, CHARACTERS = 60, 1000
"""Of the longest sentence. Scripts without spaces have no words."""


@dataclass(frozen=True)
class Text:
    """A long text that the documents are cut from."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def sentences(self) -> list[str]:
        """The text in order, white space made one space, very long sentences cut."""
        result = []
        for sentence in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", " ".join(self.text.split())):
            words = sentence.split(" ")
            parts = [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)]
            for part in parts:
                result += [part[i : i + CHARACTERS] for i in range(0, len(part), CHARACTERS)]
        return result


def read_text(path: Path | None) -> Text:
    """A text file in UTF-8, or the built-in text for None.

    Raises:
        QFilterError: it is no such file or has no text in it.
    """
    if path is None:
        return builtin()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise QFilterError(f"{path} is not UTF-8 text: convert it to plain text first") from None
    if not text.strip():
        raise QFilterError(f"{path} is empty: give a file with text in it")
    return Text(path.name, text)


@functools.cache
def builtin() -> Text:
    """English prose that every Python carries: the docstrings of its library. `qfllama convert`
    calibrates on another text, so that filters aren't measured on their own.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paragraphs = prose(sorted(library.glob("*.py")))
    if not paragraphs:
        raise QFilterError("this Python comes without its library's source: give --text FILE")
    name = f"docstrings of Python {platform.python_version()}"
    return Text(name, "\n\n".join(paragraphs))


def prose(paths: Iterable[Path]) -> list[str]:
    """Paragraphs of English in the docstrings of Python files, each of them once."""
    found = (part for path in paths for part in _docstrings(path))
    return list(dict.fromkeys(filter(_is_prose, found)))


def _docstrings(path: Path) -> list[str]:
    """Paragraphs of all docstrings in a source file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [" ".join(part.split()) for text in texts if text for part in text.split("\n\n")]


def _is_prose(paragraph: str) -> bool:
    """False for a short paragraph, or one full of signs: code, tables, lists of arguments."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return len(paragraph.split()) >= 15 and letters >= 0.9 * len(paragraph)


# -- haystacks

MISSES = 20
"""A text is full after this many sentences that no longer fit."""


class Haystack:
    """Sentences of a text in order, from anywhere in it, with a known number of tokens each."""

    def __init__(self, text: Text, count: Count):
        self._sentences = text.sentences()
        self._count = count
        self._n_tokens: dict[int, int] = {}

    def _tokens_of(self, i: int) -> int:
        if i not in self._n_tokens:
            self._n_tokens[i] = self._count(" " + self._sentences[i])
        return self._n_tokens[i]

    def cut(self, rng: random.Random, n_tokens: int) -> tuple[list[str], list[int]]:
        """Sentences of n_tokens together, or slightly fewer, and how many tokens each has. A
        sentence that no longer fits is skipped; after the end of the text comes its start."""
        sentences, sizes, left, misses = [], [], n_tokens, 0
        i = rng.randrange(len(self._sentences))
        while misses < MISSES:
            i = (i + 1) % len(self._sentences)
            size = self._tokens_of(i)
            if size > left:
                misses += 1
                continue
            sentences.append(self._sentences[i])
            sizes.append(size)
            left -= size
        return sentences, sizes

    def hide(
        self, rng: random.Random, needles: list[str], depths: list[float], n_tokens: int
    ) -> tuple[str, list[float]]:
        """A text of about n_tokens with each needle at the end of the sentence that is nearest to
        its depth (0: before the first one, 1: after the last).

        Returns:
            the text, and at which share of its tokens each needle really begins.
        """
        room = n_tokens - sum(self._count(" " + needle) for needle in needles)
        sentences, sizes = self.cut(rng, room)
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + size)
        at = [
            min(range(len(ends)), key=lambda i, depth=depth: abs(ends[i] - depth * ends[-1]))
            for depth in depths
        ]
        parts: list[str] = []
        for i in range(len(ends)):
            parts += [needle for needle, place in zip(needles, at, strict=True) if place == i]
            parts += sentences[i : i + 1]
        return " ".join(parts), [ends[place] / max(1, ends[-1]) for place in at]


def generator(seed: int, *what) -> random.Random:
    """Random numbers that depend on the seed and on what they are for, and on nothing else."""
    return random.Random(f"{seed}/{'/'.join(map(str, what))}")


def depths(number: int, count: int) -> list[float]:
    """The depths of the needles of document `number`: one in each of `count` equal parts. The place
    in the part differs between documents, and is spread evenly over many (by the golden ratio)."""
    offset = number * 0.6180339887498949 % 1
    return [(i + offset) / count for i in range(count)]


NAMES = (
    "Amsterdam", "Athens", "Baghdad", "Bangkok", "Barcelona", "Beijing", "Belgrade", "Berlin",
    "Bogota", "Boston", "Brussels", "Budapest", "Cairo", "Chicago", "Copenhagen", "Dakar",
    "Dallas", "Delhi", "Denver", "Detroit", "Dublin", "Geneva", "Hamburg", "Hanoi", "Havana",
    "Helsinki", "Houston", "Istanbul", "Jakarta", "Kathmandu", "Kyoto", "Lima", "Lisbon",
    "London", "Lyon", "Madrid", "Manila", "Melbourne", "Miami", "Milan", "Montreal", "Moscow",
    "Munich", "Nairobi", "Naples", "Oslo", "Paris", "Prague", "Quito", "Rome", "Santiago",
    "Seattle", "Seoul", "Shanghai", "Singapore", "Stockholm", "Sydney", "Tokyo", "Toronto",
    "Vancouver", "Venice", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip
"""Keys of needles."""


def number(rng: random.Random) -> str:
    """A secret: six digits."""
    return str(rng.randrange(100_000, 1_000_000))
