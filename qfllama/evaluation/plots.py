"""Figures of evaluations."""

from __future__ import annotations

from qfllama.evaluation.kld import ROUNDING
from qfllama.evaluation.needle import BINS
from qfllama.figures import figure_class, save_figure


def check(path) -> None:
    """Raises QFilterError if there can be no image at `path`: before hours of work, not after."""
    figure_class(path)


def needle(path, rows: list[dict], titles: list[str], about: str) -> None:
    """Length by depth for every row of `needle.rows`, a line of panels for each policy."""
    places, shape = _places(rows)
    size = (1.8 + 2.4 * shape[1], 0.9 + 2.2 * shape[0])
    figure = figure_class(path)(figsize=size, layout="constrained")
    panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    lengths = sorted({int(length) for row in rows for length in row["by_length"]})
    for panel in panels.ravel():
        panel.axis("off")
    for place, row, title in zip(places, rows, titles, strict=True):
        panels[place].axis("on")
        image = _heat_map(panels[place], row, lengths)
        panels[place].set_title(f"{title}: {row['right']:.0%} found", fontsize=8)
        panels[place].tick_params(labelbottom=True)
    for panel in panels[:, 0]:
        panel.set_ylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=panels, label="digits right (%: in the cells)", shrink=0.8, aspect=40)
    figure.supxlabel("tokens", fontsize=8)
    figure.suptitle(about, fontsize=8, parse_math=False)
    save_figure(figure, path, dpi=150)


def _places(rows: list[dict]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(line, column) of the panel of every row, and how many lines and columns there are."""
    places, line, column = [], 0, -1
    for before, row in zip([None, *rows], rows, strict=False):
        same = before is None or before["policy"] == row["policy"]
        line, column = (line, column + 1) if same else (line + 1, 0)
        places.append((line, column))
    return places, (line + 1, 1 + max(column for _, column in places))


def _heat_map(panel, row, lengths):
    """One panel; grey where there was no needle."""
    cells, parts = row["by_length_and_depth"], [i / BINS for i in range(BINS)]
    values = [
        [cells.get(length, {}).get(part, {}).get("digits", float("nan")) for length in lengths]
        for part in parts
    ]
    panel.set_facecolor("0.85")
    image = panel.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    if len(lengths) <= 6:
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if value == value:
                    panel.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6)
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
    panel.set_yticks([-0.5, BINS / 2 - 0.5, BINS - 0.5], ["0%", "50%", "100%"], fontsize=7)
    return image


def perplexity(path, rows: list[dict], titles: list[str], about: str) -> None:
    """Perplexity by position for every row of `perplexity.rows`."""
    figure = figure_class(path)(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for row, title in zip(rows, titles, strict=True):
        values = row["ppl_by_position"]
        ends = [min((i + 1) * row["bucket"], row["length"]) for i in range(len(values))]
        style = {"color": "black", "linewidth": 2} if row["policy"] == "full" else {}
        axes.plot(ends, values, label=f"{title} ({row['ppl']:.2f})", **style)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(about, fontsize=8, parse_math=False)
    save_figure(figure, path, dpi=150)


def kld(path, rows: list[dict], titles: list[str], about: str) -> None:
    """Divergence by position for every row of `kld.rows` that has any."""
    figure = figure_class(path)(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for row, title in zip(rows, titles, strict=True):
        values = row["kld_by_position"]
        ends = [min((i + 1) * row["bucket"], row["length"]) for i in range(len(values))]
        style = {"linestyle": "--"} if row["policy"] == "full" else {}
        if row["policy"] == ROUNDING:
            style = {"color": "0.5", "linestyle": ":"}
        axes.plot(ends, values, label=f"{title} ({row['kld']:.2g})", **style)
    axes.set_yscale("log")
    axes.axvline(row["first"], color="0.8", zorder=0)
    axes.set_xlabel("position (tokens); what is right of the line counts")
    axes.set_ylabel("KL divergence (nats)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(about, fontsize=8, parse_math=False)
    save_figure(figure, path, dpi=150)


def ladder(path, rows: list[dict], titles: list[str], about: str) -> None:
    """Divergence and needles over bytes per token of context for all rows of `ladder.run`: a line
    for llama.cpp's own caches, one for ours of each type, dashed with recall."""
    figure = figure_class(path)(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if row["policy"] == ROUNDING:
            left.axhline(row["kld"]["kld"], color="0.5", linestyle=":", label="rounding alone")
            continue
        stock = row["policy"] == "full"
        lines.setdefault("llama.cpp" if stock else f"{row['policy']} {row['type_k']}", []).append(
            row
        )
    for i, (label, mine) in enumerate(lines.items()):
        style = {"color": "black" if mine[0]["policy"] == "full" else f"C{i}", "marker": "o"}
        bytes_ = [row["bytes_per_token"] for row in mine]
        klds = [row["kld"]["kld"] or float("nan") for row in mine]  # 0 has no place on a log scale
        left.plot(bytes_, klds, label=label, **style)
        for word, dash in (("off", "-"), ("on", "--")):
            points = [
                (x, 100 * row["needles"][word]["digits"])
                for x, row in zip(bytes_, mine, strict=True)
                if word in row["needles"]
            ]
            if points:
                right.plot(*zip(*points, strict=True), linestyle=dash, **style)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("bytes of K and V per token of context")
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.set_ylabel("KL divergence from the f16 cache (nats)")
    right.set_ylabel("digits of needles right, % (dashed: with recall)")
    right.set_ylim(0, 102)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(about, fontsize=8, parse_math=False)
    save_figure(figure, path, dpi=150)


def ruler(path, rows: list[dict], titles: list[str], about: str) -> None:
    """A heat map of scores: a line for every row of `ruler.rows`, a column for every task."""
    tasks = list(rows[0]["by_task"])
    values = [[*(row["by_task"][task]["score"] for task in tasks), row["score"]] for row in rows]
    _shares(path, [*tasks, "mean"], values, titles, f"strings found, %\n{about}")


def questions(path, rows: list[dict], titles: list[str], about: str) -> None:
    """The same of answers: a line for every row of `questions.rows`, a column for every document."""
    names = list(rows[0]["by_document"])
    values = [[row["by_document"][name]["right"] for name in names] for row in rows]
    values = [[*line, row["right"]] for line, row in zip(values, rows, strict=True)]
    _shares(path, [*names, "all"], values, titles, f"answers right, %\n{about}")


def _shares(path, columns: list[str], values: list[list[float]], titles: list[str], about: str):
    """Shares by line and column; the last column is of the others together."""
    size = (2.6 + 0.85 * len(columns), 1.2 + 0.32 * len(values))
    figure = figure_class(path)(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(values)), titles, fontsize=8)
    axes.axvline(len(columns) - 1.5, color="white", linewidth=3)
    axes.set_title(about, fontsize=8, parse_math=False)
    save_figure(figure, path, dpi=150)
