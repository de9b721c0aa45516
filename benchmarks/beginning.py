"""Which part of the beginning has to stay: is a system prompt still obeyed after a long message?

Each of ten system prompts says with which words every answer has to begin. A long text and a question
follow, and the model answers; three questions for each, so 30 checks. The same with the full cache,
with 4 sinks, with sinks of 2, 5 and 10 % of the cells, and with the whole system prompt as sinks.

    python benchmarks/beginning.py qwen-qf.gguf --lengths 4096 --ratio 8 --json docs/beginning.json

With --results the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from qfllama import QFilterConfig
from qfllama.bench.measure import text_tokens
from qfllama.commands.options import CommaList
from qfllama.conversation import formatter, tokenize_all
from qfllama.engine import Context, Model
from qfllama.evaluation.questions import found
from qfllama.evaluation.results import Results, grouped
from qfllama.evaluation.run import Plan, cut
from qfllama.evaluation.scoring import Mark, generate, score
from qfllama.evaluation.tasks import read_text
from qfllama.files import write_json
from qfllama.machine import n_threads, provenance
from qfllama.state import filters_identity, model_identity
from qfllama.tables import aligned

SYSTEM = (
    "You are the assistant of {where}. People send you long texts and ask about them. "
    'Begin every answer with the words "{words}", whatever you are asked. '
    "After these words, answer in one or two sentences. You are polite, you do not invent facts, and "
    "you say so when a text does not have the answer."
)
RULES = (
    ("a harbour office", "Aye, captain:"), ("a public library", "Dear reader,"),
    ("a court of law", "Let it be noted:"), ("a toy shop", "Beep boop!"),
    ("a newspaper", "Breaking news:"), ("a mountain hut", "Greetings, hiker!"),
    ("a school", "Good question, class."), ("a theatre", "The curtain rises:"),
    ("a bakery", "Fresh from the oven:"), ("a railway station", "Attention please:"),
)  # fmt: skip
QUESTIONS = (
    "What is this text about?", "What does the text say first?", "Which title would suit the text?",
)  # fmt: skip
MARK = "-the message-"
N_ANSWER = 24
"""Tokens of an answer; the words that it has to begin with are fewer."""


@dataclass(frozen=True)
class Check:
    """ids: up to where the answer begins; before, right: the same and the right words, as tokens."""

    ids: list[int]
    before: list[int]
    right: list[int]
    words: str


@dataclass(frozen=True)
class Task:
    """ids: what all checks begin with; n_system: tokens before the user's message."""

    ids: list[int]
    n_system: int
    checks: list[Check]


def tasks(model: Model, tokens: list[int], length: int, n_rules: int) -> Iterator[Task]:
    """A stretch of the text, about `length` tokens with all around it, for each of the rules."""
    template = formatter(model, model.metadata()["tokenizer.chat_template"])
    for number, (where, words) in enumerate(RULES[:n_rules]):
        messages = [
            {"role": "system", "content": SYSTEM.format(where=where, words=words)},
            {"role": "user", "content": MARK},
        ]
        head, mark, tail = template(messages=messages).prompt.partition(MARK)
        assert mark
        n_system = len(tokenize_all(model, head))
        n_text = length - n_system - 32
        start = number * n_text % max(1, len(tokens) - n_text)
        text = model.text(tokens[start : start + n_text])
        checks, wholes = [], []
        for question in QUESTIONS:
            whole = f"{head}{text}\n\n{question}{tail}"
            wholes.append(tokenize_all(model, whole))
            checks.append(
                (wholes[-1], *cut(model, wholes[-1], tokenize_all(model, whole + words)), words)
            )
        # the questions differ from their first word on
        n = next(i for i, ids in enumerate(zip(*wholes, strict=False)) if len(set(ids)) > 1)
        yield Task(
            wholes[0][:n], n_system,
            [Check(ids[n:], before[n:], right, words) for ids, before, right, words in checks],
        )  # fmt: skip


SINKS = {
    "4 sinks": lambda n_cells, n_system: 4,
    "2 %": lambda n_cells, n_system: n_cells * 2 // 100,
    "5 %": lambda n_cells, n_system: n_cells * 5 // 100,
    "10 %": lambda n_cells, n_system: n_cells * 10 // 100,
    "system prompt": lambda n_cells, n_system: n_system,
}
"""Each gives a number of sinks."""
KEY = ("length", "ratio", "rule", "setting", "recall", "check")


