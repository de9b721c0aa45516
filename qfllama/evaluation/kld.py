"""How far the next-token distributions of a cache are from those of llama.cpp's full f16 cache.

A text streams through the reference and through a few other caches at once, CHUNK tokens at a time,
and what each chunk gives is compared in float32. So nothing is stored: the distributions of 2,048
tokens over 150,000 words are 1.2 GB, in a file or in memory. The price is that the reference is read
again for every TOGETHER caches.

Rounding alone changes distributions, too: kernels add numbers in another order, and quantized weights
amplify that. So the reference is also compared with itself, read a few tokens at a time
(ROUNDING). A divergence of that size says nothing about a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from qfllama.config import EngineError, QFilterError
from qfllama.engine import Context, Model
from qfllama.evaluation.perplexity import BUCKET
from qfllama.evaluation.results import Results, bootstrap, bootstrap_percentiles
from qfllama.evaluation.run import FULL, TYPES, Plan, Variant
from qfllama.evaluation.scoring import divergence
from qfllama.evaluation.sizes import cache_bytes
from qfllama.progress import progress
from qfllama.tables import aligned

CHUNK = 128
"""Tokens read at a time. A context has two buffers of CHUNK logits: 156 MB with 150,000 words."""
TOGETHER = 4
"""Caches that are open beside the reference, which is read again for the next ones."""
KEY = ("task", "text", "length", "policy", "ratio", "max_length", "recall", *TYPES)
PERCENTS = {"median": 50.0, "p99": 99.0, "p99_9": 99.9}
REFERENCE = ("f16", "f16")
ROUNDING = "rounding"
"""In place of a policy: the reference, read ROUNDING_BATCH tokens at a time."""
ROUNDING_BATCH = 8
FLOOR = Variant(ROUNDING, types=REFERENCE)


def run(model: Model, pieces: list[list[int]], plan: Plan, results: Results) -> None:
    """Compare whatever has no result yet.

    Args:
        plan: all variants have types; `recall` means that rows come back at every eviction.

    Raises:
        QFilterError: a variant has too few cells, or can't recall.
    """
    for variant in plan.variants:
        plan.config(variant, len(pieces[0]), 0)
        if variant.recall and model.forgets:
            raise QFilterError(
                f"{model.path}: --recall always reads the newest tokens again, and windowed or "
                "recurrent layers can't go back to them: use --recall off"
            )
    todo = [
        (i, [variant for variant in plan.variants if _key(i, len(tokens), variant) not in results])
        for i, tokens in enumerate(pieces)
    ]
    groups = [
        (i, missing[first : first + TOGETHER])
        for i, missing in todo
        for first in range(0, len(missing), TOGETHER)
    ]
    total = sum(len(pieces[i]) * (1 + len(group)) for i, group in groups)
    with progress("reading beside full f16", total) as bar:
        for i, group in groups:
            for variant, record in _compare(model, pieces[i], plan, group, bar):
                results.add({**_key(i, len(pieces[i]), variant), **record})


def _key(i: int, length: int, variant: Variant) -> dict:
    return {"task": "kld", "text": i, "length": length, **variant.key()}


class Beside:
    """A cache that is read beside the reference, and how far it was from that."""

    def __init__(self, context: Context, recall: bool):
        self.context, self._recall = context, recall
        self._klds: list[np.ndarray] = []
        self._same: list[np.ndarray] = []

    def read(self, tokens: list[int], stop: int, reference: np.ndarray) -> None:
        """Read up to `stop`; reference: the logits of these tokens, float32 [n, n_vocab]."""
        for logits in self._outputs(tokens, stop):
            kld, same = divergence(reference[: len(logits)], logits)
            self._klds.append(kld)
            self._same.append(same)
            reference = reference[len(logits) :]

    def _outputs(self, tokens: list[int], stop: int) -> Iterator[np.ndarray]:
        """The logits of all tokens up to `stop`; with recall as `Llama` does it with
        `recall="always"`: where the cache is full, the newest tokens are read as a question."""
        context = self.context
        while self._recall and (start := context.n_past()) < stop:
            if context.used() >= context.config.max_length:
                n = min(context.config.recall_queries, start - 1)
                if not context.kv_cache_seq_rm(0, start - n, -1):
                    raise EngineError(f"the cache can't be cut back to position {start - n:,}")
                context.read_question(tokens[start - n : start])
            room = max(1, context.config.max_length - context.used())
            yield from context.outputs(tokens[start : min(stop, start + room)])
        yield from context.outputs(tokens[context.n_past() : stop])

    def record(self) -> dict:
        """Divergences of the distributions after all tokens but the last, and the positions where
        the first choices differ."""
        same = np.concatenate(self._same)[:-1]
        return {
            "kld": [float(f"{value:.5g}") for value in np.concatenate(self._klds)[:-1]],
            "other_top": np.flatnonzero(~same).tolist(),
            "evictions": self.context.stats().n_evictions,
        }


def _compare(model, tokens, plan, variants, bar) -> Iterator[tuple[Variant, dict]]:
    with ExitStack() as stack:
        reference = stack.enter_context(_open(model, plan, Variant(FULL, types=REFERENCE), tokens))
        all_beside = [
            Beside(stack.enter_context(_open(model, plan, variant, tokens)), variant.recall)
            for variant in variants
        ]
        for start in range(0, len(tokens), CHUNK):
            stop = min(start + CHUNK, len(tokens))
            (logits,) = reference.outputs(tokens[start:stop])  # overwritten by its next chunk
            for beside in all_beside:
                beside.read(tokens, stop, logits)
            bar.update((1 + len(all_beside)) * (stop - start))
        for variant, beside in zip(variants, all_beside, strict=True):
            yield variant, beside.record()


def _open(model: Model, plan: Plan, variant: Variant, tokens: list[int]) -> Context:
    """An empty cache; one that keeps everything is llama.cpp's own."""
    params = {**plan.context, **dict(zip(TYPES, variant.types, strict=True))}
    config = None
    n_batch = ROUNDING_BATCH if variant.policy == ROUNDING else CHUNK
    if not variant.whole:
        config = plan.config(variant, len(tokens), 0)
        n_batch = min(CHUNK, config.interval)
    return model.open(config, n_ctx=len(tokens), n_batch=n_batch, swa_full=False, **params)


