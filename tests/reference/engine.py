"""Run the reference model over chunks of tokens, as llama_decode runs over batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from reference.cache import BoundedCache, Eviction
from reference.model import Model


@dataclass
class Run:
    """logits: [n_chunks, n_vocab], or [n_tokens, n_vocab] if every position was asked for."""

    logits: np.ndarray
    evictions: list[Eviction] = field(default_factory=list)


def split(n_tokens: int, sizes: Sequence[int]) -> list[int]:
    """Chunk sizes that add up to n_tokens: `sizes` over and over, the last one cut short."""
    chunks = []
    while sum(chunks) < n_tokens:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(min(size, n_tokens - sum(chunks)))
    return chunks


def run(
    model: Model,
    tokens: Sequence[int],
    chunks: Sequence[int],
    cache: BoundedCache,
    forced: Sequence[np.ndarray] | None = None,
    every_position: bool = False,
) -> Run:
    """Evaluate the tokens chunk by chunk; before a chunk that does not fit, the cache evicts.

    chunks: sizes that add up to the number of tokens.
    forced: what to keep at each eviction instead of the cache's own choice (which is recorded
    all the same): one [n_layer, n_head_kv, n_keep] of positions per eviction. ValueError if
    their number differs from the number of evictions.
    """
    if sum(chunks) != len(tokens):
        raise ValueError(f"chunks of {sum(chunks)} tokens for {len(tokens)} tokens")
    logits, evictions, start = [], [], 0
    for n in chunks:
        if not cache.fits(n):
            i = len(evictions)
            if forced is not None and i >= len(forced):
                raise ValueError(f"eviction {i + 1} at {start}, but only {len(forced)} are forced")
            evictions.append(cache.evict(start, None if forced is None else forced[i]))
            if not cache.fits(n):
                raise ValueError(f"a chunk of {n} does not fit after an eviction")
        logits.append(
            model.forward(
                tokens[start : start + n],
                range(start, start + n),
                cache,
                last_only=not every_position,
            )
        )
        start += n
    if forced is not None and len(forced) != len(evictions):
        raise ValueError(f"{len(evictions)} evictions, but {len(forced)} are forced")
    return Run(torch.cat(logits).numpy(), evictions)
