"""`qfllama eval kld` beside upstream's `llama-perplexity --kl-divergence`, on the same tokens.

    python benchmarks/upstream_kld.py PATH/TO/llama-perplexity MODEL TEXT --json docs/kld_upstream.json

Both compare llama.cpp's full q8_0 and q4_0 caches with its full f16 cache, over the second halves of
the same pieces of the text. llama-perplexity is built from the same source as the engine (its target
in upstream's CMake is `llama-perplexity`). TEXT has to be tokenized alike as a whole and line by line;
the first tokens are enough: the script cuts it at a line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from qfllama.machine import n_threads, provenance

TYPES = ("q8_0", "q4_0")
MOST_LINES = 100
"""`qfllama eval` tokenizes so many lines at once."""
FIGURES = {
    "kld": r"Mean\s+KLD:\s+([-\d.]+) ±\s+([\d.]+)",
    "same_top": r"Same top p:\s+([\d.]+) ±\s+([\d.]+) %",
}


def upstream(args, text: Path, folder: Path) -> dict[str, dict]:
    """What llama-perplexity prints: {type: {figure: [value, error]}}."""
    base = folder / "base.kld"
    shared = [
        args.program, "-m", args.model, "-f", text, "-c", args.length, "--chunks", args.texts, "-t",
        args.threads, "-fa", "on", "-b", args.length, "-ub", args.length, "--kl-divergence-base", base,
    ]  # fmt: skip

    def run(*more) -> str:
        command = list(map(str, [*shared, *more]))
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
        return found.stdout + found.stderr

    run()
    figures = {}
    for name in TYPES:
        said = run("--kl-divergence", "-ctk", name, "-ctv", name)
        figures[name] = {
            figure: [float(value) for value in re.search(pattern, said).groups()]
            for figure, pattern in FIGURES.items()
        }
    return figures


def ours(args, text: Path, folder: Path) -> dict[str, dict]:
    """The same figures: {type: row of the report}; an error is half of a 95 % interval over 1.96."""
    report = folder / "ours.json"
    subprocess.run(
        [sys.executable, "-c", "from qfllama.cli import main; main()", "eval", "kld", args.model,
         "--policy", "full", "--type-k", ",".join(TYPES), "--type-v", ",".join(TYPES), "--text",
         text, "--texts", str(args.texts), "--length", str(args.length), "--threads",
         str(args.threads), "--json", report],
        check=True,
    )  # fmt: skip
    rows = json.loads(report.read_text())["rows"]
    return {row["type_k"]: row for row in rows if row["policy"] == "full"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece")
    parser.add_argument("--texts", type=int, default=6, help="pieces")
    parser.add_argument("--threads", type=int, default=n_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
        text.write_text("".join(lines[:MOST_LINES]), encoding="utf-8")
        theirs, mine = upstream(args, text, folder), ours(args, text, folder)
    for type_name in TYPES:
        for figure, scale in (("kld", 1.0), ("same_top", 100.0)):
            value, error = theirs[type_name][figure]
            ci = mine[type_name][f"{figure}_ci"]
            rows.append(
                {
                    "type": type_name,
                    "figure": figure,
                    "upstream": value,
                    "upstream_error": error,
                    "ours": round(scale * mine[type_name][figure], 6),
                    "ours_error": round(scale * (ci[1] - ci[0]) / 2 / 1.96, 6),
                }
            )
            print(rows[-1], flush=True)
    if args.json:
        about = provenance(args.threads) | {"model": args.model.name, "text": args.text.name}
        sizes = {"length": args.length, "texts": args.texts}
        args.json.write_text(json.dumps({"about": about, **sizes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
