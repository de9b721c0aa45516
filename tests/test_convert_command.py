"""`qfllama convert` and `qfllama inspect` from the command line: good runs, bad input, Ctrl-C."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from gguf_files import expected_fingerprint, stacked
from qfllama.convert import choose, export, pipeline, source, text

from qfllama import Llama, QFilterConfig, schema
from qfllama.cli import main
from qfllama.config import QFilterError
from qfllama.context import NoMemory
from qfllama.shape import model_shape

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--max-seq-len", "128", "--num-sequences", "4", "--num-samples", "200"]
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from qfllama.cli import main; main()"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny_models.write_llama(folder, n_layer=2)
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint):
    """(the GGUF that the command made of `checkpoint`, what it printed)."""
    out = checkpoint.parent / "tiny.gguf"
    return out, run(checkpoint, out, *QUICK).stdout


def run(src, out, *options):
    result = CliRunner().invoke(main, ["convert", str(src), "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    """The one line that a run ends with, which it must with exit code 2."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == "", result.output
    assert result.stderr.count("\n") == 1, result.output
    return result.stderr


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def small_gguf(path, arch="llama", extra=lambda writer: None):
    """A GGUF without a tokenizer."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    extra(writer)
    writer.add_tensor("blk.0.attn_k.weight", np.ones((16, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_checkpoint_becomes_a_gguf_with_filters_and_their_provenance(checkpoint, converted):
    out, printed = converted
    filters = schema.read(out)
    assert stacked(filters).shape == (2, 2, 16)
    assert (filters.version, filters.layout) == (3, "norm")
    assert filters.fingerprint == expected_fingerprint(out)
    assert filters.layers == [0, 1]
    facts = dict(filters.calibration)
    assert facts.pop("text").startswith("pydoc_data.topics")
    assert facts.pop("tool").startswith("qfllama ")
    assert facts == {
        "sequences": 4,
        "held_out": 1,
        "tokens": 512,
        "samples": 200,
        "seed": 0,
        "route": "torch",
        "model_sha256": sha256(checkpoint / "model.safetensors"),
    }
    assert f"{out}: " in printed
    assert "2 layers x 2 KV heads x 16" in printed
    assert "200 queries per head out of 512 tokens" in printed
    assert sorted(path.name for path in out.parent.iterdir()) == ["checkpoint", "tiny.gguf"]


def test_a_gguf_is_converted_without_being_touched(converted, tmp_path):
    src, out = tmp_path / "src.gguf", tmp_path / "out.gguf"
    shutil.copy(converted[0], src)
    digest = sha256(src)
    run(src, out, *QUICK, "--force")
    assert sha256(src) == digest
    assert schema.read(out).calibration["model_sha256"] == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "src.gguf"]


def test_there_are_second_moments_only_where_a_rank_asks_for_them(converted, tmp_path):
    assert schema.read(converted[0]).requires == ["queries"]
    for rank in (3, 0):
        run(converted[0], tmp_path / f"{rank}.gguf", *QUICK, "--force", "--rank", rank)
    low, none = (schema.read(tmp_path / name) for name in ("3.gguf", "0.gguf"))
    assert stacked(low, "moments").shape == (2, 6, 1 + 3, 16)
    assert (low.requires, none.requires) == (["queries", "moments"], ["queries"])
    np.testing.assert_array_equal(stacked(low), stacked(none))
    np.testing.assert_array_equal(stacked(low, "queries"), stacked(none, "queries"))
    assert stacked(none, "queries").shape == stacked(none).shape
    with pytest.raises(QFilterError, match="moments.*--rank.*--force"):
        Llama(str(tmp_path / "0.gguf"), qfilters=QFilterConfig(policy="qfilters2"), verbose=False)
    small = QFilterConfig(max_length=128, policy="qfilters2")
    llm = Llama(str(tmp_path / "3.gguf"), qfilters=small, n_ctx=256, verbose=False)
    llm.eval(list(range(3, 203)))
    assert llm.qfilter_stats()["evictions"] == 2
    llm.close()


def test_a_checkpoint_is_quantized_on_the_way(checkpoint, converted, tmp_path):
    run(checkpoint, tmp_path / "out.gguf", *QUICK, "--quantize", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.attn_k.weight"] == "Q8_0"
    # the filters are those of the unquantized weights
    np.testing.assert_array_equal(
        stacked(schema.read(tmp_path / "out.gguf")), stacked(schema.read(converted[0]))
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_gguf_in_full_precision_is_quantized_on_the_way(converted, tmp_path):
    run(converted[0], tmp_path / "out.gguf", *QUICK, "--quantize", "Q8_0", "--force")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.attn_k.weight"] == "Q8_0"
    assert stacked(schema.read(tmp_path / "out.gguf")).shape == (2, 2, 16)


def test_the_same_seed_gives_the_same_file_and_another_seed_does_not(converted, tmp_path):
    for name, seed in ("a", "5"), ("b", "5"), ("c", "6"):
        run(converted[0], tmp_path / name, *QUICK, "--force", "--seed", seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not np.array_equal(
        stacked(schema.read(tmp_path / "a")), stacked(schema.read(tmp_path / "c"))
    )


def test_a_large_seed_and_a_test_that_fails_do_not_lose_the_filters(
    converted, tmp_path, monkeypatch
):
    monkeypatch.setattr(choose, "LENGTH", 400)
    done = run(converted[0], tmp_path / "a", *QUICK, "--force", "--seed", "5000000000")
    assert "loss of numbers hidden in text" in done.stderr

    def no_memory(*args):
        raise NoMemory("no memory for a cache")

    monkeypatch.setattr(choose, "losses", no_memory)
    done = run(converted[0], tmp_path / "b", *QUICK, "--force", "--seed", "5000000000")
    assert "no test of policies (no memory for a cache): qblend is the policy" in done.stderr
    first, second = (schema.read(tmp_path / name) for name in "ab")
    np.testing.assert_array_equal(stacked(first), stacked(second))
    assert second.policy is None


def test_text_files_are_used_in_turns_and_named(converted, tmp_path):
    (tmp_path / "one.txt").write_text("Once upon a time there was a king. " * 100)
    (tmp_path / "two.txt").write_text("The committee met again on Thursday. " * 100)
    run(
        converted[0],
        tmp_path / "out.gguf",
        *QUICK,
        "--force",
        "--text",
        tmp_path / "one.txt",
        "--text",
        tmp_path / "two.txt",
    )
    assert schema.read(tmp_path / "out.gguf").calibration["text"] == "one.txt, two.txt"


def test_too_little_text_is_said_and_what_there_is_is_used(converted, tmp_path):
    (tmp_path / "short.txt").write_text("Once upon a time there was a king. " * 20)
    result = run(
        converted[0],
        tmp_path / "out.gguf",
        "--max-seq-len",
        "128",
        "--force",
        "--text",
        tmp_path / "short.txt",
    )
    facts = schema.read(tmp_path / "out.gguf").calibration
    assert "fewer than the 768 asked for" in result.stderr
    assert 256 <= facts["tokens"] < 768
    assert facts["held_out"] >= 1
    assert facts["samples"] == facts["tokens"] - 128 * facts["held_out"]


def test_sequences_are_not_longer_than_the_model_was_trained_for(converted, tmp_path):
    result = run(
        converted[0],
        tmp_path / "out.gguf",
        "--max-seq-len",
        "1024",
        "--force",
        "--num-sequences",
        "1",
    )
    assert "trained for 512 positions" in result.stderr
    assert schema.read(tmp_path / "out.gguf").calibration["tokens"] == 512


def test_the_built_in_text_is_enough_for_the_default_and_starts_with_prose(smollm2):
    sequences = text.sequences(smollm2, [text.builtin()], 20, 2048)
    assert [len(tokens) for tokens in sequences] == [2048] * 20
    assert len({tuple(tokens[:50]) for tokens in sequences}) == 20
    assert next(text.builtin().pieces).startswith("Assert statements are a convenient way")


def test_sequences_start_with_the_models_bos_token_where_it_has_one(converted, smollm2):
    assert [s[0] for s in text.sequences(converted[0], [text.builtin()], 3, 100)] == [1, 1, 1]
    plain = text.sequences(smollm2, [text.builtin()], 3, 100)
    joined = text.sequences(smollm2, [text.builtin()], 1, 300)
    assert plain[0] + plain[1] + plain[2] == joined[0]


def test_inspect_shows_the_shape_and_where_filters_come_from(converted, smollm2):
    shown = CliRunner().invoke(main, ["inspect", str(converted[0])]).stdout
    assert "llama, 2 layers, 6 heads, 2 KV heads of 16" in shown
    assert "filters: 2 layers x 2 KV heads x 16" in shown
    assert "pydoc_data.topics" in shown
    plain = CliRunner().invoke(main, ["inspect", str(smollm2)]).stdout
    assert "30 layers, 9 heads, 3 KV heads of 64" in plain
    assert "no filters" in plain


def test_inspect_prints_json(converted, smollm2):
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(converted[0]), "--json"]).stdout)
    assert facts["model"]["n_head_kv"] == 2
    assert facts["filters"]["head_count_kv"] == [2, 2]
    assert facts["filters"]["head_dim"] == [16, 16]
    assert facts["filters"]["calibration"] == schema.read(converted[0]).calibration
    plain = json.loads(CliRunner().invoke(main, ["inspect", str(smollm2), "--json"]).stdout)
    assert plain["filters"] is None


def test_bad_ggufs_are_refused_in_one_line(tmp_path, smollm2):
    out = tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    (tmp_path / "text.gguf").write_text("once upon a time")
    (tmp_path / "cut.gguf").write_bytes(smollm2.read_bytes()[:50_000_000])
    (tmp_path / "vocab.gguf").write_bytes(
        smollm2.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.lost_it"[:21])
    )
    small_gguf(tmp_path / "new.gguf", "zebra", extra=lambda w: w.add_tokenizer_model("llama"))
    small_gguf(tmp_path / "plain.gguf")
    small_gguf(
        tmp_path / "part.gguf",
        extra=lambda w: (w.add_tokenizer_model("llama"), w.add_uint16("split.count", 3)),
    )
    for name, words in {
        "missing.gguf": ["does not exist"],
        "text.gguf": ["not a GGUF"],
        "cut.gguf": ["truncated", "50,000,000"],
        "new.gguf": ["zebra"],
        "part.gguf": ["of 3"],
        "plain.gguf": ["no tokenizer"],
        "vocab.gguf": ["llama.cpp cannot load", "merges"],
    }.items():
        line = refused("convert", tmp_path / name, "-o", out)
        assert all(word in line for word in words), line
        assert list(out.parent.iterdir()) == []
    assert "not a GGUF" in refused("inspect", tmp_path / "text.gguf")


def test_bad_checkpoints_are_refused_in_one_line(tmp_path, checkpoint):
    out = tmp_path / "out.gguf"
    bad = tmp_path / "bad"
    bad.mkdir()
    assert "no config.json" in refused("convert", bad, "-o", out)
    (bad / "config.json").write_text("{")
    assert "damaged" in refused("convert", bad, "-o", out)
    (bad / "config.json").write_text('{"model_type": "qwen3"}')
    assert "qwen3" in refused("convert", bad, "-o", out)
    shutil.copy(checkpoint / "config.json", bad)
    assert "no model.safetensors" in refused("convert", bad, "-o", out)
    shards = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (bad / "model.safetensors.index.json").write_text(json.dumps(shards))
    (bad / "model-00001-of-00002.safetensors").touch()
    line = refused("convert", bad, "-o", out)
    assert "lacks model-00002-of-00002.safetensors (1 of 2" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_a_config_that_may_not_be_read_is_not_called_missing(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").mkdir()  # unreadable for root, too
    line = refused("convert", tmp_path / "bad", "-o", tmp_path / "out.gguf")
    assert "cannot read" in line and "config.json" in line and "has no" not in line


def test_names_that_start_with_a_dash_are_no_options_of_upstreams_converter(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "-model")
    os.mkdir("-out")
    export.checkpoint_to_gguf(Path("-model"), Path("-out") / "out.gguf", "f32")
    assert model_shape(tmp_path / "-out" / "out.gguf").n_layer == 2


def test_a_temporary_folder_goes_even_if_removing_it_is_interrupted(tmp_path, monkeypatch):
    remove, calls = os.rmdir, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(*args, **kwargs)

    monkeypatch.setattr(os, "rmdir", interrupted)
    with pytest.raises(KeyboardInterrupt), pipeline._workspace(tmp_path / "out.gguf") as folder:
        Path(folder, "model.gguf").write_text("large")
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_upstreams_converter_refuses_is_refused_with_its_words(
    tmp_path, checkpoint
):
    shutil.copytree(checkpoint, tmp_path / "no_tokenizer")
    (tmp_path / "no_tokenizer" / "tokenizer.model").unlink()
    line = refused("convert", tmp_path / "no_tokenizer", "-o", tmp_path / "out.gguf")
    assert "llama.cpp's converter cannot convert" in line
    assert len(line) < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no_tokenizer"]


def test_options_that_cannot_work_are_refused_in_one_line(tmp_path, converted, smollm2):
    src, out = converted[0], tmp_path / "out.gguf"
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1") * 100)
    (tmp_path / "few.txt").write_text("Too little to calibrate on.")
    (tmp_path / "there.gguf").write_text("precious")
    before = sorted(tmp_path.iterdir())
    for words, arguments in {
        "already has filters --force": [src, "-o", out],
        "exists --force": [smollm2, "-o", tmp_path / "there.gguf"],
        "input itself": [src, "-o", src, "--force"],
        "does not exist; create it": [smollm2, "-o", tmp_path / "no" / "out.gguf"],
        "is a folder": [smollm2, "-o", tmp_path],
        "name of a folder": [smollm2, "-o", f"{tmp_path}/new/"],
        "no text file": [smollm2, "-o", out, "--text", tmp_path / "none.txt"],
        "not UTF-8": [smollm2, "-o", out, "--text", tmp_path / "latin.txt"],
        "at least 256": [smollm2, "-o", out, "--text", tmp_path / "few.txt"],
        "exclude each other": [smollm2, "-o", out, "--text", "a", "--dataset", "b"],
        "unknown quantization Q4_K_X Q4_K_M": [smollm2, "-o", out, "--quantize", "Q4_K_X"],
        "quantized already": [smollm2, "-o", out, "--quantize", "Q4_K_M"],
        "--num-samples": [smollm2, "-o", out, "--num-samples", "0"],
        "--output": [smollm2],
    }.items():
        line = refused("convert", *arguments)
        assert all(word in line for word in words.split()), (words, line)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.gguf").read_text() == "precious"


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="it is installed")
def test_a_dataset_without_the_package_for_it_is_refused_with_what_to_install(smollm2, tmp_path):
    line = refused("convert", smollm2, "-o", tmp_path / "out.gguf", "--dataset", "user/name")
    assert "pip install 'qfllama[dataset]'" in line


def test_a_hub_id_without_the_package_for_it_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(QFilterError, match=r"user/name is no file .* 'qfllama\[convert\]'"):
        source.resolve("user/name")


def test_a_hub_id_that_cannot_be_reached_is_refused_with_the_cause(tmp_path):
    nobody_listens = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "convert", "user/name", "-o", tmp_path / "out.gguf"],
        env=os.environ | nobody_listens,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "user/name" in done.stderr
    assert "refused" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("stop", "code", "times"),
    [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 6)],
)
@pytest.mark.parametrize(
    ("source", "moment"),
    [
        ("checkpoint", "upstream's converter starts"),
        ("checkpoint", "its file is there"),
        ("gguf", "the model is loaded"),
        ("gguf", "it reads text"),
    ],
)
def test_an_interrupted_conversion_leaves_nothing_behind(
    source, moment, stop, code, times, request, tmp_path, smollm2
):
    """times: an impatient user presses Ctrl-C more than once, and cleaning up is not interrupted"""
    src = request.getfixturevalue("checkpoint") if source == "checkpoint" else smollm2
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "convert", src, "-o", tmp_path / "out.gguf"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def under_way():
        files = list(tmp_path.rglob("*"))
        return len(files) == 2 if moment == "its file is there" else len(files) == 1

    until = time.monotonic() + 60
    while not under_way() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert under_way()
    if moment != "its file is there":
        time.sleep(4.0 if moment == "it reads text" else 0.5)
    assert process.poll() is None
    for _ in range(times):
        process.send_signal(stop)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
