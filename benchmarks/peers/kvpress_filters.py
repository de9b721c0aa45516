"""Do exported filters keep the same keys in kvpress as in qfllama?

Exports the filters of a GGUF file, loads them into kvpress's own QFilterPress (and, with a clone of
the authors' repository, into their QFiltersCache), and lets each choose between the keys of the
same text: transformers computes them from the same GGUF file. Compared by KV head with

  a  our score on these keys, in the layout of llama.cpp: the filters are the same ones
  b  our engine: what it holds after its first eviction, its weights dequantized to float32
     because transformers computes with such weights, and llama.cpp else rounds activations too

Prints the share of positions that are kept by both, and exits with 1 where it is below 99.9 %.

    pip install ./patches '.[convert]' -r benchmarks/peers/requirements.txt
    python benchmarks/peers/kvpress_filters.py models/smollm2-qfilters.gguf
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import types
from pathlib import Path

import llama_cpp
import numpy as np
import torch
import transformers
from kvpress import QFilterPress
from kvpress.presses.qfilter_press import QFilters
from qfllama.convert import published

from qfllama import Llama, QFilterConfig, gguf_copy, schema
from qfllama.shape import model_shape

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from reference.model import write_f32_copy  # noqa: E402
from reference.text import english_tokens  # noqa: E402

ENOUGH = 0.999


class Press(QFilterPress):
    """kvpress's press with filters from a folder: its own loader only knows one user of the hub.
    `kept`: layer -> positions [n_head_kv, n_keep], by kvpress's own selection."""

    def __init__(self, folder, compression_ratio):
        super().__init__(compression_ratio=compression_ratio)
        self.folder, self.kept, self.keys = folder, {}, {}

    def post_init_from_model(self, model):
        self.q_filters = QFilters.from_pretrained(self.folder).q_filters.to(model.dtype)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        """Kvpress's, called once more with the positions in place of the values."""
        positions = torch.arange(keys.shape[2], dtype=values.dtype)[:, None].expand_as(values)
        _, kept = super().compress(module, hidden_states, keys, positions, attentions, kwargs)
        self.kept[module.layer_idx] = kept[0, :, :, 0].long().numpy()
        self.keys[module.layer_idx] = keys[0].numpy()
        return super().compress(module, hidden_states, keys, values, attentions, kwargs)


def run_kvpress(model, tokens, folder, ratio):
    """(kept [n_layer, n_head_kv, n_keep], keys [n_layer, n_head_kv, n_tokens, head_dim])."""
    press = Press(folder, ratio)
    with torch.inference_mode(), press(model):
        model(torch.tensor([tokens]), past_key_values=transformers.DynamicCache(), logits_to_keep=1)
    layers = sorted(press.kept)
    return np.stack([press.kept[i] for i in layers]), np.stack([press.keys[i] for i in layers])


def run_reference(clone, keys, folder, n_keep, window):
    """What the authors' QFiltersCache keeps of `keys`: [n_layer, n_head_kv, n_keep], `window` of
    them the last. Its base class had nothing to it in the transformers of its time."""
    stand_in = types.ModuleType("transformers.cache_utils")
    stand_in.Cache = object
    real, sys.modules[stand_in.__name__] = sys.modules[stand_in.__name__], stand_in
    sys.path.insert(0, str(clone))
    try:
        from src.hf_cache import QFiltersCache
        from src.utils import QFilters as TheirFilters
    finally:
        sys.path.remove(str(clone))
        sys.modules[stand_in.__name__] = real
    load = TheirFilters.from_pretrained
    TheirFilters.from_pretrained = lambda name: load(folder)
    cache = QFiltersCache(window_length=window, max_length=n_keep, model_name="user/model")
    kept = []
    for layer, rows in enumerate(torch.from_numpy(keys)):
        positions = torch.arange(rows.shape[1], dtype=rows.dtype)[:, None].expand_as(rows)
        with torch.inference_mode():
            kept.append(cache.update(rows[None], positions[None], layer)[1][0, :, :, 0].long())
    return torch.stack(kept).numpy()


