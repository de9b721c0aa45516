"""Measuring what a bounded cache gains: speed, time to the first token and memory beside stock caches.

All caches are open at once in one process, on weights loaded once, and take turns of half a second
or so: whatever else the machine does meets all of them. A decoded token is one more token of the
text: the speed does not depend on which one.

Memory: nobody but the engine whose turn it is allocates anything, so what the process grows by in
an engine's turns, from the opening of its cache on, is the memory of that engine.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import jinja2
import llama_cpp._internals as internals

from qfllama.config import QFilterConfig, QFilterError
from qfllama.llama import Llama, cache_type
from qfllama.machine import provenance

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
"""What is measured unless something else is asked for, as far as n_ctx reaches."""
SLICES = 8
"""Turns in which the tokens before a position are decoded; the median is taken over them."""
READ_AT_ONCE = 512
"""Tokens read in one turn, or a few less: whole batches."""
DECODED = 10
"""Of the progress bar: a token decoded takes about as long as so many tokens read."""
MIB = 1 << 20

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Kind:
    """A cache that takes part: its type, and its bound; None is the stock full cache."""

    type_kv: str
    max_length: int | None = None

    @property
    def name(self) -> str:
        return f"{self.max_length or 'stock'} {self.type_kv}"


BASELINE = Kind("f16")
"""What every ratio is against."""


@dataclass(frozen=True)
class Plan:
    """What is measured. Lengths are in tokens, ascending; `n_ctx` is what each context is opened
    with; `decode`: tokens decoded before each position; `repeat`: times that prompts are read."""

    kinds: tuple[Kind, ...]
    positions: tuple[int, ...]
    prompts: tuple[int, ...]
    n_ctx: int
    policy: str = QFilterConfig.policy
    threads: int = 1
    decode: int = 64
    repeat: int = 3
    n_gpu_layers: int = 0

    @property
    def work(self) -> int:
        """Steps of the progress bar; see DECODED."""
        steps = max(self.prompts, default=0) * self.repeat
        for before, position in zip((0, *self.positions), self.positions, strict=False):
            decoded = min(self.decode, position - before)
            steps += position - before - decoded + DECODED * decoded
        return len(self.kinds) * steps


def make_plan(
    n_ctx_train: int,
    *,
    quick: bool = False,
    n_ctx: int | None = None,
    policy: str = QFilterConfig.policy,
    threads: int | None = None,
    decode: int = 64,
    n_gpu_layers: int = 0,
    **given,
) -> tuple[Plan, list[str]]:
    """A plan, and notes on what of the defaults is left out.

    Args:
        quick: defaults are those of QUICK, not DEFAULTS.
        n_ctx: None for the last position or prompt; without it no more than n_ctx_train.
        threads: None for all.
        given: what DEFAULTS names, where it shall be something else; None is the default.

    Raises:
        QFilterError: nothing to measure, no such type, sizes that don't fit.
    """
    given = {name: value for name, value in given.items() if value is not None}
    wanted = (QUICK if quick else DEFAULTS) | given
    limit = n_ctx or n_ctx_train
    why = f"--n-ctx {n_ctx:,}" if n_ctx else f"the {n_ctx_train:,} that the model was trained on"
    notes = []
    for name in ("positions", "prompts"):
        lengths = sorted(set(wanted[name]))
        fitting = [n for n in lengths if n <= limit]
        if name in given and fitting != lengths:
            raise QFilterError(
                f"{lengths[-1]:,} in --{name} is beyond {why}: --n-ctx {lengths[-1]} goes there"
            )
        if fitting != lengths and name == "positions":
            notes.append(f"positions end at {limit:,}: {why}; a larger --n-ctx goes beyond")
        wanted[name] = tuple(fitting or lengths and [limit])
    last = max((*wanted["positions"], *wanted["prompts"]), default=0)
    if last == 0:
        raise QFilterError("--positions and --prompts are both none: give one of them")
    kinds = _kinds(wanted, last, "max_lengths" in given)
    return Plan(
        kinds, wanted["positions"], wanted["prompts"], n_ctx or last, policy,
        threads or os.cpu_count() or 1, decode, wanted["repeat"], n_gpu_layers,
    ), notes  # fmt: skip


def _kinds(wanted: dict, last: int, lengths_given: bool) -> tuple[Kind, ...]:
    """The caches, stock first; of default lengths only those that a text of `last` tokens fills."""
    lengths = [n for n in sorted(set(wanted["max_lengths"])) if lengths_given or n < last]
    if not lengths or not wanted["types"]:
        raise QFilterError(
            f"no cache of ours is left to measure up to {last:,} tokens: give a smaller "
            "--max-length and --types, or go further"
        )
    for length in lengths:
        QFilterConfig(max_length=length)
    for name in (*wanted["types"], *wanted["stock_types"]):
        cache_type(name)
    stock = [BASELINE, *(Kind(name.lower()) for name in wanted["stock_types"])]
    ours = [Kind(name.lower(), n) for n in lengths for name in wanted["types"]]
    return tuple(dict.fromkeys(stock + ours))


# -- reading and decoding


def text_tokens(llm: Llama, n: int) -> list[int]:
    """The first n tokens of a text that every Python has; from the start again if it is short."""
    text = "\n".join(topics.topics.values())
    tokens = llm.tokenize(text.encode())
    return (tokens * (n // len(tokens) + 1))[:n]


def read_up_to(llm: Llama, tokens: list[int], position: int) -> None:
    """Read the tokens from where `llm` is up to `position`."""
    llm.eval(tokens[llm.n_tokens : position])


def decode(llm: Llama, tokens: list[int], n: int) -> float:
    """Seconds for the next n tokens, one at a time."""
    start = time.perf_counter()
    for token in tokens[llm.n_tokens : llm.n_tokens + n]:
        llm.eval([token])
    return time.perf_counter() - start


def evicting_seconds(stats: dict[str, int]) -> float:
    """Time of all evictions that `Llama.qfilter_stats` counts."""
    return (stats["score_us"] + stats["select_us"] + stats["gather_us"]) / 1e6


def resident_bytes(field: str = "RssAnon") -> int | None:
    """Memory of this process that is no file's; `VmRSS`: with the mapped weights. None where the
    system doesn't tell (only Linux does)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def available_bytes() -> int | None:
    """Memory that is free or can be made so; None where the system doesn't tell."""
    try:
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def give_back_freed() -> None:
    """Freed memory back to the system: what is allocated next counts as growth again. glibc only."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# -- engines


class Borrowed(internals.LlamaModel):
    """The weights of another Llama: closing this leaves them."""

    def __init__(self, owner: internals.LlamaModel):
        self.__dict__ = owner.__dict__

    def close(self) -> None:
        pass


@contextmanager
def weights_of(owner: Llama) -> Iterator[None]:
    """Every Llama made meanwhile has its own cache and shares the weights of `owner`.

    Upstream's constructor always loads them; a copy for every engine would not fit a GPU, and
    neither memory where llama.cpp rearranges the weights for the CPU.
    """
    original = internals.LlamaModel
    internals.LlamaModel = lambda **_: Borrowed(owner._model)
    try:
        yield
    finally:
        internals.LlamaModel = original


@dataclass
class Engine:
    """One cache and what was seen of it."""

    kind: Kind
    llm: Llama
    kv_bytes: int
    opened_bytes: int | None = None
    grown_bytes: int | None = None
    evictions: int = 0  # since `restart`
    per_eviction: list[float] = field(default_factory=list)  # seconds, one figure per turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Whatever `llm` does goes into the block: memory and evictions are counted there."""
        memory, before = resident_bytes(), self.stats()
        yield
        after = self.stats()
        if n := after["evictions"] - before["evictions"]:
            self.evictions += n
            self.per_eviction.append((evicting_seconds(after) - evicting_seconds(before)) / n)
        if memory is not None and self.grown_bytes is not None:
            self.grown_bytes += resident_bytes() - memory

    def stats(self) -> dict[str, int]:
        """`Llama.qfilter_stats`, or what of it a stock cache has."""
        if self.kind.max_length is None:
            times = {"score_us": 0, "select_us": 0, "gather_us": 0}
            return times | {"evictions": 0, "cells_used": self.llm.n_tokens}
        return self.llm.qfilter_stats()

    def restart(self) -> None:
        """An empty cache."""
        self.llm.reset()
        self.evictions = 0

    def read(self, tokens: list[int], stop: int) -> float:
        """One turn of reading towards `stop`; seconds."""
        n_batch = self.llm.n_batch
        at_once = max(1, READ_AT_ONCE // n_batch) * n_batch
        with self.turn():
            start = time.perf_counter()
            read_up_to(self.llm, tokens, min(stop, self.llm.n_tokens + at_once))
            return time.perf_counter() - start

    def first_token(self) -> float:
        """Seconds to choose a token after a prompt."""
        with self.turn():
            start = time.perf_counter()
            self.llm.sample(temp=0.0)
            return time.perf_counter() - start

    def decode(self, tokens: list[int], n: int) -> float:
        """One turn of decoding n tokens; seconds per token, without evictions."""
        before = self.stats()
        with self.turn():
            seconds = decode(self.llm, tokens, n)
        return (seconds - evicting_seconds(self.stats()) + evicting_seconds(before)) / n

    def eviction_seconds_per_token(self) -> float:
        """An eviction comes once in `interval` tokens; 0 as long as there was none."""
        if not self.evictions:
            return 0.0
        return statistics.median(self.per_eviction) / self.llm.qfilter_config.interval


class Engines:
    """All caches of a plan on one GGUF file, on weights loaded once: open, measure, close."""

    def __init__(self, plan: Plan, path: str | Path):
        self.plan, self.path = plan, str(path)
        self.each: list[Engine] = []
        self.tokens: list[int] = []
        self.process_bytes: int | None = None
        self._owner: Llama | None = None

    def open(self, progress: Progress = lambda n: None) -> None:
        """Open everything; `progress(0)` is called after each cache.

        Raises:
            QFilterError: a cache that this model or this machine can't have.
        """
        plan = self.plan
        self._owner = self._llama(BASELINE, n_ctx=256)
        self.tokens = text_tokens(self._owner, max((*plan.positions, *plan.prompts)))
        with weights_of(self._owner):
            full_bytes = {name: self._full_bytes(name) for name in {k.type_kv for k in plan.kinds}}
            self._check_memory(full_bytes)
            self._warm_up()
            for kind in plan.kinds:
                self.each.append(self._open(kind, full_bytes[kind.type_kv]))
                progress(0)

    def _warm_up(self) -> None:
        """Threads are started and weights are in memory, which belongs to no engine."""
        self._owner.eval(self.tokens[:64])
        self._owner._ctx.close()
        give_back_freed()
        self.process_bytes = resident_bytes("VmRSS")

    def _open(self, kind: Kind, full_bytes: int) -> Engine:
        before = resident_bytes()
        llm = self._llama(kind)
        kv_bytes = full_bytes if kind.max_length is None else llm.qfilter_stats()["kv_bytes"]
        grown = None if before is None else resident_bytes() - before
        return Engine(kind, llm, kv_bytes, grown, grown)

    def _llama(self, kind: Kind, **sizes) -> Llama:
        plan, config = self.plan, None
        if kind.max_length is not None:
            config = QFilterConfig(max_length=kind.max_length, policy=plan.policy)
        try:
            return Llama(
                self.path,
                qfilters=config,
                type_k=kind.type_kv,
                type_v=kind.type_kv,
                flash_attn=True,
                swa_full=False,  # as llama.cpp's own programs have it, and every bounded cache
                n_threads=plan.threads,
                n_threads_batch=plan.threads,
                n_gpu_layers=plan.n_gpu_layers,
                verbose=False,
                **({"n_ctx": plan.n_ctx} | sizes),
            )
        except QFilterError:
            raise
        except (ValueError, MemoryError, jinja2.TemplateError) as error:
            if self._owner is None:
                raise QFilterError(
                    f"{self.path}: llama.cpp can't use this file ({error}): give another model"
                ) from error
            raise QFilterError(
                f"the cache {kind.name} can't be opened ({error}): leave it out, or use a "
                "smaller --n-ctx"
            ) from error

    def _full_bytes(self, type_kv: str) -> int:
        """What the engine allocates for K and V of all positions. Only a bounded context tells."""
        bounded = [kind.max_length for kind in self.plan.kinds if kind.max_length is not None]
        probe = self._llama(Kind(type_kv, min(bounded)))
        try:
            return probe.qfilter_stats()["kv_bytes_full"]
        finally:
            probe.close()

    def _check_memory(self, full_bytes: dict[str, int]) -> None:
        plan, available = self.plan, available_bytes()
        needed = 0
        for kind in plan.kinds:
            share = 1 if kind.max_length is None else min(1, kind.max_length / plan.n_ctx)
            needed += int(full_bytes[kind.type_kv] * share)
        if available is not None and needed > available and not plan.n_gpu_layers:
            raise QFilterError(
                f"all caches together take {needed / MIB:,.0f} MiB, {available / MIB:,.0f} are "
                "free: use a smaller --n-ctx, or fewer of --max-length, --types and --stock-types"
            )

    def close(self) -> None:
        for engine in self.each:
            engine.llm.close()
        if self._owner is not None:
            self._owner.close()

    # -- measuring

    def measure(self, progress: Progress = lambda n: None) -> dict:
        """Everything, as plain values; see `result`. `progress(n)` is called after n steps of
        `Plan.work`.

        Raises:
            QFilterError: the engine failed.
        """
        try:
            first = self.first_tokens(progress)
            speeds = self.decode_speeds(progress)
        except RuntimeError as error:
            raise QFilterError(
                f"the engine failed ({error}): use a smaller --n-ctx or fewer caches"
            ) from error
        return self.result(speeds, first)

    def first_tokens(self, progress: Progress) -> list[dict]:
        """Seconds from a prompt to the first token, per prompt length and engine.

        One reading passes all lengths: a longer prompt begins as a shorter one does.
        """
        plan = self.plan
        seconds = {(engine.kind, n): [] for n in plan.prompts for engine in self.each}
        for _ in range(plan.repeat if plan.prompts else 0):
            reading = {engine.kind: 0.0 for engine in self.each}
            for engine in self.each:
                engine.restart()
            for stop in plan.prompts:
                for engine, taken in self._read(stop, progress):
                    reading[engine.kind] += taken
                for engine in self.each:
                    found = reading[engine.kind] + engine.first_token()
                    seconds[engine.kind, stop].append(found)
        return [
            {"engine": kind.name, "prompt": n, "seconds": statistics.median(found)}
            for (kind, n), found in seconds.items()
        ]

    def decode_speeds(self, progress: Progress) -> list[dict]:
        """Decoding speed and evictions, per position and engine."""
        rows = []
        for engine in self.each:
            engine.restart()
        for position in self.plan.positions:
            start = position - self.plan.decode
            for _ in self._read(start, progress):
                pass
            seconds = self._decode(position, progress)
            for engine in self.each:
                evicting = engine.eviction_seconds_per_token()
                per_token = statistics.median(seconds[engine.kind]) + evicting
                rows.append(
                    {
                        "engine": engine.kind.name,
                        "position": position,
                        "tokens_per_second": 1 / per_token,
                        "evictions": engine.evictions,
                        "eviction_percent": 100 * evicting / per_token,
                        "cells_used": engine.stats()["cells_used"],
                    }
                )
        return rows

    def _read(self, stop: int, progress: Progress) -> Iterator[tuple[Engine, float]]:
        """All engines read up to `stop`, in turns: (engine, seconds) of each turn."""
        while waiting := [engine for engine in self.each if engine.llm.n_tokens < stop]:
            for engine in waiting:
                before = engine.llm.n_tokens
                seconds = engine.read(self.tokens, stop)
                progress(engine.llm.n_tokens - before)
                yield engine, seconds

    def _decode(self, stop: int, progress: Progress) -> dict[Kind, list[float]]:
        """All engines decode up to `stop`, in turns: seconds per token of each turn."""
        seconds = {engine.kind: [] for engine in self.each}
        n = max(1, (stop - self.each[0].llm.n_tokens) // SLICES)
        while (left := stop - self.each[0].llm.n_tokens) > 0:
            for engine in self.each:
                seconds[engine.kind].append(engine.decode(self.tokens, min(n, left)))
                progress(DECODED * min(n, left))
        return seconds

    def result(self, speeds: list[dict], first: list[dict]) -> dict:
        """All figures with their ratios to BASELINE, and where they come from."""
        plan = self.plan
        engines = [
            {
                "engine": engine.kind.name,
                "max_length": engine.kind.max_length,
                "type_kv": engine.kind.type_kv,
                "kv_bytes": engine.kv_bytes,
                "opened_bytes": engine.opened_bytes,
                "filled_bytes": engine.grown_bytes,
                "process_bytes": self.process_bytes and self.process_bytes + engine.grown_bytes,
            }
            for engine in self.each
        ]
        add_ratios(engines, "kv_bytes", "kv_ratio")
        add_ratios(engines, "filled_bytes", "filled_ratio")
        add_ratios(speeds, "tokens_per_second", "ratio", by="position")
        add_ratios(first, "seconds", "ratio", by="prompt")
        about = provenance(plan.threads) | {
            "model": Path(self.path).name,
            "n_ctx": plan.n_ctx,
            "policy": plan.policy,
            "decode": plan.decode,
            "repeat": plan.repeat,
            "n_gpu_layers": plan.n_gpu_layers,
            "ratios_against": BASELINE.name,
            "process_bytes_without_cache": self.process_bytes,
        }
        return {"about": about, "memory": engines, "decode": speeds, "first_token": first}


def add_ratios(rows: list[dict], figure: str, ratio: str, by: str | None = None) -> None:
    """In each row the quotient of `figure` and that of BASELINE, in the row with the same `by`."""
    base = {row.get(by): row[figure] for row in rows if row["engine"] == BASELINE.name}
    for row in rows:
        row[ratio] = row[figure] and base[row.get(by)] and row[figure] / base[row.get(by)]
