"""`qfllama eval questions`: its answers against those of a `Conversation`, its grading, its files."""

import json
from pathlib import Path

import docs_model
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner

from qfllama import Conversation, Llama, QFilterConfig
from qfllama.cli import main
from qfllama.engine import Model
from qfllama.evaluation import plots, questions
from qfllama.evaluation.run import Variant
from qfllama.evaluation.tasks import builtin

FACT = "The bridge of Elmsby was opened in 1923 and painted green by a man named Orlo Finch."
ASKED = {"When was the bridge of Elmsby opened?": ["1923"],
         "Who painted the bridge of Elmsby?": ["Orlo Finch", "Finch"]}  # fmt: skip
SHARED = Path(__file__).parents[1] / "benchmarks" / "questions" / "questions.jsonl"


def write(folder, documents: dict[str, str], **more):
    """A file of questions about documents that all have FACT in them."""
    for name, text in documents.items():
        (folder / name).write_text(text, encoding="utf-8")
    lines = [
        {"document": name, "question": question, "answers": answers, **more}
        for name in documents
        for question, answers in ASKED.items()
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(model, path, *options):
    words = ["eval", "questions", model, "--questions", path, "--threads", "1", *options]
    return CliRunner().invoke(main, [str(word) for word in words])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


# -- grading


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("It was opened in **1923**.", ["1923"]),
        ("It was opened in _1923_.", ["1923"]),
        ("The fee was £2,365 in all.", ["2365"]),
        ("The fee was 2365 pounds", ["£2,365"]),
        ("1’234\u202f567 people", ["1,234,567"]),
        ("A hole of 4.6m.", ["4.6 m"]),
        ("ORLO  FINCH’s brother", ["Orlo Finch"]),
        ("It is twenty-four.", ["24", "twenty four"]),
        ("at 3:30.", ["half past three", "3:30"]),
        ("On the 19th of April", ["19th of April"]),
        ("the Straße", ["STRASSE"]),
        ("答案是北京。", ["北京"]),
    ],
)
def test_an_answer_counts_however_it_is_spelt(text, answers):
    assert questions.found(text, tuple(answers))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("in 19234", "1923"),
        ("in 1,923", "923"),
        ("a hole of 14.6 m", "4.6"),
        ("a hole of 4.65 m", "4.6"),
        ("a hole of 4.6 m", "6"),
        ("in 1923, 400 people", "1923400"),
        ("the Finches", "Finch"),
        ("Finch Orlo", "Orlo Finch"),
        ("", "1923"),
    ],
)
def test_what_only_looks_like_an_answer_does_not_count(text, answer):
    assert not questions.found(text, (answer,))


def test_the_questions_that_come_along_have_their_answers_in_the_text_where_they_say():
    sources = questions.read(SHARED)
    assert len(sources) == 6 and sum(len(source.lines) for source in sources) == 60
    for source in sources:
        words = f" {questions.plain_words(source.text)} "
        for line in source.lines:
            answers = [f" {questions.plain_words(answer)} " for answer in line["answers"]]
            places = [words.index(answer) / len(words) for answer in answers if answer in words]
            assert min(abs(p - line["depth"]) for p in places) < 0.01, line


# -- asking


