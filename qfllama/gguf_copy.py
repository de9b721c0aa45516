"""Copies of GGUF files that differ in their filters only."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace
from pathlib import Path

from . import gguf_header, schema
from .config import QFilterError
from .files import check_space, check_target, replacing
from .filters import VERSION, Filters
from .fingerprint import fingerprint
from .shape import shape_of

COPY_CHUNK = 16 << 20


def write(src, dst, filters: Filters, *, force=False, progress=None) -> list[Path]:
    """Copy the GGUF file SRC to DST with `filters` and the fingerprint of SRC's tensors in its
    metadata. Of a split model (SRC is any of its parts) the first part gets the filters, the others
    are copied as they are. Returns the files written (see `files.targets`).

    Everything else stays as it is: all other keys, the tensor infos and the tensor data are copied
    byte for byte, whatever the tensor types. The output appears complete or not at all.

    force: replace filters that SRC already has, and replace DST if it exists
    progress: called as progress(bytes_written, bytes_in_all)
    Raises QFilterError for filters that are not sound or don't fit SRC, no room, SRC == DST."""
    dst = Path(dst)
    check_target(src, dst, force=force)
    schema.check_source(src, force=force)
    sources = gguf_header.parts(src)
    outputs = gguf_header.part_paths(dst, len(sources))
    header = gguf_header.scan(sources[0])
    shape = shape_of(sources[0], header)
    filters = replace(filters, version=VERSION, fingerprint=fingerprint(sources[0]))
    schema.check_sound(sources[0], filters)
    schema.check_fits(filters, shape)

    head = _new_header(header, schema.pack(filters))
    sizes = [part.stat().st_size for part in sources]
    total = len(head) + max(sizes[0] - header.data, 0) + sum(sizes[1:])
    check_space(dst.parent, total)
    contents = zip(sources, [header.data, *[0] * len(sources[1:])], strict=True)
    done = len(head)
    try:
        with replacing(outputs) as files:
            files[0].write(head)
            for out, (source, start) in zip(files, contents, strict=True):
                for n_bytes in _copied(source, start, out):
                    done += n_bytes
                    if progress:
                        progress(done, total)
    except OSError as error:
        raise QFilterError(
            f"cannot write {dst}: {error.strerror}; make room or give another output file"
        ) from None
    return outputs


def _copied(path, start, out):
    """Append the bytes of the file at `path` from `start` on to the open file `out`; yields the
    size of every piece. The kernel copies them if it can."""
    out.flush()
    with open(path, "rb", buffering=0) as data:
        data.seek(start)
        while n_bytes := _copy_in_kernel(data, out):
            yield n_bytes
        while chunk := data.read(COPY_CHUNK):
            out.write(chunk)
            yield len(chunk)


def _copy_in_kernel(data, out):
    """Bytes copied from one open file to another, at most COPY_CHUNK; 0 at the end, or where the
    system or the file systems can't."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(data.fileno(), out.fileno(), COPY_CHUNK)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        return 0


def _new_header(header, pairs):
    """Header bytes of SRC with its qfilters.* keys replaced by `pairs` (packed keys)."""
    kept = [
        header.raw[f.start : f.end]
        for key, f in header.fields.items()
        if not key.startswith(schema.PREFIX)
    ]
    head = b"".join(
        [
            b"GGUF",
            struct.pack("<IQQ", header.version, len(header.tensors), len(kept) + len(pairs)),
            *kept,
            *pairs,
            header.raw[header.infos : header.infos_end],
        ]
    )
    return head + bytes(-len(head) % header.alignment)
