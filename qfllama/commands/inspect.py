"""qfllama inspect: what a GGUF is, which filters it carries and how well they fit."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import click

from .. import figures, gguf_header, schema
from ..config import QFilterError
from ..files import check_target, plain
from ..filters import span
from ..fingerprint import fingerprint
from ..fit import fit, other_figures, table
from ..shape import model_shape
from ..terminal import escaped
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
    shape, filters = model_shape(files[0]), schema.read(files[0], compare=False)
    if image:
        _plot(image, files, shape, filters)
    if as_json:
        _print(json.dumps(plain(_facts(files, shape, filters)), indent=2, allow_nan=False))
    else:
        _print("\n".join(_lines(files, shape, filters, heads)))
    if image:
        click.echo(f"drawn: {escaped(image)}", err=True)


def _plot(image, files, shape, filters):
    check_target(files[0], image, force=True, whole=True)
    if filters is None:
        raise QFilterError(f"{files[0]} has no filters to plot; add them with `qfllama convert`")
    figures.plot(image, filters, shape.name)


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
        yield _without_filters(files[0])
        return
    yield f"filters: {filters.size}"
    if moments := filters.vectors.get("moments"):
        n_head = span(map(len, moments.values()))
        size = sum(rows.nbytes for rows in moments.values()) / 2**20
        yield f"second moments: rank {filters.rank} for {n_head} query heads, {size:.1f} MiB"
    if "queries" in filters.vectors:
        yield "mean queries before RoPE: qblend and qahead turn them to the positions to come"
    else:
        yield "no mean queries before RoPE: qblend uses the filters, qahead can't be used"
    if learned := filters.vectors.get("learned"):
        size = sum(rows.nbytes for rows in learned.values()) / 2**20
        yield f"learned filters: {size:.1f} MiB"
    if filters.policy:
        yield f"policy that was best in a test: {filters.policy}"
    if filters.layout:
        yield f"layout of the rotary pairs: {filters.layout}"
        yield f"a reader must know: {', '.join(filters.requires) or 'nothing more'}"
        yield f"fingerprint of the tensors: {escaped(filters.fingerprint)}"
    if _of_these_tensors(files, filters) is False:
        yield (
            "warning: the filters were made for other weights and will be refused: run "
            f"`qfllama convert {escaped(files[0], 4096)} -o OUT.gguf --force`"
        )
    for name, value in filters.calibration.items():
        yield f"  {escaped(name.replace('_', ' '), 40):14} {escaped(value)}"
    yield from other_figures(filters)
    if quality := table(filters, heads=heads):
        yield from ("", quality, "")
    graded = fit(filters)
    if graded.n_better is not None:
        yield f"better than minus the key norm in {graded.n_better} of {graded.n_measured} layers"
    yield graded.summary


def _without_filters(file):
    """The line for a model without filters: what to do, or why there can be none."""
    from ..engine import Model

    try:
        Model.check_supported(file)
    except QFilterError as error:
        return f"no filters, and there can be none: {escaped(error, None)}"
    return f"no filters; add them with `qfllama convert {escaped(file, 4096)} -o OUT.gguf`"


def _heads(count):
    """One number, or the least and largest where layers differ."""
    return span(count if isinstance(count, list) else [count])


def _of_these_tensors(files, filters):
    """Whether the filters were made for the tensors of the file; None if they don't say."""
    known = filters.fingerprint is not None
    return filters.fingerprint == fingerprint(files[0]) if known else None


def _quality(filters, name):
    """A quality figure, split by layer if it has one number per KV head."""
    by_layer = filters.figures(name)
    if by_layer is None or [len(values) for values in by_layer] != filters.n_head_kv:
        return filters.quality[name]
    return by_layer


def _facts(files, shape, filters):
    """All that is known, for JSON; the weights are too many."""
    facts = {"files": [str(file) for file in files], "model": dataclasses.asdict(shape)}
    if filters is None:
        return facts | {"filters": None}
    graded = fit(filters)
    return facts | {
        "filters": {
            "version": filters.version,
            "requires": filters.requires,
            "layout": filters.layout,
            "fingerprint": filters.fingerprint,
            "of_these_tensors": _of_these_tensors(files, filters),
            "rank": filters.rank,
            "queries": "queries" in filters.vectors,
            "learned": "learned" in filters.vectors,
            "policy": filters.policy,
            "layers": filters.layers,
            "head_count_kv": filters.n_head_kv,
            "head_dim": filters.head_dim,
            "calibration": filters.calibration,
            "quality": {name: _quality(filters, name) for name in filters.quality},
            "fit": {
                "verdict": graded.verdict,
                "summary": graded.summary,
                "weak_layers": graded.weak,
                "measured_layers": graded.n_measured,
                "layers_better_than_knorm": graded.n_better,
                "spearman": graded.spearman,
            },
        }
    }


def _print(text):
    """Print to stdout, where a reader may stop before the end (`| head`)."""
    try:
        click.echo(text)
    except BrokenPipeError:
        # what is still buffered would raise again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
