"""The qfilters.* metadata, written by us and read and re-created with gguf-py."""

import hashlib
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest

from qfllama import files, gguf_copy, gguf_header, schema
from qfllama.config import QFilterError
from qfllama.schema import Filters
from qfllama.shape import ModelShape, model_shape

N_LAYER, N_HEAD_KV, HEAD_DIM = 3, 2, 8


def some_filters(seed=0, n_layer=N_LAYER, n_head_kv=N_HEAD_KV, head_dim=HEAD_DIM):
    weight = np.random.default_rng(seed).normal(size=(n_layer, n_head_kv, head_dim))
    return Filters(
        weight.astype(np.float32),
        list(range(n_layer)),
        {"text": "Straße, naïve", "tokens": 40960, "seed": 2**40},
        {
            "energy": np.full((n_layer, n_head_kv), 0.5, np.float32),
            "loss": np.arange(n_layer, dtype=np.float32),
        },
    )


def write_gguf(path, extra=lambda writer: None, alignment=None):
    """A small file of gguf-py's own making: several tensor types, every sort of key."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(128)
    writer.add_embedding_length(4 * HEAD_DIM)
    writer.add_head_count(4)
    writer.add_head_count_kv(N_HEAD_KV)
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


def filter_keys(leave_out=(), **changed):
    """Adds valid qfilters.* keys with gguf-py's writer, with some left out or changed."""
    weight = np.ones(N_LAYER * N_HEAD_KV * HEAD_DIM, np.float32).tolist()
    keys = {
        "version": ("uint32", 1),
        "layer_count": ("uint32", N_LAYER),
        "head_count_kv": ("uint32", N_HEAD_KV),
        "head_dim": ("uint32", HEAD_DIM),
        "layers": ("array", [0, 1, 2]),
        "weight": ("array", weight),
    }
    keys.update(changed)

    def add(writer):
        for key, (kind, value) in keys.items():
            if key not in leave_out:
                getattr(writer, f"add_{kind}")(f"qfilters.{key}", value)

    return add


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path):
    return write_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("alignment", [None, 64, 8])
def test_a_copy_with_filters_keeps_every_other_key_and_tensor_byte_for_byte(tmp_path, alignment):
    src = write_gguf(tmp_path / "src.gguf", alignment=alignment)
    before, digest = gguf.GGUFReader(src), sha256(src)
    gguf_copy.write(src, tmp_path / "dst.gguf", some_filters())
    after = gguf.GGUFReader(tmp_path / "dst.gguf")

    assert sha256(src) == digest
    others = [name for name in after.fields if not name.startswith(("qfilters.", "GGUF."))]
    assert others == [name for name in before.fields if not name.startswith("GGUF.")]
    for name in others:
        old, new = before.fields[name], after.fields[name]
        assert old.types == new.types
        assert [p.tobytes() for p in old.parts] == [p.tobytes() for p in new.parts]
    assert len(before.tensors) == len(after.tensors) == 4
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert [p.tobytes() for p in old.field.parts] == [p.tobytes() for p in new.field.parts]
        assert old.data.tobytes() == new.data.tobytes()
    tail_before = src.read_bytes()[before.data_offset :]
    assert (tmp_path / "dst.gguf").read_bytes()[after.data_offset :] == tail_before
    assert after.data_offset % (alignment or 32) == 0


def test_a_real_model_keeps_its_tensors_and_keys_byte_for_byte(smollm2, tmp_path):
    shape = model_shape(smollm2)
    filters = some_filters(0, shape.n_layer, shape.n_head_kv, shape.head_dim)
    gguf_copy.write(smollm2, tmp_path / "dst.gguf", filters)
    before, after = gguf.GGUFReader(smollm2), gguf.GGUFReader(tmp_path / "dst.gguf")
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.tensor_type, old.shape.tolist()) == (
            new.name,
            new.tensor_type,
            new.shape.tolist(),
        )
        assert (old.data == new.data).all()
    assert all(
        [p.tobytes() for p in before.fields[name].parts]
        == [p.tobytes() for p in after.fields[name].parts]
        for name in before.fields
        if not name.startswith("GGUF.")
    )


