"""The torch reference engine against things that are independent of it."""

import itertools
import math

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from reference.cache import POLICIES, BoundedCache, Eviction, Head, select, store_q8_0
from reference.compare import agreement, disagreements, logits_difference
from reference.engine import run, split
from reference.filters import query_filters, random_filters
from reference.model import Model, read_shape, rope
from reference.text import english_tokens
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow  # torch runs the real model

torch.set_num_threads(2)

BOUND = {"max_length": 192, "n_keep": 128, "sinks": 4, "window_length": 48}
SIZES = [64, 50, 64, 1, 37]


@pytest.fixture(scope="module")
def model(smollm2):
    return Model.load(smollm2)


@pytest.fixture(scope="module")
def tokens(smollm2):
    return english_tokens(smollm2, 400)


@pytest.fixture(scope="module")
def transformers_model(smollm2):
    return AutoModelForCausalLM.from_pretrained(
        smollm2.parent,
        gguf_file=smollm2.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )


class RecordingCache(BoundedCache):
    """Remembers every row that was ever stored: written[layer] = (k, v), row index = position."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.written = {}

    def append(self, layer, k, v, positions):
        super().append(layer, k, v, positions)
        n = k.shape[1]
        new = self.k[layer][:, -n:], self.v[layer][:, -n:]
        old = self.written.get(layer, (k[:, :0], v[:, :0]))
        self.written[layer] = tuple(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))


@pytest.fixture(scope="module")
def bounded_runs(model, tokens):
    """policy -> (run, cache), evictions at every few chunks of 400 tokens."""
    s = model.shape
    filters = random_filters(s.n_layer, s.n_head_kv, s.head_dim)
    moments = tiny_models.some_moments(s.n_layer, s.n_head, s.head_dim)
    size = (s.n_layer, s.n_head_kv, 2 * s.n_head_kv * s.head_dim)
    learned = np.random.default_rng(4).normal(size=size).astype(np.float32)
    runs = {}
    queries = 10 * random_filters(s.n_layer, s.n_head_kv, s.head_dim, seed=1)
    for policy in POLICIES:
        cache = RecordingCache(
            **BOUND,
            policy=policy,
            filters=filters,
            moments=moments,
            queries=queries if policy == "qahead" else None,
            learned=learned,
            rope=lambda layer, rows, positions: rope(rows, positions, s.rope_base),
        )
        runs[policy] = run(model, tokens, split(len(tokens), SIZES), cache), cache
    return runs


def test_without_a_bound_logits_equal_transformers(model, tokens, transformers_model):
    with torch.no_grad():
        expected = transformers_model(torch.tensor([tokens])).logits[0].numpy()
    chunks = split(len(tokens), [96, 7, 1])
    logits = run(model, tokens, chunks, BoundedCache(), every_position=True).logits
    assert logits_difference(logits, expected).max() < 1e-3
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_cached_keys_are_those_of_transformers_with_the_dimensions_interleaved(
    model, tokens, transformers_model
):
    with torch.no_grad():
        out = transformers_model(torch.tensor([tokens[:80]]), use_cache=True)
    cache = BoundedCache()
    run(model, tokens[:80], [80], cache)
    half = model.shape.head_dim // 2
    interleaved = [j * half + i for i in range(half) for j in range(2)]
    for layer in range(model.shape.n_layer):
        expected = out.past_key_values.layers[layer].keys[0][..., interleaved]
        torch.testing.assert_close(cache.rows(layer)[0], expected, atol=2e-4, rtol=1e-4)


def test_streaming_equals_transformers_with_a_mask_over_sinks_and_recent_positions(
    tokens, transformers_model, bounded_runs
):
    n, n_used = len(tokens), 0
    visible = torch.zeros(n, n, dtype=torch.bool)
    held, ends = [], []
    for size in split(n, SIZES):
        start = ends[-1] + 1 if ends else 0
        if n_used + size > BOUND["max_length"]:
            recent = BOUND["n_keep"] - BOUND["sinks"]
            held = held[: BOUND["sinks"]] + held[len(held) - recent :]
        held = held + list(range(start, start + size))
        n_used = len(held)
        for query in range(start, start + size):
            visible[query, [p for p in held if p <= query]] = True
        ends.append(start + size - 1)
    mask = torch.where(visible, 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        out = transformers_model(torch.tensor([tokens]), attention_mask=mask).logits[0].numpy()
        full = transformers_model(torch.tensor([tokens])).logits[0].numpy()
    streaming = bounded_runs["streaming"][0]
    assert len(streaming.evictions) >= 3
    assert logits_difference(streaming.logits, out[ends]).max() < 1e-3
    assert logits_difference(streaming.logits, full[ends]).max() > 0.1  # the bound does something


def best_subset(scores, positions, n_keep, sinks, window_length):
    """Of all subsets with the sinks and the window, the one whose best, next best, ... candidate
    (by score, then position) is highest: the definition, by trying every subset."""
    order = sorted(range(len(positions)), key=lambda row: positions[row])
    first, last = order[:sinks], order[len(order) - window_length :]
    candidates = [row for row in order if row not in first and row not in last]

    def worth(rows):
        value = {r: -math.inf if math.isnan(scores[r]) else scores[r] for r in rows}
        return sorted(((value[r], positions[r]) for r in rows), reverse=True)

    n_best = n_keep - sinks - window_length
    best = max(itertools.combinations(candidates, n_best), key=worth)
    return sorted([*first, *best, *last], key=lambda row: positions[row])


def test_selection_equals_trying_every_subset():
    rng = np.random.default_rng(1)
    for _ in range(400):
        n = int(rng.integers(3, 10))
        n_keep = int(rng.integers(1, n))
        sinks = int(rng.integers(0, n_keep + 1))
        window_length = int(rng.integers(0, n_keep - sinks + 1))
        scores = rng.choice([-1.0, -0.5, 0.5, 2.0, -np.inf, np.nan], n)  # many ties
        positions = rng.choice(30, n, replace=False)  # rows in any order
        kept = select(scores, positions, n_keep, sinks, window_length)
        assert kept.tolist() == best_subset(scores, positions, n_keep, sinks, window_length)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_keeps_sinks_window_and_the_best_of_the_rest(model, bounded_runs, policy):
    result, cache = bounded_runs[policy]
    filters, sinks, window_length = cache.filters, BOUND["sinks"], BOUND["window_length"]
    assert len(result.evictions) >= 3
    for eviction in result.evictions:
        for layer, head in np.ndindex(eviction.kept.shape[:2]):
            before, kept = eviction.positions[layer, head], eviction.kept[layer, head]
            assert len(kept) == BOUND["n_keep"]
            assert (np.diff(kept) > 0).all()
            assert kept[:sinks].tolist() == [0, 1, 2, 3]
            last = range(eviction.n_seen - window_length, eviction.n_seen)
            assert kept[-window_length:].tolist() == list(last)
            middle = before[sinks : len(before) - window_length]
            inside = np.isin(middle, kept)
            keys = cache.written[layer][0][head][middle]
            if policy in ("qfilters", "qahead"):
                vector = torch.from_numpy(filters[layer, head])
                if policy == "qahead":
                    vector = turned(cache.queries[layer, head], eviction.n_seen)
                projection = keys @ vector
                assert projection[inside].min() > projection[~inside].max() - 1e-5
            elif policy == "knorm":
                assert keys.norm(dim=-1)[inside].max() < keys.norm(dim=-1)[~inside].min() + 1e-5
            elif policy == "keydiff":
                held = cache.written[layer][0][head][before]
                mean = torch.nn.functional.normalize(held, dim=-1).mean(0)
                alike = torch.nn.functional.cosine_similarity(keys, mean[None], dim=-1)
                assert alike[inside].max() < alike[~inside].min() + 1e-5
            elif policy == "qfilters2":
                worth = expected_weight(cache, layer, head, before)[inside_of(before, middle)]
                assert worth[inside].min() > worth[~inside].max() * (1 - 1e-4)
            elif policy in ("qblend", "kvdiff"):
                worth = blended(cache, policy, layer, head, before)[inside_of(before, middle)]
                assert worth[inside].min() > worth[~inside].max() - 1e-4
            elif policy == "learned":
                worth = blended(cache, "qblend", layer, head, before)[inside_of(before, middle)]
                told = learned_number(cache, layer, head, middle)
                worth = sum((x - x.mean()) / x.std() for x in (worth, told))
                assert worth[inside].min() > worth[~inside].max() - 1e-4
            elif policy == "random":
                worth = np.array([random_score(0, layer, head, int(p)) for p in middle])
                assert worth[inside].min() > worth[~inside].max()
            else:
                assert middle[inside].min() > middle[~inside].max()


def turned(query, n_seen):
    """The mean of a query [head_dim] turned to every 16th of the 256 positions from n_seen on, by
    complex numbers, float32."""
    pairs = torch.view_as_complex(torch.from_numpy(query).double().view(-1, 2))
    frequencies = 100000.0 ** (-torch.arange(len(pairs)).double() / len(pairs))
    angles = torch.arange(n_seen, n_seen + 256, 16)[:, None] * frequencies
    mean = (pairs * torch.polar(torch.ones_like(angles), angles)).mean(0)
    return torch.view_as_real(mean).flatten().float()


def learned_number(cache, layer, head, positions):
    """[n]: the learned filter's product with keys, turned back by complex numbers, and values."""
    k, v = (rows[:, positions].double() for rows in cache.written[layer])
    pairs = torch.view_as_complex(k.unflatten(-1, (-1, 2)).contiguous())
    frequencies = 100000.0 ** (-torch.arange(pairs.shape[-1]).double() / pairs.shape[-1])
    angles = torch.from_numpy(positions)[:, None] * frequencies
    k = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), -angles)).flatten(-2)
    inputs = torch.cat([x.transpose(0, 1).flatten(1) for x in (k, v)], dim=1)
    return inputs.numpy() @ cache.filters_learned[layer][head].astype(np.float64)


