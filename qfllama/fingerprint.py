"""What tells the weights of one model from those of another."""

from __future__ import annotations

import hashlib
import struct

from . import gguf_header

SAMPLE_BYTES = 4096


def fingerprint(path) -> str:
    """SHA-256 of the tensors of the model in the GGUF file at `path` (any part of a split model).

    For every tensor, in the order of their names, it hashes the length of the name, the name, type
    and shape, and SAMPLE_BYTES from the middle of the data. So it is fast for a model of any size.
    It does not depend on the metadata keys or on how the model is split into files. Another
    fine-tune or quantization has another fingerprint.

    Raises QFilterError when a file is damaged or a part is missing."""
    tensors = []
    for part in gguf_header.parts(path):
        header = gguf_header.scan(part)
        tensors += [(info.name, info, part, header.data) for info in header.tensors]
    tensors.sort(key=lambda tensor: tensor[0].encode("utf-8", "surrogateescape"))
    digest = hashlib.sha256()
    files = {}
    try:
        for name, info, part, data in tensors:
            raw = name.encode("utf-8", "surrogateescape")
            shape = struct.pack(f"<II{len(info.shape)}Q", info.type, len(info.shape), *info.shape)
            digest.update(struct.pack("<Q", len(raw)) + raw + shape)
            if part not in files:
                files[part] = open(part, "rb", buffering=0)  # noqa: SIM115 - closed below
            n_bytes = gguf_header.tensor_bytes(info)
            size = min(n_bytes, SAMPLE_BYTES)
            files[part].seek(data + info.offset + (n_bytes - size) // 2)
            digest.update(files[part].read(size))
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()
