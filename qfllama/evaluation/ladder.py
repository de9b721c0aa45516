"""One table over bytes: llama.cpp's full caches and ours, with what each of them loses. It joins `kld`,
`needle`, the bytes that a cache takes by calculation and, where asked for, the speed of decoding."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from qfllama.bench.measure import Engines
from qfllama.bench.plan import BASELINE, Kind
from qfllama.bench.plan import Plan as BenchPlan
from qfllama.config import QFilterConfig
from qfllama.engine import Model
from qfllama.evaluation import kld, needle
from qfllama.evaluation import run as asking
from qfllama.evaluation.results import Results
from qfllama.evaluation.run import FULL, TYPES, Plan, Variant
from qfllama.evaluation.sizes import cache_bytes
from qfllama.evaluation.tasks import Document
from qfllama.progress import progress
from qfllama.tables import aligned

KEY = tuple(dict.fromkeys((*kld.KEY, *asking.KEY)))
CONTEXTS = (8192, 32768)
"""Tokens of context whose bytes are in the table."""
MIB = 1 << 20


def caches(
    policy: str, ratios: list[float], types: list[str], stock_types: list[str]
) -> tuple[Variant, ...]:
    """Rounding alone, then llama.cpp's own caches, then ours; K and V are of the same type."""
    stock = [kld.FLOOR] + [Variant(FULL, types=(name, name)) for name in stock_types]
    ours = [Variant(policy, ratio, types=(name, name)) for name in types for ratio in ratios]
    return tuple(stock + ours)


def run(
    model: Model,
    pieces: list[list[int]],
    documents: list[Document],
    plan: Plan,
    recalls: list[bool],
    results: Results,
) -> list[dict]:
    """Measure whatever has no result yet; a row for every variant of the plan, see `row`.

    Args:
        pieces: texts for the divergence; documents: with needles.
        recalls: False: ask for needles without recall; True: with recall.

    Raises:
        QFilterError: a variant has too few cells.
    """
    asked = {
        variant: [
            replace(variant, recall=recall) for recall in ([False] if variant.whole else recalls)
        ]
        for variant in plan.variants
        if variant != kld.FLOOR
    }
    for pair in dict.fromkeys(variant.types for variant in plan.variants):
        of_type = tuple(v for all_v in asked.values() for v in all_v if v.types == pair)
        context = {**plan.context, **dict(zip(TYPES, pair, strict=True))}
        asking.run(model, documents, replace(plan, variants=of_type, context=context), results)
    kld.run(model, pieces, plan, results)
    found = kld.rows(kld.records(pieces, plan, results), model, len(pieces[0]) // 2)
    rows = []
    for variant, divergence in zip(plan.variants, found, strict=True):
        needles = {
            "on" if v.recall else "off": needle.summary(asking.answers(documents, v, results))
            for v in asked.get(variant, ())
        }
        rows.append(row(model, variant, divergence, needles))
    return rows


def row(model: Model, variant: Variant, divergence: dict, needles: dict[str, dict]) -> dict:
    """What is known about a cache, in plain JSON values.

    Args:
        divergence: its row of `kld.rows`; needles: `needle.summary` by "off" and "on" (recall).
    """
    sizes = {n: cache_bytes(model, variant, n) for n in CONTEXTS}
    every = Variant(FULL, types=variant.types)  # the archive also has what the cells have
    archives = {n: 0 if variant.whole else cache_bytes(model, every, n) for n in CONTEXTS}
    return {
        **variant.key(),
        "bytes": sizes,
        "archive_bytes": archives,
        "bytes_per_token": round(sizes[CONTEXTS[-1]] / CONTEXTS[-1], 1),
        "kld": divergence,
        "needles": needles,
    }


def kind(variant: Variant, position: int) -> Kind:
    """The cache of `qfllama bench` that is the same as a variant at a position.

    Raises:
        QFilterError: it is too small for the default window and interval.
    """
    if variant.whole:
        return Kind(variant.types[0])
    QFilterConfig(max_length=variant.cells(position))
    return Kind(variant.types[0], variant.cells(position))


def add_speeds(rows: list[dict], kinds: list[Kind], path, **plan) -> None:
    """Decoded tokens per second, measured as `qfllama bench` does it: all caches are open at once
    and take turns.

    Args:
        kinds: of each row; plan: fields of `bench.plan.Plan`.
    """
    every = tuple(dict.fromkeys((BASELINE, *kinds)))
    plan = BenchPlan(every, prompts=(), **plan)
    with progress("measuring speed", plan.work) as bar, closing(Engines(plan, path)) as engines:
        engines.open()
        speeds = {line["engine"]: line for line in engines.measure(bar.update)["decode"]}
    for row, its_kind in zip(rows, kinds, strict=True):
        row["tokens_per_second"] = round(speeds[its_kind.name]["tokens_per_second"], 2)


def report(rows: list[dict], titles: list[str]) -> str:
    """A table for the terminal."""
    recalls = list(dict.fromkeys(word for row in rows for word in row["needles"]))
    speed = "tokens_per_second" in rows[0]
    head = [
        "",
        "B/token",
        *(f"MiB at {n // 1024}k" for n in CONTEXTS),
        "archive",
        "KLD",
        "same top",
    ]
    head += ["found" if word == "off" else "with recall" for word in recalls]
    body = [
        [
            title,
            f"{row['bytes_per_token']:,.0f}",
            *(f"{n_bytes / MIB:,.1f}" for n_bytes in row["bytes"].values()),
            f"{row['archive_bytes'][CONTEXTS[-1]] / MIB:,.1f}",
            f"{row['kld']['kld']:.2g}",
            f"{row['kld']['same_top']:.1%}",
            *(_share(row["needles"].get(word)) for word in recalls),
            *([f"{row['tokens_per_second']:,.1f}"] if speed else []),
        ]
        for title, row in zip(titles, rows, strict=True)
    ]
    return aligned([head + ["tok/s"] * speed, *body])


def _share(summary: dict | None) -> str:
    return "" if summary is None else f"{summary['right']:.0%} ({summary['digits']:.0%} of digits)"