def inside_of(positions, some):
    return np.isin(positions, some)


def blended(cache, policy, layer, head, positions):
    """[n]: distance of the value from the mean, cosine of the key with the mean direction and, for
    qblend, projection; all standardized, weighted, pooled over five rows, in torch."""
    k, v = (rows[head][positions].double() for rows in cache.written[layer])
    mean = torch.nn.functional.normalize(k, dim=-1).mean(0)
    scores = [
        (v - v.mean(0)).norm(dim=-1),
        -torch.nn.functional.cosine_similarity(k, mean[None], dim=-1),
    ]
    weights = [1, 0.5]
    if policy == "qblend":
        scores.append(k @ torch.from_numpy(cache.filters[layer, head]).double())
        weights = [1, 0.25, 0.25]
    own = sum(
        weight * (score - score.mean()) / score.std(correction=0)
        for weight, score in zip(weights, scores, strict=True)
    )
    pooled = torch.nn.functional.avg_pool1d(own[None], 5, 1, 2, count_include_pad=False)[0]
    return (pooled + 0.3 * own).numpy()


def expected_weight(cache, layer, head, positions):
    """[n]: what softmax gives each key on average over the heads of the group, times |v|, in
    torch."""
    k, v = (rows[head][positions].double() for rows in cache.written[layer])
    moments = torch.from_numpy(cache.moments[layer]).double()
    n_rep = len(moments) // len(cache.k[layer])
    products = torch.einsum("nd,hrd->hrn", k, moments[head * n_rep : (head + 1) * n_rep])
    logits = products[:, 0] + products[:, 1:].square().sum(1)
    return (logits.softmax(-1).mean(0) * v.norm(dim=-1)).numpy()


