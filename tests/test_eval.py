"""`qfllama eval`: its numbers against those of stock llama.cpp and of `Llama`, its tasks, its files."""

import contextlib
import json
import math

import llama_cpp
import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from conftest import last_logits

from qfllama import Llama, QFilterConfig, native
from qfllama.cli import main
from qfllama.commands import eval as eval_command
from qfllama.engine import Context, Model
from qfllama.evaluation import needle, perplexity, plots, ruler, tasks
from qfllama.evaluation.results import Results, bootstrap, wilson
from qfllama.evaluation.run import Plan, Variant, forks, split
from qfllama.evaluation.scoring import Mark, generate, score
from qfllama.evaluation.tasks import Question
from qfllama.native import last_error

TEXT = tasks.builtin()


def words(text):
    """Tokens of a text, as these tests count them where there is no model."""
    return len(text.split())


@pytest.fixture(scope="module")
def model(smollm2):
    with Model(smollm2) as model:
        yield model


def run(task, model, *options):
    return CliRunner().invoke(
        main, ["eval", task, str(model), "--threads", "1", *map(str, options)]
    )


def report(task, model, tmp_path, *options):
    path = tmp_path / "report.json"
    result = run(task, model, *options, "--json", path)
    assert result.exit_code == 0, result.stderr
    return json.loads(path.read_text())


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


# -- perplexity


