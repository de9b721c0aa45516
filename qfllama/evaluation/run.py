"""Ask questions about documents in caches of all policies and sizes.

    prefill   the whole document is read into a full cache, then compressed once
    stream    the document is read into a small cache that evicts on the way

What is the same for all policies is done once: one context reads a document up to the first
eviction, and its state then goes to all others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from qfllama import native, replay
from qfllama.config import EngineError, QFilterConfig, QFilterError
from qfllama.engine import Context, Model
from qfllama.evaluation.results import Results
from qfllama.evaluation.scoring import Mark, score
from qfllama.evaluation.tasks import Document, Question
from qfllama.progress import progress
from qfllama.state import cells_wanted

BATCH = 512
"""Tokens of a batch while nothing is evicted."""
FULL = "full"
"""In place of a policy: nothing is evicted."""
REPLAY = "replay"
"""In place of a policy: a second reading of the document decides what is kept."""
SETTINGS = ("prefill", "stream")
KEY = ("task", "length", "document", "question", "policy", "ratio", "max_length", "recall")
"""What tells results of questions apart."""
TYPES = ("type_k", "type_v")
"""Names of the types of a cache."""
WINDOW = 64
"""Default of window_length in `prefill`; in `stream` it is that of QFilterConfig."""


@dataclass(frozen=True)
class Variant:
    """A policy and how much it keeps.

    ratio, max_length: one of them; neither for FULL
    recall: do rows that a question looks at come back from the archive?
    types: of K and V; None: those of the plan
    """

    policy: str
    ratio: float | None = None
    max_length: int | None = None
    recall: bool = False
    types: tuple[str, str] | None = None

    @property
    def title(self) -> str:
        words = [self.policy, self.size, "/".join(dict.fromkeys(self.types or ()))]
        return " ".join(word for word in [*words, "recall" * self.recall] if word)

    @property
    def whole(self) -> bool:
        """Does it keep everything?"""
        return self.ratio is None and self.max_length is None

    @property
    def size(self) -> str:
        """`x4` or `512 cells`."""
        if self.whole:
            return ""
        return f"x{self.ratio:g}" if self.ratio else f"{self.max_length:,} cells"

    def cells(self, n_tokens: int) -> int:
        """Cells for n_tokens."""
        if self.whole:
            return n_tokens
        return min(n_tokens, cells_wanted(n_tokens, self.ratio, self.max_length))

    def key(self) -> dict:
        key = {"policy": self.policy, "ratio": self.ratio, "max_length": self.max_length}
        if self.recall:
            key["recall"] = True
        if self.types:
            key |= dict(zip(TYPES, self.types, strict=True))
        return key


def variants(
    policies: list[str],
    ratios: list[float] | None,
    max_lengths: list[int] | None,
    recalls: Iterable[bool] = (False,),
    types: Iterable[tuple[str, str] | None] = (None,),
) -> list[Variant]:
    """All combinations, FULL once for each of the types."""
    sizes = [{"ratio": ratio} for ratio in ratios or ()]
    sizes += [{"max_length": length} for length in max_lengths or ()]
    sizes = [size | {"recall": recall} for recall in recalls for size in sizes]
    result = []
    for policy in policies:
        for size in [{}] if policy == FULL else sizes:
            result += [Variant(policy, **size, types=pair) for pair in types]
    return list(dict.fromkeys(result))


@dataclass(frozen=True)
class Plan:
    """How the caches are used.

    setting: one of SETTINGS
    window_length, interval: None for their defaults; interval only matters in `stream`
    context: type_k, type_v, n_threads, as in `engine.context_params`
    """

    setting: str
    variants: tuple[Variant, ...]
    sinks: int = QFilterConfig.sinks
    window_length: int | None = None
    interval: int | None = None
    seed: int = 0
    context: dict = field(default_factory=dict)

    def open(self, model: Model, config: QFilterConfig, n_ctx: int) -> Context:
        """An empty cache of n_ctx positions."""
        return model.open(config, n_ctx=n_ctx, **self.context)

    def whole(self, n_tokens: int) -> QFilterConfig:
        """A cache that holds n_tokens."""
        return QFilterConfig(
            max_length=max(n_tokens, self.sinks + 1 + BATCH), window_length=0, sinks=self.sinks,
            interval=BATCH, policy="streaming", archive=False,
        )  # fmt: skip

    def config(self, variant: Variant, n_tokens: int, extra: int) -> QFilterConfig:
        """The cache of a variant for a document of n_tokens and `extra` tokens of an answer.

        Raises:
            QFilterError: what is kept can't hold sinks and window, or in `stream` an interval.
        """
        if variant.whole:
            return self.whole(n_tokens + extra)
        if self.setting == "stream":
            return self._stream_config(variant, n_tokens)
        window = WINDOW if self.window_length is None else self.window_length
        cells, least = variant.cells(n_tokens), self.sinks + max(1, window)
        if cells < least:
            raise QFilterError(
                f"{variant.title} of {n_tokens:,} tokens leaves {cells} cells, which can't hold "
                f"{self.sinks} sinks and a window of {window}: keep more, or use a smaller "
                "--window-length"
            )
        policy = "streaming" if variant.policy == REPLAY else variant.policy
        return QFilterConfig(
            max_length=max(n_tokens + extra, least + BATCH), window_length=window,
            sinks=self.sinks, interval=BATCH, policy=policy, seed=self.seed,
            archive=variant.recall,
        )  # fmt: skip

    def _stream_config(self, variant: Variant, n_tokens: int) -> QFilterConfig:
        try:
            return QFilterConfig(
                max_length=variant.cells(n_tokens), window_length=self.window_length,
                sinks=self.sinks, interval=self.interval, policy=variant.policy, seed=self.seed,
                archive=variant.recall,
            )  # fmt: skip
        except QFilterError as error:
            raise QFilterError(
                f"{variant.title} of {n_tokens:,} tokens: {error} (--window-length, --interval)"
            ) from None

    def first(self, n: int, variant: Variant, n_tokens: int) -> int:
        """How many of the first n tokens always stay: if a document is compressed once, at most half
        of what is left without the window."""
        if self.setting == "stream" or variant.whole:
            return n
        window = WINDOW if self.window_length is None else self.window_length
        return min(n, max(0, variant.cells(n_tokens) - max(1, window)) // 2)

    def shared(self, variant: Variant, n_tokens: int) -> int:
        """Tokens of a document that are read before anything is evicted."""
        return variant.cells(n_tokens) if self.setting == "stream" else n_tokens


def forks(
    model: Model,
    plan: Plan,
    tokens: list[int],
    todo: list[Variant],
    extra: int,
    read: Callable[[Context, list[int]], None],
) -> Iterator[tuple[Variant, Context]]:
    """Yields a context for every variant, in which the tokens before its first eviction are read.

    Args:
        extra: tokens that will be read after `tokens`.
        read: reads tokens in a context; called for the tokens that variants share.
    """
    stops: dict[int, list[Variant]] = {}
    for variant in todo:
        stops.setdefault(plan.shared(variant, len(tokens)), []).append(variant)
    n_ctx = len(tokens) + extra
    with plan.open(model, plan.whole(max(stops)), n_ctx) as reader:
        for stop, here in sorted(stops.items()):
            read(reader, tokens[reader.n_past() : stop])
            state = reader.state(flags=native.STATE_RESIZE)
            for variant in here:
                config = plan.config(variant, len(tokens), extra)
                with plan.open(model, config, n_ctx) as context:
                    if not context.restore(state):
                        raise EngineError("a saved sequence was refused")
                    yield variant, context


# -- questions

Ask = Callable[[Mark, Question], dict]
"""Asks a question after a mark; returns values about the answer, for the result. It does not go
back to the mark."""


@dataclass(frozen=True)
class Asking:
    """How questions are asked, and how many tokens that takes at most."""

    ask: Ask
    extra: Callable[[Model, Question], int]


def split(model: Model, question: Question) -> tuple[list[int], list[int]]:
    """Tokens of question and answer, made from both as one text: some tokenizers begin every text
    with a space. Tokens of white space at the start of the answer (in models that write digits one
    by one) count as part of the question."""
    return cut(model, model.tokens(question.text), model.tokens(question.text + question.answer))


def cut(model: Model, asked: list[int], both: list[int]) -> tuple[list[int], list[int]]:
    """The same, from the tokens of the question and those of question and answer."""
    n = len(os.path.commonprefix([asked, both]))
    asked, answer = both[:n], both[n:]
    while len(answer) > 1 and not model.text(answer[:1]).strip():
        asked.append(answer.pop(0))
    return asked, answer


def answer_likelihood(mark: Mark, question: Question) -> dict:
    """The answer is read, not written: fast, and it tells more than right or wrong."""
    result = score(mark.context, *split(mark.context.model, question))
    return {
        "nll": round(result.nll, 5),
        "n_tokens": result.n_tokens,
        "n_right": result.n_right,
        "right": result.right,
    }


def likelihood_tokens(model: Model, question: Question) -> int:
    return sum(map(len, split(model, question)))


BY_LIKELIHOOD = Asking(answer_likelihood, likelihood_tokens)


def run(
    model: Model,
    documents: list[Document],
    plan: Plan,
    results: Results,
    asking: Asking = BY_LIKELIHOOD,
    bar=progress,
) -> None:
    """Ask whatever has no result yet.

    Args:
        bar: makes the context that shows progress.

    Raises:
        QFilterError: a variant has too few cells for one of the documents.
    """
    todo = [(document, _missing(document, plan, results)) for document in documents]
    todo = [(document, missing) for document, missing in todo if missing]
    for document, missing in todo:
        n_tokens = len(document.tokens(model))
        for variant in missing:
            plan.config(variant, n_tokens, 0)
    total = sum(_cost(document, plan, missing) for document, missing in todo)
    with bar("questions about documents", total) as shown:
        for document, missing in todo:
            _run_document(model, document, plan, missing, results, asking, shown)


def _missing(document: Document, plan: Plan, results: Results) -> dict[Variant, list[int]]:
    """The questions that have no result, by variant."""
    missing = {
        variant: [
            i for i in range(len(document.questions)) if _key(document, i, variant) not in results
        ]
        for variant in plan.variants
    }
    return {variant: which for variant, which in missing.items() if which}


def _key(document: Document, question: int, variant: Variant) -> dict:
    return {
        "task": document.task,
        "length": document.length,
        "document": document.number,
        "question": question,
        **variant.key(),
    }


ASKING = 40
"""Tokens of a question and its answer, roughly, for the progress bar."""


def _cost(document: Document, plan: Plan, missing: dict[Variant, list[int]]) -> int:
    """Tokens to be read, roughly."""
    n = document.length
    shared = {variant: plan.shared(variant, n) for variant in missing}
    alone = sum(n - stop for stop in shared.values())
    return max(shared.values()) + alone + ASKING * sum(map(len, missing.values()))


def _run_document(model, document, plan, missing, results, asking, bar) -> None:
    tokens = document.tokens(model)
    extra = max(asking.extra(model, question) for question in document.questions)
    if any(variant.policy == REPLAY for variant in missing):
        extra = max(extra, replay.room(len(tokens)))

    def read(context: Context, part: list[int]) -> None:
        for i in range(0, len(part), BATCH):
            context.read(part[i : i + BATCH])
            bar.update(min(BATCH, len(part) - i))

    for variant, context in forks(model, plan, tokens, list(missing), extra, read):
        context.keep_first(plan.first(document.n_first, variant, len(tokens)))
        read(context, tokens[context.n_past() :])
        if plan.setting == "prefill":
            scores = None
            if variant.policy == REPLAY:
                scores = replay.scores(context, tokens, model.tokens, model.path)
            context.compress(variant.cells(len(tokens)), scores=scores)
        cells, mark = context.used(), Mark(context, extra)
        for i in missing[variant]:
            question = document.questions[i]
            answer = asking.ask(mark, question)
            mark.back()
            bar.update(ASKING)
            results.add({**_key(document, i, variant), "cells": cells, **question.labels, **answer})


def answers(documents: list[Document], variant: Variant, results: Results) -> list[dict]:
    """The results of a variant, in order."""
    return [
        results.get(_key(document, i, variant))
        for document in documents
        for i in range(len(document.questions))
    ]