@pytest.fixture(scope="module")
def asked(smollm2, tmp_path_factory):
    """A full cache and one that drops the start of the document, where the fact is: results, report."""
    folder = tmp_path_factory.mktemp("questions")
    text = builtin().text
    documents = {"long.txt": f"{FACT} {text[:1200]}", "short.txt": f"{text[2000:2500]} {FACT}\n"}
    path = write(folder, documents, depth=0.25)
    result = run(
        smollm2, path, "--policy", "full,streaming", "--max-length", 160, "--interval", 48,
        "--max-tokens", 24, "--results", folder / "results.jsonl", "--json", folder / "out.json",
        "--plot", folder / "plot.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return documents, records(folder / "results.jsonl"), folder, result


@pytest.mark.parametrize("kind", ["full", "streaming", "recall"])
def test_answers_are_those_of_a_chat_about_the_file(smollm2, asked, kind):
    """Up to rounding: batches are of other sizes, so some answers end in other words."""
    config = QFilterConfig(
        max_length=160, interval=48, policy="streaming", archive=kind == "recall"
    )
    documents, found, *_ = asked
    mine = [record for record in found if record["file"] == "long.txt" and kind_of(record) == kind]
    assert [record["asked"] for record in mine] == list(ASKED)
    llm = Llama(
        str(smollm2), n_ctx=1024, qfilters=None if kind == "full" else config, n_threads=1,
        n_threads_batch=1, flash_attn=True, verbose=False,
    )  # fmt: skip
    for record in mine:
        chat = Conversation(llm, document=documents["long.txt"])
        wrote = "".join(chat.ask(record["asked"], max_tokens=24, temp=0))
        assert record["wrote"].split()[:4] == wrote.split()[:4]
        assert record["right"] == questions.found(wrote, tuple(ASKED[record["asked"]]))
    llm.close()


def kind_of(record):
    return "recall" if record.get("recall") else record["policy"]


def test_answer_and_loss_are_those_of_the_stock_engine_after_the_prompt_of_a_chat(smollm2, asked):
    documents, found, *_ = asked
    (record,) = [r for r in found if r["policy"] == "full" and r["file"] == "long.txt"][:1]
    stock = llama_cpp.Llama(
        str(smollm2), n_ctx=1024, n_threads=1, n_threads_batch=1, flash_attn=True, logits_all=True,
        verbose=False,
    )  # fmt: skip
    message = f"{documents['long.txt']}\n\n{record['asked']}"
    prompt = stock.tokenize(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n".encode(),
        add_bos=False, special=True,
    )  # fmt: skip

    def logits(answer):
        stock.reset()
        stock.eval(prompt[: record["length"]])  # in parts: batches of other sizes round otherwise
        stock.eval(prompt[record["length"] :] + answer)
        return stock.scores[len(prompt) - 1 : len(prompt) + len(answer) - 1].astype(np.float64)

    right = stock.tokenize(b"1923", add_bos=False)
    rows = logits(right)
    losses = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(right)), right]
    assert record["n_tokens"] == len(right)
    assert record["nll"] == pytest.approx(losses.mean(), abs=5e-3)
    wrote = stock.tokenize(record["wrote"].encode(), add_bos=False)
    rows = logits(wrote)
    assert (rows.max(axis=1) - rows[np.arange(len(wrote)), wrote]).max() < 0.5
    stock.close()


def test_what_is_dropped_is_not_known_and_comes_back_with_a_recall(asked):
    _, found, folder, result = asked
    full, streaming, recalled = json.loads((folder / "out.json").read_text())["rows"]
    n_right = [row["by_document"]["long.txt"]["n_right"] for row in (full, streaming, recalled)]
    assert n_right == [2, 0, 2]
    assert streaming["nll"] > full["nll"] + 0.3
    assert full["n"] == 4 and full["right"] == full["n_right"] / 4
    assert full["by_document"]["short.txt"]["n"] == 2 and list(full["by_depth"]) == ["0.2"]
    assert f"{full['n_right']}/4  {full['right']:.1%}" in result.stdout
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_is_of_each_document_and_a_rerun_asks_nothing_twice(smollm2, tmp_path):
    text = builtin().text
    path = write(tmp_path, {"a.txt": text[:1200] + FACT, "b.txt": text[:2400] + FACT})
    results = tmp_path / "results.jsonl"
    options = ["--policy", "streaming", "--ratio", 2, "--interval", 32, "--recall", "off",
               "--max-tokens", 2, "--results", results]  # fmt: skip
    assert run(smollm2, path, *options).exit_code == 0
    first = records(results)
    for record in first:
        assert record["length"] / 2 - 32 <= record["cells"] <= record["length"] / 2 + 1
    before = results.read_text()
    assert run(smollm2, path, *options).exit_code == 0
    assert results.read_text() == before
    (tmp_path / "b.txt").write_text("Another text.")
    again = run(smollm2, path, *options)
    assert again.exit_code == 2 and "another text" in again.stderr


def test_some_documents_of_a_file_and_later_the_others(base, tmp_path):
    path = write(tmp_path, {"a.txt": FACT, "b.txt": FACT * 2, "big.txt": "x" * 9000})
    results = tmp_path / "results.jsonl"
    options = ["--policy", "full", "--max-tokens", 2, "--plain", "--results", results]

    def files(*more):
        assert run(base, path, *options, *more).exit_code == 0
        return [record["file"] for record in records(results)]

    assert files("--documents", "b.txt") == ["b.txt"] * 2
    assert files("--documents", "a.txt,b.txt") == ["b.txt"] * 2 + ["a.txt"] * 2
    unknown = run(base, path, *options, "--documents", "c.txt")
    assert (unknown.exit_code, len(unknown.stderr.splitlines())) == (2, 1)
    assert "c.txt: choose from a.txt, b.txt, big.txt" in unknown.stderr


