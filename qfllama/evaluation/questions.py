"""Questions with short answers about long documents, asked the way people do it: the document and
the question in one message of the chat template, the answer written greedily.

The tokens are those of `qfllama chat --file`. Up to the end of the document they are read once for
all questions about it.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from qfllama.beginning import before_user
from qfllama.config import QFilterError
from qfllama.conversation import TEMPLATE, formatter, tokenize_all
from qfllama.engine import Model
from qfllama.evaluation.needle import depth_bin
from qfllama.evaluation.results import grouped, right_and_loss
from qfllama.evaluation.run import Asking, Variant, cut
from qfllama.evaluation.scoring import Mark, generate, score
from qfllama.evaluation.tasks import Document, Question, Text, read_text
from qfllama.tables import aligned

MARK = "-the question-"
"""Stands for the question where the chat template is applied."""
PLAIN = "\n\nQuestion: {}\nAnswer:"
"""What follows the document where no chat template is used."""
SHAPE = '{"document": FILE, "question": TEXT, "answers": [TEXT, ...]}'
"""What a line in a file with questions looks like."""

# -- files


@dataclass(frozen=True)
class Source:
    """A document and what is asked about it.

    name: the path, as the questions have it
    lines: objects with `question`, `answers` and perhaps `depth`
    """

    name: str
    text: str
    lines: list[dict]


def read(path: Path) -> list[Source]:
    """The documents that a JSONL file has questions about, in the order of their first one.

    Raises:
        QFilterError: a line is wrong (the message says which and why), or a document is missing.
    """
    by_name: dict[str, list[dict]] = {}
    texts: dict[str, str] = {}
    for number, line in enumerate(read_text(path).text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        value = _checked(line, where)
        name = value["document"]
        if name not in texts:
            file = path.parent / name
            if not file.is_file():
                raise QFilterError(
                    f"{where}: there is no document {file}: give its path relative to the folder "
                    f"of {path.name}"
                )
            texts[name] = read_text(file).text
        by_name.setdefault(name, []).append(value)
    return [Source(name, texts[name], lines) for name, lines in by_name.items()]


def _checked(line: str, where: str) -> dict:
    """The object of a line. QFilterError if it is no question."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise QFilterError(f"{where} is not JSON ({error}): write {SHAPE}") from None
    if not isinstance(value, dict):
        raise QFilterError(f"{where} is not an object: write {SHAPE}")
    for name in ("document", "question", "answers"):
        if name not in value:
            raise QFilterError(f'{where} has no "{name}": write {SHAPE}')
    question, answers = value["question"], value["answers"]
    for name in ("document", "question"):
        if not isinstance(value[name], str):
            raise QFilterError(f'{where}: "{name}" is not a text: write {SHAPE}')
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise QFilterError(f'{where}: "answers" is not a list of texts: write {SHAPE}')
    if not question.strip() or not answers or not all(map(plain_words, answers)):
        raise QFilterError(f"{where}: question and answers need words, and one answer at least")
    depth = value.get("depth", 0)
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
        raise QFilterError(f"{where}: the depth is {depth!r}: give a number from 0 to 1, or none")
    return value


def identity(path: Path, sources: list[Source]) -> Text:
    """All that the results depend on, as one text."""
    parts = [[source.name, source.text, source.lines] for source in sources]
    return Text(path.name, json.dumps(parts, sort_keys=True))


# -- documents


@dataclass(frozen=True, kw_only=True)
class Asked(Question):
    """A question as tokens.

    ids: from the end of the document to where the answer begins
    before, right: the question and its first answer, as tokens of one text
    """

    ids: list[int]
    before: list[int]
    right: list[int]


@dataclass(frozen=True, kw_only=True)
class Read(Document):
    """A document as tokens, with what the chat template has before it."""

    ids: list[int]

    def tokens(self, model: Model) -> list[int]:
        return self.ids


def documents(
    model: Model,
    sources: list[Source],
    *,
    plain: bool,
    max_tokens: int,
    names: tuple[str, ...] | None = None,
) -> list[Document]:
    """The documents and questions as tokens of a model; its header is enough.

    Args:
        plain: without a chat template.
        max_tokens: of an answer.
        names: of the documents that are wanted; None for all.

    Raises:
        QFilterError: there is no document of a name, the chat template is missing or can't be used,
            or a document is longer than what the model was trained for.
    """
    known = [source.name for source in sources]
    if unknown := [name for name in names or () if name not in known]:
        raise QFilterError(f"no question is about {unknown[0]}: choose from {', '.join(known)}")
    extra, trained = asking(plain, max_tokens).extra, model.shape.n_ctx_train
    ends = _plain_ends if plain else _chat_ends(model)
    result = []
    for number, source in enumerate(sources):
        if names and source.name not in names:
            continue
        document = _document(model, source, number, ends, plain)
        needed = document.length + max(extra(model, question) for question in document.questions)
        if trained and needed > trained:
            raise QFilterError(
                f"{source.name} has {document.length:,} tokens, {needed:,} with a question and its "
                f"answer, and the model was trained for {trained:,}: use a shorter document"
            )
        result.append(document)
    return result


Ends = Callable[[str], tuple[str, str]]
"""From a document: the text up to its end, and what follows, with MARK for the question."""


def _plain_ends(document: str) -> tuple[str, str]:
    return document, PLAIN.format(MARK)


