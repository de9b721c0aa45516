"""doctor: what it finds where all is well, and that it finds what isn't."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import headers
import llama_cpp
import numpy as np
import pytest
from bounded import Bounded
from click.testing import CliRunner

import qfllama
from qfllama import QFilterConfig, native, selftest
from qfllama.cli import main
from qfllama.commands.doctor import lines
from qfllama.context import CACHE_TYPES
from qfllama.doctor import examine
from qfllama.engine import Model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    selftest.write_model(path)
    return path


@pytest.fixture
def context(tiny):
    """A function that opens an empty context as the self-test does, with another policy or file."""
    opened = []

    def open_(policy, path=tiny, flags=0, **sizes):
        sizes = {
            "max_length": selftest.N_CELLS, "sinks": selftest.SINKS,
            "window_length": selftest.WINDOW, "interval": selftest.INTERVAL,
        } | sizes  # fmt: skip
        opened.append(Model(path))
        opened.append(Bounded(opened[-1], QFilterConfig(policy=policy, **sizes), flags=flags))
        return opened[-1]

    yield open_
    for thing in reversed(opened):
        thing.close()


def doctor(*words):
    return CliRunner().invoke(main, ["doctor", *map(str, words), "--threads", "1"])


def found_by(*words, code=0):
    result = doctor(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def failed(found):
    return [check for check in found["checks"] if not check["ok"]]


# -- where all is well


@pytest.mark.wheel
def test_a_working_engine_passes_with_what_an_issue_should_tell():
    found = found_by()
    assert found["ok"] and found["model"] is None
    assert {"engine", "eviction", "recall"} == {check["name"] for check in found["checks"]}
    assert found["engine"]["c_api"] == native.ABI_VERSION
    assert found["engine"]["version"] == llama_cpp.__version__
    assert any(device["kind"] == "CPU" for device in found["devices"])
    text = doctor().stdout
    assert "FAILED" not in text and text.count("\nok ") == len(found["checks"])
    for fact in (found["versions"]["qfllama"], found["engine"]["build"], *found["backends"]):
        assert fact in text


@pytest.mark.parametrize("types", [("q8_0", "q4_0"), ("bf16", "f32"), ("iq4_nl", "q5_1")])
def test_any_type_of_cache_passes(types):
    assert found_by("--type-k", types[0], "--type-v", types[1])["ok"]


def test_a_model_is_described_and_run(tiny):
    found = found_by(tiny)
    model = found["model"]
    assert (model["supported"], model["evicting_layers"], model["layers"]) == (True, 2, 2)
    assert "kvdiff" in model["filters"]  # it has none, which is no failure
    (attention,) = model["flash_attention"]
    assert (attention["n_head"], attention["n_head_kv"], attention["dim_k"]) == (4, 2, 64)
    assert attention["prompt"] and attention["one_token"]
    where = [check["where"] for check in found["checks"] if check["name"] == "recall"]
    assert (where[0], where[-1]) == ("small model, CPU", "model")
    assert "heads of 64: yes" in doctor(tiny).stdout


@pytest.mark.slow
def test_a_real_model_passes(smollm2_filtered):
    found = found_by(smollm2_filtered, "--type-k", "q8_0")
    assert found["model"]["evicting_layers"] == 30
    assert "filters" in {check["name"] for check in found["checks"]}


def test_the_right_outcome_is_that_of_graphs_as_on_a_device_too(context):
    flags = native.FLAG_GRAPH_GATHER
    assert "shortest" in selftest.check_eviction(context("knorm", flags=flags))
    text = selftest.check_recall(context("streaming", flags=flags), made_here=True)
    assert all(str(position) in text for position in selftest.NEEDLES)


# -- what is wrong is found


@pytest.mark.parametrize(
    ("policy", "sizes"),
    [
        ("random", {}),
        ("streaming", {}),
        ("kvdiff", {}),
        ("knorm", {"sinks": 2, "window_length": 8}),
        ("knorm", {"interval": 63}),
    ],
)
def test_an_eviction_that_keeps_others_is_found(context, policy, sizes):
    with pytest.raises(selftest.Wrong):
        selftest.check_eviction(context(policy, **sizes))


def test_a_row_that_is_not_in_the_archive_is_found(context):
    with pytest.raises(selftest.Wrong, match="archive"):
        selftest.check_eviction(context("knorm", archive=False))


def test_rows_that_changed_when_they_moved_are_found(context):
    ctx = context("knorm")
    stored = ctx.rows

    def with_a_flipped_bit(il, seq=0):
        k, v = stored(il, seq)
        if ctx.stats().n_evictions:
            v[5, 3] ^= 1
        return k, v

    ctx.rows = with_a_flipped_bit
    with pytest.raises(selftest.Wrong, match="layer 0, KV head 0: rows changed"):
        selftest.check_eviction(ctx)


def test_a_recall_that_brings_others_back_is_found(context, tmp_path):
    """A model whose queries look anywhere: with Q of another random projection than K."""
    path = tmp_path / "blind.gguf"
    selftest.write_model(path)
    data = gguf.GGUFReader(path, "r+")
    for tensor in data.tensors:
        if "attn_q" in tensor.name:
            tensor.data[:] = np.random.default_rng(9).normal(size=tensor.data.shape) * 0.17
    del data
    with pytest.raises(selftest.Wrong, match="did not come back"):
        selftest.check_recall(context("streaming", path), made_here=True)
    assert "came back" in selftest.check_recall(context("streaming", path), made_here=False)


def test_a_recall_of_nothing_is_found(context):
    with pytest.raises(selftest.Wrong, match="nothing came back"):
        selftest.check_recall(context("streaming", archive=False), made_here=False)
    with pytest.raises(selftest.Wrong, match="nothing came back"):
        selftest.check_recall(context("streaming", recall=False), made_here=False)


def test_an_outcome_that_is_wrong_makes_doctor_fail(monkeypatch):
    """The self-test with a policy other than the one that it knows the outcome of."""
    config = selftest.QFilterConfig
    monkeypatch.setattr(
        selftest, "QFilterConfig", lambda **sizes: config(**sizes | {"policy": "random"})
    )
    found = found_by(code=1)
    assert not found["ok"]
    assert [check["name"] for check in failed(found)] == ["eviction", "recall"]
    result = doctor()
    assert result.exit_code == 1 and result.stdout.count("\nFAILED ") == 2


def test_a_model_that_is_not_supported_is_named_with_the_reason(tmp_path):
    path = headers.mamba(tmp_path / "mamba.gguf")
    found = found_by(path, code=1)
    (check,) = failed(found)
    assert check["name"] == "supported" and "recurrent" in check["text"]
    assert found["model"]["why"] == check["text"]
    odd = headers.llama(tmp_path / "odd.gguf", n_layer=1, width=96, n_head=4, n_head_kv=4)
    assert "type_v" in found_by(odd, "--type-v", "q8_0", code=1)["model"]["why"]
    new = {"block_count": 1, "embedding_length": 8, "attention.head_count": 1}
    path = headers.write(tmp_path / "new.gguf", "nextyears", new, {"token_embd.weight": (8, 8)})
    assert "nextyears" in found_by(path, code=1)["model"]["why"]


def test_attention_that_a_device_lacks_is_said(tiny):
    found = examine(tiny, type_v="q4_0")
    found["model"]["flash_attention"][0] |= {"device": "GPU7", "one_token": False}
    (line,) = [line for line in lines(found) if "GPU7" in line]
    assert all(word in line for word in ("single tokens", "q4_0", "CPU", "--type-v f16"))
    assert "prompts" not in line


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('raise OSError("libcudart.so.12: cannot open shared object file")', "libcudart.so.12"),
        ("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")", "No module named"),
    ],
)
def test_an_engine_that_does_not_load_is_a_finding(tmp_path, content, reason):
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(content)
    paths = [str(tmp_path), str(Path(qfllama.__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, "-c", "from qfllama.cli import main; main()", "doctor"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "FAILED engine" in done.stdout and reason in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_what_is_no_model_is_an_error_in_one_line(tmp_path):
    for words, fact in (
        ([tmp_path / "none.gguf"], "none.gguf"),
        ([__file__], "GGUF"),
        (["--type-k", "q3"], "q8_0"),
    ):
        result = doctor(*words)
        assert result.exit_code == 2 and not result.stdout
        (line,) = result.stderr.splitlines()
        assert fact in line


def test_the_home_directory_is_not_shown(tiny, tmp_path, monkeypatch):
    home = tmp_path / "jane"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    shutil.copy(tiny, home / "model.gguf")
    headers.mamba(home / "mamba.gguf")
    for name, code in (("model.gguf", 0), ("mamba.gguf", 1)):
        for path in (home / name, tmp_path / "link" / name):
            for words in ((), ("--json",)):
                result = doctor(path, *words)
                assert result.exit_code == code
                assert f"~/{name}" in result.stdout
                assert str(home) not in result.stdout and str(tmp_path) not in result.stdout


def test_every_type_of_cache_can_be_asked_about():
    """The CPU has Flash Attention for all of them."""
    from qfllama import backends

    (cpu,) = [device for device in backends.devices() if device.kind == "CPU"]
    for kind in CACHE_TYPES.values():
        assert backends.has_flash_attention(
            cpu, n_head=8, n_head_kv=2, dim_k=64, dim_v=64, type_k=kind, type_v=kind, n_tokens=7
        )