def random_score(*words):
    """splitmix64 over the words, in numpy's arithmetic modulo 2^64."""
    x = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            x += np.uint64(word) + np.uint64(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
            x ^= x >> np.uint64(31)
    return float(x) / 2.0**64


def test_random_scores_are_uniform_and_differ_by_seed_layer_head_and_position():
    def scores(seed=0, layer=0, index=0):
        positions = np.arange(4000)
        return POLICIES["random"](Head(np.empty((4000, 0)), positions, None, layer, index, seed))

    base = scores()
    assert np.histogram(base, 10, (0, 1))[0].min() > 340
    for other in (scores(seed=1), scores(layer=1), scores(index=1), np.roll(base, 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.05


@pytest.mark.parametrize("policy", POLICIES)
def test_surviving_rows_and_positions_are_those_that_were_written(bounded_runs, policy):
    _, cache = bounded_runs[policy]
    for layer in range(len(cache.k)):
        k, v, positions = cache.rows(layer)
        for head in range(k.shape[0]):
            assert torch.equal(k[head], cache.written[layer][0][head][positions[head]])
            assert torch.equal(v[head], cache.written[layer][1][head][positions[head]])


def test_heads_keep_different_positions(bounded_runs):
    kept = bounded_runs["qfilters"][0].evictions[-1].kept
    assert len({tuple(kept[at]) for at in np.ndindex(kept.shape[:2])}) > kept.shape[0]


def test_forcing_a_runs_own_choice_changes_nothing(model, tokens, bounded_runs):
    expected = bounded_runs["knorm"][0]
    forced = [e.chosen for e in expected.evictions]
    chunks = split(len(tokens), SIZES)
    again = run(model, tokens, chunks, BoundedCache(**BOUND, policy="knorm"), forced)
    assert np.array_equal(again.logits, expected.logits)


def test_forcing_another_choice_keeps_it_and_records_the_own_one(model, tokens, bounded_runs):
    streaming, knorm = bounded_runs["streaming"][0], bounded_runs["knorm"][0]
    forced = [e.kept for e in streaming.evictions]
    chunks = split(len(tokens), SIZES)
    mixed = run(model, tokens, chunks, BoundedCache(**BOUND, policy="knorm"), forced)
    assert np.array_equal(mixed.logits, streaming.logits)
    assert np.array_equal(mixed.evictions[0].chosen, knorm.evictions[0].chosen)
    assert not np.array_equal(mixed.evictions[0].kept, knorm.evictions[0].kept)


def test_forcing_the_wrong_number_of_evictions_or_unknown_positions_is_an_error(model, tokens):
    chunks = split(len(tokens), SIZES)

    def force(forced):
        run(model, tokens, chunks, BoundedCache(**BOUND), forced)

    everyone = np.zeros((model.shape.n_layer, model.shape.n_head_kv, 1), int)
    with pytest.raises(ValueError, match="but only 0 are forced"):
        force([])
    with pytest.raises(ValueError, match="does not have"):
        force([everyone + np.arange(1000, 1000 + BOUND["n_keep"])])


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.05), ("q8_0", 1.5)])
def test_a_rounded_cache_holds_rounded_rows_and_changes_logits_a_little(model, tokens, dtype, most):
    tokens = tokens[:128]
    exact = run(model, tokens, [64, 64], BoundedCache(), every_position=True).logits
    cache = BoundedCache(dtype=dtype)
    rounded = run(model, tokens, [64, 64], cache, every_position=True).logits
    assert 0 < logits_difference(exact, rounded).max() < most
    if dtype == "float16":
        k = cache.rows(5)[0].numpy()
        assert np.array_equal(k, k.astype(np.float16).astype(np.float32))


