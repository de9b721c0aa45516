"""What comes before the first user message always stays: engine, Llama, conversations."""

import contextlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_models
from bounded import Bounded, config, load
from tiny_models import some

from qfllama import Conversation, Llama, QFilterConfig, QFilterError, QFilterWarning
from qfllama.beginning import before_user
from qfllama.native import FLAG_GRAPH_GATHER, STATE_RESIZE, last_error

SIZES = {"max_length": 96, "window_length": 12, "interval": 16}
FIRST = 20
HEADS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # layer, KV head
BENCHMARK = str(Path(__file__).parents[1] / "benchmarks" / "beginning.py")
SYSTEM = "You are the cook of a ship. End every answer with the word ahoy."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load(tiny_models.two_layers(tmp_path_factory.mktemp("models"))) as model:
        yield model


@pytest.fixture
def open_cache(model):
    with contextlib.ExitStack() as stack:

        def open_cache(sizes=(), **params):
            sizes = config(**{**SIZES, "archive": True, **dict(sizes)})
            return stack.enter_context(Bounded(model, sizes, **{"n_ctx": 2048} | params))

        yield open_cache


def kept(llm, seq=0) -> list:
    return [llm.kept(*head, seq).tolist() for head in HEADS]


@pytest.mark.parametrize("policy", ["knorm", "streaming", "random", "kvdiff"])
@pytest.mark.parametrize("flags", [0, FLAG_GRAPH_GATHER], ids=["host", "graph"])
def test_it_is_the_same_as_that_many_sinks(open_cache, policy, flags):
    """Evictions, a rewind and a recall keep the same rows, to the row, and logits are equal."""
    first = open_cache({"policy": policy}, flags=flags)
    sinks = open_cache({"policy": policy, "sinks": FIRST}, flags=flags)
    assert first.keep_first(FIRST) == FIRST
    assert first.seq_stats().n_first == sinks.seq_stats().n_first == FIRST
    tokens = some(600)
    for llm in (first, sinks):
        llm.read(tokens)
    assert kept(first) == kept(sinks)
    assert all(positions[:FIRST] == list(range(FIRST)) for positions in kept(first))
    for llm in (first, sinks):
        assert llm.kv_cache_seq_rm(0, 300, -1)
        llm.read(some(90, seed=1))
    assert kept(first) == kept(sinks)
    for llm in (first, sinks):
        llm.question()
        llm.read(tokens[100:106])
        assert llm.recall() == 6
        llm.read(tokens[100:106], logits=True)
    assert kept(first) == kept(sinks)
    assert all(positions[:FIRST] == list(range(FIRST)) for positions in kept(first))
    assert (first.logits() == sinks.logits()).all()


@pytest.mark.parametrize(("family", "layer"), [("gemma3", 5), ("lfm2", 3)])
def test_it_is_the_same_beside_windowed_and_recurrent_layers(tmp_path, family, layer):
    """layer: one that evicts. Evictions, a state and a recall."""
    tiny_models.write(family, tmp_path / family)
    (path,) = tiny_models.convert([tmp_path / family])
    tokens, sizes = some(400), {**SIZES, "archive": True, "policy": "knorm"}
    with (
        load(path) as model,
        Bounded(model, config(**sizes)) as first,
        Bounded(model, config(**sizes, sinks=FIRST)) as sinks,
        Bounded(model, config(**sizes)) as restored,
    ):
        assert first.keep_first(FIRST) == FIRST
        for llm in (first, sinks):
            llm.read(tokens)
        assert restored.restore(first.state()) and restored.restore_archive(first.archive_state())
        found = []
        for llm in (first, sinks, restored):
            llm.question()
            llm.read(tokens[100:106])
            assert llm.recall() == 6
            llm.read(tokens[100:106], logits=True)
            found.append((llm.kept(layer, 0).tolist(), llm.logits().tolist()))
        assert found[0] == found[1] == found[2]
        assert found[0][0][:FIRST] == list(range(FIRST))


