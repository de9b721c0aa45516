"""`Llama`: llama_cpp.Llama with a KV cache that stays small."""

from __future__ import annotations

import contextlib
import os
import warnings

import llama_cpp
import numpy as np

from qfllama import engine_log, native, needs, offload
from qfllama.beginning import Beginning
from qfllama.compressing import Compressing
from qfllama.config import (
    MAX_LENGTH,
    BoundsNothing,
    QFilterConfig,
    QFilterError,
    QFilterWarning,
)
from qfllama.context import Context, NoMemory, cache_type, refused
from qfllama.recalling import Recalling
from qfllama.saving import SavedStates
from qfllama.shape import beyond_training, model_shape
from qfllama.turns import Turns, in_turn


def cache_figures(stats: native.Stats) -> dict[str, int]:
    """llama_qfilter_stats with the names of `Llama.qfilter_stats`."""
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
        "graph_nodes": stats.n_graph_nodes,
        "archived": stats.n_archived,
        "archive_bytes": stats.n_bytes_archive,
        "archive_limit": stats.n_bytes_archive_limit,
        "archive_written": stats.n_bytes_archive_written,
        "archive_us": stats.t_archive_us,
        "recalls": stats.n_recalls,
        "recall_us": stats.t_recall_us,
    }


def scales_rope(params: dict) -> bool:
    """Do these parameters of `llama_cpp.Llama` stretch RoPE beyond the trained positions?"""
    scaling = params.get("rope_scaling_type")  # None: as the file says
    scaling = scaling is not None and scaling > llama_cpp.LLAMA_ROPE_SCALING_TYPE_NONE
    return scaling or any(params.get(f"rope_freq_{name}") for name in ("base", "scale"))


