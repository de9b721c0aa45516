"""Calibration text and its tokens."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ..config import QFilterError

MIN_TOKENS = 256
PIECE = 1 << 20
GGML_LOG_LEVEL_ERROR = 4  # ggml.h; not among the names of llama-cpp-python


@dataclass
class Source:
    """A named text, handed out in pieces."""

    name: str
    pieces: Iterator[str]


def builtin() -> Source:
    """English prose that every CPython carries: the language reference behind help()."""
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(
        " ".join(paragraph.split())
        for _, topic in sorted(topics.items())
        for paragraph in topic.split("\n\n")
        if _is_prose(paragraph)
    )
    return Source(
        f"pydoc_data.topics of Python {platform.python_version()}", iter(["\n\n".join(paragraphs)])
    )


def _is_prose(paragraph):
    """False for headlines, grammar, tables and code, which are short or full of signs."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return (
        len(paragraph.split()) >= 8 and letters >= 0.85 * len(paragraph) and "::=" not in paragraph
    )


def file(path) -> Source:
    """A text file in UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise QFilterError(f"no text file {path}; check --text")
    return Source(path.name, _read_pieces(path))


def _read_pieces(path):
    try:
        with open(path, encoding="utf-8") as text:
            while piece := text.read(PIECE):
                yield piece
    except UnicodeDecodeError:
        raise QFilterError(f"{path} is not UTF-8 text; give a plain text file") from None
    except OSError as error:
        raise QFilterError(f"cannot read {path}: {error.strerror}") from None


def dataset(spec: str) -> Source:
    """The column `text` (or the first column of text) of NAME[:config]'s split `train`, streamed
    through the `datasets` package."""
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging
    except ImportError:
        raise QFilterError(
            "--dataset needs the package datasets; install it with "
            "`pip install 'qfllama[dataset]'`, or give --text FILE"
        ) from None
    logging.set_verbosity_error()
    name, _, config = spec.partition(":")
    try:
        rows = iter(load_dataset(name, config or None, split="train", streaming=True))
        first = next(rows)
    except StopIteration:
        raise QFilterError(f"the dataset {spec} is empty; give another one") from None
    except Exception as error:  # noqa: BLE001 - the hub, the network or the data set
        raise QFilterError(f"cannot load the dataset {spec}: {one_line(error)}") from None
    columns = [key for key, value in first.items() if isinstance(value, str)]
    if not columns:
        raise QFilterError(f"the dataset {spec} has no column of text; give another one")
    column = "text" if "text" in columns else columns[0]

    def pieces():
        yield first[column] + "\n\n"
        for row in rows:
            yield row[column] + "\n\n"

    return Source(f"{spec} ({column})", pieces())


def one_line(error: BaseException) -> str:
    """The start of an exception's message as one line, or its type where it has none."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:300] + " ..."


def sequences(gguf, sources: list[Source], num_sequences: int, max_seq_len: int) -> list[list[int]]:
    """Token sequences of at most max_seq_len, in turns from the sources, with the tokenizer that
    llama.cpp will use on the GGUF file `gguf` (and its BOS token where the model wants one).

    Fewer and shorter sequences than asked for where there is too little text; QFilterError when
    there are less than MIN_TOKENS tokens in all."""
    with _tokenizer(gguf) as (tokenize, bos):
        size = max_seq_len - len(bos)
        chunks = [_chunks(tokenize, source, size, num_sequences) for source in sources]
    in_turns = [chunk for turn in zip_longest(*chunks) for chunk in turn if chunk]
    # a source's last, shorter chunk only where there are not enough full ones
    full = [chunk for chunk in in_turns if len(chunk) == size]
    chosen = (full + [chunk for chunk in in_turns if len(chunk) < size])[:num_sequences]
    n_tokens = sum(len(chunk) for chunk in chosen)
    if n_tokens < min(MIN_TOKENS, num_sequences * size):
        raise QFilterError(
            f"the text has only {n_tokens} tokens, calibration needs at least "
            f"{MIN_TOKENS}; give more with --text FILE"
        )
    return [bos + chunk for chunk in chosen]


def _chunks(tokenize, source, size, count):
    """Up to `count` chunks of `size` tokens from the start of a source, the last may be shorter."""
    tokens = []
    for piece in source.pieces:
        tokens += tokenize(piece)
        if len(tokens) >= size * count:
            break
    return [tokens[i : i + size] for i in range(0, min(len(tokens), size * count), size)]


@contextmanager
def _tokenizer(gguf):
    """(tokenize, bos): llama.cpp's tokenizer of a GGUF file, str -> list of ids without special
    tokens, and the list of ids that starts a sequence."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with _log_of_llama_cpp() as lines:
        model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
    if not model:
        raise QFilterError(f"llama.cpp cannot load {gguf}: {lines[0] if lines else 'no reason'}")
    try:
        vocab = llama_cpp.llama_model_get_vocab(model)

        def tokenize(text):
            data = text.encode("utf-8", "replace")
            count = -llama_cpp.llama_tokenize(vocab, data, len(data), None, 0, False, False)
            ids = (llama_cpp.llama_token * count)()
            llama_cpp.llama_tokenize(vocab, data, len(data), ids, count, False, False)
            return list(ids)

        wants_bos = llama_cpp.llama_vocab_get_add_bos(vocab)
        yield tokenize, [llama_cpp.llama_vocab_bos(vocab)] if wants_bos else []
    finally:
        llama_cpp.llama_model_free(model)


@contextmanager
def _log_of_llama_cpp():
    """Within the block, llama.cpp's errors go to the list this gives, and no log to stderr."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    lines = []

    @llama_cpp.llama_log_callback
    def collect(level, message, _):
        if level == GGML_LOG_LEVEL_ERROR:
            lines.append(" ".join(message.decode("utf-8", "replace").split()))

    llama_cpp.llama_log_set(collect, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, None)
