"""Models in llama.cpp for convert: loading without losing Ctrl-C, evicting layers, RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import llama_cpp
import numpy as np

from .. import native_calibration as native
from ..config import QFilterError
from ..engine import Context, Model, NoMemory
from ..filters import LAYOUTS


@contextmanager
def loaded(path, **params) -> Iterator[Model]:
    """The model in the GGUF file at `path`; params: of `engine.Model`.

    QFilterError with llama.cpp's own words if it cannot load the file."""
    with _cure_of_convert():
        model = in_thread(lambda: Model(path, **params), undo=Model.close)
    try:
        yield model
    finally:
        model.close()


def in_thread(work, undo=None):
    """Run work() in another thread and wait for it; if the wait is interrupted, undo(its result).

    Everything that logs or calls back must run this way: a KeyboardInterrupt that is raised in a
    Python callback of llama.cpp is lost. Only the main thread is interrupted."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except BaseException:
            finish(future)
            if undo is not None and future.exception() is None:
                undo(future.result())
            raise


def finish(future) -> None:
    """Wait until the work behind a future has ended, however often Ctrl-C is pressed: its data is
    freed next."""
    while not future.done():
        with suppress(BaseException):
            wait([future])


def evicting_layers(path) -> list[int]:
    """The layers of the GGUF model whose cached keys can be evicted, and that have filters: not
    those that are windowed, recurrent, or attend the keys of another layer. Reads metadata only.

    QFilterError, naming the reason, if the model is of a kind whose cache can't be bounded."""
    with loaded(path, no_alloc=True, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE) as model:
        layers = model.evicting_layers()
    if not layers:
        raise QFilterError(
            f"{path} has no attention layer over its whole context: its cache does not grow, "
            "so there is nothing to evict; run it as it is"
        )
    return layers


def rope_layout(path, *, sections=True) -> str:
    """How llama.cpp pairs the numbers of a row of K for RoPE: one of `filters.LAYOUTS`. Loads no
    weights. QFilterError for a kind of RoPE that is not among them.

    sections: also where the architecture alone does not tell that positions have sections, as for
    glm4; needs a file with all its tensors"""
    how = {"no_alloc": True, "load_mode": llama_cpp.LLAMA_LOAD_MODE_NONE}
    with loaded(path, **(how if sections else {"vocab_only": True})) as model:
        rope_type = llama_cpp.llama_model_rope_type(model.model)
    if rope_type not in LAYOUTS:
        raise QFilterError(
            f"{path} has RoPE of the unknown type {rope_type}: upgrade with `pip install -U qfllama`"
        )
    return LAYOUTS[rope_type]


def context(model: Model, n_ctx: int, n_batch: int, **params) -> Context:
    """A context of a `loaded` model with the whole cache, for one sequence of up to n_ctx tokens.
    The caller closes it. params: of `engine.context_params`.

    QFilterError with llama.cpp's own words if it cannot run the model."""
    with _cure_of_convert():
        return in_thread(
            lambda: model.open(None, n_ctx=n_ctx, n_batch=n_batch, **params), undo=Context.close
        )


@contextmanager
def _cure_of_convert() -> Iterator[None]:
    """If memory runs out in the block, the message also names the option of convert."""
    try:
        yield
    except NoMemory as error:
        raise NoMemory(f"{error}; here --max-seq-len") from None


class Ropes:
    """How RoPE turns the queries of a context's layers. Make it before the context decodes
    anything, and close it before the context."""

    def __init__(self, context: Context):
        self._ropes = native.ropes_init(context.ctx)

    def back(self, layer: int, positions, queries: np.ndarray) -> np.ndarray | None:
        """What queries were before RoPE.

        queries: [n_head, n, head_dim], in the layout of cached K rows; positions: [n].
        Returns float32 of the same shape. None if RoPE is not the last step for this layer's
        queries, or llama.cpp's graph does not show it."""
        positions = np.ascontiguousarray(positions, np.int32)
        rows = np.array(queries.transpose(1, 0, 2), np.float32, order="C")
        n_pos, n_head, _ = rows.shape
        known = native.ropes_back(
            self._ropes, layer, positions.ctypes.data, n_pos, n_head, rows.ctypes.data
        )
        return rows.transpose(1, 0, 2) if known else None

    def close(self) -> None:
        native.ropes_free(self._ropes)