def test_filters_come_back_as_they_were_written(model, tmp_path):
    filters = some_filters()
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    back = schema.read(tmp_path / "dst.gguf")
    assert back.weight.dtype == np.float32
    np.testing.assert_array_equal(back.weight, filters.weight)
    assert back.layers == filters.layers
    assert back.calibration == filters.calibration
    assert list(back.quality) == ["energy", "loss"]
    np.testing.assert_array_equal(back.quality["energy"], filters.quality["energy"])
    np.testing.assert_array_equal(back.quality["loss"], filters.quality["loss"])


def test_gguf_py_reads_the_keys_with_the_types_of_the_schema(model, tmp_path):
    filters = some_filters()
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    fields = gguf.GGUFReader(tmp_path / "dst.gguf").fields
    kinds = gguf.GGUFValueType
    expected = {
        "version": ([kinds.UINT32], 1),
        "layer_count": ([kinds.UINT32], N_LAYER),
        "head_count_kv": ([kinds.UINT32], N_HEAD_KV),
        "head_dim": ([kinds.UINT32], HEAD_DIM),
        "layers": ([kinds.ARRAY, kinds.INT32], [0, 1, 2]),
        "weight": ([kinds.ARRAY, kinds.FLOAT32], filters.weight.ravel().tolist()),
        "calibration.text": ([kinds.STRING], "Straße, naïve"),
        "calibration.tokens": ([kinds.INT64], 40960),
        "quality.loss": ([kinds.ARRAY, kinds.FLOAT32], [0.0, 1.0, 2.0]),
    }
    for key, (types, value) in expected.items():
        assert fields["qfilters." + key].types == types, key
        assert fields["qfilters." + key].contents() == value, key


def test_a_file_without_filters_reads_as_none(model):
    assert schema.read(model) is None


def test_filters_that_gguf_py_wrote_are_read(tmp_path):
    filters = schema.read(write_gguf(tmp_path / "f.gguf", filter_keys()))
    assert filters.weight.shape == (N_LAYER, N_HEAD_KV, HEAD_DIM)
    assert (filters.weight == 1).all()


def test_old_filters_are_replaced_only_with_force_and_completely(model, tmp_path):
    once, twice, fresh = tmp_path / "once.gguf", tmp_path / "twice.gguf", tmp_path / "fresh.gguf"
    old = some_filters(1)
    old.calibration["only_in_the_old_one"] = 1
    gguf_copy.write(model, once, old)
    with pytest.raises(QFilterError, match="--force"):
        gguf_copy.write(once, twice, some_filters(2))
    assert not twice.exists()
    gguf_copy.write(once, twice, some_filters(2), force=True)
    gguf_copy.write(model, fresh, some_filters(2))
    assert twice.read_bytes() == fresh.read_bytes()


def test_the_shape_of_the_model_is_read_from_the_header(smollm2, model):
    assert model_shape(smollm2) == ModelShape(
        "llama", "Smollm2 135M 8k Lc100K Mix1 Ep2", 30, 9, 3, 64, 8192
    )
    assert model_shape(model).head_dim == HEAD_DIM


def test_head_counts_that_differ_between_layers_come_as_a_list(tmp_path):
    def add(writer):
        writer.add_array("llama.attention.head_count_kv_of_layers", [2, 1, 2])

    path = write_gguf(tmp_path / "f.gguf", add)
    data = path.read_bytes()
    # the writer refuses to write a key twice: rename the uniform one away, ours to its name
    data = data.replace(b"llama.attention.head_count_kv\x04", b"llama.attention.head_count_xx\x04")
    long, short = b"llama.attention.head_count_kv_of_layers", b"llama.attention.head_count_kv"
    at = data.index(long) - 8
    data = data[:at] + len(short).to_bytes(8, "little") + short + data[at + 8 + len(long) :]
    padding = len(long) - len(short)
    start = gguf.GGUFReader(path).data_offset - padding
    path.write_bytes(data[:start] + bytes(-start % 32) + data[start:])
    shape = model_shape(path)
    assert shape.n_head_kv == [2, 1, 2]
    with pytest.raises(QFilterError, match="do not fit"):
        schema.check_fits(some_filters(), n_layer=3, n_head_kv=shape.n_head_kv, head_dim=8)


