"""Models as llama.cpp sees them: loading with errors in one line, and what eviction can touch."""

from __future__ import annotations

import ctypes
import os
import re
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import llama_cpp
import numpy as np
from llama_cpp._logger import llama_log_callback

from .. import native
from ..config import QFilterError
from ..filters import LAYOUTS

GGML_LOG_LEVEL_ERROR = 4  # ggml.h; not among the names of llama-cpp-python

OUT_OF_MEMORY = re.compile(
    r"out of memory|insufficient memory|std::bad_alloc|(unable|failed|cannot) (to )?allocate",
    re.IGNORECASE,
)
"""What llama.cpp and ggml's backends say when memory runs out."""
LESS_MEMORY = "use a smaller --n-gpu-layers (0: none) or a smaller --max-seq-len"

_logs = [llama_log_callback]
"""Where llama.cpp's log went before: blocks of log_of_llama_cpp() nest."""


@contextmanager
def loaded(path, **params):
    """A llama_model of the GGUF file at `path`. params: fields of llama_model_params.

    QFilterError with llama.cpp's own words if it cannot load the file."""
    model_params = llama_cpp.llama_model_default_params()
    for name, value in params.items():
        assert hasattr(model_params, name)
        setattr(model_params, name, value)
    with log_of_llama_cpp() as lines:
        model = waited(
            lambda: llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params),
            undo=llama_cpp.llama_model_free,
        )
    if not model:
        raise QFilterError(f"llama.cpp cannot load {path}: {_why(lines, 'give another file')}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def waited(work, undo=None):
    """work() in another thread, which is waited for; undo(its result) if that is interrupted.

    Whatever logs or calls back has to run this way: a KeyboardInterrupt that is raised within a
    Python callback of llama.cpp is lost. Only the main thread is interrupted."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except BaseException:
            finish(future)
            if undo is not None and future.exception() is None and future.result():
                undo(future.result())
            raise


def finish(future) -> None:
    """Wait until the work behind a future has ended, however often Ctrl-C is pressed: what it
    works on is freed next."""
    while not future.done():
        with suppress(BaseException):
            wait([future])


def evicting_layers(path) -> list[int]:
    """The layers of the GGUF model whose cached keys can be evicted, and that have filters: not
    those that are windowed, recurrent, or attend the keys of another layer. Reads metadata only.

    QFilterError, naming the reason, if the model is of a kind whose cache can't be bounded."""
    with loaded(path, no_alloc=True, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE) as model:
        why = ctypes.create_string_buffer(256)
        if not native.model_supported(model, why, len(why)):
            raise QFilterError(f"{path}: {why.value.decode()}; give another model")
        n_layer = llama_cpp.llama_model_n_layer(model)
        layers = [layer for layer in range(n_layer) if native.layer_evicts(model, layer)]
    if not layers:
        raise QFilterError(
            f"{path} has no attention layer over its whole context: its cache does not grow, "
            "so there is nothing to evict; run it as it is"
        )
    return layers


def rope_layout(path) -> str:
    """How llama.cpp pairs the numbers of a row of K for RoPE: one of `filters.LAYOUTS`. Loads no
    weights. QFilterError for a kind of RoPE that is not among them."""
    with loaded(path, vocab_only=True) as model:
        rope_type = llama_cpp.llama_model_rope_type(model)
    if rope_type not in LAYOUTS:
        raise QFilterError(
            f"{path} has RoPE of the unknown type {rope_type}: upgrade with `pip install -U qfllama`"
        )
    return LAYOUTS[rope_type]


def context(path, model, n_ctx: int, n_batch: int, **params):
    """A llama_context of the `loaded` model in the GGUF file at `path`, for one sequence of up to
    n_ctx tokens, with Flash Attention; to be freed by the caller. params: other fields of
    llama_context_params. QFilterError with llama.cpp's own words if it cannot run the model."""
    fields = {
        "n_ctx": n_ctx,
        "n_batch": n_batch,
        "n_ubatch": n_batch,
        "n_seq_max": 1,
        "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "no_perf": True,
        **params,
    }
    context_params = llama_cpp.llama_context_default_params()
    for name, value in fields.items():
        setattr(context_params, name, value)
    with log_of_llama_cpp() as lines:
        ctx = waited(
            lambda: llama_cpp.llama_init_from_model(model, context_params),
            undo=llama_cpp.llama_free,
        )
    if not ctx:
        raise QFilterError(f"llama.cpp cannot run {path}: {_why(lines, 'try `--backend torch`')}")
    return ctx


def _why(lines, otherwise):
    """llama.cpp's first error and what to do about it; lines: its errors, otherwise: what to do
    where memory is not to blame."""
    why = lines[0] if lines else "no reason given"
    no_memory = any(OUT_OF_MEMORY.search(line) for line in lines)
    return f"{why}; {LESS_MEMORY if no_memory else otherwise}"


class Ropes:
    """How RoPE turns the queries of a llama_context's layers: made before it decodes anything,
    closed before it is freed."""

    def __init__(self, ctx):
        self._ropes = native.ropes_init(ctx)

    def back(self, layer: int, positions, queries: np.ndarray) -> np.ndarray | None:
        """What queries were before RoPE.

        positions: [n] of the queries [n_head, n, head_dim], in the layout of cached K rows.
        Returns float32 of the same shape, None if something else is done to this layer's queries
        after RoPE, or llama.cpp's graph does not show it."""
        positions = np.ascontiguousarray(positions, np.int32)
        rows = np.array(queries.transpose(1, 0, 2), np.float32, order="C")
        n_pos, n_head, _ = rows.shape
        known = native.ropes_back(
            self._ropes, layer, positions.ctypes.data, n_pos, n_head, rows.ctypes.data
        )
        return rows.transpose(1, 0, 2) if known else None

    def close(self) -> None:
        native.ropes_free(self._ropes)


@contextmanager
def log_of_llama_cpp():
    """Within the block, llama.cpp's errors go to the list this gives, and no log to stderr."""
    lines = []

    @llama_cpp.llama_log_callback
    def collect(level, message, _):
        if level == GGML_LOG_LEVEL_ERROR:
            lines.append(" ".join(message.decode("utf-8", "replace").split()))

    _logs.append(collect)
    try:
        llama_cpp.llama_log_set(collect, None)
        yield lines
    finally:
        _logs.remove(collect)
        llama_cpp.llama_log_set(_logs[-1], None)
