"""Replay: a text is read again, to find out what each of its rows is worth.

This is the score of KVzip+ (arXiv 2505.23416; 2601.07891, section 3) on the text itself. The text
is repeated after a request to do so. The score of a row is the largest weight that the repetition
gives it, times the norm of what its value adds to the output of the layer. Learned filters predict
this score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, dequantize

from qfllama import native
from qfllama.config import EngineError, QFilterError
from qfllama.context import Context
from qfllama.convert.layout import Weights
from qfllama.convert.learned import REQUEST, ValueNorms

NEXT = "\n\nRepeat the part of the previous context exactly that begins with: "
"""The request before every part of a text but the first; tokens of the previous part follow it."""
OVERLAP = 8
"""How many of the previous part's last tokens follow NEXT."""
PART, LEAST_PART = 2048, 128
"""Tokens of a text that are repeated behind one request, at most and at least."""
AT_ONCE = 4096
"""Rows whose values are multiplied at once."""
PLAIN = ("F32", "F16", "BF16")
"""Types of V whose rows attention adds up as they are; rows of other types are stored rotated."""


def room(n: int) -> int:
    """Free cells that let the replay of a text of n tokens use the largest parts."""
    return min(n, PART) + 2 * LEAST_PART


def scores(
    context: Context,
    tokens: list[int],
    tokenize: Callable[[str], list[int]],
    model_path: str,
    progress: Callable[[int], None] = lambda n: None,
    seq: int = 0,
) -> np.ndarray:
    """What each row of a sequence is worth to a repetition of its text.

    The sequence is unchanged afterwards, but the logits are of another token.

    Args:
        tokens: all that the sequence has read.
        tokenize: tokenizes a text, without a beginning-of-sequence token.
        model_path: the GGUF file, for the weights behind attention.
        progress: called with the number of tokens repeated since its last call.

    Returns:
        float32 [heads, cells]: the KV heads of all layers that evict, the cells in the order of
        `Context.kept`.

    Raises:
        QFilterError: no room for a part of the text beside it, V is quantized, or a weight is
            missing.
        EngineError: llama.cpp failed.
    """
    kind = GGMLQuantizationType(context.params.type_v)
    if kind.name not in PLAIN:
        raise QFilterError(
            f"replay can't tell what rows of type {kind.name.lower()} add to the output: use f16, "
            "bf16 or f32 for V (--type-v)"
        )
    first, following = tokenize(REQUEST), tokenize(NEXT)
    n_ctx = llama_cpp.llama_n_ctx(context.ctx) // context.n_seq
    n_free = min(context.config.max_length - context.used(seq), n_ctx - len(tokens))
    part = min(PART, n_free - max(len(first), len(following) + OVERLAP))
    if part < min(LEAST_PART, len(tokens)):
        raise QFilterError(
            f"replay needs room for a part of the text beside it, and there is room for {n_free:,} "
            f"tokens: use a max_length and n_ctx of {len(tokens) + room(len(tokens)):,} or more"
        )
    model = context.model.model
    layers, n_cells, worth = native.evicting_layers(model), context.used(seq), {}
    weights = Weights(model_path)
    weights.output(layers[0])  # is it there?
    saved = None  # needed where there are other layers, which may not go back
    if len(layers) < llama_cpp.llama_model_n_layer(model):
        saved = context.state(seq), context.archive_state(seq)
    for start in range(0, len(tokens), part):
        request = first if start == 0 else [*following, *tokens[start - OVERLAP : start]]
        with undone(context, saved, seq):
            context.read(request, seq=seq)
            for i in range(start, min(start + part, len(tokens)), context.params.n_ubatch):
                piece = tokens[i : min(i + context.params.n_ubatch, start + part)]
                before = context.used(seq)
                with context.asking(seq):
                    context.read(piece, seq=seq)
                for layer in layers:
                    found = context.weights(layer, before, seq)[:, :n_cells]
                    worth[layer] = np.maximum(worth.get(layer, 0), found)
                progress(len(piece))
    norms = ValueNorms(weights.output)
    result = []
    for layer in layers:
        n_head, n_head_kv = len(worth[layer]), context.n_head_kv(layer, seq)
        values = dequantize(context.rows(layer, seq)[1], kind).astype(np.float32)
        values = values.reshape(n_cells, n_head_kv, -1).transpose(1, 0, 2)
        for i in range(0, n_cells, AT_ONCE):
            worth[layer][:, i : i + AT_ONCE] *= norms.of(layer, values[:, i : i + AT_ONCE], n_head)
        result.append(worth.pop(layer).reshape(n_head_kv, -1, n_cells).max(1))
    return np.concatenate(result).astype(np.float32)


@contextmanager
def undone(context: Context, saved: tuple[bytearray, bytearray] | None, seq: int) -> Iterator[None]:
    """Undoes what a sequence reads in the block. saved: its state and archive before the block;
    None if it can be cut back."""
    n_past = context.n_past(seq)
    try:
        yield
    finally:
        context.question(-1)
        if saved is None:
            done = context.kv_cache_seq_rm(seq, n_past, -1)
        else:
            state, archive = saved
            done = context.restore(state, seq=seq)
            done = done and (not archive or context.restore_archive(archive, seq))
        if not done:
            raise EngineError("the sequence can't be cut back to where the replay began")
