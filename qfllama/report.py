"""How well filters fit their model: the verdict, tables, JSON values and heat maps."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import metadata
from .config import QFilterError
from .gguf_header import escaped
from .metadata import Filters

WEAK = 0.3
"""A layer whose rank correlation, mean over its KV heads, is lower is counted as weak."""
GOOD, FAIR = 0.1, 0.4
"""The fit is good while fewer than this share of the layers are weak, then fair, then poor."""
ADVICE = {
    "good": "",
    "fair": ": expect losses",
    "poor": ": expect heavy losses, use policy kvdiff, which needs no filters",
}
MORE = "see docs/metadata.md#quality"
IMAGES = (".png", ".svg", ".pdf")


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
                "Q-Filters fit: unknown, nothing was measured: that takes calibrating with "
                "`qfllama convert` on two sequences or more of well over 64 tokens"
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
    n_layer, n_head_kv, _ = filters.weight.shape
    values = filters.quality.get(name, np.full((n_layer, n_head_kv), np.nan, np.float32))
    if values.ndim == 1:
        return values
    count = np.isfinite(values).sum(1)
    total = np.where(np.isfinite(values), values, 0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def table(filters: Filters, *, heads=False) -> str:
    """The quality figures, one line per layer (means over its KV heads) or per head, weak ones
    marked; empty without figures."""
    n_layer, n_head_kv, _ = filters.weight.shape
    names = _columns(filters)
    if not names:
        return ""
    columns = [_column(filters, name, heads) for name in names]
    keys = [[str(layer)] for layer in filters.layers]
    if heads:
        keys = [[*key, str(head)] for key in keys for head in range(n_head_kv)]
    titles = ["layer", *(["head"] if heads else []), *map(_title, names)]
    rows = [
        [*key, *map(_number, row)] for key, row in zip(keys, np.transpose(columns), strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(titles, widths, strict=True))]
    for i, row in enumerate(rows):
        weak = "spearman" in names and columns[names.index("spearman")][i] < WEAK
        line = "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))
        lines.append(line + (f"  < {WEAK:g}" if weak else ""))
    return "\n".join(lines)


def _columns(filters):
    """Names of the figures that there is one of per layer or head, those of the schema first."""
    known = [name for name in metadata.QUALITY if name in filters.quality]
    others = [name for name in filters.quality if name not in metadata.QUALITY]
    return known + [name for name in others if filters.quality[name].shape in _shapes(filters)]


def _shapes(filters):
    return filters.weight.shape[:2], filters.weight.shape[:1]


def _column(filters, name, heads):
    if not heads:
        return layer_means(filters, name)
    values = filters.quality[name]
    # a figure per layer stands beside each of its heads
    return np.broadcast_to(values.reshape(len(values), -1), filters.weight.shape[:2]).ravel()


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


def plain(value):
    """`value` (nested dicts and lists, arrays, numbers, text) as valid JSON has it: no NaN or
    infinity, no undecodable bytes."""
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value


def plot(path, filters: Filters, title: str = "") -> None:
    """Write a heat map [layer, KV head] of `spearman` to `path` (.png, .svg or .pdf), and beside it
    one of the difference to `spearman_knorm`. `path` is replaced, complete or not at all.

    Raises QFilterError without figures or matplotlib, or if `path` can't be written."""
    Figure = figure_class(path)
    if "spearman" not in filters.quality:
        raise QFilterError(
            "there are no quality figures to plot; run `qfllama convert` again to measure them"
        )
    save_figure(_draw(Figure, filters, title), path)


def figure_class(path):
    """matplotlib's Figure, for an image that shall be `path`.

    Raises QFilterError for another kind of file than IMAGES, and without matplotlib."""
    if Path(path).suffix.lower() not in IMAGES:
        raise QFilterError(f"{path}: plots are {', '.join(IMAGES)} files; name it so")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise QFilterError(
            "plots need matplotlib; install it with `pip install 'qfllama[bench]'`"
        ) from None
    return Figure


def save_figure(figure, path, dpi=120) -> None:
    """Write a figure to `path`, complete or not at all; QFilterError if that can't be."""
    path = Path(path)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that no font here has
        figure.savefig(image, format=path.suffix[1:].lower(), dpi=dpi)
    write_file(path, image.getvalue())


def write_json(path, value) -> None:
    """As `write_file`: a report in JSON."""
    write_file(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def write_file(path, content: bytes) -> None:
    """Write `path`, complete or not at all; QFilterError if that can't be."""
    try:
        with metadata.replacing([Path(path)]) as (file,):
            file.write(content)
    except OSError as error:
        raise QFilterError(
            f"cannot write {path}: {error.strerror}; make room or give another file"
        ) from None


def _draw(Figure, filters, title):
    n_layer, n_head_kv, _ = filters.weight.shape
    ours, norms = filters.quality["spearman"], filters.quality.get("spearman_knorm")
    figure = Figure(figsize=(7.5, 2.4 + 0.16 * min(max(n_layer, 8), 100)), layout="constrained")
    left, *right = figure.subplots(1, 1 if norms is None else 2, sharey=True, squeeze=False)[0]
    # viridis and PuOr are told apart with every common colour blindness
    bar = _heat_map(left, ours, "viridis", -0.2, 1, extend="min")
    bar.ax.axhline(WEAK, color="white")
    left.set_title("rank correlation of k·filter\nwith later attention", fontsize=9)
    if right:
        reach = max(np.nanmax(np.abs(ours - norms), initial=0), 0.1)
        _heat_map(right[0], ours - norms, "PuOr", -reach, reach)
        right[0].set_title("better (+) or worse (-)\nthan minus key norm", fontsize=9)
    step = -(-n_layer // 40)
    left.set_yticks(range(0, n_layer, step), filters.layers[::step])
    left.set_ylabel("layer")
    weak = np.flatnonzero(layer_means(filters, "spearman") < WEAK)
    beside = left.get_yaxis_transform()
    left.plot([1.03] * len(weak), weak, "k<", ms=4, clip_on=False, transform=beside)
    legend = f"(triangles: mean of the layer below {WEAK:g}; grey: undefined)"
    lines = [escaped(title, 60), fit(filters).summary.split(", see")[0], legend]
    figure.suptitle("\n".join(filter(None, lines)), fontsize=9, parse_math=False)
    return figure


def _heat_map(panel, values, colours, least, largest, extend="neither"):
    """values: [n_layer, n_head_kv]; NaN is grey. Returns the colour bar."""
    image = panel.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=least,
        vmax=largest,
    )
    panel.set_facecolor("0.8")
    panel.set_xlabel("KV head")
    n_head_kv = values.shape[1]
    panel.set_xticks(range(0, n_head_kv, -(-n_head_kv // 16)))
    return panel.figure.colorbar(image, ax=panel, extend=extend)
