"""Add learned filters to a GGUF file that has filters, without calibrating those again.

    python research/add_learned.py qwen-qf.gguf qwen-learned.gguf --texts 20

`qfllama convert --filters learned` does the same and more: it also tests which policy is better.
"""

from __future__ import annotations

import argparse

from qfllama.convert import learned, pipeline, text

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
    n_held_out = pipeline.held_out(len(texts))
    explained = learned.add(
        filters, args.model, [filters.layers], texts, n_held_out, "auto", lambda n: None
    )
    gguf_copy.write(args.model, args.output, filters, force=True)
    print(f"{args.output}: R^2 {explained:.2f} on texts held out")


if __name__ == "__main__":
    main()
