"""Compressing a cache, and saving and restoring it: in memory, in files, in upstream's caches."""

import dataclasses
import json
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from conftest import last_logits, watched_sizes
from gguf_files import rectangular

from qfllama import Llama, QFilterConfig, QFilterError, gguf_copy, state
from qfllama.context import CACHE_TYPES
from qfllama.conversation import Conversation

N_LAYER, N_HEAD_KV, HEAD_DIM = 30, 3, 64
QFLLAMA = str(Path(sys.executable).with_name("qfllama"))
SMALL = QFilterConfig(
    max_length=128, window_length=32, sinks=4, interval=32, policy="knorm", archive=False
)
WIDE = QFilterConfig(
    max_length=512, window_length=32, sinks=4, interval=128, policy="knorm", archive=False
)
FACTS = (
    "The harbour of Aldermoor was built in 1821. Its lighthouse is painted green and white. "
    "The mayor is called Berta Quist, and she keeps three geese. Every spring the fishermen race "
    "in barrels, and the winner gets a cheese. The railway came in 1874 and left again in 1952. "
    "Now there is a bus at eight and another one at noon. Nobody has ever seen the second one. "
)


@pytest.fixture(scope="module")
def make(smollm2):
    """A function that makes a Llama on the real model; all of them are closed at the end."""
    opened = []

    def make(config: QFilterConfig | None = SMALL, **kwargs) -> Llama:
        kwargs = {"n_ctx": 1024, "flash_attn": True, "verbose": False} | kwargs
        opened.append(
            Llama(str(smollm2), qfilters=config, n_threads=1, n_threads_batch=1, **kwargs)
        )
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


@pytest.fixture(scope="module")
def small(make):
    return make()


@pytest.fixture(scope="module")
def wide(make):
    return make(WIDE)


@pytest.fixture(scope="module")
def tokens(small) -> list[int]:
    """400 tokens of which no two stretches are alike."""
    return np.random.default_rng(0).integers(100, small.n_vocab(), 400).tolist()


@pytest.fixture(scope="module")
def prompt(tokens) -> list[int]:
    """The first 240 of them."""
    return tokens[:240]


@pytest.fixture
def evaluated(monkeypatch):
    """How many tokens each call of eval got, of any Llama, from here on."""
    return watched_sizes(monkeypatch, "eval")


def kept(llm, layer=9) -> list[list[int]]:
    return [llm.kept_positions(layer, head).tolist() for head in range(N_HEAD_KV)]


def read(llm, tokens):
    llm.reset()
    llm.eval(tokens)
    return llm


def text(completion) -> str:
    return completion["choices"][0]["text"]


# -- compress


def test_compressing_keeps_the_keys_with_the_smallest_norms_of_every_head(wide, prompt):
    read(wide, prompt)
    layers = (0, 17, N_LAYER - 1)
    rows = {layer: wide.cached_rows(layer) for layer in layers}
    assert wide.compress(ratio=4) == (240, 60)
    assert wide.n_tokens == wide.qfilter_stats()["positions"] == 240
    assert wide.qfilter_stats()["cells_used"] == 60
    for layer in layers:
        keys, values = (t.view(np.float16).reshape(240, N_HEAD_KV, HEAD_DIM) for t in rows[layer])
        kept_keys, kept_values = (
            t.view(np.float16).reshape(60, N_HEAD_KV, HEAD_DIM) for t in wide.cached_rows(layer)
        )
        for head in range(N_HEAD_KV):
            norms = np.linalg.norm(keys[4:-32, head].astype(np.float64), axis=1)
            best = 4 + np.sort(np.argsort(norms, kind="stable")[: 60 - 4 - 32])
            expected = np.concatenate([np.arange(4), best, np.arange(240 - 32, 240)])
            np.testing.assert_array_equal(wide.kept_positions(layer, head), expected)
            np.testing.assert_array_equal(kept_keys[:, head], keys[expected, head])
            np.testing.assert_array_equal(kept_values[:, head], values[expected, head])


