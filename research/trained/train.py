"""Small language models with plain, biased and normalized attention.

The paper reports that Q-Filters do badly where Q and K have biases (Qwen 2.5) and fail where they
are normalized (OLMo-2). Published models of these families differ in everything else, too. These
are trained from the same text, seed and batches: `plain` is a Llama, `bias` a Qwen2 (biases on Q, K
and V, which begin at zero), `norm` a Qwen3 (Q and K normalized per head), all else alike: 4 layers of
256, 4 query and 2 KV heads of 64, 3.5 million parameters. `olmo2` normalizes over all heads of Q,
and of K, and has the other norms behind the blocks.

Of three sequences about one is text; one repeats itself, without which so small a model does not
learn to copy; one is a document with needles as `qfllama eval needle` has them, with other numbers
in other texts, so that the full cache finds many.

    python research/trained/train.py plain build/trained/plain --text wikitext2.valid.txt

The folder is a checkpoint for `qfllama convert`. compare.py trains, converts and measures all.
"""

from __future__ import annotations

import argparse
import io
import math
import sysconfig
import time
from pathlib import Path
from statistics import fmean

import sentencepiece
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qfllama.evaluation import needle, tasks

KINDS = {"plain": "llama", "bias": "qwen2", "norm": "qwen3", "olmo2": "olmo2"}
VOCAB = 2048
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
STAGES = ((0.2, 128), (0.5, 256), (0.8, 512), (1.0, 1024))
"""Up to this share of the training, sequences of so many tokens."""
BATCH = 4096
"""Tokens per step."""
LEARNING_RATE = 2e-3
WARMUP = 100
WEIGHTS = {"text": 1.0, "repeats": 1.5, "answers": 4.0}
"""Of a token in the loss."""


def library() -> str:
    """Everything that Python's library says about itself: the built-in text, of all its packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    return "\n\n".join(tasks.prose(files))


def tokenizer(text: str) -> bytes:
    """A SentencePiece model that takes texts as they are and numbers digit by digit, as llama.cpp
    does with a Llama 2 tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    return model.getvalue()


class Batches:
    """Sequences to learn from, the same for the same text and seed: 30 % random tokens over and
    over, 30 % text, 40 % documents, whose needles are all asked for at the end, in any order."""

    def __init__(self, text: str, processor, seed: int):
        self._encode = processor.encode
        self._tokens = processor.encode(text)
        self._haystack = tasks.Haystack(
            tasks.Text("training", text), lambda part: len(processor.encode(part))
        )
        self._rng = tasks.generator(seed, "batches")
        self._seed, self._made = seed, 0

    def next(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their weights in the loss, [BATCH / length, length]."""
        pairs = [self._sequence(length) for _ in range(BATCH // length)]
        tokens, weights = (torch.tensor(part) for part in zip(*pairs, strict=True))
        return tokens, weights

    def _sequence(self, length):
        self._made += 1
        kind = self._rng.random()
        if kind < 0.3:
            n = int(math.exp(self._rng.uniform(math.log(3), math.log(length // 2))))
            tokens = self._rng.sample(range(3, VOCAB), n)
            weights = [0.0] * len(tokens) + [WEIGHTS["repeats"]] * (length - len(tokens))
            return (tokens * (length // len(tokens) + 1))[:length], weights
        if kind < 0.6:
            start = self._rng.randrange(len(self._tokens) - length)
            tokens = self._tokens[start : start + length]
            return tokens, [1.0] * length
        n = self._rng.choice([1, self._rng.randint(1, min(8, length // 64))])
        document = needle.document(
            self._haystack, length - 56 * n, self._made, n, f"{self._seed}/training"
        )
        tokens = [1, *self._encode(document.text)]
        weights = [1.0] * len(tokens)
        for question in self._rng.sample(document.questions, n):
            asked = self._encode(question.text)
            both = self._encode(question.text + question.answer)
            tokens += both
            weights += [1.0] * len(asked) + [WEIGHTS["answers"]] * (len(both) - len(asked))
        pad = max(0, length - len(tokens))
        return (tokens + [2] * pad)[:length], (weights + [0.0] * pad)[:length]


def train(kind: str, out: Path, text: str, n_tokens: int, seed: int) -> None:
    """A checkpoint of a model that has learned from `n_tokens` tokens of `text`."""
    spm = tokenizer(text)
    batches = Batches(text, sentencepiece.SentencePieceProcessor(model_proto=spm), seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(KINDS[kind], **SIZES), dtype=torch.float32
    )
    print(f"{kind}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.05),
    ]
    forward = torch.compile(model, dynamic=False)
    n_steps, start = n_tokens // BATCH, time.monotonic()
    losses: dict[str, list[float]] = {name: [] for name in WEIGHTS}
    for step in range(n_steps):
        length = next(length for end, length in STAGES if step < end * n_steps)
        for group in optimizers[0].param_groups + optimizers[1].param_groups:
            group["lr"] = learning_rate(step, n_steps)
        tokens, weights = batches.next(length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=tokens, use_cache=False).logits
        each = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        (each @ weights / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, weight in WEIGHTS.items():
            losses[name] += each[weights == weight].tolist()
        if (step + 1) % 50 == 0:
            means = "  ".join(f"{name} {fmean(row):.3f}" for name, row in losses.items() if row)
            seconds = time.monotonic() - start
            print(f"{step + 1:>6}/{n_steps}  {length:>4}  {means}  {seconds:.0f} s", flush=True)
            losses = {name: [] for name in WEIGHTS}
    # llama.cpp takes no OLMo-2 that shares them
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(out)
    (out / "tokenizer.model").write_bytes(spm)  # the last: it is complete


def learning_rate(step: int, n_steps: int) -> float:
    """Linear up, then along a cosine down to a tenth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    share = (step - WARMUP) / max(1, n_steps - WARMUP)
    return LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * share))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], help="beside what Python says about itself"
    )
    parser.add_argument("--tokens", type=int, default=8_000_000, help="to learn from")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    text = "\n\n".join([library(), *(path.read_text(encoding="utf-8") for path in args.text)])
    train(args.kind, args.out, text, args.tokens, args.seed)


if __name__ == "__main__":
    main()
