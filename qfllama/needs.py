"""Which vectors a policy takes from a file's filters, and the errors if they are missing."""

from __future__ import annotations

import numpy as np

from . import schema
from .config import QFilterConfig, QFilterError
from .filters import Filters
from .policies import BY_NAME, CALIBRATED
from .shape import ModelShape


def for_policy(
    filters: Filters | None, policy: str, shape: ModelShape, rope_type: int
) -> dict[str, dict]:
    """The vectors for a policy that passed `check_policy`: kind -> model layer -> array; {} if it
    needs none.

    rope_type: `llama_model_rope_type` of the loaded model

    Raises:
        QFilterError: the filters don't belong to a model of this shape, or are in another layout.
    """
    if not BY_NAME[policy].needs:
        return {}
    schema.check_fits(filters, shape)
    schema.check_layout(filters, rope_type)
    return {
        kind: {
            il: np.ascontiguousarray(rows, dtype=np.float32)
            for il, rows in filters.vectors[kind].items()
        }
        for kind in BY_NAME[policy].takes(filters.vectors)
    }


def check_policy(path, filters: Filters | None, policy: str) -> None:
    """Raises QFilterError if the file at `path`, with these filters, lacks what a policy needs, or
    can't have it because its cache can't be bounded."""
    needs, learned = BY_NAME[policy].needs, BY_NAME[policy].learned
    if BY_NAME[policy].works_with(filters.vectors if filters is not None else ()):
        return
    if filters is None:
        from .engine import Model  # which needs this module

        Model.check_supported(path)
        raise QFilterError(
            f"{path} has no filters for the policy {policy}: make them with "
            f"`qfllama convert {path} -o OUT.gguf`, or use another policy (kvdiff needs none)"
        )
    if learned:
        raise QFilterError(
            f"{path} has no learned filters, which the policy {policy} needs: make them with "
            f"`qfllama convert {path} -o OUT.gguf --filters learned --force`, or use another policy "
            "(qblend)"
        )
    if "moments" in needs:
        raise QFilterError(
            f"{path} has no second moments, which the policy {policy} needs: make them with "
            f"`qfllama convert {path} -o OUT.gguf --rank 16 --force`, or use another policy (qblend)"
        )
    raise QFilterError(
        f"{path} has no mean queries, which the policy {policy} needs: use another policy "
        f"(qblend), or calibrate with `qfllama convert {path} -o OUT.gguf --force`, which says "
        "so if this model can have none"
    )


def of_file(path, config: QFilterConfig) -> tuple[QFilterConfig, Filters | None]:
    """The config with the policy of the file at `path`, if nobody chose one; and the file's filters,
    None if the policy needs none.

    Raises:
        QFilterError: the file lacks what the policy needs, or is damaged.
    """
    filters = schema.read(path) if config.policy in CALIBRATED else None
    config = config.for_file(filters)
    check_policy(path, filters, config.policy)
    return config, filters if config.policy in CALIBRATED else None