def test_filters_of_another_model_are_refused_with_both_shapes(model, tmp_path):
    message = re.escape(
        "3 layers (up to layer 2) x 2 KV heads x 16, the model has 3 layers x 2 KV heads x 8"
    )
    with pytest.raises(QFilterError, match=message):
        gguf_copy.write(model, tmp_path / "dst.gguf", some_filters(head_dim=16))
    fits = {"n_layer": N_LAYER, "n_head_kv": N_HEAD_KV, "head_dim": HEAD_DIM}
    schema.check_fits(some_filters(), **fits)
    schema.check_fits(some_filters(), **fits | {"n_head_kv": [2, 2, 2]})
    for change in ({"n_layer": 2}, {"n_head_kv": 4}, {"n_head_kv": [2, 4, 2]}, {"head_dim": 4}):
        with pytest.raises(QFilterError, match="do not fit"):
            schema.check_fits(some_filters(), **fits | change)


def weights_with(value):
    weight = np.ones(N_LAYER * N_HEAD_KV * HEAD_DIM, np.float32)
    weight[:HEAD_DIM] = value
    return {"weight": ("array", weight.tolist())}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (filter_keys(version=("uint32", 3)), "version 3.*upgrade"),
        (filter_keys(leave_out=["weight"]), "weight is missing"),
        (filter_keys(leave_out=["version"]), "version is missing"),
        (filter_keys(version=("string", "1")), "version has the wrong type"),
        (filter_keys(weight=("array", [1, 2, 3])), "weight has the wrong type"),
        (filter_keys(head_dim=("uint32", 16)), r"48 numbers, its shape is \[3, 2, 16\]"),
        (filter_keys(layers=("array", [0, 1])), "layers"),
        (filter_keys(layers=("array", [0, 2, 1])), "layers"),
        (filter_keys(**weights_with(float("nan"))), "NaN"),
        (filter_keys(**weights_with(float("-inf"))), "NaN or infinite"),
        (filter_keys(**weights_with(0.0)), "layer 0, KV head 0 is all zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_filters_are_refused(tmp_path, keys, message):
    path = write_gguf(tmp_path / "f.gguf", keys)
    with pytest.raises(QFilterError, match=message) as error:
        schema.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_unusable_filters_are_not_written(model, tmp_path, value):
    filters = some_filters()
    filters.weight[1, 1] = value
    with pytest.raises(QFilterError):
        gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    assert not (tmp_path / "dst.gguf").exists()


def test_every_truncation_of_a_file_is_refused_and_nothing_else_is_raised(tmp_path):
    data = write_gguf(tmp_path / "f.gguf", filter_keys()).read_bytes()
    n_data = gguf.GGUFReader(tmp_path / "f.gguf").data_offset
    last = 11 * 4  # the last tensor's bytes; what follows is padding
    end = data.rindex(np.arange(11, dtype=np.int32).tobytes()) + last
    path = tmp_path / "part.gguf"
    for length in [*range(0, n_data + 64, 7), end - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(QFilterError, match="truncated|not a GGUF"):
            schema.read(path)
    path.write_bytes(data[:end])
    assert schema.read(path) is not None


N_HEAD, RANK = 4, 2


def moments_like(value=0.5, n_head=N_HEAD, rank=RANK):
    return np.full((N_LAYER, n_head, 1 + rank, HEAD_DIM), value, np.float16)


def test_second_order_filters_come_back_bit_by_bit_as_version_2(model, tmp_path):
    filters = some_filters()
    filters.moments = np.random.default_rng(3).normal(size=moments_like().shape).astype(np.float16)
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    fields = gguf.GGUFReader(tmp_path / "dst.gguf").fields
    assert fields["qfilters.version"].contents() == 2
    assert fields["qfilters.moments"].types == [
        gguf.GGUFValueType.ARRAY,
        gguf.GGUFValueType.UINT16,
    ]
    back = schema.read(tmp_path / "dst.gguf")
    np.testing.assert_array_equal(back.moments.view(np.uint16), filters.moments.view(np.uint16))
    assert (back.version, back.rank) == (2, RANK)
    assert (some_filters().version, some_filters().rank) == (1, 0)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("moments", moments_like(np.nan), "moments contain NaN"),
        ("moments", moments_like(n_head=3), "rank 2 for 3 query heads and 2 KV heads"),
        ("moments", moments_like(n_head=2), r"for 2 query heads, the model has \[4\]"),
        ("moments", moments_like(rank=0), "moments of rank 0"),
        ("moments", moments_like()[:2], r"moments of shape \[2, 4, 3, 8\]"),
        (
            "queries",
            np.full((N_LAYER, N_HEAD_KV, HEAD_DIM), np.inf),
            "mean queries contain NaN, infinite",
        ),
        ("queries", np.ones((N_LAYER, N_HEAD_KV, HEAD_DIM + 1)), r"expected \[3, 2, 8\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_moments_and_queries_are_not_written(model, tmp_path, name, rows, message):
    filters = some_filters()
    setattr(filters, name, rows)
    with pytest.raises(QFilterError, match=message):
        gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    assert not (tmp_path / "dst.gguf").exists()


def test_mean_queries_come_back_as_they_are_and_need_no_newer_reader(model, tmp_path):
    filters = some_filters()
    filters.queries = np.random.default_rng(3).normal(size=filters.weight.shape).astype(np.float32)
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    back = schema.read(tmp_path / "dst.gguf")
    np.testing.assert_array_equal(back.queries, filters.queries)
    assert back.version == some_filters().version == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((9, 5, 48), "qfilters.queries has the wrong type"),
        ((9, 6, 47), "has 47 numbers, its shape"),
    ],
    ids=["type", "size"],
)
def test_mean_queries_that_are_not_of_the_shape_of_the_filters_are_refused(
    model, tmp_path, change, message
):
    filters = some_filters()
    filters.quality = {}
    filters.queries = filters.weight
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    data = (tmp_path / "dst.gguf").read_bytes()
    head = b"qfilters.queries" + struct.pack("<IIQ", 9, 6, 48)
    at = data.index(head)
    start = at + len(head)
    rows = data[start : start + 4 * change[2]]
    changed = b"qfilters.queries" + struct.pack("<IIQ", *change) + rows
    rest = data[start + 4 * 48 :]
    (tmp_path / "dst.gguf").write_bytes(data[:at] + changed + rest)
    with pytest.raises(QFilterError, match=message):
        schema.read(tmp_path / "dst.gguf")


def test_a_policy_takes_from_the_file_what_it_needs_or_says_what_is_missing(model):
    shape, filters = model_shape(model), some_filters()
    for policy in ("qfilters", "qblend"):
        assert list(schema.for_policy(filters, policy, shape)) == ["weight"]
    with pytest.raises(QFilterError, match="no mean queries, which the policy qahead needs"):
        schema.check_policy(model, filters, "qahead")
    filters.queries = 2 * filters.weight
    schema.check_policy(model, filters, "qahead")
    for policy in ("qahead", "qblend"):
        vectors = schema.for_policy(filters, policy, shape)
        assert list(vectors) == ["queries"]
        np.testing.assert_array_equal(vectors["queries"][filters.layers[0]], filters.queries[0])
    assert list(schema.for_policy(filters, "qfilters", shape)) == ["weight"]
    assert schema.for_policy(filters, "kvdiff", shape) == {}


@pytest.mark.parametrize("change", [{"rank": ("uint32", 3)}, {"head_count": ("uint32", 5)}])
def test_moments_of_another_size_than_they_say_are_refused(model, tmp_path, change):
    filters = some_filters()
    filters.moments = moments_like()
    gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    data = (tmp_path / "dst.gguf").read_bytes()
    (key, (_, value)), old = next(iter(change.items())), {"rank": RANK, "head_count": N_HEAD}
    name = b"qfilters." + key.encode() + struct.pack("<I", 4)
    damaged = data.replace(name + struct.pack("<I", old[key]), name + struct.pack("<I", value))
    assert damaged != data
    (tmp_path / "dst.gguf").write_bytes(damaged)
    with pytest.raises(QFilterError, match="its shape is"):
        schema.read(tmp_path / "dst.gguf")


def test_damaged_headers_never_end_in_a_traceback(tmp_path):
    """Every third byte of the header in turn is set to 255: it is read, or refused in one line."""
    data = bytearray(write_gguf(tmp_path / "f.gguf", filter_keys()).read_bytes())
    n_header = gguf.GGUFReader(tmp_path / "f.gguf").data_offset
    path, refusals = tmp_path / "damaged.gguf", []
    for at in range(0, n_header, 3):
        damaged = bytearray(data)
        damaged[at] = 255
        path.write_bytes(damaged)
        try:
            schema.read(path)
        except QFilterError as error:
            refusals.append(str(error))
    assert len(refusals) > n_header // 30
    assert not any("\n" in line for line in refusals)


def mutant(data, n_header, fields, draw):
    """`data` with a header (its first n_header bytes) damaged in one of several ways.

    fields: byte offsets at which the value of a key starts; an array's begins with its item type
    """
    data, at = bytearray(data), draw.randrange(4, n_header)
    way = draw.choice(["flip", "flip", "cut", "huge", "nested", "insert", "drop"])
    if way == "flip":
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(4, n_header)] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "huge":
        number = draw.choice([2**64 - 1, 2**63, 2**63 - 1, 2**40, 2**32, 2**31, 2**20, 0])
        at = draw.choice([8, 16, draw.choice(fields), draw.choice(fields) + 4, at])
        data[at : at + 8] = struct.pack("<Q", number)
    elif way == "nested":
        at = draw.choice(fields)
        data[at - 4 : at + 4] = struct.pack("<II", 9, draw.choice([9, 9, 8, 13, 2**31]))
    elif way == "insert":
        data[at:at] = draw.randbytes(draw.randint(1, 16))
    else:
        del data[at : at + draw.randint(1, 16)]
    return bytes(data)


