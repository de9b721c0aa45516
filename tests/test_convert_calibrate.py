"""Second moments and directions against a full SVD of the queries themselves."""

import io

import numpy as np
import pytest
import torch
from qfllama.convert.calibrate import QueryMoments, sample_positions

from qfllama.config import QFilterError

pytestmark = pytest.mark.usefixtures("one_thread")

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM, N_SAMPLES = 2, 6, 2, 16, 400


def some_queries(seed=0, n=N_SAMPLES):
    """Queries [n_layer, n_head, n, head_dim] of which each head's prefer a direction of its own."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(N_LAYER, N_HEAD, 1, HEAD_DIM, generator=random)
    return centre + torch.randn(N_LAYER, N_HEAD, n, HEAD_DIM, generator=random)


def moments_of(queries, batch=37, **kwargs):
    n_layer, n_head, n, head_dim = queries.shape
    moments = QueryMoments(n_layer, n_head, head_dim, n, **kwargs)
    for start in range(0, n, batch):
        for layer in range(n_layer):
            moments.add(layer, queries[layer][:, start : start + batch])
    return moments


def by_full_svd(queries, n_head_kv):
    """The paper's recipe, head by head, on all queries at once."""
    n_layer, n_head, _, head_dim = queries.shape
    filters = np.zeros((n_layer, n_head_kv, head_dim))
    group = n_head // n_head_kv
    for layer in range(n_layer):
        for head in range(n_head):
            q = queries[layer, head].double()
            v1 = torch.linalg.svd(q, full_matrices=False).Vh[0]
            if (q @ v1 > 0).double().mean() < 0.5:
                v1 = -v1
            filters[layer, head // group] += v1.numpy() / group
    return filters


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_filters_from_moments_equal_those_from_a_full_svd():
    queries = some_queries()
    filters = moments_of(queries).filters(N_HEAD_KV)
    expected = by_full_svd(queries, N_HEAD_KV)
    assert filters.shape == (N_LAYER, N_HEAD_KV, HEAD_DIM)
    assert filters.dtype == np.float32
    assert cosines(filters, expected).min() > 0.99999
    np.testing.assert_allclose(filters, expected, atol=1e-5)  # not normalised after the average


def test_opposite_queries_give_opposite_filters():
    queries = some_queries()
    filters = moments_of(queries).filters(N_HEAD_KV)
    np.testing.assert_allclose(moments_of(-queries).filters(N_HEAD_KV), -filters, atol=1e-5)


def test_the_majority_of_projections_decides_the_sign_and_not_their_mean():
    axis = torch.zeros(HEAD_DIM)
    axis[3] = 1.0
    many, few = axis.repeat(70, 1), -5.0 * axis.repeat(30, 1)
    queries = torch.cat([many, few])[torch.randperm(100, generator=torch.manual_seed(0))]
    assert queries.mean(0)[3] < 0
    directions = moments_of(queries[None, None]).directions()
    torch.testing.assert_close(directions[0, 0], axis.double())


def test_a_thinned_vote_gives_the_same_signs():
    queries = some_queries(n=4000)
    room_for = 100
    thinned = moments_of(queries, vote_bytes=room_for * N_LAYER * N_HEAD * HEAD_DIM * 4)
    assert thinned.n_votes == room_for
    np.testing.assert_array_equal(
        thinned.filters(N_HEAD_KV), moments_of(queries).filters(N_HEAD_KV)
    )


def test_a_thinned_vote_is_spread_over_all_queries():
    queries = torch.arange(1000.0)[None, None, :, None].expand(1, 1, 1000, 2)
    thinned = moments_of(queries, vote_bytes=50 * 2 * 4)
    voters = thinned.votes[0, 0, :, 0]
    torch.testing.assert_close(voters.diff(), torch.full((49,), 20.0))
    assert voters[0] < 20


def test_what_is_kept_does_not_grow_with_the_queries():
    moments = QueryMoments(N_LAYER, N_HEAD, HEAD_DIM, 10_000, vote_bytes=1 << 20)

    def size():
        buffer = io.BytesIO()
        torch.save(vars(moments), buffer)
        return buffer.tell()

    empty = size()
    for _ in range(100):
        for layer in range(N_LAYER):
            moments.add(layer, torch.randn(N_HEAD, 100, HEAD_DIM))
    assert moments.counts == [10_000] * N_LAYER
    assert abs(size() - empty) < 100  # the counters have more digits
    assert moments.nbytes < empty
    assert moments.filters(N_HEAD_KV).shape == (N_LAYER, N_HEAD_KV, HEAD_DIM)


def test_damaged_weights_are_noticed_in_the_queries():
    queries = some_queries()
    queries[1, 2, 3, 4] = torch.nan
    with pytest.raises(QFilterError, match="NaN"):
        moments_of(queries).filters(N_HEAD_KV)


def test_a_model_that_hands_out_no_queries_is_refused():
    with pytest.raises(QFilterError, match="no queries"):
        QueryMoments(N_LAYER, N_HEAD, HEAD_DIM, 10).filters(N_HEAD_KV)


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
