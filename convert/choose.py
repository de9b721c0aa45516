"""The test that chooses the policy of a file. Which policy is best depends on the model: filters say
nothing where queries and keys are normalized, and a small model can hardly be predicted from what it
repeats."""

from __future__ import annotations

import numpy as np

from .. import engine_log
from ..config import QFilterConfig
from ..engine import Model
from ..evaluation import needle, run, tasks
from ..evaluation.results import Results
from ..machine import n_threads
from ..offload import Cache
from ..shape import model_shape

DEFAULT = str(QFilterConfig.policy)
OTHER = "kvdiff"
"""It needs no filters. (`keydiff` finds more in Gemma 3, but perplexity is as with `streaming`.)"""
LENGTH, DOCUMENTS, NEEDLES = 1024, 4, 5
"""Tokens of a document, documents, hidden numbers in each."""
RATIOS, WINDOW = (4, 8), 32
"""How far a document is compressed, at once, and the newest tokens that stay."""
QUESTION = 64
"""Tokens of a question and its answer, at most."""


def fits(gguf) -> bool:
    """Was the model trained for texts as long as those of the test?"""
    n_ctx_train = model_shape(gguf).n_ctx_train
    return not 0 < n_ctx_train < LENGTH + QUESTION


def losses(gguf, filters, policies, n_gpu_layers, seed: int, bar) -> dict[str, np.ndarray]:
    """Policy -> loss per digit of each needle, the mean over RATIOS: [needles]. They are hidden in
    text that filters were not calibrated on.

    Args:
        filters: those for the file, which need not be in it yet.
        bar: as `progress.progress`.
    """
    variants = tuple(run.variants(list(policies), list(RATIOS), None))
    plan = run.Plan("prefill", variants, window_length=WINDOW, context={"n_threads": n_threads()})
    with Model(gguf, n_gpu_layers=n_gpu_layers, caches=[Cache(2 * LENGTH)]) as model:
        model.filters = filters
        haystack = tasks.Haystack(tasks.read_text(None), lambda part: len(model.tokens(part)))
        documents = needle.documents(haystack, [LENGTH], DOCUMENTS, NEEDLES, seed)
        results = Results(None, {}, run.KEY)
        with engine_log.errors():
            run.run(
                model, documents, plan, results,
                bar=lambda _, total: bar("testing policies", total),
            )  # fmt: skip
    found = {policy: [] for policy in policies}
    for variant in variants:
        answers = run.answers(documents, variant, results)
        found[variant.policy].append([answer["nll"] for answer in answers])
    return {policy: np.mean(values, axis=0) for policy, values in found.items()}


def best(found: dict[str, np.ndarray]) -> str:
    """The policy with the least loss. The default, unless another is better by two standard errors:
    few needles say little about small differences."""
    clearly = [DEFAULT]
    for policy, values in found.items():
        gain = found[DEFAULT] - values
        if gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5:
            clearly.append(policy)
    return min(clearly, key=lambda policy: found[policy].mean())