def test_it_can_be_said_before_anything_is_lost(open_cache):
    llm = open_cache(n_seq=2)
    assert llm.keep_first(FIRST) == FIRST
    assert llm.keep_first(1) == 2, "sinks stay anyway"
    llm.read(some(30))
    assert llm.keep_first(FIRST) == FIRST, "nothing was evicted yet"
    llm.read(some(200))
    assert llm.keep_first(FIRST + 5) == llm.keep_first(0) == FIRST
    assert llm.seq_stats(1).n_first == 2, "each sequence has its own"
    llm.kv_cache_seq_cp(0, 1, -1, -1)
    assert llm.seq_stats(1).n_first == FIRST
    llm.read(some(200, seed=1), seq=1)
    assert kept(llm, 1)[0][:FIRST] == list(range(FIRST))
    assert llm.kv_cache_seq_rm(0, -1, -1)
    assert llm.seq_stats(0).n_first == 2, "it ends when the sequence is emptied"
    assert llm.seq_stats(1).n_first == FIRST
    llm.read(some(300), seq=0)
    assert not all(positions[:FIRST] == list(range(FIRST)) for positions in kept(llm))


def test_a_rewind_into_it_is_a_new_beginning(open_cache):
    llm, tokens = open_cache(), some(300)
    assert llm.keep_first(FIRST) == FIRST
    llm.read(tokens)
    assert llm.kv_cache_seq_rm(0, 10, -1)
    assert llm.keep_first(30) == 30
    llm.read(some(300, seed=1))
    assert all(positions[:30] == list(range(30)) for positions in kept(llm))


def test_no_more_than_half_of_what_stays(open_cache):
    """96 cells, 16 go at a time, 12 are the window."""
    llm = open_cache()
    assert llm.keep_first(1000) == (96 - 16 - 12) // 2
    llm.read(some(500))
    assert len(kept(llm)[0]) <= 96
    least = open_cache({"archive_limit": 3 * 256 * 2 * 2 * 64 * 2 * 2})  # three blocks
    assert least.keep_first(34) == 34


def test_an_archive_at_its_limit_has_room_for_it(open_cache):
    sizes = {"max_length": 1600, "interval": 64, "archive_limit": 4 * 256 * 2 * 2 * 64 * 2 * 2}
    llm = open_cache(sizes, n_ctx=4096)
    assert llm.keep_first(700) == 2 * 256
    llm.read(some(3500))
    assert not llm.stats().archive_stopped
    assert all(llm.archived_row(p, 0) is not None for p in (0, 300, 511))
    assert llm.archived_row(600, 0) is None
    llm.question()
    llm.read(some(6))
    assert llm.recall() == 6
    assert kept(llm)[0][:512] == list(range(512))


@pytest.mark.parametrize("n_read", [40, 400], ids=["whole", "evicted"])
def test_a_state_has_the_number(open_cache, n_read):
    llm, other, small = open_cache(), open_cache(), open_cache({"max_length": 64, "interval": 20})
    llm.keep_first(30)
    llm.read(some(n_read))
    state = llm.state()
    assert other.restore(state)
    assert other.seq_stats().n_first == 30
    for cache in (llm, other):
        cache.read(some(200, seed=1), logits=True)
    assert kept(llm) == kept(other)
    assert (llm.logits() == other.logits()).all()
    if n_read == 40:  # 64 cells, 20 go at a time, 12 are the window
        assert small.restore(state, flags=STATE_RESIZE)
        assert small.seq_stats().n_first == (64 - 20 - 12) // 2
    else:
        llm.compress(50)
        tiny = open_cache({"max_length": 64, "interval": 24})
        assert not tiny.restore(llm.state(), flags=STATE_RESIZE)
        assert b"first 30 positions" in last_error()


# -- Llama


@pytest.fixture(scope="module")
def make(smollm2):
    opened = []

    def make(**sizes) -> Llama:
        sizes = {"max_length": 256, "policy": "kvdiff"} | sizes
        llm = Llama(
            str(smollm2), qfilters=QFilterConfig(**sizes), n_ctx=2048, n_threads=2, verbose=False
        )
        opened.append(llm)
        return llm

    yield make
    for llm in opened:
        llm.close()


