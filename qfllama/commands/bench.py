"""`qfllama bench`: what a bounded cache gains on this machine, beside the caches of llama.cpp."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import click

from qfllama.commands.console import dies_of_ctrl_c, note_offload
from qfllama.commands.options import CommaList, model_argument, option
from qfllama.config import MAX_LENGTH, QFilterConfig


def check_outputs(model: Path, json_file: Path | None, image: Path | None) -> None:
    """Check that the output files can be written, before anything is measured."""
    from qfllama.figures import figure_class
    from qfllama.files import check_target

    if json_file is not None and str(json_file) != "-":
        check_target(model, json_file, force=True, whole=True)
    if image is not None:
        figure_class(image)
        check_target(model, image, force=True, whole=True)


@click.command("bench")
@model_argument
@click.option(
    "--quick", is_flag=True, help="A short run: stock f16 and 512 f16, up to position 2,048."
)
@click.option(
    "--positions",
    type=CommaList(int, least=1, none=True),
    help="Where decoding is measured, or none.  [default: 512,1024,... to 32768]",
)
@click.option(
    "--prompts",
    type=CommaList(int, least=1, none=True),
    help="Prompt lengths for the time to the first token, or none.  [default: 512,1024,2048]",
)
@click.option(
    "--max-length",
    "max_lengths",
    type=CommaList(int, least=1, none=True),
    help="Bounds of our caches.  [default: 512,1024,2048,4096]",
)
@click.option(
    "--types", type=CommaList(none=True), help="Types of our caches.  [default: f16,q8_0]"
)
@click.option(
    "--stock-types",
    type=CommaList(none=True),
    help="Types of llama.cpp's caches; f16 always takes part.  [default: f16,q8_0,q4_0]",
)
@option("policy")
@option(
    "n-ctx",
    type=click.IntRange(1, MAX_LENGTH),
    default=None,
    help="Positions of each cache.  [default: the last one measured, at most what the model was "
    "trained for]",
)
@option("threads")
@option("n-gpu-layers")
@click.option(
    "--decode",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens decoded before each position.",
)
@click.option("--repeat", type=click.IntRange(1), help="Times a prompt is read.  [default: 3]")
@click.option(
    "--recall",
    is_flag=True,
    help="Give our caches an archive, and ask a question of 64 tokens at each position.",
)
@option("json", help="Write all figures to this file; -: to stdout.")
@option("plot")
def command(model, json_file, image, **options):
    """Measure MODEL with llama.cpp's full caches and with ours, side by side.

    Decoding speed by position, time to the first token by prompt length, share of evictions and
    memory. All caches are open at once and take turns, so the figures of one run can be compared;
    x is the ratio to llama.cpp's f16 cache. Figures are medians.
    """
    with dies_of_ctrl_c():
        from qfllama import engine_log
        from qfllama.bench.measure import Engines
        from qfllama.bench.plan import make_plan
        from qfllama.bench.report import draw, tables
        from qfllama.engine import Model
        from qfllama.figures import figure_class, save_figure
        from qfllama.files import plain, write_json
        from qfllama.progress import progress
        from qfllama.schema import read
        from qfllama.shape import model_shape

        Model.check_supported(model)
        n_ctx_train = model_shape(model).n_ctx_train
        options["policy"] = options["policy"] or QFilterConfig().for_file(read(model)).policy
        plan, notes = make_plan(n_ctx_train, **options)
        check_outputs(model, json_file, image)
    for line in notes:
        click.echo(line, err=True)
    with (
        progress("measuring", plan.work) as bar,
        contextlib.closing(Engines(plan, model)) as engines,
    ):
        with dies_of_ctrl_c(), engine_log.errors():  # warnings of contexts beyond the training
            engines.open(bar.update)
        note_offload(engines.model.offload)
        result = plain(engines.measure(bar.update))
    to_stdout = str(json_file) == "-"
    if json_file and not to_stdout:  # first: whoever reads the table may close the pipe
        write_json(json_file, result)
    if image is not None:
        save_figure(draw(figure_class(image), result), image, dpi=150)
    click.echo(json.dumps(result, indent=1) if to_stdout else tables(result))
