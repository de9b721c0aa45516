"""What a smaller interval costs: speed of reading and decoding, evictions included.

An eviction frees `interval` cells, and a batch has at most as many tokens. A smaller interval keeps
more tokens on average, but evicts more often and reads in smaller batches. All caches are open at
once and take turns, first reading a text that fills them several times, then decoding.

    python benchmarks/interval_cost.py models/smollm2-qfilters.gguf --json docs/interval_cost.json
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from qfllama import QFilterConfig
from qfllama.bench.measure import decode, text_tokens
from qfllama.engine import Context, Model
from qfllama.files import write_json
from qfllama.machine import n_threads, provenance
from qfllama.tables import aligned

TURN = 512
"""Tokens read in a turn."""
STEP = 32
"""Tokens decoded in a turn."""


def read(context: Context, tokens: list[int], n: int) -> float:
    """Seconds for the next n of a text's tokens."""
    n_past = context.n_past()
    start = time.perf_counter()
    context.read(tokens[n_past : n_past + n], logits=True)
    return time.perf_counter() - start


def measure(model: Model, max_length: int, args) -> list[dict]:
    n_decoded = max_length // 2 // STEP * STEP
    n_read = max(args.read, 2 * max_length) // TURN * TURN
    n_total = max_length + n_read + n_decoded
    tokens = text_tokens(model, n_total)
    intervals = [max(1, max_length // part) for part in args.parts]
    with ExitStack() as stack:
        contexts = {
            interval: stack.enter_context(
                model.open(
                    QFilterConfig(max_length=max_length, interval=interval, archive=args.archive),
                    n_ctx=n_total, n_threads=args.threads,
                )
            )
            for interval in intervals
        }  # fmt: skip
        seconds = {interval: {"reading": 0.0, "decoding": 0.0} for interval in intervals}
        for context in contexts.values():
            read(context, tokens, max_length)
        for _ in range(n_read // TURN):
            for interval, context in contexts.items():
                seconds[interval]["reading"] += read(context, tokens, TURN)
        for _ in range(n_decoded // STEP):
            for interval, context in contexts.items():
                seconds[interval]["decoding"] += decode(context, tokens, STEP)
    n = {"reading": n_read, "decoding": n_decoded}
    return [
        {"max_length": max_length, "interval": interval}
        | {name: round(n[name] / value, 2) for name, value in parts.items()}
        for interval, parts in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[4, 8, 16], help="intervals: max_length / PART"
    )
    parser.add_argument("--read", type=int, default=4096, help="tokens that are read at least")
    parser.add_argument("--archive", action="store_true")
    parser.add_argument("--threads", type=int, default=n_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with Model(args.model) as model:
        rows = [row for length in args.max_length for row in measure(model, length, args)]
    print(aligned([["max_length", "interval", "reading tok/s", "decoding tok/s"]] + [
        [str(row["max_length"]), str(row["interval"]), str(row["reading"]), str(row["decoding"])]
        for row in rows
    ]))  # fmt: skip
    if args.json:
        write_json(args.json, {**provenance(args.threads), "rows": rows})


if __name__ == "__main__":
    main()
