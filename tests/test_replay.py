"""Replay: scores against transformers' attention, what is kept by given scores, and the commands."""

import shutil

import numpy as np
import pytest
import tiny_models
import torch
from bounded import HOW, Bounded, load
from test_recall import run
from transformers import AutoModelForCausalLM

from qfllama import Llama, QFilterConfig, QFilterError, replay
from qfllama.config import EngineError
from qfllama.context import Context

pytestmark = pytest.mark.usefixtures("one_thread")

N = 60
FIRST, NEXT = [5, 6, 7, 8, 9], [30, 31, 32]
CONFIG = QFilterConfig(max_length=512, window_length=10, sinks=4, interval=32, policy="knorm")
FAMILIES = {
    "llama": "self_attn.o_proj",
    "qwen2": "self_attn.o_proj",
    "qwen3": "self_attn.o_proj",
    "gemma2": "self_attn.o_proj",  # softcap, windows
    "gemma3": "self_attn.o_proj",  # windows
    "lfm2": "self_attn.out_proj",  # hybrid
}


def tokenize(text):
    return {replay.REQUEST: FIRST, replay.NEXT: NEXT}[text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NAME and NAME.gguf of every family."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        tiny_models.write(name, folder / name)
    tiny_models.convert([folder / name for name in FAMILIES])
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(7).integers(40, tiny_models.VOCAB, N).tolist()


def expected(path, name, layers, tokens, requests):
    """[heads, N] from transformers; requests: (tokens behind the text, the part that follows)."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    decoder, values = model.model.layers, {}
    for layer in layers:
        decoder[layer].self_attn.v_proj.register_forward_hook(
            lambda _, inputs, output, layer=layer: values.__setitem__(layer, output[0, :N])
        )
    largest = dict.fromkeys(layers, 0)
    for request, part in requests:
        with torch.no_grad():
            out = model(torch.tensor([[*tokens, *request, *part]]), output_attentions=True)
        attentions = dict(zip(layers, out.attentions, strict=True)) if name == "lfm2" else (
            out.attentions
        )  # fmt: skip
        for layer in layers:
            found = attentions[layer][0, :, -len(part) :, :N].amax(1).numpy()
            largest[layer] = np.maximum(largest[layer], found)
    result = []
    for layer in layers:
        attention = decoder[layer].self_attn
        o_proj = decoder[layer].get_submodule(FAMILIES[name]).weight.detach()
        v = values[layer].view(N, -1, attention.head_dim)
        n_head, n_head_kv = len(largest[layer]), v.shape[1]
        worth = np.zeros((n_head, N))
        for head in range(n_head):
            columns = o_proj[:, head * attention.head_dim : (head + 1) * attention.head_dim]
            added = v[:, head * n_head_kv // n_head] @ columns.T
            worth[head] = largest[layer][head] * added.norm(dim=-1).numpy()
        result.append(worth.reshape(n_head_kv, -1, N).max(1))
    return np.concatenate(result)


def replayed(context, tokens, path):
    context.read(tokens)
    before = context.state()
    found = replay.scores(context, tokens, tokenize, path)
    assert context.n_past() == len(tokens) and context.state() == before
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_transformers(folder, tokens, name):
    path = folder / f"{name}.gguf"
    with (
        load(path) as model,
        Bounded(model, CONFIG, n_ctx=512, type_k="f32", type_v="f32") as context,
    ):
        layers = model.evicting_layers()
        found = replayed(context, tokens, path)
    theirs = expected(folder / name, name, layers, tokens, [(FIRST, tokens)])
    np.testing.assert_allclose(found, theirs, rtol=2e-2, atol=1e-3 * theirs.max())


@pytest.mark.parametrize("how", HOW)
def test_a_long_text_is_repeated_in_parts(folder, tokens, how, monkeypatch):
    monkeypatch.setattr(replay, "PART", 40)
    monkeypatch.setattr(replay, "LEAST_PART", 10)
    path = folder / "llama.gguf"
    with (
        load(path) as model,
        Bounded(model, CONFIG, n_ctx=512, type_k="f32", type_v="f32", flags=HOW[how]) as context,
    ):
        found = replayed(context, tokens, path)
    requests = [(FIRST, tokens[:40]), ([*NEXT, *tokens[32:40]], tokens[40:])]
    theirs = expected(folder / "llama", "llama", [0, 1, 2], tokens, requests)
    np.testing.assert_allclose(found, theirs, rtol=2e-2, atol=1e-3 * theirs.max())


def test_of_given_scores_the_best_are_kept(folder, tokens):
    scores = np.random.default_rng(1).standard_normal((6, N))
    with load(folder / "llama.gguf") as model, Bounded(model, CONFIG, n_ctx=512) as context:
        context.read(tokens)
        with pytest.raises(EngineError, match="330 scores were given.* 360"):
            Context.compress(context, 30, scores=scores[:, 5:])
        assert Context.compress(context, 30, scores=scores)
        best = np.argsort(-scores[:, 4 : N - 10])[:, :16] + 4
        always = [*range(4), *range(N - 10, N)]
        for i in range(6):
            assert context.kept(i // 2, i % 2).tolist() == sorted([*always, *best[i]])


def test_rows_of_different_positions_in_one_cell_are_told_apart(folder, tokens):
    """After an eviction heads hold rows of their own."""
    path = folder / "llama.gguf"
    with (
        load(path) as model,
        Bounded(model, CONFIG, n_ctx=512, type_k="f32", type_v="f32") as context,
    ):
        context.read(tokens)
        whole = replay.scores(context, tokens, tokenize, path)
        context.compress(40)
        found = replay.scores(context, tokens, tokenize, path)
        kept = np.array([context.kept(i // 2, i % 2) for i in range(6)])
        assert len({tuple(head) for head in kept}) > 1
        of_same_rows = np.take_along_axis(whole, kept, axis=1)
        assert np.corrcoef(np.log(found).ravel(), np.log(of_same_rows).ravel())[0, 1] > 0.9


def test_what_can_not_be_replayed_is_refused(folder, tokens):
    path = folder / "llama.gguf"
    with load(path) as model:
        with Bounded(model, CONFIG, n_ctx=512, type_k="q8_0", type_v="q8_0") as context:
            context.read(tokens)
            with pytest.raises(QFilterError, match="of type q8_0.*--type-v"):
                replay.scores(context, tokens, tokenize, path)
            with context.asking():
                context.read(tokens[:20])
            context.compress(40)
            with pytest.raises(EngineError, match="were evicted"):
                context.weights(0, N)
        small = QFilterConfig(max_length=96, window_length=10, sinks=4, interval=32, policy="knorm")
        with Bounded(model, small, n_ctx=512) as context:
            context.read(tokens)
            with pytest.raises(QFilterError, match="room for 36 tokens.* of 376 or more"):
                replay.scores(context, tokens, tokenize, path)
            with pytest.raises(EngineError, match="no question"):
                context.weights(0, N)
            with context.asking():
                context.read(tokens[:20])
                context.read(tokens[20:30])
            with pytest.raises(EngineError, match="several batches"):
                context.weights(0, N)


# -- the real model

TEXT = "The keeper wrote that the secret number of Lagos is 4471. " + "The sea was calm. " * 30


@pytest.fixture
def llm(smollm2):
    config = QFilterConfig(max_length=1024, window_length=16, policy="kvdiff", archive=False)
    llm = Llama(str(smollm2), qfilters=config, n_ctx=1024, n_threads=1, verbose=False)
    yield llm
    llm.close()


def test_a_compressed_prompt_goes_on_as_one_that_was_not_repeated(llm):
    llm.eval(llm.tokenize(TEXT.encode()))
    before, logits, read = llm.n_tokens, llm._ctx.logits(), []
    assert llm.compress(ratio=4, score="replay", progress=read.append) == (before, before // 4)
    assert sum(read) == llm.n_tokens == before
    assert np.corrcoef(llm._ctx.logits(), logits)[0, 1] > 0.999  # batches round differently
    number = range(*(len(llm.tokenize(TEXT[:i].encode())) for i in (52, 56)))
    kept = [set(llm._ctx.kept(layer, 0).tolist()) for layer in range(30)]
    assert sum(set(number) <= rows for rows in kept) >= 8  # by chance in none
    with pytest.raises(QFilterError, match="score is 'x'"):
        llm.compress(ratio=2, score="x")


def test_ctrl_c_leaves_the_text_as_it_was(llm):
    def interrupt(n):
        raise KeyboardInterrupt

    llm.eval(llm.tokenize(TEXT.encode()))
    before = llm._ctx.state()
    with pytest.raises(KeyboardInterrupt):
        llm.compress(ratio=4, score="replay", progress=interrupt)
    assert llm.n_tokens == len(llm.tokenize(TEXT.encode()))
    assert llm._ctx.state() == before


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_an_answer_follows_a_replay(folder, name):
    """Also where the logits of the last token are lost, and where the replay failed."""
    config = QFilterConfig(
        max_length=512, window_length=10, sinks=4, interval=64, policy="knorm", archive=False
    )
    path = str(folder / f"{name}.gguf")
    llm = Llama(path, qfilters=config, n_ctx=1024, n_threads=1, verbose=False)
    tokens = np.random.default_rng(3).integers(40, tiny_models.VOCAB, 150).tolist()
    llm.eval(tokens)

    def fail(n):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.compress(ratio=2, score="replay", progress=fail)
    assert isinstance(next(llm.generate(tokens, temp=0)), int)
    llm.n_tokens = len(tokens)  # what was generated is not a part of the text
    if name == "lfm2":
        llm.reset()
        llm.eval(tokens)
    assert llm.compress(ratio=2, score="replay") == (150, 75)
    assert isinstance(next(llm.generate(tokens, temp=0)), int)
    llm.close()


def test_options_that_do_not_fit_are_refused_before_the_text_is_read(smollm2, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    options = ["--file", tmp_path / "text", "-o", tmp_path / "out", "--policy", "kvdiff"]
    for more, message in (
        (["--type-v", "q8_0"], "leave out --type-v q8_0"),
        (["--n-ctx", 300], "of 300 positions for a second reading"),
    ):
        done = run("compress", smollm2, *options, "--score", "replay", *more)
        assert done.returncode == 2 and message in done.stderr
        assert not (tmp_path / "out").exists()


def test_the_command(smollm2, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    options = [
        "--file",
        tmp_path / "text",
        "-o",
        tmp_path / "out",
        "--ratio",
        4,
        "--policy",
        "kvdiff",
    ]
    done = run("compress", smollm2, *options, "--window-length", 16, "--score", "replay")
    assert done.returncode == 0, done.stderr
    assert "tokens in" in done.stdout
    done = run(
        "chat", smollm2, "--state", tmp_path / "out", "--temperature", 0, "--max-tokens", 16,
        "--prompt", "What is the secret number of Lagos?",
    )  # fmt: skip
    assert "4471" in done.stdout
