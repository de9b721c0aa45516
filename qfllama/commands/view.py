"""`qfllama view`: which tokens a cache holds in which layers and heads, as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from qfllama.commands.compress import check_room, read, reading
from qfllama.commands.console import MIB, dies_of_ctrl_c, note
from qfllama.commands.opening import bound, open_model, read_document, types_of
from qfllama.commands.options import IN_FILE, OUT_FILE, ModelFile, option
from qfllama.config import QFilterError


def is_state(path: Path) -> bool:
    """Is it a file of `qfllama compress`? QFilterError if it is no file."""
    from qfllama.gguf_header import status
    from qfllama.state import MAGIC

    status(path)
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def sort_inputs(source: Path, model: Path | None, document: Path | None) -> tuple[Path, Path]:
    """(the model, the state or the text to show).

    Raises:
        QFilterError: one of them is missing, or there is one too many.
    """
    if model is None and is_state(source):
        raise QFilterError(
            f"{source} has no words in it, only token numbers: also give the model that read it, "
            f"as in `qfllama view {source} MODEL.gguf`"
        )
    if model is None and document is None:
        raise QFilterError(f"nothing to show: give a text that {source} reads, with --file")
    if model is not None and document is not None:
        raise QFilterError(f"both {source} and --file: give a state or a text, not both")
    return (source, document) if model is None else (model, source)


def check_outputs(model: Path, shown: Path, *outputs: Path | None, force: bool) -> None:
    """QFilterError unless all output files can be written and none of them is an input."""
    from qfllama.files import check_target

    for path in filter(None, outputs):
        check_target(model, path, force=force, whole=True)
        if path.exists() and path.samefile(shown):
            raise QFilterError(f"{path} is the input itself: give another output file")


def fill(llm, *, state: Path | None, text: str | None, system: str | None, question: str | None):
    """Fill the cache as a chat would before it answers; returns what each head had before the
    question, or None without a question."""
    from qfllama.beginning import before_user
    from qfllama.conversation import Conversation
    from qfllama.viewing.holding import kept

    if state is not None and question is None:
        llm.load_prompt(state)  # also a state without a chat
        return None
    chat = Conversation(llm, system, text, state)
    if text is not None:
        tokens = chat.document_tokens()
        check_room("the text", len(tokens), llm.n_ctx())
        llm.keep_first(
            before_user(llm._model, tokens, [*chat.messages, {"role": "user", "content": text}])
        )
        read(llm, tokens)
    elif llm.qfilter_stats()["archived_from"] > 0:
        note(f"{state} has no archive, so nothing can be recalled: `qfllama compress --archive`")
    if question is None:
        return None
    before = kept(llm)
    with reading():
        for _ in chat.ask(question, max_tokens=1, temp=0):
            pass  # the first token of the answer, which is not read
    return before


@click.command("view")
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@click.argument("model", required=False, type=ModelFile())
@click.option("--file", "document", type=IN_FILE, help="The text that SOURCE reads, UTF-8.")
@click.option("--question", help="Ask this, and show what the cache holds after it.")
@click.option("-o", "--output", required=True, type=OUT_FILE, metavar="OUT.html",
              help="The file to write.")  # fmt: skip
@option("json", help="Write the same facts to this file, too.")
@option("max-length")
@option("window-length")
@option("sinks")
@option("policy")
@option("system")
@option("n-ctx")
@option("n-gpu-layers")
@option("threads")
@option("type-k")
@option("type-v")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@option("verbose")
def command(
    source, model, document, question, output, json_file, max_length, window_length, sinks, policy,
    system, n_ctx, n_gpu_layers, n_threads, type_k, type_v, force, verbose,
):  # fmt: skip
    """Draw which tokens a cache holds in which layers and heads, what is archived, and what a
    question brings back.

    \b
    qfllama view STATE MODEL -o view.html             a file of `qfllama compress`
    qfllama view MODEL --file TEXT -o view.html       a text that is read now

    SOURCE is either a state or a model. A state needs the model that read it: the model has the
    words, and the engine reads what the state holds. OUT.html needs nothing but a browser.
    """
    text = read_document(document)
    with dies_of_ctrl_c():
        from qfllama.state import read_prompt

        model, shown = sort_inputs(source, model, document)
        state = shown if document is None else None
        if state is not None and system is not None:
            raise QFilterError(f"{state} has its own system prompt: leave out --system")
        check_outputs(model, shown, output, json_file, force=force)
        saved = read_prompt(state, header_only=True) if state is not None else None
        type_k, type_v = types_of(saved, type_k, type_v)
        config = bound(
            {"max_length": max_length, "window_length": window_length, "sinks": sinks,
             "policy": policy},
            False, saved,
        )  # fmt: skip
        llm = open_model(
            model, config, may_be_whole=saved is not None and max_length is None, n_ctx=n_ctx,
            n_gpu_layers=n_gpu_layers, n_threads=n_threads, n_threads_batch=n_threads,
            type_k=type_k, type_v=type_v, verbose=verbose,
        )  # fmt: skip
    before = fill(llm, state=state, text=text, system=system, question=question)

    from qfllama.files import write_file, write_json
    from qfllama.shape import model_shape
    from qfllama.viewing.holding import holding
    from qfllama.viewing.page import facts, page

    held = holding(llm, before)
    about = {"model": model_shape(model).name, "source": shown.name, "question": question}
    content = page(held, **about).encode()
    write_file(output, content)
    if json_file is not None:
        write_json(json_file, facts(held, **about))
    click.echo(
        f"{output}: {held.kept.shape[1]:,} tokens in {len(held.heads):,} KV heads, of which each "
        f"holds {llm.qfilter_stats()['cells_used']:,}, {len(content) / MIB:.1f} MiB"
    )
