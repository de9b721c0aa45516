"""Recall against the torch reference: a question brings the same positions back.

A row that is looked at brings twenty others along. So where two rows are looked at about as much,
rounding decides on twenty positions at once. Such recalls are counted apart, and there are few.
"""

import shutil

import numpy as np
import pytest
import tiny_models
from bounded import HOW, Bounded, load
from reference.families import FamilyModel
from reference.model import Model, write_f32_copy
from reference.recall import Archived, ArchivedFamily
from reference.text import english_tokens
from side_by_side import ROUNDED, Both, Choices, Own
from transformers import AutoModelForCausalLM

from qfllama import QFilterConfig

TYPES = {"float16": "f16", "q8_0": "q8_0"}


def cache_of(kind, config, dtype, **kwargs):
    return kind(
        config.max_length,
        config.n_keep,
        config.sinks,
        config.window_length,
        policy=config.policy,
        dtype=dtype,
        **kwargs,
    )


def quote(tokens, rng, n):
    """n tokens from anywhere: a model looks at where it read them before."""
    at = int(rng.integers(0, len(tokens) - n))
    return tokens[at : at + n]


# -- the real model

CONFIG = QFilterConfig(max_length=128, window_length=8, sinks=4, interval=32, policy="knorm")


@pytest.fixture(scope="module")
def smollm2_f32(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "f32.gguf"
    write_f32_copy(smollm2, path)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "near_tie", "most_ties", "logits"),
    [("float16", 0.02, 1, 0.03), ("q8_0", 0.06, 6, 0.2)],
)
def test_the_real_model_recalls_what_the_reference_recalls(
    smollm2, smollm2_f32, dtype, near_tie, most_ties, logits
):
    """Every other question quotes what was read before, the others go on with the text. What came
    from the engine's own rows and queries has to be the same whatever rounding did before."""
    model = Model.load(smollm2, flash_attention=True)
    layers = range(model.shape.n_layer)
    text, rng = english_tokens(smollm2, 2048), np.random.default_rng(3)
    own = Own(layers, TYPES[dtype])
    with (
        load(smollm2_f32) as llm,
        Bounded(
            llm, CONFIG, n_ctx=2048, n_threads=2, type_k=TYPES[dtype], type_v=TYPES[dtype],
            cb_eval=own.callback,
        ) as context,
    ):  # fmt: skip
        both = Both(context, model, cache_of(Archived, CONFIG, dtype), layers, own)
        both.read(text[:512], 32)
        for i in range(12):
            n, n_rows = (24, 32, 20)[i % 3], (0, 64, 90)[i % 3]
            follows = text[len(both.tokens) :]
            both.ask(follows[:n] if i % 2 else quote(both.tokens, rng, n), 32, n_rows)
            both.read(follows[n : n + 32], 32)
    share, ties, difference = both.report(f"SmolLM2, {dtype}", near_tie)
    own_share, own_ties = both.own_choices.report("from its own rows and queries", 1e-4)
    assert share >= 0.995
    assert ties <= most_ties
    assert difference.max() < logits
    assert own_share >= 0.995
    assert own_ties <= 1


# -- one small model per family

