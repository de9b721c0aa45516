"""Recall against the torch reference: a question brings the same positions back.

A row that is looked at brings twenty others along, so that two rows which are looked at about as
much decide on twenty positions at once. So these tests tell rounding from errors by the gap: the
ratio of the scores that a difference comes from. And they compare where little is rounded: in
float32, or from the engine's own rows and queries.
"""

import shutil

import numpy as np
import pytest
import tiny_models
from bounded import Bounded, load
from reference.families import FamilyModel
from reference.model import Model, write_f32_copy
from reference.recall import Archived, ArchivedFamily
from reference.text import english_tokens
from side_by_side import ROUNDED, Both, Choices, Own

from qfllama import QFilterConfig, native

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

CONFIG = QFilterConfig(max_length=128, window_length=24, sinks=4, interval=32, policy="knorm")


@pytest.fixture(scope="module")
def smollm2_f32(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "f32.gguf"
    write_f32_copy(smollm2, path)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "least", "near_tie", "logits"),
    [("float16", 0.995, 0.02, 0.02), ("q8_0", 0.95, 0.1, 0.15)],
)
def test_the_real_model_recalls_what_the_reference_recalls(
    smollm2, smollm2_f32, dtype, least, near_tie, logits
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
    share, gap, difference = both.report(f"SmolLM2, {dtype}")
    own_share, own_gap = both.own_choices.report("from its own rows and queries")
    assert share >= least
    assert gap < near_tie
    assert difference.max() < logits
    assert own_share >= 0.9995
    assert own_gap < 1e-3


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
EXACT = QFilterConfig(max_length=192, window_length=40, sinks=4, interval=BATCH, policy="knorm")


@pytest.fixture(scope="module")
def families(tmp_path_factory, one_thread):
    """Family -> (reference, path of the GGUF)."""
    folder = tmp_path_factory.mktemp("families")
    models = [FamilyModel(tiny_models.write(name, folder / name)) for name in FAMILIES]
    paths = tiny_models.convert([folder / name for name in FAMILIES])
    yield dict(zip(FAMILIES, zip(models, paths, strict=True), strict=True))
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_recalls_what_the_reference_recalls(families, name):
    """Some questions take two batches. Some come when the cells are full."""
    model, path = families[name]
    rng = np.random.default_rng(5)
    text = rng.integers(3, tiny_models.VOCAB, 2000).tolist()
    with load(path) as llm, Bounded(llm, EXACT, n_ctx=2048, type_k="f32", type_v="f32") as context:
        cache = cache_of(ArchivedFamily, EXACT, "float32", layers=model.layers)
        both = Both(context, model, cache, model.layers)
        both.read(text[:320], BATCH)
        for i in range(9):
            n, n_rows = ((BATCH, 0), (BATCH, 100), (2 * BATCH, 64))[i % 3]
            follows = text[len(both.tokens) :]
            both.ask(follows[:n] if i % 2 else quote(both.tokens, rng, n), BATCH, n_rows)
            both.read(follows[n : n + BATCH], BATCH)
    share, gap, difference = both.report(f"{name}, {FAMILIES[name]}")
    assert share >= 0.995
    assert gap < 1e-3
    assert np.quantile(difference, 0.9) < 0.005
    assert difference.max() < 0.1  # rounding may send a token to another expert


# -- cache types and long archives: the engine alone

SMALL = QFilterConfig(max_length=96, window_length=20, sinks=4, interval=24, policy="knorm")


@pytest.fixture(scope="module")
def wide(tmp_path_factory, one_thread):
    """Name -> a small model with 12 query heads to a KV head, of 64 dimensions; one with a softcap."""
    folder = tmp_path_factory.mktemp("wide")
    heads = {"num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 64}
    tiny_models.write("llama", folder / "llama", **heads)
    tiny_models.write("gemma2", folder / "gemma2", **heads)
    llama, gemma2 = tiny_models.convert([folder / "llama", folder / "gemma2"])
    yield {"llama": (llama, [0, 1, 2], None), "gemma2": (gemma2, [1, 3], 5.0)}
    shutil.rmtree(folder)


def ask_alone(wide, name, type_k, flags, config, n_text, n_questions, n):
    """What the engine chooses, and what its own rows and queries say."""
    path, layers, softcap = wide[name]
    rng, choices, own = np.random.default_rng(7), Choices(), Own(layers, type_k, softcap)
    n_ctx = n_text + n_questions * n
    tokens = rng.integers(3, tiny_models.VOCAB, n_ctx).tolist()
    with (
        load(path) as llm,
        Bounded(
            llm, config, n_ctx=n_ctx, type_k=type_k, flags=flags, cb_eval=own.callback
        ) as context,
    ):
        context.read(tokens[:n_text])
        for i in range(n_questions):
            start = context.n_past()
            context.question()
            own.ask(start)
            context.read(tokens[start : start + n])
            assert context.recall(n_rows=config.n_keep - 10 * i) == n
            chosen = context.kept(layers[0], 0)
            choices.append(own.choose(context, len(chosen)), chosen)
            context.read(tokens[start : start + n])
    return choices


@pytest.mark.parametrize("flags", [0, native.FLAG_GRAPH_GATHER], ids=["host", "graph"])
@pytest.mark.parametrize("type_k", ROUNDED)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_choice_is_what_float64_weights_of_the_stored_rows_say(wide, name, type_k, flags):
    choices = ask_alone(wide, name, type_k, flags, SMALL, 500, 6, 20)
    share, gap = choices.report(f"{name}, {type_k}")
    assert share >= 0.995
    assert gap < 1e-3


@pytest.mark.parametrize("flags", [0, native.FLAG_GRAPH_GATHER], ids=["host", "graph"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_weights_of_an_archive_that_is_scored_in_parts_are_those_of_all_rows(wide, name, flags):
    """A part has 64 MiB: 1,800 rows with the products of 12 heads and 384 tokens."""
    config = QFilterConfig(max_length=896, window_length=100, sinks=4, interval=384, policy="knorm")
    choices = ask_alone(wide, name, "f16", flags, config, 3800, 1, 384)
    share, gap = choices.report(f"{name}, in parts")
    assert share >= 0.995
    assert gap < 1e-3
