"""Calibration text and its tokens."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from ..config import QFilterError
from ..terminal import escaped

MIN_TOKENS = 256
PIECE = 1 << 20
JSONL = (".jsonl", ".ndjson")
DATA_FILES = {  # what `datasets` calls the reader of a file
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # what datasets' save_to_disk leaves


@dataclass
class Source:
    """A named text, handed out in pieces."""

    name: str
    pieces: Iterator[str]

    def close(self) -> None:
        """Let go of the file or dataset before its end."""
        if hasattr(self.pieces, "close"):
            self.pieces.close()


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
    """False for short paragraphs and those full of signs: headlines, grammar, tables and code."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return (
        len(paragraph.split()) >= 8 and letters >= 0.85 * len(paragraph) and "::=" not in paragraph
    )


def sources(text_files=(), dataset=None, split=None, column=None) -> list[Source]:
    """The texts to calibrate on: files, else a dataset NAME[:config], else the built-in text.

    split, column: see `file` and `from_dataset`. Everything is opened here, so that an unreadable
    text is refused before a model is loaded.
    Raises QFilterError for a missing or damaged file, dataset, split or column."""
    if split and not dataset:
        raise QFilterError("--split is for datasets; give --dataset NAME with it")
    if column and not dataset and not any(_is_jsonl(path) for path in text_files):
        raise QFilterError(
            "--column is for datasets and .jsonl files; give --dataset NAME or --text FILE.jsonl"
        )
    if text_files:
        return [file(path, column) for path in text_files]
    return [from_dataset(dataset, split, column) if dataset else builtin()]


