"""The Llama decoder in plain float32 torch, in llama.cpp's own layout.

Weights come from a GGUF, tensor by tensor, through gguf-py's dequantization. Q and K rows are
used as the file has them (llama.cpp permutes them per head for its interleaved RoPE), so a K row
computed here has the layout of a row of llama.cpp's K cache and nothing is converted.

What is computed as llama.cpp's CPU backend does, and what is not:
- Matrix products, norms and softmax are float32, summed in another order. llama.cpp agrees to
  rounding when the file's weights are F32 (see `write_f32_copy`); with quantized weights it also
  quantizes the activations of every matrix product (Q8_0 or Q8_1), which is not mimicked.
- RoPE angles are float64 here and float32 there (relative error about 1e-7 times the position).
- The cache may round K and V when it stores them (see cache.py). With flash_attention the rows
  that attention reads are F16 even if the cache holds F32: llama.cpp casts them.
- Then ggml's Flash Attention works in float32 for chunks of at least 64 tokens. For shorter ones
  it rounds the queries to F16 and adds up V in F16, which changes logits by some 0.05, and with a
  quantized cache it always quantizes the queries. Neither is mimicked.

How closely two correct engines can agree: the last bits of K and V decide which way they are
rounded. Changing the RoPE base by 3e-7 of itself, less than float32 can tell, changes the logits
of SmolLM2-135M (standard deviation 5) by up to 3e-5 with F32 rows, 6e-3 with F16, 0.16 with Q8_0.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

LAYER_TENSORS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


@dataclass(frozen=True)
class Shape:
    """Sizes and constants from the GGUF's metadata."""

    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_embd: int
    norm_eps: float
    rope_base: float


