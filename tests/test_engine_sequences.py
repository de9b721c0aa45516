"""Several sequences in one bounded context: each evicts on its own, whole ones can be copied."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
import tiny_models
from bounded import Bounded, config, load

from qfllama import native

FAMILIES = ["llama", "gemma3", "lfm2"]  # full attention, windowed layers, recurrent layers
LAYER = {"llama": 1, "gemma3": 5, "lfm2": 3}  # one that evicts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("sequences")
    for family in FAMILIES:
        tiny_models.write(family, path / family)
    tiny_models.convert([path / family for family in FAMILIES])
    models = {family: load(path / f"{family}.gguf") for family in FAMILIES}
    yield models
    for model in models.values():
        model.close()
    shutil.rmtree(path)


@pytest.fixture(params=FAMILIES)
def model(models, request):
    return models[request.param]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(8).integers(3, tiny_models.VOCAB, 4000).tolist()


def decode(llm, tokens, seq=0, chunk=8):
    """Logits at the end of every chunk."""
    logits = []
    for i in range(0, len(tokens), chunk):
        assert llm.decode(tokens[i : i + chunk], seq) == 0
        logits.append(llm.logits())
    return np.array(logits)


def remove(llm, p0, p1, seq=0) -> bool:
    return llama_cpp.llama_memory_seq_rm(llm.memory, seq, p0, p1)


def copy(llm, source, target, p0=-1, p1=-1):
    llama_cpp.llama_memory_seq_cp(llm.memory, source, target, p0, p1)


@pytest.mark.parametrize(
    ("family", "type_kv"),
    [(family, "f16") for family in FAMILIES] + [("llama", "q8_0"), ("gemma3", "q4_0")],
)
def test_a_sequence_computes_what_it_computes_alone(models, tokens, family, type_kv):
    """Three sequences take turns, with batches of their own sizes, and evict at their own times."""
    chunks, texts = (8, 5, 3), (tokens[:400], tokens[1000:1250], tokens[2000:2150])
    model, types = models[family], {"type_k": type_kv, "type_v": type_kv}
    alone, n_evictions = [], 0
    for text, chunk in zip(texts, chunks, strict=True):
        with Bounded(model, config(), **types) as llm:
            alone.append(decode(llm, text, chunk=chunk))
            n_evictions += llm.stats().n_evictions
    with Bounded(model, config(), n_seq=3, **types) as llm:
        for turn in range(50):
            for seq, (text, chunk) in enumerate(zip(texts, chunks, strict=True)):
                assert llm.decode(text[turn * chunk : (turn + 1) * chunk], seq) == 0
                np.testing.assert_array_equal(llm.logits(), alone[seq][turn])
        assert llm.stats().n_evictions == n_evictions > 80
        assert llm.stats().n_cells_used <= 3 * 48


def test_what_another_sequence_holds_does_not_matter_in_a_batch_of_both(model, tokens):
    """Sequence 0 gets the same tokens in the same batches; sequence 1 goes its own way, longer in
    one context than in the other, so that it evicts at other times."""
    results = []
    for ahead in (0, 37):
        with Bounded(model, config(), n_seq=2) as llm:
            for i in range(ahead):
                assert llm.decode([tokens[3000 + i]], seq=1) == 0
            logits = []
            for i in range(0, 400, 4):
                llm.fill([(0, i, tokens[i : i + 4]), (1, ahead + i, tokens[ahead + i :][:4])])
                assert llama_cpp.llama_decode(llm.ctx, llm.batch) == 0
                logits.append(llm.logits(3))
            results.append(np.array(logits))
            assert llm.stats().n_evictions > 80
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_compacted_document_is_asked_many_questions_in_parallel(models, tokens, family):
    model, il = models[family], LAYER[family]
    document, questions = tokens[:200], [tokens[i : i + 60] for i in (300, 400, 500)]
    expected, kept = [], []
    for question in questions:
        with Bounded(model, config()) as llm:
            decode(llm, document)
            expected.append(decode(llm, question, chunk=6))
            kept.append(llm.kept(il, 1).tolist())
    with Bounded(model, config(), n_seq=4) as llm:
        decode(llm, document)
        for seq in (1, 2, 3):
            copy(llm, 0, seq)
            assert llm.kept(il, 1, seq).tolist() == llm.kept(il, 1, 0).tolist()
        logits = [[], [], []]
        for i in range(0, 60, 6):
            for seq in (1, 2, 3):
                assert llm.decode(questions[seq - 1][i : i + 6], seq) == 0
                logits[seq - 1].append(llm.logits())
        np.testing.assert_array_equal(np.array(logits), np.array(expected))
        assert [llm.kept(il, 1, seq).tolist() for seq in (1, 2, 3)] == kept
        # the document is as it was
        np.testing.assert_array_equal(decode(llm, questions[0], chunk=6), expected[0])


def test_a_copy_that_was_not_made_yet_is_saved_and_is_not_made_over_what_is_restored(model, tokens):
    with Bounded(model, config(), n_seq=3) as llm:
        decode(llm, tokens[:200], seq=0)
        decode(llm, tokens[500:640], seq=1)
        other = llm.state(1)
        copy(llm, 0, 2)
        saved = llm.state(2)
        expected = decode(llm, tokens[300:340], seq=0)
        copy(llm, 0, 2)
        assert llm.restore(other, 2)
        np.testing.assert_array_equal(
            decode(llm, tokens[700:740], seq=2), decode(llm, tokens[700:740], seq=1)
        )
        assert llm.restore(saved, 1)
        np.testing.assert_array_equal(decode(llm, tokens[300:340], seq=1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_unknown_sequences_are_not_copied_moved_or_kept(models, tokens, family):
    model, il = models[family], LAYER[family]
    with Bounded(model, config(), n_seq=2) as llm, Bounded(model, config()) as fresh:
        memory = llm.memory
        decode(llm, tokens[:200])
        before = llm.kept(il, 0).tolist()
        copy(llm, 0, 1, 50, 150)
        copy(llm, 0, 7)
        copy(llm, 0, 0)
        llama_cpp.llama_memory_seq_add(memory, 0, 150, -1, -10)
        llama_cpp.llama_memory_seq_div(memory, 0, 0, -1, 2)
        llama_cpp.llama_memory_seq_keep(memory, 5)
        assert not llama_cpp.llama_memory_can_shift(memory)
        assert not remove(llm, 0, 100, seq=0)
        assert not remove(llm, 100, 150, seq=0)
        assert not remove(llm, 100, -1, seq=-1)
        assert not remove(llm, 0, -1, seq=9)
        assert llm.kept(il, 0).tolist() == before
        assert len(llm.kept(il, 0, 1)) == 0
        # given explicitly, the bounds of the whole sequence do
        copy(llm, 0, 1, 0, 200)
        assert llm.kept(il, 0, 1).tolist() == before
        decode(fresh, tokens[:200])
        expected = decode(fresh, tokens[200:240])
        for seq in (0, 1):
            np.testing.assert_array_equal(decode(llm, tokens[200:240], seq), expected)


def test_a_sequence_that_was_emptied_starts_anew(model, tokens):
    with Bounded(model, config()) as fresh:
        expected = decode(fresh, tokens[500:700])
    with Bounded(model, config(), n_seq=2) as llm:
        decode(llm, tokens[:200], seq=0)
        decode(llm, tokens[:100], seq=1)
        assert remove(llm, -1, -1, seq=0)
        np.testing.assert_array_equal(decode(llm, tokens[500:700], seq=0), expected)
        llama_cpp.llama_memory_clear(llm.memory, True)
        assert llm.stats().n_cells_used == 0
        assert llm.restore(llm.state(1), 0)  # of a sequence without cells
        np.testing.assert_array_equal(decode(llm, tokens[500:700], seq=1), expected)


def test_compressing_one_sequence_leaves_the_others(model, tokens):
    with Bounded(model, config()) as alone:
        decode(alone, tokens[:60])
        expected = decode(alone, tokens[60:100])
    with Bounded(model, config(), n_seq=2) as llm:
        decode(llm, tokens[:60], seq=1)
        decode(llm, tokens[300:345], seq=0)
        assert native.compress(llm.ctx, 0, 20, 12) == 0
        assert native.compress(llm.ctx, 0, 20, 12) == 1
        assert native.compress(llm.ctx, 0, 13, 12) < 0
        assert native.compress(llm.ctx, 2, 20, 12) < 0
        np.testing.assert_array_equal(decode(llm, tokens[60:100], seq=1), expected)


@pytest.mark.parametrize("flags", [0, native.FLAG_GRAPH_GATHER], ids=["host", "graph"])
def test_an_eviction_aborted_at_any_point_leaves_a_cache_that_goes_on_or_none(
    models, tokens, flags
):
    """While keys are scored nothing has changed yet; a device that stops while it moves rows
    leaves an empty sequence."""
    model = models["llama"]
    with Bounded(model, config(), flags=flags) as straight:
        decode(straight, tokens[:48])
        kept = straight.kept(1, 1).tolist()
        expected = decode(straight, tokens[48:80])
    polls, results, at = [0], set(), 1
    while True:
        with Bounded(model, config(), flags=flags) as llm:
            decode(llm, tokens[:48])
            polls[0] = 0

            def abort(_, at=at):
                polls[0] += 1
                return polls[0] == at

            callback = llama_cpp.ggml_abort_callback(abort)
            llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
            result = llm.decode(tokens[48:56])
            if polls[0] < at:
                assert result == 0
                break  # it ran to its end
            results.add(result)
            if result == -3:
                assert flags == native.FLAG_GRAPH_GATHER
                assert llm.stats().n_cells_used == 0
                decode(llm, tokens[:48])
            elif llm.stats().n_evictions == 0:
                assert result == 2
                assert llm.kept(1, 1).tolist() == kept
            if result == 0:  # what can't be stopped any more is done
                logits = [llm.logits(), *decode(llm, tokens[56:80])]
            else:
                logits = decode(llm, tokens[48:80])
            np.testing.assert_array_equal(logits, expected)
        at += 1
    assert results >= ({2, -3} if flags else {2})


IN_ANOTHER_PROCESS = """
import json, sys
import numpy as np
from bounded import Bounded, config, load
from test_engine_sequences import load_file, take_turns
model, path, whole, tokens = json.loads(sys.argv[1])
with Bounded(load(model), config(), n_seq=3) as llm:
    for seq in range(3):
        llm.decode(tokens[-8:], seq)  # what it held is replaced
    for seq in [-1] if whole else [1, 2, 0]:
        assert load_file(llm, f"{path}.{seq}", seq)
    sys.stdout.buffer.write(take_turns(llm, tokens).tobytes())
