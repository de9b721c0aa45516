"""Learned filters that were tried: their inputs, what they are added to, budgets of layers.

A text is read, and read again after a request to repeat it. A row is worth the largest weight that
the second reading gives it, times the length of what its value adds to the output, over the length
of the reader's input: the score of KVzip+ (arXiv 2505.23416; 2601.07891, section 3). A linear map
is fitted to its logarithm. Compared are

    its input     the keys before RoPE and the values of all heads of the layer (what the engine
                  uses), the input of the attention block, or both
    a blend       alone, or added to `qblend` or `kvdiff` with a weight; parts are standardized
    budgets       the same number of rows in each layer, or each layer's share of the best rows of
                  the calibration texts, by KVzip+ ("layers"); half of each ("half layers")

beside KVzip+ itself, which reads the document twice. Measured are needles in documents, and how
well ordinary text goes on ("next"), both after one compression, as loss above that of all rows.

    python research/learned.py qwen.gguf --text wikitext2.test.txt --calibration wikitext2.valid.txt
        --json research/learned.json

Computed by transformers in float32. Needs about 6 GB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from projections import Model, Moments, Read, rotate, trained
from qfllama.convert import learned
from scores import SINKS, WINDOW, ask, keep, scored, standard
from transformers import DynamicCache

from qfllama.evaluation import needle, tasks
from qfllama.evaluation.results import bootstrap
from qfllama.files import write_json
from qfllama.machine import provenance
from qfllama.tables import aligned

LENGTH, NEXT = 2048, 256
"""Tokens of a document, and of what follows it in ordinary text."""
LEAST = SINKS + 2 * WINDOW
"""Rows that a layer keeps at least."""
RIDGE = 1e-3
AT_ONCE = 256
INPUTS = ("kv", "h", "kv and h")
BLENDS = (
    ("kv", "", 1),
    ("kv", "qblend", 1),
    ("kv", "qblend", 2),
    ("kv", "kvdiff", 1),
    ("kv", "kvdiff", 2),
    ("h", "", 1),
    ("h", "qblend", 1),
    ("h", "kvdiff", 1),
    ("h", "kvdiff", 2),
    ("kv and h", "qblend", 1),
    ("kv and h", "kvdiff", 1),
)
"""Input, base, weight of the prediction."""
BUDGETED = ("qblend", "kv + qblend", "kvzip+")
BUDGETS = {"layers": 1.0, "half layers": 0.5}


@contextmanager
def inputs(model: Model):
    """Layer -> [n, n_embd], what the attention of each layer reads."""
    found = [None] * model.n_layer

    def hook(layer):
        def keep_input(module, args, kwargs):
            found[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return keep_input

    handles = [
        layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(model.model.model.layers)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def rows(read: Read, hidden, layer: int, n: int) -> dict[str, torch.Tensor]:
    """Input -> [n, n_in]."""
    parts = [x[layer][:, :n].transpose(0, 1).flatten(1) for x in (read.back, read.v)]
    kv, h = torch.cat(parts, 1), hidden[layer][:n]
    return {"kv": kv, "h": h, "kv and h": torch.cat([kv, h], 1)}


def repetition(model: Model, tokens: list[int], request: list[int]):
    """A text that is read twice: Read, inputs, and the logarithm of KVzip+'s score, layer ->
    [n_head_kv, n]."""
    n, start = len(tokens), len(tokens) + len(request)
    with inputs(model) as hidden:
        read = Read(model, tokens + request + tokens)
    angles = model.angles(torch.arange(start, read.n))
    d, worth = model.head_dim, []
    for layer in range(model.n_layer):
        q = rotate(read.q[layer][:, start:], angles).unflatten(0, (model.n_head_kv, -1))
        out = model.model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (-1, d))
        group = q.shape[1]
        values = read.v[layer][:, :n].repeat_interleave(group, 0)
        added = torch.einsum("hnd,ehd->hne", values, out).norm(dim=-1)
        length = hidden[layer][start:].norm(dim=-1)
        best = torch.zeros(model.n_head, n)
        for i in range(0, n, AT_ONCE):
            j = min(n, i + AT_ONCE)
            logits = torch.einsum("hgmd,hnd->hgmn", q[:, :, i:j], read.k[layer][:, : start + j])
            later = torch.ones(j - i, start + j, dtype=torch.bool).triu(start + i + 1)
            weights = (logits / d**0.5).masked_fill(later, -torch.inf).softmax(-1)[..., :n]
            best = best.maximum((weights / length[i:j, None]).amax(2).flatten(0, 1))
        score = (best * added).unflatten(0, (model.n_head_kv, group)).amax(1)
        worth.append(score.clamp_min(learned.TINY).log())
    return read, hidden, worth


class Fit:
    """A map for every input and layer, and each layer's share of the best rows."""

    def __init__(self, model: Model, texts: list[list[int]], request: list[int], ratios):
        sums = {name: learned.Sums() for name in INPUTS}
        self.shares = {ratio: torch.zeros(model.n_layer) for ratio in ratios}
        for i, text in enumerate(texts):
            read, hidden, worth = repetition(model, text, request)
            for layer in range(model.n_layer):
                y = worth[layer].T.numpy()
                for name, x in rows(read, hidden, layer, len(text)).items():
                    sums[name].add({layer: x.numpy()}, {layer: y})
            every = torch.stack(worth)[..., learned.SINKS :]
            for ratio, share in self.shares.items():
                limit = every.flatten().quantile(1 - 1 / ratio)
                share += (every > limit).float().mean((1, 2)) / len(texts)
            print(f"text {i + 1} of {len(texts)} read twice", file=sys.stderr, flush=True)
        # without the constants: only the order of a head's rows counts
        self.maps = {
            (name, layer): torch.from_numpy(mine.solve(layer, RIDGE)[:-1]).float()
            for name, mine in sums.items()
            for layer in mine.layers
        }


