"""Models of any family, computed by transformers, with the bounded cache of cache.py.

Everything but the attention itself is transformers' own code: norms, projections, RoPE, experts,
convolutions. Attention is replaced by one that stores the chunk's K and V in the cache, each KV
head with rows of its own, and looks at all rows that the cache holds by then. Layers with a sliding
window keep all their rows and see the last ones; layers without attention keep their own state.
"""

import inspect
import sys

import numpy as np
import torch
from transformers import AttentionInterface, DynamicCache

from reference.cache import BoundedCache


class ChunkCache(DynamicCache):
    """transformers' cache for layers without attention; attention gets the chunk's rows only."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return key_states, value_states


class FamilyCache(BoundedCache):
    """A BoundedCache for the layers that evict, numbered in order, and the state of the others.

    windowed: model layer -> (K, V, positions) of a layer with a sliding window, all of its rows.
    state: transformers' cache of the layers without attention.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windowed = {}
        self.state = None

    def append_windowed(self, layer, k, v, positions):
        k, v = self.store(k), self.store(v)
        positions = positions.expand(len(k), -1)
        if layer in self.windowed:
            new = zip(self.windowed[layer], (k, v, positions), strict=True)
            k, v, positions = (torch.cat(pair, dim=1) for pair in new)
        self.windowed[layer] = k, v, positions


def attend(q, k, v, visible, scale, softcap=None, sinks=None) -> torch.Tensor:
    """Attention of each query to the rows of its KV head.

    q [n_head, n, head_dim], k and v [n_head_kv, rows, head_dim], visible [n_head_kv, n, rows];
    sinks [n_head]: a logit per head that takes part in the softmax and has no value.
    Returns [n_head, n, head_dim].
    """
    group = len(q) // len(k)
    k, v, visible = (x.repeat_interleave(group, dim=0) for x in (k, v, visible))
    logits = q @ k.transpose(1, 2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1)], dim=-1)
    weights = logits.softmax(-1)[..., : k.shape[1]]
    return weights @ v


class FamilyModel:
    """A transformers model with the interface of model.Model, as far as engine.run needs it.

    layers: ids of the layers that evict; windows: layer id -> number of positions a query sees;
    shared: id of a layer that attends the keys of another -> id of that one.
    """

    def __init__(self, model):
        self.model = model.eval()
        config = model.config.get_text_config()
        self.windows, self.layers, self.shared = {}, [], {}
        last = {}  # layer with keys, by type
        for module in model.modules():
            if getattr(module, "is_kv_shared_layer", False):
                self.shared[module.layer_idx] = last[module.layer_type]
            if not (hasattr(module, "k_proj") or hasattr(module, "qkv_proj")):
                continue  # not an attention layer, or one without keys
            last[getattr(module, "layer_type", None)] = module.layer_idx
            window = getattr(module, "sliding_window", None)
            if window:
                self.windows[module.layer_idx] = window
            else:
                self.layers.append(module.layer_idx)
        self.n_head_kv = config.num_key_value_heads
        self.layer_types = getattr(config, "layer_types", None)
        self.has_rope = getattr(config, "no_rope_layers", None)  # for each layer, despite its name
        self.rotary = next(
            module
            for name, module in model.named_modules()
            if name.endswith(("rotary_emb", "pos_emb"))
        )
        # called with (index of the layer that evicts, None, q [n_head, n, head_dim] after RoPE)
        self.on_query = None
        self.scales = {}
        name = f"bounded {id(self)}"  # the registry is one for all models
        AttentionInterface.register(name, self._attention)
        model.set_attn_implementation(name)

    def _attention(
        self, module, query, key, value, mask, scaling, softcap=None, s_aux=None, **kwargs
    ):
        cache, positions, layer = self._cache, self._positions, module.layer_idx
        q, k, v = query[0], key[0], value[0]
        has_keys, layer = layer not in self.shared, self.shared.get(layer, layer)
        if layer in self.windows:
            if has_keys:
                cache.append_windowed(layer, k, v, positions)
            k, v, key_positions = cache.windowed[layer]
        else:
            index = self.layers.index(layer)
            self.scales[index] = scaling, softcap
            if self.on_query:
                self.on_query(index, None, q)
            if has_keys:
                cache.append(index, k, v, positions)
            k, v, key_positions = cache.rows(index)
        if cache.dtype == "float32":  # llama.cpp's Flash Attention reads such rows as F16
            k, v = k.half().float(), v.half().float()
        distance = positions[None, :, None] - key_positions[:, None, :]
        visible = (distance >= 0) & (distance < self.windows.get(layer, torch.inf))
        out = attend(q, k, v, visible, scaling, softcap, s_aux)
        return out.transpose(0, 1)[None], None

    def logit_scale(self, index) -> tuple[float, float | None]:
        """What products of queries and keys are multiplied with, and the softcap."""
        return self.scales[index]

    def rope(self, index, rows, positions) -> torch.Tensor:
        """Rows [n, head_dim] after RoPE as queries of the index-th layer that evicts, by
        transformers' own functions."""
        layer = self.layers[index]
        if self.has_rope and not self.has_rope[layer]:
            return rows
        kinds = inspect.signature(self.rotary.forward).parameters
        kind = [self.layer_types[layer]] if "layer_type" in kinds else []
        cos, sin = self.rotary(rows, positions[None], *kind)
        apply = sys.modules[type(self.rotary).__module__].apply_rotary_pos_emb
        return apply(rows[None, None], rows[None, None], cos, sin)[0][0, 0]

    @torch.no_grad()
    def forward(self, tokens, positions, cache, last_only: bool = False) -> torch.Tensor:
        """Logits [n, n_vocab] (or [1, n_vocab]) after one chunk; its K and V go into the cache."""
        if cache.state is None:
            cache.state = ChunkCache(config=self.model.config)
        self._cache, self._positions = cache, torch.as_tensor(positions)
        logits = self.model(
            input_ids=torch.as_tensor(tokens)[None],
            position_ids=self._positions[None],
            past_key_values=cache.state,
            use_cache=True,
        ).logits[0]
        return logits[-1:] if last_only else logits


def interleaved(filters: np.ndarray) -> np.ndarray:
    """Filters [..., head_dim] of a model whose Q and K rows upstream's converter permutes for
    llama.cpp's RoPE of neighbouring pairs: index 2i+j takes the half-split index j*d/2+i."""
    half = filters.shape[-1] // 2
    order = [j * half + i for i in range(half) for j in range(2)]
    return np.ascontiguousarray(filters[..., order])
