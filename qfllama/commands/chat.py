"""`qfllama chat`: talk to a model in a bounded cache, and see after each answer that it is one."""

from __future__ import annotations

import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfllama.config import POLICIES, QFilterConfig, QFilterError
from qfllama.terminal import escaped

if TYPE_CHECKING:
    from qfllama import Llama
    from qfllama.conversation import Conversation, Turn
    from qfllama.state import Prompt

MIB = 2**20
MAX_CTX = 2**30  # positions are 32-bit numbers

HELP = """\
/stats  what the cache holds
/reset  start over (--system and --file stay)
/quit   leave (so does Ctrl-D)
/help   this
Ctrl-C stops an answer."""

ENDED = {  # Turn.ended -> a note behind the answer
    "length": "cut at --max-tokens",
    "context": "context full: /reset, or start with a larger --n-ctx",
    "interrupted": "stopped",
}


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """While an answer runs: was Ctrl-C pressed? A second Ctrl-C ends the program."""
    presses = []

    def handle(signum, frame):
        if presses:
            raise KeyboardInterrupt
        presses.append(signum)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def dies_of_ctrl_c() -> Iterator[None]:
    """While a model is loaded, Ctrl-C ends the process at once, as if Python weren't there.

    A KeyboardInterrupt that comes while llama.cpp calls back to log something would be lost. A
    shell reports 130, as elsewhere.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def note(text: str) -> None:
    """A line that is not part of an answer."""
    click.secho(text, err=True, dim=True)


def show_progress(done: int, total: int) -> None:
    """How much of a long prompt has been read, on a terminal; `erase_progress` takes it away."""
    if sys.stderr.isatty():
        click.secho(f"\rreading {done:,}/{total:,} tokens", err=True, dim=True, nl=False)


def erase_progress() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


def cache_stats(llm: Llama) -> dict[str, int]:
    """`Llama.qfilter_stats`; for the full cache what it would say, from the model's shape."""
    if llm.qfilter_config is not None:
        return llm.qfilter_stats()
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    from qfllama.shape import model_shape

    shape = model_shape(llm.model_path)
    heads = shape.n_head_kv
    n_heads = sum(heads) if isinstance(heads, list) else heads * shape.n_layer
    n_cells = -(-llm.n_ctx() // 256) * 256
    kv_bytes = 0
    for kind in (llm.context_params.type_k, llm.context_params.type_v):
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        kv_bytes += n_cells * n_heads * shape.head_dim // block * size
    return {
        "evictions": 0,
        "cells_used": llm.n_tokens,
        "cells_allocated": n_cells,
        "kv_bytes": kv_bytes,
        "kv_bytes_full": kv_bytes,
        "positions": llm.n_tokens,
    }


def status(stats: dict, turn: Turn) -> str:
    """One line: the cache, what the full one would take, and the speed of this turn."""
    parts = [
        f"{stats['cells_used']:,}/{stats['cells_allocated']:,} cells",
        f"KV {stats['kv_bytes'] / MIB:.1f} MiB (full cache {stats['kv_bytes_full'] / MIB:.1f})",
        f"{stats['evictions']:,} eviction{'' if stats['evictions'] == 1 else 's'}",
        f"{stats['positions']:,} positions",
    ]
    if turn.step_seconds > 0:
        parts.append(f"{turn.steps / turn.step_seconds:.1f} tok/s")
    if turn.prompt_seconds > 0:
        rate = turn.prompt_tokens / turn.prompt_seconds
        parts.append(f"prompt {turn.prompt_tokens:,} at {rate:.0f} tok/s")
    if turn.reread_tokens:
        parts.append(f"re-read {turn.reread_tokens:,} tokens")
    if turn.ended in ENDED:
        parts.append(ENDED[turn.ended])
    return "[" + " · ".join(parts) + "]"


def answer(conversation: Conversation, text: str, options: dict) -> None:
    """Stream one answer to stdout, its status line to stderr; QFilterError if that fails."""
    last = ""
    with interrupts() as interrupted:
        try:
            for piece in conversation.ask(
                text, stopped=interrupted, progress=show_progress, **options
            ):
                if not last:
                    erase_progress()
                last = piece
                click.echo(
                    escaped(piece, None, lines=True) if sys.stdout.isatty() else piece, nl=False
                )
        except RuntimeError as error:
            raise QFilterError(
                f"the engine failed ({error}); send the next message to have the conversation"
                " read again, or /reset"
            ) from error
        finally:
            if not last:
                erase_progress()
            elif not last.endswith("\n"):
                click.echo()
    note(status(cache_stats(conversation.llm), conversation.turn))


def read_line(interactive: bool) -> str | None:
    """The next line of stdin, None at its end; Ctrl-C on a terminal's prompt gives an empty one."""
    if not interactive:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except EOFError:
        click.echo(err=True)
        return None
    except KeyboardInterrupt:
        click.echo(err=True)
        note("/quit or Ctrl-D to leave")
        return ""


def show_stats(llm: Llama) -> None:
    """All figures of the engine, one per line."""
    for name, value in cache_stats(llm).items():
        note(f"{name:16} {value:,}" if isinstance(value, int) else f"{name:16} {value}")


def chat(start: Callable[[], Conversation], options: dict) -> int:
    """Turns and commands, line by line, until the input ends.

    `start` makes a new conversation. Returns the exit code: 1 if there were messages, all of them
    failed and nobody was there to see it.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):  # line editing and history for input()
            import readline  # noqa: F401
        note("/help for commands")
    conversation = start()
    answered = failed = 0
    while (line := read_line(interactive)) is not None:
        line = line.strip()
        if line == "/quit":
            break
        elif line == "/reset":
            conversation = start()
            note("[new conversation]")
        elif line == "/stats":
            show_stats(conversation.llm)
        elif line == "/help":
            note(HELP)
        elif re.fullmatch(r"/\w+", line):
            note(f"unknown command {line}: /help lists them")
        elif line:
            try:
                answer(conversation, line, options)
                answered += 1
            except QFilterError as error:
                failed += 1
                click.echo(f"qfllama: {escaped(error, None, lines=True)}", err=True)
    return int(failed > 0 and answered == 0 and not interactive)


def read_document(path: Path | None) -> str | None:
    """The text of --file."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QFilterError(f"{path}: not a UTF-8 text: convert it to plain text first") from error


def bound(cache: dict, full: bool, saved: Prompt | None) -> QFilterConfig | None:
    """The config from the options in `cache` (names of QFilterConfig); None for the full cache."""
    cache = {name: value for name, value in cache.items() if value is not None}
    if full and cache:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in cache)
        raise QFilterError(f"--full is the cache without bound: leave out {options}")
    if full:
        return None
    if saved is None:
        return QFilterConfig(**cache)
    from qfllama.state import config_for

    for name in ("policy", "sinks"):
        made = saved.settings.get(name)
        if cache.pop(name, made) != made:
            raise QFilterError(f"the state was made with {name} {made}: leave out --{name}")
    return config_for(saved, **cache)


