"""Small Llama models with random weights and a real tokenizer, as checkpoints that upstream's
converter accepts."""

from __future__ import annotations

import io
from pathlib import Path
from pydoc_data.topics import topics

VOCAB = 384


def write_tokenizer(folder) -> None:
    """Train a SentencePiece BPE tokenizer of VOCAB tokens with byte fallback, as Llama 2 has one.

    (Upstream's converter knows BPE tokenizers of other kinds only by the hash of what they do.)"""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(topics["assert"].splitlines() + topics["for"].splitlines()),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
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