# -- models without a chat template


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    docs_model.write_model(path)
    return path


def test_a_model_without_a_chat_template_is_asked_plainly_or_not_at_all(base, tmp_path):
    path = write(tmp_path, {"a.txt": FACT * 4})
    options = ["--policy", "full,knorm", "--ratio", 2, "--interval", 32, "--max-tokens", 8]
    refused = run(base, path, *options)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1 and "--plain" in refused.stderr
    results = tmp_path / "results.jsonl"
    result = run(base, path, *options, "--plain", "--results", results)
    assert result.exit_code == 0, result.stderr
    assert len(records(results)) == 2 * 3
    assert all("\n" not in record["wrote"] for record in records(results))
    with Model.from_header(base) as model:
        (document,) = questions.documents(model, questions.read(path), plain=True, max_tokens=8)
        (question, _) = document.questions
        text = f"{FACT * 4}\n\nQuestion: {question.text}\nAnswer:"
        assert document.ids + question.ids == model.tokens(text, start=True)
        assert model.text(document.ids).replace("▁", " ").strip() == FACT * 4
        assert document.ids + question.before + question.right == model.tokens(
            text + " 1923", start=True
        )


# -- files


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not an object"),
        ('{"document": "a.txt", "question": "?"}', 'line 2 has no "answers"'),
        ('{"document": "a.txt", "question": 3, "answers": ["y"]}', '"question" is not a text'),
        ('{"document": "a.txt", "question": "x?", "answers": "y"}', '"answers" is not a list'),
        ('{"document": "a.txt", "question": "x?", "answers": [3]}', '"answers" is not a list'),
        ('{"document": "a.txt", "question": "x?", "answers": []}', "one answer at least"),
        ('{"document": "a.txt", "question": "x?", "answers": ["%"]}', "one answer at least"),
        (
            '{"document": "b.txt", "question": "x?", "answers": ["y"]}',
            "relative to the folder of questions",
        ),
        ('{"document": "a.txt", "question": "x?", "answers": ["y"], "depth": 2}', "depth is 2"),
        ('{"document": "e.txt", "question": "x?", "answers": ["y"]}', "is empty"),
        ('{"document": "big.txt", "question": "x?", "answers": ["y"]}', "big.txt has 9,"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(base, tmp_path, line, words):
    good = '{"document": "a.txt", "question": "x?", "answers": ["y"]}'
    for name, text in {"a.txt": "One.", "e.txt": "", "big.txt": "x" * 9000}.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{good}\n{line}\n")
    result = run(base, path, "--plain")
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr


def test_a_chat_template_that_has_no_room_for_a_document_is_refused(base, tmp_path, monkeypatch):
    path = write(tmp_path, {"a.txt": FACT})
    for template, words in [
        ("Hello", "no place for a document"),
        ("{{ raise_exception('never') }}", "refuses a document (never)"),
        ("{% if %}", "refuses a document"),
    ]:
        monkeypatch.setattr(Model, "metadata", lambda self, t=template: {questions.TEMPLATE: t})
        result = run(base, path)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert words in result.stderr and "--plain" in result.stderr


def test_rows_without_depth_or_of_one_document_have_a_report(tmp_path):
    mine = [{"file": "a.txt", "right": right, "nll": 1.0, "cells": 8} for right in (True, False)]
    rows = questions.rows({Variant("full"): mine})
    assert rows[0]["by_depth"] == {} and rows[0]["right_ci"] == [0.0945, 0.9055]
    plots.questions(tmp_path / "plot.png", rows, ["full"], "title $")
    assert "1/2" in questions.report(rows, ["full"])


def test_a_document_that_is_compressed_to_a_few_cells_keeps_of_its_beginning_what_fits(
    smollm2, asked, tmp_path
):
    documents, *_ = asked
    path = write(tmp_path, documents)
    result = run(
        smollm2, path, "--policy", "knorm", "--max-length", 40, "--setting", "prefill",
        "--window-length", 20, "--recall", "off", "--max-tokens", 2, "--documents", "short.txt",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["cells"] == 40
