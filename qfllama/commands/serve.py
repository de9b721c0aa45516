"""`qfllama serve`: llama.cpp's own server on the bounded cache."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfllama.commands.console import MIB, note
from qfllama.commands.options import IN_FILE, MaxLength, archive_of, model_argument, option
from qfllama.config import QFilterConfig, QFilterError

if TYPE_CHECKING:
    from qfllama.plan import Sizes
    from qfllama.shape import ModelShape

LARGEST_PROMPT_CACHE = 8192
"""Most MiB for conversations that wait in host memory for a slot: llama-server's own default."""
CHECKPOINTS = 2
"""Checkpoints of a conversation without an archive; each takes as much as its cells."""
MOST_POSITIONS = (1 << 31) - 1
"""Most positions of all conversations together: llama-server's -c is an int32."""
PAGE = Path(__file__).parents[1] / "serving" / "page"
"""Our own page, for a server that was built without upstream's."""


def server_program() -> Path:
    """llama-server beside the engine's libraries.

    Raises:
        QFilterError: the engine was built without it.
    """
    import llama_cpp

    name = "llama-server.exe" if os.name == "nt" else "llama-server"
    program = Path(llama_cpp.__file__).parent / "lib" / name
    if not program.is_file():
        raise QFilterError(
            "this engine was built without llama-server: build it again with `pip install ./patches`, "
            "without QFLLAMA_SERVER=off"
        )
    return program


def check_state(path: Path, model: Path, settings: dict) -> None:
    """Does a file of `qfllama compress` belong to this model and these settings?

    Raises:
        QFilterError: no, or it holds no document for a chat.
    """
    from qfllama import state

    saved = state.read_prompt(path)
    if why := state.mismatch(saved.settings, {"model": state.model_identity(model), **settings}):
        raise QFilterError(f"{path} can't be used: {why}; make it again with `qfllama compress`")
    chat = saved.extra.get("chat")
    if not isinstance(chat, dict) or not isinstance(chat.get("header"), str):
        raise QFilterError(
            f"{path} does not say where its document begins: make it again with `qfllama compress`"
        )


