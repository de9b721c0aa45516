"""Copies of GGUF files with filters, read again with gguf-py."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import pytest
from gguf_files import sha256, some_filters, write_gguf

from qfllama import files, gguf_copy, schema
from qfllama.config import QFilterError
from qfllama.shape import model_shape


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
        import resource, sys
        from gguf_files import some_filters
        from qfllama import config, gguf_copy
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            gguf_copy.write(sys.argv[1], sys.argv[2], some_filters())
        except config.QFilterError as error:
            sys.exit(str(error))
    """)
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", program, model, tmp_path / "dst.gguf"],
        cwd=Path(__file__).parent,
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
