"""Opens what chat and compress start from: a model in its cache, a document."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qfllama.commands.console import note, note_offload
from qfllama.config import BoundsNothing, QFilterConfig, QFilterError, QFilterWarning

if TYPE_CHECKING:
    from qfllama import Llama
    from qfllama.state import Prompt


def read_document(path: Path | None) -> str | None:
    """The text of --file. QFilterError if the file is empty or no text."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QFilterError(f"{path}: not a UTF-8 text: convert it to plain text first") from error
    if not text.strip():
        raise QFilterError(f"{path} is empty: give a file with text in it")
    return text


def open_model(
    model: Path, config: QFilterConfig | None, *, may_be_whole: bool = False, **kwargs
) -> Llama:
    """The model, in the stock cache if `config` is None; options that are None are left out.

    Args:
        may_be_whole: no warning about a bound as large as n_ctx: it is intended.

    Raises:
        QFilterError: whatever is wrong with the file, the options or the memory of this machine.
    """
    import jinja2

    from qfllama import Llama
    from qfllama.shape import model_shape

    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    model_shape(model)  # raises a clear error for a file that is no model
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", QFilterWarning)
            if may_be_whole:
                warnings.simplefilter("ignore", BoundsNothing)
            llm = Llama(str(model), qfilters=config, flash_attn=True, **kwargs)
    except QFilterError:
        raise
    except MemoryError as error:
        raise QFilterError(
            f"not enough memory for {kwargs.get('n_ctx', 0):,} positions: use a smaller --n-ctx"
        ) from error
    except (ValueError, jinja2.TemplateError) as error:
        raise QFilterError(
            f"{model}: llama.cpp can't use this file ({error}); --verbose shows its log"
        ) from error
    for warning in found:
        note(f"note: {warning.message}")
    note_offload(llm.offload)
    return llm


def types_of(saved: Prompt | None, type_k: str | None, type_v: str | None) -> tuple:
    """The types of the cache: those that were given, else those of a saved state."""
    of_file = {} if saved is None else saved.settings
    given = (name and name.lower() for name in (type_k, type_v))  # as llama-server spells them
    return tuple(
        name or of_file.get(key) for key, name in zip(("type_k", "type_v"), given, strict=True)
    )


def cache_of(
    cache: dict, full: bool, saved: Prompt | None, *, n_gpu_layers, **options
) -> tuple[QFilterConfig | None, int | str]:
    """(config, layers on the GPU). The config is made of the options in `cache` (names of
    QFilterConfig), None for the full cache. options: of `plan.make_plan`, if max_length is auto."""
    if cache["max_length"] == "auto" and not full:
        n_gpu_layers = fill_memory(cache, n_gpu_layers=n_gpu_layers, **options)
    return bound(cache, full, saved), n_gpu_layers


def bound(cache: dict, full: bool, saved: Prompt | None) -> QFilterConfig | None:
    """The config from the options in `cache` (names of QFilterConfig); None for the full cache."""
    cache = {name: value for name, value in cache.items() if value is not None}
    if full and cache:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in cache)
        raise QFilterError(f"--full is the cache without bound: leave out {options}")
    if full:
        return None
    if saved is None:
        return QFilterConfig(**cache)
    from qfllama.state import config_for

    for name in ("policy", "sinks"):
        made = saved.settings.get(name)
        if cache.pop(name, made) != made:
            raise QFilterError(f"the state was made with {name} {made}: leave out --{name}")
    return config_for(saved, **cache)


def fill_memory(cache: dict, **options) -> int:
    """Put the largest max_length that fits into `cache` (names of QFilterConfig), with a note;
    returns the layers on the GPU that go with it. options: of `plan.make_plan`."""
    from qfllama.plan import make_plan, needed

    in_ram = cache["archive"] in (None, True)
    plan = needed(make_plan(archive=in_ram, **options))
    cache["max_length"] = plan.max_length
    note(f"max_length {plan.max_length:,} (auto: what fits into the memory of {plan.place.name})")
    return plan.n_gpu_layers or 0
