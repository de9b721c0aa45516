"""Add learned filters to a GGUF file that has filters, without calibrating those again.

    python research/add_learned.py qwen-qf.gguf qwen-learned.gguf --texts 20

`qfllama convert --filters learned` does the same and more: it also tests which policy is better.
"""

from __future__ import annotations

import argparse
from contextlib import closing

import numpy as np
from qfllama.convert import layout, learned, native_model, text

from qfllama import gguf_copy, schema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--text", action="append", default=[], help="(default: the built-in one)")
    args = parser.parse_args()
    filters = schema.read(args.model)
    sequences = text.sequences(args.model, text.sources(tuple(args.text)), args.texts, 2048)
    texts = learned.texts(args.model, sequences, args.texts, seed=0)
    layers = native_model.evicting_layers(args.model)
    with closing(learned.opened(args.model, texts, "auto")) as model:
        weights = layout.Weights(args.model)
        found, explained = learned.calibrate(
            model, weights.output, layers, texts, max(1, len(texts) // 5), lambda n: None
        )
    filters.vectors["learned"] = {il: rows.astype(np.float16) for il, rows in found.items()}
    filters.quality["learned"] = explained.astype(np.float32)
    gguf_copy.write(args.model, args.output, filters, force=True)
    print(f"{args.output}: R^2 {explained.mean():.2f} on texts held out")


if __name__ == "__main__":
    main()
