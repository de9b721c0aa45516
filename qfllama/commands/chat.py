"""`qfllama chat`: talk to a model in a bounded cache, with cache usage after each answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from qfllama.commands.console import (
    MIB,
    dies_of_ctrl_c,
    erase_progress,
    interrupts,
    note,
    show_progress,
)
from qfllama.commands.opening import cache_of, open_model, read_document, types_of
from qfllama.commands.options import IN_FILE, Finite, MaxLength, archive_of, model_argument, option
from qfllama.config import QFilterError
from qfllama.terminal import escaped

if TYPE_CHECKING:
    from qfllama import Conversation, Llama
    from qfllama.conversation import Turn

HELP = """\
/stats     what the cache holds
/recalled  the text that came back for the latest question
/reset     start over (--system and --file stay)
/quit      leave (so does Ctrl-D)
/help      this
Ctrl-C stops an answer."""

RETRY = "send the next message to have the conversation read again, or /reset"

ENDED = {  # Turn.ended -> a note behind the answer
    "length": "cut at --max-tokens",
    "context": "context full: start anew, or with a larger --n-ctx",
    "interrupted": "stopped",
}


def cache_stats(llm: Llama) -> dict[str, int]:
    """`Llama.qfilter_stats`; for the full cache the same figures, from the model's shape."""
    if llm.qfilter_config is not None:
        return llm.qfilter_stats()
    from qfllama.llama import cache_figures
    from qfllama.offload import Cache, kv_bytes
    from qfllama.shape import model_shape

    params = llm.context_params
    cache = Cache(llm.n_ctx(), params.type_k, params.type_v)
    n_bytes = sum(kv_bytes(model_shape(llm.model_path), [cache]))
    figures = cache_figures(llm._ctx.stats())
    return figures | {"kv_bytes": n_bytes, "kv_bytes_full": n_bytes, "positions": llm.n_tokens}


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
    if stats.get("archived_from"):
        parts.append(f"archive from position {stats['archived_from']:,}")
    if turn.ended in ENDED:
        parts.append(ENDED[turn.ended])
    return "[" + " · ".join(parts) + "]"


def answer(
    conversation: Conversation, text: str, options: dict, cure: str = "--verbose shows its log"
) -> None:
    """Stream one answer to stdout, its status line to stderr; QFilterError if that fails.

    Args:
        cure: what to do where the engine fails.
    """
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
            raise QFilterError(f"the engine failed ({error}); {cure}") from error
        finally:
            if not last:
                erase_progress()
            elif not last.endswith("\n"):
                click.echo()
    found = conversation.turn.recalled
    if found is not None:
        note(
            f"[recalled {len(found.positions):,} of {found.archived:,} archived tokens in "
            f"{found.seconds:.2f} s]"
        )
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


def show_recalled(conversation: Conversation) -> None:
    """The spans of the conversation that the latest recall brought back, with their positions."""
    found = conversation.turn.recalled
    if found is None or not len(found.positions):
        note("nothing was recalled")
        return
    positions = found.positions.tolist()
    first = [p for p, before in zip(positions, [-2, *positions], strict=False) if p != before + 1]
    last = [p for p, after in zip(positions, [*positions[1:], -2], strict=True) if p != after - 1]
    for start, end in zip(first, last, strict=True):
        text = conversation.text(start, end + 1)
        click.echo(f"[{start:,}-{end:,}] {escaped(text, None)}", err=True)


def chat(start: Callable[[], Conversation], options: dict) -> int:
    """Turns and commands, line by line, until the input ends.

    `start` makes a new conversation. Returns the exit code: 1 if there were messages, all of them
    failed and stdin or stdout is no terminal; else 0.
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
        elif line == "/recalled":
            show_recalled(conversation)
        elif line == "/help":
            note(HELP)
        elif re.fullmatch(r"/\w+", line):
            note(f"unknown command {line}: /help lists them")
        elif line:
            try:
                answer(conversation, line, options, RETRY)
                answered += 1
            except QFilterError as error:
                failed += 1
                click.echo(f"qfllama: {escaped(error, None, lines=True)}", err=True)
    return int(failed > 0 and answered == 0 and not interactive)


@click.command()
@model_argument
@option(
    "max-length",
    type=MaxLength(1),
    metavar="number|auto",
    help="Cells of the cache; auto: as many as fit, see `qfllama plan`.  [default: 4096]",
)
@option("window-length")
@option("sinks")
@option("interval")
@option("policy")
@option("archive")
@option("archive-limit")
@option("recall")
@click.option("--full", is_flag=True, help="The stock cache of n_ctx cells, for comparison.")
@option("n-ctx")
@option("n-gpu-layers")
@option("threads")
@option("type-k")
@option("type-v")
@option("system")
@click.option("--file", "document", type=IN_FILE, help="A text that goes before the first message.")
@click.option(
    "--state", type=IN_FILE, help="Go on from a document that `qfllama compress` has read."
)
@click.option("--prompt", help="Answer this and exit.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--temperature", type=Finite(0), default=0.2, show_default=True, help="0: greedy.")
@click.option("--top-p", type=Finite(0, 1), default=0.95, show_default=True)
@option("seed", help="Seed of sampling: the same seed gives the same answers.")
@option("verbose")
def command(
    model, max_length, window_length, sinks, interval, policy, archive, archive_limit, recall,
    full, n_ctx, n_gpu_layers, n_threads, type_k, type_v, system, document, state, prompt, max_tokens, temperature, top_p,
    seed, verbose,
):  # fmt: skip
    """Chat with MODEL, a GGUF file made by `qfllama convert`.

    After each answer a line on stderr shows the cells used and allocated, the size of the cache and
    of the full cache, and the speed. Without a terminal each line of stdin is a message.
    """
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(encoding="utf-8", errors="replace")
    if state is not None and (full or system is not None or document is not None):
        raise click.UsageError(
            "--state has a bounded cache, its own system prompt and document; leave out --full, "
            "--system and --file"
        )
    if prompt is not None and not prompt.strip():
        raise click.UsageError("--prompt is empty: give a message, or leave it out to chat")
    text = read_document(document)
    with dies_of_ctrl_c():
        from qfllama.conversation import Conversation
        from qfllama.state import read_prompt

        saved = read_prompt(state, header_only=True) if state is not None else None
        type_k, type_v = types_of(saved, type_k, type_v)
        config, n_gpu_layers = cache_of(
            {"max_length": max_length, "window_length": window_length, "sinks": sinks,
             "interval": interval, "policy": policy,
             **archive_of(archive, archive_limit, recall)},
            full, saved, model=model, n_ctx=n_ctx, type_k=type_k, type_v=type_v,
            n_gpu_layers=n_gpu_layers,
        )  # fmt: skip
        llm = open_model(
            model, config,
            may_be_whole=max_length == "auto" or (saved is not None and max_length is None),
            n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=n_threads,
            n_threads_batch=n_threads, type_k=type_k, type_v=type_v, verbose=verbose,
        )  # fmt: skip
    if seed is not None:
        llm.set_seed(seed)
    options = {"max_tokens": max_tokens, "temp": temperature, "top_p": top_p}

    def start() -> Conversation:
        conversation = Conversation(llm, system, text, state)
        if state is not None and config.recalls and llm.qfilter_stats()["archived_from"] > 0:
            note(
                f"{state} has no archive: what was dropped can't be recalled; "
                "`qfllama compress --archive` keeps it"
            )
        return conversation

    if prompt is None:
        return chat(start, options)
    conversation = start()
    answer(conversation, prompt, options)
    if conversation.turn.ended == "interrupted":
        raise KeyboardInterrupt
