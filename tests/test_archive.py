"""What is evicted lies in an archive: rewinding, limits, files, copies, states."""

import contextlib
import os
import resource
import signal
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
import tiny_models
from bounded import HOW, Bounded, load
from bounded import config as small_config
from tiny_models import some

from qfllama import QFilterConfig, QFilterError, QFilterWarning
from qfllama.native import FLAG_GRAPH_GATHER, STATE_KEEP_ARCHIVE

BLOCK = 256  # positions of a block of the archive
N_LAYER, N_HEAD = 2, 2
ROW_BYTES = N_LAYER * N_HEAD * 64 * 2 * 2  # K and V of all layers in f16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load(tiny_models.two_layers(tmp_path_factory.mktemp("models"))) as model:
        yield model


@pytest.fixture
def open_cache(model):
    with contextlib.ExitStack() as stack:

        def open_cache(archive=True, limit=1 << 30, sizes=None, **params):
            config = small_config(archive=archive, archive_limit=limit, **(sizes or {}))
            return stack.enter_context(Bounded(model, config, **{"n_ctx": 4096} | params))

        yield open_cache


def stored(llm, n: int, seq: int = 0) -> list:
    """The archived rows of n positions, of all layers."""
    return [[llm.archived_row(p, layer, seq) for layer in range(N_LAYER)] for p in range(n)]


def check_cells(llm, archive: list, seq: int = 0) -> None:
    """Every cell holds the row of its position, as it was first stored."""
    for layer in range(N_LAYER):
        keys, values = llm.rows(layer, seq)
        for head in range(N_HEAD):
            for i, p in enumerate(llm.kept(layer, head, seq)):
                if p >= len(archive) or archive[p][layer] is None:
                    continue
                for rows, first in zip((keys, values), archive[p][layer], strict=True):
                    n = rows.shape[1] // N_HEAD
                    part = slice(head * n, (head + 1) * n)
                    assert rows[i, part].tobytes() == first[part], (layer, head, p)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q4_0"), ("f32", "bf16")])
@pytest.mark.parametrize("flags", [0, FLAG_GRAPH_GATHER], ids=["host", "graph"])
def test_rows_come_back_as_they_were_first_stored(open_cache, types, flags):
    llm = open_cache(type_k=types[0], type_v=types[1], flags=flags)
    tokens = some(400)
    llm.read(tokens)
    assert llm.rewind_limit() == 0
    before = stored(llm, 300)
    assert all(row is not None for rows in before for row in rows)
    check_cells(llm, before)
    for p0 in (300, 123, 41, 7, 2):
        assert llm.kept(0, 0)[-1] >= p0, "or there is nothing to cut"
        assert llm.kv_cache_seq_rm(0, p0, -1)
        assert llm.n_past() == p0
        assert stored(llm, p0) == before[:p0]
        check_cells(llm, before)
        kept = llm.kept(1, 1)
        assert len(kept) == min(p0, llm.config.n_keep)
        assert kept[-1] == p0 - 1
        window = llm.config.window_length
        assert kept[-window:].tolist() == list(range(max(0, p0 - window), p0))
        assert kept[:2].tolist() == [0, 1]
        llm.read(some(60, seed=p0))  # on from there, over an eviction
        assert llm.kv_cache_seq_rm(0, p0, -1)


def test_a_short_rewind_is_a_cache_that_never_went_further(open_cache, model):
    """All rows before the position fit: nothing is lost, and the logits are those of a cache that
    has read only so far."""
    llm, tokens = open_cache(), some(200)
    llm.read(tokens)
    assert llm.kv_cache_seq_rm(0, 30, -1)
    fresh = open_cache(archive=False)
    fresh.read(tokens[:30])
    for other in (llm, fresh):
        other.read(some(5, seed=1), logits=True)
    assert llm.rewind_limit() == fresh.rewind_limit() == 0
    np.testing.assert_allclose(llm.logits(), fresh.logits(), atol=2e-3)


