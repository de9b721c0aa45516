"""`qfllama eval`: what a bounded cache costs in quality, against the full one and other policies."""

from __future__ import annotations

from dataclasses import replace

import click

from qfllama.commands.console import dies_of_ctrl_c, need_command
from qfllama.commands.evaluating import (
    FULL,
    Session,
    options,
    recall,
    run_documents,
    setting,
    titles,
)
from qfllama.commands.options import IN_FILE, CommaList, option
from qfllama.config import QFilterConfig

TASKS = (  # qfllama.evaluation.ruler.TASKS; --help needs no numpy
    "single", "multikey", "multivalue", "multiquery", "variables", "common", "frequent", "qa",
)  # fmt: skip


@click.group("eval", invoke_without_command=True)
@click.pass_context
def command(ctx):
    """Measure what a bounded cache costs in quality: perplexity, needles, questions, RULER-style tasks."""
    need_command(ctx)


texts_option = click.option("--texts", type=click.IntRange(1), default=3, show_default=True,
                            help="Texts, each read from an empty cache.")  # fmt: skip


length_option = click.option("--length", type=click.IntRange(64), default=2048, show_default=True,
                             help="Tokens of a text.")  # fmt: skip


def type_list(name: str, other: str):
    """--type-k or --type-v of several caches."""
    return option(
        f"type-{name}", type=CommaList(),
        help=f"Types of the cached {name.upper()}; as many as --type-{other} has, or one for all.  "
             "[default: f16]")  # fmt: skip


def type_pairs(type_k: tuple[str, ...] | None, type_v: tuple[str, ...] | None) -> list[tuple]:
    """(K, V) of every cache. UsageError if the numbers of types differ, QFilterError for an unknown
    type."""
    from qfllama.context import cache_type

    both = [tuple(word.lower() for word in words or ("f16",)) for words in (type_k, type_v)]
    for word in (*both[0], *both[1]):
        cache_type(word)
    n = max(map(len, both))
    both = [words * n if len(words) == 1 else words for words in both]
    if len(both[0]) != len(both[1]):
        raise click.UsageError(
            f"--type-k has {len(both[0])} types and --type-v {len(both[1])}: give as many, or one"
        )
    return list(zip(*both, strict=True))


@command.command("kld", short_help="Distributions beside those of the stock full f16 cache.")
@options(type_k=type_list("k", "v"), type_v=type_list("v", "k"))
@click.option("--recall", "recalls", type=CommaList(choices=("off", "prompt", "always")),
              default="off", show_default=True,
              help="off: what is evicted is gone; always: rows come back at every eviction.")  # fmt: skip
@texts_option
@length_option
@click.option("--from", "first", type=click.IntRange(0), metavar="POSITION",
              help="First position that counts.  [default: half of the length, as in "
                   "llama-perplexity]")  # fmt: skip
def kld_command(texts, length, first, **chosen):
    """KL divergence of the next-token distributions from those of llama.cpp's full f16 cache.

    A text streams through all caches. `full` is llama.cpp's own cache of each type, the other
    policies are ours. `rounding` is the full f16 cache again, read 8 tokens at a time: smaller
    differences say nothing about a cache. `KLD`: the mean, in nats; then percentiles; `same top`: the share of tokens
    after which both have the same first choice."""
    with dies_of_ctrl_c():
        from qfllama.evaluation import kld, perplexity, plots

    if "prompt" in chosen["recalls"]:
        raise click.UsageError(
            "--recall prompt brings rows back for the end of a prompt, and a text that is read "
            "token by token has none: use always, or qfllama eval needle --recall on"
        )
    first = length // 2 if first is None else first
    if first > length - 2:
        raise click.UsageError(
            f"--from {first} leaves nothing of {length} tokens: use a smaller one"
        )
    pairs = type_pairs(chosen["type_k"], chosen["type_v"])
    with Session(
        "kld", "stream", kld.KEY, length, chosen, types=pairs, n_open=1 + kld.TOGETHER
    ) as session:
        plan = replace(session.plan, variants=(kld.FLOOR, *session.plan.variants))
        pieces = perplexity.texts(session.model, session.text, texts, length)
        with session.results() as results:
            kld.run(session.model, pieces, plan, results)
            records = kld.records(pieces, plan, results)
        rows = kld.rows(records, session.model, first)
        session.report(rows, titles(records), kld.report, plots.kld)


