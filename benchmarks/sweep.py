"""Window, sinks and interval: what each does to perplexity and to needles, while streaming.

Runs `qfllama eval ppl` and `qfllama eval needle --setting stream` for a cache of --max-length with
one of the three changed at a time, and draws both losses against each other: what is below and to
the left of a point is better in both. Results are kept in --folder; the same command goes on.

    python benchmarks/sweep.py models/smollm2-qfilters.gguf --json docs/sweep.json --plot docs/sweep.png
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from qfllama import QFilterConfig, QFilterError
from qfllama.files import write_json
from qfllama.machine import provenance
from qfllama.tables import aligned

SIZES = {"window_length": "tab:blue", "sinks": "tab:green", "interval": "tab:red"}
"""What is changed, and its colour."""
EVAL = [Path(sys.executable).parent / "qfllama", "eval"]


def settings(max_length: int) -> list[dict]:
    """The default, and others that differ from it in one size."""
    default = QFilterConfig(max_length=max_length)
    base = {name: int(getattr(default, name)) for name in SIZES}
    values = {
        "window_length": [16, max_length // 16, max_length // 8, max_length // 4, max_length // 2],
        "sinks": [0, 4, 16],
        "interval": [32, 64, 128, 256],
    }
    found = [base] + [{**base, name: value} for name in values for value in values[name]]
    different = [dict(pairs) for pairs in dict.fromkeys(tuple(one.items()) for one in found)]
    return [one for one in different if is_possible(max_length, one)]


def is_possible(max_length: int, sizes: dict) -> bool:
    try:
        QFilterConfig(max_length=max_length, **sizes)
    except QFilterError:
        return False
    return True


def measure(task: list[str], setting: dict, policy: str, args) -> dict:
    """The policy's row of the report."""
    name = "-".join([task[0], policy, str(args.max_length), *map(str, setting.values())])
    report = args.folder / f"{name}.json"
    command = [
        *EVAL, *task, args.model, "--policy", policy, "--max-length", args.max_length,
        "--window-length", setting["window_length"], "--sinks", setting["sinks"],
        "--interval", setting["interval"], "--threads", args.threads,
        "--results", report.with_suffix(".jsonl"), "--json", report,
    ]  # fmt: skip
    command += ["--text", args.text] if args.text else []
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())["rows"][0]


def is_best(row: dict, rows: list[dict]) -> bool:
    """Is no other one better in both?"""
    return not any(
        other["nll_ppl"] < row["nll_ppl"] and other["nll_needle"] < row["nll_needle"]
        for other in rows
    )


def draw(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    base = rows[0]
    for name, color in SIZES.items():
        others = SIZES.keys() - {name}
        mine = [row for row in rows if all(row[other] == base[other] for other in others)]
        mine.sort(key=lambda row: row[name])
        axes.plot(
            [row["ppl"] for row in mine], [row["nll_needle"] for row in mine],
            "o-", color=color, label=name,
        )  # fmt: skip
        for row in mine:
            axes.annotate(f" {row[name]}", (row["ppl"], row["nll_needle"]), color=color)
    axes.plot(base["ppl"], base["nll_needle"], "k*", ms=14, label="default")
    axes.set_xlabel("perplexity")
    axes.set_ylabel("loss of a needle's digits, nats")
    axes.set_title(title, fontsize=8)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--policy", default=QFilterConfig.policy)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--texts", type=int, default=4, help="for perplexity, of 1,536 tokens")
    parser.add_argument("--documents", type=int, default=4, help="of 2,048 tokens and 5 needles")
    parser.add_argument("--text", type=Path, help="text file [default: the built-in text]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("build/sweep"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    rows = []
    for setting in settings(args.max_length):
        ppl = ["ppl", "--texts", args.texts, "--length", 1536]
        stream = [
            "needle",
            "--recall",
            "off",
            "--setting",
            "stream",
            "--lengths",
            2048,
            "--documents",
            args.documents,
        ]
        texts = measure(ppl, setting, args.policy, args)
        needles = measure(stream, setting, args.policy, args)
        rows.append({
            **setting, "ppl": texts["ppl"], "nll_ppl": texts["nll"],
            "nll_needle": needles["nll"], "nll_needle_ci": needles["nll_ci"],
            "digits": needles["digits"],
        })  # fmt: skip
        print(rows[-1], file=sys.stderr)
    for row in rows:
        row["pareto"] = is_best(row, rows)
    head = ["window", "sinks", "interval", "ppl", "needle nll", "95 %", "digits", "Pareto"]
    print(aligned([head] + [
        [str(row["window_length"]), str(row["sinks"]), str(row["interval"]), f"{row['ppl']:.2f}",
         f"{row['nll_needle']:.3f}", "{:.2f}-{:.2f}".format(*row["nll_needle_ci"]),
         f"{row['digits']:.1%}", "*" if row["pareto"] else ""]
        for row in rows
    ]))  # fmt: skip
    about = provenance(args.threads)
    if args.json:
        report = {**about, "policy": args.policy, "max_length": args.max_length, "rows": rows}
        write_json(args.json, report)
    if args.plot:
        title = f"{args.model.name}, {args.policy}, max_length {args.max_length}; " + ", ".join(
            (about["machine"], about["date"], f"qfllama {about['qfllama']}")
        )
        draw(rows, args.plot, title)


if __name__ == "__main__":
    main()
