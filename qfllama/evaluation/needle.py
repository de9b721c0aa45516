"""Needle in a haystack: secret numbers in a long text, each asked for on its own."""

from __future__ import annotations

from collections.abc import Callable

from qfllama.config import QFilterError
from qfllama.evaluation import results
from qfllama.evaluation.results import right_and_loss
from qfllama.evaluation.run import Variant
from qfllama.evaluation.tasks import (
    NAMES,
    Document,
    Haystack,
    Question,
    depths,
    generator,
    number,
)
from qfllama.tables import aligned

NEEDLE = "The secret number of {} is {}."
QUESTION = "\n\nWhat is the secret number of {0}? The secret number of {0} is"


def documents(
    haystack: Haystack, lengths: list[int], count: int, needles: int, seed: int
) -> list[Document]:
    """`count` documents of every length with `needles` needles in each.

    Raises:
        QFilterError: more needles than there are names.
    """
    if needles > len(NAMES):
        raise QFilterError(f"{needles} needles: use --needles-per-document <= {len(NAMES)}")
    return [
        document(haystack, length, i, needles, seed) for length in lengths for i in range(count)
    ]


def document(haystack: Haystack, length: int, which: int, needles: int, seed: int) -> Document:
    """One document of about `length` tokens."""
    rng = generator(seed, "needle", length, which)
    names = rng.sample(NAMES, needles)
    numbers = [number(rng) for _ in names]
    hidden = [NEEDLE.format(*pair) for pair in zip(names, numbers, strict=True)]
    text, places = haystack.hide(rng, hidden, depths(which, needles), length)
    questions = tuple(
        Question(QUESTION.format(name), (secret,), {"depth": round(place, 4)})
        for name, secret, place in zip(names, numbers, places, strict=True)
    )
    return Document("needle", length, which, text, questions)


# -- report

BINS = 10
"""Parts of the depth, from the start of the document to its end."""


def rows(records: dict[Variant, list[dict]]) -> list[dict]:
    """What the results say about every variant, in plain JSON values."""
    return [
        {
            **variant.key(),
            **summary(mine),
            "by_length": grouped(mine, lambda record: record["length"]),
            "by_depth": grouped(mine, depth_bin),
            "by_length_and_depth": {
                length: grouped([r for r in mine if r["length"] == length], depth_bin)
                for length in sorted({record["length"] for record in mine})
            },
        }
        for variant, mine in records.items()
    ]


def depth_bin(record: dict) -> float:
    """The lower end of the part of the document that the needle is in."""
    return min(BINS - 1, int(record["depth"] * BINS)) / BINS


def grouped(records: list[dict], by: Callable[[dict], float]) -> dict[float, dict]:
    """A summary of each group, in ascending order."""
    return {value: summary(mine) for value, mine in sorted(results.grouped(records, by).items())}


def summary(records: list[dict]) -> dict:
    """Counts, shares and means of results, with confidence intervals of 95 %."""
    digits = sum(record["n_right"] for record in records)
    return {
        **right_and_loss(records, lambda record: (record["length"], record["document"])),
        "digits": round(digits / sum(record["n_tokens"] for record in records), 4),
    }


def report(rows: list[dict], titles: list[str]) -> str:
    """A table for the terminal."""
    head = ["", "cells", "n", "right", "95 %", "digits", "nll", "95 %"]
    body = [
        [
            title,
            f"{row['cells']:,.0f}",
            f"{row['n']:,}",
            f"{row['right']:.1%}",
            "{:.1%}-{:.1%}".format(*row["right_ci"]),
            f"{row['digits']:.1%}",
            f"{row['nll']:.3f}",
            "{:.3f}-{:.3f}".format(*row["nll_ci"]),
        ]
        for title, row in zip(titles, rows, strict=True)
    ]
    return aligned([head, *body]) + "\n\n" + _by_depth(rows, titles)


def _by_depth(rows: list[dict], titles: list[str]) -> str:
    """Share of the needles found, by where they were."""
    parts = sorted({part for row in rows for part in row["by_depth"]})
    head = ["right by depth", *(f"{part:.0%}-" for part in parts)]
    body = [
        [title, *(_percent(row["by_depth"].get(part)) for part in parts)]
        for title, row in zip(titles, rows, strict=True)
    ]
    return aligned([head, *body])


def _percent(cell: dict | None) -> str:
    return "" if cell is None else f"{cell['right']:.0%}"
