"""Figures: writing them to a file, and the heat map of how well filters fit."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np

from .config import QFilterError
from .files import write_file
from .filters import Filters
from .fit import WEAK, fit, layer_means
from .terminal import escaped

IMAGES = (".png", ".svg", ".pdf")


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
    """matplotlib's Figure class, for an image that will be `path`.

    Raises QFilterError for a kind of file that is not in IMAGES, and without matplotlib."""
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


def _draw(Figure, filters, title):
    n_layer = len(filters.layers)
    ours, norms = (_rectangle(filters, name) for name in ("spearman", "spearman_knorm"))
    figure = Figure(figsize=(7.5, 2.4 + 0.16 * min(max(n_layer, 8), 100)), layout="constrained")
    left, *right = figure.subplots(1, 1 if norms is None else 2, sharey=True, squeeze=False)[0]
    # viridis and PuOr are readable with every common colour blindness
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


def _rectangle(filters, name):
    """A quality figure [n_layer, most KV heads of a layer], NaN where a layer has fewer; None if
    there is no such figure."""
    if name not in filters.quality:
        return None
    values = np.full((len(filters.layers), max(filters.n_head_kv)), np.nan)
    for row, of_layer in zip(values, filters.figures(name), strict=True):
        row[: len(of_layer)] = of_layer
    return values


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