@command.command("ladder", short_help="All caches over the bytes they take: what each one loses.")
@options(
    policy=option("policy"),
    ratio=click.option("--ratio", type=CommaList(float, least=1), default="2,4,8,16,32",
                       show_default=True, help="Our caches keep one token out of this many."),
    max_length=None,
    type_k=None,
    type_v=None,
)  # fmt: skip
@click.option("--types", type=CommaList(), default="f16,q8_0,q4_0", show_default=True,
              help="Types of our caches.")  # fmt: skip
@click.option("--stock-types", type=CommaList(), default="f16,q8_0,q5_0,q4_0", show_default=True,
              help="Types of llama.cpp's full caches.")  # fmt: skip
@recall
@texts_option
@click.option("--length", type=click.IntRange(128), default=4096, show_default=True,
              help="Tokens of a text, and of a document with needles.")  # fmt: skip
@click.option("--documents", "count", type=click.IntRange(1), default=2, show_default=True,
              help="Documents with needles.")  # fmt: skip
@click.option("--needles-per-document", "needles", type=click.IntRange(1), default=5,
              show_default=True, help="Asked for one by one.")  # fmt: skip
@click.option("--speed", type=click.IntRange(64), metavar="POSITION",
              help="Also decode 64 tokens before this position in each cache.")  # fmt: skip
def ladder_command(types, stock_types, texts, length, count, needles, speed, **chosen):
    """One table over bytes per token of context: llama.cpp's full caches and ours of all sizes and
    types.

    Bytes are those of K and V at 8,192 and 32,768 tokens of context, by calculation; `archive`: MiB
    of host memory that recall needs at 32,768. `KLD` and `same top` are as in `eval kld`; `found`:
    needles as in `eval needle --setting stream`, without and with recall."""
    with dies_of_ctrl_c():
        from qfllama import schema
        from qfllama.evaluation import kld, ladder, needle, perplexity, plots
        from qfllama.evaluation.tasks import Haystack

    stock_types, types = (
        [pair[0] for pair in type_pairs(names, names)] for names in (stock_types, types)
    )
    config = QFilterConfig().for_file(schema.read(chosen["path"]))
    policy = chosen["policy"] or config.policy
    variants = ladder.caches(policy, chosen["ratio"], types, stock_types)
    kinds = [ladder.kind(variant, speed) for variant in variants if speed is not None]
    chosen |= {"policy": (FULL, policy), "max_length": None}
    with Session(
        "ladder", "stream", ladder.KEY, length, chosen, types=[kld.REFERENCE],
        n_open=1 + kld.TOGETHER, needles_per_document=needles,
    ) as session:  # fmt: skip
        plan = replace(session.plan, variants=variants)
        pieces = perplexity.texts(session.model, session.text, texts, length)
        haystack = Haystack(session.text, lambda text: len(session.model.tokens(text)))
        documents = needle.documents(haystack, [length], count, needles, plan.seed)
        recalls = [word == "on" for word in chosen["recalls"]]
        with session.results() as results:
            rows = ladder.run(session.model, pieces, documents, plan, recalls, results)
    if speed is not None:  # the model is closed: this loads it again
        ladder.add_speeds(
            rows, kinds, chosen["path"], positions=(speed,), n_ctx=speed, policy=policy,
            n_threads=chosen["n_threads"], n_gpu_layers=chosen["n_gpu_layers"],
        )  # fmt: skip
    names = [variant.title for variant in variants]
    session.report(rows, names, ladder.report, plots.ladder)


@command.command("needle", short_help="Needles in a haystack, at all depths.")
@options()
@setting()
@recall
@click.option("--lengths", type=CommaList(int, least=128), default="1024,2048", show_default=True,
              help="Tokens of the documents.")  # fmt: skip
@click.option("--documents", "count", type=click.IntRange(1), default=4, show_default=True,
              help="Documents of every length.")  # fmt: skip
@click.option("--needles-per-document", "needles", type=click.IntRange(1), default=5,
              show_default=True, help="Asked for one by one.")  # fmt: skip
def needle_command(setting, lengths, count, needles, **chosen):
    """Needle in a haystack: secret numbers hidden in a long text, at all depths.

    Each document is read without knowing what will be asked. `right`: needles whose digits are all
    the model's first choice; `digits`: the share of digits that are its first choice; `nll`: the
    mean loss per digit."""
    with dies_of_ctrl_c():
        from qfllama.evaluation import needle, plots, run
        from qfllama.evaluation.tasks import Haystack

    with Session(
        "needle", setting, run.KEY, max(lengths), chosen, needles_per_document=needles
    ) as session:
        haystack = Haystack(session.text, lambda text: len(session.model.tokens(text)))
        documents = needle.documents(haystack, lengths, count, needles, session.plan.seed)
        records = run_documents(session, documents, run.BY_LIKELIHOOD)
        session.report(needle.rows(records), titles(records), needle.report, plots.needle)


