"""Hugging Face's head layout and that of the rows of llama.cpp's K cache.

Both rotate pairs of a head's numbers, but not always the same pairs. transformers mostly pairs i
with i + n_rot/2 (halves). For some architectures (llama) RoPE in ggml pairs 2i with 2i + 1
(interleaved): upstream's converter re-orders the rows of the Q and K weights of every head for it,
and cached keys have that order. For the others (NeoX-style RoPE) nothing is re-ordered. A filter
must be re-ordered like the rows of the K weight. So the order is found by comparing these rows, not
by the name of the architecture.
"""

from __future__ import annotations

import numpy as np

from .. import gguf_header
from ..config import QFilterError

SAME = 0.99


def halves(head_dim: int) -> np.ndarray:
    """The order of Hugging Face's layout itself: index i takes i."""
    return np.arange(head_dim)


def interleaved(head_dim: int, n_rot: int | None = None) -> np.ndarray:
    """Indices that bring a head from halves to interleaved: 2i + j takes j * n_rot/2 + i. From
    n_rot (default: head_dim) on, the numbers are not rotated and keep their place."""
    n_rot = head_dim if n_rot is None else n_rot
    pairs = np.arange(n_rot).reshape(2, n_rot // 2).T.ravel()
    return np.concatenate([pairs, np.arange(n_rot, head_dim)])


def head_orders(gguf, k_weights) -> dict[int, np.ndarray]:
    """Layer -> indices [head_dim] that bring a vector from the head layout of a transformers model
    to that of the K rows of the GGUF file `gguf`: cached = vector[..., indices].

    k_weights: yields (layer, head_dim, candidates for the model's K weight: a list of arrays
        [n_head_kv*head_dim, n_embd], more than one if Q, K and V are fused: `k_candidates`)
    QFilterError if no known order makes the weights equal, or if layers differ."""
    weights = Weights(gguf)
    found = {
        layer: _matching(weights, layer, ours, head_dim) for layer, head_dim, ours in k_weights
    }
    if len({name for name, _ in found.values()}) > 1:
        raise QFilterError(
            f"the layers of {gguf} order the rows of their K weights differently; "
            "use `--backend llama`"
        )
    return {layer: order for layer, (_, order) in found.items()}


def _orders(head_dim, n_rot):
    """Name -> indices of every known order for a head with n_rot rotated numbers."""
    orders = {"as it is": halves(head_dim)}
    for name, rotated in ("whole", head_dim), ("rotated part", n_rot):
        if rotated and rotated % 2 == 0 and rotated <= head_dim:
            orders[f"interleaved {name}"] = interleaved(head_dim, rotated)
            # models that are interleaved in transformers, but not in ggml
            orders[f"halved {name}"] = np.argsort(interleaved(head_dim, rotated))
    return orders


def _matching(weights, layer, candidates, head_dim):
    """(name, indices) of the order that turns one of the `candidates` into the K rows of a GGUF."""
    theirs = weights.k_rows(layer, len(candidates[0]))
    fitting = [ours for ours in candidates if ours.shape == theirs.shape]
    if not fitting:
        raise QFilterError(
            f"layer {layer} of {weights.path} has K weights of shape {theirs.shape}, "
            f"the checkpoint {candidates[0].shape}; give files of the same model"
        )
    orders = _orders(head_dim, weights.n_rot)
    cosines = {
        (i, name): cosine(theirs, ours.reshape(-1, head_dim, ours.shape[1])[:, order])
        for i, ours in enumerate(fitting)
        for name, order in orders.items()
    }
    best = max(cosines, key=cosines.get)
    if not cosines[best] > SAME:
        raise QFilterError(
            f"the K weights of layer {layer} of {weights.path} match the checkpoint's in no "
            f"known order (best cosine {cosines[best]:.3f}); use `--backend llama`"
        )
    return best[1], orders[best[1]]


def k_candidates(fused: np.ndarray, n_head: int, n_head_kv: int, head_dim: int):
    """The K rows of a fused weight [(n_head + 2*n_head_kv)*head_dim, n_embd], as models store them:
    all of Q, then K, then V; or for every KV head its queries, its key and its value."""
    rows, group = n_head_kv * head_dim, n_head // n_head_kv
    by_head = fused.reshape(n_head_kv, group + 2, head_dim, -1)
    return [
        fused[n_head * head_dim : n_head * head_dim + rows],
        by_head[:, group].reshape(rows, -1),
    ]


def cosine(a, b) -> float:
    """Cosine between two arrays of the same size, seen as vectors."""
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(float).tiny))


class Weights:
    """The K weights in a GGUF file, whole or in parts."""

    def __init__(self, path):
        self.path = path
        headers = [(part, gguf_header.scan(part)) for part in gguf_header.parts(path)]
        first = headers[0][1]
        self.n_rot = first.get(f"{first.get('general.architecture')}.rope.dimension_count")
        self.tensors = {
            info.name: (part, header.data + info.offset, info)
            for part, header in headers
            for info in header.tensors
        }

    def k_rows(self, layer: int, n_rows: int) -> np.ndarray:
        """K weight of a layer, expanded to float32 [n_head_kv*head_dim, n_embd]. n_rows: its number
        of rows, needed only if it is stored with Q and V (order Q, K, V; V as large as K)."""
        for name in ("attn_k", "attn_qkv"):
            if f"blk.{layer}.{name}.weight" in self.tensors:
                rows = self._read(f"blk.{layer}.{name}.weight")
                return rows if name == "attn_k" else rows[-2 * n_rows : -n_rows]
        raise QFilterError(
            f"{self.path} has no tensor blk.{layer}.attn_k.weight; use `--backend llama`"
        )

    def check_output(self, layers) -> None:
        """QFilterError unless `output` knows the weights of all these layers."""
        for layer in layers:
            name = f"blk.{layer}.attn_output.weight"
            if name not in self.tensors:
                raise QFilterError(
                    f"{self.path} has no tensor {name}, which learned filters and replay need; "
                    "leave out --filters learned, or --score replay"
                )

    def output(self, layer: int) -> np.ndarray:
        """The weight behind attention, expanded to float32 [n_embd, n_head*head_dim of V]."""
        self.check_output([layer])
        return self._read(f"blk.{layer}.attn_output.weight")

    def _read(self, name):
        from gguf import GGMLQuantizationType, dequantize

        path, start, info = self.tensors[name]
        kind = GGMLQuantizationType(info.type)
        data = np.fromfile(path, np.uint8, gguf_header.tensor_bytes(info), offset=start)
        data = data.reshape(info.shape[1], -1)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        return dequantize(data.view(plain[kind]) if kind in plain else data, kind)
