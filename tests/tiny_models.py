"""Small models with random weights and a real tokenizer, as checkpoints that upstream's converter
accepts: Llama models of any shape, and one of every family that people run."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import numpy as np
from qfllama.convert import export

VOCAB = 384

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
WIDE_HEADS = HEADS | {"head_dim": 32}  # the width of 96 is not head_dim * heads
ROPE = {"rope_type": "default", "rope_theta": 5000.0}  # no one's default: it must be handed on
TWO_ROPES = ("gemma3_text", "gemma3", "gemma4_text")  # one of them for windowed layers: the default
FAMILIES = {
    "llama": ("llama", WIDE_HEADS | {"num_hidden_layers": 3}),
    "mistral": ("mistral", WIDE_HEADS | {"num_hidden_layers": 3, "sliding_window": None}),
    "qwen2": ("qwen2", HEADS | {"num_hidden_layers": 3}),  # Q, K and V have biases
    # a norm per head on Q and K; transformers takes every GGUF of it for one with heads of 128
    "qwen3": ("qwen3", HEADS | {"head_dim": 128, "num_hidden_layers": 3}),
    "qwen3moe": (
        "qwen3_moe",
        WIDE_HEADS
        | {
            "num_hidden_layers": 3,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,  # llama.cpp always does
        },
    ),
    # llama.cpp takes every sixth layer of gemma3 and every second of gemma2 for one without window
    "gemma2": (
        "gemma2",
        WIDE_HEADS
        | {
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "attn_logit_softcapping": 5.0,
            "rope_parameters": ROPE | {"rope_theta": 10000.0},  # the only one in llama.cpp
        },
    ),
    "gemma3": (
        "gemma3_text",
        WIDE_HEADS | {"num_hidden_layers": 12, "query_pre_attn_scalar": 32, "sliding_window": 64},
    ),
    "gemma3 with images": (
        "gemma3",
        {
            "text_config": WIDE_HEADS
            | {"num_hidden_layers": 6, "query_pre_attn_scalar": 32, "sliding_window": 64},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma4": (  # the last layer of each kind attends the keys of the one before
        "gemma4_text",
        HEADS
        | {
            "head_dim": 32,
            "global_head_dim": 64,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "sliding_window": 64,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    "phi3": ("phi3", HEADS | {"num_hidden_layers": 3}),  # Q, K and V in one matrix
    "phi3 partial rotary": (
        "phi3",
        HEADS | {"num_hidden_layers": 3, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    ),
    "olmo2": ("olmo2", HEADS | {"num_hidden_layers": 3}),  # one norm over all heads of Q, and of K
    "gpt_oss": (
        "gpt_oss",
        WIDE_HEADS
        | {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,  # llama.cpp always does; the published models ask for False
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "granite": (
        "granite",
        HEADS
        | {
            "num_hidden_layers": 3,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 3.0,
        },
    ),
    "smollm3": ("smollm3", HEADS | {"num_hidden_layers": 4}),  # every fourth layer has no RoPE
    # a norm per head on Q and K, after RoPE
    "hunyuan": ("hunyuan_v1_dense", WIDE_HEADS | {"num_hidden_layers": 3}),
    "lfm2": (  # a hybrid: two layers out of four have attention
        "lfm2",
        HEADS
        | {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
}
"""Family -> (transformers' model type, what its configuration needs beside the sizes)."""


def write_tokenizer(folder, symbols=()) -> None:
    """Train a SentencePiece BPE tokenizer of VOCAB tokens with byte fallback, as Llama 2 has one.
    symbols: tokens that it must have.

    (Upstream's converter knows BPE tokenizers of other kinds only by the hash of what they do.)"""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(topics["assert"].splitlines() + topics["for"].splitlines()),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=list(symbols),
        minloglevel=2,
        num_threads=1,
    )
    Path(folder, "tokenizer.model").write_bytes(model.getvalue())


