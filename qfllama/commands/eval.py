"""`qfllama eval`: what a bounded cache costs in quality, against the full one and other policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfllama.commands.console import dies_of_ctrl_c, note, note_offload
from qfllama.commands.options import IN_FILE, OUT_FILE, CommaList, option
from qfllama.config import CALIBRATED, POLICIES, QFilterConfig, QFilterError

if TYPE_CHECKING:
    from qfllama.engine import Model
    from qfllama.evaluation.run import Asking, Plan
    from qfllama.evaluation.tasks import Text

FULL, REPLAY = "full", "replay"
TASKS = (  # qfllama.evaluation.ruler.TASKS; --help needs no numpy
    "single", "multikey", "multivalue", "multiquery", "variables", "common", "frequent", "qa",
)  # fmt: skip


def options(command):
    """What all evaluations can be told."""
    for decorate in reversed([
        click.argument("path", metavar="MODEL", type=IN_FILE),
        option("policy", type=CommaList(choices=(FULL, *POLICIES, REPLAY)),
               help=f"Any of {', '.join((FULL, *POLICIES, REPLAY))}.  [default: all that the file "
                    "has filters for, without replay]"),
        click.option("--ratio", type=CommaList(float, least=1),
                     help="Keep 1 of so many tokens.  [default: 2,4,8]"),
        option("max-length", type=CommaList(int, least=1),
               help="Keep so many tokens, in place of --ratio."),
        option("window-length",
               help="Newest tokens that are always kept.  [default: 64 where the whole prompt is "
                    "compressed once, else a quarter of the cache]"),
        option("sinks", default=QFilterConfig.sinks),
        option("interval",
               help="Tokens that an eviction drops while streaming.  [default: a quarter of the "
                    "cache, 64 to 512]"),
        click.option("--text", type=IN_FILE,
                     help="A text file in UTF-8.  [default: docstrings of Python's library]"),
        option("seed", default=0, show_default=True, help="Of what is drawn by chance."),
        option("type-k"),
        option("type-v"),
        option("n-gpu-layers"),
        option("threads"),
        click.option("--results", type=OUT_FILE, metavar="FILE.jsonl",
                     help="Keep every result here as it comes; the same command goes on from it."),
        option("json", help="Write the report, with machine and versions."),
        option("plot"),
        option("verbose"),
    ]):  # fmt: skip
        command = decorate(command)
    return command


setting = click.option(
    "--setting",
    type=click.Choice(("prefill", "stream")),
    default="prefill",
    show_default=True,
    help="Compress the whole document once before the question is asked, or evict while it "
    "streams in.",
)


recall = click.option(
    "--recall",
    "recalls",
    type=CommaList(choices=("off", "on")),
    default="off,on",
    show_default=True,
    help="Bring evicted rows back from the archive that the question looks at: without, with.",
)


class Session:
    """What all evaluations share: model, text, plan, results, report.

    Args:
        setting: how the caches are used.
        key: what tells results apart.
        length: tokens of the longest text.
        more: settings of the task that results depend on.
    """

    def __init__(
        self, task: str, setting: str, key: tuple[str, ...], length: int, chosen: dict, **more
    ):
        self._chosen, self._key, self._length = chosen, key, length
        self._types = {name: chosen[name] or "f16" for name in ("type_k", "type_v")}
        self._check()
        self.text: Text = self._read_text()
        self.model: Model = self._load()
        try:
            self.model.evicting_layers()
            self.plan: Plan = self._make_plan(setting)
            self._settings = {"task": task, "setting": setting, **self._sample_settings(), **more}
        except BaseException:
            self.model.close()
            raise

    def _check(self) -> None:
        """Raises QFilterError or UsageError for what can be told before the model is loaded."""
        from qfllama import needs, schema
        from qfllama.evaluation import plots

        chosen = self._chosen
        if chosen["ratio"] and chosen["max_length"]:
            raise click.UsageError("--ratio and --max-length exclude each other; give one of them")
        if chosen["image"]:
            plots.check(chosen["image"])
        for name in ("json_file", "image", "results"):
            check_folder(chosen[name])
        for policy in set(chosen["policy"] or ()) & set(CALIBRATED):
            needs.check_policy(chosen["path"], schema.read(chosen["path"]), policy)

    def _load(self) -> Model:
        from qfllama.engine import Model, cache_type
        from qfllama.offload import Cache

        chosen = self._chosen
        types = {name: cache_type(value) for name, value in self._types.items()}
        model = Model(
            chosen["path"],
            n_gpu_layers=chosen["n_gpu_layers"],
            caches=[Cache(self._length, **types)] * 2,  # what is shared is read in another one
            verbose=chosen["verbose"],
        )
        note_offload(model.offload)
        return model

    def _read_text(self) -> Text:
        from qfllama.evaluation.tasks import read_text

        return read_text(self._chosen["text"])

    def _make_plan(self, setting: str) -> Plan:
        from qfllama.evaluation.run import Plan, variants

        chosen = self._chosen
        policies = chosen["policy"] or usable(self.model)
        if REPLAY in policies and setting == "stream":
            raise click.UsageError(
                "--policy replay reads a whole document again: leave it out where the text streams"
            )
        recalls = [word == "on" for word in chosen.get("recalls", ("off",))]
        ratios = chosen["ratio"] or (None if chosen["max_length"] else [2.0, 4.0, 8.0])
        names = ("sinks", "window_length", "interval", "seed")
        return Plan(
            setting,
            tuple(variants(policies, ratios, chosen["max_length"], recalls)),
            **{name: chosen[name] for name in names},
            context={"n_threads": chosen["n_threads"], **self._types},
        )

    def _sample_settings(self) -> dict:
        """Whatever a result depends on and isn't in its key."""
        from qfllama.evaluation.tasks import VERSION
        from qfllama.state import filters_identity, model_identity

        names = ("seed", "sinks", "window_length", "interval")
        return {
            "model": model_identity(self.model.path),
            "filters": filters_identity(self.model.filters),
            "text": self.text.sha256,
            "version": VERSION,
            **self._types,
            **{name: self._chosen[name] for name in names},
        }

    def results(self):
        """Results so far, to be added to."""
        from qfllama.evaluation.results import Results

        if self._length > (trained := self.model.shape.n_ctx_train):
            note(f"note: the model was trained for {trained:,} positions")
        return Results(self._chosen["results"], self._settings, self._key)

    def report(self, module, records: dict, draw, **extra) -> None:
        """Print the table, write what was asked for.

        Args:
            module: has `rows` and `report`; records: by variant; draw: from `plots`.
        """
        from qfllama.machine import provenance

        rows, titles = module.rows(records), [variant.title for variant in records]
        click.echo(module.report(rows, titles))
        about = provenance(self._chosen["n_threads"])
        about["model"] = Path(self.model.path).name
        about["text"] = self.text.name
        if path := self._chosen["json_file"]:
            from qfllama.files import write_json

            value = {"about": about, "settings": self._settings, "rows": rows, **extra}
            write_json(path, value)
        if path := self._chosen["image"]:
            title = (
                f"{about['model']}, {self._settings['setting']}, {about['text']}, {about['date']}"
            )
            draw(path, rows, titles, title)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error) -> None:
        self.model.close()


