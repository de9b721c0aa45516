"""The whole way from a model to a GGUF with filters."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from .. import __version__, gguf_copy, schema
from ..config import MAX_SEED, EngineError, QFilterError
from ..files import check_space, check_target
from ..filters import Filters
from ..fit import fit
from ..progress import progress
from ..shape import model_shape
from . import (
    calibrate,
    choose,
    export,
    layout,
    learned,
    measure,
    native_model,
    published,
    published_hub,
    source,
    text,
)

BACKENDS = ("torch", "llama")
HELD_OUT = 5
"""One sequence out of this many is held out to measure the fit on."""
DTYPES = {"filters": np.float32, "queries": np.float32, "moments": np.float16}
NUM_SEQUENCES, LEARNED_SEQUENCES = 6, 20
"""Default numbers of sequences; learned filters need texts of three kinds."""
LEAST_FOR_SUMS = 1 << 30
"""Bytes for the sums of learned filters; a larger model allows as much as its file has."""
LEARNED = "learned"
"""A value of `filters`: calibrate learned filters, too; and the policy that uses them."""


@dataclass(frozen=True)
class Calibration:
    """How filters are calibrated.

    Texts: files, else a dataset NAME[:config], else built in. column: of the dataset, or the field
    of a .jsonl file. strict: fail if there is less text than asked for.
    num_sequences: None for NUM_SEQUENCES
    backend: what runs the model, one of BACKENDS; by default torch for a checkpoint and llama for
    a GGUF. n_gpu_layers: of the backend llama, see engine.Model
    rank: of the second moments (policy qfilters2), 0 for none"""

    max_seq_len: int = 2048
    num_sequences: int | None = None
    num_samples: int = 3000
    seed: int = 0
    text_files: tuple[str, ...] = ()
    dataset: str | None = None
    split: str | None = None
    column: str | None = None
    strict: bool = False
    backend: str | None = None
    n_gpu_layers: int | str = "auto"
    rank: int = 0


@dataclass(frozen=True)
class Summary:
    """What a conversion did. outputs: one file, or the parts of a split model."""

    outputs: list[Path]
    n_bytes: int
    filters: Filters
    seconds: float


def convert(
    src,
    out,
    calibration=Calibration(),
    *,
    filters: str | None = None,
    quantize: str | None = None,
    outtype: str = "auto",
    force=False,
    note=None,
    bars=False,
) -> Summary:
    """Calibrate filters for the model SRC (GGUF file, checkpoint folder, hub id) and write the GGUF
    file OUT with them. OUT appears complete or not at all; SRC is never changed.

    filters: published filters (folder, file or hub id) to use instead of calibrating; or LEARNED
    quantize: llama.cpp's name of a quantization for OUT, or None to leave the weights as they are
    outtype: type of the GGUF that upstream's converter makes of a checkpoint
    force: replace OUT, and filters that SRC has already
    note: called with lines for the user; bars: show progress on stderr
    Raises QFilterError for anything that a user can fix."""
    started = time.monotonic()
    out, note = Path(out), note or (lambda line: None)
    learn = filters == LEARNED
    if calibration.num_sequences is None:
        default = LEARNED_SEQUENCES if learn else NUM_SEQUENCES
        calibration = replace(calibration, num_sequences=default)
    if learn and calibration.num_sequences < HELD_OUT:
        raise QFilterError(f"--filters learned needs --num-sequences {HELD_OUT} or more")
    filters = None if learn else filters
    path, backend, texts = _check(src, out, calibration, filters, quantize, outtype, force)
    bar = partial(progress, shown=bars)
    with _workspace(out) as folder:
        full = path
        if path.is_dir():
            full = Path(folder) / "model.gguf"
            with _bytes(bar("llama.cpp's converter")) as at:
                export.checkpoint_to_gguf(path, full, outtype, at)
            source.check_gguf(full)
            native_model.evicting_layers(full)
        found = published.load(filters, full, note) if filters is not None else None
        gguf = full
        if quantize and export.needs_quantizing(full, quantize):
            gguf = Path(folder) / "quantized.gguf"
            with _bytes(bar(f"quantizing to {quantize}")) as at:
                export.quantize(full, gguf, quantize, at)
        if found is None:
            # torch compares weights, so it gets the unquantized ones; llama runs what users will
            model = _Model(path, full if backend == "torch" else gguf, backend, calibration)
            found = _calibrated(model, calibration, texts, note, bar, learn)
            found.policy = _policy(gguf, calibration, found, note, bar, learn)
        with _bytes(bar(f"writing {out.name}")) as at:
            outputs = gguf_copy.write(gguf, out, found, force=force, progress=at)
    n_bytes = sum(file.stat().st_size for file in outputs)
    return Summary(outputs, n_bytes, found, time.monotonic() - started)


@contextmanager
def _workspace(out):
    """A folder beside `out` for the time of the block."""
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
        # removes it again if Ctrl-C came during the removal
        stack.callback(shutil.rmtree, folder.name, ignore_errors=True)
        yield stack.enter_context(folder)


def _check(src, out, calibration, filters, quantize, outtype, force):
    """Everything that can be refused before work starts. Returns the source as a path, the backend
    and the texts."""
    if not Path(src).is_file():
        check_target(src, out, force=force)  # before a download
    path = source.resolve(src)
    backend = calibration.backend or ("torch" if path.is_dir() else "llama")
    if path.is_dir() or (backend == "torch" and filters is None):
        source.check_packages()
    if filters is not None:
        published_hub.check_packages()
    if quantize is not None:
        export.quantization(quantize)
    if outtype == "q8_0" and quantize is not None:
        raise QFilterError("--quantize needs full precision: leave out --outtype q8_0")
    if outtype != "auto" and not path.is_dir():
        raise QFilterError("--outtype is for checkpoints: use --quantize TYPE for a GGUF")
    if path.is_dir():
        export.converter_path()
        whole = True
    else:
        schema.check_source(path, force=force)
        whole = quantize is not None and export.needs_quantizing(path, quantize)
        check_target(path, out, force=force, whole=whole)
        native_model.evicting_layers(path)
    texts = []
    if filters is None:
        texts = text.sources(
            calibration.text_files, calibration.dataset, calibration.split, calibration.column
        )
    check_space(out.parent, (2 if whole else 1) * source.n_bytes(path))
    return path, backend, texts


@dataclass(frozen=True)
class _Model:
    """A model to calibrate: where it lies, the GGUF file that gets the filters, and what runs it."""

    path: Path
    gguf: Path
    backend: str
    calibration: Calibration

    def opened(self, n_ctx):
        """The model, ready to read sequences of up to n_ctx tokens; see capture_llama.LlamaModel"""
        if self.backend == "llama":
            from .capture_llama import LlamaModel

            return closing(LlamaModel(self.gguf, n_ctx, self.calibration.n_gpu_layers))
        from .capture_torch import TorchModel  # torch takes seconds to load: after all checks

        return closing(TorchModel(self.path, self.gguf, n_ctx))


def _calibrated(model, calibration, texts, note, bar, learn):
    """Filters for a model, with their provenance and how well they fit. learn: learned ones, too"""
    sequences = _sequences(model.gguf, calibration, texts, note)
    lengths = [len(tokens) for tokens in sequences]
    layers = native_model.evicting_layers(model.gguf)
    if learn:
        layout.Weights(model.gguf).check_output(layers)
    n_held_out = held_out(len(sequences))
    with (
        bar("reading calibration text", sum(lengths)) as reading,
        model.opened(max(lengths)) as running,
    ):
        choice = getattr(running, "offload", None)
        if choice is not None and choice.auto and choice.total is not None:
            note(str(choice))
        vectors, quality, n_samples = _run(running, layers, sequences, calibration, reading.update)
    layers = sorted(vectors["filters"])
    vectors = {
        kind: {il: by_layer[il].astype(DTYPES[kind]) for il in layers if il in by_layer}
        for kind, by_layer in vectors.items()
    }
    head_dim = max(rows.shape[-1] for rows in vectors["filters"].values())
    if n_samples < head_dim:
        note(
            f"warning: only {n_samples} queries per head, fewer than a head's {head_dim} "
            "dimensions: too few for reliable filters; use more --num-samples or text"
        )
    with bar("hashing the model", source.n_bytes(model.path)) as hashing:
        sha256 = source.digest(model.path, hashing.update)
    provenance = {
        "text": ", ".join(t.name for t in texts),
        "sequences": len(sequences),
        "held_out": n_held_out,
        "tokens": sum(lengths),
        "samples": n_samples,
        "seed": calibration.seed,
        "route": model.backend,
        "model_sha256": sha256,
        "tool": f"qfllama {__version__}",
    }
    missing = ", ".join(str(layer) for layer in layers if layer not in vectors["queries"])
    if missing:
        if learn:
            raise QFilterError(
                "llama.cpp's graph does not show that RoPE is the last step for queries and keys of "
                f"layer {missing}, which learned filters need; leave out --filters learned"
            )
        del vectors["queries"]
        note(
            "warning: llama.cpp's graph does not show that RoPE is the last step for queries of "
            f"layer {missing}: no mean queries for qahead, and the filters hold only near the "
            "calibration's positions"
        )
    filters = Filters(vectors, provenance, quality, native_model.rope_layout(model.gguf))
    if learn:
        _learn(model, calibration, sequences, filters, note, bar)
    if not quality:
        note("one sequence only: nothing is held out to measure how well the filters fit")
    elif fit(filters).verdict == "poor":
        note("warning: " + fit(filters).summary)
    return filters


def _learn(model, calibration, sequences, filters, note, bar):
    """Add learned filters."""
    texts = learned.texts(model.gguf, sequences, calibration.num_sequences, calibration.seed)
    groups = learned.in_turn(filters, max(source.n_bytes(model.gguf), LEAST_FOR_SUMS))
    n_tokens = len(groups) * sum(map(learned.n_read, texts))
    with bar("reading texts twice", n_tokens) as reading:
        explained = learned.add(
            filters,
            model.gguf,
            groups,
            texts,
            held_out(len(texts)),
            calibration.n_gpu_layers,
            reading.update,
        )
    note(f"learned filters explain {explained:.0%} of what a repetition looks at")


def _policy(gguf, calibration, filters, note, bar, learn) -> str | None:
    """The policy that is best in a test of the file that gets the filters; None: there is no test."""
    if not choose.fits(gguf):
        note(
            "the model was trained for fewer positions than the test of policies needs: "
            f"{choose.DEFAULT} is the policy of this file"
        )
        return None
    policies = [choose.DEFAULT, choose.OTHER, *[LEARNED] * learn]
    seed = calibration.seed % (MAX_SEED + 1)
    try:
        found = choose.losses(gguf, filters, policies, calibration.n_gpu_layers, seed, bar)
    except (QFilterError, EngineError) as error:  # the filters themselves are sound
        note(f"warning: no test of policies ({error}): {choose.DEFAULT} is the policy of this file")
        return None
    best = choose.best(found)
    shown = ", ".join(f"{policy} {values.mean():.2f}" for policy, values in found.items())
    ratios = " and ".join(f"x{ratio}" for ratio in choose.RATIOS)
    note(f"loss of numbers hidden in text, at {ratios}: {shown}: {best} is the policy of this file")
    return best


def _sequences(gguf, calibration, texts, note):
    """Calibration text as tokens, with a note if there is less of it than asked for."""
    max_seq_len = calibration.max_seq_len
    n_ctx_train = model_shape(gguf).n_ctx_train
    if 0 < n_ctx_train < max_seq_len:
        max_seq_len = n_ctx_train
        note(f"the model was trained for {max_seq_len:,} positions: using sequences of that length")
    sequences = text.sequences(
        gguf, texts, calibration.num_sequences, max_seq_len, strict=calibration.strict
    )
    too_little = text.shortage(sequences, calibration.num_sequences, max_seq_len)
    if too_little:
        note(f"{too_little}: using what there is")
    return sequences


def held_out(n_sequences: int) -> int:
    """How many of n_sequences are held out: a fifth, but at least one if there are several."""
    return 0 if n_sequences < 2 else max(n_sequences // HELD_OUT, 1)


def _run(model, layers, sequences, calibration, progress):
    """Run the model over all sequences. Returns the vectors (kind -> layer -> array, in the layout
    of cached keys; queries only for layers that have them; moments if calibration.rank > 0), the
    figures of the fit, and the number of queries per head that were used."""
    # the longest are held out: the rank correlations need queries far behind their keys
    n_first = len(sequences) - held_out(len(sequences))
    sequences = sorted(sequences, key=len)
    first, last = sequences[:n_first], sequences[n_first:]
    positions = calibrate.sample_positions(
        [len(tokens) for tokens in first], calibration.num_samples, calibration.seed
    )
    moments = calibrate.QueryMoments(len(layers), sum(map(len, positions)))
    queries = calibrate.MeanQueries()
    wanted = set(layers)
    n_head_kv, scale = {}, {}
    for tokens, chosen in zip(first, positions, strict=True):

        def take(call, chosen=chosen):
            if call.layer in wanted:
                n_head_kv[call.layer], scale[call.layer] = call.n_head_kv, call.scale
                at = chosen[(chosen >= call.start) & (chosen < call.start + call.n_tokens)]
                if len(at):
                    found = call.queries(at - call.start)
                    moments.add(call.layer, found)
                    shared = found.reshape(call.n_head_kv, -1, *found.shape[1:]).mean(1)
                    before = model.before_rope(call.layer, at, shared)
                    if before is not None:
                        queries.add(call.layer, before)

        model.read(tokens, take, progress)
    directions = moments.directions()
    filters = {
        layer: calibrate.group_mean(v1, n_head_kv[layer]) for layer, v1 in directions.items()
    }
    means = moments.means()
    meter = measure.Fit(directions, means, filters)
    for tokens in last:
        model.read(tokens, meter.add, progress)
        meter.end_sequence()
    quality = meter.figures() if last else {}
    n_samples = sum(map(len, positions))
    vectors = {"filters": model.to_cached(filters), "queries": queries.means()}
    if calibration.rank > 0:
        vectors["moments"] = model.to_cached(moments.second_order(calibration.rank, scale))
    return vectors, quality, n_samples


@contextmanager
def _bytes(bar):
    """Yields a function for the bytes done so far and, if known, the total."""

    def at(done, total=None):
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        yield at