def read_shape(reader: gguf.GGUFReader) -> Shape:
    """Shape of a Llama model; ValueError for anything this file does not compute."""

    def get(key: str, default=None):
        field = reader.get_field(key)
        if field is None and default is None:
            raise ValueError(f"the GGUF has no {key}")
        return default if field is None else field.contents()

    if get("general.architecture") != "llama":
        raise ValueError(f"not a llama model but {get('general.architecture')}")
    if get("llama.rope.scaling.type", "none") != "none":
        raise ValueError("RoPE scaling is not implemented in the reference")
    if get("llama.expert_count", 0):
        raise ValueError("experts are not implemented in the reference")
    n_embd, n_head = get("llama.embedding_length"), get("llama.attention.head_count")
    head_dim = get("llama.attention.key_length", n_embd // n_head)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if get(key, head_dim) != head_dim:
            raise ValueError(f"{key} is {get(key)} but heads have {head_dim} dimensions")
    return Shape(
        n_layer=get("llama.block_count"),
        n_head=n_head,
        n_head_kv=get("llama.attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_embd=n_embd,
        norm_eps=get("llama.attention.layer_norm_rms_epsilon"),
        rope_base=get("llama.rope.freq_base", 10000.0),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotate each pair x[..., 2i:2i+2] by positions * base^(-2i/head_dim).

    x [..., n, head_dim], positions [n]; returns the shape of x.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Model:
    """A Llama model with float32 weights.

    tensors: name in the GGUF -> float32 tensor, matrices as [n_out, n_in].
    flash_attention: let attention read F32 rows as F16, as llama.cpp's Flash Attention does.
    """

    def __init__(self, shape: Shape, tensors: dict[str, torch.Tensor], flash_attention=False):
        self.shape = shape
        self.tensors = tensors
        self.flash_attention = flash_attention
        # called with (layer, q [n_head, n, head_dim] before RoPE, the same after)
        self.on_query = None

    @classmethod
    def load(cls, path: str | Path, flash_attention: bool = False) -> "Model":
        """Read a GGUF. ValueError if it holds a tensor that this decoder would not use."""
        reader = gguf.GGUFReader(path)
        shape = read_shape(reader)
        used = {f"blk.{i}.{name}.weight" for i in range(shape.n_layer) for name in LAYER_TENSORS}
        used |= {"token_embd.weight", "output_norm.weight"}
        names = {t.name for t in reader.tensors}
        if names - {"output.weight"} != used:
            odd = sorted((names - {"output.weight"}) ^ used)
            raise ValueError(f"not a plain Llama model, see tensors {', '.join(odd[:3])}")
        tensors = {
            t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).astype(np.float32))
            for t in reader.tensors
        }
        return cls(shape, tensors, flash_attention)

    def logit_scale(self, i: int) -> tuple[float, float | None]:
        """What products of queries and keys are multiplied with, and the softcap."""
        return self.shape.head_dim**-0.5, None

    def layer(self, i: int, name: str) -> torch.Tensor:
        return self.tensors[f"blk.{i}.{name}.weight"]

    def project(self, i: int, name: str, x: torch.Tensor, n_head: int) -> torch.Tensor:
        """x [n, n_embd] -> [n_head, n, head_dim]"""
        return (x @ self.layer(i, name).T).view(len(x), n_head, -1).transpose(0, 1)

    def attention(self, i: int, x: torch.Tensor, positions: torch.Tensor, cache) -> torch.Tensor:
        """Store the chunk's K and V, then attend to all rows that each KV head has by now.

        x [n, n_embd], positions [n]; a query sees the rows whose position is not above its own.
        """
        s = self.shape
        plain = self.project(i, "attn_q", x, s.n_head)
        q = rope(plain, positions, s.rope_base)
        k = rope(self.project(i, "attn_k", x, s.n_head_kv), positions, s.rope_base)
        v = self.project(i, "attn_v", x, s.n_head_kv)
        if self.on_query:
            self.on_query(i, plain, q)
        cache.append(i, k, v, positions)
        k, v, key_positions = cache.rows(i)  # [n_head_kv, rows, head_dim] twice, [n_head_kv, rows]
        if self.flash_attention and cache.dtype == "float32":
            k, v = k.half().float(), v.half().float()

        q = q.view(s.n_head_kv, -1, len(x), s.head_dim)  # query heads by the KV head they share
        weights = q @ k[:, None].transpose(-1, -2) / s.head_dim**0.5
        future = key_positions[:, None, None, :] > positions[:, None]
        weights = weights.masked_fill(future, -torch.inf).softmax(-1)
        out = weights @ v[:, None]
        return out.flatten(0, 1).transpose(0, 1).flatten(1) @ self.layer(i, "attn_output").T

    def feed_forward(self, i: int, x: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(x @ self.layer(i, "ffn_gate").T)
        return (gate * (x @ self.layer(i, "ffn_up").T)) @ self.layer(i, "ffn_down").T

    @torch.no_grad()
    def forward(self, tokens, positions, cache, last_only: bool = False) -> torch.Tensor:
        """Logits [n, n_vocab] (or [1, n_vocab]) after one chunk; its K and V go into the cache.

        tokens, positions: n ints each. The cache decides what the chunk's queries can see.
        """
        eps = self.shape.norm_eps
        positions = torch.as_tensor(positions)
        x = self.tensors["token_embd.weight"][torch.as_tensor(tokens)]
        for i in range(self.shape.n_layer):
            x = x + self.attention(
                i, rms_norm(x, self.layer(i, "attn_norm"), eps), positions, cache
            )
            x = x + self.feed_forward(i, rms_norm(x, self.layer(i, "ffn_norm"), eps))
        x = x[-1:] if last_only else x
        x = rms_norm(x, self.tensors["output_norm.weight"], eps)
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return x @ output.T


def write_f32_copy(src: str | Path, dst: str | Path) -> None:
    """Write the GGUF SRC to DST with every tensor dequantized to F32 and the metadata unchanged.

    llama.cpp computes with such a file in float32 throughout, as this reference does.
    """
    reader = gguf.GGUFReader(src)
    writer = gguf.GGUFWriter(dst, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for t in reader.tensors:
        writer.add_tensor(t.name, dequantize(t.data, t.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
