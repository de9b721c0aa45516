"""Scores that were tried: forms of the statistics, aggregations, budgets of layers, blends.

Filters are statistics of queries at positions 0 to 2,047, and are used at all positions. Forms of
them are compared:

    as measured   of queries after RoPE, against keys after RoPE: the paper's
    ahead         of queries before RoPE, rotated to the next 256 positions (their mean)
    mean ahead    the same of the mean query alone: what `qahead` has
    back          of queries before RoPE, against keys before RoPE: positions left out

with the paper's filter, the second-order score and `qblend`, at every length. What else was tried
is measured at the first length only: the maximum over the query heads of a group in place of the
mean, the length of the value as a factor, blends with recency and with KeyDiff, the first two
layers whole, more cells for the lower layers or for the upper ones. Measured are

- how the scores rank the cached keys of a head against the mean attention that the next 256 queries
  give them: to compare the forms of one score, since not all scores mean attention,
- the loss of needles once the cache is compressed with them, and how many are found.

--random does the first, for the forms only, on a model of random weights with RoPE scaling as
Llama 3.1 has it.

    python research/scores.py models/SmolLM2-135M-Instruct.Q4_1.gguf --text wikitext2.test.txt
        --calibration wikitext2.valid.txt --lengths 2048 7936 --json research/scores.json
    python research/scores.py --random --lengths 2048 8192 32768 --documents 1

Computed by transformers in float32, apart from the engine. Needs about 6 GB for 8,192 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch
from projections import Model, Moments, Read, random_weights, rotate, trained
from qfllama.convert.measure import spearman
from transformers import DynamicCache

from qfllama.evaluation import needle, tasks
from qfllama.evaluation.results import bootstrap
from qfllama.evaluation.run import split
from qfllama.files import write_json
from qfllama.machine import provenance
from qfllama.tables import aligned

CALIBRATED = 2048
"""Positions that statistics are taken at."""
AHEAD = 256
"""Next positions: where `ahead` rotates to, and whose queries are the measure."""
RANK = 16
SINKS, WINDOW = 4, 32
FORMS = ("as measured", "ahead", "mean ahead", "back")
COMPARED = ("qfilters", "qfilters2", "qblend")
OTHERS = (
    "qfilters, maximum",
    "qfilters * |v|",
    "qfilters + recency",
    "qfilters + keydiff",
    "qfilters2, maximum",
    "keydiff",
    "kvdiff",
    "qblend, maximum",
    "qblend + recency",
)
BUDGETS = {
    "first two layers whole": lambda share, layer, n_layer: (
        1.0 if layer < 2 else (share * n_layer - 2) / (n_layer - 2)
    ),
    "more below": lambda share, layer, n_layer: share * (1.5 - layer / (n_layer - 1)),
    "more above": lambda share, layer, n_layer: share * (0.5 + layer / (n_layer - 1)),
}
"""Name -> share of its keys that a layer keeps, where all together keep `share`."""


def compared(form: str) -> tuple[str, ...]:
    return tuple(name for name in COMPARED if (form, name) != ("mean ahead", "qfilters2"))


def standard(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


def scores(mean, raw, keys, k, v) -> dict[str, torch.Tensor]:
    """Score name -> [n_head_kv, n]. mean, raw: of the queries of each head; keys: what they are for;
    k: after RoPE, v [n_head_kv, n, head_dim]. The sign of a filter is that of the mean."""
    n_head_kv, _, head_dim = k.shape
    n_rep = len(mean) // n_head_kv
    grouped = (n_head_kv, n_rep)
    _, vectors = torch.linalg.eigh(raw)
    first = vectors[..., -1]
    first = (first * torch.sign((first * mean).sum(-1, keepdim=True))).float()
    keys = keys.repeat_interleave(n_rep, 0)
    each = torch.einsum("hnd,hd->hn", keys, first).unflatten(0, grouped)
    qfilters, strongest = each.mean(1), each.amax(1)

    values, vectors = torch.linalg.eigh(raw - mean[..., :, None] * mean[..., None, :])
    values, vectors = values[..., -RANK:].float(), vectors[..., -RANK:].float()
    logits = torch.einsum("hnd,hd->hn", keys, mean.float()) / head_dim**0.5
    logits += ((keys @ vectors) ** 2 @ values[..., None])[..., 0] / (2 * head_dim)
    weights = logits.softmax(-1).unflatten(0, grouped)

    unit = k / k.norm(dim=-1, keepdim=True)
    direction = unit.mean(1, keepdim=True)
    keydiff = -(unit * direction).sum(-1) / direction.norm(dim=-1)
    recency = torch.arange(k.shape[1]).float().expand(n_head_kv, -1)
    length = v.norm(dim=-1)
    apart = standard((v - v.mean(1, keepdim=True)).norm(dim=-1))
    blend = apart + standard(qfilters) / 4 + standard(keydiff) / 4
    return {
        "qfilters": qfilters,
        "qfilters, maximum": strongest,
        "qfilters * |v|": standard(qfilters).exp() * length,
        "qfilters + recency": standard(qfilters) + standard(recency),
        "qfilters + keydiff": standard(qfilters) + standard(keydiff),
        "qfilters2": weights.mean(1) * length,
        "qfilters2, maximum": weights.amax(1) * length,
        "keydiff": keydiff,
        "kvdiff": smooth(apart + standard(keydiff) / 2),
        "qblend": smooth(blend),
        "qblend, maximum": smooth(blend + (standard(strongest) - standard(qfilters)) / 4),
        "qblend + recency": smooth(blend) + standard(recency) / 2,
    }


def smooth(x: torch.Tensor) -> torch.Tensor:
    """Averaged over five positions, and some of its own."""
    return torch.nn.functional.avg_pool1d(x, 5, 1, 2, count_include_pad=False) + 0.3 * x


def scored(model: Model, moments: Moments, read: Read, form: str, n: int) -> list[dict]:
    """Per layer the scores of the first n tokens, against those that come next."""
    angles = model.angles(torch.arange(n, n + AHEAD, 16))
    rows = zip(read.back if form == "back" else read.k, read.k, read.v, strict=True)
    return [
        scores(*moments.of(form, layer, angles), *(row[:, :n] for row in mine))
        for layer, mine in enumerate(rows)
    ]


def correlations(model: Model, moments: Moments, tokens: list[int]) -> dict[tuple, float]:
    """(form, score) -> rank correlation with the mean attention that the last AHEAD tokens give to
    the keys before them; sinks and window, which always stay, left out."""
    read, n = Read(model, tokens), len(tokens) - AHEAD
    angles = model.angles(torch.arange(n, read.n))
    inner = slice(SINKS, n - WINDOW)
    attention = []
    later = torch.ones(AHEAD, read.n, dtype=torch.bool).triu(n + 1)
    for q, k in zip(read.q, read.k, strict=True):
        q = rotate(q[:, n:], angles).unflatten(0, (model.n_head_kv, -1))
        logits = torch.einsum("hgmd,hnd->hgmn", q, k) / model.head_dim**0.5
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        attention.append(weights.mean((1, 2))[:, inner])
    found = {}
    for form in FORMS:
        layers = scored(model, moments, read, form, n)
        for name in compared(form):
            each = [
                spearman(layer[name][:, inner].numpy(), seen.numpy()).mean()
                for layer, seen in zip(layers, attention, strict=True)
            ]
            found[form, name] = statistics.fmean(each)
    return found


def needles(model: Model, moments: Moments, document, ratios, others: bool) -> dict:
    """(form, score, ratio) -> (loss per digit, found) for every question; ("full", "", 1)."""
    read = Read(model, model.tokens(document.text, start=True))
    found = {("full", "", 1): ask(model, read, None, document.questions)}
    for form in FORMS:
        layers = scored(model, moments, read, form, read.n)
        names = compared(form) + (OTHERS if others and form == FORMS[0] else ())
        for name, ratio in itertools.product(names, ratios):
            kept = [keep(layer[name], read.n // ratio) for layer in layers]
            found[form, name, ratio] = ask(model, read, kept, document.questions)
        if not (others and form == FORMS[0]):
            continue
        for name, budget, ratio in itertools.product(("qfilters", "qblend"), BUDGETS, ratios):
            kept = [
                keep(layer[name], int(read.n * BUDGETS[budget](1 / ratio, i, len(layers))))
                for i, layer in enumerate(layers)
            ]
            found[form, f"{name}, {budget}", ratio] = ask(model, read, kept, document.questions)
    return found


def keep(score: torch.Tensor, n_keep: int) -> torch.Tensor:
    """Rows that stay, ascending, [n_head_kv, n_keep]."""
    score = score.clone()
    score[:, :SINKS] = score[:, -WINDOW:] = torch.inf
    return score.topk(n_keep, dim=-1).indices.sort(dim=-1).values


def ask(model: Model, read: Read, kept, questions) -> list[tuple[float, bool]]:
    rows = list(zip(read.k, read.v, strict=True))
    if kept is not None:
        ats = [at[..., None].expand(-1, -1, model.head_dim) for at in kept]
        rows = [(k.gather(1, at), v.gather(1, at)) for (k, v), at in zip(rows, ats, strict=True)]
    results = []
    for question in questions:
        cache = DynamicCache()
        for layer, (k, v) in enumerate(rows):
            cache.update(k[None], v[None], layer)
        asked, answer = split(model, question)
        tokens = torch.tensor([asked + answer])
        positions = torch.arange(read.n, read.n + tokens.shape[1])[None]
        logits = model.model(
            tokens, past_key_values=cache, position_ids=positions, logits_to_keep=len(answer) + 1
        ).logits[0, :-1]
        answer = torch.tensor(answer)
        loss = torch.nn.functional.cross_entropy(logits, answer).item()
        results.append((loss, bool((logits.argmax(-1) == answer).all())))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file or folder of a Llama model")
    parser.add_argument("--random", action="store_true", help="random weights instead of a model")
    parser.add_argument("--text", type=Path, help="(default: the built-in one)")
    parser.add_argument("--calibration", type=Path, help="another text (required)")
    parser.add_argument("--sequences", type=int, default=6, help="of 2,048 tokens, to calibrate on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 7936])
    parser.add_argument("--documents", type=int, default=8, help="of each length")
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if bool(args.model) == args.random:
        parser.error("give a model or --random")
    if args.model and not args.calibration:
        parser.error("give another text with --calibration")
    if min(args.lengths) // (2 * max(args.ratios)) < SINKS + WINDOW or min(args.ratios) < 2:
        parser.error(f"half of the smallest cache must hold {SINKS + WINDOW}; ratios begin at 2")
    torch.set_grad_enabled(False)
    torch.manual_seed(args.seed)
    rows = measure(args)
    head = list(dict.fromkeys(name for row in rows for name in row if "95" not in name))
    print(aligned([head, *([str(row.get(name, "")) for name in head] for row in rows)]))
    if args.json:
        report = {**provenance(torch.get_num_threads()), "rows": rows}
        write_json(args.json, report)


def measure(args) -> list[dict]:
    """One row per form and score."""
    n = args.sequences * CALIBRATED
    if args.random:
        model = random_weights(args.seed)
        text = torch.randint(3, 1024, ((max(args.lengths) + AHEAD) * args.documents,)).tolist()
        calibration = torch.randint(3, 1024, (n,)).tolist()
    else:
        model = trained(args.model)
        haystack = tasks.read_text(args.text)
        text = model.tokens(haystack.text)
        calibration = model.tokens(tasks.read_text(args.calibration).text)
        stack = tasks.Haystack(haystack, lambda part: len(model.tokens(part)))
        if len(text) < (max(args.lengths) + AHEAD) * args.documents or len(calibration) < n:
            sys.exit("too little text: give longer ones, or fewer --documents and --sequences")
    moments = Moments(model, [calibration[i : i + CALIBRATED] for i in range(0, n, CALIBRATED)])
    rows: dict[tuple, dict] = {}

    def put(key, column, values):
        row = rows.setdefault(key, dict(zip(("form", "score"), key, strict=True)))
        row[column] = round(statistics.fmean(values), 3)

    for length in args.lengths:
        size = length + AHEAD
        each = [
            correlations(model, moments, text[i * size : (i + 1) * size])
            for i in range(args.documents)
        ]
        for key in each[0]:
            put(key, f"rank correlation at {length}", [found[key] for found in each])
        print(f"{length}: ranked", file=sys.stderr, flush=True)
        if args.random:
            continue
        results: dict[tuple, list] = {}
        for document in needle.documents(stack, [length], args.documents, 5, args.seed):
            others = length == args.lengths[0]
            for key, mine in needles(model, moments, document, args.ratios, others).items():
                results.setdefault(key, []).extend(mine)
            print(f"{length}: document {document.number}", file=sys.stderr, flush=True)
        for (form, name, ratio), mine in results.items():
            column = f"{length} x{ratio}"
            by_document = [[loss for loss, _ in mine[i : i + 5]] for i in range(0, len(mine), 5)]
            put((form, name), f"loss at {column}", sum(by_document, []))
            limits = [round(limit, 3) for limit in bootstrap(by_document)]
            rows[form, name][f"95 % of the loss at {column}"] = limits
            put((form, name), f"found at {column}", [right for _, right in mine])
    return list(rows.values())


if __name__ == "__main__":
    main()
