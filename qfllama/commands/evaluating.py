"""What all evaluations share: their options, and a session from a model to a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qfllama.commands.console import note, note_offload
from qfllama.commands.options import IN_FILE, OUT_FILE, CommaList, ModelFile, option
from qfllama.config import CALIBRATED, POLICIES, QFilterConfig, QFilterError
from qfllama.files import check_target

if TYPE_CHECKING:
    from qfllama.engine import Model
    from qfllama.evaluation.run import Asking, Plan
    from qfllama.evaluation.tasks import Text

FULL, REPLAY = "full", "replay"
RATIOS = (2.0, 4.0, 8.0)
OPTIONS = {
    "path": click.argument("path", metavar="MODEL", type=ModelFile()),
    "policy": option(
        "policy", type=CommaList(choices=(FULL, *POLICIES, REPLAY)),
        help=f"Any of {', '.join((FULL, *POLICIES, REPLAY))}.  [default: all that the file "
             "has filters for, without replay]"),
    "ratio": click.option("--ratio", type=CommaList(float, least=1),
                          help="Keep one token out of this many.  [default: 2,4,8]"),
    "max_length": option("max-length", type=CommaList(int, least=1),
                         help="Keep this many tokens, in place of --ratio."),
    "window_length": option(
        "window-length",
        help="Newest tokens that are always kept.  [default: 64 where the whole prompt is "
             "compressed once, else an eighth of the cache, at most 512]"),
    "sinks": option("sinks", default=QFilterConfig.sinks),
    "interval": option(
        "interval",
        help="Tokens that an eviction drops while streaming.  [default: an eighth of the "
             "cache, 64 to 512]"),
    "text": click.option("--text", type=IN_FILE,
                         help="A text file in UTF-8.  [default: docstrings of Python's library]"),
    "seed": option("seed", default=0, show_default=True, help="Seed of all random choices."),
    "type_k": option("type-k"),
    "type_v": option("type-v"),
    "n_gpu_layers": option("n-gpu-layers"),
    "threads": option("threads"),
    "results": click.option(
        "--results", type=OUT_FILE, metavar="FILE.jsonl",
        help="Write each result here as it comes; the same command continues from it."),
    "json": option("json", help="Write the report, with machine and versions."),
    "plot": option("plot"),
    "verbose": option("verbose"),
}  # fmt: skip
"""Options of all evaluations, in the order of --help."""


def options(**others):
    """OPTIONS for a command. `others` replace options of the same name; None leaves one out."""

    def decorate(command):
        for add in reversed((OPTIONS | others).values()):
            command = command if add is None else add(command)
        return command

    return decorate


def setting(default: str = "prefill"):
    return click.option(
        "--setting", type=click.Choice(("prefill", "stream")), default=default, show_default=True,
        help="Compress the whole document once before the question is asked, or evict while it "
             "streams in.")  # fmt: skip


recall = click.option(
    "--recall",
    "recalls",
    type=CommaList(choices=("off", "on")),
    default="off,on",
    show_default=True,
    help="Measure without and with recall: evicted rows that the question looks at come back.",
)


class Session:
    """What all evaluations share: model, text, plan, results, report.

    Args:
        setting: how the caches are used.
        key: what tells results apart.
        length: tokens of the longest text.
        text: what is read; None: --text.
        types: pairs of types of K and V, if the key tells their results apart; None: the one pair
            that was chosen.
        n_open: caches that are open at once.
        more: settings of the task that results depend on.
    """

    def __init__(
        self,
        task: str,
        setting: str,
        key: tuple[str, ...],
        length: int,
        chosen: dict,
        *,
        types: list[tuple[str, str]] | None = None,
        n_open: int = 2,  # what is shared is read in another one
        text: Text | None = None,
        **more,
    ):
        self._chosen, self._key, self._length = chosen, key, length
        self._pairs, self._n_open = types, n_open
        self._types = {}
        if types is None:
            self._types = {name: chosen[name] or "f16" for name in ("type_k", "type_v")}
        self._check()
        self.text: Text = text or self._read_text()
        self.model: Model = self._load()
        try:
            self.plan: Plan = self._make_plan(setting)
            self._settings = {"task": task, "setting": setting, **self._sample_settings(), **more}
        except BaseException:
            self.model.close()
            raise

    def _check(self) -> None:
        """Raises QFilterError or UsageError for what can be told before the model is loaded."""
        from qfllama import needs, schema
        from qfllama.engine import Model
        from qfllama.evaluation import plots
        from qfllama.shape import model_shape

        chosen = self._chosen
        Model.check_supported(chosen["path"])
        model_shape(chosen["path"]).check_positions(self._length)
        if chosen["ratio"] and chosen["max_length"]:
            raise click.UsageError("--ratio and --max-length exclude each other; give one of them")
        if chosen["image"]:
            plots.check(chosen["image"])
        check_folder(chosen["results"])
        for out in filter(None, (chosen["json_file"], chosen["image"])):
            check_target(chosen["path"], out, force=True, whole=True)
            for name in ("text", "questions", "results"):
                source = chosen.get(name)
                if source and out.exists() and source.exists() and out.samefile(source):
                    raise QFilterError(f"{out} is the file of --{name}: give another output file")
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
            caches=[Cache(self._length, **types)] * self._n_open,
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
        recalls = [word != "off" for word in chosen.get("recalls", ("off",))]
        ratios = chosen["ratio"] or (None if chosen["max_length"] else RATIOS)
        names = ("sinks", "window_length", "interval", "seed")
        return Plan(
            setting,
            tuple(
                variants(policies, ratios, chosen["max_length"], recalls, self._pairs or (None,))
            ),
            **{name: chosen[name] for name in names},
            context={"n_threads": chosen["n_threads"], **self._types},
        )

    def _sample_settings(self) -> dict:
        """All that a result depends on and that is not in its key."""
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

    def report(self, rows: list[dict], titles: list[str], table, draw) -> None:
        """Print the table, write what was asked for.

        Args:
            rows: plain JSON values; table: makes text of rows and titles; draw: from `plots`.
        """
        from qfllama.machine import provenance

        about = provenance(self._chosen["n_threads"])
        about["model"] = Path(self.model.path).name
        about["text"] = self.text.name
        if path := self._chosen["json_file"]:
            from qfllama.files import write_json

            write_json(path, {"about": about, "settings": self._settings, "rows": rows})
        if path := self._chosen["image"]:
            title = (
                f"{about['model']}, {self._settings['setting']}, {about['text']}, {about['date']}"
            )
            draw(path, rows, titles, title)
        click.echo(table(rows, titles))  # last: whoever reads it may close the pipe

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error) -> None:
        self.model.close()


def check_folder(path: Path | None) -> None:
    """Raises QFilterError if a file can't be written because its folder is missing."""
    if path is not None and not path.parent.is_dir():
        raise QFilterError(f"{path}: there is no folder {path.parent}: make it first")


def usable(model: Model) -> list[str]:
    """The full cache and every policy whose vectors the model's file has."""
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
    """Records of all documents, by variant."""
    from qfllama.evaluation import run

    with session.results() as results:
        run.run(session.model, documents, session.plan, results, asking)
        return {
            variant: run.answers(documents, variant, results) for variant in session.plan.variants
        }


def titles(records: dict) -> list[str]:
    """Of the variants that have records."""
    return [variant.title for variant in records]