def test_q8_0_rows_are_rotated_before_they_are_rounded():
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    rows[:, 7] = 100.0  # makes the steps of its block coarse, unless it is spread out
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    plain = gguf.quants.dequantize(gguf.quants.quantize(rows.numpy(), q8_0), q8_0)
    plain_error = (torch.from_numpy(plain) - rows).norm()
    assert (store_q8_0(rows) - rows).norm() < plain_error / 3


def test_query_filters_are_first_singular_vectors_that_most_queries_agree_with(model, tokens):
    queries = []
    model.on_query = lambda layer, plain, q: queries.append(q)
    run(model, tokens[:160], [160], BoundedCache())
    model.on_query = None
    filters, _ = query_filters(model, tokens[:160])
    assert filters.shape == (model.shape.n_layer, model.shape.n_head_kv, model.shape.head_dim)
    for layer in (0, 7, 29):
        for head in range(model.shape.n_head_kv):
            expected = 0
            for q in queries[layer][3 * head : 3 * head + 3].double():  # 9 query, 3 KV heads
                moment = torch.linalg.eigh(q.T @ q)
                v1 = moment.eigenvectors[:, -1]
                expected = expected + v1 * (1 if (q @ v1 > 0).sum() * 2 >= len(q) else -1) / 3
            np.testing.assert_allclose(filters[layer, head], expected, atol=1e-5)


