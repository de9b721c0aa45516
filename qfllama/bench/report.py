"""The result of `qfllama bench` (see `measure.Engines.result`) as tables and as a figure."""

from __future__ import annotations

from qfllama.bench.memory import MIB
from qfllama.bench.plan import BASELINE, QUESTION
from qfllama.tables import aligned

UNKNOWN = "-"


def tables(result: dict) -> str:
    """All figures, one line per cache, each with its ratio to that of stock f16."""
    about = result["about"]
    parts = []
    if result["decode"]:
        title = f"decoding, tokens per second by position (x: times {about['ratios_against']})"
        parts.append(_by_length(title, result["decode"], "position", "tokens_per_second", 1))
        if shares := _evicting(result["decode"]):
            parts.append(shares)
    if result["first_token"]:
        title = "seconds to the first token by prompt length"
        parts.append(_by_length(title, result["first_token"], "prompt", "seconds", 2))
    if result["question"]:
        title = f"seconds to read a question of {QUESTION} tokens, its recall included, by position"
        parts.append(_by_length(title, result["question"], "position", "seconds", 2))
    parts.append(_memory(result))
    parts.append(
        f"{about['model']}, policy {about['policy']}, {about['machine']}, {about['date']}, "
        f"qfllama {about['qfllama']}, llama-cpp-python {about['llama-cpp-python']}"
    )
    return "\n\n".join(parts)


def _by_length(title: str, rows: list[dict], by: str, figure: str, digits: int) -> str:
    """Caches down, lengths across: the figure and its ratio."""
    cells = {
        (row["engine"], row[by]): f"{row[figure]:,.{digits}f} {row['ratio']:5.2f}x" for row in rows
    }
    return _grid(title, rows, by, cells)


def _evicting(rows: list[dict]) -> str:
    """The share of decoding time that evictions take, for caches that evict."""
    evicting = {row["engine"] for row in rows if row["evictions"]}
    rows = [row for row in rows if row["engine"] in evicting]
    cells = {(row["engine"], row["position"]): f"{row['eviction_percent']:.2f} %" for row in rows}
    return _grid("of that, evicting", rows, "position", cells) if rows else ""


def _grid(title: str, rows: list[dict], by: str, cells: dict) -> str:
    """Caches down, lengths across."""
    lengths = list(dict.fromkeys(row[by] for row in rows))
    lines = [["", *(f"{n:,}" for n in lengths)]]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        lines.append([engine, *(cells[engine, n] for n in lengths)])
    return f"{title}\n{aligned(lines)}"


def _memory(result: dict) -> str:
    about, lines = result["about"], [["", "KV", "", "opened", "filled", "", "process"]]
    for row in result["memory"]:
        lines.append(
            [row["engine"], _mib(row["kv_bytes"]), _times(row["kv_ratio"]),
             _mib(row["opened_bytes"]), _mib(row["filled_bytes"]), _times(row["filled_ratio"]),
             _mib(row["process_bytes"])]
        )  # fmt: skip
    archived = [row["archive_bytes"] for row in result["memory"]]
    if any(archived):
        for line, cell in zip(lines, ["archive", *map(_mib, archived)], strict=True):
            line.append(cell)
    title = (
        f"memory at n_ctx {about['n_ctx']:,}, MiB: K and V as allocated; what the process grew by"
        " when\nthe cache was opened and when it was filled; a process with only this cache"
    )
    return f"{title}\n{aligned(lines)}"


def _mib(n_bytes: int | None) -> str:
    return UNKNOWN if n_bytes is None else f"{n_bytes / MIB:,.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


# -- figure

STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^v"


def draw(Figure, result: dict):
    """Up to three panels: decoding speed, time to the first token, memory.

    A colour is a bound (grey: none), a line style is a type of the cache.
    """
    about = result["about"]
    panels = [_speeds] * bool(result["decode"]) + [_first_tokens] * bool(result["first_token"])
    panels.append(_bars)
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 4.4), layout="constrained")
    styles = _styles(result["memory"])
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, result, styles)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(panels) > 1:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(6, len(labels)),
            frameon=False, fontsize=8,
        )  # fmt: skip
    title = f"{about['model']}, policy {about['policy']}, {about['machine']}, {about['date']}"
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def _styles(memory: list[dict]) -> dict[str, dict]:
    """Engine -> keywords of a line. viridis is readable with every common colour blindness."""
    from matplotlib import colormaps

    lengths = sorted({row["max_length"] for row in memory if row["max_length"]})
    types = list(dict.fromkeys(row["type_kv"] for row in memory))
    styles = {}
    for row in memory:
        length, at = row["max_length"], types.index(row["type_kv"])
        colour = "0.45"
        if length:
            colour = colormaps["viridis"](0.85 * lengths.index(length) / max(1, len(lengths) - 1))
        styles[row["engine"]] = {
            "color": colour,
            "linestyle": STYLES[at % len(STYLES)],
            "marker": MARKERS[at % len(MARKERS)],
            "markersize": 4,
        }
    return styles


def _speeds(axis, result: dict, styles: dict) -> None:
    _lines(axis, result["decode"], "position", "tokens_per_second", styles)
    axis.set_title("decoded tokens per second", fontsize=9)
    axis.set_xlabel("position in the conversation (tokens)")


def _first_tokens(axis, result: dict, styles: dict) -> None:
    _lines(axis, result["first_token"], "prompt", "seconds", styles)
    axis.set_title("seconds to the first token", fontsize=9)
    axis.set_xlabel("length of the prompt (tokens)")


def _lines(axis, rows: list[dict], by: str, figure: str, styles: dict) -> None:
    for engine in dict.fromkeys(row["engine"] for row in rows):
        of_it = [row for row in rows if row["engine"] == engine]
        x, y = ([row[name] for row in of_it] for name in (by, figure))
        axis.plot(x, y, label=_label(engine), **styles[engine])
    lengths = sorted({row[by] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _bars(axis, result: dict, styles: dict) -> None:
    """K and V as allocated, and behind it what the process grew by."""
    rows = result["memory"][::-1]
    names = [_label(row["engine"]) for row in rows]
    grown = [(row["filled_bytes"] or 0) / MIB for row in rows]
    kv = [row["kv_bytes"] / MIB for row in rows]
    colours = [styles[row["engine"]]["color"] for row in rows]
    axis.barh(names, grown, color="0.88")
    axis.barh(names, kv, color=colours, height=0.55)
    for y, (row, most) in enumerate(zip(rows, map(max, grown, kv), strict=True)):
        axis.text(most, y, f" {kv[y]:,.0f} ({_times(row['kv_ratio'])})", va="center", fontsize=7)
    axis.set_xlim(0, 1.3 * max(*grown, *kv))
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title("MiB of K and V (light: growth of the process)", fontsize=9)
    axis.set_xlabel(f"MiB at {result['about']['n_ctx']:,} positions")


def _label(engine: str) -> str:
    bound, _, type_kv = engine.partition(" ")
    if bound == BASELINE.name.split()[0]:
        return f"llama.cpp, {type_kv}"
    return f"max_length {int(bound):,}, {type_kv}"
