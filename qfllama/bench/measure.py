"""Measuring what a bounded cache gains: speed, time to the first token and memory beside stock
caches.

All caches are open at once in one process, on weights loaded once, and take turns of about half a
second. So other load on the machine affects all of them alike. A decoded token is the next token of
the text: the speed does not depend on which token it is.

Memory: only the engine whose turn it is allocates anything. So the memory of an engine is what the
process grows by in its turns, from the opening of its cache on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import llama_cpp

from qfllama.bench.memory import MIB, give_back_freed, resident_bytes
from qfllama.bench.plan import BASELINE, DECODED, QUESTION, Kind, Plan
from qfllama.config import QFilterConfig, QFilterError
from qfllama.engine import Context, Model
from qfllama.machine import available_bytes, provenance
from qfllama.needs import check_policy
from qfllama.schema import read

SLICES = 8
"""Turns in which the tokens before a position are decoded; the median is taken over them."""
READ_AT_ONCE = 512
"""Most tokens read in one turn; it reads whole batches."""

Progress = Callable[[int], object]


def text_tokens(model: Model, n: int) -> list[int]:
    """The first n tokens of a text that every Python has; from the start again if it is short."""
    tokens = model.tokens("\n".join(topics.topics.values()), start=True)
    return (tokens * (n // len(tokens) + 1))[:n]


def decode(context: Context, tokens: list[int], n: int) -> float:
    """Seconds for the next n of a text's tokens, one at a time."""
    n_past = context.n_past()
    start = time.perf_counter()
    for token in tokens[n_past : n_past + n]:
        context.read([token], logits=True)
    return time.perf_counter() - start


def evicting_seconds(context: Context) -> float:
    """Time of all evictions since the context was made."""
    stats = context.stats()
    return (stats.t_score_us + stats.t_select_us + stats.t_gather_us) / 1e6


# -- engines


