"""How well filters fit their model: the verdict, and the table of the figures behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .filters import Filters
from .schema import QUALITY
from .tables import aligned
from .terminal import escaped

WEAK = 0.3
"""A layer is weak if its rank correlation, the mean over its KV heads, is lower than this."""
GOOD, FAIR = 0.1, 0.4
"""The fit is good if the share of weak layers is below GOOD, fair below FAIR, else poor."""
ADVICE = {
    "good": "",
    "fair": ": expect losses",
    "poor": ": expect heavy losses, use policy kvdiff, which needs no filters",
}
MORE = "see docs/metadata.md#quality"


@dataclass(frozen=True)
class Fit:
    """How well filters tell which keys later queries look at.

    verdict: good, fair, poor, or unknown where nothing was measured
    spearman: float32 [n_layer_with_filter], mean over the KV heads, NaN where undefined
    weak: model layers below WEAK
    n_measured: layers that have a figure
    n_better: layers in which the filters do better than minus the key norm; None if not measured
    """

    verdict: str
    spearman: np.ndarray
    weak: list[int]
    n_measured: int
    n_better: int | None

    @property
    def summary(self) -> str:
        """One line for the user."""
        if self.verdict == "unknown":
            return (
                "Q-Filters fit: unknown, nothing was measured: calibrate with `qfllama convert` "
                "on at least two sequences of well over 64 tokens"
            )
        return (
            f"Q-Filters fit: {self.verdict}: {len(self.weak)} of {self.n_measured} layers below "
            f"{WEAK:g}{ADVICE[self.verdict]}, {MORE}"
        )


def fit(filters: Filters) -> Fit:
    """Grade filters by `spearman` of their quality figures."""
    ours, norms = (layer_means(filters, name) for name in ("spearman", "spearman_knorm"))
    measured = np.isfinite(ours)
    weak = [layer for layer, value in zip(filters.layers, ours, strict=True) if value < WEAK]
    both = measured & np.isfinite(norms)
    verdict = "unknown"
    if measured.any():
        share = len(weak) / measured.sum()
        verdict = "good" if share < GOOD else "fair" if share < FAIR else "poor"
    return Fit(
        verdict,
        ours,
        weak,
        int(measured.sum()),
        int((ours > norms)[both].sum()) if both.any() else None,
    )


def layer_means(filters: Filters, name: str) -> np.ndarray:
    """Quality figure `name` of every layer, mean over the KV heads that have one: float32
    [n_layer_with_filter], NaN where there is none."""
    if name not in filters.quality:
        return np.full(len(filters.layers), np.nan, np.float32)
    defined = [values[np.isfinite(values)] for values in filters.figures(name)]
    return np.array([v.mean() if v.size else np.nan for v in defined], np.float32)


def table(filters: Filters, *, heads=False) -> str:
    """The quality figures, one line per layer (means over its KV heads) or per head, weak ones
    marked; empty without figures."""
    names = _columns(filters)
    if not names:
        return ""
    columns = [_column(filters, name, heads) for name in names]
    keys = [[str(layer)] for layer in filters.layers]
    if heads:
        keys = [
            [*key, str(head)]
            for key, n_head_kv in zip(keys, filters.n_head_kv, strict=True)
            for head in range(n_head_kv)
        ]
    rows = [["layer", *(["head"] if heads else []), *map(_title, names), ""]]
    for key, *values in zip(keys, *columns, strict=True):
        weak = "spearman" in names and values[names.index("spearman")] < WEAK
        rows.append([*key, *map(_number, values), f"< {WEAK:g}" if weak else ""])
    return aligned(rows, n_left=0)


def _columns(filters):
    """Names of the figures with one number per layer or head, those of the schema first."""
    known = [name for name in QUALITY if name in filters.quality]
    others = [name for name in filters.quality if name not in QUALITY]
    return known + [name for name in others if filters.figures(name) is not None]


def _column(filters, name, heads):
    if not heads:
        return layer_means(filters, name)
    # a figure per layer stands beside each of its heads
    layers = zip(filters.figures(name), filters.n_head_kv, strict=True)
    return np.concatenate([np.broadcast_to(values, n_head_kv) for values, n_head_kv in layers])


def _title(name):
    return escaped(name.replace("_", " "), 24)


def _number(value):
    return f"{value:.3f}" if np.isfinite(value) else "-"


def other_figures(filters: Filters) -> list[str]:
    """A line for every quality figure that has no place in `table`."""
    return [
        f"{_title(name)}: {values.size} numbers"
        for name, values in filters.quality.items()
        if name not in _columns(filters)
    ]
