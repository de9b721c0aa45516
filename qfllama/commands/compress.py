"""`qfllama compress`: read a document once, keep the best of it in a file that chats start from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfllama.commands.console import MIB, dies_of_ctrl_c, note
from qfllama.commands.opening import open_model, read_document
from qfllama.commands.options import IN_FILE, OUT_FILE, model_argument, option
from qfllama.config import QFilterConfig, QFilterError
from qfllama.progress import progress

if TYPE_CHECKING:
    from qfllama import Llama


def document_tokens(model: Path, system: str | None, document: str) -> tuple[list[int], str]:
    """What the model reads up to the end of the document, and what its chat template puts before
    the document."""
    from qfllama import Conversation, engine_log

    with engine_log.errors():  # a context without a model behind it warns about its length
        tokenizer = open_model(model, None, vocab_only=True, verbose=False)
    try:
        conversation = Conversation(tokenizer, system, document)
        return conversation.document_tokens(), conversation.document_header()
    finally:
        tokenizer.close()


def cache_config(
    n_tokens: int,
    ratio: float | None,
    max_length: int | None,
    window: int,
    sinks: int,
    policy: str | None,
    n_more: int = 0,
) -> tuple[QFilterConfig, int]:
    """The config of a cache that holds n_tokens + n_more at full size, and the number of cells to
    keep of them.

    Raises:
        QFilterError: sinks and window don't fit into the cells to keep.
    """
    from qfllama.state import cells_wanted

    wanted = min(n_tokens, cells_wanted(n_tokens, ratio, max_length))
    if wanted < sinks + max(1, window):
        if n_tokens <= sinks + max(1, window):
            raise QFilterError(
                f"the document has {n_tokens:,} tokens, and the first {sinks} and the last "
                f"{max(1, window)} are always kept: there is nothing to compress, use `qfllama chat "
                "--file`, or a smaller --window-length"
            )
        raise QFilterError(
            f"{wanted:,} of the document's {n_tokens:,} tokens would be kept, but the first {sinks} and "
            f"the last {max(1, window)} always are: keep more with a smaller --ratio or a larger "
            "--max-length, or use a smaller --window-length"
        )
    interval = 512  # nothing is evicted while the document is read: the size of a batch
    length = n_tokens + n_more + interval
    chosen = {"policy": policy} if policy else {}
    return QFilterConfig(length, window, sinks, interval, **chosen), wanted


def check_room(document: Path | str, n_tokens: int, n_ctx: int) -> None:
    """QFilterError if nothing could follow the document."""
    if n_tokens >= n_ctx:
        raise QFilterError(
            f"{document} takes {n_tokens:,} of {n_ctx:,} positions: shorten it, or use a "
            "larger --n-ctx if the model supports it"
        )


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns a failure of the engine in the block into a one-line error."""
    try:
        yield
    except RuntimeError as error:
        raise QFilterError(f"the engine failed ({error}); --verbose shows its log") from error