def test_after_compressing_a_prompt_that_goes_on_is_not_read_again(wide, prompt, evaluated):
    read(wide, prompt)
    wide.compress(max_length=60)
    assert wide.rewind_limit() == 240 - 32
    del evaluated[:]
    wide.create_completion([*prompt, 5, 6, 7], max_tokens=1, temperature=0)
    assert evaluated == [3]
    wide.create_completion([*prompt[:220], 8, 9], max_tokens=1, temperature=0)
    assert evaluated == [3, 2], "within the window it can be cut"
    assert wide.qfilter_stats()["cells_used"] == 60 - 20 + 2
    wide.create_completion([*prompt[:150], 8, 9], max_tokens=1, temperature=0)
    assert evaluated == [3, 2, 152], "before it everything is read again"
    assert wide.qfilter_stats()["cells_used"] == 152


def test_compressing_leaves_the_logits_and_generation_goes_on(wide, prompt, evaluated):
    read(wide, prompt)
    expected = int(last_logits(wide).argmax())
    wide.compress(ratio=4)
    del evaluated[:]
    assert next(wide.generate(prompt, temp=0.0)) == expected
    assert sum(evaluated) == 0
    wide.eval([5])
    assert np.isfinite(last_logits(wide)).all()
    wide.reset()
    assert wide.compress(ratio=2) == (0, 0)


def test_what_can_not_be_compressed_is_said_in_a_line(make, wide, prompt):
    read(wide, prompt)
    for arguments, message in (
        ({}, "give either ratio or max_length"),
        ({"ratio": 2, "max_length": 100}, "give either"),
        ({"ratio": 0.5}, "ratio is 0.5"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"max_length": 0}, "max_length is 0"),
        (
            {"ratio": 12},
            r"20 cells can't hold .* max_length >= 36 \(of 240 cells a ratio <= 6.6\)",
        ),
    ):
        with pytest.raises(QFilterError, match=message):
            wide.compress(**arguments)
    assert wide.compress(max_length=240) == (240, 240)
    assert wide.compress(ratio=6.6)[1] == 37
    with pytest.raises(QFilterError, match="full cache"):
        make(None, n_ctx=256).compress(ratio=2)


@pytest.mark.parametrize(("ratio", "n_cells"), [(2, 120), (4, 60), (30, 8)])
def test_a_window_that_nobody_gave_is_an_eighth_of_what_is_kept(make, prompt, ratio, n_cells):
    """512 of the 4,096 cells of the default would be more than the whole prompt."""
    llm = read(make(QFilterConfig(policy="knorm", archive=False), n_ctx=8192), prompt)
    keys = llm.cached_rows(9)[0].view(np.float16).reshape(240, N_HEAD_KV, HEAD_DIM)
    assert llm.compress(ratio=ratio) == (240, n_cells)
    window = n_cells // 8
    assert llm.rewind_limit() == 240 - window
    for head in range(N_HEAD_KV):
        norms = np.linalg.norm(keys[4 : 240 - window, head].astype(np.float64), axis=1)
        best = 4 + np.sort(np.argsort(norms, kind="stable")[: n_cells - 4 - window])
        expected = [*range(4), *best, *range(240 - window, 240)]
        assert llm.kept_positions(9, head).tolist() == expected
    logits = last_logits(llm)
    assert np.isfinite(logits).all()
    llm.eval(prompt[:3])
    assert llm.qfilter_stats()["cells_used"] == n_cells + 3
    llm.close()


def test_fewer_cells_than_the_sinks_and_a_window_of_one_are_refused(make, prompt):
    llm = read(make(QFilterConfig(policy="knorm", archive=False), n_ctx=8192), prompt)
    with pytest.raises(QFilterError, match=r"4 cells .*max_length >= 5 "):
        llm.compress(max_length=4)
    assert llm.compress(max_length=5).after == 5
    llm.close()


# -- states in memory


def test_a_saved_state_takes_the_bytes_of_its_cells(small, tokens):
    read(small, tokens)
    used = small.qfilter_stats()["cells_used"]
    row_bytes = 2 * N_LAYER * N_HEAD_KV * HEAD_DIM * 2
    table = N_LAYER * N_HEAD_KV * used * 4
    saved = small.save_state()
    assert used * row_bytes < saved.llama_state_size < used * row_bytes + table + 64_000
    assert len(pickle.dumps(saved)) < saved.llama_state_size + 16_000


