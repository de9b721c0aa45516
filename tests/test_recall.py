"""Rows that were evicted come back for an answer: `Llama`, `Conversation`, chat and compress."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import last_logits, watched_sizes

from qfllama import Conversation, Llama, QFilterConfig, QFilterError, QFilterWarning
from qfllama.evaluation import tasks

QFLLAMA = str(Path(sys.executable).with_name("qfllama"))
QUESTION = "\n\nWhat is the secret number of Lagos? The secret number of Lagos is"
NUMBER = "48213"
SMALL = {"max_length": 192, "policy": "kvdiff"}


@pytest.fixture(scope="module")
def make(smollm2):
    opened = []

    def make(n_ctx=4096, **fields) -> Llama:
        config = QFilterConfig(**SMALL | fields)
        opened.append(Llama(str(smollm2), qfilters=config, n_ctx=n_ctx, n_threads=2, verbose=False))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


@pytest.fixture(scope="module")
def text() -> str:
    """About 1,000 tokens of English, with a number in the middle."""
    words = tasks.read_text(None).text.split(" ")[:700]
    words.insert(300, f"\nThe secret number of Lagos is {NUMBER}.\n")
    return " ".join(words)


@pytest.fixture
def evaluated(monkeypatch):
    """How many tokens the engine reads at a time, recalls included, from here on."""
    return watched_sizes(monkeypatch, "_eval_bounded")


def answer(llm, prompt: str, n: int = 6) -> str:
    completion = llm.create_completion(prompt, max_tokens=n, temperature=0)
    return completion["choices"][0]["text"]


def test_a_number_that_was_evicted_is_answered(make, text):
    forgets, recalls = make(recall=False), make()
    assert NUMBER not in answer(forgets, text + QUESTION)
    assert forgets.recalled is None
    assert answer(recalls, text + QUESTION).strip().startswith(NUMBER)
    found = recalls.recalled
    tokens = recalls.tokenize((text + QUESTION).encode())
    assert NUMBER in recalls.detokenize([tokens[p] for p in found.positions]).decode()
    assert (np.diff(found.positions) > 0).all()
    assert 0 < len(found.positions) < SMALL["max_length"]
    assert found.archived > 500
    stats = recalls.qfilter_stats()
    assert stats["recalls"] == 1
    assert stats["cells_used"] <= SMALL["max_length"]
    assert stats["positions"] == recalls.n_tokens
    assert stats["archived_from"] == 0


def test_the_next_question_recalls_something_else(make, text, evaluated):
    """The document is read once, whatever is asked about it."""
    llm = make()
    n = len(llm.tokenize((text + QUESTION).encode()))
    assert answer(llm, text + QUESTION).strip().startswith(NUMBER)
    first = llm.recalled.positions.tolist()
    del evaluated[:]
    answer(llm, text + "\n\nIn short, this text is about")
    assert sum(evaluated) < 60
    assert llm.recalled.positions.tolist() != first
    del evaluated[:]
    assert answer(llm, text + QUESTION).strip().startswith(NUMBER)
    assert sum(evaluated) < 80 < n


def test_the_same_prompt_again_is_a_question_too(make, text, evaluated):
    """Upstream reads its last token only, which looks at nothing in particular."""
    llm = make()
    first = answer(llm, text + QUESTION)
    positions = llm.recalled.positions
    del evaluated[:]
    assert answer(llm, text + QUESTION) == first
    assert sum(evaluated) < 60
    assert NUMBER in first
    assert len(llm.recalled.positions) > 0
    assert len(positions) > 0


def test_a_short_prompt_recalls_nothing(make):
    llm = make()
    answer(llm, "The capital of France is")
    assert llm.recalled is None
    assert llm.qfilter_stats()["recalls"] == 0


def test_thirty_turns_read_only_what_is_new(make, evaluated):
    """Answers are tokenized otherwise than they were generated, and every turn is rendered anew."""
    llm = make(recall=False)
    messages, n_read = [{"role": "system", "content": "You are brief."}], 0
    for turn in range(30):
        messages.append({"role": "user", "content": f"Say the number {turn} and a colour."})
        del evaluated[:]
        reply = llm.create_chat_completion(messages, max_tokens=12, temperature=0)
        messages.append(reply["choices"][0]["message"])
        assert sum(evaluated) <= 80, f"turn {turn}"
        n_read += sum(evaluated)
    assert llm.qfilter_stats()["evictions"] > 5
    assert n_read < 1.5 * llm.n_tokens


def test_recall_by_hand(make, text):
    llm = make(recall=False)
    llm.eval(llm.tokenize((text + QUESTION).encode()))
    forgotten = llm._ctx.kept(3, 1).tolist()
    n = llm.n_tokens
    positions = llm.recall()
    assert llm.n_tokens == n
    assert len(positions) > 0
    assert set(positions.tolist()) - set(forgotten)
    tokens = []
    while len(tokens) < 6:
        tokens.append(int(last_logits(llm).argmax()))
        llm.eval(tokens[-1:])
    assert llm.detokenize(tokens).decode().strip().startswith(NUMBER)
    with pytest.raises(QFilterError, match="archive=True"):
        make(archive=False).recall()


def test_always_recalls_while_an_answer_is_generated(make, text):
    llm = make(recall="always")
    tokens = llm.tokenize(text.encode())
    for i, _ in enumerate(llm.generate(tokens, temp=0)):
        assert llm._ctx.used() <= SMALL["max_length"]
        if i == 150:
            break
    stats = llm.qfilter_stats()
    assert stats["recalls"] >= 3
    assert stats["positions"] == llm.n_tokens == len(tokens) + 150


def test_a_recall_that_fails_is_said_and_the_answer_comes(make, text, monkeypatch):
    llm = make()
    monkeypatch.setattr("qfllama.archive.native.recall", lambda *_: -1)
    with pytest.warns(QFilterWarning, match="the answer uses what is in the cache"):
        assert answer(llm, text + QUESTION)


def test_ctrl_c_during_a_recall_leaves_a_cache_that_goes_on(make, text, monkeypatch):
    llm = make()
    recall = llm._ctx.recall

    def interrupted():
        recall()
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._ctx, "recall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(llm, text + QUESTION)
    assert llm.n_tokens == llm._ctx.n_past()
    monkeypatch.undo()
    assert answer(llm, text + QUESTION) == answer(make(), text + QUESTION)


def test_a_prompt_file_with_its_archive(make, text, tmp_path):
    llm, plain, whole = make(), tmp_path / "plain", tmp_path / "whole"
    llm.eval(llm.tokenize(text.encode()))
    small, large = llm.save_prompt(plain), llm.save_prompt(whole, archive=True)
    stats = llm.qfilter_stats()
    assert large - small >= stats["archived"] * stats["archive_bytes"] / (
        -(-stats["archived"] // 256) * 256
    )
    other = make()
    other.load_prompt(whole)
    assert other.rewind_limit() == 0
    assert answer(other, text + QUESTION).strip().startswith(NUMBER)
    other.load_prompt(plain)
    assert other.rewind_limit() > 0
    assert other.qfilter_stats()["archived_from"] > 0
    make(archive=False).load_prompt(whole)
    with pytest.raises(QFilterError, match="archive"):
        make(archive=False).save_prompt(plain, archive=True)
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(QFilterError, match="truncated or damaged"):
        other.load_prompt(tmp_path / "damaged")


def test_a_conversation_says_what_came_back(make, text):
    chat = Conversation(make(), document=text)
    reply = "".join(chat.ask("What is the secret number of Lagos?", temp=0, max_tokens=24))
    assert NUMBER in reply
    found = chat.turn.recalled
    spans = "".join(chat.text(p, p + 1) for p in found.positions)
    assert NUMBER in spans
    "".join(chat.ask("Thank you.", temp=0, max_tokens=4))
    assert chat.turn.reread_tokens <= 16


def run(*args, stdin=""):
    return subprocess.run(
        [QFLLAMA, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=300
    )


def test_chat_shows_what_it_recalled(smollm2, text, tmp_path):
    (tmp_path / "text").write_text(text)
    done = run(
        "chat", smollm2, "--max-length", 192, "--policy", "kvdiff", "--file", tmp_path / "text",
        "--temperature", 0, "--max-tokens", 24, "--archive", tmp_path, "--archive-limit", "1GiB",
        stdin="What is the secret number of Lagos?\n/recalled\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert NUMBER in done.stdout
    assert "archived tokens in" in done.stderr
    assert f"is {NUMBER}." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_chat_without_recall(smollm2, text, tmp_path):
    (tmp_path / "text").write_text(text)
    done = run(
        "chat", smollm2, "--max-length", 192, "--policy", "kvdiff", "--file", tmp_path / "text",
        "--temperature", 0, "--max-tokens", 24, "--archive", "off",
        stdin="What is the secret number of Lagos?\n/recalled\n",
    )  # fmt: skip
    assert NUMBER not in done.stdout
    assert "nothing was recalled" in done.stderr


def test_a_compressed_document_with_its_archive(smollm2, text, tmp_path):
    (tmp_path / "text").write_text(text)
    for name, more in (("plain", []), ("whole", ["--archive"])):
        done = run(
            "compress", smollm2, "--file", tmp_path / "text", "-o", tmp_path / name, "--ratio", 16,
            "--window-length", 16, "--policy", "kvdiff", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    asked = [
        "--temperature",
        0,
        "--max-tokens",
        24,
        "--prompt",
        "What is the secret number of Lagos?",
    ]
    plain = run("chat", smollm2, "--state", tmp_path / "plain", *asked)
    assert "plain has no archive" in plain.stderr
    assert NUMBER not in plain.stdout
    whole = run("chat", smollm2, "--state", tmp_path / "whole", *asked)
    assert "has no archive" not in whole.stderr
    assert NUMBER in whole.stdout


@pytest.mark.parametrize("size", ["0", "x", "8XB", "-1", "1e30G"])
def test_sizes_that_are_none_are_refused(smollm2, size):
    done = run("chat", smollm2, "--archive-limit", size)
    assert done.returncode == 2
    assert "is not a size, say 8GiB" in done.stderr