def chat(system: str, user: str) -> list[dict]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def n_kept(llm: Llama) -> int:
    """How many of the first positions all heads of the first layers hold."""
    heads = [set(llm.kept_positions(*head).tolist()) for head in HEADS]
    return next(n for n in range(llm.n_ctx()) if not all(n in head for head in heads))


def ask(llm: Llama, messages: list[dict], **more) -> dict:
    return llm.create_chat_completion(messages, max_tokens=2, temperature=0, **more)


def prompt_tokens(llm: Llama, messages: list[dict]) -> list[int]:
    from qfllama.conversation import chat_formatter, tokenize_all

    return tokenize_all(llm._model, chat_formatter(llm)(messages=messages).prompt)


@pytest.mark.parametrize(
    ("messages", "end"),
    [
        (chat(SYSTEM, "Hello"), f"{SYSTEM}<|im_end|>\n<|im_start|>user\n"),
        (chat("  Hi is what you say. \n", "Hi"), "Hi is what you say. \n<|im_end|>\n<|im_start|>user\n"),
        ([{"role": "user", "content": "Tell me more."}], "<|im_end|>\n<|im_start|>user\n"),
        ([{"role": "system", "content": SYSTEM}], SYSTEM),
        ([], ""),
        ([{"role": "user", "content": ""}], ""),
        # a token of 64 bytes
        (chat(f"Rules:\n{'-' * 64}\nEnd with ahoy.", "Hello"), "ahoy.<|im_end|>\n<|im_start|>user\n"),
        # what the user says is in the default system prompt, too, and in what follows
        ([{"role": "user", "content": "AI"}], "<|im_end|>\n<|im_start|>user\n"),
        (chat(SYSTEM, "ship") + [{"role": "assistant", "content": "Aye. A ship."},
                                 {"role": "user", "content": "ship"}],
         f"{SYSTEM}<|im_end|>\n<|im_start|>user\n"),
    ],
)  # fmt: skip
def test_where_the_user_begins(make, messages, end):
    llm = make()
    tokens = prompt_tokens(llm, messages)
    n = before_user(llm._model, tokens, messages)
    assert llm.detokenize(tokens[:n], special=True).decode().endswith(end)
    assert (n > 0) == bool(end)


def test_a_text_that_is_not_there_keeps_nothing(make):
    llm = make()
    tokens = prompt_tokens(llm, chat(SYSTEM, "Hello"))
    assert before_user(llm._model, tokens, chat("Something else", "Hello")) == 0
    n = before_user(llm._model, tokens, chat(SYSTEM, "Something else"))
    assert llm.detokenize(tokens[:n], special=True).decode().endswith(SYSTEM)


def test_a_chat_completion_keeps_its_system_prompt(make):
    long = "The sea is wide and the wind is cold. " * 60 + "What is wide?"
    llm = make()
    n = before_user(llm._model, prompt_tokens(llm, chat(SYSTEM, long)), chat(SYSTEM, long))
    assert n > 20
    ask(llm, chat(SYSTEM, long))
    assert llm.recalled is not None, "the question came after evictions"
    assert n_kept(llm) >= n
    messages = chat(SYSTEM, long) + [
        {"role": "assistant", "content": "The sea."},
        {"role": "user", "content": "And what is cold? " * 20},
    ]
    ask(llm, messages)
    assert n_kept(llm) >= n, "in the next turn, too"
    for _ in ask(llm, chat("Answer like a cook. " * 3, long), stream=True):
        pass
    assert n_kept(llm) >= 15, "another conversation has another beginning"
    llm.create_completion(long, max_tokens=2)
    assert llm._ctx.seq_stats().n_first == llm.qfilter_config.sinks, "a plain prompt has none"


class Message:
    """What a template can read, too."""

    def __init__(self, role: str, content: str):
        self.role, self.content = role, content


