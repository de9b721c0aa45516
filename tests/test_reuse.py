"""Rewinding and reusing what a bounded cache has read, against contexts that start from scratch.

Batches are at most 32 tokens: up to 63, llama.cpp's CPU attention computes a position in the same
way whatever else is in its batch, so results can be compared to the last bit.
"""

import random
from collections import Counter

import llama_cpp
import numpy as np
import pytest
from conftest import last_logits

from qfllama import Llama, QFilterConfig

N_BATCH, N_ANSWER = 32, 6
SEED = 38  # of edits that cut in every way there is
SMALL = QFilterConfig(
    max_length=128, window_length=40, sinks=4, interval=32, policy="knorm", archive=False
)


@pytest.fixture(scope="module")
def make(smollm2):
    """A function that makes a Llama on the real model; all of them are closed at the end."""
    opened = []

    def make(config: QFilterConfig = SMALL, **kwargs) -> Llama:
        kwargs = {"n_ctx": 2048, "n_batch": N_BATCH, "verbose": False} | kwargs
        opened.append(
            Llama(str(smollm2), qfilters=config, n_threads=1, n_threads_batch=1, **kwargs)
        )
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


@pytest.fixture(scope="module")
def live(make):
    return make()


@pytest.fixture(scope="module")
def fresh(make):
    return make()


@pytest.fixture(scope="module")
def tokens(live) -> list[int]:
    """300 tokens of which no two stretches are alike."""
    return np.random.default_rng(0).integers(100, live.n_vocab(), 300).tolist()


def kept(llm) -> np.ndarray:
    """[3 layers, 3 KV heads, cells] positions."""
    return np.array(
        [[llm.kept_positions(layer, head) for head in range(3)] for layer in (0, 9, 29)]
    )


def watch(llm, monkeypatch) -> list[tuple[int, list[int]]]:
    """(first position, tokens) of every call of eval from here on."""
    calls = []
    evaluate = llm.eval

    def watched(batch):
        calls.append((llm.n_tokens, list(batch)))
        evaluate(batch)

    monkeypatch.setattr(llm, "eval", watched)
    return calls


