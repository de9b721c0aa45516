"""qfllama convert: calibrate filters for a model and write them into a GGUF."""

from __future__ import annotations

import os
import signal
import sys

import click


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
    "--max-seq-len",
    default=2048,
    show_default=True,
    type=click.IntRange(16),
    help="Tokens per calibration sequence.",
)
@click.option(
    "--num-sequences",
    default=20,
    show_default=True,
    type=click.IntRange(1),
    help="Calibration sequences.",
)
@click.option(
    "--num-samples",
    default=3000,
    show_default=True,
    type=click.IntRange(1),
    help="Queries per head, drawn from all sequences.",
)
@click.option(
    "--text",
    "text_files",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Calibration text, UTF-8; may be given several times.  [default: English that "
    "Python carries]",
)
@click.option(
    "--dataset",
    metavar="NAME[:config]",
    help="Calibration text from a dataset on the Hugging Face hub, streamed.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
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
def command(src, output, quantize, outtype, force, **calibration):
    """Calibrate Q-filters for the model SRC and write OUT.gguf with them.

    SRC is a GGUF file, a Hugging Face checkpoint folder, or the name of a model on the Hugging Face
    hub (user/name). It is never changed. Every llama.cpp can run OUT.gguf."""
    if calibration["text_files"] and calibration["dataset"]:
        raise click.UsageError("--text and --dataset exclude each other; give one of them")
    for name in ("SIGTERM", "SIGHUP"):  # leave nothing behind; Windows has no SIGHUP
        if number := getattr(signal, name, None):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    bars = sys.stderr.isatty()
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
    from qfllama.convert import pipeline

    summary = pipeline.convert(
        src,
        output,
        pipeline.Calibration(**calibration),
        quantize=quantize,
        outtype=outtype,
        force=force,
        note=lambda line: click.echo(line, err=True),
        bars=bars,
    )
    n_layer, n_head_kv, head_dim = summary.filters.weight.shape
    made = summary.filters.calibration
    click.echo(
        f"{summary.output}: {summary.n_bytes / 2**20:,.1f} MiB, filters for {n_layer} "
        f"layers x {n_head_kv} KV heads x {head_dim}"
    )
    click.echo(
        f"calibrated on {made['samples']:,} queries per head out of {made['tokens']:,} "
        f"tokens ({made['sequences']} sequences of {made['text']}) "
        f"in {summary.seconds:.0f} s"
    )