def test_a_state_that_does_not_fit_is_refused_with_the_reason(make, small, wide, tokens):
    stock = make(None, n_ctx=256)
    other_types = make(type_k="q8_0", type_v="q8_0")
    other_policy = make(dataclasses.replace(SMALL, policy="streaming"))
    other_rope = make(rope_freq_base=20000.0)
    states = [read(llm, tokens[:60]).save_state() for llm in (small, stock)]
    for llm, saved, reason in (
        (wide, states[0], "its max_length is 128, here it is 512"),
        (other_types, states[0], "its type_k is f16, here it is q8_0"),
        (other_policy, states[0], "its policy is knorm, here it is streaming"),
        (other_rope, states[0], "other RoPE"),
        (stock, states[0], "saved with a bounded cache"),
        (small, states[1], "saved with a full cache"),
    ):
        with pytest.raises(RuntimeError, match=f"this state can't be loaded: .*{reason}"):
            llm.load_state(saved)
        assert llm.n_tokens == 0


# -- upstream's caches of states


@pytest.fixture(params=["RAM", "disk"])
def state_cache(request, tmp_path):
    if request.param == "RAM":
        return llama_cpp.LlamaRAMCache()
    return llama_cpp.LlamaDiskCache(str(tmp_path / "cache"))


def test_a_cache_of_states_brings_back_the_compacted_cache(
    make, small, tokens, evaluated, state_cache
):
    """Two prompts by turns: neither is read twice, and the answers are those without a cache."""
    prompts = [tokens[:150], tokens[200:350]]
    expected = []
    for prompt in prompts:
        small.reset()
        answer = small.create_completion(prompt, max_tokens=4, temperature=0)
        first = kept(small)
        going_on = [*small.input_ids[: small.n_tokens].tolist(), 5, 6]
        again = small.create_completion(going_on, max_tokens=4, temperature=0)
        expected.append((text(answer), first, going_on, text(again), kept(small)))

    llm = make()
    llm.set_cache(state_cache)
    for prompt, (answer, positions, *_) in zip(prompts, expected, strict=True):
        assert text(llm.create_completion(prompt, max_tokens=4, temperature=0)) == answer
        assert kept(llm) == positions
    other = make()  # as in another process: nothing but the cache
    other.set_cache(state_cache)
    for n_new in (2, 1):  # the second time all is there, one token is for the logits
        for _, _, going_on, answer, positions in expected:
            del evaluated[:]
            result = other.create_completion(going_on, max_tokens=4, temperature=0)
            assert text(result) == answer
            assert kept(other) == positions
            assert evaluated[0] == n_new


def test_states_of_others_are_misses(make, small, wide, tokens, evaluated, state_cache):
    stock = make(None, n_ctx=512)
    stock.set_cache(state_cache)
    wide.set_cache(state_cache)
    prompt = tokens[:140]
    small.reset()
    expected = text(small.create_completion(prompt, max_tokens=4, temperature=0))
    stock.create_completion([*prompt, 8], max_tokens=4, temperature=0)
    wide.create_completion([*prompt, 7], max_tokens=4, temperature=0)
    wide.set_cache(None)

    llm = make()
    llm.set_cache(state_cache)
    del evaluated[:]
    assert text(llm.create_completion(prompt, max_tokens=4, temperature=0)) == expected
    assert evaluated[0] == 140
    # and they are still there for those who saved them
    keys = list(getattr(state_cache, "cache_state", None) or state_cache.cache)
    assert len(keys) == 3


