"""`qfllama eval kld` and `eval ladder`: against torch, stock llama.cpp, `Llama` and each other."""

import json
from pydoc_data.topics import topics

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from conftest import last_logits
from reference.engine import run as reference_run
from reference.families import FamilyCache, FamilyModel
from transformers import AutoModelForCausalLM

from qfllama import Llama, QFilterConfig
from qfllama.cli import main
from qfllama.engine import Model
from qfllama.evaluation import kld, perplexity, tasks
from qfllama.evaluation.results import bootstrap_percentiles
from qfllama.evaluation.scoring import divergence

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 200
SIZES = ["--window-length", 20, "--interval", 24]
BOUND = {"max_length": 96, "window_length": 20, "sinks": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints and GGUF files: heads of 64, and a model with windowed layers; and a text, much
    shorter than the default one."""
    path = tmp_path_factory.mktemp("kld")
    (path / "text").write_text("\n".join(topics[name] for name in sorted(topics)[:20]), "utf-8")
    tiny_models.write("qwen3", path / "qwen3", head_dim=64)
    tiny_models.write("gemma3", path / "gemma3")
    tiny_models.convert([path / "qwen3", path / "gemma3"])
    return path


@pytest.fixture(scope="module")
def tiny(folder):
    return folder / "qwen3.gguf"


def run(task, model, *options):
    words = ["eval", task, model, "--threads", 1, "--text", model.with_name("text"), *options]
    return CliRunner().invoke(main, list(map(str, words)))


def report(task, model, tmp_path, *options):
    path = tmp_path / "report.json"
    result = run(task, model, *options, "--json", path)
    assert result.exit_code == 0, result.stderr or result.exception
    return json.loads(path.read_text())


def texts(path, count, length=LENGTH):
    with Model(path) as model:
        return perplexity.texts(model, tasks.read_text(path.with_name("text")), count, length)


def torch_divergence(logits, others):
    """float64 [n], by torch's own kl_div."""
    logs = [torch.from_numpy(np.asarray(x)).double().log_softmax(-1) for x in (others, logits)]
    return torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1).numpy()


# -- the numbers


def test_a_divergence_is_that_of_torch():
    rng = np.random.default_rng(0)
    logits = (6 * rng.standard_normal((70, 1000))).astype(np.float32)
    others = (logits + rng.uniform(0, 2, (70, 1)) * rng.standard_normal((70, 1000))).astype("f4")
    found, same = divergence(logits, others)
    assert found == pytest.approx(torch_divergence(logits, others), rel=1e-5, abs=1e-6)
    assert same.tolist() == (logits.argmax(1) == others.argmax(1)).tolist()
    assert 0 < same.sum() < 70
    assert divergence(logits, logits)[0].tolist() == [0] * 70


