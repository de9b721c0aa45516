"""How much filters depend on the number of samples and on the calibration text.

The two sensitivity studies of Q-Filters (arXiv 2503.02812, section 5), on a model of yours:
filters from N samples against filters from other samples of the same text, and filters from
three texts against each other, each with the rank correlation it reaches on held-out text.

    python research/filter_sensitivity.py models/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --text wiki=wikitext2.valid.txt --plot research/filter_sensitivity.png
"""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from pathlib import Path

import numpy as np
from qfllama.convert import calibrate, measure, native_model, text
from qfllama.convert.capture_llama import LlamaModel

from qfllama.files import write_json
from qfllama.machine import provenance

SAMPLES = (100, 200, 500, 1000, 2000, 3000)
SEEDS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a text beside the built-in English and the standard library's source code",
    )
    parser.add_argument("--num-sequences", type=int, default=15)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def texts(args) -> dict[str, text.Source]:
    """The built-in English, source code that every Python carries, and the files given."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    code = (module.read_text("utf-8", "replace") for module in modules if module.stat().st_size)
    found = {"Python's documentation": text.builtin(), "Python source": text.Source("code", code)}
    for item in args.text:
        name, _, path = item.partition("=")
        found[name] = text.file(path)
    return found


class Queries:
    """Every query of the layers wanted: layer -> float32 [n_head, n_tokens, head_dim]."""

    def __init__(self, model, layers, sequences):
        self._parts = {layer: [] for layer in layers}
        self.n_head_kv = {}
        for tokens in sequences:
            model.read(tokens, self._take)
        self.by_layer = {layer: np.concatenate(p, 1) for layer, p in self._parts.items()}

    def _take(self, call):
        if call.layer in self._parts:
            self._parts[call.layer].append(call.queries())
            if call.layer not in self.n_head_kv:
                self.n_head_kv[call.layer] = len(call.keys())

    @property
    def n_tokens(self):
        return next(iter(self.by_layer.values())).shape[1]

    def calibrated(self, at):
        """(directions, means, filters) from the queries at the positions `at`."""
        moments = calibrate.QueryMoments(len(self.by_layer), len(at))
        for layer, queries in self.by_layer.items():
            moments.add(layer, queries[:, at])
        v1 = moments.directions()
        filters = {layer: calibrate.group_mean(v1[layer], self.n_head_kv[layer]) for layer in v1}
        return v1, moments.means(), filters


def cosines(a, b) -> np.ndarray:
    """Cosine of every head's filters, [n_layer * n_head_kv]."""
    pairs = [(a[layer], b[layer]) for layer in sorted(a)]
    return np.concatenate(
        [
            (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            for x, y in pairs
        ]
    )


def by_samples(queries: Queries) -> dict[int, tuple]:
    """Number of samples -> [(filters, cosines to filters from other samples)] for several draws.

    What is compared with comes from another half of the positions, as many as there are."""
    order = np.random.default_rng(0).permutation(queries.n_tokens)
    half = len(order) // 2
    *_, others = queries.calibrated(np.sort(order[half:]))
    results = {}
    for n in SAMPLES:
        if n > half:
            break
        draws = [
            queries.calibrated(np.sort(np.random.default_rng(seed).permutation(order[:half])[:n]))
            for seed in range(SEEDS)
        ]
        results[n] = [(draw, cosines(draw[-1], others)) for draw in draws]
    return results


def rank_correlations(model, sequences, calibrated: list) -> list[float]:
    """Mean Spearman over layers and heads on held-out sequences, for several sets of filters."""
    meters = [measure.Fit(*found) for found in calibrated]

    def take(call):
        for meter in meters:
            meter.add(call)

    for tokens in sequences:
        model.read(tokens, take)
        for meter in meters:
            meter.end_sequence()
    return [float(meter.figures()["spearman"].mean()) for meter in meters]


def study(args) -> dict:
    layers = native_model.evicting_layers(args.model)
    n_held_out = max(args.num_sequences // 5, 1)
    results = {"texts": [], "samples": []}
    filters, held_out = {}, {}
    with closing(LlamaModel(args.model, args.max_seq_len)) as model:
        for name, source in texts(args).items():
            sequences = text.sequences(
                args.model, [source], args.num_sequences, args.max_seq_len, strict=True
            )
            held_out[name] = sequences[-n_held_out:]
            queries = Queries(model, layers, sequences[:-n_held_out])
            at = calibrate.sample_positions([queries.n_tokens], 3000, seed=0)[0]
            filters[name] = queries.calibrated(at)
            if not results["samples"]:
                by_n = by_samples(queries)
                flat = [draw for draws in by_n.values() for draw, _ in draws]
                scores = iter(rank_correlations(model, held_out[name], flat))
                for n, draws in by_n.items():
                    values = np.concatenate([found for _, found in draws])
                    results["samples"].append(
                        {
                            "samples": n,
                            "median_cosine": float(np.median(values)),
                            "worst_5_percent_cosine": float(np.quantile(values, 0.05)),
                            "spearman": float(np.mean([next(scores) for _ in draws])),
                        }
                    )
            del queries
        for read in filters:
            scores = rank_correlations(model, held_out[read], list(filters.values()))
            for calibrated, score in zip(filters, scores, strict=True):
                values = cosines(filters[calibrated][-1], filters[read][-1])
                results["texts"].append(
                    {
                        "calibrated_on": calibrated,
                        "read": read,
                        "median_cosine": float(np.median(values)),
                        "worst_5_percent_cosine": float(np.quantile(values, 0.05)),
                        "spearman": score,
                    }
                )
    return results


def print_tables(results: dict) -> None:
    print(f"{'samples':>8}{'median cosine':>15}{'worst 5 %':>11}{'spearman':>10}")
    for row in results["samples"]:
        print(f"{row['samples']:>8,}{row['median_cosine']:>15.4f}"
              f"{row['worst_5_percent_cosine']:>11.4f}{row['spearman']:>10.3f}")  # fmt: skip
    print(
        f"\n{'calibrated on':24}{'read':24}{'median cosine':>14}{'worst 5 %':>11}{'spearman':>10}"
    )
    for row in results["texts"]:
        print(f"{row['calibrated_on']:24}{row['read']:24}{row['median_cosine']:>14.4f}"
              f"{row['worst_5_percent_cosine']:>11.4f}{row['spearman']:>10.3f}")  # fmt: skip


def plot(results: dict, about: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 3.9), layout="constrained", width_ratios=[1.5, 1, 1]
    )
    rows = results["samples"]
    counts = [row["samples"] for row in rows]
    for key, label in (
        ("median_cosine", "cosine to filters from other samples, median head"),
        ("worst_5_percent_cosine", "the same, worst 5 % of heads"),
        ("spearman", "rank correlation on held-out text"),
    ):
        left.plot(counts, [row[key] for row in rows], "o-", label=label)
    left.set_xscale("log")
    left.set_xticks(counts, [f"{n:,}" for n in counts], fontsize=8, rotation=30)
    left.minorticks_off()
    left.set_ylim(0.7, 1.01)
    left.set_xlabel("samples")
    left.legend(frameon=False, fontsize=8, loc="center")
    left.grid(alpha=0.3)
    names = list(dict.fromkeys(row["read"] for row in results["texts"]))
    for axes, key, title in (
        (middle, "median_cosine", "cosine between filters, median head"),
        (right, "spearman", "rank correlation on held-out text"),
    ):
        values = np.array([row[key] for row in results["texts"]]).reshape(len(names), -1)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis")
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.3f}", ha="center", va="center",
                      color="white" if value < 0.6 else "black")  # fmt: skip
        wrapped = [name.replace(" ", "\n") for name in names]
        axes.set_xticks(range(len(names)), wrapped, fontsize=8)
        axes.set_yticks(range(len(names)), wrapped, fontsize=8)
        axes.set_xlabel("calibrated on")
        axes.set_title(title, fontsize=9)
    right.set_ylabel("read")
    figure.colorbar(image, ax=[middle, right], shrink=0.8)
    figure.suptitle(f"{about['model']}, {about['date']}", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse()
    results = study(args)
    print_tables(results)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    about = provenance(threads) | {
        "model": Path(args.model).name,
        "tokens": args.num_sequences * args.max_seq_len,
    }
    if args.json:
        write_json(args.json, {"about": about} | results)
    if args.plot:
        plot(results, about, args.plot)


if __name__ == "__main__":
    main()
