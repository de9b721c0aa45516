"""Every pair of cache types: stored bytes move unchanged, scores are those of what is stored."""

import shutil
from functools import partial

import llama_cpp
import numpy as np
import pytest
import tiny_models
from bounded import Bounded, config, load
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from reference.cache import POLICIES, BoundedCache, Head, rotate, select
from reference.model import rope as rope_of_model

from qfllama import native
from qfllama.context import CACHE_TYPES

N_LAYER, N_HEAD_KV, HEAD_DIM = 2, 2, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("types")
    shape = {"n_layer": N_LAYER, "n_head": 4, "n_head_kv": N_HEAD_KV}
    tiny_models.write_llama(path / "64", head_dim=HEAD_DIM, **shape)
    tiny_models.write_llama(path / "48", head_dim=48, **shape)
    tiny_models.convert([path / "64", path / "48"])
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def model(folder):
    model = load(folder / "64.gguf")
    yield model
    model.close()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(3, tiny_models.VOCAB, 1000).tolist()


def head_bytes(type_name: str) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    return HEAD_DIM // block * size


def remember(llm, seen: dict, types) -> None:
    """seen: (K or V, layer, head) -> [positions, bytes] of every row that was ever looked at. A row
    seen again must have the bytes it had."""
    for layer in range(N_LAYER):
        for name, type_name, rows in zip("KV", types, llm.rows(layer), strict=True):
            rows = rows.reshape(len(rows), N_HEAD_KV, head_bytes(type_name))
            for head in range(N_HEAD_KV):
                known, filled = seen.setdefault(
                    (name, layer, head),
                    (np.zeros((500, rows.shape[2]), np.uint8), np.zeros(500, bool)),
                )
                at = llm.kept(layer, head)
                old = filled[at]
                np.testing.assert_array_equal(known[at[old]], rows[old, head])
                known[at], filled[at] = rows[:, head], True


@pytest.mark.parametrize("flags", [0, native.FLAG_GRAPH_GATHER], ids=["host", "graph"])
@pytest.mark.parametrize("type_k", CACHE_TYPES)
def test_surviving_rows_of_every_pair_keep_their_bits_over_50_evictions(
    model, tokens, type_k, flags
):
    for type_v in CACHE_TYPES:
        with Bounded(model, config(), type_k=type_k, type_v=type_v, flags=flags) as llm:
            seen = {}
            for i in range(0, 48 + 50 * 8, 8):
                assert llm.decode(tokens[i : i + 8]) == 0
                remember(llm, seen, (type_k, type_v))
            assert llm.stats().n_evictions == 50
            assert np.isfinite(llm.logits()).all()
            kept = [tuple(llm.kept(1, head)) for head in range(N_HEAD_KV)]
            assert len(set(kept)) == N_HEAD_KV, "every head keeps its own positions"


def stored_keys(rows: np.ndarray, type_name: str) -> np.ndarray:
    """float64 [n_head_kv, n, head_dim]: what the bytes stand for. A quantized cache is rotated."""
    kind = GGMLQuantizationType[type_name.upper()]
    keys = dequantize(rows.reshape(len(rows) * N_HEAD_KV, -1), kind)
    keys = keys.reshape(len(rows), N_HEAD_KV, HEAD_DIM).transpose(1, 0, 2)
    if type_name not in ("f32", "f16", "bf16"):
        import torch

        keys = rotate(torch.from_numpy(keys.copy())).numpy()
    return keys.astype(np.float64)


# what learned filters say was computed when a row was new: the fuzz tests and those of families know
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "learned"])
@pytest.mark.parametrize("type_k", CACHE_TYPES)
def test_what_stays_is_what_float64_scores_of_the_stored_rows_choose(model, tokens, type_k, policy):
    rng = np.random.default_rng(2)
    filters = rng.standard_normal((N_LAYER, N_HEAD_KV, HEAD_DIM)).astype(np.float32)
    # 127 rows: an odd number, and so are its halves
    sizes = config(max_length=127, window_length=20, interval=31, policy=policy, seed=7)
    weight = dict(enumerate(filters))
    moments = tiny_models.some_moments(N_LAYER, 2 * N_HEAD_KV, HEAD_DIM)
    by_layer = dict(enumerate(moments))
    queries = rng.standard_normal(filters.shape).astype(np.float32)
    rope = partial(rope_of_model, base=10000.0)
    cache = BoundedCache(policy="qahead", queries=queries, rope=lambda layer, *args: rope(*args))
    agreed = total = 0
    vectors = {"weight": weight, "moments": by_layer, "queries": None}
    if policy == "qahead":
        vectors["queries"] = dict(enumerate(queries))
    with Bounded(model, sizes, type_k=type_k, **vectors) as llm:
        for i in range(0, 9 * 31, 31):
            before = []
            for layer in range(N_LAYER if i else 0):
                k, v = llm.rows(layer)
                rows = stored_keys(k, type_k), stored_keys(v, "f16")
                before.append((*rows, [llm.kept(layer, h) for h in (0, 1)]))
            n_evictions = llm.stats().n_evictions
            assert llm.decode(tokens[i : i + 31]) == 0
            if llm.stats().n_evictions == n_evictions:
                continue
            for layer, head in np.ndindex(N_LAYER, N_HEAD_KV):
                (keys, values), positions = (
                    [rows[head] for rows in before[layer][:2]],
                    before[layer][2][head],
                )
                mine = moments[layer][2 * head : 2 * head + 2]
                vector = filters[layer][head]
                if policy == "qahead":
                    vector = cache.expected_query(layer, head, i)
                rows = Head(keys, positions, vector, layer, head, 7, values, mine)
                chosen = positions[select(POLICIES[policy](rows), positions, 96, 2, 20)]
                kept = llm.kept(layer, head)[:96]
                agreed += len(np.intersect1d(chosen, kept))
                total += 96
    assert total == 5 * N_LAYER * N_HEAD_KV * 96
    if policy in ("streaming", "random"):
        assert agreed == total
    assert agreed >= 0.999 * total