def keep_beginning(llm: Llama, tokens: list[int], system: str | None, text: str, n_cells: int):
    """Keep all that comes before the document, in at most half of the cells without the window."""
    from qfllama.beginning import before_user

    messages = [{"role": "system", "content": system or ""}, {"role": "user", "content": text}]
    n = before_user(llm._model, tokens, messages)
    kept = llm.keep_first(min(n, (n_cells - llm.qfilter_config.window_of(n_cells)) // 2))
    if kept < n:
        note(
            f"of {n:,} tokens before the document only {kept:,} always stay in {n_cells:,} cells: "
            "keep more, or shorten the system prompt"
        )


def read(llm: Llama, tokens: list[int]) -> float:
    """Read the document; returns the seconds that it took."""
    start = time.perf_counter()
    with reading(), progress("reading", len(tokens)) as bar:
        for done in range(0, len(tokens), llm.n_batch):
            part = tokens[done : done + llm.n_batch]
            llm.eval(part)
            bar.update(len(part))
    return time.perf_counter() - start


def compress(llm: Llama, n_cells: int, score: str) -> tuple[int, int]:
    """Compress what was read; returns the cells before and after."""
    if score == "policy":
        return llm.compress(max_length=n_cells)
    with reading(), progress("reading again", llm.n_tokens) as bar:
        return llm.compress(max_length=n_cells, score=score, progress=bar.update)


@click.command("compress")
@model_argument
@click.option(
    "--file", "document", required=True, type=IN_FILE, help="The text to compress, UTF-8."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=OUT_FILE,
    metavar="OUT.qfstate",
    help="The file to write.",
)
@click.option(
    "--ratio", type=click.FloatRange(1), help="Keep one cell out of this many.  [default: 8]"
)
@option("max-length", help="Keep this many cells, in place of --ratio.")
@option(  # small: the document is read at full size and compressed once
    "window-length",
    default=64,
    show_default=True,
    help="Last positions of the document that are always kept.",
)
@option("sinks", default=QFilterConfig.sinks)
@option("policy")
@click.option("--score", type=click.Choice(["policy", "replay"]), default="policy", show_default=True,
              help="What decides which rows stay: the policy; or replay: the text is read again, "
              "and the rows that this looks at stay, which takes two to three times as long.")  # fmt: skip
@option("system")
@option("n-ctx")
@option("n-gpu-layers")
@option("threads")
@option("type-k")
@option("type-v")
@click.option("--archive", is_flag=True,
              help="Also write the evicted rows, for recall in a chat: as large as a full cache.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace OUT.qfstate if it exists.")
@option("verbose")
def command(
    model, document, output, ratio, max_length, window_length, sinks, policy, score, system,
    n_ctx, n_gpu_layers, n_threads, type_k, type_v, archive, force, verbose,
):  # fmt: skip
    """Read a document with MODEL and write the compressed cache to OUT.qfstate.

    The document is read at full size, then compressed once. `qfllama chat MODEL --state
    OUT.qfstate` goes on from there without reading it again.
    """
    if ratio is not None and max_length is not None:
        raise click.UsageError("--ratio and --max-length exclude each other; give one of them")
    if ratio is None and max_length is None:
        ratio = 8.0
    if ratio is not None and not math.isfinite(ratio):
        raise click.UsageError(f"--ratio {ratio} is not a finite number; 8 keeps an eighth")
    text = read_document(document)
    with dies_of_ctrl_c():
        from qfllama.engine import Model
        from qfllama.files import check_target
        from qfllama.shape import model_shape

        Model.check_supported(model)
        check_target(model, output, force=force, whole=True)
        if output.exists() and output.samefile(document):
            raise QFilterError(f"{output} is the document itself: give another output file")
        tokens, header = document_tokens(model, system, text)
        n_ctx = n_ctx or model_shape(model).n_ctx_train
        check_room(document, len(tokens), n_ctx)
        n_more = 0
        if score == "replay":
            from qfllama.replay import LEAST_PART, PLAIN, room

            if (type_v or "f16").upper() not in PLAIN:
                raise QFilterError(
                    f"--score replay needs f16, bf16 or f32 for V: leave out --type-v {type_v}"
                )
            n_more = min(room(len(tokens)), n_ctx - len(tokens))
            if n_more < 2 * LEAST_PART:
                raise QFilterError(
                    f"{document} leaves {n_more:,} of {n_ctx:,} positions for a second reading: "
                    f"shorten it, or use --n-ctx {len(tokens) + room(len(tokens))} if the model "
                    "supports it"
                )
        config, wanted = cache_config(
            len(tokens), ratio, max_length, window_length, sinks, policy, n_more
        )
        config = dataclasses.replace(config, archive=archive)
        llm = open_model(
            model, config, may_be_whole=True, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=n_threads,
            n_threads_batch=n_threads, type_k=type_k, type_v=type_v, verbose=verbose,
        )  # fmt: skip
    keep_beginning(llm, tokens, system, text, wanted)
    seconds = read(llm, tokens)
    before, after = compress(llm, wanted, score)
    n_bytes = llm.save_prompt(
        output, {"chat": {"system": system, "header": header}}, archive=archive
    )
    click.echo(
        f"{output}: {before:,} tokens in {after:,} cells, {n_bytes / MIB:.1f} MiB "
        f"(read at {before / seconds:.0f} tok/s)"
    )
