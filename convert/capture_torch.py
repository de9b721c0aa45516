"""Queries after RoPE from a transformers model, on their way into attention."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .. import gguf_header
from ..config import QFilterError
from .calibrate import QueryMoments
from .source import MODEL_TYPES
from .text import one_line

ATTENTION = "qfllama_observed"


def load_checkpoint(folder):
    """The model in a Hugging Face folder, float32, ready to be observed."""
    return _load(folder, str(folder))


def load_gguf(path):
    """The model in a GGUF file of the llama architecture, its weights expanded to float32."""
    path = Path(path)
    model = _load(path, str(path.parent), gguf_file=path.name)
    _apply_rope_scaling(model, path)
    return model


def _load(source, folder, **kwargs):
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    except Exception as error:  # noqa: BLE001 - transformers raises anything, even KeyError
        raise QFilterError(f"transformers cannot load {source}: {one_line(error)}") from None
    if model.config.model_type not in MODEL_TYPES:
        raise QFilterError(
            f"{source} is a {model.config.model_type} model; only models of the "
            "Llama architecture can be converted yet"
        )
    if missing := sorted(info["missing_keys"]):
        raise QFilterError(
            f"{source} lacks {len(missing)} tensors, {missing[0]} among them; download it again"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.base_model.eval().requires_grad_(False).to(device)


def _apply_rope_scaling(model, path):
    """Scale the rotary frequencies as the GGUF asks, which transformers doesn't read from it:
    a tensor of divisors (Llama 3.1 and later) or one linear factor."""
    header = gguf_header.scan(path)
    arch = header.get("general.architecture")
    kind = header.get(f"{arch}.rope.scaling.type", "none")
    frequencies = model.rotary_emb.inv_freq
    if kind == "linear":
        frequencies /= header.get(f"{arch}.rope.scaling.factor", 1.0)
    elif kind != "none":
        raise QFilterError(
            f"{path} stretches its context by {kind}, which is not supported yet "
            "for a GGUF; convert the Hugging Face checkpoint instead"
        )
    for info in header.tensors:
        if info.name == "rope_freqs.weight":
            divisors = np.fromfile(path, "<f4", info.shape[0], offset=header.data + info.offset)
            frequencies /= torch.from_numpy(divisors).to(frequencies.device)


@contextmanager
def observed(model, observer):
    """Within the block, every attention call of `model` first does observer(layer, queries), with
    queries after RoPE [n_batch, n_head, n_tokens, head_dim].

    Works for every model that goes through transformers' attention interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, *args, **kwargs):
        observer(module.layer_idx, query)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def collect(
    model, sequences: list[list[int]], positions: list[np.ndarray], progress=None
) -> QueryMoments:
    """Run `model` (without its output head) over the sequences, one at a time, and take in the
    queries at `positions` of each. progress: called with the number of tokens done, per sequence.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    moments = QueryMoments(
        config.num_hidden_layers,
        config.num_attention_heads,
        head_dim,
        sum(len(p) for p in positions),
    )
    at = None

    def take(layer, queries):
        moments.add(layer, queries[0][:, at].cpu())

    with torch.inference_mode(), observed(model, take):
        for tokens, chosen in zip(sequences, positions, strict=True):
            at = torch.from_numpy(chosen).to(model.device)
            model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
            if progress:
                progress(len(tokens))
    return moments