def test_an_output_matrix_of_its_own_is_used(model, tokens):
    embedding = model.tensors["token_embd.weight"]
    untied = Model(model.shape, model.tensors | {"output.weight": -2 * embedding})
    tied_logits = run(model, tokens[:5], [5], BoundedCache()).logits
    logits = run(untied, tokens[:5], [5], BoundedCache()).logits
    np.testing.assert_allclose(logits, -2 * tied_logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "qwen2", "not a llama model"),
        ("llama.rope.scaling.type", "yarn", "RoPE scaling"),
        ("llama.expert_count", 8, "experts"),
        ("llama.rope.dimension_count", 32, "heads have 64"),
    ],
)
def test_a_model_that_it_would_compute_wrongly_is_refused(tmp_path, key, value, message):
    values = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 128,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        key: value,
    }
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", values.pop("general.architecture"))
    kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for name, v in values.items():
        kinds[type(v)](name, v)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        read_shape(gguf.GGUFReader(tmp_path / "odd.gguf"))


def test_disagreements_are_measured_from_the_reference_boundary():
    # rows 0..7, one sink, a window of two, candidates 1..5, two of which stay
    scores = np.array([[[9.0, 1.0, 2.0, 2.1, 5.0, 0.0, 9.0, 9.0]]])
    positions = np.arange(8)[None, None]
    chosen = np.array([[[0, 3, 4, 6, 7]]])
    eviction = Eviction(
        8, positions, scores, chosen, chosen, np.array([[2.1]]), np.array([[2.0]]), 1, 2
    )
    near_tie = np.array([[[0, 2, 4, 6, 7]]])
    spread = scores[0, 0, 1:6].std()
    found = disagreements(eviction, near_tie)
    assert [(d.position, d.gap) for d in found] == [
        (2, pytest.approx(0.1 / spread)),
        (3, pytest.approx(0.1 / spread)),
    ]
    assert agreement(chosen, near_tie) == 4 / 5
    assert agreement(chosen, chosen) == 1
    assert not disagreements(eviction, chosen)
    worst_instead_of_best = np.array([[[0, 3, 5, 6, 7]]])
    gaps = {d.position: d.gap for d in disagreements(eviction, worst_instead_of_best)}
    assert gaps == {4: pytest.approx(3.0 / spread), 5: pytest.approx(2.1 / spread)}
    without_the_sink = np.array([[[2, 3, 4, 6, 7]]])
    assert disagreements(eviction, without_the_sink)[0].gap == math.inf
