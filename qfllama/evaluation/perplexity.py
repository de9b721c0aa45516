"""Perplexity of texts that stream through a bounded cache, by position."""

from __future__ import annotations

import math

import numpy as np

from qfllama.config import QFilterError
from qfllama.engine import Context, Model
from qfllama.evaluation.results import Results, bootstrap
from qfllama.evaluation.run import Plan, Variant, forks
from qfllama.evaluation.scoring import nll
from qfllama.evaluation.tasks import Text
from qfllama.progress import progress
from qfllama.tables import aligned

BUCKET = 128
"""Positions whose losses are kept as one sum."""
KEY = ("text", "length", "policy", "ratio", "max_length")


def texts(model: Model, text: Text, count: int, length: int) -> list[list[int]]:
    """`count` pieces of `length` tokens each, from the start of the text, without overlap.

    Raises:
        QFilterError: the text is too short.
    """
    start, size = model.tokens("", start=True), length - len(model.tokens("", start=True))
    tokens: list[int] = []
    lines = text.text.splitlines(keepends=True)
    # stop early in a long text; 100 lines at once: tokens across lines are rare
    for i in range(0, len(lines), 100):
        tokens += model.tokens("".join(lines[i : i + 100]))
        if len(tokens) >= count * size:
            break
    if len(tokens) < count * size:
        raise QFilterError(
            f"{text.name} has {len(tokens):,} tokens, {count} texts of {length:,} take "
            f"{count * length:,}: use fewer or shorter ones, or a longer --text"
        )
    return [start + tokens[i * size : (i + 1) * size] for i in range(count)]


class Losses:
    """Negative log likelihood of every token of a text but the first, in the order of reading."""

    def __init__(self, tokens: list[int], bar):
        self._tokens, self._bar = tokens, bar
        self.nll = np.zeros(len(tokens))

    def read(self, context: Context, part: list[int]) -> None:
        """Read tokens; the last token of a text has no next one to predict."""
        end = context.n_past()
        for logits in context.outputs(part):
            n = len(logits)
            end += n
            targets = self._tokens[end - n + 1 : end + 1]
            self.nll[end - n + 1 : end + 1] = nll(logits[: len(targets)], targets)
            self._bar.update(n)

    def buckets(self) -> list[float]:
        """Sums over BUCKET positions each."""
        starts = range(0, len(self.nll), BUCKET)
        return [round(float(self.nll[i : i + BUCKET].sum()), 4) for i in starts]


def run(model: Model, pieces: list[list[int]], plan: Plan, results: Results) -> None:
    """Read whatever has no result yet.

    Raises:
        QFilterError: a variant has too few cells.
    """
    for variant in plan.variants:
        plan.config(variant, len(pieces[0]), 0)
    todo = {i: _missing(i, len(tokens), plan, results) for i, tokens in enumerate(pieces)}
    total = sum(_cost(plan, len(pieces[i]), missing) for i, missing in todo.items())
    with progress("reading", total) as bar:
        for i, missing in todo.items():
            if missing:
                _run_text(model, i, pieces[i], plan, missing, results, bar)


def _missing(i: int, length: int, plan: Plan, results: Results) -> list[Variant]:
    return [variant for variant in plan.variants if _key(i, length, variant) not in results]


def _key(i: int, length: int, variant: Variant) -> dict:
    return {"text": i, "length": length, **variant.key()}


def _cost(plan: Plan, length: int, missing: list[Variant]) -> int:
    """Tokens to be read."""
    shared = [plan.shared(variant, length) for variant in missing]
    return max(shared, default=0) + sum(length - stop for stop in shared)


def _run_text(model, i, tokens, plan, missing, results, bar) -> None:
    together = Losses(tokens, bar)
    for variant, context in forks(model, plan, tokens, missing, 0, together.read):
        own = Losses(tokens, bar)
        n_past = context.n_past()
        own.nll[: n_past + 1] = together.nll[: n_past + 1]
        own.read(context, tokens[n_past:])
        results.add(
            {
                **_key(i, len(tokens), variant),
                "n_tokens": len(tokens) - 1,
                "nll": round(float(own.nll.sum()) / (len(tokens) - 1), 6),
                "evictions": context.stats().n_evictions,
                "buckets": own.buckets(),
            }
        )


def records(pieces: list[list[int]], plan: Plan, results: Results) -> dict[Variant, list[dict]]:
    """The results by variant, in order."""
    return {
        variant: [results.get(_key(i, len(tokens), variant)) for i, tokens in enumerate(pieces)]
        for variant in plan.variants
    }


# -- report


def rows(records: dict[Variant, list[dict]]) -> list[dict]:
    """What the results say about every variant, in plain JSON values. If the full cache was
    measured too, `above_full` is the mean loss above it on the same texts. Its interval is much
    smaller than those of the losses: a hard text is hard for all variants."""
    full = next((mine for variant, mine in records.items() if variant.policy == "full"), None)
    return [_row(variant, mine, full) for variant, mine in records.items()]


def _row(variant: Variant, records: list[dict], full: list[dict] | None) -> dict:
    losses = [record["nll"] for record in records]
    low, high = bootstrap([[loss] for loss in losses])
    mean = sum(losses) / len(losses)
    row = {
        **variant.key(),
        "n": len(records),
        "length": records[0]["length"],
        "ppl": round(math.exp(mean), 4),
        "ppl_ci": [round(math.exp(low), 4), round(math.exp(high), 4)],
        "nll": round(mean, 5),
        "nll_ci": [round(low, 5), round(high, 5)],
        "bucket": BUCKET,
        "ppl_by_position": _by_position(records),
        "nll_by_text": losses,
    }
    if full is not None:
        above = [loss - record["nll"] for loss, record in zip(losses, full, strict=True)]
        limits = bootstrap([[difference] for difference in above])
        row["above_full"] = round(sum(above) / len(above), 5)
        row["above_full_ci"] = [round(limit, 5) for limit in limits]
    return row


def _by_position(records: list[dict]) -> list[float]:
    """Perplexity of every BUCKET positions, over all texts."""
    sums = np.sum([record["buckets"] for record in records], axis=0)
    length = records[0]["length"]
    counts = np.array([min(BUCKET, length - i) for i in range(0, length, BUCKET)])
    counts[0] -= 1  # nothing predicts the first token
    means = sums / np.maximum(counts, 1) / len(records)
    return [round(float(value), 4) for value in np.exp(means)]


def report(rows: list[dict], titles: list[str]) -> str:
    """A table for the terminal."""
    with_full = "above_full" in rows[0]
    head = ["", "texts", "ppl", "95 %", "nll"] + ["above full", "95 %"] * with_full
    body = []
    for title, row in zip(titles, rows, strict=True):
        cells = [
            title,
            f"{row['n']:,}",
            f"{row['ppl']:.2f}",
            "{:.2f}-{:.2f}".format(*row["ppl_ci"]),
            f"{row['nll']:.4f}",
        ]
        if with_full:
            cells += [f"{row['above_full']:+.4f}", "{:.4f}-{:.4f}".format(*row["above_full_ci"])]
        body.append(cells)
    return aligned([head, *body])
