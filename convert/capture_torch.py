"""Queries and keys from a transformers model, as they reach attention."""

from __future__ import annotations

import gc
import sys
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import engine_log, gguf_header
from ..config import QFilterError
from . import layout, native_model
from .text import one_line

ATTENTION = "qfllama_observed"
GGUF_MODELS = ("llama", "qwen2", "qwen3")
"""Architectures whose GGUF files, if dense, transformers reads as llama.cpp does."""


@dataclass(frozen=True)
class Attention:
    """One attention call. Arrays are made only when asked for, during `observe`.

    layer: the model layer whose keys are attended; start: position of the first query
    n_tokens: queries per head; scale: factor of q.k in front of the softmax"""

    layer: int
    start: int
    n_tokens: int
    scale: float
    _query: torch.Tensor  # [1, n_head, n_tokens, head_dim]
    _key: torch.Tensor  # [1, n_head_kv, n_keys, head_dim]

    @property
    def n_head_kv(self) -> int:
        """KV heads of the layer."""
        return self._key.shape[1]

    def queries(self, at=None) -> np.ndarray:
        """float32 [n_head, n, head_dim] as they enter attention: after norms and RoPE. at: indices
        of tokens within this call; None: all."""
        query = self._query[0]
        if at is not None:
            query = query[:, torch.as_tensor(np.asarray(at), device=query.device)]
        return query.float().cpu().numpy()

    def keys(self) -> np.ndarray:
        """float32 [n_head_kv, n_keys, head_dim]: all keys so far, one per KV head."""
        return self._key[0].float().cpu().numpy()


