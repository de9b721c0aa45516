"""`Llama`: llama_cpp.Llama with a KV cache that stays small."""

from __future__ import annotations

import contextlib
import ctypes
import os

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
from gguf.constants import GGMLQuantizationType

from qfllama import metadata, native
from qfllama.config import POLICIES, QFilterConfig, QFilterError

CACHE_TYPES = {
    name: int(GGMLQuantizationType[name.upper()])
    for name in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
}
"""KV cache types by name, as llama.cpp's own command line has them."""


def cache_type(value: int | str | None) -> int | None:
    """The ggml type of a KV cache given by name (`"q8_0"`) or number; None stays None.

    Raises:
        QFilterError: no such type.
    """
    if not isinstance(value, str):
        return value
    try:
        return CACHE_TYPES[value.lower()]
    except KeyError:
        raise QFilterError(
            f"unknown KV cache type {value!r}: choose one of {', '.join(CACHE_TYPES)}"
        ) from None


class BoundedContext(internals.LlamaContext):
    """Upstream's wrapper around a llama_context, made by `llama_qfilter_init_from_model`."""

    flags = 0

    def __init__(self, *, model, params, verbose, config: QFilterConfig, weight: dict):
        """
        Args:
            weight: model layer id -> float32 [n_head_kv, head_dim]; may be empty.

        Raises:
            ValueError: llama.cpp refused (its log says why).
        """
        self._config = config
        self._weight = weight
        super().__init__(model=model, params=params, verbose=verbose)

    def _init_from_model(self, model, cparams):
        """Called by upstream's constructor (patches/0002-*.patch)."""
        config = self._config
        n_layer = llama_cpp.llama_model_n_layer(model)
        rows = [self._weight.get(il) for il in range(n_layer)]
        float_p = ctypes.POINTER(ctypes.c_float)
        filters = (float_p * n_layer)(
            *(row.ctypes.data_as(float_p) if row is not None else float_p() for row in rows)
        )
        params = native.default_params()
        params.n_cells = config.max_length
        params.n_keep = config.n_keep
        params.n_sink = config.sinks
        params.n_window = config.window_length
        params.policy = POLICIES.index(config.policy)
        params.flags = self.flags
        params.n_filters = n_layer
        params.filters = filters
        return native.init_from_model(model, cparams, ctypes.byref(params))


