"""The whole way from a model to a GGUF with filters."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .. import __version__, metadata
from . import export, layout, source, text


@dataclass(frozen=True)
class Calibration:
    """How filters are calibrated. Texts: files, else a dataset NAME[:config], else built in."""

    max_seq_len: int = 2048
    num_sequences: int = 20
    num_samples: int = 3000
    seed: int = 0
    text_files: tuple[str, ...] = ()
    dataset: str | None = None


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    output: Path
    n_bytes: int
    filters: metadata.Filters
    seconds: float


def convert(
    src,
    out,
    calibration=Calibration(),
    *,
    quantize: str | None = None,
    outtype: str = "auto",
    force=False,
    note=None,
    bars=False,
) -> Summary:
    """Calibrate filters for the model SRC (GGUF file, checkpoint folder, hub id) and write the GGUF
    file OUT with them. OUT appears complete or not at all; SRC is never changed.

    quantize: llama.cpp's name of a quantization for OUT, or None to leave the weights as they are
    outtype: type of the GGUF that upstream's converter makes of a checkpoint
    force: replace OUT, and filters that SRC has already
    note: called with lines for the user; bars: show progress bars on stderr
    Raises QFilterError for anything that a user can put right."""
    started = time.monotonic()
    out = Path(out)
    path = _check(src, out, quantize, force)
    progress = _Bars(bars)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        gguf = path
        if path.is_dir():
            gguf = Path(folder) / "model.gguf"
            with progress.bytes("llama.cpp's converter") as at:
                export.checkpoint_to_gguf(path, gguf, outtype, at)
            source.check_gguf(gguf)
        filters = _calibrated(path, gguf, calibration, note or (lambda line: None), progress)
        if quantize and export.needs_quantizing(gguf, quantize):
            full, gguf = gguf, Path(folder) / "quantized.gguf"
            with progress.bytes(f"quantizing to {quantize}") as at:
                export.quantize(full, gguf, quantize, at)
        with progress.bytes(f"writing {out.name}") as at:
            metadata.write(gguf, out, filters, force=force, progress=at)
    return Summary(out, out.stat().st_size, filters, time.monotonic() - started)


def _check(src, out, quantize, force):
    """Everything that can be refused before work starts. Returns the resolved source."""
    source.check_packages()
    metadata.check_target(src, out, force=force)
    path = source.resolve(src)
    if quantize:
        export.quantization(quantize)
    copies = 1
    if path.is_dir():
        export.converter_path()
        copies = 2
    else:
        metadata.check_source(path, force=force)
        if quantize and export.needs_quantizing(path, quantize):
            copies = 2
    metadata.check_space(out.parent, copies * source.n_bytes(path))
    return path


def _calibrated(path, gguf, calibration, note, progress):
    """Filters for the model at `path`, in the layout of the GGUF file made of it."""
    from . import calibrate, capture_torch  # torch takes seconds to load: after all checks

    shape = metadata.model_shape(gguf)
    max_seq_len = calibration.max_seq_len
    if 0 < shape.n_ctx_train < max_seq_len:
        max_seq_len = shape.n_ctx_train
        note(f"the model was trained for {max_seq_len:,} positions: using sequences of that length")
    texts = _texts(calibration)
    sequences = text.sequences(gguf, texts, calibration.num_sequences, max_seq_len)
    lengths = [len(tokens) for tokens in sequences]
    wanted = calibration.num_sequences * max_seq_len
    if sum(lengths) < wanted:
        note(
            f"the text has {sum(lengths):,} tokens, fewer than the {wanted:,} asked for: "
            "using what there is"
        )
    positions = calibrate.sample_positions(lengths, calibration.num_samples, calibration.seed)

    load = capture_torch.load_checkpoint if path.is_dir() else capture_torch.load_gguf
    model = load(path)
    with progress("reading calibration text", sum(lengths), " tokens") as bar:
        moments = capture_torch.collect(model, sequences, positions, bar.update)
    weight = moments.filters(model.config.num_key_value_heads)
    weight = weight[..., layout.head_order(gguf, model)]
    del model
    with progress("hashing the model", source.n_bytes(path), "B") as bar:
        sha256 = source.digest(path, bar.update)
    provenance = {
        "text": ", ".join(t.name for t in texts),
        "sequences": len(sequences),
        "tokens": sum(lengths),
        "samples": moments.counts[0],
        "seed": calibration.seed,
        "route": "torch",
        "model_sha256": sha256,
        "tool": f"qfllama {__version__}",
    }
    return metadata.Filters(weight, list(range(shape.n_layer)), provenance)


def _texts(calibration):
    if calibration.text_files:
        return [text.file(path) for path in calibration.text_files]
    return [text.dataset(calibration.dataset) if calibration.dataset else text.builtin()]


class _Bars:
    """Progress bars on stderr, or none."""

    def __init__(self, shown):
        self.shown = shown

    def __call__(self, title, total, unit):
        return tqdm(total=total, desc=title, unit=unit, unit_scale=True, disable=not self.shown)

    def bytes(self, title):
        """A bar that is called with the bytes done so far, and in all where that is known."""
        return _BytesDone(self(title, None, "B"))


class _BytesDone:
    def __init__(self, bar):
        self.bar = bar

    def __enter__(self):
        return self

    def __call__(self, done, total=None):
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_):
        self.bar.close()