class TorchModel:
    """A model that transformers runs in float32, and how its heads lie in llama.cpp's cached K rows.

    path: a checkpoint folder, or a GGUF file of one of GGUF_MODELS
    gguf: the GGUF file whose K rows filters must fit: `path`, or what upstream made of the folder
    """

    route = "torch"

    def __init__(self, path, gguf, n_ctx: int):
        model = load_checkpoint(path) if Path(path).is_dir() else load_gguf(path)
        self.model = model
        self.orders = head_orders(gguf, model)
        self._donors = _donors(model)
        self._open = ExitStack()
        self._ropes = self._llama_cpp_ropes(gguf, n_ctx)

    def _llama_cpp_ropes(self, gguf, n_ctx):
        """How llama.cpp rotates the queries of the GGUF; None if it can't run the file here.
        Nothing is computed, but the file is mapped into memory."""
        with ExitStack() as stack:
            stack.enter_context(engine_log.errors())
            loaded = native_model.loaded(gguf, n_gpu_layers=0, use_extra_bufts=False)
            try:
                context = native_model.context(stack.enter_context(loaded), n_ctx, 1)
            except QFilterError:
                return None
            stack.enter_context(context)
            ropes = stack.enter_context(closing(native_model.Ropes(context)))
            self._open = stack.pop_all()
            return ropes

    def read(self, tokens: list[int], observe, progress=lambda n: None) -> None:
        """Run the model over one sequence from its start and call observe(Attention) for every
        attention layer, in order, then progress(tokens). A layer that attends the keys of another
        one is an additional call of that one."""
        calls = 0

        def take(layer, query, key, scale):
            nonlocal calls
            calls += 1
            layer = self._donors.get(layer, layer)
            n_tokens = query.shape[2]
            observe(Attention(layer, key.shape[2] - n_tokens, n_tokens, scale, query, key))

        ids = torch.tensor([tokens], device=self.model.device)
        with torch.inference_mode(), _observed(self.model, take):
            self.model(input_ids=ids, use_cache=False)
        if calls == 0:
            raise QFilterError(
                f"transformers' {type(self.model).__name__} hides its attention; "
                "use `--backend llama`"
            )
        progress(len(tokens))

    def to_cached(self, vectors: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Layer -> [..., head_dim] vectors, from the model's head layout to that of llama.cpp's
        cached K rows."""
        if unknown := sorted(set(vectors) - set(self.orders)):
            raise QFilterError(
                f"transformers' {type(self.model).__name__} hides the K weights of layer "
                f"{unknown[0]}; use `--backend llama`"
            )
        return {layer: vector[..., self.orders[layer]] for layer, vector in vectors.items()}

    def before_rope(self, layer: int, positions, queries: np.ndarray) -> np.ndarray | None:
        """See native_model.Ropes.back; the queries in the layout of this route."""
        if self._ropes is None:
            return None
        cached = self.to_cached({layer: queries})[layer]
        return self._ropes.back(layer, positions, cached)

    def close(self) -> None:
        """Free the weights, on the GPU for llama.cpp, which runs the model next."""
        self.model = None
        self._open.close()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU


def load_checkpoint(folder):
    """The text decoder of the model in a Hugging Face folder, float32."""
    return _load(folder, str(folder))


def load_gguf(path):
    """The model in a GGUF file of one of GGUF_MODELS, its weights expanded to float32."""
    path = Path(path)
    header = gguf_header.scan(path)
    arch = header.get("general.architecture")
    what = None
    if arch not in GGUF_MODELS:
        what = f"{arch} models"
    elif header.get(f"{arch}.expert_count", 0):
        what = "mixtures of experts"
    elif header.get("split.count", 1) > 1:
        what = "models in several files"
    if what:
        raise QFilterError(
            f"{path}: transformers does not read GGUF files of {what} as llama.cpp does; use "
            "`--backend llama`, or give the Hugging Face checkpoint"
        )
    model = _load(path, str(path.parent), gguf_file=path.name)
    _apply_rope_scaling(model, path, header)
    return model


def _load(source, folder, **kwargs):
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loader = _loader(folder, **kwargs)
        model, info = loader.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **kwargs,
        )
    except Exception as error:  # noqa: BLE001 - transformers raises anything, even KeyError
        raise QFilterError(
            f"transformers cannot load {source}: {one_line(error)}; try `--backend llama`"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise QFilterError(
            f"{source} lacks {len(missing)} tensors, {missing[0]} among them; download it again"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.get_decoder().eval().requires_grad_(False).to(device)


def _loader(folder, **kwargs):
    """transformers' class that loads this checkpoint: for text, or for text with images."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **kwargs)
    for loader in AutoModelForCausalLM, AutoModelForImageTextToText:
        if type(config) in loader._model_mapping:
            return loader
    return AutoModelForCausalLM


def _apply_rope_scaling(model, path, header):
    """Scale the rotary frequencies as the GGUF says, by a tensor of divisors (Llama 3.1 and later)
    or one linear factor: transformers doesn't read these from a GGUF."""
    arch = header.get("general.architecture")
    kind = header.get(f"{arch}.rope.scaling.type", "none")
    frequencies = model.rotary_emb.inv_freq
    if kind == "linear":
        frequencies /= header.get(f"{arch}.rope.scaling.factor", 1.0)
    elif kind != "none":
        raise QFilterError(
            f"{path} stretches its context by {kind}, which transformers does not read from a "
            "GGUF; use `--backend llama`, or convert the Hugging Face checkpoint"
        )
    for info in header.tensors:
        if info.name == "rope_freqs.weight":
            divisors = np.fromfile(path, "<f4", info.shape[0], offset=header.data + info.offset)
            frequencies /= torch.from_numpy(divisors).to(frequencies.device)


def head_orders(gguf, model) -> dict[int, np.ndarray]:
    """Layer -> indices [head_dim] from the head layout of `model` to that of the K rows of `gguf`
    (`layout.head_orders`), for every layer that has K weights."""
    modules = _attention_modules(model).items()
    return layout.head_orders(
        gguf, ((layer, module.head_dim, _k_weights(module)) for layer, module in modules)
    )


FUSED = ("qkv_proj", "query_key_value", "Wqkv")


def _attention_modules(model):
    """Layer -> the module of `model` that has its K weights."""
    found = {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and any(hasattr(module, name) for name in ("k_proj", *FUSED))
        and hasattr(module, "head_dim")
    }
    if not found:
        raise QFilterError(
            f"transformers' {type(model).__name__} has no K projections that are known; "
            "use `--backend llama`"
        )
    return found


def _donors(model) -> dict[int, int]:
    """Layer that has no keys of its own -> the layer whose keys it attends: the last one of its
    type that has keys."""
    own, donors = {}, {}
    for module in model.modules():
        if hasattr(module, "is_kv_shared_layer") and module.is_kv_shared_layer:
            donors[module.layer_idx] = own[module.layer_type]
        elif hasattr(module, "is_kv_shared_layer"):
            own[module.layer_type] = module.layer_idx
    return donors


def _k_weights(module):
    """Candidates for the K weight of an attention module: arrays [n_head_kv*head_dim, n_embd]."""
    if hasattr(module, "k_proj"):
        return [_array(module.k_proj.weight)]
    fused = _array(next(getattr(module, name) for name in FUSED if hasattr(module, name)).weight)
    n_head = module.config.num_attention_heads
    n_head_kv = getattr(module.config, "num_key_value_heads", None) or n_head
    return layout.k_candidates(fused, n_head, n_head_kv, module.head_dim)


def _array(weight):
    return weight.detach().float().cpu().numpy()


@contextmanager
def _observed(model, observer):
    """In the block, every attention call of `model` first calls observer(layer, query, key, scale).
    Query and key are [n_batch, n_head or n_head_kv, n_tokens, head_dim], after norms and RoPE.

    Works for every model that goes through transformers' attention interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    eager = _needs_eager(model)

    def attention(module, query, key, value, *args, **kwargs):
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        observer(module.layer_idx, query, key, float(scale))
        forward = sdpa_attention_forward
        if eager:
            forward = sys.modules[type(module).__module__].eager_attention_forward
        return forward(module, query, key, value, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask if eager else sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _needs_eager(model):
    """Does attention do more than softmax(QK)V here? Only the model's own, slower implementation
    has capped logits or attention sinks."""
    return not model._supports_sdpa or getattr(model.config, "attn_logit_softcapping", None)
