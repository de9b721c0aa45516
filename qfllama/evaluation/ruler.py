"""Tasks after the descriptions in RULER (arXiv 2404.06654), made anew from any text.

The order is always: what this is about, the text, and only then the question. The question ends
with the start of its answer, so that models without a chat template know what is asked of them.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable

from qfllama.config import QFilterError
from qfllama.engine import Model
from qfllama.evaluation.results import bootstrap
from qfllama.evaluation.run import Asking, Variant, answer_likelihood, likelihood_tokens, split
from qfllama.evaluation.scoring import Mark, generate
from qfllama.evaluation.tasks import (
    NAMES,
    Document,
    Haystack,
    Question,
    depths,
    generator,
    number,
)
from qfllama.tables import aligned

NEEDLE = "The secret number of {} is {}."
INTRO = "The text below mentions secret numbers. Remember them, you will be asked for them.\n\n"
ASKED = "\n\n{} {}"
KEYS = 4
"""Needles of the tasks with several."""
HOPS = 4
COMMON, FREQUENT = 10, 3
"""Words that are asked for."""


class Material:
    """What the tasks are made of.

    Args:
        count: tokens of a text.
    """

    def __init__(self, haystack: Haystack, text: str, count: Callable[[str], int]):
        self.haystack, self.count = haystack, count
        self.words = sorted(set(re.findall(r"\b[a-z]{4,8}\b", text)))


Made = tuple[str, list[Question]]
"""Text and questions of a document."""


def documents(material: Material, tasks: list[str], lengths: list[int], count: int, seed: int):
    """`count` documents of every task and length."""
    return [
        document(material, task, length, i, seed)
        for task in tasks
        for length in lengths
        for i in range(count)
    ]


def document(material: Material, task: str, length: int, which: int, seed: int) -> Document:
    """One document of about `length` tokens."""
    rng = generator(seed, "ruler", task, length, which)
    text, questions = TASKS[task](material, rng, length, which)
    return Document(task, length, which, text, tuple(questions))


# -- needles


def _hidden(material, rng, length, which, pairs, intro=INTRO) -> str:
    needles = [NEEDLE.format(*pair) for pair in pairs]
    places = depths(which, len(needles))
    rng.shuffle(places)
    room = length - material.count(intro)
    return intro + material.haystack.hide(rng, needles, places, room)[0]


def _pairs(rng, n) -> list[tuple[str, str]]:
    return [(name, number(rng)) for name in rng.sample(NAMES, n)]


def _ask_one(name, secret) -> Question:
    asked = ASKED.format(f"What is the secret number of {name}?", f"The secret number of {name} is")
    return Question(asked, (secret,))


def single(material, rng, length, which) -> Made:
    """One needle."""
    pairs = _pairs(rng, 1)
    return _hidden(material, rng, length, which, pairs), [_ask_one(*pairs[0])]


def multikey(material, rng, length, which) -> Made:
    """Needles for several keys, each asked for on its own."""
    pairs = _pairs(rng, KEYS)
    text = _hidden(material, rng, length, which, pairs)
    return text, [_ask_one(*pair) for pair in pairs]


def multivalue(material, rng, length, which) -> Made:
    """Several needles for one key, all asked for at once."""
    name = rng.choice(NAMES)
    secrets = [number(rng) for _ in range(KEYS)]
    text = _hidden(material, rng, length, which, [(name, secret) for secret in secrets])
    secrets.sort(key=text.index)
    asked = ASKED.format(
        f"What are all {KEYS} secret numbers of {name}?", f"The secret numbers of {name} are"
    )
    return text, [Question(asked, tuple(secrets))]


def multiquery(material, rng, length, which) -> Made:
    """Needles for several keys, all asked for at once."""
    pairs = _pairs(rng, KEYS)
    text = _hidden(material, rng, length, which, pairs)
    names = ", ".join(name for name, _ in pairs)
    asked = ASKED.format(
        f"What are the secret numbers of {names}, in this order?",
        f"The secret numbers of {names} are",
    )
    return text, [Question(asked, tuple(secret for _, secret in pairs))]


# -- tracing


def variables(material, rng, length, which) -> Made:
    """A number is given to a variable, and from that one to the next, all over the text."""
    names = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] * (name not in names)
    value = str(rng.randrange(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {new} = VAR {old}." for old, new in zip(names, names[1:], strict=False)]
    intro = "The text below sets variables. Follow which values they get.\n\n"
    places = sorted(rng.random() for _ in lines)
    room = length - material.count(intro)
    text = intro + material.haystack.hide(rng, lines, places, room)[0]
    asked = ASKED.format(
        f"Which {len(names)} variables have the value {value}?",
        f"The variables with the value {value} are",
    )
    return text, [Question(asked, tuple(names))]


# -- counting


def common(material, rng, length, which) -> Made:
    """A numbered list of words, some of them much more frequent than all others."""
    seed = rng.random()
    intro = "Below is a numbered list of words. Remember the most common ones.\n\n"

    def build(n_entries: int) -> tuple[str, list[str]]:
        rng = random.Random(seed)
        often = max(4, min(30, n_entries // (2 * COMMON)))
        n_others = max(1, n_entries - COMMON * often)
        # a third of a long list's words would be too many for most texts
        seldom = max(3 if often >= 12 else 1, -(-n_others // max(1, len(material.words) - COMMON)))
        n_words = COMMON + -(-n_others // seldom)
        if 2 * seldom > often or n_words > len(material.words):
            raise QFilterError(
                f"the text has {len(material.words):,} different words, too few for the task "
                "`common`: give a longer --text, or shorter --lengths"
            )
        words = rng.sample(material.words, n_words)
        entries = words[:COMMON] * often + words[COMMON:] * seldom
        rng.shuffle(entries)
        return intro + " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1)), words[:COMMON]

    text, words = _largest(build, length, material.count)
    asked = ASKED.format(
        f"What are the {COMMON} most common words in the list?", "The most common words are"
    )
    return text, [Question(asked, tuple(words))]


def frequent(material, rng, length, which) -> Made:
    """Made-up words whose frequencies follow Zipf's law (exponent 2)."""
    seed = rng.random()
    intro = "Below are coded words, some of which come often. Remember the most frequent ones.\n\n"

    def build(n_words: int) -> tuple[str, list[str]]:
        rng = random.Random(seed)
        words: list[str] = []
        while len(words) < 500:
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            words += [word] * (word not in words)
        scale = 6 / 3.141592653589793**2  # the sum of 1/k^2 over all k is its inverse
        entries = []
        for rank, word in enumerate(words, 1):
            entries += [word] * round(n_words * scale / rank**2)
        rng.shuffle(entries)
        return intro + " ".join(entries), words[:FREQUENT]

    text, words = _largest(build, length, material.count)
    asked = ASKED.format(
        f"What are the {FREQUENT} most frequent coded words?", "The most frequent coded words are"
    )
    return text, [Question(asked, tuple(words))]