def test_what_is_kept_does_not_depend_on_how_the_tokens_come_in(live, fresh, tokens):
    """llama_decode() itself, one token at a time, evicts where no cell is left: so shall batches."""
    fresh.reset()
    before = fresh.qfilter_stats()["evictions"]
    for token in tokens:
        llama_cpp.Llama.eval(fresh, [token])
    n_evictions = -((SMALL.max_length - len(tokens)) // SMALL.interval)
    assert fresh.qfilter_stats()["evictions"] - before == n_evictions > 3

    for sizes in ([300], [7, 50, 1, 33, 100, 2, 60, 47]):
        live.reset()
        for size in sizes:
            live.eval(tokens[live.n_tokens : live.n_tokens + size])
        assert live.n_tokens == len(tokens)
        np.testing.assert_array_equal(kept(live), kept(fresh))
        np.testing.assert_array_equal(last_logits(live), last_logits(fresh))


def test_the_rewind_limit_is_the_first_position_that_can_be_cut_at(live, tokens):
    live.reset()
    assert live.rewind_limit() == 0
    live.eval(tokens[:128])
    assert live.rewind_limit() == 0, "nothing has been evicted"
    live.eval(tokens[128:150])  # the eviction at 128 left the last 40 positions as they were
    assert live.rewind_limit() == 128 - 40
    before = kept(live)
    assert not live._ctx.kv_cache_seq_rm(0, 128 - 40 - 1, -1)
    np.testing.assert_array_equal(kept(live), before)
    assert live._ctx.kv_cache_seq_rm(0, 128 - 40, -1)


def test_setting_n_tokens_back_counts_as_room(live, fresh, tokens):
    """As upstream's speculative decoding does: what is beyond n_tokens goes with the next eval."""
    live.reset()
    fresh.reset()
    live.eval(tokens[:128])  # full
    live.n_tokens = 120
    live.eval(tokens[200:230])
    fresh.eval(tokens[:120] + tokens[200:230])
    assert live.qfilter_stats()["cells_used"] == 150 - 32
    np.testing.assert_array_equal(kept(live), kept(fresh))
    np.testing.assert_array_equal(last_logits(live), last_logits(fresh))


class Straight:
    """A slow, obvious model of the cache: what is in it, and what a fresh context has to read to
    be in the same state.

    Cutting at or after the latest eviction leaves nothing of what was cut. Cutting between it and
    the window before it leaves one thing: that the eviction has taken place already. Then a fresh
    context reads as many other tokens in place of those that were cut, up to the same eviction.
    """

    def __init__(self, config: QFilterConfig):
        self.config = config
        self.clear()

    def clear(self):
        self.parts = [(0, [])]  # (first position, tokens); each cuts off what the former had there
        self.n = self.used = self.evicted = self.limit = 0

    def cut(self, n: int) -> str:
        """Go back to `n` positions; what that means."""
        if n == self.n:
            return "nothing to cut"
        if n < self.limit:
            self.clear()
            return "read again"
        self.used -= self.n - n
        self.n = n
        if n >= self.evicted:
            start, tokens = self.parts[-1]
            self.parts[-1] = (start, tokens[: n - start])
            return "as if never read"
        self.parts = [
            (start, tokens[: max(0, n - start)] + [9906] * (len(tokens) - max(0, n - start)))
            for start, tokens in self.parts
        ]
        self.parts.append((n, []))
        return "in the window"

    def read(self, tokens: list[int]):
        self.parts[-1][1].extend(tokens)
        for _ in tokens:
            if self.used == self.config.max_length:
                self.used -= self.config.interval
                self.evicted, self.limit = self.n, self.n - self.config.window_length
            self.used += 1
            self.n += 1

    def replay(self, llm: Llama, n_first: int):
        llm.reset()
        llm.keep_first(n_first)
        for start, tokens in self.parts:
            llm.n_tokens = start
            llm.eval(tokens)


def edited(messages: list[dict], rng: random.Random) -> str:
    """Take back some turns of a conversation, more often few than many; what was done."""
    n_turns = len(messages) // 2
    choice = rng.random()
    if n_turns == 0 or choice < 0.5:
        return "went on"
    back = 1 if choice < 0.75 else rng.randint(1, min(n_turns, 6))
    del messages[-2 * back :]
    return "edited the last turn" if back == 1 else "edited an earlier turn"


@pytest.mark.slow
def test_30_turns_with_edits_answer_as_contexts_that_start_from_scratch(live, fresh, monkeypatch):
    live.reset()
    calls = watch(live, monkeypatch)
    model, rng, messages, seen = Straight(SMALL), random.Random(SEED), [], Counter()
    things = ["tea", "rain", "a clock", "Oslo", "bread", "the moon", "a violin", "snow", "ink"]
    for turn in range(30):
        edit = edited(messages, rng)
        question = f"{turn}: {rng.choice(['What is', 'Why', 'Describe', 'Who likes'])} {rng.choice(things)}?"
        messages.append({"role": "user", "content": question})
        held, calls[:] = live.input_ids[: live.n_tokens].tolist(), []
        answer = live.create_chat_completion(messages, max_tokens=N_ANSWER, temperature=0)

        start, new = calls[0]
        prompt = live.input_ids[:start].tolist() + new
        shared = next(
            (i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), len(held)
        )
        what = model.cut(shared) if held else "began"
        assert start == model.n, f"turn {turn}: {edit}, {what}: read from {start} on"
        model.read(new)
        model.replay(fresh, live._ctx.seq_stats().n_first)
        expected = []
        for token in fresh.generate([], reset=False, temp=0.0):
            if llama_cpp.llama_vocab_is_eog(fresh._model.vocab, token) or len(expected) == N_ANSWER:
                break
            expected.append(token)
        content = answer["choices"][0]["message"]["content"]
        assert content == fresh.detokenize(expected).decode("utf-8", "ignore"), (turn, edit, what)
        for _, single in calls[1:]:
            model.read(single)
        assert model.n == live.n_tokens
        assert model.used == live.qfilter_stats()["cells_used"]
        assert model.limit == live.rewind_limit()
        if fresh.n_tokens > live.n_tokens:
            fresh._ctx.kv_cache_seq_rm(0, live.n_tokens, -1)
        else:
            np.testing.assert_array_equal(last_logits(live), last_logits(fresh))
        np.testing.assert_array_equal(kept(live), kept(fresh))
        seen[what] += 1
        messages.append({"role": "assistant", "content": content})
    assert set(seen) == {
        "began",
        "nothing to cut",
        "as if never read",
        "in the window",
        "read again",
    }, seen
