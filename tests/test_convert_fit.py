"""Fit figures against full attention matrices and a textbook rank correlation."""

from dataclasses import dataclass

import numpy as np
import pytest
from qfllama.convert.measure import MIN_DISTANCE, Fit, spearman
from qfllama.convert.pipeline import held_out

from qfllama.config import QFilterError

N_HEAD, N_HEAD_KV, HEAD_DIM, N_TOKENS = 4, 2, 8, 300
LAYER = 5


@dataclass
class Call:
    """An attention call over positions start ... start + n_tokens of a whole sequence."""

    all_queries: np.ndarray
    all_keys: np.ndarray
    start: int
    n_tokens: int
    layer: int = LAYER

    def queries(self):
        return self.all_queries[:, self.start : self.start + self.n_tokens]

    def keys(self):
        return self.all_keys[:, : self.start + self.n_tokens]


def some_sequence(seed):
    random = np.random.default_rng(seed)
    queries = random.normal(size=(N_HEAD, N_TOKENS, HEAD_DIM)) + random.normal(size=HEAD_DIM)
    keys = random.normal(size=(N_HEAD_KV, N_TOKENS, HEAD_DIM)) * random.uniform(
        0.5, 2, (1, N_TOKENS, 1)
    )
    return queries.astype(np.float32), keys.astype(np.float32)


def some_directions(seed=9):
    v1 = np.random.default_rng(seed).normal(size=(N_HEAD, HEAD_DIM))
    v1 /= np.linalg.norm(v1, axis=-1, keepdims=True)
    return v1, v1.reshape(N_HEAD_KV, -1, HEAD_DIM).mean(1)


def read(meter, sequence, batch):
    queries, keys = sequence
    for start in range(0, N_TOKENS, batch):
        meter.add(Call(queries, keys, start, min(batch, N_TOKENS - start)))
    meter.end_sequence()


def ranks(values):
    """Ranks by counting: how many are smaller."""
    return np.array([(values < value).sum() for value in values], float)