# -- question answering

FIRST = (
    "Ada", "Bruno", "Clara", "Dario", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin",
    "Leo", "Marta", "Nils", "Olga", "Pablo", "Rosa", "Stefan", "Tara", "Viktor",
)  # fmt: skip
LAST = (
    "Andersen", "Bellini", "Carvalho", "Dubois", "Eriksson", "Fischer", "Garcia", "Horvat", "Ivanov",
    "Jansen", "Kowalski", "Lindgren", "Moretti", "Novak", "Olsen", "Petrov", "Rossi", "Schmidt",
    "Tanaka", "Weber",
)  # fmt: skip
JOBS = (
    "baker", "carpenter", "dentist", "farmer", "gardener", "judge", "lawyer", "librarian", "miner",
    "nurse", "painter", "photographer", "pilot", "plumber", "postman", "sailor", "tailor", "teacher",
)  # fmt: skip
INSTRUMENTS = (
    "accordion", "cello", "clarinet", "drums", "flute", "guitar", "harp", "oboe", "organ", "piano",
    "saxophone", "trombone", "trumpet", "viola", "violin",
)  # fmt: skip
PASSAGE = (
    "{name} was born in {birthplace} in {year}. After school {last} moved to {home} and worked there "
    "as a {job}. In the evening {last} liked to play the {instrument}."
)
FACTS = (
    ("birthplace", "In which city was {name} born?", "{name} was born in"),
    ("home", "To which city did {name} move after school?", "After school {name} moved to"),
    ("job", "What did {name} work as?", "{name} worked as a"),
    ("instrument", "Which instrument did {name} like to play?", "{name} liked to play the"),
)