def test_messages_of_any_kind(make):
    llm, n = make(), []
    for messages in (
        chat(SYSTEM, "Hello"),
        (message for message in chat(SYSTEM, "Hello")),
        [Message("system", SYSTEM), Message("user", "Hello")],
    ):
        llm.reset()
        n.append(ask(llm, messages)["usage"]["prompt_tokens"])
        assert llm._ctx.seq_stats().n_first > 20
    assert n[0] == n[1] == n[2]
    with contextlib.closing(make(recall=False)) as other:
        for _ in Conversation(other, system=SYSTEM).ask("caf\udce9", max_tokens=1):
            pass
        assert other._ctx.seq_stats().n_first > 20


def test_a_conversation_keeps_its_system_prompt(make):
    llm = make(recall=False)
    talk = Conversation(llm, system=SYSTEM)
    for _ in range(2):
        for _ in talk.ask("The sea is wide and the wind is cold. " * 40, max_tokens=2, temp=0):
            pass
    assert n_kept(llm) >= len(llm.tokenize(SYSTEM.encode()))


def test_a_system_prompt_that_is_too_long_is_said(make):
    llm = make()
    with pytest.warns(QFilterWarning, match=r"begins with \d+ tokens .* can keep 80 of them"):
        ask(llm, chat(SYSTEM * 12, "Hello"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(llm, chat(SYSTEM, "Hello"))


def test_chat_says_it_in_one_line(smollm2):
    process = subprocess.run(
        [sys.executable, "-m", "qfllama", "chat", str(smollm2), "--max-length", "256", "--n-ctx", "1024",
         "--policy", "kvdiff", "--threads", "1", "--max-tokens", "2", "--system", SYSTEM * 12,
         "--prompt", "Hello"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("note: the prompt begins with ") == 1
    assert "Warning" not in process.stderr


def test_by_hand(make):
    llm = make()
    assert llm.keep_first(30) == 30
    llm.eval(llm.tokenize(b"The sea is wide and the wind is cold. " * 60))
    assert n_kept(llm) >= 30
    llm.reset()
    assert llm.keep_first(1 << 40) == 80
    assert llm.keep_first(30) == 30
    llm.create_completion("The sea is wide and the wind is cold. " * 60, max_tokens=1)
    assert n_kept(llm) >= 30, "a completion leaves it as it is"
    llm.reset()
    assert llm.keep_first(0) == llm.qfilter_config.sinks
    with pytest.raises(QFilterError, match="use a number of tokens"):
        llm.keep_first(-1)
    wide = make(max_length=2048)
    wide.keep_first(40)
    wide.eval(wide.tokenize(b"The sea is wide and the wind is cold. " * 40))
    with pytest.raises(QFilterError, match="the first 40 positions"):
        wide.compress(max_length=40)
    wide.compress(max_length=60)
    assert wide.kept_positions(3, 1)[:40].tolist() == list(range(40))


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_stopped(smollm2, tmp_path):
    def measure(settings) -> list[dict]:
        process = subprocess.run(
            [sys.executable, BENCHMARK, str(smollm2), "--lengths", "1024", "--ratio", "4",
             "--policy", "kvdiff", "--rules", "1", "--settings", settings, "--threads", "1",
             "--results", "results.jsonl", "--json", "report.json"],
            capture_output=True, text=True, timeout=600, cwd=tmp_path,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return json.loads((tmp_path / "report.json").read_text())["rows"]

    first = measure("4 sinks")
    assert [(row["setting"], row["recall"], row["n"]) for row in first] == [
        ("full", False, 3), ("4 sinks", True, 3), ("4 sinks", False, 3),
    ]  # fmt: skip
    results = tmp_path / "results.jsonl"
    measured = results.read_text()
    more = measure("4 sinks,system prompt")
    assert more[:3] == first
    assert results.read_text().startswith(measured), "what was measured stays as it is"
    assert results.read_text().count("\n") == measured.count("\n") + 6
    whole = [row for row in more if row["setting"] == "system prompt"]
    without = {row["setting"]: row["nll"] for row in more if not row["recall"]}
    assert len(whole) == 2 and without["system prompt"] < without["4 sinks"]
