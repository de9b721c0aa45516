"""Results of samples, kept in a file as they come; shares and means with confidence intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from qfllama.config import QFilterError

Z = 1.959963984540054
"""Standard deviations around the mean that hold 95 % of a normal distribution."""
RESAMPLES = 2000


class Results:
    """Records by key, in memory and, with a path, in a JSONL file whose first line has the settings.

    Raises:
        QFilterError: the file isn't one of these, or has results of other settings.
    """

    def __init__(self, path: Path | None, settings: dict, key: tuple[str, ...]):
        self._key, self._file = key, None
        self._records: dict[tuple, dict] = {}
        if path is None:
            return
        settings = json.loads(json.dumps(settings))  # lists as they come back from a file
        if path.exists() and path.stat().st_size:
            self._read(path, settings)
            self._file = path.open("a", encoding="utf-8")
        else:
            self._file = path.open("w", encoding="utf-8")
            self._write({"qfllama_eval": settings})

    def _read(self, path: Path, settings: dict) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1  # without a last line that was not finished
        try:
            first, *rest = [json.loads(line) for line in data[:whole].splitlines()]
            theirs = first["qfllama_eval"]
            self._records = {self.key(record): record for record in rest}
        except (ValueError, KeyError, TypeError):
            raise QFilterError(
                f"{path} has no results of qfllama eval: give another file"
            ) from None
        for name in settings.keys() | theirs.keys():
            if theirs.get(name) != settings.get(name):
                raise QFilterError(
                    f"{path} has results of another {name.replace('_', ' ')}"
                    f"{_values(theirs.get(name), settings.get(name))}: give another --results file"
                )
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)

    def key(self, record: dict) -> tuple:
        return tuple(record.get(name) for name in self._key)

    def __contains__(self, record: dict) -> bool:
        """Is there a result with the same key?"""
        return self.key(record) in self._records

    def get(self, record: dict) -> dict | None:
        """The result with the same key."""
        return self._records.get(self.key(record))

    def add(self, record: dict) -> None:
        self._records[self.key(record)] = record
        if self._file:
            self._write(record)

    def _write(self, value: dict) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _values(theirs, ours) -> str:
    """The two values, if they are short enough to read."""
    both = f" ({theirs}, here {ours})"
    return both if len(both) <= 60 else ""


# -- statistics


def grouped(records: list[dict], by: Callable[[dict], Hashable]) -> dict[Hashable, list[dict]]:
    """The records of each group, in the order of their first ones."""
    groups: dict[Hashable, list[dict]] = {}
    for record in records:
        groups.setdefault(by(record), []).append(record)
    return groups


def right_and_loss(records: list[dict], document: Callable[[dict], Hashable]) -> dict:
    """Count, share of `right` and means of `nll` and `cells` of answers, with confidence intervals of
    95 %; the interval of the loss comes from resampling whole documents."""
    n, n_right = len(records), sum(record["right"] for record in records)
    losses = [[record["nll"] for record in mine] for mine in grouped(records, document).values()]
    return {
        "n": n,
        "right": round(n_right / n, 4),
        "right_ci": [round(limit, 4) for limit in wilson(n_right, n)],
        "nll": round(sum(record["nll"] for record in records) / n, 4),
        "nll_ci": [round(limit, 4) for limit in bootstrap(losses)],
        "cells": round(sum(record["cells"] for record in records) / n, 1),
    }


def wilson(n_right: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval)."""
    if n == 0:
        return 0.0, 1.0
    share = n_right / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(groups: list[list[float]]) -> tuple[float, float]:
    """95 % confidence interval of the mean of all values. Whole groups are resampled, because
    questions about one document, or tokens of one text, are not independent."""
    sums = np.array([np.sum(group) for group in groups])
    sizes = np.array([len(group) for group in groups])
    drawn = _draws(len(groups))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_percentiles(groups: np.ndarray, percents: list[float]) -> np.ndarray:
    """The same for percentiles: groups [n, values of each] -> float64 [percents, 2]."""
    found = [
        np.percentile(groups[drawn].reshape(len(drawn), -1), percents, axis=1)
        for drawn in np.array_split(_draws(len(groups)), 20)  # not all copies at once
    ]
    return np.percentile(np.concatenate(found, axis=1), [2.5, 97.5], axis=1).T


def _draws(n: int) -> np.ndarray:
    """Which of n groups are drawn each time: [RESAMPLES, n]."""
    return np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
