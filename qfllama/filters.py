"""Q-filters of a model in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

VERSION = 3
"""Version of the schema that is written."""
OPTIONAL = ("queries", "moments", "learned")
"""Kinds of vectors that a model may have besides filters."""
REQUIRED = ("queries", "moments")
"""Those that a reader must understand. It may ignore learned filters: the others don't change."""
LAYOUTS = {-1: "none", 0: "norm", 2: "neox", 8: "mrope", 24: "vision", 40: "imrope"}
"""The rotary pairs in a row of K by llama.cpp's `enum llama_rope_type`: norm pairs 2i with 2i + 1,
neox i with i + n_rot/2, the others as neox but with positions of several dimensions."""


@dataclass
class Filters:
    """Q-filters of one model, in the basis of a row of llama.cpp's K cache (after RoPE).

    Attributes:
        vectors: kind -> model layer -> array; all kinds have the same layers, ascending:

            - "filters": float32 [n_head_kv, head_dim]; unit vectors (arXiv 2503.02812)
              averaged over the query heads of a KV head and not normalised again; large
              projection = keep
            - "queries" (optional): float32 [n_head_kv, head_dim], the mean query before RoPE, mean
              over the query heads of the KV head; not of unit length
            - "moments" (optional): float16 [n_head, 1 + rank, head_dim], for every query head the
              rows r with log E[exp(logit of key k)] = k.r[0] + sum_j (k.r[j])^2 over its queries
            - "learned" (optional): float16 [n_head_kv, n_head_kv*(head_dim + head_dim of V)], for
              the keys of all KV heads before RoPE and their values; the largest number is 1
        calibration: provenance, text or whole numbers (qfilters.calibration)
        quality: float32 fit figures (qfilters.quality), one number per KV head of all layers in
            turn; those not in QUALITY may have any size
        layout: one of LAYOUTS; None: not known, as in files of versions 1 and 2
        fingerprint: of the tensors these were read beside; None: not known
        policy: the one that a test found to be best for the model; None: there was no test
        version: of the schema these were read from
    """

    vectors: dict[str, dict[int, np.ndarray]]
    calibration: dict[str, str | int] = field(default_factory=dict)
    quality: dict[str, np.ndarray] = field(default_factory=dict)
    layout: str | None = None
    fingerprint: str | None = None
    policy: str | None = None
    version: int = VERSION

    @property
    def layers(self) -> list[int]:
        """Model layers that have filters."""
        return list(self.vectors["filters"])

    @property
    def n_head_kv(self) -> list[int]:
        """KV heads of each of `layers`."""
        return [len(rows) for rows in self.vectors["filters"].values()]

    @property
    def head_dim(self) -> list[int]:
        """Size of a head in each of `layers`."""
        return [rows.shape[1] for rows in self.vectors["filters"].values()]

    @property
    def rank(self) -> int:
        """Directions per query head in the moments, 0 without moments."""
        moments = self.vectors.get("moments")
        return next(iter(moments.values())).shape[1] - 1 if moments else 0

    @property
    def requires(self) -> list[str]:
        """What a reader of these filters has to understand."""
        return [kind for kind in REQUIRED if kind in self.vectors]

    @property
    def size(self) -> str:
        """For the user: layers x KV heads x head size."""
        return (
            f"{len(self.layers)} layers x {span(self.n_head_kv)} KV heads x {span(self.head_dim)}"
        )

    def figures(self, name: str) -> list[np.ndarray] | None:
        """Quality figure `name` of each of `layers`: [n_head_kv], or [1] for one number per layer;
        None if it has another size."""
        values = np.ravel(self.quality[name])
        if values.size == sum(self.n_head_kv):
            return np.split(values, np.cumsum(self.n_head_kv)[:-1])
        return np.split(values, values.size) if values.size == len(self.layers) else None


def span(numbers) -> str:
    """One number, or the least and largest if they differ."""
    numbers = list(numbers)
    least, largest = min(numbers), max(numbers)
    return str(least) if least == largest else f"{least} to {largest}"