def _chat_ends(model: Model) -> Ends:
    template = model.metadata().get(TEMPLATE)
    if template is None:
        raise QFilterError(
            f"{model.path} has no chat template: use --plain, which asks without one"
        )

    def ends(document: str) -> tuple[str, str]:
        message = {"role": "user", "content": f"{document}\n\n{MARK}"}
        try:
            text = formatter(model, template)(messages=[message]).prompt
        except (jinja2.TemplateError, ValueError) as error:
            raise QFilterError(
                f"the model's chat template refuses a document ({error}): use --plain"
            ) from error
        before, mark, after = text.rpartition(f"\n\n{MARK}")
        if not mark:
            raise QFilterError("the model's chat template has no place for a document: use --plain")
        return before, mark + after

    return ends


def _document(model: Model, source: Source, number: int, ends: Ends, plain: bool) -> Read:
    def tokens(text: str) -> list[int]:
        return model.tokens(text, start=True) if plain else tokenize_all(model, text)

    before, after = ends(source.text)
    wholes = [before + after.replace(MARK, line["question"].strip()) for line in source.lines]
    asked = [tokens(whole) for whole in wholes]
    # a token that reaches from the document into the question is read with the question
    ids = os.path.commonprefix([tokens(before), *asked])
    questions = []
    for line, whole, all_ids in zip(source.lines, wholes, asked, strict=True):
        answer = (" " if plain else "") + line["answers"][0]
        head, right = cut(model, all_ids, tokens(whole + answer))
        labels = {"file": source.name, "asked": line["question"]}
        labels |= {"depth": line["depth"]} if "depth" in line else {}
        questions.append(
            Asked(
                line["question"], tuple(line["answers"]), labels,
                ids=all_ids[len(ids) :], before=head[len(ids) :], right=right,
            )
        )  # fmt: skip
    message = {"role": "user", "content": source.text}
    n_first = 0 if plain else before_user(model, ids, [message])
    return Read("questions", len(ids), number, source.text, tuple(questions), n_first, ids=ids)


# -- asking


def asking(plain: bool, max_tokens: int) -> Asking:
    """Asks for answers of at most max_tokens; with `plain` only their first line counts."""

    def line_ends(text: str) -> bool:
        return "\n" in text.lstrip()

    def ask(mark: Mark, question: Asked) -> dict:
        likelihood = score(mark.context, question.before, question.right)
        mark.back()
        wrote = generate(mark.context, question.ids, max_tokens, line_ends if plain else None)
        wrote = wrote.strip().split("\n")[0] if plain else wrote.strip()
        return {
            "right": found(wrote, question.answers),
            "nll": round(likelihood.nll, 5),
            "n_tokens": likelihood.n_tokens,
            "wrote": wrote,
        }

    def extra(model: Model, question: Asked) -> int:
        return max(
            len(question.ids) + max_tokens,
            len(question.before) + len(question.right),
        )

    return Asking(ask, extra)


NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""A letter of a script that puts no space between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese."""


def found(text: str, answers: tuple[str, ...]) -> bool:
    """Does a text contain one of the answers, as whole words? Anywhere, in scripts without spaces."""
    words = f" {plain_words(text)} "
    return any(
        (plain if NO_SPACES.search(plain) else f" {plain} ") in words
        for plain in map(plain_words, answers)
    )


def plain_words(text: str) -> str:
    """Small letters and numbers with one space between them: `The £1,200` is `the 1200`. A point or
    colon within a number stays, and a unit that follows a number is a word of its own."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(
        r"(?<!\d)\d{1,3}(?:[,'’ \u2009\u202f]\d{3})+(?!\d)",
        lambda number: re.sub(r"\D", "", number[0]),
        text,
    )
    text = re.sub(r"(?<!\d)[.:]|[.:](?!\d)|[^\w.:]|_", " ", text)
    return " ".join(re.sub(r"(?<=\d)(?=[^\W\d])", " ", text).split())


# -- report


def rows(records: dict[Variant, list[dict]]) -> list[dict]:
    """What the results say about every variant, in plain JSON values."""
    return [
        {
            **variant.key(),
            **summary(mine),
            "by_document": summaries(mine, lambda record: record["file"]),
            "by_depth": dict(
                sorted(summaries([r for r in mine if "depth" in r], depth_bin).items())
            ),
        }
        for variant, mine in records.items()
    ]


def summaries(records: list[dict], by: Callable[[dict], str | float]) -> dict:
    """A summary of each group, in the order of their first records."""
    return {value: summary(mine) for value, mine in grouped(records, by).items()}


def summary(records: list[dict]) -> dict:
    """Counts, shares and means of results, with confidence intervals of 95 %."""
    n_right = sum(record["right"] for record in records)
    return {**right_and_loss(records, lambda record: record["file"]), "n_right": n_right}


def report(rows: list[dict], titles: list[str]) -> str:
    """A table for the terminal."""
    head = ["", "cells", "right/asked", "right", "95 %", "nll", "95 %"]
    body = [
        [
            title,
            f"{row['cells']:,.0f}",
            f"{row['n_right']:,}/{row['n']:,}",
            f"{row['right']:.1%}",
            "{:.1%}-{:.1%}".format(*row["right_ci"]),
            f"{row['nll']:.3f}",
            "{:.3f}-{:.3f}".format(*row["nll_ci"]),
        ]
        for title, row in zip(titles, rows, strict=True)
    ]
    return aligned([head, *body])
