"""Headers of GGUF files, whole, damaged and changed, against gguf-py."""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import HEAD_DIM, filter_keys, some_filters, write_gguf

from qfllama import gguf_copy, gguf_header, schema
from qfllama.config import QFilterError
from qfllama.shape import ModelShape, model_shape


@pytest.fixture
def model(tmp_path):
    return write_gguf(tmp_path / "model.gguf")


def test_the_shape_of_the_model_is_read_from_the_header(smollm2, model):
    assert model_shape(smollm2) == ModelShape(
        "llama", "Smollm2 135M 8k Lc100K Mix1 Ep2", 30, 9, 3, 64, 8192
    )
    assert model_shape(model).head_dim == HEAD_DIM


def test_a_table_of_positions_has_an_end(tmp_path):
    assert not model_shape(write_gguf(tmp_path / "rope.gguf")).position_table
    table = np.zeros((128, 4), np.float32)
    path = write_gguf(
        tmp_path / "table.gguf", lambda writer: writer.add_tensor("position_embd.weight", table)
    )
    shape = model_shape(path)
    assert shape.position_table
    shape.check_positions(256)  # llama.cpp rounds n_ctx up to it
    with pytest.raises(QFilterError, match="128 positions"):
        shape.check_positions(257)


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
        [
            sys.executable,
            "-c",
            "import sys, test_gguf_header as t; print(t.fuzz(sys.argv[1]))",
            path,
        ],
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


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 something else", b"GGUF"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "f.gguf"
    path.write_bytes(content)
    with pytest.raises(QFilterError, match="not a GGUF|truncated"):
        schema.read(path)
    with pytest.raises(QFilterError, match="does not exist"):
        schema.read(tmp_path / "missing.gguf")


# -- headers that are remembered


@pytest.fixture
def parsed(monkeypatch):
    """The paths of all headers that are parsed from now on."""
    paths, parse = [], gguf_header._parse

    def noting(path, buf):
        paths.append(path)
        return parse(path, buf)

    monkeypatch.setattr(gguf_header, "_parse", noting)
    return paths


def made_at(path, seconds_ago):
    """The file, as if it had been written then."""
    at = time.time() - seconds_ago
    os.utime(path, (at, at))
    return path


def test_a_header_is_parsed_once_as_long_as_its_file_stays_the_same(model, parsed):
    made_at(model, 60)
    for _ in range(3):
        assert gguf_header.scan(model).get("general.name") == "tiny"
    assert schema.read(model) is None
    assert gguf_header.parts(model) == [model]
    assert parsed == [model]


@pytest.mark.parametrize("way", ["written over", "replaced", "longer"])
def test_a_file_that_changed_is_parsed_again(model, tmp_path, way):
    made_at(model, 60)
    before = model.stat().st_mtime_ns
    assert gguf_header.scan(model).get("general.name") == "tiny"
    data = model.read_bytes().replace(b"tiny", b"huge", 1)
    if way == "written over":
        model.write_bytes(data)
        made_at(model, 30)
    else:  # at the same time
        other = tmp_path / "other.gguf"
        other.write_bytes(data + bytes(64 * (way == "longer")))
        os.replace(other, model)
        os.utime(model, ns=(before, before))
    assert gguf_header.scan(model).get("general.name") == "huge"


def test_a_file_of_this_moment_is_always_parsed_for_its_time_may_not_tell_a_change(model):
    assert gguf_header.scan(model).get("general.name") == "tiny"
    at = model.stat().st_mtime_ns
    model.write_bytes(model.read_bytes().replace(b"tiny", b"huge", 1))
    os.utime(model, ns=(at, at))
    assert gguf_header.scan(model).get("general.name") == "huge"


def test_only_the_last_few_headers_are_remembered(tmp_path, parsed):
    paths = [made_at(write_gguf(tmp_path / f"{i}.gguf"), 60) for i in range(20)]
    for path in paths:
        gguf_header.scan(path)
    gguf_header.scan(paths[-1])
    assert len(parsed) == 20
    gguf_header.scan(paths[0])
    assert len(parsed) == 21


def test_a_file_that_was_removed_is_not_remembered(model):
    made_at(model, 60)
    gguf_header.scan(model)
    model.unlink()
    with pytest.raises(QFilterError, match="does not exist"):
        gguf_header.scan(model)