def cache_arguments(config: QFilterConfig) -> list[str]:
    """llama-server's arguments for the bounded cache."""
    from qfllama.archive import limit_bytes

    arguments = [
        "--max-length", config.max_length, "--window-length", config.window_length,
        "--sinks", config.sinks, "--interval", config.interval, "--policy", config.policy,
    ]  # fmt: skip
    if not config.archive:
        arguments += ["--no-archive", "--ctx-checkpoints", CHECKPOINTS]
    else:
        arguments += ["--archive-limit", max(1, limit_bytes(config) // MIB)]
        if isinstance(config.archive, str):
            arguments += ["--archive-dir", config.archive]
        arguments += ["--recall" if config.recall else "--no-recall"]
        arguments += ["--recall-queries", config.recall_queries]
    return [str(argument) for argument in arguments]


def summary(sizes: Sizes, n_slots: int, n_cells: int) -> str:
    """What the caches take, and how many more conversations fit into this machine's memory."""
    from qfllama.machine import available_bytes
    from qfllama.offload import devices

    of_one, whole = (sum(sizes.kv_bytes(n)) for n in (n_cells, sizes.n_ctx))
    text = (
        f"{n_slots} conversation{'s' if n_slots > 1 else ''} of up to {sizes.n_ctx:,} tokens at once, "
        f"{n_cells:,} cells each: {of_one / MIB:.1f} MiB each, {n_slots * of_one / MIB:.1f} MiB in all"
    )
    if whole > of_one:
        text += f" (the whole cache: {n_slots * whole / MIB:,.1f})"
    free = available_bytes()
    if free is not None and not devices():
        text += f"; {free // max(1, of_one):,} would fit into {free / MIB:,.0f} MiB of free memory"
    return text


def prompt_cache_mib() -> int:
    """MiB for conversations that wait for a slot: a quarter of free memory, at most llama-server's
    own default."""
    from qfllama.machine import available_bytes

    free = available_bytes()
    return LARGEST_PROMPT_CACHE if free is None else min(LARGEST_PROMPT_CACHE, free // 4 // MIB)


def check_address(host: str, port: int) -> None:
    """QFilterError if the server could not listen there. A path (`*.sock`) is left to it."""
    if host.endswith(".sock"):
        return
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, number) as listening:
            if os.name == "posix":  # as the server does: a port of an ended server is free
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
    except OSError as error:
        raise QFilterError(
            f"cannot listen at {host}:{port}: {error.strerror}; use another --host or --port"
        ) from None


def has_key(server_args: tuple[str, ...]) -> bool:
    """Does llama-server get a key other than by our --api-key?"""
    return any(argument.startswith("--api-key") for argument in server_args) or any(
        os.environ.get(name) for name in ("LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE")
    )


def check_trained(shape: ModelShape, n_ctx: int, server_args: tuple[str, ...]) -> None:
    """QFilterError for more positions than llama-server would use."""
    key = f"{shape.architecture}.context_length"
    if 0 < shape.n_ctx_train < n_ctx and not any(key in argument for argument in server_args):
        raise QFilterError(
            f"--n-ctx {n_ctx}: llama-server goes up to the {shape.n_ctx_train:,} tokens that the model was "
            "trained for; use that, or declare that the model supports more: "
            f"`-- --override-kv {key}=int:{n_ctx}`"
        )


def check_sizes(parallel: int, n_ctx: int, config: QFilterConfig | None, rpc: str | None) -> None:
    """QFilterError for what the server would refuse with a longer message."""
    from llama_cpp._ggml import libggml_base_path

    if n_ctx * parallel > MOST_POSITIONS:
        raise QFilterError(
            f"{parallel} conversations of {n_ctx:,} tokens are more than {MOST_POSITIONS:,}: use a "
            "smaller --n-ctx or --parallel"
        )
    if config is not None and parallel > config.interval:
        raise QFilterError(
            f"{parallel} conversations do not fit into a batch of {config.interval} tokens: use a "
            "larger --max-length or --interval, or a smaller --parallel"
        )
    if rpc is not None and not list(libggml_base_path.glob("*ggml-rpc*")):
        raise QFilterError(
            "this engine was built without RPC: build it again with "
            '`CMAKE_ARGS="-DGGML_RPC=ON" pip install ./patches`'
        )


def run(command: list[str]) -> int:
    """Become this program; on Windows, run it to its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.call(command)


@click.command("serve")
@model_argument
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Conversations that are answered at once, each in cells of its own.",
)
@option("n-ctx")
@option(
    "max-length",
    type=MaxLength(1),
    metavar="number|auto",
    help="Cells of each conversation; auto: as many as fit, see `qfllama plan`.  [default: 4096]",
)
@option("window-length")
@option("sinks")
@option("interval")
@option("policy")
@option("archive")
@option("archive-limit")
@option("recall")
@click.option("--full", is_flag=True, help="The stock cache of n_ctx cells, for comparison.")
@option("type-k")
@option("type-v")
@option("n-gpu-layers")
@option("threads")
@click.option(
    "--state",
    type=IN_FILE,
    help="Start every conversation from a document that `qfllama compress` has read.",
)
@click.option(
    "--slot-save-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder for POST /slots/{id}?action=save and restore.",
)
@click.option("--api-key", help="A key that clients have to send.")
@click.option("--metrics", is_flag=True, help="Serve figures for Prometheus at /metrics.")
@click.option(
    "--rpc", metavar="HOST:PORT,...", help="Other machines that run llama.cpp's rpc-server."
)
@click.argument("server_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS]")
def command(
    model, host, port, parallel, n_ctx, max_length, window_length, sinks, interval, policy, archive,
    archive_limit, recall, full, type_k, type_v, n_gpu_layers, n_threads, state, slot_save_path, api_key, metrics,
    rpc, server_args,
):  # fmt: skip
    """Serve MODEL, a GGUF file made by `qfllama convert`, to many conversations at once.

    This is llama.cpp's llama-server: a page at http://HOST:PORT, the HTTP interface of OpenAI at
    /v1, and its own. What follows `--` goes to it unchanged.
    """
    from qfllama import needs
    from qfllama.commands.opening import cache_of, types_of
    from qfllama.plan import sizes_of
    from qfllama.state import filters_identity, read_prompt

    if recall == "always":
        raise click.UsageError("the server recalls after prompts only: use --recall prompt")
    program = server_program()
    saved = read_prompt(state, header_only=True) if state is not None else None
    if saved is not None and full:
        raise click.UsageError("--state has a bounded cache; leave out --full")
    type_k, type_v = types_of(saved, type_k, type_v)
    sizes = sizes_of(model, n_ctx, type_k, type_v)
    check_trained(sizes.shape, n_ctx, server_args)
    n_ctx = sizes.n_ctx
    config, n_gpu_layers = cache_of(
        {"max_length": max_length, "window_length": window_length, "sinks": sinks,
         "interval": interval, "policy": policy, **archive_of(archive, archive_limit, recall)},
        full, saved, model=model, n_slots=parallel, n_ctx=n_ctx, type_k=type_k, type_v=type_v,
        n_gpu_layers=n_gpu_layers,
    )  # fmt: skip
    check_sizes(parallel, n_ctx, config, rpc)
    check_address(host, port)
    arguments = [
        "-m", str(model), "--host", host, "--port", str(port), "-np", str(parallel),
        "-c", str(n_ctx * parallel), "-t", str(n_threads), "--cache-ram", str(prompt_cache_mib()),
        "--jinja",
    ]  # fmt: skip
    if config is not None:
        config, filters = needs.of_file(model, config)
        if saved is not None:
            settings = {
                "filters": filters_identity(filters), "type_k": type_k or "f16",
                "type_v": type_v or "f16", "policy": config.policy, "sinks": config.sinks,
            }  # fmt: skip
            check_state(state, model, settings)
            arguments += ["--state", str(state)]
        arguments += cache_arguments(config)
        n_cells = min(config.max_length, n_ctx)
    else:
        arguments += ["--no-kv-unified"]
        n_cells = n_ctx
    note(summary(sizes, parallel, n_cells))
    for name, value in (
        ("-ctk", type_k), ("-ctv", type_v), ("--api-key", api_key), ("--rpc", rpc),
        ("-ngl", {"auto": None, -1: "all"}.get(n_gpu_layers, n_gpu_layers)),
        ("--slot-save-path", slot_save_path),
    ):  # fmt: skip
        arguments += [name, str(value)] if value is not None else []
    arguments += ["--metrics"] if metrics else []
    if not (api_key or has_key(server_args)):  # else any web page could read answers
        arguments += ["--cors-origins", "localhost"]
    if not (program.parents[1] / "llama-server.ui").is_file():
        arguments += ["--path", str(PAGE)]
    return run([str(program), *arguments, *server_args])