def fuzz(path, n=5000, mib=200):
    """Reads `n` damaged copies of the GGUF file at `path` and writes filters into every tenth, with
    `mib` MiB of memory more than there is now and 2 s for each; returns how many were refused.
    Anything but a QFilterError gets out."""
    import resource

    path = Path(path)
    data, header = path.read_bytes(), gguf_header.scan(path)
    fields = [field.value for field in header.fields.values()]
    draw, damaged, out = (
        random.Random(0),
        path.with_name("damaged.gguf"),
        path.with_name("out.gguf"),
    )
    page, used = resource.getpagesize(), int(Path("/proc/self/statm").read_text().split()[0])
    limit = used * page + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def hangs(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, hangs)
    refused, file = 0, open(damaged, "wb", buffering=0)  # noqa: SIM115 - emptying it 5,000 times is slow
    for i in range(n):
        file.seek(0)
        file.truncate(file.write(mutant(data, header.data, fields, draw)))
        signal.setitimer(signal.ITIMER_REAL, 2)
        try:
            model_shape(damaged)
            schema.read(damaged)
            if i % 10 == 0:
                gguf_copy.write(damaged, out, some_filters(), force=True)
        except QFilterError as error:
            assert "\n" not in str(error), error
            refused += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    return refused


@pytest.mark.skipif(sys.platform != "linux", reason="measures its memory in /proc")
def test_5000_damaged_headers_are_refused_or_read_without_hanging_or_filling_memory(tmp_path):
    path = write_gguf(tmp_path / "f.gguf", filter_keys(), alignment=64)
    done = subprocess.run(
        [sys.executable, "-c", "import sys, test_metadata as t; print(t.fuzz(sys.argv[1]))", path],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert 2000 < int(done.stdout) < 4900  # most damage is seen, some of it hits nothing


def test_huge_alignments_counts_and_nested_arrays_are_refused(tmp_path):
    data = write_gguf(tmp_path / "f.gguf", alignment=64).read_bytes()
    fields = gguf_header.scan(tmp_path / "f.gguf").fields
    bools, alignment = fields["some.bools"].value, fields["general.alignment"].value
    path = tmp_path / "damaged.gguf"
    for at, value, words in [
        (8, struct.pack("<Q", 2**60), "truncated or damaged"),
        (16, struct.pack("<Q", 2**60), "truncated or damaged"),
        (bools, struct.pack("<I", 9), "array of unknown type 9"),
        (bools, struct.pack("<IQ", 8, 2**60), "truncated or damaged"),
        (bools - 4, struct.pack("<I", 99), "key of unknown type 99"),
        (alignment, struct.pack("<I", 2**31), "general.alignment"),
        (alignment, struct.pack("<I", 48), "general.alignment"),
    ]:
        path.write_bytes(data[:at] + value + data[at + len(value) :])
        with pytest.raises(QFilterError, match=words):
            schema.read(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs there")
def test_pipes_devices_and_folders_are_refused_without_waiting_for_them(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, words in [
        (tmp_path / "pipe.gguf", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(QFilterError, match=words):
            schema.read(path)


def test_head_counts_for_too_few_layers_are_refused(tmp_path):
    def add(writer):
        writer.add_uint32("other.block_count", 3)
        writer.add_uint32("other.embedding_length", 32)
        writer.add_array("other.attention.head_count", [4, 4, 2])
        writer.add_array("other.attention.head_count_kv", [2, 1])

    data = write_gguf(tmp_path / "f.gguf", add).read_bytes()
    (tmp_path / "f.gguf").write_bytes(data.replace(b"llama", b"other", 1))
    with pytest.raises(QFilterError, match="head_count_kv has 2 numbers for 3 layers"):
        model_shape(tmp_path / "f.gguf")


def figures(value, n=N_LAYER * N_HEAD_KV):
    return ("array", [float(value)] * n)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quality.energy": figures(1.2)}, "energy is not between 0 and 1"),
        ({"quality.mean_cosine": figures(-0.1)}, "mean_cosine is not between 0 and 1"),
        ({"quality.spearman": figures(-1.1)}, "spearman is not between -1 and 1"),
        ({"quality.spearman": figures("inf")}, "spearman is not between -1 and 1"),
        ({"quality.spearman_knorm": figures(0.5, N_LAYER)}, "3 numbers for 3 layers x 2 KV heads"),
        ({"quality.spearman": ("array", [1, 2])}, "quality.spearman has the wrong type"),
        ({"quality.other": ("string", "good")}, "quality.other has the wrong type"),
        ({"calibration.held_out": ("string", "4")}, "held_out is not a whole number"),
        ({"calibration.route": ("uint32", 4)}, "route is not text"),
        ({"calibration.other": ("float32", 0.5)}, "other is not text or a whole number"),
        ({"calibration.other": ("bool", True)}, "other is not text or a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_figures_and_provenance_against_the_schema_are_refused(tmp_path, keys, message):
    path = write_gguf(tmp_path / "f.gguf", filter_keys(**keys))
    with pytest.raises(QFilterError, match=message):
        schema.read(path)


def test_undefined_figures_and_those_of_unknown_names_are_kept(tmp_path):
    keys = {
        "quality.spearman": figures("nan"),
        "quality.later": figures(7, 5),
        "quality.per_layer": figures(7, N_LAYER),
        "calibration.later": ("string", "x"),
    }
    filters = schema.read(write_gguf(tmp_path / "f.gguf", filter_keys(**keys)))
    assert np.isnan(filters.quality["spearman"]).all()
    assert filters.quality["spearman"].shape == (N_LAYER, N_HEAD_KV)
    assert filters.quality["later"].tolist() == [7] * 5
    assert filters.quality["per_layer"].tolist() == [7] * N_LAYER
    assert filters.calibration == {"later": "x"}


def test_wrong_figures_are_not_written(model, tmp_path):
    filters = some_filters()
    filters.quality["spearman"] = np.zeros((N_LAYER, N_HEAD_KV + 1), np.float32)
    with pytest.raises(QFilterError, match="spearman has 9 numbers"):
        gguf_copy.write(model, tmp_path / "dst.gguf", filters)
    assert not (tmp_path / "dst.gguf").exists()


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 something else", b"GGUF"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "f.gguf"
    path.write_bytes(content)
    with pytest.raises(QFilterError, match="not a GGUF|truncated"):
        schema.read(path)
    with pytest.raises(QFilterError, match="No such file"):
        schema.read(tmp_path / "missing.gguf")


def test_the_input_is_never_the_output(model, tmp_path):
    (tmp_path / "symlink.gguf").symlink_to(model)
    os.link(model, tmp_path / "hardlink.gguf")
    digest = sha256(model)
    for dst in (model, tmp_path / "symlink.gguf", tmp_path / "hardlink.gguf"):
        with pytest.raises(QFilterError, match="the input itself"):
            gguf_copy.write(model, dst, some_filters(), force=True)
    assert sha256(model) == digest


def test_an_existing_output_is_replaced_only_with_force(model, tmp_path):
    dst = tmp_path / "dst.gguf"
    dst.write_bytes(b"precious")
    with pytest.raises(QFilterError, match="--force"):
        gguf_copy.write(model, dst, some_filters())
    assert dst.read_bytes() == b"precious"
    gguf_copy.write(model, dst, some_filters(), force=True)
    assert schema.read(dst) is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_folder_that_may_not_be_written_to_is_refused_at_once(model, tmp_path):
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # root may write anywhere: somebody else tries
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            files.check_target("model.gguf", "read_only/dst.gguf")
            os.write(write, b"accepted")
        except BaseException as error:
            os.write(write, f"{type(error).__name__} {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read) as answer:
        line = "QFilterError the folder read_only is not writable; give another output file"
        assert answer.read() == line
    folder.chmod(0o755)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_folder_as_it_was(model, tmp_path, error):
    dst = tmp_path / "dst.gguf"
    dst.write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())

    def interrupt(done, total):
        assert sorted(tmp_path.iterdir()) != before  # the new file is under way
        raise error

    with pytest.raises(error):
        gguf_copy.write(model, dst, some_filters(), force=True, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before
    assert dst.read_bytes() == b"precious"


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(model, tmp_path):
    program = textwrap.dedent("""
        import resource, sys, numpy as np
        from qfllama import config, gguf_copy, schema
        filters = schema.Filters(np.ones((3, 2, 8), np.float32), [0, 1, 2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            gguf_copy.write(sys.argv[1], sys.argv[2], filters)
        except config.QFilterError as error:
            sys.exit(str(error))
    """)
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", program, model, tmp_path / "dst.gguf"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cannot write")
    assert "File too large" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_too_little_room_is_noticed_before_writing(model, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(QFilterError, match="not enough space"):
        gguf_copy.write(
            model,
            tmp_path / "dst.gguf",
            some_filters(),
            progress=lambda *_: pytest.fail("wrote already"),
        )
    assert sorted(tmp_path.iterdir()) == before


def test_progress_goes_up_to_the_size_of_the_file(smollm2, tmp_path):
    seen = []
    gguf_copy.write(
        smollm2,
        tmp_path / "dst.gguf",
        some_filters(0, 30, 3, 64),
        progress=lambda done, total: seen.append((done, total)),
    )
    size = (tmp_path / "dst.gguf").stat().st_size
    assert seen[-1] == (size, size)
    assert len(seen) > 3
    assert seen == sorted(seen)
