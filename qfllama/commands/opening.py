"""Opening what chat and compress start from: a model in its cache, a document."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qfllama.commands.console import note, note_offload
from qfllama.config import QFilterConfig, QFilterError, QFilterWarning

if TYPE_CHECKING:
    from qfllama import Llama


def read_document(path: Path | None) -> str | None:
    """The text of --file."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QFilterError(f"{path}: not a UTF-8 text: convert it to plain text first") from error


def open_model(
    model: Path, config: QFilterConfig | None, *, may_be_whole: bool = False, **kwargs
) -> Llama:
    """The model, in the stock cache if `config` is None; options that are None are left out.

    Args:
        may_be_whole: a bound as large as n_ctx is meant, and no word is lost about it.

    Raises:
        QFilterError: whatever is wrong with the file, the options or the memory of this machine.
    """
    import jinja2

    from qfllama import Llama
    from qfllama.shape import model_shape

    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    model_shape(model)  # has a clear word about a file that is no model
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", QFilterWarning)
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
    for warning in [] if may_be_whole else found:
        note(f"note: {warning.message}")
    note_offload(llm.offload)
    return llm
