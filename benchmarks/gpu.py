"""A GPU in one run: device tests, speed beside the stock engine, and the parts of an eviction.

The model has the shape of an 8B one and random weights (4.3 GB, written first). Each row is one
cache: how fast every sequence is read up to a position and goes on from there, token by token, in a
batch of all sequences. Nothing is built: the engine that is installed is used.

    python benchmarks/gpu.py --json docs/gpu.json     # on a machine with a GPU: make bench-gpu
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from eviction_cost import MIB, N_HEAD_KV, N_LAYER, N_VOCAB, PARTS, SHAPES, random_model

from qfllama import QFilterConfig, QFilterError, offload
from qfllama.engine import Context, Model
from qfllama.files import write_json
from qfllama.machine import n_threads, provenance
from qfllama.tables import aligned

TESTS = Path(__file__).parent.parent / "tests" / "test_devices.py"
DECODED = 64
"""Tokens of each sequence whose decoding is timed at a position."""


@dataclass
class Row:
    """One cache after n_seq sequences of `position` tokens. Tokens per second are those of all
    sequences; the parts of an eviction are means in ms, of all that were read up to here."""

    cache: str
    n_seq: int
    position: int
    read_tokens_per_second: float
    decode_tokens_per_second: float
    evictions: int
    score_ms: float | None
    select_ms: float | None
    move_ms: float | None
    graph_nodes: int | None
    scratch_mib: float | None
    eviction_percent: float | None  # of the time that decoding one interval takes
    read_ratio: float | None = None  # to the stock engine
    decode_ratio: float | None = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, default=N_LAYER)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--policies", default="qblend,streaming")
    parser.add_argument("--positions", default="4096,32768,131072", help="of one sequence")
    parser.add_argument("--sequences", default="8x32768,16x4096", help="NUMBERxPOSITION,...")
    parser.add_argument("--backend", default="CUDA", help="of the device tests; none: no tests")
    parser.add_argument("--threads", type=int, default=n_threads())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def device_tests(backend: str) -> dict[str, int]:
    """How many passed, failed and so on."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)],
        env=os.environ | {"QFLLAMA_TEST_BACKEND": backend, "NVIDIA_TF32_OVERRIDE": "0"},
        capture_output=True,
        text=True,
    )
    print(*done.stdout.splitlines()[-30:], sep="\n", flush=True)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    if not counts:
        sys.exit(f"the device tests did not run: {done.stderr}")
    return {what: int(n) for n, what in counts}


def read(context: Context, tokens, stop: int) -> float:
    """All sequences up to a position, one after the other in turns of a batch; seconds."""
    start = time.perf_counter()
    while (n_past := context.n_past(context.n_seq - 1)) < stop:
        n = min(context.params.n_batch, stop - n_past)
        for seq in range(context.n_seq):
            context.read(tokens[n_past : n_past + n], seq=seq)
    context.read(tokens[stop : stop + 1], logits=True)  # waits for the device
    assert context.kv_cache_seq_rm(0, stop, -1)
    return time.perf_counter() - start


def decode(context: Context, tokens, n: int) -> float:
    """n tokens of every sequence, all sequences in one batch; seconds."""
    begin, start = context.n_past(), time.perf_counter()
    for i in range(begin, begin + n):
        context.fill([(seq, i, tokens[i : i + 1], 1) for seq in range(context.n_seq)])
        assert context.decode_batch() == 0
        context.logits()
    return time.perf_counter() - start


def evicting(context: Context) -> np.ndarray:
    """Seconds of the parts of all evictions until now."""
    stats = context.stats()
    return np.array([getattr(stats, f"t_{part}") for part in PARTS]) / 1e6


def measure(model: Model, args, policy: str | None, n_seq: int, positions: list[int]) -> list[Row]:
    """policy: None for the stock engine with its full cache."""
    config = policy and QFilterConfig(max_length=args.max_length, policy=policy, archive=False)
    interval = QFilterConfig(max_length=args.max_length).interval
    rng = np.random.default_rng(2)
    tokens = rng.integers(259, N_VOCAB, max(positions) + DECODED + 1).tolist()
    rows, seconds, n_read = [], 0.0, 0
    with model.open(
        config, n_ctx=len(tokens), n_seq=n_seq, n_threads=args.threads, n_batch=interval
    ) as context:
        for position in positions:
            n_read += n_seq * (position - context.n_past())
            seconds += read(context, tokens, position)
            stats, parts = context.stats(), evicting(context)
            decoding = decode(context, tokens, DECODED) - (evicting(context) - parts).sum()
            n = stats.n_evictions
            score, select, move = (parts / n * 1e3).round(2) if n else (None, None, None)
            eviction = parts.sum() / n if n else 0.0
            # in one interval every sequence evicts once
            step = decoding / DECODED + n_seq * eviction / interval
            rows.append(
                Row(
                    cache=policy or "stock",
                    n_seq=n_seq,
                    position=position,
                    read_tokens_per_second=round(n_read / seconds, 1),
                    decode_tokens_per_second=round(n_seq / step, 1),
                    evictions=n,
                    score_ms=score,
                    select_ms=select,
                    move_ms=move,
                    graph_nodes=stats.n_graph_nodes if n else None,
                    scratch_mib=round(stats.n_bytes_scratch / MIB, 1) if policy else None,
                    eviction_percent=round(100 * n_seq * eviction / interval / step, 2),
                )
            )
    return rows


def add_ratios(rows: list[Row]) -> None:
    stock = {(row.n_seq, row.position): row for row in rows if row.cache == "stock"}
    for row in rows:
        if base := stock.get((row.n_seq, row.position)):
            for name in ("read", "decode"):
                figure = f"{name}_tokens_per_second"
                ratio = round(getattr(row, figure) / getattr(base, figure), 2)
                setattr(row, f"{name}_ratio", ratio)


def main() -> None:
    args = parse()
    tests = {} if args.backend == "none" else device_tests(args.backend)
    plans = [(1, [int(n) for n in args.positions.split(",")])]
    for plan in filter(None, args.sequences.split(",")):
        n_seq, position = plan.split("x")
        plans.append((int(n_seq), [int(position)]))
    rows: list[Row] = []
    with (
        random_model(args.shape, args.layers, rank=1) as path,
        Model(str(path), n_gpu_layers="all") as model,
    ):
        for n_seq, positions in plans:
            for policy in (None, *args.policies.split(",")):
                try:
                    rows += measure(model, args, policy, n_seq, positions)
                except QFilterError as error:  # no memory for the stock engine's
                    print(f"{policy or 'stock'}, {n_seq} sequences: {error}")
    if not rows:
        sys.exit("no cache could be measured")
    add_ratios(rows)
    names = list(asdict(rows[0]))
    table = [["-" if v is None else str(v) for v in asdict(row).values()] for row in rows]
    print(aligned([names, *table]))
    if args.json:
        about = provenance(args.threads) | {
            "devices": [device.name for device in offload.devices()],
            "model": f"random Q4_0 weights, {args.shape}: {args.layers} layers, {N_HEAD_KV} KV heads",
            "max_length": args.max_length,
        }
        result = {"about": about, "device_tests": tests, "rows": [asdict(row) for row in rows]}
        write_json(args.json, result)


if __name__ == "__main__":
    main()
