"""Opens a bounded Llama, evicts, closes it, again and again: does resident memory stay flat?

Prints resident memory and open files as it goes, with the slope over the second half.

    python benchmarks/open_close.py models/smollm2-qfilters.gguf --cycles 1000
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from qfllama import Llama, QFilterConfig
from qfllama.bench.memory import resident_bytes
from qfllama.files import write_json
from qfllama.machine import provenance


def cycle(model: str, config: QFilterConfig, threads: int) -> int:
    """Evictions of one Llama between its opening and its closing."""
    llm = Llama(
        model,
        qfilters=config,
        n_ctx=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    tokens = np.random.default_rng(0).integers(3, 300, config.max_length + 1)
    llm.eval(tokens.tolist())
    evictions = llm.qfilter_stats()["evictions"]
    llm.close()
    return evictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--policy", default="qfilters", help="knorm needs no filters in the file")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    config = QFilterConfig(max_length=128, window_length=16, interval=64, policy=args.policy)
    step = max(1, args.cycles // 20)
    rows, evictions = [], 0
    print(f"{'cycles':>7}  {'evictions':>9}  {'RSS MiB':>8}  {'open files':>10}")
    for done in range(1, args.cycles + 1):
        evictions += cycle(args.model, config, args.threads)
        if done % step == 0:
            row = {
                "cycles": done,
                "evictions": evictions,
                "rss_kib": resident_bytes("VmRSS") // 1024,
                "open_files": len(os.listdir("/proc/self/fd")),
            }
            rows.append(row)
            print(f"{done:>7,}  {evictions:>9,}  {row['rss_kib'] / 1024:>8.1f}"
                  f"  {row['open_files']:>10}", flush=True)  # fmt: skip
    half = rows[len(rows) // 2 :]
    slope = np.polyfit([r["cycles"] for r in half], [r["rss_kib"] for r in half], 1)[0] * 1024
    print(f"resident memory grows by {slope:.1f} bytes per cycle over the second half")
    if args.json:
        about = provenance(args.threads) | {"model": Path(args.model).name}
        result = {"about": about, "bytes_per_cycle": round(float(slope), 1), "rows": rows}
        write_json(args.json, result)


if __name__ == "__main__":
    main()