def qa(material, rng, length, which) -> Made:
    """Passages about invented people, questions about some of them."""
    seed = rng.random()
    intro = "Answer questions about people from the passages below.\n\n"

    def build(n_passages: int) -> tuple[str, list[dict]]:
        rng = random.Random(seed)
        names = [(first, last) for first in FIRST for last in LAST]
        rng.shuffle(names)
        # a long text has more people than there are names: the last ones get a middle initial
        people = [_person(rng, *names[i % len(names)], i // len(names)) for i in range(n_passages)]
        passages = [
            f"Passage {i}: {PASSAGE.format(**person)}" for i, person in enumerate(people, 1)
        ]
        return intro + "\n".join(passages), people

    text, people = _largest(build, length, material.count)
    questions = []
    for place, (fact, asked, answer) in zip(depths(which, len(FACTS)), FACTS, strict=True):
        person = people[int(place * len(people))]
        asked = ASKED.format(asked.format(**person), answer.format(**person))
        questions.append(Question(asked, (person[fact],)))
    return text, questions


def _person(rng, first, last, round_) -> dict:
    middle = f" {string.ascii_uppercase[(round_ - 1) % 26]}." if round_ else ""
    birthplace, home = rng.sample(NAMES, 2)
    return {
        "name": f"{first}{middle} {last}",
        "last": last,
        "birthplace": birthplace,
        "home": home,
        "year": rng.randrange(1900, 2000),
        "job": rng.choice(JOBS),
        "instrument": rng.choice(INSTRUMENTS),
    }


def _largest(build: Callable[[int], tuple[str, list]], length: int, count) -> tuple[str, list]:
    """What `build` makes for the largest number whose text has at most `length` tokens."""
    low, high = 1, 2
    while count(build(high)[0]) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count(build(middle)[0]) <= length:
            low = middle
        else:
            high = middle
    return build(low)


TASKS = {
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "variables": variables,
    "common": common,
    "frequent": frequent,
    "qa": qa,
}

# -- asking


def string_match(mark: Mark, question: Question) -> dict:
    """The share of the answers that are found in what the model writes, case ignored. If every
    token of the answer is the model's first choice, nothing is generated."""
    result = answer_likelihood(mark, question)
    text = question.answer
    if not result["right"]:
        mark.back()
        model = mark.context.model
        asked, _ = split(model, question)
        n_tokens = writing(model, question)
        text = generate(mark.context, asked, n_tokens, lambda text: found(text, question) == 1)
    return {**result, "score": round(found(text, question), 4), "wrote": text.strip()[:200]}


def found(text: str, question: Question) -> float:
    """The share of the answers that are in a text."""
    text = text.lower()
    return sum(answer.lower() in text for answer in question.answers) / len(question.answers)


def writing(model: Model, question: Question) -> int:
    """Tokens that a model may write: twice those of the right answer, and 8."""
    return 2 * len(model.tokens(question.answer)) + 8


def string_match_tokens(model: Model, question: Question) -> int:
    return likelihood_tokens(model, question) + writing(model, question)


ASKING = Asking(string_match, string_match_tokens)

# -- report


def rows(records: dict[Variant, list[dict]]) -> list[dict]:
    """What the results say about every variant, in plain JSON values."""
    return [_row(variant, mine) for variant, mine in records.items()]


def _row(variant: Variant, records: list[dict]) -> dict:
    by_task: dict[str, list[dict]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    tasks = {task: summary(mine) for task, mine in by_task.items()}
    lengths = sorted({record["length"] for record in records})
    return {
        **variant.key(),
        "n": len(records),
        "score": round(sum(task["score"] for task in tasks.values()) / len(tasks), 4),
        "nll": round(sum(task["nll"] for task in tasks.values()) / len(tasks), 4),
        "by_task": tasks,
        "by_task_and_length": {
            task: {
                length: summary([record for record in mine if record["length"] == length])
                for length in lengths
            }
            for task, mine in by_task.items()
        },
    }


def summary(records: list[dict]) -> dict:
    """Means of results, with confidence intervals of 95 %."""
    result: dict = {"n": len(records)}
    for name in ("score", "nll"):
        groups: dict[tuple, list[float]] = {}
        for record in records:
            groups.setdefault((record["length"], record["document"]), []).append(record[name])
        result[name] = round(sum(record[name] for record in records) / len(records), 4)
        result[f"{name}_ci"] = [round(limit, 4) for limit in bootstrap(list(groups.values()))]
    return result


def report(rows: list[dict], titles: list[str]) -> str:
    """Two tables for the terminal: scores, and the loss of the right answer."""
    return "\n\n".join(_table(rows, titles, *what) for what in (("score", ".1%"), ("nll", ".3f")))


def _table(rows, titles, name, style) -> str:
    tasks = list(rows[0]["by_task"])
    head = [name, *tasks, "mean"]
    body = [
        [title, *(format(row["by_task"][task][name], style) for task in tasks)]
        + [format(row[name], style)]
        for title, row in zip(titles, rows, strict=True)
    ]
    return aligned([head, *body])
