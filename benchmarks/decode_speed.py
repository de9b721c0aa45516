"""Decode speed and KV memory by position: the stock full cache and a bounded one, in one run.

Both read the same text and decode its last tokens before a position one by one, in turns, so that
whatever else the machine does meets both. A decoded token is one more token of the text: the
speed does not depend on which one. The bounded cache is measured over a whole eviction cycle.

    python benchmarks/decode_speed.py models/smollm2-qfilters.gguf --plot docs/decode_speed.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics

from machine import provenance

from qfllama import Llama, QFilterConfig

MIB = 1 << 20
SLICES = 4


@dataclass
class Row:
    """One engine at one position; seconds and tokens are those of the decoding only."""

    position: int
    engine: str
    tokens_per_second: float
    evictions: int
    eviction_percent: float  # of the time of decoding
    cells_used: int
    kv_mib: float  # allocated


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--positions", default="512,1024,2048,4096,8192")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--policy", default="qfilters")
    parser.add_argument("--type-kv", default="f16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def text_tokens(llm: Llama, n: int) -> list[int]:
    text = "\n".join(topics.topics.values())
    tokens = llm.tokenize(text.encode())
    return (tokens * (n // len(tokens) + 1))[:n]


def read_up_to(llm: Llama, tokens: list[int], position: int) -> None:
    llm.eval(tokens[llm.n_tokens : position])


def decode(llm: Llama, tokens: list[int], n: int) -> float:
    """Seconds for the next n tokens, one at a time."""
    start = time.perf_counter()
    for token in tokens[llm.n_tokens : llm.n_tokens + n]:
        llm.eval([token])
    return time.perf_counter() - start


def evicting_seconds(stats: dict[str, int]) -> float:
    return (stats["score_us"] + stats["select_us"] + stats["gather_us"]) / 1e6


def measure(stock: Llama, ours: Llama, tokens: list[int], position: int) -> list[Row]:
    interval = ours.qfilter_config.interval
    for llm in (stock, ours):
        read_up_to(llm, tokens, position - interval)
    before = ours.qfilter_stats()
    seconds = {"stock": [], "ours": []}
    for _ in range(SLICES):
        for name, llm in (("stock", stock), ("ours", ours)):
            seconds[name].append(decode(llm, tokens, interval // SLICES))
    after = ours.qfilter_stats()
    evicting = evicting_seconds(after) - evicting_seconds(before)
    return [
        Row(
            position=position,
            engine="stock",
            tokens_per_second=interval // SLICES / statistics.median(seconds["stock"]),
            evictions=0,
            eviction_percent=0.0,
            cells_used=stock.n_tokens,
            kv_mib=after["kv_bytes_full"] / MIB,
        ),
        Row(
            position=position,
            engine=f"max_length={ours.qfilter_config.max_length}",
            # the whole cycle: an eviction happens in one of the slices
            tokens_per_second=interval // SLICES * SLICES / sum(seconds["ours"]),
            evictions=after["evictions"] - before["evictions"],
            eviction_percent=100 * evicting / sum(seconds["ours"]),
            cells_used=after["cells_used"],
            kv_mib=after["kv_bytes"] / MIB,
        ),
    ]


def print_table(rows: list[Row]) -> None:
    print(f"{'position':>8}  {'stock tok/s':>11}  {'ours tok/s':>10}  {'ours/stock':>10}"
          f"  {'stock KV MiB':>12}  {'ours KV MiB':>11}  {'evictions':>9}  {'evicting':>8}")  # fmt: skip
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        ratio = ours.tokens_per_second / stock.tokens_per_second
        print(f"{stock.position:>8,}  {stock.tokens_per_second:>11.1f}"
              f"  {ours.tokens_per_second:>10.1f}  {ratio:>9.2f}x  {stock.kv_mib:>12.1f}"
              f"  {ours.kv_mib:>11.1f}  {ours.evictions:>9}  {ours.eviction_percent:>7.2f}%")  # fmt: skip


def plot(rows: list[Row], about: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    positions = [row.position for row in rows[::2]]
    for name, part, color in (
        ("stock llama.cpp, full cache", rows[::2], "tab:gray"),
        (f"qfllama, {rows[1].engine}", rows[1::2], "tab:blue"),
    ):
        axes.plot(positions, [row.tokens_per_second for row in part], "o-", label=name, color=color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(positions, [f"{position:,}" for position in positions])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the conversation (tokens)")
    axes.set_ylabel("decoded tokens per second")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"{about['model']}, {about['machine']}, {about['date']}", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse()
    positions = [int(position) for position in args.positions.split(",")]
    config = QFilterConfig(max_length=args.max_length, policy=args.policy)
    n_ctx = positions[-1]
    common = {
        "n_ctx": n_ctx,
        "type_k": args.type_kv,
        "type_v": args.type_kv,
        "flash_attn": True,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "verbose": False,
    }
    stock = Llama(args.model, **common)
    ours = Llama(args.model, qfilters=config, **common)
    tokens = text_tokens(ours, n_ctx)
    rows = [row for position in positions for row in measure(stock, ours, tokens, position)]
    about = provenance(args.threads) | {"model": Path(args.model).name, "kv_type": args.type_kv}
    print_table(rows)
    flat = rows[-1].tokens_per_second / rows[0].tokens_per_second
    print(
        f"ours at {positions[-1]:,} is {flat:.2f}x the stock engine at {positions[0]:,}; {about['machine']}"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    if args.plot:
        plot(rows, about, args.plot)
    for llm in (stock, ours):
        llm.close()


if __name__ == "__main__":
    main()