FAMILIES = {
    "qwen2": "grouped queries",
    "qwen3": "norm of queries and keys",
    "hunyuan": "the same after RoPE",
    "gemma2": "windows, softcap",
    "gemma3": "windows",
    "gemma4": "windows, layers that share keys",
    "gpt_oss": "windows, attention sinks",
    "granite": "scale of its own",
    "lfm2": "hybrid",
    "smollm3": "layers without RoPE",
}
# Flash Attention works in float32 if the cache does and a batch has 64 tokens or more
BATCH = 64
EXACT = QFilterConfig(max_length=192, window_length=10, sinks=4, interval=BATCH, policy="knorm")
WIDE = {"num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    """NAME and NAME.gguf of every family, and with WIDE heads "wide llama" and "wide gemma2"."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        tiny_models.write(name, folder / name)
    for name in ("llama", "gemma2"):
        tiny_models.write(name, folder / f"wide {name}", **WIDE)
    tiny_models.convert([path for path in folder.iterdir() if path.is_dir()])
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_recalls_what_the_reference_recalls(folder, name):
    """Some questions take two batches. Some come when the cells are full."""
    model = FamilyModel(AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32"))
    rng = np.random.default_rng(5)
    text = rng.integers(3, tiny_models.VOCAB, 2000).tolist()
    with (
        load(folder / f"{name}.gguf") as llm,
        Bounded(llm, EXACT, n_ctx=2048, type_k="f32", type_v="f32") as context,
    ):
        cache = cache_of(ArchivedFamily, EXACT, "float32", layers=model.layers)
        both = Both(context, model, cache, model.layers)
        both.read(text[:320], BATCH)
        for i in range(9):
            n, n_rows = ((BATCH, 0), (BATCH, 100), (2 * BATCH, 64))[i % 3]
            follows = text[len(both.tokens) :]
            both.ask(follows[:n] if i % 2 else quote(both.tokens, rng, n), BATCH, n_rows)
            both.read(follows[n : n + BATCH], BATCH)
    share, ties, difference = both.report(f"{name}, {FAMILIES[name]}", 1e-3)
    assert share >= 0.995
    assert ties <= 1
    assert np.quantile(difference, 0.9) < 0.005
    assert difference.max() < 0.1  # rounding may send a token to another expert


# -- cache types and long archives: the engine alone

SMALL = QFilterConfig(max_length=96, window_length=20, sinks=4, interval=24, policy="knorm")
LAYERS = {"llama": [0, 1, 2], "gemma2": [1, 3]}
SOFTCAP = {"llama": None, "gemma2": 5.0}
BYTES = 3
"""The token of byte 0 in the tokenizer of tiny_models."""


def ask_alone(folder, name, type_k, flags, config, n_text, n_questions, n, other_words=False):
    """What the engine chooses, and what its own rows and queries say; other_words: the questions have
    no word of the text."""
    rng, choices = np.random.default_rng(7), Choices()
    own = Own(LAYERS[name], type_k, SOFTCAP[name])
    n_ctx = n_text + n_questions * n
    tokens = rng.integers(3, tiny_models.VOCAB, n_ctx).tolist()
    if other_words:  # those of single bytes come first
        letters = [BYTES + ord("0"), BYTES + ord("1")]
        tokens[:n_text] = rng.choice(letters, n_text).tolist()
        tokens[n_text:] = (BYTES + ord("a") + np.arange(n_ctx - n_text)).tolist()
    with (
        load(folder / f"wide {name}.gguf") as llm,
        Bounded(
            llm, config, n_ctx=n_ctx, type_k=type_k, flags=flags, cb_eval=own.callback
        ) as context,
    ):
        context.read(tokens[:n_text])
        heads = range(context.n_head_kv(LAYERS[name][0]))
        for i in range(n_questions):
            start = context.n_past()
            context.question()
            own.ask(start)
            context.read(tokens[start : start + n])
            n_rows = config.n_keep - 10 * i
            held = np.array([context.kept(il, ih) for il in LAYERS[name] for ih in heads])
            assert context.recall(n_rows=n_rows) == n
            asked = tokens[: start + n]
            choices.append(own.choose(context, asked, n_rows), held, context.recalled())
            context.read(tokens[start : start + n])
    return choices


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("type_k", ROUNDED)
@pytest.mark.parametrize("name", LAYERS)
def test_a_choice_is_what_float64_weights_of_the_stored_rows_say(folder, name, type_k, how):
    choices = ask_alone(folder, name, type_k, HOW[how], SMALL, 500, 4, 20)
    share, ties = choices.report(f"{name}, {type_k}, {how}", 1e-4)
    assert share >= 0.995
    assert ties <= 1


def test_of_the_newest_no_more_than_64_stay_in_any_case(folder):
    config = QFilterConfig(max_length=768, window_length=100, sinks=4, interval=128, policy="knorm")
    choices = ask_alone(folder, "llama", "f16", 0, config, 1500, 1, 64)
    ours, missing, engine = choices.choices[0]
    assert ours.always.sum() == 4 + 64
    assert np.array_equal(ours.choose() & missing, engine)


@pytest.mark.parametrize("how", HOW)
def test_beyond_a_quarter_rows_come_back_that_a_query_gives_its_attention(folder, how):
    config = QFilterConfig(max_length=768, window_length=40, sinks=4, interval=128, policy="knorm")
    choices = ask_alone(folder, "llama", "f16", HOW[how], config, 1500, 3, 3, other_words=True)
    for ours, *_ in choices.choices:
        assert not ours.near.any()
        assert ours.n_least < ours.choose().sum() < ours.n_rows
        assert ours.choose(share=0.9).sum() < ours.choose().sum() < ours.choose(share=0.4).sum()
    share, ties = choices.report(how, 1e-4)
    assert share >= 0.995
    assert ties == 0