def test_blocks_come_and_go(open_cache):
    llm = open_cache(n_seq=2, limit=1 << 30)
    llm.read(some(40))
    assert llm.stats().n_bytes_archive == 0, "nothing was evicted"
    llm.read(some(1000))
    stats = llm.stats()
    assert stats.n_archived >= 1000 - llm.config.max_length
    assert stats.n_bytes_archive == -(-stats.n_archived // BLOCK) * BLOCK * ROW_BYTES
    assert stats.n_bytes_archive_written == stats.n_archived * ROW_BYTES
    archived = stats.n_archived

    llama_cpp.llama_memory_seq_cp(llm.memory, 0, 1, -1, -1)
    assert llm.seq_stats(1).n_archived == archived
    assert llm.stats().n_bytes_archive == stats.n_bytes_archive, "copies share blocks"
    rows = stored(llm, archived)
    llm.read(some(300, seed=1), seq=0)
    llm.read(some(300, seed=2), seq=1)
    assert stored(llm, archived, 0) == stored(llm, archived, 1) == rows
    assert stored(llm, 1200, 0)[1190] != stored(llm, 1200, 1)[1190], "each goes on by itself"
    shared = archived // BLOCK * BLOCK * ROW_BYTES
    assert llm.stats().n_bytes_archive < 2 * llm.seq_stats(0).n_archived * ROW_BYTES - shared / 2

    assert llm.kv_cache_seq_rm(0, -1, -1)
    assert llm.seq_stats(0).n_archived == 0
    assert stored(llm, archived, 1) == rows, "the other one still has them"
    llm.kv_cache_clear()
    assert llm.stats().n_bytes_archive == 0


def test_at_the_limit_the_oldest_positions_leave(open_cache):
    llm = open_cache(limit=4 * BLOCK * ROW_BYTES)
    tokens, limits = some(3000), []
    for start in range(0, len(tokens), 100):
        llm.read(tokens[start : start + 100])
        stats = llm.stats()
        assert stats.n_bytes_archive <= 4 * BLOCK * ROW_BYTES
        assert not stats.archive_stopped
        limits.append(llm.rewind_limit())
        assert llm.seq_stats().pos_archived in (limits[-1], 0)
    assert limits == sorted(limits)
    assert limits[0] == 0 < 3000 - 4 * BLOCK <= limits[-1] < 3000 - 2 * BLOCK
    assert all(row is not None for row in stored(llm, 2)[1]), "sinks stay"
    assert llm.archived_row(limits[-1] - 1, 0) is None
    assert not llm.kv_cache_seq_rm(0, limits[-1] - 1, -1)
    archive = stored(llm, 2900)
    assert llm.kv_cache_seq_rm(0, limits[-1] + 20, -1)
    check_cells(llm, archive)
    llm.read(some(500, seed=1))


def test_the_longest_sequence_gives_way(open_cache):
    llm = open_cache(limit=6 * BLOCK * ROW_BYTES, n_seq=2)
    llm.read(some(2000), seq=0)
    llm.read(some(700), seq=1)
    assert not llm.stats().archive_stopped
    assert llm.seq_stats(1).pos_archived == 0
    assert llm.seq_stats(0).pos_archived > 0


def test_a_full_archive_goes_on_when_another_sequence_ends(open_cache):
    """Each keeps the block of its sinks and its newest one, and there are three."""
    llm = open_cache(limit=3 * BLOCK * ROW_BYTES, n_seq=2)
    llm.read(some(700), seq=0)
    llm.read(some(700), seq=1)
    assert not llm.stats().archive_stopped
    assert llm.seq_stats(1).n_archived <= BLOCK, "there was no second block"
    assert llm.kv_cache_seq_rm(0, -1, -1)
    llm.read(some(300, seed=1), seq=1)
    assert llm.seq_stats(1).n_archived > 2 * BLOCK - 48
    limit = llm.rewind_limit(1)
    assert 600 < limit < 1000 - 250
    assert llm.kv_cache_seq_rm(1, limit + 10, -1)


def test_too_small_a_limit_is_refused(open_cache):
    with pytest.raises(QFilterError, match=f"needs at least {3 * BLOCK * ROW_BYTES}"):
        open_cache(limit=3 * BLOCK * ROW_BYTES - 1)


def test_where_memory_is_short_there_is_none(open_cache, monkeypatch):
    """Nobody gave a limit, and half of what is free is not enough."""
    monkeypatch.setattr("qfllama.archive.available_bytes", lambda: 4 * BLOCK * ROW_BYTES)
    with pytest.warns(QFilterWarning, match="no archive, what is evicted is gone"):
        llm = open_cache(limit=None)
    llm.read(some(300))
    assert llm.stats().n_archived == llm.stats().n_bytes_archive_limit == 0
    assert llm.read_question(some(70, seed=1)).size == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mmap")
def test_a_file_that_nobody_sees(open_cache, tmp_path):
    files = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    llm = open_cache(archive=str(tmp_path))
    memory = open_cache()
    tokens = some(1500)
    for cache in (llm, memory):
        cache.read(tokens)
    assert list(tmp_path.iterdir()) == []
    assert stored(llm, 1400) == stored(memory, 1400)
    assert llm.kv_cache_seq_rm(0, 700, -1)
    check_cells(llm, stored(memory, 700))
    llm.close()
    if sys.platform == "linux":
        assert set(os.listdir("/proc/self/fd")) <= files


def test_a_folder_that_is_none_is_refused(open_cache, tmp_path):
    with pytest.raises(QFilterError, match="is not a folder: make it"):
        open_cache(archive=str(tmp_path / "no"))
    (tmp_path / "file").touch()
    with pytest.raises(QFilterError, match="is not a folder"):
        open_cache(archive=str(tmp_path / "file"))


KILLED = """
import os, sys
sys.path[:0] = sys.argv[3:]
from bounded import Bounded, config, load
with load(sys.argv[1]) as model:
    llm = Bounded(model, config(archive=sys.argv[2], archive_limit=1 << 30), n_ctx=4096)
    llm.read([5] * 1000)
    assert llm.stats().n_archived > 900
    print("read", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mmap")
def test_a_process_that_is_killed_leaves_no_file(model, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, model.path, str(tmp_path), os.path.dirname(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"read\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the size of files is limited as on Linux")
def test_a_full_disk_ends_the_archive_not_the_conversation(open_cache, tmp_path):
    llm, tokens = open_cache(archive=str(tmp_path)), some(1500)
    whole = open_cache()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    block = -(-BLOCK * ROW_BYTES // 4096) * 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * block, before[1]))
    try:
        llm.read(tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    whole.read(tokens)
    assert llm.stats().archive_stopped
    assert llm.seq_stats().n_archived == 2 * BLOCK
    assert llm.n_past() == 1500
    for layer in range(N_LAYER):
        for head in range(N_HEAD):
            assert (llm.kept(layer, head) == whole.kept(layer, head)).all()
    assert llm.rewind_limit() > 2 * BLOCK, "what lies between is gone"
    archive = stored(llm, 2 * BLOCK)
    llm.question()
    llm.read(some(8, seed=1))
    assert llm.recall() == 8
    check_cells(llm, archive)


def test_an_archive_goes_with_its_state_where_that_is_wanted(open_cache):
    llm, tokens = open_cache(), some(700)
    llm.read(tokens)
    state, archive, rows = llm.state(), llm.archive_state(), stored(llm, 690)
    assert len(archive) >= llm.seq_stats().n_archived * ROW_BYTES
    other = open_cache(flags=FLAG_GRAPH_GATHER)
    assert other.restore(state)
    assert other.seq_stats().n_archived == 0
    assert 0 < other.rewind_limit() <= 700
    assert other.restore_archive(archive)
    assert other.rewind_limit() == 0
    assert stored(other, 690) == rows
    assert other.kv_cache_seq_rm(0, 100, -1)
    check_cells(other, rows)
    for damaged in (archive[:-1], archive + b"x", b"", b"x" * len(archive)):
        assert not other.restore_archive(bytes(damaged))
    assert not other.restore_archive(archive), "it goes beyond this sequence now"
    assert stored(other, 99) == rows[:99], "what was refused has changed nothing"
    assert not open_cache(archive=False).restore_archive(archive)
    assert open_cache(archive=False).archive_state() == b""


def test_an_earlier_state_of_the_same_sequence_keeps_the_archive(open_cache):
    """What was evicted up to there has been archived since, and only that stays."""
    llm, tokens = open_cache(), some(700)
    llm.read(tokens[:400])
    state, archive = llm.state(), llm.archive_state()
    llm.read(tokens[400:])
    rows = stored(llm, 600)
    assert llm.restore(state, flags=STATE_KEEP_ARCHIVE)
    assert llm.n_past() == 400 and llm.rewind_limit() == 0
    assert llm.archived_row(400, 0) is None
    check_cells(llm, rows)
    other = open_cache()
    assert other.restore(state)
    assert other.restore_archive(archive)
    for cache in (llm, other):
        cache.question()
        cache.read(some(6, seed=2))
        assert cache.recall() == 6
    assert llm.recalled().tolist() == other.recalled().tolist() != []
    assert llm.restore(state), "without the flag it starts one"
    assert llm.seq_stats().n_archived == 0


@pytest.mark.parametrize("flags", [0, STATE_KEEP_ARCHIVE])
def test_rows_that_no_archive_has_stay(open_cache, flags):
    """After a state without its archive: a recall fills at most half of the cells, and what has no
    copy is not dropped for it. An empty cache has no archive to keep."""
    llm = open_cache()
    llm.read(some(500))
    other = open_cache()
    assert other.restore(llm.state(), flags=flags)
    old = [other.kept(layer, head).tolist() for layer in range(N_LAYER) for head in range(N_HEAD)]
    other.read(some(200, seed=1))
    other.question()
    other.read(some(6, seed=2))
    held = [
        set(other.kept(layer, head).tolist()) & set(before)
        for (layer, head), before in zip(
            [(layer, head) for layer in range(N_LAYER) for head in range(N_HEAD)], old, strict=True
        )
    ]
    held = [{p for p in mine if other.archived_row(p, 0) is None} for mine in held]
    assert any(held), "or the test is about nothing"
    assert other.recall() == 6
    n_half = other.used() // 2
    for (layer, head), mine in zip(
        [(layer, head) for layer in range(N_LAYER) for head in range(N_HEAD)], held, strict=True
    ):
        left = mine & set(other.kept(layer, head).tolist())
        assert len(left) == min(len(mine), n_half) or left == mine


def test_a_question_among_other_sequences_is_refused(open_cache):
    llm = open_cache(n_seq=2)
    llm.read(some(300), seq=0)
    llm.read(some(20), seq=1)
    llm.question(0)
    llm.fill([(0, 300, [5, 6], 1), (1, 20, [7], 1)])
    assert llm.decode_batch() == 0
    kept = llm.kept(0, 0)
    with pytest.raises(RuntimeError, match="read together with other sequences"):
        llm.recall(0)
    assert (llm.kept(0, 0) == kept).all()
    with pytest.raises(RuntimeError, match="no question was read"):
        llm.recall(0)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q4_0")])
def test_an_archive_in_parts_is_recalled_as_a_whole_one(open_cache, types):
    """On the CPU's own path and through graphs; with one softmax over all rows and part by part."""
    types = dict(zip(("type_k", "type_v"), types, strict=True))
    caches = [open_cache(flags=flags, **types) for flags in HOW.values()]
    tokens = some(1500)
    state = None
    for llm in caches:
        if state is None:
            llm.read(tokens)
            state, archive = llm.state(), llm.archive_state()
        else:
            assert llm.restore(state)
            assert llm.restore_archive(archive)
        llm.question()
        llm.read(tokens[300:308])
        assert llm.recall() == 8
    came_back = [set(llm.recalled().tolist()) for llm in caches]
    assert len(came_back[0]) > 20
    for other in came_back[1:]:
        assert len(came_back[0] & other) >= 0.95 * len(came_back[0])


PLACES = {120: 200, 300: 201, 450: 202}
"""Position -> a token of a single byte, which no letter is, that a text has there and nowhere else."""


def ask_for_words(llm, token: int, seq: int = 0) -> set:
    """What every head of every layer holds after a question of that word."""
    llm.question(seq)
    llm.read([token] * 6, seq=seq)
    assert llm.recall(seq) == 6
    heads = [(layer, head) for layer in range(N_LAYER) for head in range(N_HEAD)]
    return set.intersection(*(set(llm.kept(layer, head, seq).tolist()) for layer, head in heads))


@pytest.mark.parametrize("how", ["read", "restored", "copied", "rewound"])
def test_what_is_around_a_word_of_the_question_comes_back(open_cache, how):
    """Random weights look anywhere, so this is up to the tokens that the archive knows."""
    places, tokens = dict(PLACES), np.random.default_rng(0).integers(260, 380, 700).tolist()
    for at, word in places.items():
        tokens[at] = word
    sizes = {"max_length": 192, "interval": 32}  # room for more than what is looked at most
    llm = open_cache(n_seq=2, sizes=sizes)
    llm.read(tokens)
    assert not any({*range(at - 8, at + 8)} <= set(llm.kept(0, 0).tolist()) for at in PLACES)
    state, archive, seq = llm.state(), llm.archive_state(), 0
    if how == "copied":
        seq = 1
        llm.kv_cache_seq_cp(0, 1, -1, -1)
    elif how == "rewound":
        assert llm.kv_cache_seq_rm(0, 420, -1)
        places[450] = 203
        llm.read([*tokens[420:450], places[450], *tokens[451:]])
    elif how == "restored":
        llm = open_cache(sizes=sizes)
        assert llm.restore(state) and llm.restore_archive(archive)
    for at, word in places.items():
        assert {*range(at - 8, at + 8)} <= ask_for_words(llm, word, seq)


def test_tokens_that_were_removed_are_not_saved(open_cache):
    """An archive goes where its sequence fits, however far it went before."""
    llm = open_cache()
    llm.read(some(700))
    assert llm.kv_cache_seq_rm(0, 300, -1)
    state, archive = llm.state(), llm.archive_state()
    other = open_cache(n_ctx=400)
    assert other.restore(state) and other.restore_archive(archive)
    assert other.archive_state() == archive


def test_a_recall_needs_an_archive(open_cache):
    llm = open_cache(archive=False)
    llm.read(some(300))
    llm.question()
    llm.read(some(8))
    with pytest.raises(RuntimeError, match="there is no archive"):
        llm.recall()


def test_the_graph_of_a_context_is_as_before_after_a_question(open_cache):
    """Queries are captured only while a question is read."""
    llm, plain = open_cache(), open_cache(archive=False)
    for cache in (llm, plain):
        cache.read(some(300))
    llm.question()
    llm.read(some(8, seed=1), logits=True)
    captured = llm.logits()
    plain.read(some(8, seed=1), logits=True)
    assert (captured == plain.logits()).all(), "what is read as a question is computed as ever"
    assert llm.recall() == 8
    assert llm.n_past() == 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"archive": 1}, "archive is 1: use True, False or the name of a folder"),
        ({"archive": ""}, "archive is ''"),
        ({"archive_limit": 0}, "archive_limit is 0: it must be at least 1"),
        ({"archive_limit": 1.5}, "archive_limit is 1.5: it must be a whole number"),
        ({"recall": True}, "recall is True: use 'prompt', 'always' or False"),
        ({"recall": "never"}, "recall is 'never'"),
        ({"recall_queries": 0}, "recall_queries is 0: it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(QFilterError) as error:
        QFilterConfig(**fields)
    assert message in str(error.value)