def by_attention_matrix(sequence, filters):
    """[2, n_head_kv] from the whole matrix of logits, query by key, masked."""
    queries, keys = (x.astype(np.float64) for x in sequence)
    result = np.zeros((2, N_HEAD_KV))
    for head in range(N_HEAD_KV):
        group = range(head * N_HEAD // N_HEAD_KV, (head + 1) * N_HEAD // N_HEAD_KV)
        logits = np.mean([queries[h] @ keys[head].T for h in group], axis=0)
        means, scores, norms = [], [], []
        for j in range(N_TOKENS):
            later = [logits[t, j] for t in range(N_TOKENS) if t >= j + MIN_DISTANCE]
            if later:
                means.append(np.mean(later))
                scores.append(keys[head, j] @ filters[head])
                norms.append(-np.linalg.norm(keys[head, j]))
        for i, values in enumerate((scores, norms)):
            result[i, head] = np.corrcoef(ranks(values), ranks(means))[0, 1]
    return result


@pytest.mark.parametrize("batch", [300, 128, 50, 7])
def test_correlations_are_those_of_the_whole_attention_matrix(batch):
    v1, filters = some_directions()
    meter = Fit({LAYER: v1}, {LAYER: v1}, {LAYER: filters})
    sequences = [some_sequence(0), some_sequence(1)]
    for sequence in sequences:
        read(meter, sequence, batch)
    expected = np.mean([by_attention_matrix(s, filters) for s in sequences], axis=0)
    figures = meter.figures()
    np.testing.assert_allclose(figures["spearman"], expected[0], atol=1e-6)
    np.testing.assert_allclose(figures["spearman_knorm"], expected[1], atol=1e-6)
    assert np.ptp(expected) > 0.1  # heads and scores differ: mixing them up would show


def test_layers_that_share_keys_are_measured_together():
    """Both calls come under the name of the layer that has the keys."""
    v1, filters = some_directions()
    meter = Fit({LAYER: v1}, {LAYER: v1}, {LAYER: filters})
    (one, keys), (other, _) = some_sequence(0), some_sequence(1)
    for start in range(0, N_TOKENS, 100):
        meter.add(Call(one, keys, start, 100))
        meter.add(Call(other, keys, start, 100))
    meter.end_sequence()
    # a mean of logits over both layers' queries is a logit with their mean query
    expected = by_attention_matrix(((one + other) / 2, keys), filters)
    np.testing.assert_allclose(meter.figures()["spearman"], expected[0], atol=1e-6)


def test_energy_and_cosine_are_those_of_all_queries():
    v1, filters = some_directions()
    mean = np.random.default_rng(4).normal(size=v1.shape)
    meter = Fit({LAYER: v1}, {LAYER: mean}, {LAYER: filters})
    sequences = [some_sequence(2), some_sequence(3)]
    for sequence in sequences:
        read(meter, sequence, 64)
    queries = np.concatenate([s[0] for s in sequences], axis=1).astype(np.float64)
    energy = [((q @ v) ** 2).sum() / (q**2).sum() for q, v in zip(queries, v1, strict=True)]
    unit = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
    cosine = [np.abs(q @ m / np.linalg.norm(m)).mean() for q, m in zip(unit, mean, strict=True)]
    figures = meter.figures()
    np.testing.assert_allclose(figures["energy"], np.reshape(energy, (2, 2)).mean(1), rtol=1e-5)
    np.testing.assert_allclose(
        figures["mean_cosine"], np.reshape(cosine, (2, 2)).mean(1), rtol=1e-5
    )


def test_layers_without_filter_and_sequences_too_short_are_told_apart():
    v1, filters = some_directions()
    meter = Fit({LAYER: v1}, {LAYER: v1}, {LAYER: filters})
    queries, keys = some_sequence(0)
    meter.add(Call(queries, keys, 0, 10, layer=LAYER + 1))
    meter.add(Call(queries, keys, 0, MIN_DISTANCE))
    meter.end_sequence()
    figures = meter.figures()
    assert figures["spearman"].shape == (N_HEAD_KV,)
    assert np.isnan(figures["spearman"]).all()
    assert np.isfinite(figures["energy"]).all()


def test_rank_correlation_is_one_for_any_rising_function():
    x = np.random.default_rng(0).normal(size=(3, 50))
    np.testing.assert_allclose(spearman(x, np.exp(x)), 1)
    np.testing.assert_allclose(spearman(x, -(x**3)), -1)


def test_equal_numbers_share_their_rank_and_a_constant_has_no_correlation():
    tied = spearman(np.array([[1.0, 2.0, 2.0, 3.0]]), np.array([[1.0, 3.0, 2.0, 4.0]]))
    np.testing.assert_allclose(tied, np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert np.isnan(spearman(np.ones((1, 40)), np.arange(40.0)[None])).all()


def test_a_sequence_too_short_to_measure_does_not_hide_the_others():
    v1, filters = some_directions()
    meter = Fit({LAYER: v1}, {LAYER: v1}, {LAYER: filters})
    queries, keys = some_sequence(0)
    read(meter, (queries, keys), 128)
    meter.add(Call(queries, keys, 0, 20))
    meter.end_sequence()
    expected = by_attention_matrix((queries, keys), filters)
    np.testing.assert_allclose(meter.figures()["spearman"], expected[0], atol=1e-6)


def test_damaged_keys_are_noticed():
    v1, filters = some_directions()
    queries, keys = some_sequence(0)
    keys[1, 7, 3] = np.nan
    with pytest.raises(QFilterError, match="damaged"):
        read(Fit({LAYER: v1}, {LAYER: v1}, {LAYER: filters}), (queries, keys), 64)


def test_a_fifth_of_the_sequences_is_held_out():
    assert [held_out(n) for n in (1, 2, 4, 5, 9, 10, 20)] == [0, 1, 1, 1, 1, 2, 4]
