"""`qfllama bench`: what it measures against arithmetic, and against engines whose clock is known.

No time that this machine takes decides anything here.
"""

import dataclasses
import json
import math
import re
import statistics
import types

import numpy as np
import pytest
from click.testing import CliRunner

from qfllama import QFilterConfig, QFilterError, native
from qfllama.bench import measure, plan, report
from qfllama.bench.memory import resident_bytes
from qfllama.cli import main
from qfllama.config import EngineError
from qfllama.offload import Offload

N_CTX, MAX_LENGTH, INTERVAL = 4096, 96, 64
POSITIONS, PROMPTS = (96, 150, 224), (40, 100)
ENGINES = ["stock f16", "stock q4_0", "96 f16", "96 q8_0"]
BYTES = {"f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
MIB = 2**20


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(smollm2, tmp_path_factory):
    """(the JSON of one small run on the real model, what it printed, the image)."""
    folder = tmp_path_factory.mktemp("bench")
    done = run(
        smollm2, "--policy", "knorm", "--n-ctx", N_CTX, "--threads", 1, "--decode", 8,
        "--repeat", 1, "--max-length", MAX_LENGTH, "--types", "f16,Q8_0", "--stock-types", "q4_0",
        "--positions", "150,96,224", "--prompts", "40,100",
        "--json", folder / "bench.json", "--plot", folder / "bench.png",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return json.loads((folder / "bench.json").read_text()), done.stdout, folder / "bench.png"


def test_every_cache_has_a_row_for_every_length(measured):
    result, *_ = measured
    assert [row["engine"] for row in result["memory"]] == ENGINES
    for name, by, lengths in (
        ("decode", "position", POSITIONS),
        ("first_token", "prompt", PROMPTS),
    ):
        found = {(row["engine"], row[by]) for row in result[name]}
        assert found == {(engine, n) for engine in ENGINES for n in lengths}
        assert len(result[name]) == len(found)
    about = result["about"]
    assert about["n_ctx"] == N_CTX and about["policy"] == "knorm"
    assert about["ratios_against"] == "stock f16"
    assert {"command", "date", "machine", "qfllama", "llama-cpp-python"} <= set(about)


def test_evictions_are_those_that_the_bound_asks_for(measured):
    for row in measured[0]["decode"]:
        position = row["position"]
        evictions = max(0, math.ceil((position - MAX_LENGTH) / INTERVAL))
        if row["engine"].startswith("stock"):
            evictions = 0
        assert row["evictions"] == evictions, row
        assert row["cells_used"] == position - INTERVAL * evictions
        assert (row["eviction_percent"] > 0) == (evictions > 0)
        assert row["eviction_percent"] < 100


def test_kv_bytes_are_those_of_the_models_shape(measured):
    for row in measured[0]["memory"]:
        cells = N_CTX if row["max_length"] is None else 256  # llama.cpp pads to 256
        k_or_v = 30 * 3 * 64 * BYTES[row["type_kv"]]  # layers, KV heads, their width
        assert row["kv_bytes"] == 2 * cells * k_or_v, row


def test_with_recall_every_cache_is_asked_and_ours_brings_rows_back(smollm2):
    done = run(
        smollm2, "--policy", "knorm", "--threads", 1, "--decode", 8, "--repeat", 1, "--recall",
        "--max-length", "160", "--types", "f16", "--stock-types", "none", "--positions", "64,300",
        "--prompts", "none", "--json", "-",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["about"]["n_ctx"] == 300 + plan.QUESTION
    rows = {(row["engine"], row["position"]): row for row in result["question"]}
    assert set(rows) == {(name, n) for name in ("stock f16", "160 f16") for n in (64, 300)}
    assert {key for key, row in rows.items() if row["recalled"]} == {("160 f16", 300)}
    for (_, n), row in rows.items():
        assert row["ratio"] == pytest.approx(row["seconds"] / rows["stock f16", n]["seconds"])
    archived = {row["engine"]: row["archive_bytes"] for row in result["memory"]}
    assert archived["stock f16"] == 0 < archived["160 f16"]


@pytest.mark.skipif(resident_bytes() is None, reason="only Linux tells a process's memory")
def test_the_process_grows_by_what_a_cache_holds(measured):
    """K and V are written when a context is opened; the rest of it is small."""
    rows = {row["engine"]: row for row in measured[0]["memory"]}
    without = measured[0]["about"]["process_bytes_without_cache"]
    for row in rows.values():
        assert 0.9 * row["kv_bytes"] < row["opened_bytes"] <= row["filled_bytes"]
        assert row["filled_bytes"] < row["kv_bytes"] + 40 * MIB
        assert row["process_bytes"] == without + row["filled_bytes"]
    differences = [
        rows["stock f16"][name] - rows["stock q4_0"][name] for name in ("kv_bytes", "filled_bytes")
    ]
    assert differences[1] == pytest.approx(differences[0], abs=10 * MIB)


def test_ratios_are_quotients_to_stock_f16_at_the_same_length(measured):
    result, *_ = measured
    for rows, by, figure, ratio in (
        (result["decode"], "position", "tokens_per_second", "ratio"),
        (result["first_token"], "prompt", "seconds", "ratio"),
        (result["memory"], "type", "kv_bytes", "kv_ratio"),
    ):
        base = {row.get(by): row[figure] for row in rows if row["engine"] == "stock f16"}
        for row in rows:
            assert row[figure] > 0
            assert row[ratio] == pytest.approx(row[figure] / base[row.get(by)])


def test_the_table_has_the_figures_of_the_json(measured):
    result, printed, image = measured
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("decoding"))
    assert lines[at + 1].split() == ["96", "150", "224"]
    for line, engine in zip(lines[at + 2 :], ENGINES, strict=False):
        rows = [row for row in result["decode"] if row["engine"] == engine]
        cells = [f"{row['tokens_per_second']:.1f} {row['ratio']:.2f}x" for row in rows]
        assert line.split() == [*engine.split(), *" ".join(cells).split()]
    for row in result["memory"]:
        assert re.search(rf"^{row['engine']} +{row['kv_bytes'] / MIB:.1f} ", printed, re.M)
    assert image.read_bytes().startswith(b"\x89PNG")


# -- engines whose clock is known

PER_TOKEN, EVICTION, SAMPLE = 0.010, 0.032, 0.003


class Clock:
    """Seconds that pass only where it is told so."""

    now = 0.0

    def perf_counter(self):
        return self.now


class FakeContext:
    """Takes PER_TOKEN for each token and EVICTION for each eviction; a burst where it's told."""

    params = types.SimpleNamespace(n_batch=INTERVAL)

    def __init__(self, clock, turns, max_length=None, slow_turn=None):
        self.clock, self.turns, self.slow_turn = clock, turns, slow_turn
        self.config = max_length and QFilterConfig(max_length=max_length)
        self.n_tokens = self.cells = self.evictions = 0

    def read(self, tokens, logits):
        for _ in tokens:
            if self.config and self.cells == self.config.max_length:
                self.cells -= self.config.interval
                self.evictions += 1
                self.clock.now += EVICTION
            slow = self.slow_turn == self.n_tokens // 8
            self.clock.now += PER_TOKEN * (50 if slow else 1)
            self.cells += 1
            self.n_tokens += 1
        self.turns.append((self, self.n_tokens))

    def logits(self):
        self.clock.now += SAMPLE
        return np.zeros(3)

    def kv_cache_clear(self):
        self.n_tokens = self.cells = 0

    def n_past(self):
        return self.n_tokens

    def used(self):
        return self.cells

    def stats(self):
        us = round(self.evictions * EVICTION * 1e6)
        return native.Stats(
            n_evictions=self.evictions, t_score_us=us // 2, t_gather_us=us - us // 2
        )


@pytest.fixture
def fakes(monkeypatch):
    """(engines with a clock of their own, the order of their turns)."""
    clock, turns = Clock(), []
    monkeypatch.setattr(measure, "time", clock)
    wanted, _ = plan.make_plan(
        8192, positions=(64, 512, 1024), prompts=(128, 1000), max_lengths=(96,), types=("f16",),
        stock_types=(), repeat=3,
    )  # fmt: skip
    engines = measure.Engines(wanted, "fake.gguf")
    engines.model = types.SimpleNamespace(offload=Offload(0))
    engines.tokens = list(range(1024))
    engines.each = [
        # one of the turns of decoding up to 512 comes while the machine does something else
        measure.Engine(wanted.kinds[0], FakeContext(clock, turns, slow_turn=60), 800, 900, 1000),
        measure.Engine(wanted.kinds[1], FakeContext(clock, turns, MAX_LENGTH), 80, 90, 100),
    ]
    engines.process_bytes = 10_000
    return engines, turns


@pytest.mark.parametrize("decode", [64, 512])  # with 512 an eviction falls into every turn
def test_a_speed_is_the_median_of_its_turns_with_evictions_spread_out(fakes, decode):
    engines, _ = fakes
    engines.plan = dataclasses.replace(engines.plan, decode=decode)
    rows = {(row["engine"], row["position"]): row for row in engines.measure()["decode"]}
    for position in (64, 512, 1024):
        stock, ours = rows["stock f16", position], rows["96 f16", position]
        assert stock["tokens_per_second"] == pytest.approx(1 / PER_TOKEN)
        spread = EVICTION / INTERVAL if position > MAX_LENGTH else 0
        assert ours["tokens_per_second"] == pytest.approx(1 / (PER_TOKEN + spread))
        assert ours["eviction_percent"] == pytest.approx(100 * spread / (PER_TOKEN + spread))
        assert ours["ratio"] == pytest.approx(PER_TOKEN / (PER_TOKEN + spread))


def test_the_first_token_takes_the_whole_prompt_and_the_choice(fakes):
    engines, _ = fakes
    engines.each[0].context.slow_turn = None
    rows = {(row["engine"], row["prompt"]): row for row in engines.measure()["first_token"]}
    for n in (128, 1000):
        stock, ours = n * PER_TOKEN + SAMPLE, n * PER_TOKEN + SAMPLE
        ours += EVICTION * math.ceil((n - MAX_LENGTH) / INTERVAL)
        assert rows["stock f16", n]["seconds"] == pytest.approx(stock)
        assert rows["96 f16", n]["seconds"] == pytest.approx(ours)
        assert rows["96 f16", n]["ratio"] == pytest.approx(ours / stock)


def test_no_engine_gets_far_ahead_of_another(fakes):
    engines, turns = fakes
    engines.measure()
    position = {engine.context: 0 for engine in engines.each}
    for llm, n_tokens in turns:
        position[llm] = n_tokens
        if n_tokens > measure.READ_AT_ONCE:  # not where reading starts again
            assert max(position.values()) - min(position.values()) <= measure.READ_AT_ONCE


def test_the_progress_bar_ends_at_its_end(fakes):
    engines, _ = fakes
    steps = []
    engines.measure(steps.append)
    assert sum(steps) == engines.plan.work


def test_turns_are_medians_of_several_reads(fakes, monkeypatch):
    engines, _ = fakes
    engines.each[0].context.slow_turn = None
    found = iter([0.5, 0.001, 0.002])  # of three reads the choice of the token
    monkeypatch.setattr(measure.Engine, "first_token", lambda engine: next(found))
    engines.each, wanted = engines.each[:1], engines.plan
    engines.plan = plan.Plan(wanted.kinds[:1], (), (128,), 128, repeat=3)
    (row,) = engines.first_tokens(lambda n: None)
    assert row["seconds"] == pytest.approx(128 * PER_TOKEN + statistics.median([0.5, 0.001, 0.002]))


# -- plans and what is wrong with them


def test_defaults_end_where_the_model_was_trained_to(fakes):
    wanted, notes = plan.make_plan(8192)
    assert wanted.positions == (512, 1024, 2048, 4096, 8192) and wanted.n_ctx == 8192
    assert [kind.name for kind in wanted.kinds[:4]] == [
        "stock f16", "stock q8_0", "stock q4_0", "512 f16"
    ]  # fmt: skip
    assert len(wanted.kinds) == 11
    assert len(notes) == 1 and "8,192" in notes[0] and "--n-ctx" in notes[0]
    wanted, notes = plan.make_plan(8192, n_ctx=32768)
    assert wanted.positions[-1] == wanted.n_ctx == 32768 and not notes
    wanted, notes = plan.make_plan(1500)
    assert wanted.positions == (512, 1024) and wanted.prompts == (512, 1024) and len(notes) == 1
    assert {kind.max_length for kind in wanted.kinds} == {None, 512}


def test_quick_is_smaller_and_gives_way_to_what_is_asked_for():
    quick, _ = plan.make_plan(8192, quick=True)
    assert len(quick.kinds) == 2 and quick.work * 5 < plan.make_plan(8192)[0].work
    wanted, _ = plan.make_plan(8192, quick=True, positions=(8192,), types=("q8_0",))
    assert wanted.positions == (8192,)
    assert [kind.name for kind in wanted.kinds] == ["stock f16", "512 q8_0"]


def test_stock_f16_always_takes_part_and_no_cache_twice():
    wanted, _ = plan.make_plan(8192, stock_types=("q8_0", "F16"), max_lengths=(512, 512))
    names = [kind.name for kind in wanted.kinds]
    assert names == ["stock f16", "stock q8_0", "512 f16", "512 q8_0"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--positions", "512,many"], "many"),
        (["--positions", "0"], "--positions"),
        (["--positions", "none", "--prompts", "none"], "--prompts"),
        (["--positions", "16384"], "--n-ctx 16384"),
        (["--prompts", "600", "--n-ctx", "512"], "--n-ctx 600"),
        (["--max-length", "64"], "max_length 64"),
        (["--max-length", "none"], "--max-length"),
        (["--types", "q9_9"], "q9_9"),
        (["--stock-types", "f17"], "f17"),
        (["--policy", "best"], "best"),
        (["--plot", "figure.txt"], ".png"),
        (["--json", "no/such/folder.json"], "no/such"),
        (
            ["--recall", "--n-ctx", "512", "--max-length", "256", "--positions", "512"],
            "--n-ctx 576",
        ),
        (["--quick"], "qfllama convert"),  # this file has no filters
        (["--n-ctx", "1000000000", "--policy", "knorm"], "--n-ctx"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(smollm2, options, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(smollm2, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *notes, error = result.stderr.splitlines()
    assert error.startswith("qfllama: ") and word in error
    assert not notes or notes[0].startswith("positions end")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(100))
    result = run(path)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_a_cache_that_llama_cpp_refuses_is_named(smollm2):
    """Heads of 64 can't be divided into blocks of 256."""
    wanted, _ = plan.make_plan(8192, quick=True, policy="knorm")
    kinds = (*wanted.kinds, plan.Kind(10, 512))  # q2_K
    engines = measure.Engines(dataclasses.replace(wanted, kinds=kinds, n_gpu_layers=0), smollm2)
    with pytest.raises(QFilterError, match="512 10.*q2_K.*--n-ctx"):
        engines.open()
    engines.close()


def test_an_engine_that_fails_is_reported(fakes, monkeypatch):
    engines, _ = fakes

    def fail(tokens, logits):
        raise EngineError("llama_decode returned -3")

    monkeypatch.setattr(engines.each[1].context, "read", fail)
    with pytest.raises(QFilterError, match="llama_decode returned -3"):
        engines.measure()


def test_a_system_that_tells_no_memory_gets_a_dash(fakes):
    engines, _ = fakes
    for engine in engines.each:
        engine.opened_bytes = engine.grown_bytes = None
    engines.process_bytes = None
    result = engines.result([], [], [])
    assert [row["process_bytes"] for row in result["memory"]] == [None, None]
    line = next(line for line in report.tables(result).splitlines() if "96 f16" in line)
    assert line.split() == ["96", "f16", "0.0", "0.10x", "-", "-", "-"]
