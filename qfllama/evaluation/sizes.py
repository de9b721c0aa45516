"""The size of a cache, by calculation: nothing is allocated."""

from __future__ import annotations

from qfllama.context import cache_type
from qfllama.engine import Model
from qfllama.evaluation.run import Variant
from qfllama.offload import Cache, kv_bytes


def cache_bytes(model: Model, variant: Variant, n_tokens: int) -> int:
    """Bytes of K and V of a variant with types, for n_tokens of context. Only layers that evict
    count: windowed and recurrent ones take the same whatever the length is."""
    type_k, type_v = map(cache_type, variant.types)
    layers = kv_bytes(model.shape, [Cache(variant.cells(n_tokens), type_k, type_v)])
    return sum(layers[il] for il in model.evicting_layers())
