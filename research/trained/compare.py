"""Which policies work with biased and with normalized attention: train.py's models, measured.

Trains each kind that is not in --folder yet, converts and calibrates it with `qfllama convert`, and
runs `qfllama eval` with every policy. Everything is kept in --folder, where the same command goes on;
what is there of another --train is used as well.

    python research/trained/compare.py --train wikitext2.valid.txt --text wikitext2.test.txt
        --json research/trained.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from train import KINDS

from qfllama.files import write_json
from qfllama.machine import provenance
from qfllama.tables import aligned

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
from tiny_models import write_converter  # noqa: E402

QFLLAMA = Path(sys.executable).parent / "qfllama"
POLICIES = "full,qblend,kvdiff,qahead,qfilters,qfilters2,keydiff,knorm,streaming,random"


def run(*command) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)


def model(kind: str, args) -> Path:
    """The GGUF file of a kind, with filters."""
    folder, out = args.folder / kind, args.folder / f"{kind}-qf.gguf"
    if out.exists():
        return out
    if not (folder / "tokenizer.model").exists():
        run(sys.executable, HERE / "train.py", kind, folder, "--text", *args.train)
    plain = args.folder / f"{kind}.gguf"
    # upstream's own takes SentencePiece tokenizers for some kinds of models only
    converter = write_converter(args.folder / "converter.py")
    run(sys.executable, converter, folder, "--outfile", plain, "--outtype", "f16")
    texts = [word for path in args.train for word in ("--text", path)]
    run(
        QFLLAMA, "convert", plain, "-o", out, "--max-seq-len", 1024, "--num-sequences", 15, *texts
    )  # fmt: skip
    return out


def evaluated(kind: str, task: list, args) -> list[dict]:
    """The rows of `qfllama eval`'s report, less what they say of lengths, depths and positions."""
    report = args.folder / f"{kind}-{task[0]}.json"
    run(
        QFLLAMA, "eval", *task, model(kind, args), "--policy", POLICIES, "--text", args.text,
        "--threads", args.threads, "--results", report.with_suffix(".jsonl"), "--json", report,
    )  # fmt: skip
    rows = json.loads(report.read_text())["rows"]
    return [{k: v for k, v in row.items() if not k.startswith("by_")} for row in rows]


def facts(kind: str, args) -> dict:
    """Means over all heads of what calibration measured, and how large the biases have become."""
    printed = subprocess.run(
        [QFLLAMA, "inspect", "--json", model(kind, args)], check=True, stdout=subprocess.PIPE
    )
    quality = json.loads(printed.stdout)["filters"]["quality"]
    weights = load_file(args.folder / kind / "model.safetensors")
    biases = {
        name: bias
        for name, bias in weights.items()
        if name.endswith(("q_proj.bias", "k_proj.bias"))
    }
    return {
        **{
            name: round(float(np.nanmean(np.array(rows, float))), 3)
            for name, rows in quality.items()
        },
        "bias_rms": {
            name: round(float((bias**2).mean() ** 0.5), 3) for name, bias in biases.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="texts to learn from")
    parser.add_argument("--text", type=Path, required=True, help="another text, to measure on")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--documents", type=int, default=20, help="of each length, with 5 needles")
    parser.add_argument("--texts", type=int, default=20, help="for perplexity")
    parser.add_argument("--folder", type=Path, default=Path("build/trained"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    needles = [
        "needle", "--lengths", "512,960", "--ratio", "2,4,8", "--window-length", 32,
        "--documents", args.documents,
    ]  # fmt: skip
    texts = ["ppl", "--texts", args.texts, "--length", 1024, "--max-length", 256]
    kinds = {
        kind: {
            **facts(kind, args),
            "needle": evaluated(kind, needles, args),
            "ppl": evaluated(kind, texts, args),
        }
        for kind in args.kinds
    }
    print(report(kinds))
    if args.json:
        found = {**provenance(args.threads), "kinds": kinds}
        write_json(args.json, found)


def report(kinds: dict[str, dict]) -> str:
    """Tables for the terminal: needles found and their loss, perplexity."""
    parts = []
    for kind, found in kinds.items():
        sizes = sorted({row["ratio"] for row in found["needle"] if row["ratio"]})
        by_policy: dict[str, dict] = {}
        for row in found["needle"]:
            by_policy.setdefault(row["policy"], {})[row["ratio"]] = row
        ppl = {row["policy"]: row["ppl"] for row in found["ppl"]}
        lines = [[kind, *(f"x{ratio:g}" for ratio in sizes), "perplexity"]]
        for policy, rows in by_policy.items():
            cells = [rows.get(ratio, rows.get(None)) for ratio in sizes]
            lines.append([
                policy, *(f"{cell['right']:.0%} {cell['nll']:.2f}" for cell in cells),
                f"{ppl[policy]:.2f}",
            ])  # fmt: skip
        parts.append(aligned(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
