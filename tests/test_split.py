"""Models that are split into several GGUF files: made by gguf-py, loaded by llama.cpp."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from conftest import last_logits
from gguf_files import some_filters, stacked, write_gguf

import qfllama
from qfllama import files, gguf_copy, gguf_header, schema
from qfllama.config import QFilterError
from qfllama.shape import model_shape


def split(src, stem, max_tensors, first_without_tensors=False):
    """The GGUF file `src` as parts of at most `max_tensors` tensors beside `stem`, by gguf-py."""
    reader = gguf.GGUFReader(src)
    writer = gguf.GGUFWriter(
        stem,
        reader.fields["general.architecture"].contents(),
        split_max_tensors=max_tensors,
        small_first_shard=first_without_tensors,
    )
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), *field.types[:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(stem.parent.glob(f"{stem.stem}-*-of-*.gguf"))


@pytest.fixture(params=[False, True], ids=["plain", "first part without tensors"])
def parts(request, tmp_path):
    """4 tensors in three or four parts."""
    folder = tmp_path / "split"
    folder.mkdir()
    whole = write_gguf(tmp_path / "whole.gguf")
    parts = split(whole, folder / "model.gguf", 2 if request.param else 1, request.param)
    assert len(parts) == (3 if request.param else 4)
    return parts


def content(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(paths):
    return {
        tensor.name: (tensor.tensor_type, tensor.data.tobytes())
        for path in paths
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_any_part_stands_for_the_model(parts):
    for part in parts:
        assert gguf_header.parts(part) == parts
        assert model_shape(part) == model_shape(parts[0])
        assert model_shape(part).n_layer == 3
        assert schema.read(part) is None


def test_a_whole_file_is_its_only_part(tmp_path):
    path = write_gguf(tmp_path / "model-00001-of-00003.gguf")
    assert gguf_header.parts(path) == [path]


def test_filters_go_to_the_first_part_and_the_others_stay_as_they_are(parts, tmp_path):
    before, seen = content(parts[0].parent), []
    written = gguf_copy.write(
        parts[1],
        tmp_path / "out.gguf",
        some_filters(),
        progress=lambda done, total: seen.append((done, total)),
    )
    n = len(parts)
    assert [path.name for path in written] == [f"out-{i + 1:05}-of-{n:05}.gguf" for i in range(n)]
    assert sorted(tmp_path.glob("*out*")) == written
    assert content(parts[0].parent) == before
    for old, new in zip(parts[1:], written[1:], strict=True):
        assert old.read_bytes() == new.read_bytes()
    assert tensors(written) == tensors(parts)
    old, new = (gguf.GGUFReader(paths[0]).fields for paths in (parts, written))
    for name in old:
        if not name.startswith("GGUF."):
            assert old[name].types == new[name].types
            assert old[name].contents() == new[name].contents()
    assert new["split.count"].contents() == n
    for part in written:
        np.testing.assert_array_equal(stacked(schema.read(part)), stacked(some_filters()))
    size = sum(path.stat().st_size for path in written)
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


def test_the_names_that_llama_cpp_finds_are_made_of_the_name_given(tmp_path):
    for given in ("out.gguf", "out", "out-00001-of-00003.gguf", "out-00002-of-00007.gguf"):
        names = [path.name for path in gguf_header.part_paths(tmp_path / given, 3)]
        assert names == [f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for given in ("out.gguf", "out-00001-of-00003.gguf"):
        assert gguf_header.part_paths(tmp_path / given, 1) == [tmp_path / given]
    # the same as llama.cpp's own function says
    path = (llama_cpp.ctypes.c_char * 100)()
    llama_cpp.llama_split_path(path, 100, b"a/b.c", 1, 3)
    assert path.value.decode() == str(gguf_header.part_paths("a/b.c.gguf", 3)[1])


def test_missing_parts_are_named(parts, tmp_path):
    parts[1].unlink()
    with pytest.raises(QFilterError, match=re.escape(f"{parts[1]} of the {len(parts)} parts")):
        gguf_copy.write(parts[0], tmp_path / "out.gguf", some_filters())
    parts[2].unlink()
    with pytest.raises(QFilterError, match=f"{parts[1].name} and 1 more"):
        gguf_header.parts(parts[0])
    last = shutil.copy(parts[0], parts[0].with_name("alone.gguf"))
    with pytest.raises(QFilterError, match="not called NAME-00001-of"):
        gguf_header.parts(last)


def test_a_later_part_without_the_first_is_refused(parts):
    parts[0].unlink()
    for use in (schema.read, model_shape, gguf_header.parts):
        with pytest.raises(QFilterError, match=f"{parts[0].name}.* is missing"):
            use(parts[1])


def test_a_truncated_later_part_is_refused_by_name(parts, tmp_path):
    data = parts[-1].read_bytes()
    parts[-1].write_bytes(data[:-40])
    with pytest.raises(QFilterError, match=f"{parts[-1].name} is truncated"):
        gguf_copy.write(parts[0], tmp_path / "out.gguf", some_filters())
    parts[-1].write_bytes(b"")
    with pytest.raises(QFilterError, match=f"{parts[-1].name}: not a GGUF"):
        gguf_header.parts(parts[0])
    assert not list(tmp_path.glob("*out*"))


def test_parts_of_another_model_are_refused(parts, tmp_path):
    shutil.copy(parts[-1], parts[-2])
    with pytest.raises(QFilterError, match=f"{parts[-2].name} is not part {len(parts) - 1}"):
        gguf_header.parts(parts[0])
    whole = write_gguf(tmp_path / "whole.gguf")
    shutil.copy(whole, parts[-2])
    with pytest.raises(QFilterError, match=f"{parts[-2].name} is not part"):
        gguf_header.parts(parts[0])


def test_parts_with_too_few_or_the_same_tensors_are_refused(parts):
    data = parts[-1].read_bytes()
    names = [tensor.name for tensor in gguf.GGUFReader(parts[-1]).tensors]
    at = data.index(names[0].encode())
    parts[-1].write_bytes(data[:at] + b"a" + data[at + 1 :])  # now a.weight, the first one's name
    with pytest.raises(QFilterError, match="have 3 tensors, the model has 4"):
        gguf_header.parts(parts[0])


def test_every_output_is_checked_before_anything_is_written(parts, tmp_path):
    later = tmp_path / parts[1].name.replace("model", "out")
    later.write_text("precious")
    before = content(tmp_path / "split")
    with pytest.raises(QFilterError, match=f"{later.name} exists; replace it with --force"):
        files.check_target(parts[0], tmp_path / "out.gguf")
    files.check_target(parts[0], tmp_path / "out.gguf", whole=True)
    with pytest.raises(QFilterError, match="--force"):
        gguf_copy.write(parts[0], tmp_path / "out.gguf", some_filters())
    for name in ("model.gguf", parts[1].name):
        with pytest.raises(QFilterError, match="the input itself"):
            gguf_copy.write(parts[0], parts[0].with_name(name), some_filters(), force=True)
    assert later.read_text() == "precious"
    assert content(tmp_path / "split") == before
    written = gguf_copy.write(parts[0], tmp_path / "out.gguf", some_filters(), force=True)
    assert written == files.targets(parts[0], tmp_path / "out.gguf")
    assert tensors(written) == tensors(parts)


def test_old_filters_of_a_split_model_are_replaced_only_with_force(parts, tmp_path):
    once = gguf_copy.write(parts[0], tmp_path / "once.gguf", some_filters(1))
    for part in once:
        with pytest.raises(QFilterError, match="--force"):
            schema.check_source(part)
    twice = gguf_copy.write(once[1], tmp_path / "twice.gguf", some_filters(2), force=True)
    fresh = gguf_copy.write(parts[0], tmp_path / "fresh.gguf", some_filters(2))
    assert [p.read_bytes() for p in twice] == [p.read_bytes() for p in fresh]


def test_room_is_needed_for_all_parts(parts, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in parts)
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(QFilterError, match="not enough space"):
        gguf_copy.write(parts[0], tmp_path / "out.gguf", some_filters())


@pytest.mark.parametrize("existing", [[], [0, 1, 2], [1]], ids=["new", "replaced", "mixed"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_a_write_that_stops_at_any_rename_leaves_the_folder_as_it_was(
    existing, error, tmp_path, monkeypatch
):
    parts = split(write_gguf(tmp_path / "whole.gguf"), tmp_path / "model.gguf", 2, True)
    out = tmp_path / "out"
    out.mkdir()
    targets = files.targets(parts[0], out / "out.gguf")
    for i in existing:
        targets[i].write_text(f"precious {i}")
    before, rename, n_renames = content(out), os.replace, len(existing) + len(targets)
    for stop in range(n_renames):
        calls = []

        def replace(src, dst, calls=calls, stop=stop):
            calls.append(dst)
            if len(calls) == stop + 1:
                raise error
            rename(src, dst)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises((KeyboardInterrupt, QFilterError)):
            gguf_copy.write(parts[0], out / "out.gguf", some_filters(), force=True)
        assert content(out) == before
    monkeypatch.setattr(os, "replace", lambda src, dst: (calls.append(dst), rename(src, dst)))
    calls.clear()
    written = gguf_copy.write(parts[0], out / "out.gguf", some_filters(), force=True)
    assert len(calls) == n_renames
    assert calls[-1] == written[0]  # without the first part no other is loaded
    assert sorted(out.iterdir()) == written


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_disk_that_fills_up_at_a_later_part_leaves_the_folder_as_it_was(parts, tmp_path):
    program = textwrap.dedent("""
        import resource, sys
        from gguf_files import some_filters
        from qfllama import config, gguf_copy
        limit = int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            gguf_copy.write(sys.argv[1], sys.argv[2], some_filters())
        except config.QFilterError as error:
            sys.exit(str(error))
    """)
    with open(parts[1], "ab") as file:
        file.write(bytes(5000))  # padding is allowed; now only this part is too large
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, parts[0], tmp_path / "out" / "out.gguf", "4000"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cannot write")
    assert "File too large" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture(scope="module")
def real_parts(smollm2, tmp_path_factory):
    return split(smollm2, tmp_path_factory.mktemp("smollm2") / "smollm2.gguf", 100)


def logits(llm):
    llm.eval(llm.tokenize(b"Once upon a time there was a king who had three daughters."))
    return last_logits(llm)


def test_llama_cpp_loads_the_converted_parts_and_computes_the_same(smollm2, real_parts, tmp_path):
    assert len(real_parts) == 3
    filters = some_filters(0, 30, 3, 64)
    written = gguf_copy.write(real_parts[2], tmp_path / "out.gguf", filters)
    for old, new in zip(real_parts[1:], written[1:], strict=True):
        old, new = (hashlib.sha256(path.read_bytes()).digest() for path in (old, new))
        assert old == new
    threads = {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 256, "verbose": False}
    threads["flash_attn"] = True  # as a bounded cache has it
    expected = logits(llama_cpp.Llama(str(smollm2), **threads))
    np.testing.assert_array_equal(logits(llama_cpp.Llama(str(written[0]), **threads)), expected)
    config = qfllama.QFilterConfig(max_length=200)
    bounded = qfllama.Llama(str(written[0]), qfilters=config, **threads)
    np.testing.assert_array_equal(logits(bounded), expected)