"""


def save_file(llm, path, seq) -> bool:
    """A state file of one sequence, of all of them with -1."""
    path, tokens = str(path).encode(), (llama_cpp.llama_token * 1)(7)
    if seq < 0:
        return llama_cpp.llama_state_save_file(llm.ctx, path, tokens, 1)
    return llama_cpp.llama_state_seq_save_file(llm.ctx, path, seq, tokens, 1) > 0


def load_file(llm, path, seq) -> bool:
    path, tokens, n = str(path).encode(), (llama_cpp.llama_token * 1)(), ctypes.c_size_t()
    if seq < 0:
        return llama_cpp.llama_state_load_file(llm.ctx, path, tokens, 1, ctypes.byref(n))
    load = llama_cpp.llama_state_seq_load_file
    return load(llm.ctx, path, seq, tokens, 1, ctypes.byref(n)) > 0


def take_turns(llm, tokens) -> np.ndarray:
    """Logits of 10 turns of 7 tokens for each of three sequences."""
    turns = [(i, seq) for i in range(10) for seq in range(3)]
    return np.array([decode(llm, tokens[100 * seq + 7 * i :][:7], seq)[0] for i, seq in turns])


@pytest.mark.parametrize("whole", [True, False], ids=["all", "one by one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_process_goes_on_to_the_bit_from_state_files(
    models, tokens, tmp_path, family, whole
):
    with Bounded(models[family], config(), n_seq=3) as llm:
        for seq, n in enumerate((200, 90, 30)):
            decode(llm, tokens[1000 * seq :][:n], seq)
        for seq in [-1] if whole else range(3):
            assert save_file(llm, tmp_path / f"state.{seq}", seq)
        before = llm.stats().n_evictions
        expected = take_turns(llm, tokens[3000:])
        assert llm.stats().n_evictions - before >= 3 * 4
    path = models[family].path_model
    arguments = json.dumps([path, str(tmp_path / "state"), whole, tokens[3000:]])
    process = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr.decode()
    logits = np.frombuffer(process.stdout, np.float32).reshape(expected.shape)
    np.testing.assert_array_equal(logits, expected)


def test_a_state_with_a_windowed_part_is_refused_by_a_model_without(models, tokens):
    with Bounded(models["llama"], config()) as llm:
        decode(llm, tokens[:100], 0)
        state = bytearray(llm.state())
        used = state.index(b"qflt") + 8 * 4 + 8 + 4 + 3 * 4  # llama_qfilter::state_write()
        assert state[used : used + 4] == bytes(4)
        state[used] = 1
        assert not llm.restore(bytes(state))
        assert llm.restore(bytes(state[:used] + bytes(1) + state[used + 1 :]))
