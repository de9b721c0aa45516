"""Hugging Face's head layout and that of the rows of llama.cpp's K cache.

Both rotate pairs of a head's numbers, but not the same pairs. transformers pairs i with
i + head_dim/2 (halves). For architectures whose RoPE in ggml pairs 2i with 2i + 1 (interleaved;
llama), upstream's converter re-orders the rows of the Q and K weights of every head, and cached
keys come out in that order; for the others (NeoX-style RoPE) nothing is re-ordered. A filter must
take the same way as the rows of the K weight, so the order is read off these rows and not off the
name of the architecture.
"""

from __future__ import annotations

import numpy as np

from .. import gguf_header
from ..config import QFilterError

SAME = 0.99


def halves(head_dim: int) -> np.ndarray:
    """The order of Hugging Face's layout itself: index i takes i."""
    return np.arange(head_dim)


def interleaved(head_dim: int) -> np.ndarray:
    """Indices that bring a head from halves to interleaved: 2i + j takes j * head_dim/2 + i."""
    return np.arange(head_dim).reshape(2, head_dim // 2).T.ravel()


def head_order(gguf, model) -> np.ndarray:
    """Indices [head_dim] with which a vector in the head layout of `model` (transformers) becomes
    one in the layout of the K rows of the GGUF file `gguf`: cached = vector[..., indices].

    Compares the K weights of every layer in both; QFilterError where no known order makes them
    equal, or layers differ."""
    header = gguf_header.scan(gguf)
    head_dim = model.layers[0].self_attn.head_dim
    orders = {"halves": halves(head_dim)}
    if head_dim % 2 == 0:
        orders["interleaved"] = interleaved(head_dim)
    found = set()
    for layer, block in enumerate(model.layers):
        theirs = k_rows(gguf, header, layer)
        ours = block.self_attn.k_proj.weight.float().cpu().numpy()
        found.add(_matching(gguf, layer, theirs, ours, orders))
    if len(found) > 1:
        raise QFilterError(
            f"the layers of {gguf} order the rows of their K weights differently; "
            "this model is not supported"
        )
    return orders[found.pop()]


def _matching(gguf, layer, theirs, ours, orders):
    """Name of the order that turns the K rows `ours` into `theirs`, both [n_head_kv*head_dim, n]"""
    if theirs.shape != ours.shape:
        raise QFilterError(
            f"layer {layer} of {gguf} has K weights of shape {theirs.shape}, "
            f"the checkpoint {ours.shape}; give files of the same model"
        )
    head_dim = len(next(iter(orders.values())))
    heads = ours.reshape(-1, head_dim, ours.shape[1])
    cosines = {name: cosine(theirs, heads[:, order]) for name, order in orders.items()}
    best = max(cosines, key=cosines.get)
    if not cosines[best] > SAME:
        raise QFilterError(
            f"the K weights of layer {layer} of {gguf} match the checkpoint's in no "
            f"known order (best cosine {cosines[best]:.3f}); this model is not "
            "supported"
        )
    return best


def cosine(a, b) -> float:
    """Cosine between two arrays of the same size, seen as vectors."""
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(float).tiny))


def k_rows(gguf, header, layer: int) -> np.ndarray:
    """K weight of a layer of a GGUF file, expanded to float32 [n_head_kv*head_dim, n_embd]."""
    from gguf import GGMLQuantizationType, dequantize

    name = f"blk.{layer}.attn_k.weight"
    info = next((t for t in header.tensors if t.name == name), None)
    if info is None:
        raise QFilterError(f"{gguf} has no tensor {name}; this model is not supported")
    kind, rows = GGMLQuantizationType(info.type), info.shape[1]
    data = np.fromfile(
        gguf, np.uint8, gguf_header.tensor_bytes(info), offset=header.data + info.offset
    ).reshape(rows, -1)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    return dequantize(data.view(plain[kind]) if kind in plain else data, kind)