class Llama(llama_cpp.Llama):
    """A drop-in `llama_cpp.Llama` whose KV cache can be bounded.

    Takes every parameter of `llama_cpp.Llama`, and:

    Args:
        qfilters: True for the defaults of `QFilterConfig`, or a `QFilterConfig`; without it
            this is the stock class with the full cache.
        type_k, type_v: KV cache types, also by name (`"q8_0"`).
        n_batch: with `qfilters` at most the config's `interval`, which is its default.

    Raises:
        QFilterError: the file has no filters or none that fit the model, the sizes don't fit
            each other, or the model can't have a bounded cache; the message says what to do.
    """

    def __init__(self, model_path: str, *, qfilters: bool | QFilterConfig | None = None, **kwargs):
        self._stack = contextlib.ExitStack()  # upstream's __del__ needs it, also when we raise
        if qfilters is not None and not isinstance(qfilters, (bool, QFilterConfig)):
            raise QFilterError(f"qfilters is {qfilters!r}: use True or a QFilterConfig")
        self.qfilter_config = QFilterConfig() if qfilters is True else qfilters or None
        for name in ("type_k", "type_v"):
            kwargs[name] = cache_type(kwargs.get(name))
        # llama.cpp rounds up, upstream's list of tokens does not: beyond it they would be lost
        kwargs["n_ctx"] = -(-kwargs.get("n_ctx", 512) // 256) * 256
        if self.qfilter_config is not None:
            self._bound(str(model_path), kwargs)
        super().__init__(str(model_path), **kwargs)

    def _bound(self, model_path: str, kwargs: dict) -> None:
        """Checks what upstream's constructor will be given; reads the filters."""
        config = self.qfilter_config
        if kwargs.get("draft_model") is not None:
            raise QFilterError("draft_model can't be used with qfilters: leave one of them out")
        if not kwargs.setdefault("flash_attn", True):
            raise QFilterError("qfilters needs Flash Attention: leave out flash_attn=False")
        if kwargs["n_ctx"] == 0 or config.max_length < kwargs["n_ctx"]:
            for name in ("n_batch", "n_ubatch"):
                if kwargs.setdefault(name, config.interval) > config.interval:
                    raise QFilterError(
                        f"{name} {kwargs[name]} is larger than the interval {config.interval}: "
                        f"use {name} <= {config.interval}, or a larger interval"
                    )
        if not os.path.isfile(model_path):
            raise QFilterError(f"{model_path} is not a file: check the path")
        self._filters = metadata.read(model_path) if config.policy == "qfilters" else None
        if config.policy == "qfilters" and self._filters is None:
            raise QFilterError(
                f"{model_path} has no filters: make them with "
                f"`qfllama convert {model_path} -o OUT.gguf`, or use another policy"
            )

    def _make_context(self, *, model, params, verbose):
        """Called by upstream's constructor once the model is loaded (patches/0002-*.patch)."""
        if self.qfilter_config is None:
            return internals.LlamaContext(model=model, params=params, verbose=verbose)
        why = ctypes.create_string_buffer(512)
        if not native.supported(model.model, params, why, len(why)):
            raise QFilterError(f"qfilters can't be used: {why.value.decode()}")
        weight = {}
        if self._filters is not None:
            shape = metadata.model_shape(self.model_path)
            metadata.check_fits(
                self._filters,
                n_layer=shape.n_layer,
                n_head_kv=shape.n_head_kv,
                head_dim=shape.head_dim,
            )
            weight = {
                il: np.ascontiguousarray(row, dtype=np.float32)
                for il, row in zip(self._filters.layers, self._filters.weight, strict=True)
            }
        return BoundedContext(
            model=model,
            params=params,
            verbose=verbose,
            config=self.qfilter_config,
            weight=weight,
        )

    def _need_bound(self) -> None:
        if self.qfilter_config is None:
            raise QFilterError("this Llama has the full cache: make it with qfilters=True")
        if self._ctx.ctx is None:
            raise QFilterError("this Llama is closed: make a new one")

    def qfilter_stats(self) -> dict[str, int]:
        """What the bounded cache did and holds.

        Returns:
            evictions, dropped (cells), bytes_moved, score_us, select_us, gather_us
            (microseconds, all since the context was made); cells_used, cells (the bound),
            cells_allocated (the bound rounded up to 256); kv_bytes (allocated for K and V),
            kv_bytes_full (what a cache of n_ctx cells would take); positions (tokens seen).

        Raises:
            QFilterError: this object has no bounded cache.
        """
        self._need_bound()
        stats = native.Stats(struct_size=ctypes.sizeof(native.Stats))
        native.get_stats(self._ctx.ctx, ctypes.byref(stats))
        return {
            "evictions": stats.n_evictions,
            "dropped": stats.n_dropped,
            "bytes_moved": stats.n_bytes_moved,
            "score_us": stats.t_score_us,
            "select_us": stats.t_select_us,
            "gather_us": stats.t_gather_us,
            "cells_used": stats.n_cells_used,
            "cells": stats.n_cells,
            "cells_allocated": stats.n_cells_alloc,
            "kv_bytes": stats.n_bytes_kv,
            "kv_bytes_full": stats.n_bytes_kv // stats.n_cells_alloc * self.n_ctx(),
            "positions": self.n_tokens,
        }

    def kept_positions(self, layer: int, head: int) -> np.ndarray:
        """The positions whose keys one KV head of one layer holds.

        Args:
            layer: layer of the model; head: KV head.

        Returns:
            int32 [cells_used], ascending.

        Raises:
            QFilterError: no bounded cache, or no such layer or head.
        """
        self._need_bound()
        out = np.empty(self.qfilter_stats()["cells_used"], dtype=np.int32)
        n = native.kept(
            self._ctx.ctx,
            0,
            layer,
            head,
            out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            len(out),
        )
        if n < 0:
            raise QFilterError(f"no layer {layer} with a KV head {head}: check both numbers")
        return out

    def cached_rows(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of K and V of one layer, as they are stored.

        Returns:
            two uint8 arrays [cells_used, row_bytes], in the order of `kept_positions`; a row
            holds all KV heads, in the cache's own type (llama-kv-cache.h).

        Raises:
            QFilterError: no bounded cache, or no such layer.
        """
        self._need_bound()
        n_cells = self.qfilter_stats()["cells_used"]
        if n_cells == 0:
            return np.empty((0, 0), dtype=np.uint8), np.empty((0, 0), dtype=np.uint8)
        result = []
        for is_v in (False, True):
            size = native.rows(self._ctx.ctx, 0, layer, is_v, None, 0)
            if size == 0:
                raise QFilterError(f"no layer {layer}: check the number")
            out = np.empty(size, dtype=np.uint8)
            native.rows(self._ctx.ctx, 0, layer, is_v, out.ctypes.data, size)
            result.append(out.reshape(n_cells, -1))
        return result[0], result[1]

    def eval(self, tokens):
        """As upstream; after a failure no token counts as read that the cache doesn't hold."""
        try:
            super().eval(tokens)
        except RuntimeError:
            if self.qfilter_config is not None:
                memory = llama_cpp.llama_get_memory(self.ctx)
                held = llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1
                self.n_tokens = min(self.n_tokens, held)
                self._requires_eval = True
            raise

    def load_state(self, state):
        """As upstream; a state that is refused leaves an empty cache.

        Raises:
            RuntimeError: the state was saved with other filters, another policy or other sizes.
        """
        try:
            super().load_state(state)
        except (RuntimeError, ValueError) as error:  # ValueError: another size of batch
            self.reset()
            raise RuntimeError(
                "this state is not of a Llama with the same filters, policy and sizes: "
                "read the prompt again"
            ) from error

    def reset(self):
        """As upstream; a bounded cache is emptied, too."""
        super().reset()
        if self.qfilter_config is not None:
            self._ctx.kv_cache_clear()

    def __getstate__(self):
        return super().__getstate__() | {"qfilters": self.qfilter_config}
