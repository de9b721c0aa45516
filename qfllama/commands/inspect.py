"""qfllama inspect: what a GGUF is and which filters it carries."""

from __future__ import annotations

import dataclasses
import json

import click

from .. import metadata


@click.command("inspect")
@click.argument("model", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model, as_json):
    """Show the shape of the GGUF file MODEL and where its filters come from."""
    shape, filters = metadata.model_shape(model), metadata.read(model)
    if as_json:
        click.echo(
            json.dumps({"model": dataclasses.asdict(shape), "filters": _facts(filters)}, indent=2)
        )
        return
    click.echo(
        f"{shape.name}: {shape.architecture}, {shape.n_layer} layers, {shape.n_head} heads, "
        f"{shape.n_head_kv} KV heads of {shape.head_dim}, trained for "
        f"{shape.n_ctx_train:,} positions"
    )
    if filters is None:
        click.echo(f"no filters; add them with `qfllama convert {model} -o OUT.gguf`")
        return
    n_layer, n_head_kv, head_dim = filters.weight.shape
    click.echo(f"filters: {n_layer} layers x {n_head_kv} KV heads x {head_dim}")
    for name, value in filters.calibration.items():
        click.echo(f"  {name.replace('_', ' '):14} {value}")


def _facts(filters):
    """Filters as plain values for JSON, without the weights; None if there are none."""
    if filters is None:
        return None
    return {
        "version": metadata.VERSION,
        "shape": list(filters.weight.shape),
        "layers": filters.layers,
        "calibration": filters.calibration,
        "quality": {name: values.tolist() for name, values in filters.quality.items()},
    }