def write_llama(folder, *, n_layer=3, n_head=6, n_head_kv=2, head_dim=16, seed=0, **config):
    """A Llama checkpoint in `folder`; returns the model. head_dim * n_head need not be the model's
    width of 96. Further arguments go to LlamaConfig.

    Weights are large enough for attention and RoPE to matter, and every head has a direction that
    its queries prefer, so that v1 and its sign are well determined, as they are in trained models.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=96,
            intermediate_size=96,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            num_key_value_heads=n_head_kv,
            head_dim=head_dim,
            max_position_embeddings=512,
            initializer_range=0.2,
            tie_word_embeddings=False,
            **config,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.3 * torch.randn(96)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write(family, folder, *, seed=0, **config):
    """A checkpoint of one of FAMILIES in `folder`; returns the model, in float32. Further arguments
    go to its configuration, over what FAMILIES says.

    As with `write_llama` attention and RoPE matter and every head prefers a direction. Biases,
    norms and attention sinks are random too, so that a model that lacks one computes otherwise."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, needs = FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "rope_parameters": None if model_type in TWO_ROPES else ROPE,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": "gemma" in model_type,
    }
    if "text_config" in needs:
        needs = needs | {"text_config": sizes | needs["text_config"] | config}
    else:
        needs = sizes | needs | config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **needs), dtype=torch.float32
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 or name.endswith("_bias"):
                weight += 0.3 * torch.randn_like(weight)
        embeddings = model.get_input_embeddings().weight
        embeddings += 0.3 * torch.randn(embeddings.shape[1])
    model.save_pretrained(folder)
    # llama.cpp looks this one up in every model that is called phi3
    write_tokenizer(folder, ["<|endoftext|>"] if model_type == "phi3" else [])
    return model.eval()


def write_converter(path) -> Path:
    """A program like upstream's converter that gives every model the SentencePiece tokenizer of
    its folder. Upstream itself takes one for some families only, and refuses BPE tokenizers that
    were not published with a model that it knows. Returns `path`."""
    Path(path).write_text(_CONVERTER + "convert_hf_to_gguf.main()\n")
    return Path(path)


def two_layers(folder: Path) -> Path:
    """A GGUF file in `folder`: a Llama of 2 layers with 2 KV heads of 64 each."""
    write_llama(folder / "llama", n_layer=2, n_head=4, n_head_kv=2, head_dim=64)
    return convert([folder / "llama"])[0]


def some(n: int, seed: int = 0) -> list[int]:
    """n tokens for the engine tests."""
    return np.random.default_rng(seed).integers(3, 380, n).tolist()


def convert(checkpoints) -> list[Path]:
    """The GGUF files (float32, CHECKPOINT.gguf) that upstream's converter makes of checkpoint
    folders, with the tokenizers of `write_converter`, in one process: starting it takes longer
    than converting."""
    outputs = [Path(f"{checkpoint}.gguf") for checkpoint in checkpoints]
    calls = [
        ["converter", str(checkpoint), "--outfile", str(output), "--outtype", "f32"]
        for checkpoint, output in zip(checkpoints, outputs, strict=True)
    ]
    program = _CONVERTER + f"for sys.argv in {calls!r}: convert_hf_to_gguf.main()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return outputs


def write_mrope(source, architecture: str, target) -> None:
    """A copy of a GGUF as another architecture whose positions have sections. Those of text have
    the same position in every section, so that it computes the same."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture)
    old = reader.get_field("general.architecture").contents()
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        sub_type = field.types[-1] if len(field.types) > 1 else None
        value = "mrope" if name == "qfilters.layout" else field.contents()
        name = name.replace(f"{old}.", f"{architecture}.")
        writer.add_key_value(name, value, field.types[0], sub_type=sub_type)
    writer.add_rope_dimension_sections([2, 3, 3, 0])
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_CONVERTER = f"""
import sys
sys.path.insert(0, {str(export.converter_path().parent)!r})
import convert_hf_to_gguf
from conversion import TextModel
from conversion.gemma import Gemma3Model, Gemma4Model
from conversion.glm import Glm4Model
from conversion.hunyuan import HunYuanModel
TextModel._set_vocab_gpt2 = TextModel._set_vocab_sentencepiece
Gemma4Model.set_vocab = Gemma3Model.set_vocab
for model in (Glm4Model, HunYuanModel):
    model.set_vocab = TextModel._set_vocab_sentencepiece
"""


def some_moments(n_layer, n_head, head_dim, rank=5, seed=4):
    """Second-order filters for tests, float32 [n_layer, n_head, 1 + rank, head_dim]. Products with
    keys of length around sqrt(head_dim) are around 1, so that no weight of a softmax is all."""
    rows = np.random.default_rng(seed).normal(size=(n_layer, n_head, 1 + rank, head_dim))
    return (rows / head_dim**0.5).astype(np.float32)