def open_model(model: Path, config: QFilterConfig | None, **kwargs) -> Llama:
    """The model, in the stock cache if `config` is None; options that are None are left out.

    Raises:
        QFilterError: whatever is wrong with the file, the options or the memory of this machine.
    """
    import jinja2

    from qfllama import Llama
    from qfllama.shape import model_shape

    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    model_shape(model)  # has a clear word about a file that is no model
    try:
        return Llama(str(model), qfilters=config, flash_attn=True, **kwargs)
    except QFilterError:
        raise
    except MemoryError as error:
        raise QFilterError(
            f"not enough memory for {kwargs.get('n_ctx', 0):,} positions: use a smaller --n-ctx"
        ) from error
    except (ValueError, jinja2.TemplateError) as error:
        raise QFilterError(
            f"{model}: llama.cpp can't use this file ({error}); --verbose shows its log"
        ) from error


class Finite(click.FloatRange):
    """A number in a range; `nan` and `inf` are none."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--max-length", type=int, help="Cells of the cache.  [default: 4096]")
@click.option(
    "--window-length",
    type=int,
    help="Newest positions that are always kept.  [default: max-length / 4]",
)
@click.option("--sinks", type=int, help="First positions that are always kept.  [default: 4]")
@click.option(
    "--interval",
    type=int,
    help="Cells that an eviction frees.  [default: max-length / 4, 64 to 512]",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help=f"What decides which cells are kept.  [default: {QFilterConfig.policy}]",
)
@click.option("--full", is_flag=True, help="The stock cache of n_ctx cells, for comparison.")
@click.option(
    "--n-ctx",
    type=click.IntRange(0, MAX_CTX),
    default=0,
    help="Positions of a conversation.  [default: those the model was trained on]",
)
@click.option(
    "--n-gpu-layers", type=click.IntRange(-1), help="Layers on the GPU, -1: all.  [default: 0]"
)
@click.option("--threads", "n_threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--type-k", help="Type of the cached K: f16, q8_0, ...  [default: f16]")
@click.option("--type-v", help="Type of the cached V.  [default: f16]")
@click.option("--system", help="System prompt.")
@click.option(
    "--file",
    "document",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text that goes before the first message.",
)
@click.option(
    "--state",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Go on from a document that `qfllama compress` has read.",
)
@click.option("--prompt", help="Answer this and exit.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--temperature", type=Finite(0), default=0.2, show_default=True, help="0: greedy.")
@click.option("--top-p", type=Finite(0, 1), default=0.95, show_default=True)
@click.option(  # llama.cpp takes 2**32 - 1 for "another one each time"
    "--seed", type=click.IntRange(0, 2**32 - 2), help="For the same answers again."
)
@click.option("--verbose", is_flag=True, help="Show the engine's log.")
def command(
    model, max_length, window_length, sinks, interval, policy, full, n_ctx, n_gpu_layers,
    n_threads, type_k, type_v, system, document, state, prompt, max_tokens, temperature, top_p,
    seed, verbose,
):  # fmt: skip
    """Chat with MODEL, a GGUF file made by `qfllama convert`.

    After each answer a line on stderr tells how many cells are used and allocated, what the cache
    takes and what the full one would, and how fast it went. Without a terminal each line of stdin
    is a message.
    """
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(encoding="utf-8", errors="replace")
    if state is not None and (full or system is not None or document is not None):
        raise click.UsageError(
            "--state has a bounded cache, its own system prompt and document; leave out --full, "
            "--system and --file"
        )
    text = read_document(document)
    with dies_of_ctrl_c():
        from qfllama.conversation import Conversation
        from qfllama.state import read_prompt

        saved = read_prompt(state, header_only=True) if state is not None else None
        if saved is not None:
            type_k = type_k or saved.settings.get("type_k")
            type_v = type_v or saved.settings.get("type_v")
        config = bound(
            {"max_length": max_length, "window_length": window_length, "sinks": sinks,
             "interval": interval, "policy": policy},
            full, saved,
        )  # fmt: skip
        llm = open_model(
            model, config, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=n_threads,
            n_threads_batch=n_threads, type_k=type_k, type_v=type_v, verbose=verbose,
        )  # fmt: skip
    if seed is not None:
        llm.set_seed(seed)
    options = {"max_tokens": max_tokens, "temp": temperature, "top_p": top_p}
    if prompt is None:
        return chat(lambda: Conversation(llm, system, text, state), options)
    conversation = Conversation(llm, system, text, state)
    answer(conversation, prompt, options)
    if conversation.turn.ended == "interrupted":
        raise KeyboardInterrupt
