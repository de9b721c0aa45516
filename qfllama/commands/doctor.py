"""`qfllama doctor`: what is installed, what it runs on, and whether a real run is right."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from qfllama.commands.options import option
from qfllama.doctor import NOT_KNOWN, examine
from qfllama.files import plain
from qfllama.terminal import escaped

GIB = 1 << 30


@click.command()
@click.argument("model", type=click.Path(), required=False)
@option("type-k")
@option("type-v")
@option("n-gpu-layers", help="Layers of MODEL on the GPU: a number, all, or auto.  [default: auto]")
@option("threads")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model, type_k, type_v, n_gpu_layers, n_threads, as_json):
    """Check the engine and its devices, and, if it is given, the GGUF file MODEL.

    A small model, made on the spot, runs one eviction and one recall with known results. MODEL is
    loaded and does the same. The output can be pasted into an issue. Exit code 1: a check
    failed."""
    found = examine(
        model, type_k=type_k, type_v=type_v, n_threads=n_threads, n_gpu_layers=n_gpu_layers
    )
    if as_json:
        click.echo(json.dumps(plain(found), indent=2, allow_nan=False))
    else:
        for line in lines(found):
            click.echo(escaped(line, None))
    return 0 if found["ok"] else 1


def lines(found: dict) -> Iterator[str]:
    """All findings for people."""
    versions = found["versions"]
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    machine = found["machine"]
    yield (
        f"machine: {machine['system']}, {machine['processor']}, {machine['cpus']} CPUs, "
        f"{_gib(machine['free_bytes'])} of memory free"
    )
    if engine := found["engine"]:
        yield (
            f"engine: {engine['version']}, C API {engine['c_api']}, ggml {engine['ggml']} (commit "
            f"{engine['ggml_commit']}), GPU offload: {_yes(engine['gpu_offload'])}"
        )
        yield f"build: {engine['build']}"
        yield f"backends: {', '.join(found['backends'])}"
    for device in found["devices"]:
        yield (
            f"device {device['name']}: {device['description']} ({device['kind']}, "
            f"{device['backend']}), {_gib(device['free_bytes'])} of "
            f"{_gib(device['total_bytes'])} free"
        )
    if found["model"]:
        yield ""
        yield from _model_lines(found["model"])
    yield ""
    for check in found["checks"]:
        where = f" ({check['where']})" if check["where"] else ""
        yield f"{'ok    ' if check['ok'] else 'FAILED'} {check['name']}{where}: {check['text']}"
    n_failed = sum(not check["ok"] for check in found["checks"])
    yield "all is well" if found["ok"] else f"{n_failed} of {len(found['checks'])} checks FAILED"


def _model_lines(model: dict) -> Iterator[str]:
    yield f"model: {model['name']} ({model['architecture']}), {model['file']}"
    if not model["supported"]:
        yield f"not supported: {model['why']}"
        return
    yield (
        f"supported: {model['evicting_layers']} of {model['layers']} layers evict; trained for "
        f"{model['n_ctx_train']:,} positions"
    )
    yield f"filters: {model['filters']}"
    yield f"layers: {model['n_gpu_layers']}"
    for attention in model["flash_attention"]:
        yield _attention(model, attention)
    yield f"other operations that would run on the CPU: {NOT_KNOWN} before the model runs"


def _attention(model: dict, attention: dict) -> str:
    """What one device says about one shape of attention."""
    heads = f"{attention['dim_k']}"
    if attention["dim_v"] != attention["dim_k"]:
        heads += f" (K) and {attention['dim_v']} (V)"
    text = (
        f"Flash Attention on {attention['device']}, K {model['type_k']}, V {model['type_v']}, heads "
        f"of {heads}: "
    )
    missing = [
        what
        for what, name in (("prompts", "prompt"), ("single tokens", "one_token"))
        if not attention[name]
    ]
    if not missing:
        return text + "yes"
    text += f"not for {' and '.join(missing)}: their attention runs on the CPU, which is slow"
    whole = model["type_k"] == model["type_v"] == "f16"
    return text if whole else text + "; try --type-k f16 --type-v f16"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _gib(n_bytes: int | None) -> str:
    return NOT_KNOWN if n_bytes is None else f"{n_bytes / GIB:,.1f} GiB"