def test_a_state_of_a_cache_with_an_archive_is_loaded_as_far_as_it_can_be_cut_back(
    make, tokens, evaluated
):
    """The state has no archive, the live cache has one and can go back to the beginning."""
    llm = make(dataclasses.replace(SMALL, archive=True, recall=False))
    llm.set_cache(llama_cpp.LlamaRAMCache())
    prompt = tokens[:300]
    llm.create_completion(prompt, max_tokens=1, temperature=0)
    assert llm.rewind_limit() == 0
    saved = llm.save_state()
    limit = saved.qfilters["rewind_limit"]
    other = make(dataclasses.replace(SMALL, archive=True, recall=False))
    other.load_state(saved)
    assert 0 < other.rewind_limit() == limit
    del evaluated[:]
    llm.create_completion([*prompt[:150], 5, 6, 7], max_tokens=1, temperature=0)
    assert sum(evaluated) < 50, "the live cache goes back; the state could not"


def test_a_state_that_is_refused_is_a_miss(make, tokens, state_cache):
    """One of a Llama with more positions."""
    long = make(n_ctx=1024)
    long.set_cache(state_cache)
    long.create_completion(tokens[:400] + tokens[:300], max_tokens=1, temperature=0)
    long.set_cache(None)
    llm, plain = make(n_ctx=512), make(n_ctx=512)
    llm.set_cache(state_cache)
    prompt = tokens[:400]
    answer = text(llm.create_completion(prompt, max_tokens=4, temperature=0))
    assert answer == text(plain.create_completion(prompt, max_tokens=4, temperature=0))


def test_a_document_in_the_cache_is_read_once_for_many_questions(make, tokens, evaluated):
    """What the Llama holds shares more with the next question, but can't be cut back to it."""
    llm = make(WIDE)
    cache = llama_cpp.LlamaRAMCache()
    llm.set_cache(cache)
    document = tokens[:200]
    read(llm, document)
    llm.compress(max_length=100)
    cache[document] = llm.save_state()
    answers = []
    for question in ([5, 6, 7], [8, 9], [5, 6, 7]):
        del evaluated[:]
        completion = llm.create_completion(document + question, max_tokens=12, temperature=0)
        answers.append(text(completion))
        assert evaluated[0] <= len(question)
    assert answers[0] == answers[2]
    llm.eval(tokens[200:260])
    llm.compress(max_length=60)
    assert llm.rewind_limit() > len(document) + 2, "or it can be cut back without the saved states"
    del evaluated[:]
    llm.create_completion([*document, 5, 6, 9], max_tokens=1, temperature=0)
    assert evaluated == [1], "the longest of the saved ones has read 5 and 6"


# -- prompt files

CONTINUE = """
import json, sys
import llama_cpp
import numpy as np
from qfllama import Llama, QFilterConfig
model, path, config, tokens = json.loads(sys.argv[1])
llm = Llama(model, n_ctx=1024, qfilters=QFilterConfig(**config), n_threads=1, n_threads_batch=1,
            verbose=False)
prompt = llm.load_prompt(path)
assert llm.n_tokens == len(prompt.tokens)
for token in tokens:
    llm.eval([token])
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    logits = np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),))
    sys.stdout.buffer.write(logits.tobytes())
"""


def go_on_in_another_process(model, path, config, tokens) -> np.ndarray:
    """float32 [len(tokens), n_vocab]: logits after each token that follows the saved prompt."""
    arguments = json.dumps([str(model), str(path), dataclasses.asdict(config), tokens])
    process = subprocess.run(
        [sys.executable, "-c", CONTINUE, arguments], check=False, capture_output=True
    )
    assert process.returncode == 0, process.stderr.decode()
    return np.frombuffer(process.stdout, np.float32).reshape(len(tokens), -1)


def go_on(llm, tokens) -> np.ndarray:
    logits = []
    for token in tokens:
        llm.eval([token])
        logits.append(last_logits(llm))
    return np.array(logits)


def test_another_process_goes_on_to_the_bit_also_through_evictions(
    smollm2, small, tokens, tmp_path
):
    read(small, tokens[:140])
    before = small.qfilter_stats()["evictions"]
    small.save_prompt(tmp_path / "prompt.qfstate")
    expected = go_on(small, tokens[140:170])
    assert small.qfilter_stats()["evictions"] > before, "no eviction: nothing is shown"
    logits = go_on_in_another_process(smollm2, tmp_path / "prompt.qfstate", SMALL, tokens[140:170])
    np.testing.assert_array_equal(logits, expected)


