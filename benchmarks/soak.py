"""A long session in a bounded cache: does memory stay flat, and the cost of an eviction?

A session as people have it: of every 100 tokens 80 are read in one batch and 20 are decoded one at
a time (`--decoded`). Prints resident memory as it goes, with its slope over the second half, and
the cost of an eviction over the same stretch.

    python benchmarks/soak.py models/smollm2-qfilters.gguf --tokens 200000 --json docs/soak.json

With `--archive DIR` evicted rows go to a file of `--archive-mib` at most.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np

from qfllama import QFilterConfig
from qfllama.bench.measure import decode, evicting_seconds, text_tokens
from qfllama.bench.memory import resident_bytes
from qfllama.engine import Context, Model
from qfllama.files import write_json
from qfllama.machine import provenance


def go_on(context: Context, tokens: list[int], n: int, decoded: int) -> float:
    """Read and decode the next n tokens, a multiple of 100; seconds."""
    seconds = 0.0
    for _ in range(0, n, 100):
        start, n_past = time.perf_counter(), context.n_past()
        context.read(tokens[n_past : n_past + 100 - decoded], logits=True)
        seconds += time.perf_counter() - start + decode(context, tokens, decoded)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--decoded", type=int, default=20, help="of every 100 tokens")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--policy", default=QFilterConfig.policy)
    parser.add_argument("--archive", help="a folder for the archive; by default there is none")
    parser.add_argument("--archive-mib", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    config = QFilterConfig(
        max_length=args.max_length,
        policy=args.policy,
        archive=args.archive or False,
        archive_limit=args.archive_mib << 20 if args.archive else None,
    )
    model = Model(args.model)
    context = model.open(config, n_ctx=args.tokens, n_threads=args.threads)
    tokens = text_tokens(model, args.tokens)
    step = max(100, args.tokens // 2000 * 100)
    rows, field = [], "RssAnon" if args.archive else "VmRSS"  # without the mapped file
    n_before, seconds_before = 0, 0.0
    print(f"{'tokens':>8}  {'RSS MiB':>8}  {'tok/s':>6}  {'evictions':>9}  {'ms/eviction':>11}")
    while context.n_past() + step <= args.tokens:
        seconds = go_on(context, tokens, step, args.decoded)
        n_evictions, evicting = context.stats().n_evictions, evicting_seconds(context)
        evictions, cost = n_evictions - n_before, evicting - seconds_before
        n_before, seconds_before = n_evictions, evicting
        rows.append(
            {
                "tokens": context.n_past(),
                "rss_kib": resident_bytes(field) // 1024,
                "tokens_per_second": round(step / seconds, 2),
                "evictions": n_evictions,
                "ms_per_eviction": round(1000 * cost / max(1, evictions), 3),
                "archived": context.stats().n_archived,
                "archive_bytes": context.stats().n_bytes_archive,
            }
        )
        row = rows[-1]
        print(f"{row['tokens']:>8,}  {row['rss_kib'] / 1024:>8.1f}  {row['tokens_per_second']:>6.1f}"
              f"  {row['evictions']:>9,}  {row['ms_per_eviction']:>11.2f}", flush=True)  # fmt: skip
    half = rows[len(rows) // 2 :]
    slope = np.polyfit([r["tokens"] for r in half], [r["rss_kib"] for r in half], 1)[0] * 1024
    print(f"resident memory grows by {slope:.2f} bytes per token over the second half")
    if args.json:
        about = provenance(args.threads) | {"model": Path(args.model).name}
        result = {"about": about, "bytes_per_token": round(float(slope), 3), "rows": rows}
        write_json(args.json, result)
    model.close()


if __name__ == "__main__":
    main()
