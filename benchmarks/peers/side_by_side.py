"""qfllama beside kvpress: the same model, documents, questions and cache sizes.

Quality: needles in documents that are compressed once after they were read, as `qfllama eval needle`
asks for them. kvpress runs in transformers on the weights of the GGUF file in float32; so does our
engine here, on a float32 copy of the file. Its QFilterPress, KnormPress and KeyDiffPress keep
neither sinks nor a window, so there are rows of ours without them, too ("as kvpress": the newest
position stays, whatever its score). Its KVzipPress and AdaKVPress give each head a size of its own,
KVzipPress each layer, too; both hide rows in place of removing them: `cells` is the mean. KVzipPress
reads the document twice. "with the question": the question is known before the document is
compressed. ExpectedAttentionPress has its default epsilon, with AdaKVPress that of kvpress's own
benchmark, 1e-2. DuoAttentionPress is missing: it needs scores of heads that exist for six larger
models only, or a text from the hub.

Speed: each in a process of its own, as one would use it: kvpress in transformers in float32, ours
on the quantized file. That compares runtimes more than methods.

    pip install ./patches '.[convert]' -r benchmarks/peers/requirements.txt
    python benchmarks/peers/side_by_side.py models/smollm2-qfilters.gguf --json docs/peers.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import kvpress
import torch
import transformers
from kvpress.presses.qfilter_press import QFilters
from kvpress_filters import f32_and_export, load_torch

from qfllama import Llama, QFilterConfig
from qfllama.bench.memory import resident_bytes
from qfllama.commands.chat import cache_stats
from qfllama.commands.evaluating import usable
from qfllama.engine import Model
from qfllama.evaluation import needle, tasks
from qfllama.evaluation.results import bootstrap
from qfllama.evaluation.run import BATCH, answer_likelihood, likelihood_tokens, split
from qfllama.evaluation.scoring import Mark, nll
from qfllama.files import write_json
from qfllama.machine import provenance
from qfllama.tables import aligned

EXPORT = "QFLLAMA_PEERS_EXPORT"
"""In the environment, for the processes that measure speed: the folder with the exported filters."""


class FilterPress(kvpress.QFilterPress):
    """With filters from a folder: its own loader only knows one user of the hub."""

    def post_init_from_model(self, model):
        self.q_filters = QFilters.from_pretrained(os.environ[EXPORT]).q_filters.to(model.dtype)


def adaptive(compression_ratio: float):
    return kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(compression_ratio, epsilon=1e-2))


def kvzip_plus(compression_ratio: float):
    return kvpress.KVzipPress(compression_ratio, kvzip_plus_normalization=True)


PRESSES = {
    "QFilterPress": FilterPress,
    "ExpectedAttentionPress": kvpress.ExpectedAttentionPress,
    "AdaKVPress(ExpectedAttentionPress)": adaptive,
    "KVzipPress, KVzip+": kvzip_plus,
    "CompactorPress": kvpress.CompactorPress,
    "LagKVPress": kvpress.LagKVPress,
    "KnormPress": kvpress.KnormPress,
    "KeyDiffPress": kvpress.KeyDiffPress,
    "SnapKVPress": kvpress.SnapKVPress,
    "StreamingLLMPress": kvpress.StreamingLLMPress,
}
ASKED = "SnapKVPress, with the question"
TIMED = ("QFilterPress", "SnapKVPress")
OURS = {
    "qfilters, as kvpress": ("qfilters", 0, 0, False),
    "knorm, as kvpress": ("knorm", 0, 0, False),
    "keydiff, as kvpress": ("keydiff", 0, 0, False),
    "qfilters": ("qfilters", 4, 64, False),
    "qblend": ("qblend", 4, 64, False),
    "qblend, recall": ("qblend", 4, 64, True),
    "kvdiff": ("kvdiff", 4, 64, False),
    "learned": ("learned", 4, 64, False),
    "learned, recall": ("learned", 4, 64, True),
}
"""Policy, sinks, window_length, recall. `learned` is left out if the file has no learned filters."""
SAME = {
    "qfilters, as kvpress": "QFilterPress",
    "knorm, as kvpress": "KnormPress",
    "keydiff, as kvpress": "KeyDiffPress",
}
"""Rows that are the same method."""
SPEED_RATIO = 8


# -- kvpress


def press_of(name: str, ratio: int):
    return PRESSES[name](compression_ratio=1 - 1 / ratio)


def read_torch(model, press, tokens: list[int]):
    """A cache with the tokens, compressed by the press, and the last logits."""
    torch.manual_seed(0)  # CompactorPress draws numbers
    cache = transformers.DynamicCache()
    ids = torch.tensor([tokens])
    with press(model) if press else contextlib.nullcontext():
        return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits


def more_torch(model, cache, tokens: list[int], n_past: int):
    """Logits [n, n_vocab] after each of the tokens, which follow n_past others."""
    positions = torch.arange(n_past, n_past + len(tokens))[None]
    return model(torch.tensor([tokens]), past_key_values=cache, position_ids=positions).logits[0]


def ask_torch(model, cache, question: list[int], answer: list[int], n_past: int) -> dict:
    """As `answer_likelihood`; the cache is as before afterwards."""
    n_rows = cache.layers[0].keys.shape[2]
    logits = more_torch(model, cache, question + answer[:-1], n_past)[len(question) - 1 :]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :n_rows], layer.values[:, :, :n_rows]
    return judged(logits, answer, n_rows - hidden_rows(model))


def hidden_rows(model) -> float:
    """Rows of a head that a press hid, on average."""
    hidden = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    n_heads = model.config.num_key_value_heads
    return sum(len(heads[0]) for heads in hidden if heads) / (len(hidden) * n_heads)


def ask_with(model, ratio: int, tokens: list[int], question: list[int], answer: list[int]) -> dict:
    """The question is read with the document and is SnapKV's window: what it attends to stays. Its last
    token is read again, so that the first token of the answer comes from the compressed cache."""
    n_read, n_asked = len(tokens) + len(question), len(question)
    n_keep = len(tokens) // ratio
    press = kvpress.SnapKVPress(1 - (n_keep + n_asked) / n_read, window_size=n_asked)
    cache, _ = read_torch(model, press, tokens + question)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    logits = more_torch(model, cache, question[-1:] + answer[:-1], n_read - 1)
    return judged(logits, answer, n_keep)


def judged(logits, answer: list[int], n_cells: float) -> dict:
    n_right = int((logits.argmax(-1).numpy() == answer).sum())
    return {
        "nll": float(nll(logits.numpy(), answer).mean()),
        "n_tokens": len(answer),
        "n_right": n_right,
        "right": n_right == len(answer),
        "cells": n_cells,
    }


# -- ours


def ask_ours(model: Model, document, tokens: list[int], ratios: list[int], n_threads: int):
    """Yields the name, the ratio and the results of each of OURS. The document is read once."""
    extra = max(likelihood_tokens(model, question) for question in document.questions)
    n_ctx = len(tokens) + extra
    cache = {"n_ctx": n_ctx, "n_threads": n_threads, "type_k": "f32", "type_v": "f32"}
    sizes = {"max_length": n_ctx + BATCH, "interval": BATCH}
    full = QFilterConfig(**sizes, window_length=0, sinks=0, policy="streaming", archive=False)
    with model.open(full, **cache) as context:
        for i in range(0, len(tokens), BATCH):
            context.read(tokens[i : i + BATCH])
        state = context.state()
        yield "qfllama, full", 1, answered(context, document, extra)
    possible = usable(model)
    for name, (policy, sinks, window, recall) in OURS.items():
        if policy not in possible:
            continue
        config = QFilterConfig(
            **sizes, window_length=window, sinks=sinks, policy=policy, archive=recall
        )
        for ratio in ratios:
            with model.open(config, **cache) as context:
                context.restore(state)
                context.compress(len(tokens) // ratio)
                yield name, ratio, answered(context, document, extra)


def answered(context, document, extra: int) -> list[dict]:
    """The results of all questions, each right after the document."""
    cells, results, mark = context.used(), [], Mark(context, extra)
    for question in document.questions:
        results.append({**answer_likelihood(mark, question), "cells": cells})
        mark.back()
    return results


# -- quality


def quality(path: Path, f32: Path, args) -> dict:
    """(name, ratio) -> results."""
    ours = Model(f32)
    theirs = load_torch(path)
    theirs.config.name_or_path = str(tokenizer_folder(path, f32.parent))  # where KVzipPress looks
    text = tasks.read_text(args.text)
    haystack = tasks.Haystack(text, lambda part: len(ours.tokens(part)))
    found: dict = {}
    for document in needle.documents(haystack, [args.length], args.documents, args.needles, 0):
        tokens = ours.tokens(document.text, start=True)
        asked = [split(ours, question) for question in document.questions]

        def add(name, ratio, results, document=document):
            labels = {"length": document.length, "document": document.number}
            found.setdefault((name, ratio), []).extend({**r, **labels} for r in results)

        for name in (None, *(name for name in PRESSES if name in args.presses)):
            for ratio in args.ratios if name else (1,):
                cache, _ = read_torch(theirs, name and press_of(name, ratio), tokens)
                add(
                    name or "transformers, full", ratio,
                    [ask_torch(theirs, cache, *pair, len(tokens)) for pair in asked],
                )  # fmt: skip
        for ratio in args.ratios if ASKED in args.presses else ():
            add(ASKED, ratio, [ask_with(theirs, ratio, tokens, *pair) for pair in asked])
        for result in ask_ours(ours, document, tokens, args.ratios, args.threads):
            add(*result)
        print(f"document {document.number + 1} of {args.documents}", file=sys.stderr)
    ours.close()
    return found


def tokenizer_folder(path: Path, folder: Path) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.chat_template = None  # the documents are no messages
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def difference(a: list[dict], b: list[dict]) -> list[float]:
    """Mean difference of the losses for the same questions, and its 95 % interval."""
    by_document: dict = {}
    for x, y in zip(a, b, strict=True):
        by_document.setdefault(x["document"], []).append(x["nll"] - y["nll"])
    every = [value for values in by_document.values() for value in values]
    return [sum(every) / len(every), *bootstrap(list(by_document.values()))]


# -- speed


def speed_torch(path, name, tokens, n_decode, threads) -> dict:
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    with torch.inference_mode():
        model = load_torch(path)
        read_torch(model, None, tokens[:64])
        press = name and press_of(name, SPEED_RATIO)
        start = time.perf_counter()
        cache, logits = read_torch(model, press, tokens)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for i in range(n_decode):
            token = int(logits[..., -1, :].argmax())
            logits = more_torch(model, cache, [token], len(tokens) + i)
        decode = n_decode / (time.perf_counter() - start)
    n_bytes = sum(t.numel() * t.element_size() for la in cache.layers for t in (la.keys, la.values))
    return {"first": first, "decode": decode, "kv_bytes": n_bytes, "peak": resident_bytes("VmHWM")}


def speed_ours(path, policy, tokens, n_decode, threads) -> dict:
    """In a cache of the compressed size: it evicts while it reads. None: upstream's full cache."""
    bound = {}
    if policy:
        max_length = len(tokens) // SPEED_RATIO
        bound["qfilters"] = QFilterConfig(max_length=max_length, policy=policy, archive=False)
    llm = Llama(
        str(path), n_ctx=len(tokens) + n_decode + 64, n_threads=threads, n_threads_batch=threads,
        flash_attn=True, verbose=False, **bound,
    )  # fmt: skip
    llm.eval(tokens[:64])
    llm.reset()
    start = time.perf_counter()
    llm.eval(tokens)
    token = llm.sample(temp=0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(n_decode):
        llm.eval([token])
        token = llm.sample(temp=0)
    decode = n_decode / (time.perf_counter() - start)
    n_bytes = cache_stats(llm)["kv_bytes"]
    return {"first": first, "decode": decode, "kv_bytes": n_bytes, "peak": resident_bytes("VmHWM")}


def speeds(path, tokens, args) -> dict:
    """Medians of --repeat turns, each in a process of its own, in turns."""
    kinds = {
        "transformers, full": (speed_torch, None),
        **{name: (speed_torch, name) for name in TIMED},
        "llama.cpp, full": (speed_ours, None),
        "qfllama, qfilters": (speed_ours, "qfilters"),
        "qfllama, qblend": (speed_ours, "qblend"),
    }
    turns: dict = {name: [] for name in kinds}
    for _ in range(args.repeat):
        for name, (function, what) in kinds.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                turns[name].append(
                    pool.apply(function, (path, what, tokens, args.decode, args.threads))
                )
    return {
        name: {key: statistics.median(turn[key] for turn in mine) for key in mine[0]}
        for name, mine in turns.items()
    }


# -- report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file with filters")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--needles", type=int, default=5)
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--presses", nargs="+", choices=(*PRESSES, ASKED), default=(*PRESSES, ASKED)
    )
    parser.add_argument("--text", type=Path, help="haystack [default: the built-in text]")
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument(
        "--repeat", type=int, default=3, help="turns of the speeds; 0: only quality"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        f32, export = f32_and_export(args.model, Path(folder))
        os.environ[EXPORT] = str(export)
        with torch.inference_mode():
            found = quality(args.model, f32, args)
        with Model(args.model) as model:
            words = model.tokens(tasks.read_text(args.text).text[: 16 * args.length], start=True)
        fast = speeds(args.model, words[: args.length], args) if args.repeat else {}

    rows = [
        {"name": name, "ratio": ratio, **needle.summary(mine)}
        for (name, ratio), mine in sorted(found.items(), key=lambda item: item[0][1])
    ]
    print(aligned([["", "", "cells", "right", "digits", "nll", "95 %"]] + [
        [row["name"], f"x{row['ratio']}", f"{row['cells']:,.0f}", f"{row['right']:.1%}",
         f"{row['digits']:.1%}", f"{row['nll']:.3f}", "{:.3f}-{:.3f}".format(*row["nll_ci"])]
        for row in rows
    ]))  # fmt: skip
    same = [
        {"ours": ours, "theirs": theirs, "ratio": ratio,
         "difference": difference(found[ours, ratio], found[theirs, ratio])}
        for ours, theirs in SAME.items() for ratio in args.ratios if theirs in args.presses
    ]  # fmt: skip
    if same:
        print()
        print(aligned([["the same method: nll, ours less theirs", "", "", "95 %"]] + [
            ["{ours} / {theirs}".format(**row), f"x{row['ratio']}", f"{row['difference'][0]:+.4f}",
             "{:+.4f} to {:+.4f}".format(*row["difference"][1:])] for row in same
        ]))  # fmt: skip
    if fast:
        print()
        print(aligned([["", "first token s", "tok/s", "KV MiB", "peak MiB"]] + [
            [name, f"{row['first']:.2f}", f"{row['decode']:.1f}", f"{row['kv_bytes'] / 2**20:.1f}",
             f"{row['peak'] / 2**20:.0f}"] for name, row in fast.items()
        ]))  # fmt: skip
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("kvpress", "torch")}
        report = {
            **provenance(args.threads), **versions, "transformers": transformers.__version__,
            "text": tasks.read_text(args.text).name, "quality": rows, "same_method": same,
            "speed": fast, "speed_ratio": SPEED_RATIO,
        }  # fmt: skip
        write_json(args.json, report)


if __name__ == "__main__":
    main()
