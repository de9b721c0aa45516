"""The random operations of tests/fuzz, for as long as CI can wait, and proof that they notice."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from fuzz import cache, engine
from fuzz.cache import Mismatch, Row, Settings
from fuzz.operations import World

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    engine.write_models(folder)
    return folder


def run(models, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fuzz", "--models", str(models), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *path()])},
        capture_output=True,
        text=True,
    )


def path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


@pytest.mark.parametrize("seed", ["0", "1"])
def test_random_operations_do_what_a_list_of_rows_would(models, seed):
    done = run(models, "--operations", "1500", "--seed", seed)
    assert done.returncode == 0, done.stdout
    assert "1,500 operations without a mismatch" in done.stdout


@pytest.fixture
def world(models, tmp_path):
    """head_dim 32, filters, 40 tokens in one sequence: the next 20 will evict."""
    world = World({32: engine.load(models / "d32.gguf")}, tmp_path)
    settings = Settings(policy="qfilters", n_cells=48, n_keep=24, n_batch=20, n_ubatch=20)
    world.apply(["open", 32, asdict(settings)])
    for order in (1, 2):
        world.apply(["decode", [20], order, 0, None])
    yield world
    world.close()


EVICT = ["decode", [20], 3, 0, None]


def test_an_eviction_by_the_filters_agrees(world):
    world.apply(EVICT)
    assert world.cache.n_evictions == 1 and world.cache.n_near_ties == 0


def test_other_filters_are_noticed(world):
    world.cache.weight = engine.filters(1, 32)
    with pytest.raises(Mismatch, match="with score"):
        world.apply(EVICT)


def test_scores_of_the_opposite_sign_are_noticed(world, monkeypatch):
    own = cache.Scores.qfilters
    monkeypatch.setattr(cache.Scores, "qfilters", lambda *args: (lambda s, e: (-s, e))(*own(*args)))
    with pytest.raises(Mismatch, match="with score"):
        world.apply(EVICT)


def test_a_flipped_bit_is_noticed(world):
    rows = world.cache.sequences[0].heads[1, 1]
    v = bytes([rows[30].v[0] ^ 1]) + rows[30].v[1:]
    rows[30] = Row(rows[30].position, rows[30].k, v)
    with pytest.raises(Mismatch, match="position 30: the bytes of V"):
        world.apply(["look", 0, 0, 0])


def test_a_failure_prints_its_operations_and_how_to_replay_them(models, tmp_path):
    operations = tmp_path / "operations.jsonl"
    operations.write_text('["open", 32, {}]\n["decode", [3], 1, 0, null]\n["broken"]\n')
    done = run(models, "--replay", str(operations))
    assert done.returncode == 1
    assert '["decode", [3], 1, 0, null]' in done.stdout and "--replay" in done.stdout
