"""`Llama`: llama_cpp.Llama with a KV cache that stays small."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
from typing import NamedTuple

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
from gguf.constants import GGMLQuantizationType
from llama_cpp import LlamaState

from qfllama import gguf_header, native, schema, state
from qfllama.config import CALIBRATED, MAX_LENGTH, POLICIES, QFilterConfig, QFilterError
from qfllama.shape import model_shape

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


STATE_RESIZE = 1 << 16
"""LLAMA_QFILTER_STATE_SEQ_FLAGS_RESIZE: load a sequence into a cache of another size."""


class Compressed(NamedTuple):
    """Cells used before and after `Llama.compress`."""

    before: int
    after: int


class BoundedContext(internals.LlamaContext):
    """Upstream's wrapper around a llama_context, made by `llama_qfilter_init_from_model`."""

    flags = 0

    def __init__(
        self,
        *,
        model,
        params,
        verbose,
        config: QFilterConfig,
        weight: dict | None = None,
        moments: dict | None = None,
        queries: dict | None = None,
    ):
        """
        Args:
            weight: model layer id -> float32 [n_head_kv, head_dim].
            moments: model layer id -> float32 [n_head, 1 + rank, head_dim].
            queries: model layer id -> float32 [n_head_kv, head_dim], before RoPE.

        Raises:
            ValueError: llama.cpp refused (its log says why).
        """
        self._config = config
        self._weight, self._moments, self._queries = weight, moments, queries
        super().__init__(model=model, params=params, verbose=verbose)

    def _init_from_model(self, model, cparams):
        """Called by upstream's constructor (patches/0002-*.patch)."""
        config = self._config
        n_layer = llama_cpp.llama_model_n_layer(model)
        params = native.default_params()
        params.n_cells = config.max_length
        params.n_keep = config.n_keep
        params.n_sink = config.sinks
        params.n_window = config.window_length
        params.policy = POLICIES.index(config.policy)
        params.flags = self.flags
        params.seed = config.seed
        params.n_filters = n_layer
        params.filters = _pointers(self._weight, n_layer)
        params.moments = _pointers(self._moments, n_layer)
        params.queries = _pointers(self._queries, n_layer)
        if self._moments:
            params.n_rank = next(iter(self._moments.values())).shape[1] - 1
        return native.init_from_model(model, cparams, ctypes.byref(params))


def keywords(kind: str | None, arrays: dict) -> dict[str, dict]:
    """What `schema.for_policy` returns as keywords of `BoundedContext`."""
    return {"weight" if kind == "filters" else kind: arrays} if kind else {}


