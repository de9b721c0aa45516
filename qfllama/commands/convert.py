"""qfllama convert: calibrate filters for a model and write them into a GGUF."""

from __future__ import annotations

import os
import sys

import click

from ..config import QFilterError
from ..fit import fit
from ..terminal import escaped
from .console import stopped_once
from .options import option


@click.command("convert")
@click.argument("src")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    metavar="OUT.gguf",
    help="The GGUF file to write.",
)
@click.option(
    "--filters",
    metavar="learned|REPO_OR_PATH",
    help="learned: also calibrate learned filters, and make them the file's policy if they are "
    "better in a test; this takes about twice as long. A folder, .safetensors file or hub id (such "
    "as nthngdy/Llama-3.1-8B_qfilt): use these published filters instead of calibrating.",
)
@click.option(
    "--backend",
    type=click.Choice(["torch", "llama"]),
    help="What runs the model during calibration.  [default: llama for a GGUF, torch for a "
    "checkpoint]",
)
@option(
    "n-gpu-layers",
    help="Layers on the GPU with --backend llama: a number, all, or auto for as many as fit.  "
    "[default: auto]",
)
@click.option(
    "--max-seq-len",
    default=2048,
    show_default=True,
    type=click.IntRange(16),
    help="Tokens per calibration sequence.",
)
@click.option(
    "--num-sequences",
    type=click.IntRange(1),
    help="Calibration sequences.  [default: 6, with --filters learned 20]",
)
@click.option(
    "--num-samples",
    default=3000,
    show_default=True,
    type=click.IntRange(1),
    help="Queries per head, drawn from all sequences.",
)
@click.option(
    "--rank",
    default=0,
    show_default=True,
    type=click.IntRange(0, 256),
    help="Principal directions per query head in the second moments, which only the policy "
    "qfilters2 reads; 0: none.",
)
@click.option(
    "--text",
    "text_files",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Calibration text, UTF-8 (.jsonl: one object per line); may be given several times.  "
    "[default: English that Python carries]",
)
@click.option(
    "--dataset",
    metavar="NAME[:config]",
    help="Calibration text from a dataset on the Hugging Face hub, or in a folder, streamed.",
)
@click.option("--split", metavar="NAME", help="Split of the dataset.  [default: train]")
@click.option(
    "--column",
    metavar="NAME",
    help="Column of the dataset, or field of a .jsonl file, with the text.  [default: text]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Fail if there is less text than --num-sequences x --max-seq-len.",
)
@option(
    "seed",
    type=click.IntRange(0, 2**63 - 1),  # kept in the file as it is
    default=0,
    show_default=True,
    help="Seed of the draw of queries.",
)
@click.option("--quantize", metavar="TYPE", help="Quantize the weights, e.g. to Q4_K_M or Q8_0.")
@click.option(
    "--outtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    help="Type of the weights that a checkpoint is converted to before --quantize.",
)
@click.option(
    "--force", is_flag=True, help="Replace OUT.gguf if it exists, and filters that SRC has already."
)
def command(src, output, filters, quantize, outtype, force, **calibration):
    """Calibrate Q-filters for the model SRC and write OUT.gguf with them.

    SRC is a GGUF file, a Hugging Face checkpoint folder, or the name of a model on the Hugging Face
    hub (user/name). It is never changed. Every llama.cpp can run OUT.gguf."""
    if calibration["text_files"] and calibration["dataset"]:
        raise click.UsageError("--text and --dataset exclude each other; give one of them")
    if filters not in (None, "learned"):
        _refuse_calibration(calibration)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other packages
    from qfllama.convert import pipeline

    if output.endswith(("/", os.sep)):  # a path object does without
        raise QFilterError(f"{output} is the name of a folder; give an output file")
    with stopped_once():
        summary = pipeline.convert(
            src,
            output,
            pipeline.Calibration(**calibration),
            filters=filters,
            quantize=quantize,
            outtype=outtype,
            force=force,
            note=lambda line: click.echo(line, err=True),
            bars=True,
        )
    _print(summary)


def _refuse_calibration(calibration):
    context = click.get_current_context()
    for name in calibration:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            raise click.UsageError(f"--filters takes the place of calibration; leave out {option}")


def _print(summary):
    filters, made = summary.filters, summary.filters.calibration
    for part in summary.outputs[1:]:
        click.echo(escaped(part))
    click.echo(
        f"{escaped(summary.outputs[0])}: {summary.n_bytes / 2**20:,.1f} MiB, filters "
        f"for {filters.size}"
    )
    if made["route"] == "published":
        click.echo(escaped(made["text"]))
        return
    click.echo(
        f"calibrated on {made['samples']:,} queries per head out of {made['tokens']:,} "
        f"tokens ({made['sequences']} sequences of {escaped(made['text'])}) "
        f"in {summary.seconds:.0f} s"
    )
    click.echo(fit(filters).summary)