class Llama(Beginning, Compressing, Recalling, SavedStates):
    """A drop-in `llama_cpp.Llama` whose KV cache can be bounded.

    Takes every parameter of `llama_cpp.Llama` and has all its methods. Eviction follows Q-Filters
    (arXiv 2503.02812); `docs/policies.md` describes what goes beyond it.

    Args:
        qfilters: True for the defaults of `QFilterConfig`, or a `QFilterConfig`; without it
            this is the stock class with the full cache.
        n_ctx: with `qfilters` the default is what the model was trained for. A larger n_ctx without
            `rope_scaling_type`, `rope_freq_base` or `rope_freq_scale` gives a QFilterWarning.
        n_batch: with `qfilters` at most the config's `interval`, which is also the default.
        n_gpu_layers: also "auto" for as many as fit beside the cache (see `offload`), or "all".
        type_k, type_v: KV cache types, also by name (`"q8_0"`).

    Several threads may call one object: calls take turns. A stream is one turn from its first piece
    to its last; others wait until it has ended or is closed. Code that leaves its own stream
    unfinished (`break`) and calls again ends that stream. In asyncio, call from threads
    (`asyncio.to_thread`): a call in the event loop's own thread that would have to wait for a
    stream raises QFilterError. The pool needs as many threads as there are streams at once: with
    fewer, waiting streams can take every thread, and the open stream gets none. An object does not
    survive fork(): every call in the child raises QFilterError.

    Attributes:
        qfilter_config: the bound, or None.
        offload: where `n_gpu_layers` was a word, how many layers went to the GPU (`n_layers` of
            `total`).

    Raises:
        QFilterError: the file has no filters or none that fit the model, the sizes don't fit
            each other, or the model can't have a bounded cache; the message says what to do.
    """

    offload: offload.Offload | None = None

    def __init__(self, model_path: str, *, qfilters: bool | QFilterConfig | None = None, **kwargs):
        self._stack = contextlib.ExitStack()  # upstream's __del__ needs it, also when we raise
        self._turns = Turns()
        if qfilters is not None and not isinstance(qfilters, (bool, QFilterConfig)):
            raise QFilterError(f"qfilters is {qfilters!r}: use True or a QFilterConfig")
        self._filters = self._settings = None
        self._model_file = os.path.abspath(model_path)
        self.qfilter_config = QFilterConfig() if qfilters is True else qfilters or None
        for name in ("type_k", "type_v"):
            kwargs[name] = cache_type(kwargs.get(name))
        n_ctx = kwargs.get("n_ctx", 512 if self.qfilter_config is None else 0)
        if not isinstance(n_ctx, (int, np.integer)) or not 0 <= n_ctx <= MAX_LENGTH:
            raise QFilterError(f"n_ctx is {n_ctx!r}: use a whole number from 0 to {MAX_LENGTH}")
        # llama.cpp rounds n_ctx up, upstream's list of tokens doesn't: it would lose the last ones
        kwargs["n_ctx"] = -(-n_ctx // 256) * 256
        if self.qfilter_config is not None:
            self._bound(str(model_path), kwargs)
        self._open(str(model_path), kwargs)
        if (why := beyond_training(n_ctx, self._model.n_ctx_train())) and not scales_rope(kwargs):
            warnings.warn(why, QFilterWarning, stacklevel=2)
        if len(self.input_ids) < self.n_ctx():  # n_ctx = 0: what the model was trained for
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
        shape = model_shape(model_path)  # first: its errors name what is wrong
        n_ctx = kwargs["n_ctx"] or shape.n_ctx_train
        shape.check_positions(n_ctx)
        if config.max_length < n_ctx:
            if kwargs.setdefault("n_batch", config.interval) > config.interval:
                raise QFilterError(
                    f"n_batch {kwargs['n_batch']} is larger than the interval {config.interval}: "
                    f"use n_batch <= {config.interval}, or a larger interval"
                )
            kwargs.setdefault("n_ubatch", kwargs["n_batch"])
        else:
            warnings.warn(
                f"max_length {config.max_length:,} bounds nothing: n_ctx is {n_ctx:,}, so the cache "
                "is never full; use a smaller max_length or a larger n_ctx",
                BoundsNothing,
                stacklevel=3,
            )
        self.qfilter_config, self._filters = needs.of_file(model_path, config)

    def _open(self, model_path: str, kwargs: dict) -> None:
        """Call upstream's constructor; if "auto" layers were too many for the GPU, try fewer."""
        wanted = kwargs.get("n_gpu_layers", 0)
        if not isinstance(wanted, str):
            return self._construct(model_path, kwargs)
        n_cells = kwargs["n_ctx"] or model_shape(model_path).n_ctx_train
        if self.qfilter_config is not None:
            n_cells = min(n_cells, self.qfilter_config.max_length)
        types = {name: kwargs[name] for name in ("type_k", "type_v") if kwargs[name] is not None}
        choice = offload.choose(model_path, wanted, [offload.Cache(n_cells, **types)])
        for self.offload in choice.attempts():
            try:
                return self._construct(model_path, kwargs | {"n_gpu_layers": self.offload.n_layers})
            except NoMemory:
                if not choice.auto or self.offload.n_layers == 0:
                    raise
                self._stack.close()

    def _construct(self, model_path: str, kwargs: dict) -> None:
        with engine_log.errors(kwargs.get("verbose", True)) as lines:
            try:
                super().__init__(model_path, **kwargs)
            except ValueError as error:
                if not str(error).startswith("Failed to load model"):
                    raise
                raise refused(
                    f"llama.cpp cannot load {model_path}",
                    lines,
                    kwargs.get("n_gpu_layers", 0),
                    "give another file",
                ) from None

    def _make_context(self, *, model, params, verbose) -> Context:
        """Called by upstream's constructor once the model is loaded (patches/0002-*.patch)."""
        vectors = {}
        if self.qfilter_config is not None:
            policy, shape = self.qfilter_config.policy, model_shape(self.model_path)
            rope_type = llama_cpp.llama_model_rope_type(model.model)
            vectors = needs.for_policy(self._filters, policy, shape, rope_type)
        return Context(model, params, self.qfilter_config, vectors, verbose=verbose)

    def _need_bound(self) -> None:
        if self.qfilter_config is None:
            raise QFilterError("this Llama has the full cache: make it with qfilters=True")
        if self._ctx.ctx is None:  # llama.cpp would crash
            raise QFilterError("this Llama is closed: make a new one")

    @in_turn
    def qfilter_stats(self) -> dict[str, int]:
        """What the bounded cache has done, and what it holds.

        Returns:
            numbers by name. Since the context was made:

            - evictions; dropped: cells that they freed; bytes_moved; score_us, select_us,
              gather_us: microseconds of their steps; graph_nodes: nodes that the last one computed
            - archive_written: bytes; archive_us: microseconds
            - recalls; recall_us: microseconds
            - positions: tokens seen

            Now, sizes in bytes:

            - cells_used; cells: the bound; cells_allocated: the bound rounded up to 256
            - kv_bytes: allocated for K and V, and for windowed and recurrent layers;
              kv_bytes_full: the same if every position of n_ctx had a cell
            - scratch_bytes: allocated for evictions and recalls
            - archived: positions in the archive; archived_from: the first position from which none
              is lost; archive_bytes: in host memory or in a file; archive_limit

        Raises:
            QFilterError: this object has no bounded cache.
        """
        self._need_bound()
        begin = self._ctx.seq_stats().pos_archived
        figures = cache_figures(self._ctx.stats())
        return figures | {"archived_from": begin, "positions": self.n_tokens}

    @in_turn
    def kept_positions(self, layer: int, head: int) -> np.ndarray:
        """The positions whose keys one KV head of one layer holds.

        Args:
            layer: layer of the model, from 0.
            head: KV head of this layer, from 0.

        Returns:
            int32 [cells_used], ascending.

        Raises:
            QFilterError: no bounded cache, or no such layer or head.
        """
        self._need_bound()
        return self._ctx.kept(layer, head)

    @in_turn
    def cached_rows(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of K and V of one layer, as they are stored.

        Args:
            layer: layer of the model, from 0.

        Returns:
            two uint8 arrays [cells_used, row_bytes], in the order of `kept_positions`; a row
            holds all KV heads, in the cache's own type (llama-kv-cache.h).

        Raises:
            QFilterError: no bounded cache, or no such layer.
        """
        self._need_bound()
        return self._ctx.rows(layer)

    # -- reading

    @in_turn
    def eval(self, tokens):
        """As upstream. After a failure only tokens that the cache holds count as read.

        A batch ends where the cache is full. So evictions happen at the same positions, however
        the tokens are split into calls.

        Raises:
            QFilterError: `n_tokens` was set to a position that the cache can't be cut back to.
            RuntimeError: the engine failed, or n_ctx is reached.
        """
        if self.qfilter_config is None:
            return super().eval(tokens)
        self._need_bound()
        self._need_cut()
        self._keep_beginning()
        self._eval_recalling(tokens)
        self._check_archive()

    def _eval_bounded(self, tokens) -> None:
        try:
            done = 0
            while done < len(tokens):
                n = min(self._ctx.room(), len(tokens) - done)
                super().eval(tokens[done : done + n])
                done += n
        except (RuntimeError, KeyboardInterrupt):
            self._recount_after_failure()
            raise

    def _need_cut(self) -> None:
        """Cut the cache back to `n_tokens`; QFilterError if that is impossible."""
        if self._ctx.n_past() > self.n_tokens and not self._cut():
            raise QFilterError(
                f"the cache can't be cut back to {self.n_tokens} positions (rewind_limit says how "
                "far): reset and read again"
            )

    def _cut(self) -> bool:
        """Cut the cache back to `n_tokens`; False if that is impossible."""
        return self._ctx.kv_cache_seq_rm(0, self.n_tokens, -1)

    def _recount_after_failure(self) -> None:
        """After a failure or Ctrl-C: count only what the cache still holds as read.

        If the cache holds more (a batch that was not counted) and can't be cut back, empty it."""
        self.n_tokens = min(self.n_tokens, self._ctx.n_past())
        self._requires_eval = True
        if not self._cut():
            self.reset()

    @in_turn
    def rewind_limit(self) -> int:
        """The first position to which the cache can be cut back without reading again.

        With an archive, this is the archive's first position: 0 unless the archive is full. Without
        one, it is 0 until the first eviction, then about `window_length` positions before the last
        eviction. If a prompt shares at least this many tokens with what was read, only the rest of
        it is read. Windowed layers can go back only a little, recurrent ones not at all.

        Returns:
            a position from 0 to `n_tokens`.

        Raises:
            QFilterError: this object has no bounded cache.
        """
        self._need_bound()
        return self._ctx.rewind_limit() if self.n_tokens > 0 else 0

    @in_turn
    def reset(self):
        """As upstream; a bounded cache is emptied, too."""
        if self.qfilter_config is not None:
            self._need_bound()
        super().reset()
        if self.qfilter_config is not None:
            self._ctx.kv_cache_clear()

    def close(self) -> None:
        """As upstream. In a child of fork() nothing is freed: it is the parent's."""
        if self._turns.forked:
            self._stack.pop_all()
            if model := getattr(self, "_model", None):
                model._exit_stack.pop_all()
            return
        with self._turns.call():
            super().close()

    def __del__(self) -> None:
        """As upstream. Nobody else has this object: a stream that was left is not waited for."""
        self.close() if self._turns.forked else super().close()

    # upstream's other methods that use the engine
    sample = in_turn(llama_cpp.Llama.sample)
    embed = in_turn(llama_cpp.Llama.embed)
    create_completion = in_turn(llama_cpp.Llama.create_completion)

    def __getstate__(self):
        return super().__getstate__() | {"qfilters": self.qfilter_config}