def ask(context: Context, check: Check, mark: Mark) -> dict:
    nll = score(context, check.before, check.right).nll
    mark.back()
    wrote = generate(context, check.ids, N_ANSWER).strip()
    mark.back()
    obeyed = found(wrote[: len(check.words) + 2], (check.words,))
    return {"obeyed": obeyed, "nll": round(nll, 5), "wrote": wrote}


def measure(model: Model, task: Task, base: dict, results: Results, args) -> list[dict]:
    """One result for each setting and check; those that `results` has are not measured again.

    Args:
        base: length, ratio and rule; ratio None: the full cache.
    """
    n, extra = len(task.ids), 64 + N_ANSWER
    common = {"n_ctx": n + extra, "n_threads": args.threads}
    n_cells = base["ratio"] and int(n / base["ratio"])
    wanted = [
        base | {"setting": setting, "recall": recall, "check": number}
        for setting in (args.settings if n_cells else ["full"])
        for recall in ((True, False) if n_cells else (False,))
        for number in range(len(task.checks))
    ]

    def answer(context: Context, records: list[dict]) -> None:
        mark = Mark(context, extra)
        for record in records:
            results.add(record | ask(context, task.checks[record["check"]], mark))

    missing = grouped([r for r in wanted if r not in results], itemgetter("setting"))
    for setting, records in missing.items():
        if n_cells is None:
            with model.open(Plan("stream", ()).whole(n + extra), **common) as context:
                context.read(task.ids)
                answer(context, records)
            continue
        config = {
            "max_length": n_cells, "policy": args.policy,
            "sinks": SINKS[setting](n_cells, task.n_system),
        }  # fmt: skip
        with model.open(QFilterConfig(**config), **common) as context:
            context.read(task.ids)
            state = context.state()
            answer(context, [record for record in records if record["recall"]])
        with model.open(QFilterConfig(**config, archive=False), **common) as context:
            assert context.restore(state)
            answer(context, [record for record in records if not record["recall"]])
    return [results.get(record) for record in wanted]


def summary(results: list[dict]) -> list[dict]:
    names = ("length", "ratio", "setting", "recall")
    return [
        dict(zip(names, key, strict=True))
        | {
            "n": len(mine), "obeyed": sum(r["obeyed"] for r in mine),
            "nll": round(sum(r["nll"] for r in mine) / len(mine), 4),
        }
        for key, mine in grouped(results, itemgetter(*names)).items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument(
        "--lengths", type=CommaList(int), default=(4096,), help="tokens of a prompt"
    )
    parser.add_argument("--ratio", type=CommaList(float), default=(8.0,))
    parser.add_argument("--policy", default=QFilterConfig.policy)
    parser.add_argument("--rules", type=int, default=len(RULES), help="the first of the rules")
    parser.add_argument("--settings", type=CommaList(choices=tuple(SINKS)), default=tuple(SINKS))
    parser.add_argument("--text", type=Path, help="text file [default: the built-in text]")
    parser.add_argument("--threads", type=int, default=n_threads())
    parser.add_argument(
        "--results", type=Path, metavar="FILE.jsonl", help="what was measured so far"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    measured = []
    with Model(args.model) as model:
        needed = max(args.lengths) * args.rules
        tokens = (
            model.tokens(args.text.read_text("utf-8")[: 8 * needed])
            if args.text
            else text_tokens(model, needed)
        )
        about = {
            "model": model_identity(args.model), "filters": filters_identity(model.filters),
            "policy": args.policy, "rules": args.rules,
            "text": read_text(args.text).sha256, "tokens": len(tokens),
        }  # fmt: skip
        with Results(args.results, about, KEY) as results:
            for length, ratio in itertools.product(args.lengths, [None, *args.ratio]):
                for number, task in enumerate(tasks(model, tokens, length, args.rules)):
                    base = {"length": length, "ratio": ratio, "rule": number}
                    measured += measure(model, task, base, results, args)
                    print(f"{length:,} tokens, {ratio or 'full'}: rule {number + 1}", flush=True)
    rows = summary(measured)
    cells = [["tokens", "ratio", "", "recall", "obeyed", "nll"]]
    for row in rows:
        cells.append([
            f"{row['length']:,}", f"x{row['ratio']:g}" if row["ratio"] else "", row["setting"],
            "on" if row["recall"] else "", f"{row['obeyed']} of {row['n']}", f"{row['nll']:.3f}",
        ])  # fmt: skip
    print(aligned(cells))
    if args.json:
        write_json(
            args.json, {"about": provenance(args.threads), "rows": rows, "results": measured}
        )


if __name__ == "__main__":
    main()