def test_a_compressed_prompt_goes_on_to_the_bit_in_a_small_cache(smollm2, wide, prompt, tmp_path):
    path = tmp_path / "prompt.qfstate"
    read(wide, prompt)
    wide.compress(ratio=4)
    n_bytes = wide.save_prompt(path, {"any": ["thing"]})
    assert n_bytes == path.stat().st_size < 60 * 2 * N_LAYER * N_HEAD_KV * HEAD_DIM * 2 * 1.1
    saved = state.read_prompt(path, header_only=True)
    assert saved.cells == 60
    assert saved.tokens.tolist() == prompt
    assert saved.extra == {"any": ["thing"]}
    assert saved.data == b""
    config = state.config_for(saved, room=196)
    assert (config.max_length, config.policy, config.sinks) == (256, "knorm", 4)
    expected = go_on(wide, prompt[:30])
    np.testing.assert_array_equal(
        go_on_in_another_process(smollm2, path, config, prompt[:30]), expected
    )


def test_a_small_cache_evicts_from_a_loaded_prompt_what_its_scores_say(
    make, wide, prompt, tmp_path
):
    """Loaded with another window: the rows that stay are those with the smallest norms."""
    path = tmp_path / "prompt.qfstate"
    read(wide, prompt)
    wide.compress(max_length=120)
    wide.save_prompt(path)
    config = QFilterConfig(max_length=128, window_length=48, sinks=4, interval=32, policy="knorm")
    llm = make(config)
    llm.load_prompt(path)
    assert kept(llm) == kept(wide)
    llm.eval(prompt[:8])  # full
    positions = kept(llm)
    keys = llm.cached_rows(9)[0].view(np.float16).reshape(128, N_HEAD_KV, HEAD_DIM)
    llm.eval(prompt[8:9])
    for head, after in enumerate(kept(llm)):
        norms = np.linalg.norm(keys[4:-48, head].astype(np.float64), axis=1)
        ranks = np.sort(np.argsort(norms, kind="stable")[: 128 - 32 - 4 - 48])
        best = [positions[head][4 + rank] for rank in ranks]
        assert after == [*range(4), *best, *positions[head][-48:], 248]


