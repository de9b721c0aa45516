"""`qfllama bench`: what a bounded cache gains on this machine, beside the caches of llama.cpp."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import click

from qfllama.commands.chat import MAX_CTX, dies_of_ctrl_c
from qfllama.config import POLICIES, QFilterConfig


class Several(click.ParamType):
    """Values with commas between; `none`: not any."""

    name = "list"

    def __init__(self, kind: type):
        self.kind = kind

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        if value == "none":
            return ()
        try:
            found = tuple(self.kind(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers like 512,1024.", param, ctx)
        if self.kind is int and min(found) < 1:
            self.fail(f"{min(found)} in {value!r} is too small; use 1 or more.", param, ctx)
        return found


@contextlib.contextmanager
def progress_bar(plan) -> Iterator:
    """A bar on a terminal's stderr; the function to call after so many steps."""
    from tqdm import tqdm

    shape = "{desc} {percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=plan.work, desc="measuring", bar_format=shape, disable=None) as bar:
        yield bar.update


def check_outputs(model: Path, json_file: str | None, image: Path | None) -> None:
    """What shall be written can be; said before anything is measured."""
    from qfllama.figures import figure_class
    from qfllama.files import check_target

    if json_file not in (None, "-"):
        check_target(model, json_file, force=True, whole=True)
    if image is not None:
        figure_class(image)
        check_target(model, image, force=True, whole=True)


@click.command("bench")
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="Little of everything: stock f16 and 512 f16 to 2,048.")
@click.option(
    "--positions",
    type=Several(int),
    help="Where decoding is measured, or none.  [default: 512,1024,... to 32768]",
)
@click.option(
    "--prompts",
    type=Several(int),
    help="Prompt lengths for the time to the first token, or none.  [default: 512,1024,2048]",
)
@click.option(
    "--max-length",
    "max_lengths",
    type=Several(int),
    help="Bounds of our caches.  [default: 512,1024,2048,4096]",
)
@click.option("--types", type=Several(str), help="Types of our caches.  [default: f16,q8_0]")
@click.option(
    "--stock-types",
    type=Several(str),
    help="Types of llama.cpp's caches; f16 always takes part.  [default: f16,q8_0,q4_0]",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default=QFilterConfig.policy,
    show_default=True,
    help="What decides which cells are kept.",
)
@click.option(
    "--n-ctx",
    type=click.IntRange(1, MAX_CTX),
    help="Positions of each cache.  [default: the last one measured, as far as the model was "
    "trained]",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option(
    "--n-gpu-layers", type=click.IntRange(-1), default=0, help="Layers on the GPU, -1: all."
)
@click.option(
    "--decode",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens decoded before each position.",
)
@click.option("--repeat", type=click.IntRange(1), help="Times a prompt is read.  [default: 3]")
@click.option("--json", "json_file", metavar="FILE", help="Write all figures; -: to stdout.")
@click.option(
    "--plot",
    "image",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw them (.png, .svg or .pdf).",
)
def command(model, json_file, image, **options):
    """Measure MODEL with llama.cpp's full caches and with ours, side by side.

    Decoding speed by position, time to the first token by prompt length, share of evictions and
    memory. All caches are open at once and take turns, so the figures of one run can be compared;
    x is the quotient to llama.cpp's f16 cache. Figures are medians.
    """
    with dies_of_ctrl_c():
        from qfllama import bench, bench_report, figures, files
        from qfllama.commands.compress import no_log
        from qfllama.shape import model_shape

        n_ctx_train = model_shape(model).n_ctx_train
        plan, notes = bench.make_plan(n_ctx_train, **options)
        check_outputs(model, json_file, image)
    for line in notes:
        click.echo(line, err=True)
    with progress_bar(plan) as progress, contextlib.closing(bench.Engines(plan, model)) as engines:
        with dies_of_ctrl_c(), no_log():  # it warns of every context beyond the training
            engines.open(progress)
        result = files.plain(engines.measure(progress))
    if json_file == "-":
        click.echo(json.dumps(result, indent=1))
    else:
        click.echo(bench_report.tables(result))
        if json_file:
            files.write_json(json_file, result)
    if image is not None:
        Figure = figures.figure_class(image)
        figures.save_figure(bench_report.draw(Figure, result), image, dpi=150)