@pytest.mark.parametrize("policy", ["keydiff", "kvdiff", "qblend", "qfilters", "knorm"])
def test_evictions_of_any_numbers_of_rows_after_one_another(model, tokens, policy):
    """Graphs of different numbers of rows may have as many nodes in another order."""
    filters = np.random.default_rng(2).standard_normal((N_LAYER, N_HEAD_KV, HEAD_DIM))
    weight = dict(enumerate(filters.astype(np.float32)))
    sizes = config(max_length=64, interval=40, policy=policy)
    counts = [29, 39, 29, *range(20, 65), *np.random.default_rng(1).permutation(range(20, 65))]
    with Bounded(model, sizes, weight=weight) as llm:
        for n in map(int, counts):
            llama_cpp.llama_memory_clear(llm.memory, False)
            for start in range(0, n, 40):
                assert llm.decode(tokens[start : min(start + 40, n)]) == 0
            stored = [[stored_keys(part, "f16") for part in llm.rows(il)] for il in range(N_LAYER)]
            assert native.compress(llm.ctx, 0, 18, 12) == 0
            for layer, head in np.ndindex(N_LAYER, N_HEAD_KV):
                keys, values = (part[head] for part in stored[layer])
                rows = Head(keys, np.arange(n), filters[layer][head], layer, head, 0, values)
                chosen = select(POLICIES[policy](rows), np.arange(n), 18, 2, 12)
                assert len(np.intersect1d(chosen, llm.kept(layer, head))) >= 17, (n, layer, head)


@pytest.mark.parametrize("policy", ["keydiff", "kvdiff", "qblend", "qfilters"])
def test_what_stays_does_not_depend_on_the_number_of_threads(model, tokens, policy):
    """Many times, because threads that get into each other's way do so by chance."""
    filters = np.random.default_rng(2).standard_normal((N_LAYER, N_HEAD_KV, HEAD_DIM))
    weight = dict(enumerate(filters.astype(np.float32)))
    sizes, before, first = config(max_length=2000, interval=500, policy=policy), None, None
    for n_threads in (1, 2, 5):
        with Bounded(
            model, sizes, weight=weight, n_ctx=2500, n_threads=n_threads, n_threads_batch=n_threads
        ) as llm:
            if before is None:
                for start in range(0, 2000, 500):
                    assert llm.decode((2 * tokens)[start : start + 500]) == 0
                before = llm.state()
            for _ in range(20):
                assert llm.restore(before)
                assert native.compress(llm.ctx, 0, 1000, 12) == 0
                kept = np.array([llm.kept(*at) for at in np.ndindex(N_LAYER, N_HEAD_KV)])
                first = kept if first is None else first
                np.testing.assert_array_equal(kept, first)


def test_a_head_that_blocks_do_not_divide_is_refused_with_the_reason(folder):
    model = load(folder / "48.gguf")
    for kwargs, message in (
        ({"type_k": "q8_0"}, "type_k = q8_0: its blocks of 32 don't divide a head of 48"),
        ({"type_v": "iq4_nl"}, "type_v = iq4_nl: its blocks of 32 don't divide a head of 48"),
        ({"type_k": 10}, "type_k = q2_K: use f32, f16"),
    ):
        with pytest.raises(ValueError):
            Bounded(model, config(), **kwargs)
        params = llama_cpp.llama_context_default_params()
        for name, value in kwargs.items():
            setattr(params, name, CACHE_TYPES.get(value, value))
        assert message in Bounded.refusal(model, params)
    with Bounded(model, config(), type_k="f32", type_v="bf16") as llm:
        assert llm.why_not == ""
    model.close()