def by_our_score(gguf, keys, n_keep, window):
    """As `run_reference`, with the filters in the GGUF file on keys in llama.cpp's layout."""
    filters = schema.read(gguf)
    cached = keys[..., published.head_order(gguf)].astype(np.float32)
    rows = np.stack(list(filters.vectors["filters"].values()))
    scores = np.einsum("lhtd,lhd->lht", cached[filters.layers], rows)
    last = np.arange(keys.shape[2]) >= keys.shape[2] - window
    scores[..., last] = np.inf
    return np.sort(np.argsort(-scores, axis=-1)[..., :n_keep], axis=-1)


def run_engine(gguf, tokens, n_keep, threads):
    """Positions below len(tokens) that our engine holds after its first eviction, which the token
    after them brings about: [n_layer, n_head_kv, n_keep]. The last one always stays."""
    config = QFilterConfig(
        max_length=len(tokens),
        interval=len(tokens) - n_keep,
        window_length=1,
        sinks=0,
        policy="qfilters",
    )
    llm = Llama(
        str(gguf),
        n_ctx=2 * len(tokens),
        qfilters=config,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    llm.eval(tokens)
    assert llm.qfilter_stats()["evictions"] == 0
    llm.eval(tokens[-1:])
    assert llm.qfilter_stats()["evictions"] == 1
    shape = model_shape(gguf)
    kept = [
        [llm.kept_positions(layer, head)[:-1] for head in range(shape.n_head_kv)]
        for layer in range(shape.n_layer)
    ]
    llm.close()
    return np.array(kept)


def f32_and_export(gguf, folder):
    """Made in the folder: a copy of the file with weights in float32, and its filters exported."""
    plain, f32, export = (folder / name for name in ("plain.gguf", "f32.gguf", "export"))
    filters = schema.read(gguf)
    published.save(filters, gguf, export)
    write_f32_copy(gguf, plain)
    gguf_copy.write(plain, f32, filters, force=True)
    plain.unlink()
    return f32, export


def load_torch(gguf):
    """The weights of the file in transformers, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent.absolute()), gguf_file=gguf.name, dtype=torch.float32
    )


def agreement(a, b):
    """(share of the positions of `a` that `b` has too, that of the worst KV head)."""
    shares = np.array([np.isin(a[at], b[at]).mean() for at in np.ndindex(a.shape[:2])])
    return shares.mean(), shares.min()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file with filters")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--keep", type=int, default=512)
    parser.add_argument("--reference", type=Path, help="clone of github.com/NathanGodey/qfilters")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        f32, export = f32_and_export(args.model, Path(folder))
        tokens = english_tokens(args.model, args.tokens)

        model = load_torch(args.model)
        kvpress, keys = run_kvpress(model, tokens, export, 1 - args.keep / args.tokens)
        del model
        rows = [("kvpress", "our score, same keys", kvpress, by_our_score(f32, keys, args.keep, 0))]
        engine = run_engine(f32, tokens, args.keep, args.threads)
        # the newest is kept whatever its score: one choice less than kvpress has
        rows.append(("our engine", "kvpress", engine[..., :-1], kvpress))
        if args.reference:
            for window in (0, 64):
                theirs = run_reference(args.reference, keys, export, args.keep, window)
                ours = by_our_score(f32, keys, args.keep, window)
                rows.append((f"QFiltersCache({window=})", "our score, same keys", theirs, ours))
    print(
        f"{args.model.name}: {kvpress.shape[0]} layers x {kvpress.shape[1]} KV heads, "
        f"{args.keep} of {args.tokens} keys kept; kvpress {importlib.metadata.version('kvpress')}, "
        f"transformers {transformers.__version__}"
    )
    worst = 1.0
    for ours, theirs, a, b in rows:
        mean, least = agreement(a, b)
        worst = min(worst, mean)
        print(f"{ours:26} in {theirs:22} {100 * mean:8.3f} %   worst head {100 * least:7.2f} %")
    return 0 if worst >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
