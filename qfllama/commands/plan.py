"""`qfllama plan`: what a model takes, how many cells fit, and the command line for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from qfllama.commands.console import note
from qfllama.commands.options import Size, option
from qfllama.terminal import escaped

if TYPE_CHECKING:
    from qfllama.plan import Plan


@click.command()
@click.argument("model", type=click.Path())
@click.option(
    "--memory",
    type=Size(),
    help="What weights, cache and buffers may take together, say 8GiB.  [default: what is free on "
    "the GPU, else half of this machine's free memory]",
)
@option("n-ctx")
@option(
    "max-length", help="Count the conversations that fit with this many cells.  [default: 4096]"
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Count the cells for this many conversations at the same time.",
)
@option("type-k")
@option("type-v")
@option("n-gpu-layers")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(model, memory, n_ctx, max_length, slots, type_k, type_v, n_gpu_layers, as_json):
    """Say how much memory the GGUF file MODEL takes, and how long its cache can be.

    Only the header is read, so this works for a model that is too large for this machine. Exit code
    1: nothing fits."""
    from qfllama.plan import make_plan, why_nothing_fits
    from qfllama.shape import beyond_training

    plan = make_plan(
        model, n_slots=slots, n_ctx=n_ctx, max_length=max_length, memory=memory,
        type_k=type_k, type_v=type_v, n_gpu_layers=n_gpu_layers,
    )  # fmt: skip
    if as_json:
        from qfllama.files import plain

        click.echo(json.dumps(plain(figures(plan)), indent=2, allow_nan=False))
    else:
        for name, text in lines(plan, figures(plan)):
            click.echo(f"{name:15}{escaped(text, None)}")
    if why := beyond_training(n_ctx, plan.sizes.shape.n_ctx_train):
        note(f"note: {why}")
    if plan.max_length:
        return 0
    click.echo(f"qfllama: {escaped(why_nothing_fits(plan), None)}", err=True)
    return 1


def figures(plan: Plan) -> dict:
    """The plan for JSON; sizes in bytes, None for what is not known."""
    from qfllama.context import CACHE_TYPES
    from qfllama.layers import EVICTS, PAD

    sizes, names = plan.sizes, {number: name for name, number in CACHE_TYPES.items()}
    rows, n_cells = sizes.layers.rows, plan.max_length or min(PAD, sizes.n_ctx)
    return {
        "model": sizes.shape.name,
        "architecture": sizes.shape.architecture,
        "file": sizes.path,
        "filters": plan.has_filters,
        "n_ctx": sizes.n_ctx,
        "type_k": names[sizes.type_k],
        "type_v": names[sizes.type_v],
        "weights_bytes": sizes.all_weights,
        "layers": len(rows),
        "evicting_layers": sum(row.kind == EVICTS for row in rows),
        "cell_bytes": sizes.cell_bytes,
        "fixed_bytes": None if sizes.layers.recurrent else sizes.fixed_bytes(n_cells),
        "buffer_bytes_estimated": sizes.buffers + sizes.working_bytes(n_cells),
        "memory": plan.place.name,
        "memory_free_bytes": plan.place.free,
        "memory_bytes": plan.place.n_bytes,
        "n_gpu_layers": plan.n_gpu_layers,
        "n_gpu_layers_of": len(sizes.weights),
        "conversations": plan.n_slots,
        "max_length": plan.max_length,
        "whole": plan.whole,
        "kv_bytes": plan.n_slots * sum(sizes.kv_bytes(plan.max_length)) if plan.max_length else 0,
        "archive_bytes": plan.archive_bytes,
        "slots": plan.slots,
        "slots_max_length": plan.asked,
        "command": plan.command,
    }


def lines(plan: Plan, known: dict) -> Iterator[tuple[str, str]]:
    """(what, how much) for people."""
    from qfllama.plan import size, why_nothing_fits

    yield "model", f"{known['model']} ({known['architecture']})"
    yield "weights", size(known["weights_bytes"])
    yield (
        "one cell",
        f"{size(known['cell_bytes'])}: K {known['type_k']} and V {known['type_v']} of one token in "
        f"{known['evicting_layers']} of {known['layers']} layers",
    )
    if known["fixed_bytes"] is None:
        yield "fixed caches", "not known: this model has recurrent layers, their states come on top"
    else:
        fixed = known["fixed_bytes"]
        yield (
            "fixed caches",
            f"{size(fixed)} per conversation: windowed layers" if fixed else "none",
        )
    yield "buffers", f"{size(known['buffer_bytes_estimated'])}, an estimate"
    yield "memory", _memory(plan, known)
    if plan.max_length == 0:
        yield "max_length", why_nothing_fits(plan)
    else:
        yield "max_length", _length(plan, known)
    archive = (
        f"{size(known['archive_bytes'])} of the machine's memory besides, for all "
        f"{plan.n_slots * known['n_ctx']:,} tokens"
    )
    yield "archive", archive + (": not needed here" if plan.whole else "; less: --archive-limit")
    yield (
        "conversations",
        f"{plan.slots:,} at the same time with max_length {plan.asked:,}"
        if plan.slots
        else f"none with max_length {plan.asked:,}",
    )
    if plan.command:
        yield "run", plan.command
        if not plan.has_filters:
            yield "", "(no filters in the file: `qfllama convert` makes them, then drop --policy)"


def _memory(plan: Plan, known: dict) -> str:
    from qfllama.plan import size

    text = f"{plan.place.name}: {size(plan.place.n_bytes)}"
    if plan.place.free != plan.place.n_bytes:
        text += f" of {size(plan.place.free)} that are free"
    if plan.n_gpu_layers is not None:
        text += f"; {plan.n_gpu_layers} of {known['n_gpu_layers_of']} layers on the GPU"
    return text


def _length(plan: Plan, known: dict) -> str:
    from qfllama.plan import size

    text = f"{plan.max_length:,} cells ({size(known['kv_bytes'])})"
    if plan.n_slots > 1:
        text = f"{plan.max_length:,} cells for each of {plan.n_slots} ({size(known['kv_bytes'])})"
    if plan.whole:
        return f"{text}: every token of n_ctx has a cell, nothing is evicted"
    return f"{text} of n_ctx {known['n_ctx']:,}"
