"""Real English as tokens, without a tokenizer."""

from pathlib import Path
from pydoc_data.topics import topics

import gguf


def english_tokens(model: str | Path, n: int) -> list[int]:
    """The first n tokens of Python's own documentation, in the vocabulary of a GGUF with
    byte-level pieces. Each time the longest piece that fits is taken: near enough to what the
    model was trained on, and the same on every machine with the same Python."""
    pieces = gguf.GGUFReader(model).get_field("tokenizer.ggml.tokens").contents()
    ids = {piece: i for i, piece in enumerate(pieces)}
    text = "\n".join(topics[name] for name in sorted(topics))
    text = text.encode("ascii", "ignore").decode().replace(" ", "Ġ").replace("\n", "Ċ")
    tokens, at = [], 0
    while len(tokens) < n:
        end = next(end for end in range(at + 24, at, -1) if text[at:end] in ids)
        tokens.append(ids[text[at:end]])
        at = end
    return tokens
