"""What the archive and a recall cost, beside the stock engine with its full cache.

At each position, in one run: seconds of a recall (the question's tokens are read, their queries score
the archive, the cells are filled), with reading the question again; seconds that the stock engine
takes to read as many tokens at that position with its full cache; tokens per second of decoding
without and with an archive, evictions included, which take turns.

    python benchmarks/recall_cost.py models/smollm2-qfilters.gguf --json docs/recall_cost.json
    python benchmarks/recall_cost.py 8b --positions 4096 --json docs/recall_cost_8b.json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from eviction_cost import N_LAYER, random_model

from qfllama import QFilterConfig
from qfllama.bench.measure import decode, text_tokens
from qfllama.commands.options import CommaList
from qfllama.engine import Context, Model
from qfllama.files import write_json
from qfllama.machine import n_threads, provenance
from qfllama.tables import aligned

BATCH = 512


def timed(do) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def recall_seconds(context: Context, question: list[int]) -> dict[str, float]:
    """Of the parts of a recall; the sequence is then as long as before."""
    n_past = context.n_past()
    context.question()
    first = timed(lambda: context.read(question, logits=True))
    recall = timed(context.recall)
    again = timed(lambda: context.read(question, logits=True))
    assert context.kv_cache_seq_rm(0, n_past, -1)
    return {"first": first, "recall": recall, "again": again}


def stock_seconds(model: Model, tokens, position: int, question, args) -> float:
    """To read the question after `position` tokens, with the full cache."""
    with model.open(
        None, n_ctx=position + 1024, n_batch=BATCH, n_threads=args.threads, type_k=args.type,
        type_v=args.type,
    ) as stock:  # fmt: skip
        for start in range(0, position, BATCH):
            stock.read(tokens[start : min(position, start + BATCH)])
        seconds = []
        for _ in range(args.repeat):
            seconds.append(timed(lambda: stock.read(question, logits=True)))
            assert stock.kv_cache_seq_rm(0, position, -1)
        return statistics.median(seconds)


def measure(model: Model, tokens: list[int], position: int, args) -> dict:
    question = tokens[position : position + args.queries]
    config = {"max_length": args.max_length, "policy": args.policy}
    open_ = {
        "n_ctx": position + 1024 + 2 * args.repeat * args.decoded,
        "n_threads": args.threads, "type_k": args.type, "type_v": args.type,
    }  # fmt: skip
    with (
        model.open(QFilterConfig(**config, archive=False), **open_) as without,
        model.open(QFilterConfig(**config), **open_) as context,
    ):
        for each in (without, context):
            each.read(tokens[:position], logits=True)
        parts = [recall_seconds(context, question) for _ in range(args.repeat)]
        rates = {True: [], False: []}
        for each in itertools.chain.from_iterable([(without, context)] * args.repeat):
            each.read(tokens[each.n_past() : each.n_past() + 1], logits=True)
            seconds = decode(each, tokens, args.decoded)
            rates[each is context].append(args.decoded / seconds)
        stats = context.stats()
    row = {name: round(statistics.median(part[name] for part in parts), 4) for name in parts[0]}
    return {
        "position": position,
        **row,
        "stock": None if args.no_stock else round(
            stock_seconds(model, tokens, position, question, args), 4),
        "decode_without": round(statistics.median(rates[False]), 2),
        "decode_with": round(statistics.median(rates[True]), 2),
        "archive_bytes": stats.n_bytes_archive,
        "archive_seconds": round(stats.t_archive_us / 1e6, 4),
        "scratch_bytes": stats.n_bytes_scratch,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", help="a GGUF file, or 8b: random weights with a KV cache of an 8B model's shape"
    )
    parser.add_argument("--positions", default="8192")
    parser.add_argument("--queries", type=int, default=64, help="tokens of the question")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--policy", default=QFilterConfig.policy)
    parser.add_argument("--type", default="f16", help="of K and V")
    parser.add_argument("--decoded", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--threads", type=int, default=n_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    positions = CommaList(int, least=1).convert(args.positions, None, None)
    rows = []
    with ExitStack() as stack:
        if args.model == "8b":
            args.model = stack.enter_context(random_model("small", N_LAYER, rank=1))
        model = stack.enter_context(Model(args.model))
        tokens = text_tokens(model, max(positions) + 1024 + 2 * args.repeat * args.decoded)
        for position in positions:
            rows.append(row := measure(model, tokens, position, args))
            print(aligned([list(row), [f"{value:,}" if value else "" for value in row.values()]]))
    if args.json:
        about = provenance(args.threads) | {"model": Path(args.model).name}
        write_json(args.json, {"about": about, "max_length": args.max_length, "rows": rows})


if __name__ == "__main__":
    main()
