"""`qfllama eval kld` beside llama.cpp's own `llama-perplexity --kl-divergence`, on llama.cpp's caches.

llama-perplexity writes the distributions of the f16 cache into a file and compares those of another
cache with them. The same tokens, which are in that file, then go through `eval kld`, in the same batches.
Its mean must be upstream's within the error that upstream prints, and so must the share of equal
first choices; the exit code is 1 where one is not.

    python benchmarks/upstream_kld.py MODEL --text wikitext2.test.txt --perplexity bin/llama-perplexity
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from qfllama.engine import Model
from qfllama.evaluation import kld
from qfllama.evaluation.results import Results
from qfllama.evaluation.run import FULL, Plan, Variant
from qfllama.files import write_json
from qfllama.machine import n_threads, provenance
from qfllama.tables import aligned

PRINTED = {"kld": r"Mean +KLD: +(\S+) ± +(\S+)", "same_top": r"Same top p: +(\S+) ± +(\S+) %"}


def upstream(args: argparse.Namespace, type_kv: str, base: Path, compare: bool) -> dict:
    """{"kld", "same_top": (value, error)} of llama-perplexity, which writes `base` or compares with it."""
    command = [
        args.perplexity.resolve(), "-m", args.model, "-f", args.text, "-c", args.length, "--chunks", args.chunks,
        "-b", kld.CHUNK, "-ub", kld.CHUNK, "-t", args.threads, "-ctk", type_kv, "-ctv", type_kv,
        "-fa", "on", "-ngl", 0, "--kl-divergence-base", base, *["--kl-divergence"] * compare,
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{args.perplexity} failed: {done.stderr.strip().splitlines()[-1]}")
    if not compare:
        return {}
    found = {name: re.search(line, done.stdout + done.stderr) for name, line in PRINTED.items()}
    value, error = zip(*(map(float, match.groups()) for match in found.values()), strict=True)
    return {
        "kld": (value[0], error[0]),
        "same_top": (value[1] / 100, error[1] / 100),
    }


def pieces(base: Path, model: Model) -> list[list[int]]:
    """The tokens that llama-perplexity read: it puts BOS in place of the first of each chunk."""
    with base.open("rb") as file:
        assert file.read(8) == b"_logits_"
        n_ctx, _, n_chunk = np.fromfile(file, np.int32, 3).tolist()
        chunks = np.fromfile(file, np.int32, n_ctx * n_chunk).reshape(n_chunk, n_ctx)
    if start := model.tokens("", start=True):
        chunks[:, 0] = start[0]
    return chunks.tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--perplexity", type=Path, required=True, help="upstream's llama-perplexity"
    )
    parser.add_argument("--types", default="q8_0,q4_0", help="of K and V, separated by commas")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=n_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    types = args.types.split(",")

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.bin"
        upstream(args, "f16", base, compare=False)
        theirs = [upstream(args, type_kv, base, compare=True) for type_kv in types]
        model = Model(args.model)
        texts = pieces(base, model)

    variants = tuple(Variant(FULL, types=(type_kv, type_kv)) for type_kv in types)
    plan = Plan("stream", variants, context={"n_threads": args.threads})
    results = Results(None, {}, kld.KEY)
    kld.run(model, texts, plan, results)
    ours = kld.rows(kld.records(texts, plan, results), model, args.length // 2)

    rows = [
        {
            "type": type_kv,
            "n": row["n"],
            **{
                name: {"upstream": there[name][0], "error": there[name][1], "ours": row[name]}
                for name in PRINTED
            },
        }
        for type_kv, there, row in zip(types, theirs, ours, strict=True)
    ]
    head = ["", "n", "KLD upstream", "ours", "same top upstream", "ours"]
    body = [
        [row["type"], f"{row['n']:,}"]
        + [
            text
            for name, form in (("kld", ".6f"), ("same_top", ".2%"))
            for text in (
                f"{row[name]['upstream']:{form}} ± {row[name]['error']:{form}}",
                f"{row[name]['ours']:{form}}",
            )
        ]
        for row in rows
    ]
    print(aligned([head, *body]))
    if args.json:
        write_json(args.json, {**provenance(args.threads), "length": args.length, "rows": rows})
    equal = all(
        abs(row[name]["ours"] - row[name]["upstream"]) <= row[name]["error"]
        for row in rows
        for name in PRINTED
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
