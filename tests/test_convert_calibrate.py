"""Second moments and directions against a full SVD of the queries themselves."""

import numpy as np
import pytest
from qfllama.convert import calibrate
from qfllama.convert.calibrate import QueryMoments, group_mean, sample_positions

from qfllama.config import QFilterError

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM, N_SAMPLES = 2, 6, 2, 16, 400


def some_queries(seed=0, n=N_SAMPLES):
    """Queries [n_layer, n_head, n, head_dim] of which each head's prefer a direction of its own."""
    random = np.random.default_rng(seed)
    centre = random.normal(size=(N_LAYER, N_HEAD, 1, HEAD_DIM))
    queries = centre + random.normal(size=(N_LAYER, N_HEAD, n, HEAD_DIM))
    return queries.astype(np.float32)


def moments_of(queries, batch=37, **kwargs):
    n_layer, _, n, _ = queries.shape
    moments = QueryMoments(n_layer, n, **kwargs)
    for start in range(0, n, batch):
        for layer in range(n_layer):
            moments.add(layer, queries[layer][:, start : start + batch])
    return moments


def filters_of(moments, n_head_kv=N_HEAD_KV):
    return np.stack([group_mean(v1, n_head_kv) for v1 in moments.directions().values()])


def by_full_svd(queries, n_head_kv):
    """The paper's recipe, head by head, on all queries at once."""
    n_layer, n_head, _, head_dim = queries.shape
    filters = np.zeros((n_layer, n_head_kv, head_dim))
    group = n_head // n_head_kv
    for layer in range(n_layer):
        for head in range(n_head):
            q = queries[layer, head].astype(np.float64)
            v1 = np.linalg.svd(q, full_matrices=False).Vh[0]
            if (q @ v1 > 0).mean() < 0.5:
                v1 = -v1
            filters[layer, head // group] += v1 / group
    return filters


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_filters_from_moments_equal_those_from_a_full_svd():
    queries = some_queries()
    filters = filters_of(moments_of(queries))
    expected = by_full_svd(queries, N_HEAD_KV)
    assert filters.shape == (N_LAYER, N_HEAD_KV, HEAD_DIM)
    assert cosines(filters, expected).min() > 0.99999
    np.testing.assert_allclose(filters, expected, atol=1e-5)  # not normalised after the average


def test_opposite_queries_give_opposite_filters():
    queries = some_queries()
    filters = filters_of(moments_of(queries))
    np.testing.assert_allclose(filters_of(moments_of(-queries)), -filters, atol=1e-5)


def test_the_majority_of_projections_decides_the_sign_and_not_their_mean():
    axis = np.eye(HEAD_DIM, dtype=np.float32)[3]
    queries = np.concatenate([np.tile(axis, (70, 1)), np.tile(-5 * axis, (30, 1))])
    np.random.default_rng(0).shuffle(queries)
    assert queries.mean(0)[3] < 0
    directions = moments_of(queries[None, None]).directions()
    np.testing.assert_allclose(directions[0][0], axis, atol=1e-12)


def test_a_thinned_vote_gives_the_same_signs():
    queries = some_queries(n=4000)
    room_for = 100
    thinned = moments_of(queries, vote_bytes=room_for * N_LAYER * N_HEAD * HEAD_DIM * 2)
    assert thinned.votes[0].shape[1] == room_for
    np.testing.assert_array_equal(filters_of(thinned), filters_of(moments_of(queries)))


def test_a_thinned_vote_is_spread_over_all_queries():
    angles = np.arange(1000) / 1000
    queries = 7 * np.stack([np.cos(angles), np.sin(angles)], -1)[None, None]
    thinned = moments_of(queries, vote_bytes=50 * 2 * 2)
    votes = thinned.votes[0][0].astype(float)
    voters = np.round(1000 * np.arctan2(votes[:, 1], votes[:, 0]))
    np.testing.assert_allclose(np.diff(voters), 20, atol=1)
    assert voters[0] < 20


def test_what_is_kept_does_not_grow_with_the_queries():
    moments = QueryMoments(N_LAYER, 10_000, vote_bytes=1 << 20)
    random = np.random.default_rng(0)
    sizes = set()
    for _ in range(100):
        for layer in range(N_LAYER):
            moments.add(layer, random.normal(size=(N_HEAD, 100, HEAD_DIM)))
        sizes.add(moments.nbytes)
    assert moments.counts == {0: 10_000, 1: 10_000}
    assert len(sizes) == 1
    assert sizes.pop() < (1 << 20) + 8 * N_LAYER * N_HEAD * HEAD_DIM * (HEAD_DIM + 1) + 1
    assert filters_of(moments).shape == (N_LAYER, N_HEAD_KV, HEAD_DIM)


def test_a_model_too_large_for_exact_moments_gets_the_same_filters(monkeypatch):
    exact = filters_of(moments_of(some_queries()))
    monkeypatch.setattr(calibrate, "MOMENT_BYTES", 1)
    moments = moments_of(some_queries())
    assert moments.second[0].dtype == np.float32
    assert cosines(filters_of(moments), exact).min() > 0.999999


def test_more_queries_than_announced_do_no_harm():
    """Layers that attend another layer's keys hand out queries under that layer's name."""
    queries = some_queries()
    moments = QueryMoments(N_LAYER, N_SAMPLES // 2)
    for layer in range(N_LAYER):
        moments.add(layer, queries[layer])
    np.testing.assert_allclose(filters_of(moments), filters_of(moments_of(queries)), atol=1e-12)


def test_layers_may_differ_in_heads():
    queries = some_queries()
    moments = QueryMoments(2, N_SAMPLES, vote_bytes=50 * 2 * N_HEAD * HEAD_DIM * 2)
    moments.add(0, queries[0])
    moments.add(1, queries[1][:2])
    moments.add(0, queries[0])
    expected = moments_of(queries).directions()
    np.testing.assert_allclose(moments.directions()[0], expected[0], atol=1e-12)
    np.testing.assert_allclose(moments.directions()[1], expected[1][:2], atol=1e-12)


def test_queries_that_are_all_zero_are_refused():
    queries = some_queries()
    queries[1, 2] = 0
    with pytest.raises(QFilterError, match="zero"):
        moments_of(queries).directions()


def test_damaged_weights_are_noticed_in_the_queries():
    queries = some_queries()
    queries[1, 2, 3, 4] = np.nan
    with pytest.raises(QFilterError, match="NaN"):
        moments_of(queries).directions()


def test_a_model_that_hands_out_no_queries_is_refused():
    with pytest.raises(QFilterError, match="no queries"):
        QueryMoments(N_LAYER, 10).directions()


def test_sampled_positions_are_distinct_spread_and_the_same_for_the_same_seed():
    lengths = [500, 20, 1000]
    drawn = sample_positions(lengths, 300, seed=7)
    assert sum(len(part) for part in drawn) == 300
    for part, length in zip(drawn, lengths, strict=True):
        assert (np.diff(part) > 0).all()
        assert part[0] >= 0
        assert part[-1] < length
    assert 50 < len(drawn[0]) < 150
    assert 150 < len(drawn[2]) < 250
    again, other = sample_positions(lengths, 300, seed=7), sample_positions(lengths, 300, seed=8)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(np.concatenate(drawn), np.concatenate(other))


def test_all_positions_are_used_where_fewer_exist_than_asked_for():
    drawn = sample_positions([5, 3], 100, seed=0)
    assert [part.tolist() for part in drawn] == [[0, 1, 2, 3, 4], [0, 1, 2]]


def test_second_order_rows_give_the_log_of_the_mean_exponential_of_gaussian_queries():
    """Against the mean of exp(scale * q.k) over a million queries with the very covariance."""
    random = np.random.default_rng(5)
    n, dim, scale = 1_000_000, 6, 0.4
    mixing = random.normal(size=(dim, dim))
    queries = random.normal(size=(1, n, dim)) @ mixing + random.normal(size=dim)
    moments = QueryMoments(1, n)
    moments.add(0, queries.astype(np.float32))
    rows = moments.second_order(dim, {0: scale})[0][0]
    keys = random.normal(size=(20, dim)) / np.linalg.norm(mixing)
    expected = np.log(np.exp(scale * queries[0] @ keys.T).mean(0))
    found = keys @ rows[0] + ((keys @ rows[1:].T) ** 2).sum(-1)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert np.abs((keys @ rows[1:].T) ** 2).sum(-1).max() > 0.05  # not the mean alone


def test_second_order_rows_of_a_rank_are_the_first_of_those_of_a_higher_one():
    moments = moments_of(some_queries())
    scale = dict.fromkeys(range(N_LAYER), 0.25)
    high, low = (moments.second_order(rank, scale) for rank in (HEAD_DIM, 3))
    for layer in range(N_LAYER):
        assert high[layer].shape == (N_HEAD, 1 + HEAD_DIM, HEAD_DIM)
        np.testing.assert_array_equal(low[layer], high[layer][:, :4])
        lengths = np.linalg.norm(high[layer][:, 1:], axis=-1)
        assert (np.diff(lengths) <= 0).all()
        queries = some_queries()[layer].astype(np.float64)
        covariance = np.stack([np.cov(q.T, bias=True) for q in queries])
        back = np.einsum("hri,hrj->hij", high[layer][:, 1:], high[layer][:, 1:])
        np.testing.assert_allclose(back, 0.25**2 / 2 * covariance, atol=1e-6)
        np.testing.assert_allclose(high[layer][:, 0], 0.25 * queries.mean(1), atol=1e-6)


def test_a_rank_beyond_head_dim_gives_all_directions():
    rows = moments_of(some_queries()).second_order(1000, dict.fromkeys(range(N_LAYER), 1.0))
    assert rows[0].shape == (N_HEAD, 1 + HEAD_DIM, HEAD_DIM)