@dataclass
class Engine:
    """One cache and what was measured of it."""

    kind: Kind
    context: Context
    kv_bytes: int
    opened_bytes: int | None = None
    grown_bytes: int | None = None
    evictions: int = 0  # since `restart`
    per_eviction: list[float] = field(default_factory=list)  # seconds, one figure per turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Everything that `context` does must be in such a block: memory and evictions count."""
        memory, seconds = resident_bytes(), evicting_seconds(self.context)
        before = self.context.stats().n_evictions
        yield
        if n := self.context.stats().n_evictions - before:
            self.evictions += n
            self.per_eviction.append((evicting_seconds(self.context) - seconds) / n)
        if memory is not None and self.grown_bytes is not None:
            self.grown_bytes += resident_bytes() - memory

    def restart(self) -> None:
        """Empty the cache."""
        self.context.kv_cache_clear()
        self.evictions = 0

    def read(self, tokens: list[int], stop: int) -> float:
        """One turn of reading towards `stop`; returns its seconds."""
        n_batch = self.context.params.n_batch
        at_once = max(1, READ_AT_ONCE // n_batch) * n_batch
        with self.turn():
            start, n_past = time.perf_counter(), self.context.n_past()
            self.context.read(tokens[n_past : min(stop, n_past + at_once)], logits=True)
            return time.perf_counter() - start

    def first_token(self) -> float:
        """Seconds to choose a token after a prompt."""
        with self.turn():
            start = time.perf_counter()
            self.context.logits().argmax()
            return time.perf_counter() - start

    def decode(self, tokens: list[int], n: int) -> float:
        """One turn of decoding n tokens; returns seconds per token, without evictions."""
        before = evicting_seconds(self.context)
        with self.turn():
            seconds = decode(self.context, tokens, n)
        return (seconds - evicting_seconds(self.context) + before) / n

    def ask(self, question: list[int]) -> float:
        """Seconds to read a question, with its recall if there is any; then it is removed again."""
        with self.turn():
            start, n_past = time.perf_counter(), self.context.n_past()
            self.context.read_question(question)
            seconds = time.perf_counter() - start
            if not self.context.kv_cache_seq_rm(0, n_past, -1):
                raise RuntimeError(f"{self.kind.name}: the question can't be taken back")
        return seconds

    def eviction_seconds_per_token(self) -> float:
        """Seconds of evictions per token (one comes in `interval` tokens); 0 without evictions."""
        if not self.evictions:
            return 0.0
        return statistics.median(self.per_eviction) / self.context.config.interval


class Engines:
    """All caches of a plan on one GGUF file, on weights loaded once: open, measure, close."""

    def __init__(self, plan: Plan, path: str | Path):
        self.plan, self.path = plan, str(path)
        self.each: list[Engine] = []
        self.tokens: list[int] = []
        self.process_bytes: int | None = None
        self.model: Model | None = None

    def open(self, progress: Progress = lambda n: None) -> None:
        """Open everything; `progress(0)` is called after each cache.

        Raises:
            QFilterError: a cache that this model or this machine can't have.
        """
        plan = self.plan
        check_policy(self.path, read(self.path), plan.policy)
        self.model = Model(self.path, n_gpu_layers=plan.n_gpu_layers, caches=plan.caches())
        if plan.recall and llama_cpp.llama_model_is_hybrid(self.model.model):
            raise QFilterError("recurrent layers can't take a question back: leave out --recall")
        self.tokens = text_tokens(self.model, max((*plan.positions, *plan.prompts)) + QUESTION)
        full_bytes = {name: self._full_bytes(name) for name in {k.type_kv for k in plan.kinds}}
        self._check_memory(full_bytes)
        self._warm_up()
        for kind in plan.kinds:
            self.each.append(self._open(kind, full_bytes[kind.type_kv]))
            progress(0)

    def _warm_up(self) -> None:
        """Start threads and bring weights into memory: these belong to no engine."""
        with self._context(BASELINE, n_ctx=256) as context:
            context.read(self.tokens[:64], logits=True)
        give_back_freed()
        self.process_bytes = resident_bytes("VmRSS")

    def _open(self, kind: Kind, full_bytes: int) -> Engine:
        before = resident_bytes()
        context = self._context(kind)
        kv_bytes = full_bytes if kind.max_length is None else context.stats().n_bytes_kv
        grown = None if before is None else resident_bytes() - before
        return Engine(kind, context, kv_bytes, grown, grown)

    def _context(self, kind: Kind, **sizes) -> Context:
        plan, config = self.plan, None
        if kind.max_length is not None:
            config = QFilterConfig(
                max_length=kind.max_length, policy=plan.policy, archive=plan.recall
            )
        try:
            return self.model.open(
                config,
                **({"n_ctx": plan.n_ctx} | sizes),
                n_threads=plan.n_threads,
                type_k=kind.type_kv,
                type_v=kind.type_kv,
                swa_full=False,  # as llama.cpp's own programs have it, and every bounded cache
            )
        except QFilterError as error:
            raise QFilterError(
                f"the cache {kind.name} can't be opened ({error}): leave it out, or use a "
                "smaller --n-ctx"
            ) from error

    def _full_bytes(self, type_kv: str) -> int:
        """Bytes for K and V of all positions, as allocated. Only a bounded context tells."""
        bounded = [kind.max_length for kind in self.plan.kinds if kind.max_length is not None]
        with self._context(Kind(type_kv, min(bounded))) as probe:
            return probe.stats().n_bytes_kv_full

    def _check_memory(self, full_bytes: dict[str, int]) -> None:
        plan, available = self.plan, available_bytes()
        needed = 0
        for kind in plan.kinds:
            share = 1 if kind.max_length is None else min(1, kind.max_length / plan.n_ctx)
            needed += int(full_bytes[kind.type_kv] * share)
        if available is not None and needed > available and self.model.offload.n_layers == 0:
            raise QFilterError(
                f"all caches together take {needed / MIB:,.0f} MiB, {available / MIB:,.0f} are "
                "free: use a smaller --n-ctx, or fewer of --max-length, --types and --stock-types"
            )

    def close(self) -> None:
        for engine in self.each:
            engine.context.close()
        if self.model is not None:
            self.model.close()

    # -- measuring

    def measure(self, progress: Progress = lambda n: None) -> dict:
        """Everything, as plain values; see `result`. `progress(n)` is called after n steps of
        `Plan.work`.

        Raises:
            QFilterError: the engine failed.
        """
        try:
            first = self.first_tokens(progress)
            speeds, questions = self.decode_speeds(progress)
        except RuntimeError as error:
            raise QFilterError(
                f"the engine failed ({error}): use a smaller --n-ctx or fewer caches"
            ) from error
        return self.result(speeds, first, questions)

    def first_tokens(self, progress: Progress) -> list[dict]:
        """Seconds from a prompt to the first token, per prompt length and engine.

        One reading serves all lengths: a shorter prompt is the start of a longer one.
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

    def decode_speeds(self, progress: Progress) -> tuple[list[dict], list[dict]]:
        """Per position and engine: decoding speed and evictions; with `Plan.recall`, seconds of a
        question."""
        rows, questions = [], []
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
                        "cells_used": engine.context.used(),
                    }
                )
            if self.plan.recall:
                questions += self._ask(position, progress)
        return rows, questions

    def _ask(self, position: int, progress: Progress) -> list[dict]:
        """All engines are asked, in turns: seconds, and the tokens that came back."""
        question = self.tokens[position : position + QUESTION]
        seconds = {engine.kind: [] for engine in self.each}
        for _ in range(self.plan.repeat):
            for engine in self.each:
                seconds[engine.kind].append(engine.ask(question))
                progress(QUESTION)
        return [
            {
                "engine": engine.kind.name,
                "position": position,
                "seconds": statistics.median(seconds[engine.kind]),
                "recalled": 0 if engine.kind.max_length is None else len(engine.context.recalled()),
            }
            for engine in self.each
        ]

    def _read(self, stop: int, progress: Progress) -> Iterator[tuple[Engine, float]]:
        """All engines read up to `stop`, in turns: (engine, seconds) of each turn."""
        while waiting := [engine for engine in self.each if engine.context.n_past() < stop]:
            for engine in waiting:
                before = engine.context.n_past()
                seconds = engine.read(self.tokens, stop)
                progress(engine.context.n_past() - before)
                yield engine, seconds

    def _decode(self, stop: int, progress: Progress) -> dict[Kind, list[float]]:
        """All engines decode up to `stop`, in turns: seconds per token of each turn."""
        seconds = {engine.kind: [] for engine in self.each}
        n = max(1, (stop - self.each[0].context.n_past()) // SLICES)
        while (left := stop - self.each[0].context.n_past()) > 0:
            for engine in self.each:
                seconds[engine.kind].append(engine.decode(self.tokens, min(n, left)))
                progress(DECODED * min(n, left))
        return seconds

    def result(self, speeds: list[dict], first: list[dict], questions: list[dict]) -> dict:
        """All figures with their ratios to BASELINE, and where they come from."""
        plan = self.plan
        engines = [
            {
                "engine": engine.kind.name,
                "max_length": engine.kind.max_length,
                "type_kv": engine.kind.type_kv,
                "kv_bytes": engine.kv_bytes,
                "archive_bytes": engine.context.stats().n_bytes_archive,
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
        add_ratios(questions, "seconds", "ratio", by="position")
        about = provenance(plan.n_threads) | {
            "model": Path(self.path).name,
            "n_ctx": plan.n_ctx,
            "policy": plan.policy,
            "decode": plan.decode,
            "repeat": plan.repeat,
            "n_gpu_layers": self.model.offload.n_layers,
            "ratios_against": BASELINE.name,
            "process_bytes_without_cache": self.process_bytes,
        }
        return {
            "about": about,
            "memory": engines,
            "decode": speeds,
            "first_token": first,
            "question": questions,
        }


def add_ratios(rows: list[dict], figure: str, ratio: str, by: str | None = None) -> None:
    """Set in each row the ratio of `figure` to that of BASELINE in the row with the same `by`."""
    base = {row.get(by): row[figure] for row in rows if row["engine"] == BASELINE.name}
    for row in rows:
        row[ratio] = row[figure] and base[row.get(by)] and row[figure] / base[row.get(by)]