def test_the_full_f16_cache_is_its_own_reference(tiny, tmp_path):
    options = ["--policy", "full", "--texts", 2, "--length", LENGTH]
    rounding, row = report("kld", tiny, tmp_path, *options)["rows"]
    figures = ("kld", "median", "p99", "p99_9", "max")
    assert [row[name] for name in figures] == [0] * 5
    # in batches of 8 ggml computes attention in another way
    assert rounding["policy"] == "rounding" and 0 < rounding["kld"] < 1e-4
    assert row["same_top"] == 1 and row["n"] == 2 * (LENGTH - 1 - LENGTH // 2)


def test_divergences_are_those_of_a_torch_model_with_a_torch_cache(folder, tiny, tmp_path):
    full, quantized, knorm = report(
        "kld", tiny, tmp_path, "--policy", "full,knorm", "--type-k", "f16,q8_0", "--type-v", "f16,q8_0",
        "--max-length", 96, *SIZES, "--texts", 1, "--length", LENGTH, "--from", 40,
    )["rows"][1:4]  # fmt: skip
    (tokens,) = texts(tiny, 1)
    model = FamilyModel(AutoModelForCausalLM.from_pretrained(folder / "qwen3", dtype="float32"))

    def logits(bound, dtype="float16"):
        cache = FamilyCache(**bound, policy="knorm", dtype=dtype, layers=model.layers)
        return reference_run(model, tokens, [8] * 25, cache, every_position=True).logits[40:-1]

    whole = BOUND | {"max_length": 1000, "n_keep": 900}
    theirs = logits(whole)
    # ggml rounds the queries, too, where K is q8_0: that is not in the reference
    compared = (
        (quantized, logits(whole, "q8_0"), 0.3),
        (knorm, logits(BOUND | {"n_keep": 72}), 0.03),
    )
    for row, others, tolerance in compared:
        wanted = torch_divergence(theirs, others)
        assert row["n"] == len(wanted) == LENGTH - 1 - 40
        assert row["kld"] == pytest.approx(wanted.mean(), rel=tolerance)
        for name, percent in (("median", 50), ("p99", 99), ("p99_9", 99.9), ("max", 100)):
            assert row[name] == pytest.approx(np.percentile(wanted, percent), rel=tolerance)
        same = (theirs.argmax(1) == others.argmax(1)).mean()
        assert row["same_top"] == pytest.approx(same, abs=2.5 / len(wanted))
    assert knorm["kld"] > 20 * quantized["kld"] > 0
    assert knorm["same_top"] < 0.9


def test_recall_at_every_eviction_is_that_of_llama(tiny, tmp_path):
    results = tmp_path / "results.jsonl"
    _, without, recalled = report(
        "kld", tiny, tmp_path, "--policy", "knorm", "--max-length", 96, *SIZES, "--texts", 1, "--length",
        LENGTH, "--recall", "off,always", "--results", results,
    )["rows"]  # fmt: skip
    (tokens,) = texts(tiny, 1)

    def logits(**how):
        llm = Llama(str(tiny), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **how)
        rows = []
        for token in tokens[:-1]:
            llm.eval([token])
            rows.append(last_logits(llm))
        llm.close()
        return np.array(rows)

    config = QFilterConfig(
        max_length=96, window_length=20, interval=24, policy="knorm", recall="always"
    )
    wanted = torch_divergence(logits(flash_attn=True), logits(qfilters=config))
    record = json.loads(results.read_text().splitlines()[3])
    assert record["recall"] and len(record["kld"]) == LENGTH - 1
    assert np.mean(record["kld"]) == pytest.approx(wanted.mean(), rel=0.03)
    assert np.median(np.abs(np.array(record["kld"])[96:] - wanted[96:]) / wanted[96:]) < 0.05
    assert recalled["kld"] != pytest.approx(without["kld"], rel=0.1)


def test_intervals_of_percentiles_are_those_of_the_literature():
    values = np.random.default_rng(1).normal(3, 2, (400, 1))
    ((low, high),) = bootstrap_percentiles(values, [50.0])
    half = 1.96 * 1.2533 * 2 / 20  # the standard error of a normal median
    assert (high - low) / 2 == pytest.approx(half, rel=0.3)
    assert low < np.median(values) < high


# -- how it is measured


def test_a_cache_gives_the_same_whatever_is_open_beside_it(tiny, tmp_path, monkeypatch):
    options = ["--max-length", 96, *SIZES, "--texts", 2, "--length", LENGTH]
    rows = report(
        "kld", tiny, tmp_path, "--policy", "streaming,random,keydiff,kvdiff,knorm", *options
    )
    alone = report("kld", tiny, tmp_path, "--policy", "knorm", *options)
    assert kld.TOGETHER < 5 and rows["rows"][-1] == alone["rows"][1]
    assert len({row["kld"] for row in rows["rows"]}) == 6
    monkeypatch.setattr(kld, "CHUNK", 50)
    _, other = report("kld", tiny, tmp_path, "--policy", "knorm", *options)["rows"]
    assert other["kld"] == pytest.approx(alone["rows"][1]["kld"], rel=0.02)


def test_a_rerun_keeps_what_is_there_and_adds_types(tiny, tmp_path):
    path = tmp_path / "results.jsonl"
    options = ["--policy", "full", "--texts", 2, "--length", LENGTH, "--results", path]
    assert run("kld", tiny, "--type-k", "q8_0", *options).exit_code == 0
    head, rounding, first, *_, second = path.read_text().splitlines()
    changed = json.loads(first) | {"kld": [9.0] * (LENGTH - 1)}
    path.write_text("\n".join([head, rounding, json.dumps(changed), second[:30]]))
    _, old, new = report("kld", tiny, tmp_path, "--type-k", "q8_0,q4_0", *options)["rows"]
    assert (old["type_k"], old["type_v"], new["type_k"]) == ("q8_0", "f16", "q4_0")
    again = np.mean(json.loads(second)["kld"][LENGTH // 2 :])
    assert old["kld_by_text"] == [9, pytest.approx(again, rel=1e-4)]
    assert new["kld_by_text"][1] > 3 * again
    assert len(path.read_text().splitlines()) == 1 + 2 * 3


@pytest.mark.parametrize(
    ("task", "options", "word"),
    [
        ("kld", ["--recall", "prompt"], "always"),
        ("kld", ["--type-k", "q8_0,q4_0,f16", "--type-v", "q8_0,q4_0"], "--type-v"),
        ("kld", ["--type-v", "q9"], "q9"),
        ("kld", ["--length", "100", "--from", "99"], "--from 99"),
        ("kld", ["--policy", "replay"], "replay"),
        ("kld", ["--policy", "knorm", "--ratio", "8", "--length", "512"], "--interval"),
        ("kld", ["--length", "1000000"], "longer --text"),
        ("ladder", ["--stock-types", "f16,q9"], "q9"),
        ("ladder", ["--policy", "knorm", "--length", "500"], "--interval"),
        ("ladder", ["--policy", "learned"], "learned"),
        ("ladder", ["--ratio", "2,32", "--speed", "512"], "max_length"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tiny, task, options, word):
    result = run(task, tiny, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and word in result.stderr


def test_windowed_layers_recall_nothing_token_by_token(folder):
    options = ["--policy", "knorm", "--max-length", 96, *SIZES, "--length", LENGTH, "--texts", 1]
    result = run("kld", folder / "gemma3.gguf", *options, "--recall", "always")
    assert result.exit_code == 2 and "--recall off" in result.stderr
    assert run("kld", folder / "gemma3.gguf", *options).exit_code == 0


# -- the ladder


def test_a_ladder_has_the_figures_of_kld_and_needle_and_what_caches_take(tiny, tmp_path):
    options = ["--ratio", 4, *SIZES, "--length", 400, "--texts", 1]
    hidden = ["--documents", 1, "--needles-per-document", 2]
    value = report(
        "ladder", tiny, tmp_path, "--policy", "knorm", "--types", "q8_0", "--stock-types", "f16,q4_0",
        *options, *hidden, "--plot", tmp_path / "ladder.png", "--speed", 400,
    )  # fmt: skip
    rounding, full, quantized, ours = value["rows"]
    assert rounding["needles"] == {} and rounding["bytes"] == full["bytes"]
    sizes = {"f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
    for row, cells, kind in ((full, 8192, "f16"), (quantized, 8192, "q4_0"), (ours, 2048, "q8_0")):
        one_cell = 2 * 3 * 2 * 64 * sizes[kind]  # K and V of 3 layers with 2 KV heads of 64
        assert row["bytes"] == {"8192": cells * one_cell, "32768": 4 * cells * one_cell}
        assert row["tokens_per_second"] > 0
        archived = {n: int(n) * one_cell if row is ours else 0 for n in row["bytes"]}
        assert row["archive_bytes"] == archived
    assert full["kld"]["kld"] == 0 and set(full["needles"]) == {"off"}
    _, alone = report(
        "kld", tiny, tmp_path, "--policy", "knorm", *options, "--type-k", "q8_0", "--type-v", "q8_0"
    )["rows"]
    assert ours["kld"] == alone
    needles = report(
        "needle", tiny, tmp_path, "--policy", "knorm", "--setting", "stream", "--lengths", 400,
        *options[:6], *hidden, "--type-k", "q8_0", "--type-v", "q8_0",
    )["rows"]  # fmt: skip
    assert [ours["needles"][word]["nll"] for word in ("off", "on")] == [
        row["nll"] for row in needles
    ]
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_divergences_is_drawn(tiny, tmp_path):
    options = ["--policy", "full", "--type-k", "f16,q4_0", "--texts", 1, "--length", LENGTH]
    assert run("kld", tiny, *options, "--plot", tmp_path / "kld.png").exit_code == 0
    assert (tmp_path / "kld.png").read_bytes().startswith(b"\x89PNG")
