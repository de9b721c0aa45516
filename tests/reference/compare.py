"""Compare another engine with the reference: arrays in, figures out."""

from dataclasses import dataclass

import numpy as np

from reference.cache import Eviction


@dataclass
class Disagreement:
    """A position that one engine keeps and the other drops at one eviction.

    gap: how far the reference's score of it is on the wrong side of the reference's boundary,
    in units of the standard deviation of this head's scores. Near 0: a near-tie.
    """

    n_seen: int
    layer: int
    head: int
    position: int
    score: float
    gap: float


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of positions that two kept sets [n_layer, n_head_kv, n_keep] have in common."""
    if a.shape != b.shape:
        raise ValueError(f"kept sets of different shapes: {a.shape} and {b.shape}")
    common = sum(len(np.intersect1d(a[at], b[at])) for at in np.ndindex(a.shape[:2]))
    return common / a.size


def disagreements(eviction: Eviction, kept: np.ndarray) -> list[Disagreement]:
    """Every position on which `kept` [n_layer, n_head_kv, n_keep] and the reference's own choice
    differ, for evictions that both engines made from the same rows. A sink, a position of the
    window or one that the reference does not have gets an infinite gap: never a near-tie."""
    found = []
    for layer, head in np.ndindex(kept.shape[:2]):
        positions, scores = eviction.candidates(layer, head)
        score = dict(zip(positions.tolist(), scores.tolist(), strict=True))
        spread = max(scores[np.isfinite(scores)].std(), np.finfo(np.float64).tiny)
        ours = set(eviction.chosen[layer, head].tolist())
        theirs = set(kept[layer, head].tolist())
        if len(theirs) != kept.shape[2]:
            raise ValueError(f"layer {layer}, head {head} keeps a position twice")
        for position in sorted(ours ^ theirs):
            s = score.get(position, np.nan)
            if position in ours:
                gap = s - eviction.first_dropped[layer, head]
            else:
                gap = eviction.last_kept[layer, head] - s
            gap = np.inf if np.isnan(gap) else gap / spread
            found.append(Disagreement(eviction.n_seen, layer, head, position, s, gap))
    return found


def logits_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest absolute difference per row of logits [n, n_vocab] -> [n]."""
    return np.abs(a.astype(np.float64) - b).max(-1)