def test_full_perplexity_is_that_of_the_stock_engine(smollm2, model, tmp_path):
    row = report("ppl", smollm2, tmp_path, "--policy", "full", "--texts", 1, "--length", 200)
    tokens = perplexity.texts(model, TEXT, 1, 200)[0]
    stock = llama_cpp.Llama(
        str(smollm2), n_ctx=256, n_threads=1, n_threads_batch=1, flash_attn=True, logits_all=True,
        verbose=False,
    )  # fmt: skip
    stock.eval(tokens)
    losses = [-log_softmax(stock.scores[i])[tokens[i + 1]] for i in range(199)]
    stock.close()
    (row,) = row["rows"]
    assert row["nll"] == pytest.approx(np.mean(losses), abs=2e-3)
    assert row["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=2e-3)
    by_position = [math.exp(np.mean(losses[:127])), math.exp(np.mean(losses[127:]))]
    assert row["ppl_by_position"] == pytest.approx(by_position, rel=5e-3)


def test_streaming_perplexity_is_that_of_a_bounded_llama(smollm2, tmp_path, model):
    """Up to rounding: llama.cpp computes attention of 64 positions and more in another way."""
    full, streaming = report(
        "ppl", smollm2, tmp_path, "--policy", "full,streaming", "--texts", 1, "--length", 200,
        "--max-length", 64, "--window-length", 8, "--interval", 48,
    )["rows"]  # fmt: skip
    tokens = perplexity.texts(model, TEXT, 1, 200)[0]
    config = QFilterConfig(max_length=64, window_length=8, interval=48, policy="streaming")
    llm = Llama(
        str(smollm2), n_ctx=256, qfilters=config, n_threads=1, n_threads_batch=1, verbose=False,
        logits_all=True,
    )  # fmt: skip
    llm.eval(tokens)
    losses = [-log_softmax(llm.scores[i])[tokens[i + 1]] for i in range(199)]
    evictions = llm.qfilter_stats()["evictions"]
    llm.close()
    assert evictions == 3  # at 64, 112, 160
    assert streaming["nll"] == pytest.approx(np.mean(losses), abs=0.03)
    assert streaming["above_full"] > 0.1


def test_evictions_come_when_the_cache_is_full_and_then_every_interval(model):
    config = QFilterConfig(max_length=80, window_length=8, interval=24, policy="streaming")
    with model.open(config, n_ctx=256) as context:
        for n_tokens, evictions, used in ((80, 0, 80), (81, 1, 57), (104, 1, 80), (152, 3, 80)):
            context.read([100] * (n_tokens - context.n_past()))
            assert (context.stats().n_evictions, context.used()) == (evictions, used)


def test_texts_are_consecutive_pieces_of_the_text(model):
    pieces = perplexity.texts(model, TEXT, 3, 100)
    start = len(model.tokens("", start=True))
    joined = model.text([token for piece in pieces for token in piece[start:]])
    assert [len(piece) for piece in pieces] == [100] * 3
    assert TEXT.text.startswith(joined)


# -- needles


@pytest.mark.parametrize("number", range(5))
def test_the_text_has_every_needle_at_the_depth_that_its_question_says(number):
    haystack = tasks.Haystack(TEXT, words)
    document = needle.document(haystack, 1000, number, 5, seed=3)
    asked = tasks.depths(number, 5)
    assert 950 <= words(document.text) <= 1000
    for question, wanted in zip(document.questions, asked, strict=True):
        name = question.text.split()[-2]
        sentence = needle.NEEDLE.format(name, *question.answers)
        assert document.text.count(sentence) == 1
        before, _ = document.text.split(sentence)
        for other in document.questions:  # depth is that in the text without needles
            before = before.replace(
                needle.NEEDLE.format(other.text.split()[-2], *other.answers), ""
            )
        share = words(before) / (words(document.text) - 7 * 5)
        assert share == pytest.approx(question.labels["depth"], abs=1e-3)
        assert question.labels["depth"] == pytest.approx(wanted, abs=0.05)
        assert not before.strip() or before.rstrip()[-1] in ".!?" or len(before.split()) >= 60


def test_a_document_depends_on_seed_length_and_number_only():
    first = needle.documents(tasks.Haystack(TEXT, words), [200, 400], 2, 3, seed=0)
    again = needle.documents(tasks.Haystack(TEXT, words), [400], 3, 3, seed=0)
    other = needle.documents(tasks.Haystack(TEXT, words), [400], 1, 3, seed=1)
    assert first[2:] == again[:2]
    assert other[0].text != again[0].text


def test_depths_cover_the_whole_document_evenly():
    found = sorted(depth for number in range(40) for depth in tasks.depths(number, 5))
    assert found[0] == 0 and found[-1] > 0.99
    assert np.histogram(found, 10, (0, 1))[0] == pytest.approx([20] * 10, abs=1)


def test_ratio_1_is_the_full_cache(smollm2, tmp_path):
    rows = report(
        "needle", smollm2, tmp_path, "--policy", "full,streaming,knorm,keydiff", "--ratio", 1,
        "--recall", "off",
        "--lengths", 128, "--documents", 1, "--needles-per-document", 2,
    )["rows"]  # fmt: skip
    full, *others = ({k: row[k] for k in ("n", "right", "digits", "nll")} for row in rows)
    assert full["n"] == 2
    assert others == [full] * 3


def test_a_compressed_answer_is_as_likely_as_after_llama_compress(smollm2, model, tmp_path):
    results = tmp_path / "results.jsonl"
    result = run(
        "needle", smollm2, "--policy", "streaming", "--ratio", 2, "--window-length", 8, "--recall", "off",
        "--lengths", 200, "--documents", 1, "--needles-per-document", 2, "--results", results,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    haystack = tasks.Haystack(TEXT, lambda text: len(model.tokens(text)))
    document = needle.document(haystack, 200, 0, 2, seed=0)
    config = QFilterConfig(max_length=512, window_length=8, policy="streaming")
    llm = Llama(
        str(smollm2), n_ctx=512, qfilters=config, n_threads=1, n_threads_batch=1, verbose=False
    )
    for record, question in zip(records, document.questions, strict=True):
        llm.reset()
        llm.eval(llm.tokenize(document.text.encode()))
        assert llm.compress(ratio=2).after == record["cells"]
        llm.eval(llm.tokenize(f"{question.text} ".encode(), add_bos=False))
        losses, right = [], 0
        for token in llm.tokenize(question.answers[0].encode(), add_bos=False):
            logits = last_logits(llm)
            losses.append(-log_softmax(logits)[token])
            right += int(logits.argmax() == token)
            llm.eval([token])
        assert len(losses) == record["n_tokens"] == 6
        assert record["nll"] == pytest.approx(np.mean(losses), abs=0.02)
        assert abs(record["n_right"] - right) <= 1
    llm.close()


def test_going_back_makes_a_question_independent_of_those_before_it(model):
    """Also where reading it evicts: 12 cells are left, question and answer take more."""
    config = QFilterConfig(max_length=96, window_length=16, interval=32, policy="knorm")
    tokens, asked = model.tokens(TEXT.text[:2000])[:84], model.tokens("\n\nThe secret number is")
    answer = model.tokens(" 1 2 3 4 5 6")
    with model.open(config, n_ctx=256) as context:
        context.read(tokens)
        mark = Mark(context, len(asked) + len(answer))
        first = score(context, asked, answer)
        assert context.stats().n_evictions == 1
        mark.back()
        score(context, answer, asked)
        mark.back()
        assert context.n_past() == 84 and context.used() == 84
        assert score(context, asked, answer) == first


def test_an_answer_counts_as_right_if_greedy_decoding_gives_it(model):
    config = QFilterConfig(max_length=256, window_length=16, interval=64, policy="streaming")
    asked = model.tokens("The capital of France is Paris. The capital of France is")
    with model.open(config, n_ctx=256) as context:
        mark = Mark(context, 0)
        text = generate(context, asked, 2)
        mark.back()
        wrong = score(context, asked, model.tokens(" Berlin."))
        mark.back()
        right = score(context, asked, model.tokens(text))
    assert text.startswith(" Paris")
    assert right.right and not wrong.right and right.nll < wrong.nll


# -- RULER


@pytest.mark.parametrize("task", ruler.TASKS)
def test_answers_are_in_the_text_which_is_as_long_as_asked(task):
    material = ruler.Material(tasks.Haystack(TEXT, words), TEXT.text, words)
    for number in range(3):
        document = ruler.document(material, task, 1200, number, seed=1)
        assert 1100 <= words(document.text) <= 1210
        for question in document.questions:
            assert question.answers and len(set(question.answers)) == len(question.answers)
            for answer in question.answers:
                assert answer in document.text
                assert answer not in question.text


def test_a_value_reaches_every_variable_of_the_chain():
    material = ruler.Material(tasks.Haystack(TEXT, words), TEXT.text, words)
    document = ruler.document(material, "variables", 800, 0, seed=0)
    names = document.questions[0].answers
    value = document.text.split(f"VAR {names[0]} = ")[1].split(".")[0]
    assert len(names) == 5 and value in document.questions[0].text
    for old, new in zip(names, names[1:], strict=False):
        assert f"VAR {new} = VAR {old}." in document.text
        assert document.text.index(f"VAR {old} =") < document.text.index(f"VAR {new} =")


@pytest.mark.parametrize(("task", "count"), [("common", 10), ("frequent", 3)])
def test_the_words_asked_for_are_the_most_frequent_ones(task, count):
    material = ruler.Material(tasks.Haystack(TEXT, words), TEXT.text, words)
    document = ruler.document(material, task, 2000, 0, seed=0)
    body = document.text.split("\n\n", 1)[1].split()
    counted = sorted(
        ((body.count(word), word) for word in set(body) if word.isalpha()), reverse=True
    )
    assert {word for _, word in counted[:count]} == set(document.questions[0].answers)
    assert counted[count - 1][0] > counted[count][0]


def test_the_score_is_the_share_of_strings_found():
    question = tasks.Question("?", ("Alpha", "beta", "123456", "delta"))
    assert ruler.found("the ALPHA, 1234567 and Beta", question) == 0.75
    assert ruler.found("", question) == 0


def test_ruler_end_to_end(smollm2, tmp_path):
    report_ = report(
        "ruler", smollm2, tmp_path, "--tasks", "single", "--policy", "full,streaming",
        "--max-length", 128, "--interval", 32, "--lengths", 256, "--documents", 1, "--setting",
        "stream", "--plot", tmp_path / "ruler.png",
    )  # fmt: skip
    full, streaming, recalled = report_["rows"]
    assert full["by_task"]["single"]["n"] == full["n"] == 1
    # the needle of the first document is its first sentence, which a window doesn't hold
    assert streaming["by_task"]["single"]["score"] == 0
    assert streaming["by_task"]["single"]["nll"] > full["by_task"]["single"]["nll"] + 1
    # but it comes back, and is then the same question
    assert recalled["recall"]
    assert recalled["by_task"]["single"]["nll"] < streaming["by_task"]["single"]["nll"] - 0.5
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")


# -- files


def test_the_tasks_and_policies_of_the_command_are_those_there_are():
    assert tuple(ruler.TASKS) == eval_command.TASKS


def test_a_rerun_keeps_what_is_there_and_does_the_rest(smollm2, tmp_path):
    results = tmp_path / "results.jsonl"
    options = [
        "--lengths", 128, "--documents", 1, "--needles-per-document", 3, "--ratio", 2,
        "--window-length", 8, "--results", results, "--recall", "off",
    ]  # fmt: skip
    assert run("needle", smollm2, "--policy", "streaming", *options).exit_code == 0
    head, *lines = results.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    # as after a crash: one result that can't be measured twice alike, one missing, one half written
    first = json.loads(lines[0]) | {"nll": 99.0}
    results.write_text(head + json.dumps(first) + "\n" + lines[1] + lines[2][:20])
    row = report("needle", smollm2, tmp_path, "--policy", "streaming", *options)["rows"][0]
    again = results.read_text().splitlines(keepends=True)
    assert again == [head, json.dumps(first) + "\n", lines[1], lines[2]]
    nlls = [json.loads(line)["nll"] for line in again[1:]]
    assert row["n"] == 3 and row["nll"] == pytest.approx(sum(nlls) / 3, abs=1e-4)

    more = run("needle", smollm2, "--policy", "streaming", *options, "--seed", 1)
    assert more.exit_code == 2 and "another seed (0, here 1)" in more.stderr
    assert results.read_text().splitlines(keepends=True) == again


def test_a_report_says_where_it_comes_from(smollm2, tmp_path):
    value = report(
        "ppl", smollm2, tmp_path, "--policy", "full,streaming", "--max-length", 96, "--texts", 2,
        "--length", 128, "--plot", tmp_path / "ppl.png",
    )  # fmt: skip
    assert {"command", "date", "machine", "qfllama", "model", "text"} <= value["about"].keys()
    full, streaming = value["rows"]
    assert len(full["nll_by_text"]) == 2
    above = np.subtract(streaming["nll_by_text"], full["nll_by_text"])
    assert streaming["above_full"] == pytest.approx(above.mean(), abs=1e-4)
    assert (tmp_path / "ppl.png").read_bytes().startswith(b"\x89PNG")


def test_heat_maps_have_a_panel_for_every_variant(tmp_path):
    records = [
        {"length": length, "document": 0, "depth": depth, "nll": 0.5, "n_right": 3, "n_tokens": 6,
         "right": False, "cells": 10}
        for length in (128, 256) for depth in (0.0, 0.5)
    ]  # fmt: skip
    variants = [Variant("full"), *(Variant("knorm", float(2**i)) for i in range(1, 5))]
    rows = needle.rows({variant: records for variant in variants})
    plots.needle(tmp_path / "map.png", rows, [variant.title for variant in variants], "title $")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert rows[0]["by_length_and_depth"][128][0.5]["digits"] == 0.5
    assert "knorm x16" in needle.report(rows, [variant.title for variant in variants])


@pytest.mark.parametrize(
    ("task", "options", "word"),
    [
        ("needle", ["--policy", "nonsense"], "qfilters"),
        ("needle", ["--policy", "qfilters"], "has no filters"),
        ("needle", ["--ratio", "0.5"], "0.5"),
        ("needle", ["--ratio", "2,x"], "list of numbers"),
        ("needle", ["--ratio", "nan"], "nan"),
        ("needle", ["--ratio", "2", "--max-length", "64"], "exclude each other"),
        ("needle", ["--ratio", "8", "--lengths", "256"], "--window-length"),
        ("needle", ["--setting", "stream", "--max-length", "64"], "--interval"),
        ("needle", ["--needles-per-document", "1000"], "--needles-per-document"),
        ("needle", ["--plot", "x.txt"], ".png"),
        ("needle", ["--json", "missing/x.json"], "missing"),
        ("needle", ["--json", "{model}"], "the input itself"),
        ("needle", ["--text", "{short}", "--json", "{short}"], "the file of --text"),
        ("needle", ["--type-k", "q9"], "q9"),
        ("needle", ["--results", "{other}"], "give another file"),
        ("ppl", ["--text", "{short}"], "has 3 tokens"),
        ("ppl", ["--text", "{empty}"], "is empty"),
        ("ppl", ["--text", "{latin}"], "not UTF-8"),
        ("ppl", ["--length", "1000000"], "longer --text"),
        ("ruler", ["--tasks", "single,nonsense"], "multikey"),
        ("ruler", ["--text", "{short}"], "longer --text"),
    ],
)
def test_wrong_input_is_refused_in_one_line(smollm2, tmp_path, task, options, word):
    contents = {"short": b"One two three", "empty": b"", "latin": b"\xe9\xff", "other": b"{}\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = {name: tmp_path / name for name in contents} | {"model": smollm2}
    result = run(task, smollm2, *(option.format(**paths) for option in options))
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and word in result.stderr


def test_a_text_without_spaces_has_sentences():
    text = tasks.Text("", "今天天气很好。我们去公园吧！" * 2 + "字" * 1500)
    parts = text.sentences()
    assert parts[:2] == ["今天天气很好。", "我们去公园吧！"]
    assert [len(part) for part in parts[4:]] == [1000, 500]
    assert "".join(parts) == text.text


def test_results_refuse_a_file_of_another_task(tmp_path):
    path = tmp_path / "results.jsonl"
    with Results(path, {"task": "ppl"}, ("text",)) as results:
        results.add({"text": 1, "nll": 2.0})
        assert {"text": 1} in results and {"text": 2} not in results
    with pytest.raises(ValueError, match="another task"):
        Results(path, {"task": "needle"}, ("text",))


def test_intervals_are_those_of_the_literature():
    # Brown, Cai, DasGupta 2001 and R's binom.confint(method="wilson")
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(100, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap([[value] for value in values])
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_full_is_one_variant_whatever_the_ratios():
    from qfllama.evaluation.run import variants

    found = variants(["full", "knorm"], [2.0, 4.0], None)
    assert found == [Variant("full"), Variant("knorm", 2.0), Variant("knorm", 4.0)]
    plan = Plan("prefill", tuple(found))
    assert plan.config(found[0], 1000, 50).max_length == 1050
    assert [variant.cells(1000) for variant in found] == [1000, 500, 250]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    path = tmp_path_factory.mktemp("families")
    names = ("gemma3", "lfm2", "llama")  # windowed, hybrid, neither
    for name in names:
        tiny_models.write(name, path / name)
    return dict(zip(names, tiny_models.convert([path / name for name in names]), strict=True))


@pytest.mark.parametrize("name", ["gemma3", "lfm2"])
def test_going_back_in_models_that_forget_works_too(families, name):
    config = QFilterConfig(max_length=700, window_length=16, interval=64, policy="knorm")
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, tiny_models.VOCAB, 300).tolist()
    asked, answer = tokens[:250], tokens[50:60]
    with Model(families[name]) as model, model.open(config, n_ctx=1024) as context:
        context.read(tokens)
        context.compress(150)
        mark = Mark(context, 260)
        first = score(context, asked, answer)
        mark.back()
        score(context, tokens[40:290], answer)
        mark.back()
        again = score(context, asked, answer)
    assert again.nll == pytest.approx(first.nll, abs=2e-3)  # cells in another order


def test_what_variants_share_fits_into_a_windowed_model_with_smaller_batches(families):
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 500).tolist()
    plan = Plan("stream", (Variant("knorm", max_length=400),), interval=64)

    with Model(families["gemma3"]) as model:
        shared = forks(model, plan, tokens, list(plan.variants), 20, Context.read)
        assert [context.n_past() for _, context in shared] == [400]


def test_a_state_for_other_batches_has_the_rows_that_windowed_layers_still_need(families):
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 500).tolist()

    def of(model, interval):
        config = QFilterConfig(600, window_length=16, interval=interval, policy="knorm")
        return model.open(config, n_ctx=700, type_k="f32", type_v="f32")

    def read(context, start, end):
        for i in range(start, end, 50):
            context.read(tokens[i : min(end, i + 50)], logits=True)
        return context.logits()

    with Model(families["gemma3"]) as model:
        with of(model, 512) as reader:
            read(reader, 0, 400)
            whole, state = reader.state(), reader.state(flags=native.STATE_RESIZE)
            assert len(state) < len(whole)
            # a buffer that is too small: nothing changes
            view = native.c_bytes(bytearray(1000))
            assert native.state_seq_get_data(reader.ctx, view, 1000, 0, native.STATE_RESIZE) == 0
            assert b"could not write" in last_error()
            assert reader.state() == whole and reader.rewind_limit() < 400 - 32
        with of(model, 64) as context:
            assert not context.restore(whole)
            assert b"use a larger interval" in last_error()
        with of(model, 64) as context:
            assert context.restore(state) and context.rewind_limit() == 399 - 32
            assert not context.kv_cache_seq_rm(0, 399 - 33, -1)
            assert context.kv_cache_seq_rm(0, 399 - 32, -1)
            read(context, 399 - 32, 400)
            found = read(context, 400, 500)
        with of(model, 64) as context:
            assert found == pytest.approx(read(context, 0, 500), abs=1e-2)  # cells in another order


def test_a_prompt_file_of_a_windowed_model_loads_into_smaller_batches(families, tmp_path):
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 400).tolist()

    def make(interval):
        config = QFilterConfig(1024, window_length=16, interval=interval, policy="knorm")
        return Llama(str(families["gemma3"]), qfilters=config, n_ctx=1024, verbose=False)

    with contextlib.closing(make(512)) as llm:
        llm.eval(tokens)
        llm.compress(ratio=4)
        llm.save_prompt(tmp_path / "text.qfstate")
    with contextlib.closing(make(64)) as llm:
        llm.load_prompt(tmp_path / "text.qfstate")
        assert llm.n_tokens == 400 and llm.qfilter_stats()["cells_used"] == 100
        llm.eval(tokens[:200])


@pytest.mark.parametrize("name", ["lfm2", "llama"])
def test_a_state_for_other_sizes_is_the_same_where_no_layer_has_a_window(families, name):
    config = QFilterConfig(256, window_length=16, interval=64, policy="knorm")
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 400).tolist()
    with Model(families[name]) as model, model.open(config, n_ctx=512) as context:
        context.read(tokens)
        assert context.state(flags=native.STATE_RESIZE) == context.state()


@pytest.mark.parametrize("name", ["gemma3", "lfm2"])
def test_an_answer_begins_where_the_question_ends(families, name):
    """SentencePiece tokenizers may begin every text with a space: an answer has none of its own."""
    question = Question("The number of Paris is", ("598808",))
    with Model(families[name]) as model:
        asked, answer = split(model, question)
        assert asked + answer == model.tokens("The number of Paris is 598808")
        assert model.text(answer).strip() == "598808" and "5" not in model.text(asked)