def check_folder(path: Path | None) -> None:
    """Raises QFilterError if a file can't be written for want of its folder."""
    if path is not None and not path.parent.is_dir():
        raise QFilterError(f"{path}: there is no folder {path.parent}: make it first")


def usable(model: Model) -> list[str]:
    """The full cache and every policy that the model's file has what it takes for."""
    from qfllama import needs

    names = [FULL]
    for policy in POLICIES:
        try:
            needs.check_policy(model.path, model.filters, policy)
        except QFilterError:
            continue
        names.append(policy)
    return names


def run_documents(session: Session, documents: list, asking: Asking) -> dict:
    """Records by variant, of all documents."""
    from qfllama.evaluation import run

    with session.results() as results:
        run.run(session.model, documents, session.plan, results, asking)
        return {
            variant: run.answers(documents, variant, results) for variant in session.plan.variants
        }


@click.group("eval")
def command():
    """Measure what a bounded cache costs in quality: perplexity, needles, RULER-style tasks."""


@command.command("needle", short_help="Needles in a haystack, at all depths.")
@options
@setting
@recall
@click.option("--lengths", type=CommaList(int, least=128), default="1024,2048", show_default=True,
              help="Tokens of the documents.")  # fmt: skip
@click.option("--documents", "count", type=click.IntRange(1), default=4, show_default=True,
              help="Documents of every length.")  # fmt: skip
@click.option("--needles-per-document", "needles", type=click.IntRange(1), default=5,
              show_default=True, help="Asked for one by one.")  # fmt: skip
def needle_command(setting, lengths, count, needles, **chosen):
    """Needle in a haystack: secret numbers hidden in a long text, at all depths.

    Each document is read without knowing what will be asked. `right`: needles of which every digit
    is the model's first choice; `digits`: the share of digits of which that is so; `nll`: the mean
    loss per digit."""
    with dies_of_ctrl_c():
        from qfllama.evaluation import needle, plots, run
        from qfllama.evaluation.tasks import Haystack

    with Session(
        "needle", setting, run.KEY, max(lengths), chosen, needles_per_document=needles
    ) as session:
        haystack = Haystack(session.text, lambda text: len(session.model.tokens(text)))
        documents = needle.documents(haystack, lengths, count, needles, session.plan.seed)
        records = run_documents(session, documents, run.BY_LIKELIHOOD)
        session.report(needle, records, plots.needle)


@command.command("ppl", short_help="Perplexity while evicting, by position.")
@options
@click.option("--texts", type=click.IntRange(1), default=3, show_default=True,
              help="Texts, each read from an empty cache.")  # fmt: skip
@click.option("--length", type=click.IntRange(64), default=2048, show_default=True,
              help="Tokens of a text.")  # fmt: skip
def ppl_command(texts, length, **chosen):
    """Perplexity of a text that streams through a bounded cache, by position."""
    with dies_of_ctrl_c():
        from qfllama.evaluation import perplexity, plots

    with Session("ppl", "stream", perplexity.KEY, length, chosen) as session:
        pieces = perplexity.texts(session.model, session.text, texts, length)
        with session.results() as results:
            perplexity.run(session.model, pieces, session.plan, results)
            records = perplexity.records(pieces, session.plan, results)
        session.report(perplexity, records, plots.perplexity)


@command.command("ruler", short_help="Eight tasks after RULER.")
@options
@setting
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

    Each document is read without knowing what will be asked. `score`: the share of the strings asked
    for that are in what the model writes; `nll`: the mean loss per token of the right answer."""
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
        session.report(ruler, records, plots.ruler)