def test_files_that_can_not_be_loaded_are_refused_with_the_reason(
    make, small, wide, tokens, tmp_path
):
    path = tmp_path / "prompt.qfstate"
    read(wide, tokens[:200])
    wide.save_prompt(path)
    good, whole = path.read_bytes(), state.read_prompt(path)
    read(small, tokens[:100])
    held = kept(small)

    def refused(reason, content=None, **settings):
        bad = tmp_path / "bad.qfstate"
        if content is None:
            changed = dataclasses.replace(whole, settings=whole.settings | settings)
            state.write_prompt(bad, changed)
        else:
            bad.write_bytes(content)
        with pytest.raises(QFilterError, match=reason) as caught:
            small.load_prompt(bad)
        assert "\n" not in str(caught.value)
        assert "bad.qfstate" in str(caught.value)

    refused("has 200 cells, this cache 128")
    refused("another model", model="0" * 64)
    refused("other filters", filters="0" * 64)
    refused("its policy is streaming, here it is knorm", policy="streaming")
    refused("its sinks is 8", sinks=8)
    refused("its type_v is q8_0", type_v="q8_0")
    refused("other RoPE", run=[])
    for end in (20, 47, 100, len(good) // 2, len(good) - 1):
        refused("truncated", good[:end])
    for at in (12, 25, 60, 5000, len(good) // 2):
        refused("truncated or damaged", good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    refused("truncated or damaged", good + b"x")
    for old, new in (
        (b'"cells": 200', b'"cells": 1e999'),
        (b'"extra": {}', b'"extra": ' + b"[" * 9**5),
    ):
        refused("truncated or damaged", with_head(good, old, new))
    refused("version 3, this qfllama reads versions up to 2", good[:8] + b"\3" + good[9:])
    refused("not a state file", b"GGUF" + good[4:])
    refused("not a state file", b"")
    with pytest.raises(QFilterError, match="nothing.qfstate is not a file"):
        small.load_prompt(tmp_path / "nothing.qfstate")
    assert kept(small) == held, "a refusal changes nothing"
    with pytest.raises(QFilterError, match="use max_length >= 200"):
        state.config_for(whole, max_length=128)
    with pytest.raises(QFilterError, match="200 positions, n_ctx is 256|cells"):
        make(SMALL, n_ctx=256).load_prompt(path)


def test_a_file_that_the_engine_refuses_leaves_the_conversation_as_it_was(
    make, small, wide, tokens, tmp_path
):
    """Its checksum is right, what it holds is not: only llama.cpp finds that out."""
    path, bad = tmp_path / "prompt.qfstate", tmp_path / "bad.qfstate"
    read(wide, tokens[:60]).save_prompt(path)
    whole = state.read_prompt(path)
    read(small, tokens[:200])
    assert small.qfilter_stats()["evictions"] > 0
    held, limit, used = kept(small), small.rewind_limit(), small.qfilter_stats()["cells_used"]
    rows = small.cached_rows(17)
    logits = last_logits(small)
    for data in (whole.data[: len(whole.data) // 2], b"\xff" * len(whole.data), whole.data[:8]):
        state.write_prompt(bad, dataclasses.replace(whole, data=data))
        with pytest.raises(QFilterError, match="bad.qfstate"):
            small.load_prompt(bad)
        assert kept(small) == held
        assert (small.n_tokens, small.rewind_limit()) == (200, limit)
        assert small.qfilter_stats()["cells_used"] == used
        for before, after in zip(rows, small.cached_rows(17), strict=True):
            np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(last_logits(small), logits)
    fresh = read(make(), tokens[:200])
    np.testing.assert_array_equal(go_on(small, tokens[200:230]), go_on(fresh, tokens[200:230]))


def test_saving_and_loading_a_prompt_hold_its_state_once(wide, tokens, tmp_path):
    path = tmp_path / "prompt.qfstate"
    read(wide, tokens)
    wide.save_prompt(path)  # the model's fingerprint is taken once
    size = path.stat().st_size

    def peak(work) -> float:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1] / size
        finally:
            tracemalloc.stop()

    assert 0.9 < peak(lambda: wide.save_prompt(path)) < 1.2
    wide.reset()
    assert 0.9 < peak(lambda: wide.load_prompt(path)) < 1.2
    assert 0.9 < peak(wide.save_state) < 1.2


def with_head(content: bytes, old: bytes, new: bytes) -> bytes:
    """A prompt file with another JSON part, its checksum right."""
    at = len(state.MAGIC) + state.HEAD.size
    n = at + state.SIZES[1].size
    n_json, *sizes = state.SIZES[1].unpack(content[at:n])
    head = content[n : n + n_json]
    assert old in head
    head = head.replace(old, new)
    rest = head + content[n + n_json :]
    crc = zlib.crc32(rest, zlib.crc32(struct.pack("<3Q", len(head), *sizes)))
    return state.MAGIC + state.HEAD.pack(1, crc) + state.SIZES[1].pack(len(head), *sizes) + rest


def test_500_damaged_files_are_refused_or_changed_nothing(small, tokens, tmp_path):
    path, bad, draw = tmp_path / "prompt.qfstate", tmp_path / "bad.qfstate", random.Random(0)
    read(small, tokens[:20]).save_prompt(path)
    good, held = path.read_bytes(), kept(small)
    for i in range(500):
        damaged = bytearray(good)
        at = draw.randrange(1500 if i % 2 else len(good))  # half of them in the header
        if i % 5:
            damaged[at] ^= 1 << draw.randrange(8)
        else:
            del damaged[at:]
        bad.write_bytes(damaged)
        with pytest.raises(QFilterError) as caught:
            small.load_prompt(bad)
        assert "\n" not in str(caught.value)
        with suppress(QFilterError):  # without its checksum, as chat first looks at it
            state.config_for(state.read_prompt(bad, header_only=True))
    assert kept(small) == held


def test_saving_writes_all_or_nothing(small, tokens, tmp_path):
    path = tmp_path / "prompt.qfstate"
    small.reset()
    with pytest.raises(QFilterError, match="empty"):
        small.save_prompt(path)
    read(small, tokens[:50])
    with pytest.raises(QFilterError, match="No such file"):
        small.save_prompt(tmp_path / "missing" / "prompt.qfstate")
    small.save_prompt(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        small.save_prompt(path, {"not": {"JSON"}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.qfstate"]


def test_a_model_is_known_by_its_weights_and_keys_but_not_by_its_filters(tmp_path, smollm2):
    def write(name, value=0.0, tokenizer="a"):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_string("tokenizer.chat_template", tokenizer)
        data = np.zeros(100_000, np.float32)
        data[-1] = value
        writer.add_tensor("weight", data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return state.model_identity(tmp_path / name)

    assert write("a.gguf") == write("b.gguf")
    assert write("a.gguf") != write("c.gguf", value=1.0)
    assert write("a.gguf") != write("d.gguf", tokenizer="b")
    weight = np.ones((N_LAYER, N_HEAD_KV, HEAD_DIM), np.float32) / 8
    filters = rectangular(weight)
    gguf_copy.write(smollm2, tmp_path / "filtered.gguf", filters)
    assert state.model_identity(tmp_path / "filtered.gguf") == state.model_identity(smollm2)
    assert state.filters_identity(filters) != state.filters_identity(rectangular(-weight))


# -- qfllama compress and chat --state


def run(*args, stdin=""):
    return subprocess.run(
        [QFLLAMA, *map(str, args)],
        check=False,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(FACTS * 3)
    return path


@pytest.fixture(scope="module")
def compressed(smollm2, book) -> Path:
    path = book.with_suffix(".qfstate")
    process = run(
        "compress", smollm2, "--file", book, "--ratio", 2, "-o", path, "--policy", "knorm",
        "--threads", 1, "--system", "You know Aldermoor.", "--window-length", 32,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    line = re.fullmatch(
        r"\S+book.qfstate: (\d+) tokens in (\d+) cells, ([\d.]+) MiB \(read at \d+ tok/s\)\n",
        process.stdout,
    )
    n_tokens, n_cells = int(line[1]), int(line[2])
    assert n_cells == -(-n_tokens // 2)
    assert float(line[3]) == pytest.approx(path.stat().st_size / 2**20, abs=0.06)
    return path


QUESTIONS = ["Who is the mayor?", "What does the winner get?"]


def test_a_chat_over_a_state_file_answers_as_if_it_had_never_been_written(
    make, smollm2, book, compressed
):
    process = run(
        "chat", smollm2, "--state", compressed, "--temperature", 0, "--threads", 1,
        "--max-tokens", 16, stdin=f"{QUESTIONS[0]}\n{QUESTIONS[1]}\n/reset\n{QUESTIONS[0]}\n",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr

    llm = make(dataclasses.replace(WIDE, max_length=1024, interval=512))
    conversation = Conversation(llm, "You know Aldermoor.", book.read_text())
    tokens = conversation.document_tokens()
    assert llm.detokenize(tokens[-8:]).decode().endswith("ever seen the second one. ")
    header = llm.tokenize(conversation.document_header().encode(), add_bos=False, special=True)
    assert tokens[: len(header)] == header and llm.keep_first(len(header)) == len(header)
    llm.eval(tokens)
    llm.compress(ratio=2)
    answers, between = [], "\n\n"
    for question in QUESTIONS:  # the template by hand: what follows the document and each answer
        turn = f"{between}{question}<|im_end|>\n<|im_start|>assistant\n"
        llm.eval(llm.tokenize(turn.encode(), add_bos=False, special=True))
        between, answer = "<|im_end|>\n<|im_start|>user\n", []
        for token in llm.generate([], reset=False, temp=0.0):
            if token == llm.token_eos() or len(answer) == 16:
                break
            answer.append(token)
        answers.append(llm.detokenize(answer).decode())
    assert process.stdout == "\n".join([*answers, answers[0]]) + "\n"
    prompts = [int(n) for n in re.findall(r"prompt (\d+) at", process.stderr)]
    assert max(prompts) < 30, "the document is not read again"
    cells = state.read_prompt(compressed, header_only=True).cells
    assert f"/{-(-(cells + 4096) // 256) * 256:,} cells" in process.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--full"], "leave out --full"),
        (["--system", "Hello"], "--system"),
        (["--policy", "streaming"], "policy knorm: leave out --policy"),
        (["--sinks", "8"], "sinks 4: leave out --sinks"),
        (["--type-k", "q8_0"], "its type_k is f16, here it is q8_0"),
        (["--max-length", "128"], "use max_length >= "),
        (["--n-ctx", "256"], "positions, n_ctx is 256"),
    ],
)
def test_a_chat_that_does_not_fit_its_state_is_one_line(smollm2, compressed, args, words):
    process = run("chat", smollm2, "--state", compressed, "--prompt", "Hi", *args)
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("qfllama: ")
    assert process.stderr.count("\n") == 1
    assert words in process.stderr


def test_a_file_of_save_prompt_holds_no_chat(smollm2, small, tokens, tmp_path):
    read(small, tokens[:50]).save_prompt(tmp_path / "raw.qfstate")
    process = run("chat", smollm2, "--state", tmp_path / "raw.qfstate", "--prompt", "Hi")
    assert process.returncode == 2
    assert "holds no document for a chat" in process.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ratio", "2", "--max-length", "100"], "exclude each other"),
        (["--ratio", "0.5"], "--ratio"),
        (["--ratio", "inf"], "--ratio inf"),
        (["--ratio", "100"], "smaller --ratio"),
        (["--n-ctx", "256"], "of 256 positions"),
        (["--n-ctx", "4294967296"], "--n-ctx"),
        (["--file", "/nonexistent/book.txt"], "book.txt"),
        (["-o", "/nonexistent/x.qfstate"], "/nonexistent does not exist"),
        ([], "no filters"),
        (["--policy", "knorm", "--type-v", "q9_9"], "unknown KV cache type 'q9_9'"),
    ],
)
def test_what_can_not_be_compressed_is_one_line_and_writes_nothing(
    smollm2, book, tmp_path, args, words
):
    process = run(
        "compress",
        smollm2,
        "--file",
        book,
        "-o",
        tmp_path / "out.qfstate",
        "--window-length",
        16,
        *args,
    )
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1, process.stderr
    assert words in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_to_compress_is_sent_to_chat(smollm2, tmp_path):
    (tmp_path / "short.txt").write_text("One two three.")
    words = ["--file", tmp_path / "short.txt", "-o", tmp_path / "out", "--ratio", 1]
    process = run("compress", smollm2, *words)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "last 64" in process.stderr and "qfllama chat --file" in process.stderr


def test_an_existing_file_is_replaced_only_by_force(smollm2, book, compressed):
    before = compressed.read_bytes()
    command = ["compress", smollm2, "--file", book, "-o", compressed, "--policy", "knorm"]
    process = run(*command)
    assert process.returncode == 2
    assert "--force" in process.stderr
    assert compressed.read_bytes() == before


def test_the_document_is_never_replaced(smollm2, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(FACTS)
    command = ["compress", smollm2, "--file", path, "-o", path, "--policy", "knorm", "--force"]
    process = run(*command)
    assert process.returncode == 2
    assert "is the document itself" in process.stderr
    assert path.read_text() == FACTS


# -- cache types by name


@pytest.mark.parametrize("name", list(CACHE_TYPES))
def test_every_cache_type_can_be_named(make, tokens, name):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    llm = make(SMALL, type_k=name, type_v=name.upper(), n_ctx=512)
    llm.eval(tokens[:140])
    stats = llm.qfilter_stats()
    assert stats["evictions"] == 1
    assert stats["kv_bytes"] == 2 * N_LAYER * 256 * N_HEAD_KV * HEAD_DIM // block * size
    assert llm.settings()["type_k"] == llm.settings()["type_v"] == name
    assert np.isfinite(last_logits(llm)).all()
    llm.close()