def records(pieces: list[list[int]], plan: Plan, results: Results) -> dict[Variant, list[dict]]:
    """The results by variant, in order."""
    return {
        variant: [results.get(_key(i, len(tokens), variant)) for i, tokens in enumerate(pieces)]
        for variant in plan.variants
    }


# -- report


def rows(records: dict[Variant, list[dict]], model: Model, first: int) -> list[dict]:
    """What the results say about every variant, in plain JSON values. Only the distributions after
    tokens at position `first` and later count. Intervals come from resampling whole texts: a single
    text has none, and the maximum never has one."""
    return [_row(variant, mine, model, first) for variant, mine in records.items()]


def _row(variant: Variant, records: list[dict], model: Model, first: int) -> dict:
    length = records[0]["length"]
    all_klds = np.array([record["kld"] for record in records])
    same = np.ones_like(all_klds)
    for line, record in zip(same, records, strict=True):
        line[record["other_top"]] = 0
    klds, same = all_klds[:, first:], same[:, first:]
    row = {
        **variant.key(),
        "n_texts": len(records),
        "n": klds.size,
        "length": length,
        "first": first,
        "bytes_per_token": round(cache_bytes(model, variant, length) / length, 1),
        "kld": _short(klds.mean()),
        **dict(zip(PERCENTS, map(_short, np.percentile(klds, [*PERCENTS.values()])), strict=True)),
        "max": _short(klds.max()),
        "same_top": _short(same.mean()),
    }
    if len(records) > 1:
        row["kld_ci"] = [_short(limit) for limit in bootstrap(list(klds))]
        row["same_top_ci"] = [_short(limit) for limit in bootstrap(list(same))]
        limits = bootstrap_percentiles(klds, [*PERCENTS.values()])
        for name, pair in zip(PERCENTS, limits, strict=True):
            row[f"{name}_ci"] = [_short(limit) for limit in pair]
    row["bucket"] = BUCKET
    row["kld_by_position"] = [
        _short(all_klds[:, i : i + BUCKET].mean()) for i in range(0, all_klds.shape[1], BUCKET)
    ]
    row["kld_by_text"] = [_short(value) for value in klds.mean(axis=1)]
    return row


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def report(rows: list[dict], titles: list[str]) -> str:
    """A table for the terminal."""
    head = [
        "",
        "B/token",
        "n",
        "KLD",
        "95 %",
        "median",
        "99 %",
        "99.9 %",
        "max",
        "same top",
        "95 %",
    ]
    body = [
        [
            title,
            f"{row['bytes_per_token']:,.0f}",
            f"{row['n']:,}",
            _number(row["kld"]),
            "-".join(map(_number, row.get("kld_ci", ()))),
            *(_number(row[name]) for name in (*PERCENTS, "max")),
            f"{row['same_top']:.2%}",
            "-".join(f"{limit:.2%}" for limit in row.get("same_top_ci", ())),
        ]
        for title, row in zip(titles, rows, strict=True)
    ]
    return aligned([head, *body])


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 0.01 else f"{value:.1e}"