def _pointers(arrays: dict | None, n_layer: int):
    """A C array of one float pointer per layer; NULL where there is no array, and without arrays.
    The arrays (float32) have to live as long as it is used."""
    float_p = ctypes.POINTER(ctypes.c_float)
    if not arrays:
        return None
    return (float_p * n_layer)(
        *(
            arrays[il].ctypes.data_as(float_p) if il in arrays else float_p()
            for il in range(n_layer)
        )
    )


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
        self._filters = self._settings = None
        self._model_file = os.path.abspath(model_path)
        self.qfilter_config = QFilterConfig() if qfilters is True else qfilters or None
        for name in ("type_k", "type_v"):
            kwargs[name] = cache_type(kwargs.get(name))
        n_ctx = kwargs.get("n_ctx", 512)
        if not isinstance(n_ctx, (int, np.integer)) or not 0 <= n_ctx <= MAX_LENGTH:
            raise QFilterError(f"n_ctx is {n_ctx!r}: use a whole number from 0 to {MAX_LENGTH}")
        # llama.cpp rounds up, upstream's list of tokens does not: beyond it they would be lost
        kwargs["n_ctx"] = -(-n_ctx // 256) * 256
        if self.qfilter_config is not None:
            self._bound(str(model_path), kwargs)
        super().__init__(str(model_path), **kwargs)
        if len(self.input_ids) < self.n_ctx():  # n_ctx = 0: what the model was trained on
            self.input_ids = np.zeros(self.n_ctx(), dtype=np.intc)
            if self._logits_all:
                self.scores = np.zeros((self.n_ctx(), self._n_vocab), dtype=np.single)

    def _bound(self, model_path: str, kwargs: dict) -> None:
        """Checks what upstream's constructor will be given; reads the filters."""
        config = self.qfilter_config
        if kwargs.get("draft_model") is not None:
            raise QFilterError("draft_model can't be used with qfilters: leave one of them out")
        if not kwargs.setdefault("flash_attn", True):
            raise QFilterError("qfilters needs Flash Attention: leave out flash_attn=False")
        if kwargs["n_ctx"] == 0 or config.max_length < kwargs["n_ctx"]:
            if kwargs.setdefault("n_batch", config.interval) > config.interval:
                raise QFilterError(
                    f"n_batch {kwargs['n_batch']} is larger than the interval {config.interval}: "
                    f"use n_batch <= {config.interval}, or a larger interval"
                )
            kwargs.setdefault("n_ubatch", kwargs["n_batch"])
        if not os.path.isfile(model_path):
            raise QFilterError(f"{model_path} is not a file: check the path")
        self._filters = schema.read(model_path) if config.policy in CALIBRATED else None
        schema.check_policy(model_path, self._filters, config.policy)

    def _make_context(self, *, model, params, verbose):
        """Called by upstream's constructor once the model is loaded (patches/0002-*.patch)."""
        if self.qfilter_config is None:
            return internals.LlamaContext(model=model, params=params, verbose=verbose)
        why = ctypes.create_string_buffer(512)
        if not native.supported(model.model, params, why, len(why)):
            raise QFilterError(f"qfilters can't be used: {why.value.decode()}")
        policy, shape = self.qfilter_config.policy, model_shape(self.model_path)
        rope_type = llama_cpp.llama_model_rope_type(model.model)
        kind, arrays = schema.for_policy(self._filters, policy, shape, rope_type)
        return BoundedContext(
            model=model,
            params=params,
            verbose=verbose,
            config=self.qfilter_config,
            **keywords(kind, arrays),
        )

    def _need_bound(self) -> None:
        if self.qfilter_config is None:
            raise QFilterError("this Llama has the full cache: make it with qfilters=True")
        if self._ctx.ctx is None:  # llama.cpp would crash
            raise QFilterError("this Llama is closed: make a new one")

    def _stats(self) -> native.Stats:
        stats = native.Stats(struct_size=ctypes.sizeof(native.Stats))
        native.get_stats(self._ctx.ctx, ctypes.byref(stats))
        return stats

    def qfilter_stats(self) -> dict[str, int]:
        """What the bounded cache did and holds.

        Returns:
            evictions, dropped (cells), bytes_moved, score_us, select_us, gather_us
            (microseconds, all since the context was made); cells_used, cells (the bound),
            cells_allocated (the bound rounded up to 256); kv_bytes (allocated for K and V, and
            for windowed and recurrent layers), kv_bytes_full (the same if every position of n_ctx
            had a cell), scratch_bytes (allocated for evictions); positions (tokens seen).

        Raises:
            QFilterError: this object has no bounded cache.
        """
        self._need_bound()
        stats = self._stats()
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
            "kv_bytes_full": stats.n_bytes_kv_full,
            "scratch_bytes": stats.n_bytes_scratch,
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

    # -- reading

    def eval(self, tokens):
        """As upstream; after a failure no token counts as read that the cache doesn't hold.

        A batch ends where the cache is full, so that evictions fall where they would fall token by
        token, however the tokens come in.

        Raises:
            QFilterError: `n_tokens` was set to a position that the cache can't be cut back to.
            RuntimeError: the engine failed, or n_ctx is reached.
        """
        if self.qfilter_config is None:
            return super().eval(tokens)
        self._need_bound()
        # upstream's first step, done before the room is counted
        if not self._ctx.kv_cache_seq_rm(0, self.n_tokens, -1):
            raise QFilterError(
                f"the cache can't be cut back to {self.n_tokens} positions (rewind_limit says how "
                "far): reset and read again"
            )
        try:
            done = 0
            while done < len(tokens):
                n = min(self._room(), len(tokens) - done)
                super().eval(tokens[done : done + n])
                done += n
        except (RuntimeError, KeyboardInterrupt):
            self._forget_lost()
            raise

    def _room(self) -> int:
        """Tokens until an eviction has to come, or from this one to the next."""
        stats = self._stats()
        return stats.n_cells - stats.n_cells_used or self.qfilter_config.interval

    def _forget_lost(self) -> None:
        """After a failure or Ctrl-C: only what the cache still holds counts as read, and nothing
        if it holds more (a batch that nobody noted) and can't be cut back."""
        self.n_tokens = min(self.n_tokens, self._n_held())
        self._requires_eval = True
        if not self._ctx.kv_cache_seq_rm(0, self.n_tokens, -1):
            self.reset()

    def _n_held(self) -> int:
        """Positions up to the last one in the cache."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        return llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1

    def rewind_limit(self) -> int:
        """The first position to which the cache can be cut back without reading again.

        0 as long as nothing has been evicted; then about `window_length` positions before the last
        eviction. A prompt that shares at least so many tokens with what was read costs only the
        rest of it.

        Raises:
            QFilterError: this object has no bounded cache.
        """
        self._need_bound()
        memory = llama_cpp.llama_get_memory(self.ctx)
        if self.n_tokens == 0:
            return 0
        # to remove nothing at a position is refused where removing from there on would be
        low, high = -1, self._n_held()  # refused, allowed
        while high - low > 1:
            middle = (low + high) // 2
            if llama_cpp.llama_memory_seq_rm(memory, 0, middle, middle):
                high = middle
            else:
                low = middle
        return high

    def compress(self, *, ratio: float | None = None, max_length: int | None = None) -> Compressed:
        """Compact the cache now, to `1 / ratio` of its cells or to `max_length` cells.

        The setting of the paper: the whole prompt is read at full size, then compressed once. For
        that the cache has to hold the prompt, and the window should be small:

            config = QFilterConfig(max_length=32768, window_length=64)
            llm = Llama("model-qf.gguf", n_ctx=32768, qfilters=config)
            llm.eval(llm.tokenize(text))
            llm.compress(ratio=8)

        Positions go on as if nothing had happened: `n_tokens` and `input_ids` stay, a prompt that
        begins with the same tokens is not read again, and the logits of the last position are
        still there. Only `rewind_limit` rises. The allocated memory stays what it is:
        `save_prompt` gives what is left to a smaller cache.

        Returns:
            cells before and after; the same number if there was nothing to do.

        Raises:
            QFilterError: no bounded cache, not exactly one of the two arguments, or fewer cells
                than sinks and window take.
            RuntimeError: the engine failed; what it lost doesn't count as read any more.
        """
        self._need_bound()
        before = self._stats().n_cells_used
        wanted = state.cells_wanted(before, ratio, max_length)
        if wanted >= before:
            return Compressed(before, before)
        config = self.qfilter_config
        least = config.sinks + max(1, config.window_length)
        if wanted < least:
            raise QFilterError(
                f"{wanted} cells can't hold {config.sinks} sinks and a window of "
                f"{config.window_length}: use a max_length >= {least} (of {before} cells a ratio "
                f"<= {math.floor(10 * before / least) / 10:g}), or a smaller window_length"
            )
        if native.compress(self._ctx.ctx, 0, wanted) < 0:
            self._forget_lost()
            raise RuntimeError("llama_qfilter_compress failed")
        return Compressed(before, self._stats().n_cells_used)

    # -- saving and restoring

    def settings(self) -> dict:
        """What a saved cache depends on, as plain JSON values; see `qfllama.state.mismatch`."""
        self._need_bound()
        if self._settings is None:
            self._settings = self._read_settings()
        return self._settings

    def _read_settings(self) -> dict:
        config, params = self.qfilter_config, self.context_params
        names = {number: name for name, number in CACHE_TYPES.items()}
        run = [
            params.rope_scaling_type, params.rope_freq_base, params.rope_freq_scale,
            params.yarn_ext_factor, params.yarn_attn_factor, params.yarn_beta_fast,
            params.yarn_beta_slow, params.yarn_orig_ctx, self._uses_long_rope(),
            self.lora_path, self.lora_scale if self.lora_path else None,
            sorted((self.kv_overrides or {}).items()),
        ]  # fmt: skip
        return {
            "model": state.model_identity(self._model_file),
            "filters": state.filters_identity(self._filters),
            "run": json.loads(json.dumps(run)),  # lists as they come back from a file
            "type_k": names[params.type_k],
            "type_v": names[params.type_v],
            **dataclasses.asdict(config),
        }

    def _uses_long_rope(self) -> bool:
        """Some models rotate keys otherwise as soon as n_ctx is beyond what they began with."""
        _, header = gguf_header.scan_first(self._model_file)
        arch = header.get("general.architecture")
        n_orig = header.get(f"{arch}.rope.scaling.original_context_length")
        has_factors = any(t.name.startswith("rope_factors_long") for t in header.tensors)
        return bool(has_factors and n_orig is not None and self.n_ctx() > n_orig)

    def set_cache(self, cache) -> None:
        """As upstream. With a bounded cache, states that this object can't load or that would save
        nothing are passed over, and nothing is dropped from a LlamaDiskCache that is found in it.
        """
        if cache is not None and self.qfilter_config is not None:
            cache = state.OwnStates(cache, self)
        super().set_cache(cache)

    def save_state(self) -> LlamaState:
        """As upstream, without what a restored context doesn't need: a bounded cache's state takes
        about the bytes of its used cells."""
        if self.qfilter_config is None:
            return super().save_state()
        self._need_bound()
        size = llama_cpp.llama_state_get_size(self.ctx)
        data = (ctypes.c_uint8 * size)()
        size = llama_cpp.llama_state_get_data(self.ctx, data, size)
        if size == 0:
            raise RuntimeError("Failed to copy llama state data")
        scores = self._scores if self._logits_all else self.scores[:0]
        saved = LlamaState(
            input_ids=self.input_ids[: self.n_tokens].copy(),
            scores=scores.copy(),
            n_tokens=self.n_tokens,
            llama_state=ctypes.string_at(data, size),
            llama_state_size=size,
            seed=self._seed,
        )
        saved.qfilters = {"settings": self.settings(), "rewind_limit": self.rewind_limit()}
        return saved

    def load_state(self, state: LlamaState) -> None:
        """As upstream; a state that is refused leaves an empty cache.

        Raises:
            RuntimeError: the state is of another model, or was saved with other filters, another
                policy or other sizes; the message says which.
        """
        if self.qfilter_config is not None:
            self._need_bound()
        bounded = getattr(state, "qfilters", None)
        try:
            if self.qfilter_config is not None:
                self._load_bounded(state, bounded)
            elif bounded is not None:
                raise RuntimeError("it was saved with a bounded cache, this Llama has the full one")
            else:
                super().load_state(state)
        except (RuntimeError, ValueError) as error:  # ValueError: another size of batch
            self.reset()
            raise RuntimeError(
                f"this state can't be loaded: {error}; read the prompt again"
            ) from error

    def _load_bounded(self, saved: LlamaState, bounded: dict | None) -> None:
        if bounded is None:
            raise RuntimeError("it was saved with a full cache, this Llama has a bounded one")
        if why := state.mismatch(bounded["settings"], self.settings()):
            raise RuntimeError(why)
        if self._logits_all and len(saved.scores) != saved.n_tokens:
            raise RuntimeError("it was saved without logits_all, this Llama has it")
        data, size = saved.llama_state, saved.llama_state_size
        buffer = (ctypes.c_uint8 * size).from_buffer_copy(data)
        self._take_over(saved.input_ids)
        self._seed = saved.seed
        if self._logits_all:
            self.scores[: saved.n_tokens] = saved.scores
        if llama_cpp.llama_state_set_data(self.ctx, buffer, size) != size:
            raise RuntimeError("llama.cpp refused it (verbose=True shows why)")

    def _take_over(self, tokens: np.ndarray) -> None:
        """The tokens of a state about to be loaded."""
        if len(tokens) > self.n_ctx():
            raise RuntimeError(f"it has {len(tokens):,} positions, n_ctx is {self.n_ctx():,}")
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens = len(tokens)
        self._requires_eval = True

    def save_prompt(self, path, extra: dict | None = None) -> int:
        """Write what the cache holds to a file that `load_prompt` reads, in any process.

        Args:
            path: appears complete or not at all; what was there is replaced.
            extra: plain JSON values to have again with `qfllama.state.read_prompt`.

        Returns:
            bytes written, about those of the used cells.

        Raises:
            QFilterError: no bounded cache, an empty one, or the file can't be written.
        """
        settings, n_cells = self.settings(), self._stats().n_cells_used
        if n_cells == 0:
            raise QFilterError("the cache is empty: read a prompt first")
        size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
        data = (ctypes.c_uint8 * size)()
        size = llama_cpp.llama_state_seq_get_data(self.ctx, data, size, 0)
        if size == 0:
            raise RuntimeError("llama_state_seq_get_data failed")
        return state.write_prompt(
            path,
            state.Prompt(
                settings=settings,
                tokens=self.input_ids[: self.n_tokens],
                cells=n_cells,
                data=ctypes.string_at(data, size),
                extra=extra or {},
            ),
        )

    def load_prompt(self, path) -> state.Prompt:
        """Go on from a file of `save_prompt` or `qfllama compress`; what was read before is gone.

        The sizes of this cache may be others than those of the one that was saved, if its cells
        fit: `qfllama.state.config_for` gives a config that holds them.

        Returns:
            the prompt, without its state.

        Raises:
            QFilterError: not such a file, or of another model, with other filters, policy, sinks
                or cache types, or too large for this cache; the cache is as it was before.
        """
        ours = self.settings()
        prompt = state.read_prompt(path)
        why = state.mismatch(prompt.settings, ours, leave_out=state.SIZE_NAMES)
        advice = "make it again with `qfllama compress`"
        n_cells = self._stats().n_cells
        if why is None and prompt.cells > n_cells:
            why = f"it has {prompt.cells:,} cells, this cache {n_cells:,}"
            advice = "use a larger max_length"
        if why is None and len(prompt.tokens) >= self.n_ctx():
            why = f"it has {len(prompt.tokens):,} positions, n_ctx is {self.n_ctx():,}"
            advice = "use a larger n_ctx"
        if why is not None:
            raise QFilterError(f"{path} can't be used: {why}; {advice}")
        self.reset()
        size = len(prompt.data)
        buffer = (ctypes.c_uint8 * size).from_buffer_copy(prompt.data)
        if llama_cpp.llama_state_seq_set_data_ext(self.ctx, buffer, size, 0, STATE_RESIZE) != size:
            self.reset()
            raise QFilterError(
                f"{path} was refused by llama.cpp (--verbose or verbose=True shows why): "
                "make it again with `qfllama compress`"
            )
        self._take_over(prompt.tokens)
        return dataclasses.replace(prompt, data=b"")

    def reset(self):
        """As upstream; a bounded cache is emptied, too."""
        if self.qfilter_config is not None:
            self._need_bound()
        super().reset()
        if self.qfilter_config is not None:
            self._ctx.kv_cache_clear()

    def __getstate__(self):
        return super().__getstate__() | {"qfilters": self.qfilter_config}