@command.command("ppl", short_help="Perplexity while evicting, by position.")
@options()
@texts_option
@length_option
def ppl_command(texts, length, **chosen):
    """Perplexity of a text that streams through a bounded cache, by position."""
    with dies_of_ctrl_c():
        from qfllama.evaluation import perplexity, plots

    with Session("ppl", "stream", perplexity.KEY, length, chosen) as session:
        pieces = perplexity.texts(session.model, session.text, texts, length)
        with session.results() as results:
            perplexity.run(session.model, pieces, session.plan, results)
            records = perplexity.records(pieces, session.plan, results)
        session.report(
            perplexity.rows(records), titles(records), perplexity.report, plots.perplexity
        )


@command.command("questions", short_help="Questions about documents of yours.")
@options(text=None)
@click.option("--questions", "questions_file", type=IN_FILE, metavar="FILE.jsonl", required=True,
              help='One a line: {"document": FILE, "question": TEXT, "answers": [TEXT, ...]}, '
                   'perhaps with "depth": 0 to 1; any of the answers counts.')  # fmt: skip
@click.option("--documents", "names", type=CommaList(),
              help="Only these of the file's documents.  [default: all]")  # fmt: skip
@setting("stream")
@recall
@click.option("--max-tokens", type=click.IntRange(1), default=48, show_default=True,
              help="Of an answer.")  # fmt: skip
@click.option("--plain", is_flag=True,
              help='No chat template, for base models: the document, "Question: ...", "Answer:"; the '
                   "first line of what follows is the answer.")  # fmt: skip
def questions_command(questions_file, names, setting, max_tokens, plain, **chosen):
    """Questions with short answers about long documents, asked as in `qfllama chat --file`.

    Each document is read without knowing what will be asked; --ratio applies to its own length. The
    model answers greedily. `right`: answers that contain a right answer; case, punctuation and
    thousands separators don't count. `nll`: the mean loss per token of the first right answer, read
    in place of the model's own."""
    with dies_of_ctrl_c():
        from qfllama.engine import Model
        from qfllama.evaluation import plots, questions, run

    how = {"plain": plain, "max_tokens": max_tokens}
    chosen["questions"] = questions_file
    sources = questions.read(questions_file)
    with Model.from_header(chosen["path"]) as header:
        header.evicting_layers()
        documents = questions.documents(header, sources, names=names, **how)
    asking = questions.asking(**how)
    text = questions.identity(questions_file, sources)
    length = max(document.length for document in documents)
    with Session("questions", setting, run.KEY, length, chosen, text=text, **how) as session:
        records = run_documents(session, documents, asking)
        session.report(questions.rows(records), titles(records), questions.report, plots.questions)


@command.command("ruler", short_help="Eight tasks after RULER.")
@options()
@setting()
@recall
@click.option(
    "--tasks", type=CommaList(choices=TASKS), help=f"Any of {', '.join(TASKS)}.  [default: all]"
)
@click.option("--lengths", type=CommaList(int, least=256), default="1024", show_default=True,
              help="Tokens of the documents.")  # fmt: skip
@click.option("--documents", "count", type=click.IntRange(1), default=4, show_default=True,
              help="Documents of every task and length.")  # fmt: skip
def ruler_command(setting, tasks, lengths, count, **chosen):
    """Tasks after RULER: needles of four kinds, variable tracking, common and frequent words,
    questions about passages.

    Each document is read without knowing what will be asked. `score`: the share of the expected
    strings that the model writes; `nll`: the mean loss per token of the right answer."""
    with dies_of_ctrl_c():
        from qfllama.evaluation import plots, ruler, run
        from qfllama.evaluation.tasks import Haystack

    with Session("ruler", setting, run.KEY, max(lengths), chosen) as session:

        def tokens_of(text: str) -> int:
            return len(session.model.tokens(text))

        haystack = Haystack(session.text, tokens_of)
        material = ruler.Material(haystack, session.text.text, tokens_of)
        documents = ruler.documents(
            material, tasks or list(TASKS), lengths, count, session.plan.seed
        )
        records = run_documents(session, documents, ruler.ASKING)
        session.report(ruler.rows(records), titles(records), ruler.report, plots.ruler)
