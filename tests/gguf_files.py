"""Small GGUF files of gguf-py's own making, and filters for them."""

import hashlib
import struct

import gguf
import numpy as np

from qfllama.filters import Filters

N_LAYER, N_HEAD_KV, HEAD_DIM = 3, 2, 8
N_HEAD = 4


def rectangular(
    filters, layers=None, calibration=None, quality=None, *, queries=None, moments=None,
    learned=None, layout="norm",
):  # fmt: skip
    """`Filters` of arrays [n_layer, ...]: the same shape in all layers. layers: 0 and up."""
    kinds = {"filters": filters, "queries": queries, "moments": moments, "learned": learned}
    layers = range(len(filters)) if layers is None else layers
    vectors = {
        kind: dict(zip(layers, rows, strict=True))
        for kind, rows in kinds.items()
        if rows is not None
    }
    quality = {name: np.ravel(values) for name, values in (quality or {}).items()}
    return Filters(vectors, dict(calibration or {}), quality, layout)


def stacked(filters, kind="filters"):
    """[n_layer, ...] of vectors that have the same shape in all layers."""
    return np.stack(list(filters.vectors[kind].values()))


def some_filters(seed=0, n_layer=N_LAYER, n_head_kv=N_HEAD_KV, head_dim=HEAD_DIM):
    rows = np.random.default_rng(seed).normal(size=(n_layer, n_head_kv, head_dim))
    return rectangular(
        rows.astype(np.float32),
        calibration={"text": "Straße, naïve", "tokens": 40960, "seed": 2**40},
        quality={
            "energy": np.full((n_layer, n_head_kv), 0.5, np.float32),
            "loss": np.arange(n_layer, dtype=np.float32),
        },
    )


def write_gguf(path, extra=lambda writer: None, alignment=None, n_head_kv=N_HEAD_KV):
    """A small file of gguf-py's own making: several tensor types, every sort of key.

    n_head_kv: one number, or one per layer"""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(128)
    writer.add_embedding_length(N_HEAD * HEAD_DIM)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(n_head_kv)
    writer.add_token_list(["a", "bé", "", "d" * 100])
    writer.add_array("some.bools", [True, False, True])
    writer.add_array("some.floats", [1.5, -2.5])
    writer.add_float64("some.double", 1 / 3)
    writer.add_int64("some.long", -(2**40))
    extra(writer)
    random = np.random.default_rng(1)
    writer.add_tensor("a.weight", random.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("b.weight", random.normal(size=(7,)).astype(np.float16))
    quantized = gguf.quantize(
        random.normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("c.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("d.weight", np.arange(11, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FINGERPRINT = "5c807bcbfe03e6725dd4d9dde6688024f508e304c79cf5e3db9eafa97d3fa931"
"""Of the tensors of `write_gguf`; see test_schema.py."""
ONES = np.ones(N_LAYER * N_HEAD_KV * HEAD_DIM, np.float32).tolist()


def old_filter_keys(leave_out=(), **changed):
    """Adds valid qfilters.* keys of version 1 with gguf-py's writer, as qfllama wrote them before
    version 3; some left out or changed."""
    return _keys(
        {
            "version": ("uint32", 1),
            "layer_count": ("uint32", N_LAYER),
            "head_count_kv": ("uint32", N_HEAD_KV),
            "head_dim": ("uint32", HEAD_DIM),
            "layers": ("array", [0, 1, 2]),
            "weight": ("array", ONES),
        },
        leave_out,
        changed,
    )


def filter_keys(leave_out=(), **changed):
    """As `old_filter_keys`, of version 3."""
    return _keys(
        {
            "version": ("uint32", 3),
            "layout": ("string", "norm"),
            "fingerprint": ("string", FINGERPRINT),
            "layers": ("array", [0, 1, 2]),
            "head_count_kv": ("u32s", [N_HEAD_KV] * N_LAYER),
            "head_dim": ("u32s", [HEAD_DIM] * N_LAYER),
            "filters": ("array", ONES),
        },
        leave_out,
        changed,
    )


def _keys(keys, leave_out, changed):
    keys = keys | changed

    def add(writer):
        kinds = gguf.GGUFValueType
        for key, (kind, value) in keys.items():
            if key in leave_out:
                continue
            if kind in ("u32s", "u16s"):  # add_array takes whole numbers for int32
                item = kinds.UINT32 if kind == "u32s" else kinds.UINT16
                writer.add_key_value(f"qfilters.{key}", value, kinds.ARRAY, sub_type=item)
            else:
                getattr(writer, f"add_{kind}")(f"qfilters.{key}", value)

    return add


def filters_with(value):
    """Numbers for `filters` or `weight` whose first head has this value."""
    numbers = np.array(ONES, np.float32)
    numbers[:HEAD_DIM] = value
    return numbers.tolist()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expected_fingerprint(*paths):
    """The fingerprint of the tensors in GGUF files as docs/metadata.md describes it, of what
    gguf-py reads."""
    tensors = [tensor for path in paths for tensor in gguf.GGUFReader(path).tensors]
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name.encode()):
        data, name = tensor.data.tobytes(), tensor.name.encode()
        size = min(len(data), 4096)
        start = (len(data) - size) // 2
        digest.update(struct.pack("<Q", len(name)) + name)
        digest.update(struct.pack("<II", int(tensor.tensor_type), len(tensor.shape)))
        digest.update(np.asarray(tensor.shape, "<u8").tobytes())
        digest.update(data[start : start + size])
    return digest.hexdigest()
