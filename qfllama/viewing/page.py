"""The page of `qfllama view`: one HTML file with the facts in it, and the same facts as JSON."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from qfllama.files import plain
from qfllama.viewing.holding import Holding

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "{{facts}}"


def facts(held: Holding, **about) -> dict:
    """What is known, as plain JSON values.

    Args:
        about: what the page says about it: model, source, question.
    """
    heads = [
        {"layer": layer, "head": head, "kept": np.flatnonzero(row)}
        for (layer, head), row in zip(held.heads, held.kept, strict=True)
    ]
    if held.before is not None:
        for head, row in zip(heads, held.before, strict=True):
            head["kept_before"] = np.flatnonzero(row)
    return plain(
        {
            **_figures(held, about),
            "archived": np.flatnonzero(held.archived),
            "recalled": np.flatnonzero(held.recalled),
            "heads": heads,
        }
    )


def page(held: Holding, **about) -> str:
    """An HTML file that needs nothing else. about: as in `facts`."""
    packed = {
        **_figures(held, about),
        "heads": held.heads,
        "kept": _packed(held.kept),
        "archived": _packed(held.archived),
        "recalled": _packed(held.recalled),
        "before": None if held.before is None else _packed(held.before),
        "n_before": 0 if held.before is None else held.before.shape[1],
    }
    text = json.dumps(plain(packed), allow_nan=False).replace("<", "\\u003c")  # no tag ends it
    return TEMPLATE.read_text("utf-8").replace(PLACE, text)


def _figures(held: Holding, about: dict) -> dict:
    config = held.config
    return {
        **about,
        "policy": config.policy,
        "max_length": config.max_length,
        "window_length": config.window_length,
        "sinks": held.n_first,
        "texts": held.texts,
    }


def _packed(bits: np.ndarray) -> str:
    """Base64 of bits [..., n]: rows of whole bytes, the lowest bit of a byte first."""
    return base64.b64encode(np.packbits(bits, axis=-1, bitorder="little").tobytes()).decode()
