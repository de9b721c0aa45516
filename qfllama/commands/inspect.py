"""qfllama inspect: what a GGUF is, which filters it carries and how well they fit."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import click

from .. import gguf_header, metadata, report
from ..config import QFilterError
from ..gguf_header import escaped
from .options import option


@click.command("inspect")
@click.argument("model", type=click.Path())
@click.option("--heads", is_flag=True, help="A line for every KV head, not one per layer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: all but the weights.")
@option("plot", help="Draw the fit of every layer and KV head (.png, .svg or .pdf).")
def command(model, heads, as_json, image):
    """Show the shape of the GGUF file MODEL, how well its filters fit and where they come from.

    MODEL may be any part of a split GGUF (NAME-00001-of-00003.gguf)."""
    files = gguf_header.parts(model)
    shape, filters = metadata.model_shape(files[0]), metadata.read(files[0])
    if image:
        _plot(image, files, shape, filters)
    if as_json:
        _print(json.dumps(report.plain(_facts(files, shape, filters)), indent=2, allow_nan=False))
    else:
        _print("\n".join(_lines(files, shape, filters, heads)))
    if image:
        click.echo(f"drawn: {escaped(image)}", err=True)


def _plot(image, files, shape, filters):
    metadata.check_target(files[0], image, force=True, whole=True)
    if filters is None:
        raise QFilterError(f"{files[0]} has no filters to plot; add them with `qfllama convert`")
    report.plot(image, filters, shape.name)


def _lines(files, shape, filters, heads):
    """What is shown, line by line."""
    yield escaped(
        f"{shape.name}: {shape.architecture}, {shape.n_layer} layers, {_heads(shape.n_head)} heads,"
        f" {_heads(shape.n_head_kv)} KV heads of {shape.head_dim}, trained for "
        f"{shape.n_ctx_train:,} positions"
    )
    if len(files) > 1:
        size = sum(file.stat().st_size for file in files)
        yield f"split into {len(files)} files, {size / 2**30:,.2f} GiB in all"
    if filters is None:
        src = escaped(files[0], 4096)
        yield f"no filters; add them with `qfllama convert {src} -o OUT.gguf`"
        return
    n_layer, n_head_kv, head_dim = filters.weight.shape
    yield f"filters: {n_layer} layers x {n_head_kv} KV heads x {head_dim}"
    if filters.moments is not None:
        n_head, rank = filters.moments.shape[1], filters.rank
        size = filters.moments.nbytes / 2**20
        yield f"second order: rank {rank} for {n_head} query heads, {size:.1f} MiB"
    if filters.queries is not None:
        yield "mean queries before RoPE: qblend and qahead turn them to the positions to come"
    else:
        yield "no mean queries before RoPE: qblend uses the filters, qahead can't be used"
    for name, value in filters.calibration.items():
        yield f"  {escaped(name.replace('_', ' '), 40):14} {escaped(value)}"
    yield from report.other_figures(filters)
    if figures := report.table(filters, heads=heads):
        yield from ("", figures, "")
    fit = report.fit(filters)
    if fit.n_better is not None:
        yield f"better than minus the key norm in {fit.n_better} of {fit.n_measured} layers"
    yield fit.summary


def _heads(count):
    """One number, or the least and largest where layers differ."""
    return f"{min(count)} to {max(count)}" if isinstance(count, list) else str(count)


def _facts(files, shape, filters):
    """All that is known, for JSON; the weights are too many."""
    facts = {"files": [str(file) for file in files], "model": dataclasses.asdict(shape)}
    if filters is None:
        return facts | {"filters": None}
    fit = report.fit(filters)
    return facts | {
        "filters": {
            "version": filters.version,
            "shape": list(filters.weight.shape),
            "rank": filters.rank,
            "queries": filters.queries is not None,
            "layers": filters.layers,
            "calibration": filters.calibration,
            "quality": filters.quality,
            "fit": {
                "verdict": fit.verdict,
                "summary": fit.summary,
                "weak_layers": fit.weak,
                "measured_layers": fit.n_measured,
                "layers_better_than_knorm": fit.n_better,
                "spearman": fit.spearman,
            },
        }
    }


def _print(text):
    """To stdout, whoever reads it may stop before the end (`| head`)."""
    try:
        click.echo(text)
    except BrokenPipeError:
        # what is still buffered would raise again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
