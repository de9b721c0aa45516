"""qfllama export: the filters of a GGUF file in the format in which others publish them."""

from __future__ import annotations

import os
import sys

import click

from .. import schema
from ..config import QFilterError


@click.command("export")
@click.argument("model", type=click.Path(), metavar="MODEL.gguf")
@click.argument("folder", type=click.Path(), metavar="DIR")
@click.option("--force", is_flag=True, help="Replace filters that DIR has already.")
@click.option("--upload", metavar="user/name", help="Push DIR to the Hugging Face hub, too.")
@click.option("--private", is_flag=True, help="Upload to a private repository.")
def command(model, folder, force, upload, private):
    """Write the filters of MODEL.gguf as the folder DIR, for kvpress and other programs.

    DIR gets model.safetensors, config.json and a model card: the format of the filters that the
    authors of Q-Filters publish, which `qfllama convert --filters` reads too."""
    if private and not upload:
        raise click.UsageError("--private needs --upload user/name")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from qfllama.convert import published, published_hub

    published_hub.check_packages()
    filters = schema.read(model)
    if filters is None:
        raise QFilterError(f"{model} has no filters; add them with `qfllama convert`")
    if upload:
        published_hub.check_upload(upload)
    published.save(
        filters,
        model,
        folder,
        force=force,
        repo=upload,
        note=lambda line: click.echo(line, err=True),
    )
    click.echo(f"{folder}: filters for {filters.size}")
    if upload:
        click.echo(published_hub.upload(folder, upload, private=private))
