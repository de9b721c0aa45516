"""What is measured: which caches, at which positions."""

from __future__ import annotations

from dataclasses import dataclass

from qfllama.config import QFilterConfig, QFilterError
from qfllama.context import cache_type
from qfllama.machine import n_threads as all_threads
from qfllama.offload import Cache

DEFAULTS = {
    "positions": (512, 1024, 2048, 4096, 8192, 16384, 32768),
    "prompts": (512, 1024, 2048),
    "max_lengths": (512, 1024, 2048, 4096),
    "types": ("f16", "q8_0"),
    "stock_types": ("f16", "q8_0", "q4_0"),
    "repeat": 3,
}
QUICK = {
    "positions": (512, 1024, 2048),
    "prompts": (1024,),
    "max_lengths": (512,),
    "types": ("f16",),
    "stock_types": ("f16",),
    "repeat": 1,
}
"""What is measured by default, up to n_ctx."""
DECODED = 10
"""For the progress bar: decoding a token takes about as long as reading this many."""
QUESTION = 64
"""Tokens of the question whose recall is timed."""


@dataclass(frozen=True)
class Kind:
    """A cache that takes part: its type, and its bound; None is the stock full cache."""

    type_kv: str
    max_length: int | None = None

    @property
    def name(self) -> str:
        return f"{self.max_length or 'stock'} {self.type_kv}"


BASELINE = Kind("f16")
"""The cache that every ratio is relative to."""


@dataclass(frozen=True)
class Plan:
    """What is measured. Lengths are in tokens, ascending; `n_ctx` is what each context is opened
    with; `decode`: tokens decoded before each position; `repeat`: times that prompts and questions
    are read; `recall`: our caches have an archive, and a question is asked at each position."""

    kinds: tuple[Kind, ...]
    positions: tuple[int, ...]
    prompts: tuple[int, ...]
    n_ctx: int
    policy: str = QFilterConfig.policy
    n_threads: int = 1
    decode: int = 64
    repeat: int = 3
    n_gpu_layers: int | str = "auto"
    recall: bool = False

    def caches(self) -> list[Cache]:
        """All caches, which are open at once."""
        types = {kind: cache_type(kind.type_kv) for kind in self.kinds}
        return [
            Cache(min(kind.max_length or self.n_ctx, self.n_ctx), types[kind], types[kind])
            for kind in self.kinds
        ]

    @property
    def work(self) -> int:
        """Steps of the progress bar; see DECODED."""
        steps = max(self.prompts, default=0) * self.repeat
        for before, position in zip((0, *self.positions), self.positions, strict=False):
            decoded = min(self.decode, position - before)
            steps += position - before - decoded + DECODED * decoded
            steps += QUESTION * self.repeat * self.recall
        return len(self.kinds) * steps


def make_plan(
    n_ctx_train: int,
    *,
    quick: bool = False,
    n_ctx: int | None = None,
    policy: str = QFilterConfig.policy,
    n_threads: int | None = None,
    decode: int = 64,
    n_gpu_layers: int | str = "auto",
    recall: bool = False,
    **given,
) -> tuple[Plan, list[str]]:
    """A plan, and notes on which defaults are left out.

    Args:
        quick: defaults are those of QUICK, not DEFAULTS.
        n_ctx: None for the last position or prompt; without it no more than n_ctx_train.
        n_threads: None for all.
        n_gpu_layers: as in `engine.Model`.
        recall: our caches have an archive, and a question is asked at each position.
        given: values in place of those in DEFAULTS; None is the default.

    Raises:
        QFilterError: nothing to measure, no such type, sizes that don't fit.
    """
    given = {name: value for name, value in given.items() if value is not None}
    wanted = (QUICK if quick else DEFAULTS) | given
    limit = n_ctx or n_ctx_train
    why = f"--n-ctx {n_ctx:,}" if n_ctx else f"the {n_ctx_train:,} that the model was trained for"
    notes = []
    for name in ("positions", "prompts"):
        lengths = sorted(set(wanted[name]))
        fitting = [n for n in lengths if n <= limit]
        if name in given and fitting != lengths:
            raise QFilterError(
                f"{lengths[-1]:,} in --{name} is beyond {why}: use --n-ctx {lengths[-1]}"
            )
        if fitting != lengths and name == "positions":
            notes.append(f"positions end at {limit:,}: {why}; a larger --n-ctx goes beyond")
        wanted[name] = tuple(fitting or lengths and [limit])
    last = max((*wanted["positions"], *wanted["prompts"]), default=0)
    if last == 0:
        raise QFilterError("--positions and --prompts are both none: give one of them")
    kinds = _kinds(wanted, last, "max_lengths" in given)
    if recall and not wanted["positions"]:
        raise QFilterError("--recall asks at each of --positions: give some")
    if recall and n_ctx and n_ctx < (needed := max(wanted["positions"]) + QUESTION):
        raise QFilterError(f"--recall asks behind the last position: use --n-ctx {needed} or more")
    n_ctx = n_ctx or last + QUESTION * recall
    return Plan(
        kinds, wanted["positions"], wanted["prompts"], n_ctx, policy,
        n_threads or all_threads(), decode, wanted["repeat"], n_gpu_layers, recall,
    ), notes  # fmt: skip


def _kinds(wanted: dict, last: int, lengths_given: bool) -> tuple[Kind, ...]:
    """The caches, stock first; default lengths only if a text of `last` tokens fills them."""
    lengths = [n for n in sorted(set(wanted["max_lengths"])) if lengths_given or n < last]
    if not lengths or not wanted["types"]:
        raise QFilterError(
            f"no cache of ours is left to measure up to {last:,} tokens: give a smaller "
            "--max-length and --types, or larger --positions or --prompts"
        )
    for length in lengths:
        QFilterConfig(max_length=length)
    for name in (*wanted["types"], *wanted["stock_types"]):
        cache_type(name)
    stock = [BASELINE, *(Kind(name.lower()) for name in wanted["stock_types"])]
    ours = [Kind(name.lower(), n) for n in lengths for name in wanted["types"]]
    return tuple(dict.fromkeys(stock + ours))