def file(path, column=None) -> Source:
    """A text file in UTF-8: plain text, or .jsonl with an object in every line. `column` is the
    field to read (default: `text`, else the only field that is text)."""
    path = Path(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise QFilterError(f"no text file {path}: it {what}; check --text")
    if _is_jsonl(path):
        first = next(_json_objects(path), None)
        if first is None:
            raise QFilterError(f"{path} is empty; give a file with text")
        number, row = first
        column = _text_column(row, column, f"{path}, line {number}")
        return Source(f"{path.name} ({column})", _read_jsonl(path, column))
    if next(_read_pieces(path), None) is None:
        raise QFilterError(f"{path} is empty; give a file with text")
    return Source(path.name, _read_pieces(path))


def _is_jsonl(path):
    return Path(path).suffix.lower() in JSONL


def _read_pieces(path):
    with _opened(path) as text:
        while piece := text.read(PIECE):
            yield piece


@contextmanager
def _opened(path):
    """A text file in UTF-8, with or without a byte order mark; QFilterError if it is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError:
        raise QFilterError(f"{path} is not UTF-8 text; give a plain text file") from None
    except OSError as error:
        raise QFilterError(f"cannot read {path}: {error.strerror}; check --text") from None


def _json_objects(path):
    """(line number from 1, object) of every line of a .jsonl file that is not blank."""
    with _opened(path) as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip())
            except (ValueError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
                raise QFilterError(
                    f"{path}, line {number} is not JSON: {why}; correct or remove the line"
                ) from None
            if not isinstance(row, dict):
                raise QFilterError(
                    f"{path}, line {number} is not a JSON object; give one object per line"
                )
            yield number, row


def _read_jsonl(path, column):
    for number, row in _json_objects(path):
        if column not in row:
            raise QFilterError(
                f"{path}, line {number} has no field {column}; it has {_names(row)}: "
                "correct the line or choose another field with --column"
            )
        yield from _row_text(row[column], column, f"{path}, line {number}")


def _row_text(value, column, where):
    """The text of one row as a piece, nothing where it is null."""
    if value is not None and not isinstance(value, str):
        raise QFilterError(
            f"{where}: {column} is {type(value).__name__}, not text; choose another with --column"
        )
    if value:
        yield value + "\n\n"


def _text_column(row, column, where):
    """The column to read: the one that is asked for, else `text`, else the only one with text."""
    if column is not None:
        if column not in row:
            raise QFilterError(
                f"{where} has no column {column}; it has {_names(row)}: choose one with --column"
            )
        list(_row_text(row[column], column, where))
        return column
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        which = f"several columns with text: {_names(texts)}" if texts else "no column with text"
        raise QFilterError(f"{where} has {which}; choose one with --column, or give another text")
    return texts[0]


def _names(names):
    """Names for a message, the first ten."""
    names = [escaped(name, 40) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def from_dataset(spec: str, split=None, column=None) -> Source:
    """One column of one split of the dataset `spec`, streamed through the `datasets` package.

    spec: NAME[:config] on the Hugging Face hub, or a folder or file here that `datasets` can read
    split: default `train`, else the only one there is
    column: default `text`, else the only one that is text"""
    try:
        import datasets
    except ImportError:
        raise QFilterError(
            "--dataset needs the package datasets; install it with "
            "`pip install 'qfllama[dataset]'`, or give --text FILE"
        ) from None
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    with _dataset_errors(f"cannot load the dataset {spec}"):
        splits = _load_dataset(datasets, spec)
    split = _choose_split(spec, list(splits), split)
    with _dataset_errors(f"cannot load the dataset {spec}"):
        first = next(iter(splits[split].take(1)), None)
    if first is None:
        raise QFilterError(f"the split {split} of {spec} is empty; give another one")
    column = _text_column(first, column, f"the dataset {spec}")
    return Source(f"{spec} ({split}, {column})", _read_rows(splits[split], spec, column))


def _load_dataset(datasets, spec):
    """Split -> rows, streamed."""
    path = Path(spec)
    if path.is_file():
        kind = DATA_FILES.get(path.suffix.lower())
        if kind is None:
            raise QFilterError(
                f"{path} is no data file; --dataset takes {', '.join(DATA_FILES)} files, "
                "folders of them and names on the Hugging Face hub"
            )
        return datasets.load_dataset(kind, data_files=str(path), streaming=True)
    if path.is_dir() and any((path / name).is_file() for name in SAVED_TO_DISK):
        saved = datasets.load_from_disk(str(path))
        saved = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        return {name: rows.to_iterable_dataset() for name, rows in saved.items()}
    name, _, config = (spec, "", "") if path.is_dir() else spec.partition(":")
    if not path.is_dir():
        _check_on_hub(name)
    return datasets.load_dataset(name, config or None, streaming=True)


def _check_on_hub(name):
    """QFilterError with the cause if the hub has no such dataset or can't be reached. `datasets`
    would try for half a minute and not say why."""
    from huggingface_hub import HfApi, constants, utils

    utils.logging.set_verbosity_error()
    if constants.HF_HUB_OFFLINE:
        return  # it may be in the cache
    try:
        HfApi().dataset_info(name, timeout=20)
    except Exception as error:  # noqa: BLE001 - the hub or the network
        raise QFilterError(
            f"{name} is no file or folder here and no dataset that the Hugging Face hub hands out: "
            f"{reason(error)}; check --dataset"
        ) from None


def _choose_split(spec, splits, split):
    if split is None and ("train" in splits or len(splits) == 1):
        return "train" if "train" in splits else splits[0]
    if split not in splits:
        wanted = f"no split {split}" if split else "no split train"
        raise QFilterError(
            f"the dataset {spec} has {wanted}; it has {_names(splits)}: choose one with --split"
        )
    return split


def _read_rows(rows, spec, column):
    with _dataset_errors(f"cannot read the dataset {spec}"):
        for number, row in enumerate(rows, 1):
            yield from _row_text(row.get(column), column, f"{spec}, row {number}")


@contextmanager
def _dataset_errors(what):
    """Whatever the hub, the network or the files raise, as a QFilterError in one line."""
    try:
        yield
    except QFilterError:
        raise
    except Exception as error:  # noqa: BLE001 - of many packages
        raise QFilterError(f"{what}: {reason(error)}; check --dataset") from None


def reason(error: BaseException) -> str:
    """An exception's message and, if different, that of the exception that caused it."""
    cause = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    why, root = one_line(error), one_line(cause)
    return why if root in why else f"{why} ({root})"


def need_packages(who: str, *names: str) -> None:
    """QFilterError unless the packages that `who` ("convert needs", ...) tells of are installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise QFilterError(
            f"{who} the packages {', '.join(missing)}; install them with "
            "`pip install 'qfllama[convert]'`"
        )


def one_line(error: BaseException) -> str:
    """The start of an exception's message as one line; without a message its type."""
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return message if len(message) <= 300 else message[:300] + " ..."


def sequences(
    gguf, sources: list[Source], num_sequences: int, max_seq_len: int, *, strict=False
) -> list[list[int]]:
    """Token sequences of at most max_seq_len, in turns from the sources, with the tokenizer that
    llama.cpp will use on the GGUF file `gguf` (and its BOS token if the model wants one).

    With too little text there are fewer and shorter sequences than asked for (`shortage` has the
    message). QFilterError then if `strict`, and always with less than MIN_TOKENS tokens."""
    with _tokenizer(gguf) as (tokenize, bos):
        size = max_seq_len - len(bos)
        if size < 1:
            raise QFilterError(
                f"sequences of {max_seq_len} tokens are too short to calibrate on; use a longer "
                "--max-seq-len, or another model if it was trained for so few"
            )
        chunks = [_chunks(tokenize, source, size, num_sequences) for source in sources]
    in_turns = [chunk for turn in zip_longest(*chunks) for chunk in turn if chunk]
    # a source's last, shorter chunk is used only if there are not enough full ones
    full = [chunk for chunk in in_turns if len(chunk) == size]
    chosen = (full + [chunk for chunk in in_turns if len(chunk) < size])[:num_sequences]
    n_tokens = sum(len(chunk) for chunk in chosen)
    if n_tokens < min(MIN_TOKENS, num_sequences * size):
        raise QFilterError(
            f"the text has only {n_tokens} tokens, calibration needs at least "
            f"{MIN_TOKENS}; give more with --text FILE"
        )
    chosen = [bos + chunk for chunk in chosen]
    too_little = shortage(chosen, num_sequences, max_seq_len)
    if strict and too_little:
        raise QFilterError(f"{too_little}; give more text, or leave out --strict")
    return chosen


def shortage(chosen: list[list[int]], num_sequences: int, max_seq_len: int) -> str | None:
    """The message if there are fewer tokens than asked for; else None."""
    n_tokens, wanted = sum(map(len, chosen)), num_sequences * max_seq_len
    if n_tokens >= wanted:
        return None
    if n_tokens < max_seq_len:
        return (
            f"the text has {n_tokens:,} tokens, less than one sequence of {max_seq_len:,} and "
            f"fewer than the {wanted:,} asked for"
        )
    return f"the text has {n_tokens:,} tokens, fewer than the {wanted:,} asked for"


def _chunks(tokenize, source, size, count):
    """Up to `count` chunks of `size` tokens from the start of a source, the last may be shorter. If
    it were shorter than half, it and the one before are made equal: a short one says little."""
    tokens = []
    with closing(source):
        for piece in source.pieces:
            tokens += tokenize(piece)
            if len(tokens) >= size * count:
                break
    starts = list(range(0, min(len(tokens), size * count), size))
    rest = len(tokens) - starts[-1] if starts else size
    if len(starts) > 1 and rest < size // 2:
        starts[-1] = starts[-2] + (size + rest) // 2
    ends = [*starts[1:], min(len(tokens), size * count)]
    return [tokens[i:j] for i, j in zip(starts, ends, strict=True)]


@contextmanager
def _tokenizer(gguf):
    """(tokenize, bos): llama.cpp's tokenizer of a GGUF file, str -> list of ids without special
    tokens, and the list of ids that starts a sequence."""
    from . import native_model

    with native_model.loaded(gguf, vocab_only=True) as model:
        yield model.tokens, model.tokens("", start=True)
