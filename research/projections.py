"""A Llama model of transformers: its queries, keys and values before RoPE, and the statistics of its
queries."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig


def attend(module, query, key, value, mask, scaling, **kwargs):
    """Attention to all keys before the queries' own and, causally, to those. transformers' masks
    have one number of keys for all layers."""
    n, n_keys = query.shape[2], key.shape[2]
    whole = n == n_keys
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, is_causal=whole, enable_gqa=True,
        attn_mask=None if whole else torch.ones(n, n_keys, dtype=torch.bool).tril(n_keys - n),
    )  # fmt: skip
    return out.transpose(1, 2), None


AttentionInterface.register("any number of keys", attend)


class Model:
    """A Llama model of transformers, whose queries and keys are read before RoPE."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        model.set_attn_implementation("any number of keys")
        config = model.config
        self.n_layer, self.n_head = config.num_hidden_layers, config.num_attention_heads
        self.n_head_kv = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", config.hidden_size // self.n_head)

    @contextmanager
    def projections(self):
        """Layer -> {"q": [n_head, n, head_dim], "k", "v": [n_head_kv, n, head_dim]}, of all that is
        read meanwhile, before RoPE."""
        found = [{} for _ in range(self.n_layer)]

        def hook(layer, name):
            def keep(module, inputs, output):
                found[layer][name] = output[0].unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

            return keep

        handles = [
            getattr(layer.self_attn, f"{name}_proj").register_forward_hook(hook(i, name))
            for i, layer in enumerate(self.model.model.layers)
            for name in "qkv"
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def tokens(self, text: str, *, start: bool = False) -> list[int]:
        """As those of qfllama.engine.Model."""
        bos = self.tokenizer.bos_token_id
        first = [bos] if start and self.tokenizer.encode("")[:1] == [bos] else []
        return first + self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotations as complex numbers, [n, head_dim / 2]."""
        cos, sin = self.model.model.rotary_emb(torch.zeros(1), positions[None])
        return torch.complex(cos, sin)[0, :, : self.head_dim // 2]


def trained(path: Path) -> Model:
    source = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    # others change queries and keys between projection and RoPE
    if model.config.model_type not in ("llama", "qwen2"):
        sys.exit(f"{path} is a {model.config.model_type} model; give a Llama or a Qwen2")
    return Model(model, AutoTokenizer.from_pretrained(folder, **source))


def random_weights(seed: int) -> Model:
    """4 layers, 8 query and 2 KV heads of 64; every head's queries and keys have a direction that
    they prefer, as those of trained models have."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        initializer_range=0.06,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.embed_tokens.weight.data += 0.03 * torch.randn(config.hidden_size)
    return Model(model, None)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [..., head_dim] turned by `angles` [..., head_dim / 2]: pairs are (i, i + head_dim / 2)."""
    turned = torch.complex(*x.chunk(2, dim=-1)) * angles
    return torch.cat([turned.real, turned.imag], dim=-1)


class Moments:
    """Mean and second moment of the queries of each head, [n_layer, n_head, ...]."""

    def __init__(self, model: Model, pieces: list[list[int]]):
        shape = (model.n_layer, model.n_head, model.head_dim)
        self.mean = torch.zeros(*shape, dtype=torch.float64)
        self.raw = torch.zeros(*shape, model.head_dim, dtype=torch.float64)
        self.mean_rotated, self.raw_rotated = self.mean.clone(), self.raw.clone()
        n = sum(map(len, pieces))
        for piece in pieces:
            angles = model.angles(torch.arange(len(piece)))
            with model.projections() as found:
                model.model(torch.tensor([piece]), use_cache=False, logits_to_keep=1)
            for layer, projected in enumerate(found):
                q = projected["q"]
                self.mean[layer] += q.double().sum(1) / n
                self.raw[layer] += outer(q) / n
                q = rotate(q, angles)
                self.mean_rotated[layer] += q.double().sum(1) / n
                self.raw_rotated[layer] += outer(q) / n

    def of(self, form: str, layer: int, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and second moment for keys of this form; angles: those of the next positions."""
        if form == "as measured":
            return self.mean_rotated[layer], self.raw_rotated[layer]
        mean, raw = self.mean[layer], self.raw[layer]
        if form == "back":
            return mean, raw
        turns = angles.to(torch.complex128)[:, None, None]
        means = rotate(mean, turns[:, 0])  # [positions, n_head, head_dim]
        if form == "mean ahead":
            mean = means.mean(0)
            return mean, mean[..., :, None] * mean[..., None, :]
        turned = rotate(rotate(raw, turns).transpose(-1, -2), turns)
        return means.mean(0), turned.mean(0)


def outer(q: torch.Tensor) -> torch.Tensor:
    q = q.double()
    return q.transpose(1, 2) @ q


class Read:
    """A document that has been read: keys before and after RoPE, values."""

    def __init__(self, model: Model, tokens: list[int]):
        self.n = len(tokens)
        with model.projections() as found:
            model.model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
        self.q = [projected["q"] for projected in found]
        self.back = [projected["k"] for projected in found]
        self.v = [projected["v"] for projected in found]
        self.k = [rotate(k, model.angles(torch.arange(self.n))) for k in self.back]
