"""Writing files that appear complete or not at all, and the checks before that."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from . import gguf_header
from .config import QFilterError

MAX_NAME = 230  # bytes of a file's name; most systems allow 255, and temporary files add some


def targets(src, dst, *, whole=False) -> list[Path]:
    """The files that `write(src, dst)` makes: [DST], or as many parts as the GGUF file SRC has,
    NAME-00001-of-00003.gguf, ... in DST's folder. `whole`: SRC will be made one file before."""
    if whole or not Path(src).is_file():
        return [Path(dst)]
    return gguf_header.part_paths(dst, len(gguf_header.parts(src)))


def check_target(src, dst, *, force=False, whole=False) -> None:
    """QFilterError unless every file that `write(src, dst)` makes (see `targets`) may be written:
    not a part of SRC, in a folder that exists, and not there yet (or `force`)."""
    sources = gguf_header.parts(src) if Path(src).is_file() else []
    for target in gguf_header.part_paths(dst, 1 if whole else max(len(sources), 1)):
        _check_file(sources, target, force)


def _check_file(sources, dst, force):
    if dst.exists() and any(os.path.samefile(src, dst) for src in sources):
        raise QFilterError(
            f"{dst} is the input itself, which is never changed; give another output file"
        )
    if dst.is_dir():
        raise QFilterError(f"{dst} is a folder; give an output file")
    if dst.exists() and not dst.is_file():
        raise QFilterError(f"{dst} is a device or a pipe; give an output file")
    if dst.exists() and not force:
        raise QFilterError(f"{dst} exists; replace it with --force or give another output file")
    if len(os.fsencode(dst.name)) > MAX_NAME:
        raise QFilterError("the name of the output file is too long; give a shorter one")
    if not dst.parent.is_dir():
        raise QFilterError(f"the folder {dst.parent} does not exist; create it first")
    if not os.access(dst.parent, os.W_OK):
        raise QFilterError(f"the folder {dst.parent} is not writable; give another output file")


def check_space(folder, n_bytes: int) -> None:
    """QFilterError unless `folder` has room for n_bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise QFilterError(
            f"not enough space in {folder}: {n_bytes / 2**20:,.0f} MiB needed, "
            f"{free / 2**20:,.0f} MiB free; make room or give another output file"
        )


@contextmanager
def replacing(targets: list[Path]):
    """Yields open binary files, which replace the `targets` when the block ends: all of them or
    none. If the block fails, the new files are removed and the old ones stay."""
    temporary = []
    try:
        with ExitStack() as files:
            opened = []
            for target in targets:
                handle, name = tempfile.mkstemp(
                    dir=target.parent, prefix=f".{target.name}.", suffix=".part"
                )
                temporary.append(Path(name))
                opened.append(files.enter_context(os.fdopen(handle, "wb")))
            yield opened
        umask = os.umask(0)
        os.umask(umask)
        for path in temporary:
            path.chmod(0o666 & ~umask)
        _rename_all(temporary, targets)
    except BaseException:
        for path in temporary:
            path.unlink(missing_ok=True)
        raise


def _rename_all(temporary, targets):
    """Rename files to `targets`, the first target last: without it the others are not loaded. Until
    then the replaced files are kept under another name, to be put back if a rename fails. A single
    file is replaced in one step."""
    old, new = [], []
    try:
        if len(targets) > 1:
            for path, target in zip(temporary, targets, strict=True):
                if target.exists():
                    old.append((path.with_suffix(".old"), target))
                    os.replace(target, path.with_suffix(".old"))
        for path, target in reversed(list(zip(temporary, targets, strict=True))):
            new.append((path, target))
            os.replace(path, target)
    except BaseException:
        for path, target in new:
            if len(targets) > 1 and not path.exists():
                target.unlink(missing_ok=True)
        for path, target in old:
            with suppress(FileNotFoundError):
                os.replace(path, target)
        raise
    for path, _ in old:
        with suppress(OSError):
            path.unlink()


def write_json(path, value) -> None:
    """Write a report in JSON, as `write_file` does."""
    write_file(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def write_file(path, content: bytes) -> None:
    """Write `path`, complete or not at all; QFilterError if that fails."""
    try:
        with replacing([Path(path)]) as (file,):
            file.write(content)
    except OSError as error:
        raise QFilterError(
            f"cannot write {path}: {error.strerror}; make room or give another file"
        ) from None


def plain(value):
    """`value` (nested dicts and lists, arrays, numbers, text) made valid for JSON: without NaN,
    infinity and undecodable bytes."""
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value