def selections(model, moments, fit, ratios, names, read, hidden, n, oracle) -> dict[tuple, list]:
    """(score, budget, ratio) -> rows that stay, one tensor [n_head_kv, n_keep] for each layer.
    names: only these scores; oracle: KVzip+'s scores of the first n tokens, or None."""
    base = scored(model, moments, read, "mean ahead", n)
    predicted = {name: [] for name in INPUTS}
    for layer in range(model.n_layer):
        for name, x in rows(read, hidden, layer, n).items():
            predicted[name].append((x @ fit.maps[name, layer]).T.contiguous())
    named = {name: [mine[name] for mine in base] for name in ("qblend", "kvdiff")}
    for source, added, weight in BLENDS:
        name = source if not added else f"{'' if weight == 1 else f'{weight} '}{source} + {added}"
        named[name] = [
            weight * standard(x) + (standard(mine[added]) if added else 0)
            for x, mine in zip(predicted[source], base, strict=True)
        ]
    if oracle is not None:
        named["kvzip+"] = oracle
    found = {}
    for name, layers in named.items():
        if names and name not in names:
            continue
        for ratio in ratios:
            budgets = {"": 0.0, **(BUDGETS if name in BUDGETED else {})}
            for budget, part in budgets.items():
                shares = (1 - part) / ratio + part * fit.shares[ratio]
                sizes = split(shares, n, n // ratio)
                found[name, budget, ratio] = [
                    keep(x, size) for x, size in zip(layers, sizes, strict=True)
                ]
    return found


def split(shares: torch.Tensor, n: int, mean: int) -> list[int]:
    """Rows for each layer, in proportion to its share, LEAST to n of them, `mean` on average."""
    low, high = 0.0, float(n * len(shares) / shares.max())
    for _ in range(60):
        scale = (low + high) / 2
        sizes = (shares * scale).clamp(LEAST, n)
        low, high = (scale, high) if sizes.mean() < mean else (low, scale)
    return sizes.round().int().tolist()


def continued(model: Model, read: Read, kept, tokens: list[int]) -> float:
    """Mean loss of the tokens that follow the first LENGTH, which are cut to `kept`."""
    cache = DynamicCache()
    for layer in range(model.n_layer):
        k, v = read.k[layer][:, :LENGTH], read.v[layer][:, :LENGTH]
        if kept is not None:
            at = kept[layer][..., None].expand(-1, -1, model.head_dim)
            k, v = k.gather(1, at), v.gather(1, at)
        cache.update(k[None], v[None], layer)
    positions = torch.arange(LENGTH, LENGTH + len(tokens))[None]
    ids = torch.tensor([tokens])
    logits = model.model(ids, past_key_values=cache, position_ids=positions).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="GGUF file or folder of a Llama or Qwen2 model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="another text")
    parser.add_argument("--texts", type=int, default=12, help="that are read twice")
    parser.add_argument(
        "--documents", type=int, default=6, help="with needles, and of ordinary text"
    )
    parser.add_argument("--needles", type=int, default=5, help="in each document")
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--scores", nargs="+", help="only these (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    table, shares = measure(args)
    head = list(dict.fromkeys(name for row in table for name in row if "95" not in name))
    print(aligned([head, *([str(row.get(name, "")) for name in head] for row in table)]))
    if args.json:
        write_json(
            args.json, {**provenance(torch.get_num_threads()), "rows": table, "shares": shares}
        )


def measure(args) -> tuple[list[dict], dict]:
    """One row per score and budget; and ratio -> each layer's share of the best rows, times it."""
    model = trained(args.model)
    haystack = tasks.read_text(args.text)
    stack = tasks.Haystack(haystack, lambda part: len(model.tokens(part)))
    text = model.tokens(haystack.text)
    calibration = model.tokens(tasks.read_text(args.calibration).text)
    step = (len(calibration) - LENGTH) // (args.texts + 1)
    if len(text) < args.documents * (LENGTH + NEXT) or step < learned.LENGTH:
        sys.exit("too little text: give longer ones, or fewer --texts and --documents")
    pieces = [calibration[i * step :][: learned.LENGTH] for i in range(1, args.texts + 1)]
    request = model.tokens(learned.REQUEST)
    moments = Moments(model, [calibration[:LENGTH], calibration[LENGTH : 2 * LENGTH]])
    fit = Fit(model, pieces, request, args.ratios)

    results: dict[tuple, dict[str, list]] = {}

    def put(key, column, values):
        results.setdefault(key, {}).setdefault(column, []).append(values)

    for document in needle.documents(stack, [LENGTH], args.documents, args.needles, args.seed):
        tokens = model.tokens(document.text, start=True)
        read, hidden, worth = repetition(model, tokens, request)
        n = len(tokens)
        every = selections(model, moments, fit, args.ratios, args.scores, read, hidden, n, worth)
        read.n, read.k, read.v = n, [k[:, :n] for k in read.k], [v[:, :n] for v in read.v]
        full = ask(model, read, None, document.questions)
        put(("full", ""), "needles", [loss for loss, _ in full])
        put(("full", ""), "found", [right for _, right in full])
        for (name, budget, ratio), kept in every.items():
            mine = ask(model, read, kept, document.questions)
            put((name, budget), f"needles x{ratio}", [loss for loss, _ in mine])
            put((name, budget), f"found x{ratio}", [right for _, right in mine])
            cells = statistics.fmean(rows.shape[1] for rows in kept)
            put((name, budget), f"cells x{ratio}", [cells])
        print(f"document {document.number}", file=sys.stderr, flush=True)
    for i in range(args.documents):
        tokens = text[i * (LENGTH + NEXT) : (i + 1) * (LENGTH + NEXT)]
        with inputs(model) as hidden:
            read = Read(model, tokens[:LENGTH])
        every = selections(
            model, moments, fit, args.ratios, args.scores, read, hidden, LENGTH, None
        )
        full = continued(model, read, None, tokens[LENGTH:])
        put(("full", ""), "next", [full])
        for (name, budget, ratio), kept in every.items():
            loss = continued(model, read, kept, tokens[LENGTH:])
            put((name, budget), f"next x{ratio}", [loss - full])
        print(f"text {i + 1} of {args.documents}", file=sys.stderr, flush=True)
    table = []
    for (name, budget), columns in results.items():
        row = {"score": name, "budget": budget}
        for column, each in columns.items():
            row[column] = round(statistics.fmean(sum(each, [])), 4)
            if column.startswith(("needles", "next")):
                row[f"95 % of {column}"] = [round(limit, 4) for limit in bootstrap(each)]
        table.append(row)
    shares = {r: [round(r * share, 2) for share in fit.shares[r].tolist()] for r in args.ratios}
    return table, shares


if __name__ == "__main__":
    main()
