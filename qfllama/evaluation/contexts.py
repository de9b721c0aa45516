"""One loaded model and as many bounded contexts on it as are wanted, without `Llama` around them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
from llama_cpp._logger import llama_log_callback, set_verbose

from qfllama import native, schema, state
from qfllama.config import QFilterConfig, QFilterError
from qfllama.llama import STATE_RESIZE, BoundedContext, cache_type, keywords
from qfllama.shape import model_shape

BATCH = 512
"""Tokens of a batch where nothing is evicted meanwhile."""


class Model:
    """A GGUF file, loaded once.

    Attributes:
        forgets: it has windowed or recurrent layers, which can't be cut back.

    Raises:
        QFilterError: no such model, or one that can't have a bounded cache.
    """

    def __init__(
        self,
        path,
        *,
        n_gpu_layers: int | None = None,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        verbose: bool = False,
    ):
        self.path = str(path)
        self.shape = model_shape(self.path)
        self.filters = schema.read(self.path)
        self.type_k, self.type_v = type_k or "f16", type_v or "f16"
        self._types = cache_type(self.type_k), cache_type(self.type_v)
        self.n_threads = n_threads or os.cpu_count() or 1
        set_verbose(verbose)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers or 0
        self._log = contextlib.nullcontext if verbose else no_log
        try:
            self.model = internals.LlamaModel(path_model=self.path, params=params, verbose=verbose)
        except ValueError as error:
            raise QFilterError(
                f"{self.path}: llama.cpp can't use this file ({error}); --verbose shows its log"
            ) from error
        self.n_vocab = self.model.n_vocab()
        handle = self.model.model
        self.forgets = bool(
            llama_cpp.llama_model_n_swa(handle)
            or llama_cpp.llama_model_is_hybrid(handle)
            or llama_cpp.llama_model_is_recurrent(handle)
        )
        why = ctypes.create_string_buffer(512)
        if not native.supported(self.model.model, self._params(256, 64), why, len(why)):
            self.close()
            raise QFilterError(f"this model can't be evaluated: {why.value.decode()}")

    def _params(self, n_ctx: int, n_batch: int):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, 1
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = self.n_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = self._types
        return params

    def open(self, config: QFilterConfig, n_ctx: int) -> Context:
        """An empty context of n_ctx positions, to be closed before the model.

        Raises:
            QFilterError: the policy needs filters that the file doesn't have, or memory is short.
        """
        schema.check_policy(self.path, self.filters, config.policy)
        rope_type = llama_cpp.llama_model_rope_type(self.model.model)
        kind, arrays = schema.for_policy(self.filters, config.policy, self.shape, rope_type)
        try:
            with self._log():  # which warns of every context longer than the model was trained for
                context = BoundedContext(
                    model=self.model, params=self._params(n_ctx, config.interval), verbose=False,
                    config=config, **keywords(kind, arrays),
                )  # fmt: skip
        except ValueError as error:
            raise QFilterError(
                f"no context for {n_ctx:,} positions and {config.max_length:,} cells ({error}): "
                "use shorter lengths; --verbose shows the engine's log"
            ) from error
        return Context(self, context, config)

    def tokens(self, text: str, *, start: bool = False) -> list[int]:
        """Tokens of a text; with `start` after what the model wants at the start of a sequence."""
        bos = [self.model.token_bos()] if start and self.model.add_bos_token() else []
        return bos + self.model.tokenize(text.encode(), add_bos=False, special=False)

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.model.detokenize(tokens, special=False).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Does the token end what a model says?"""
        vocab = llama_cpp.llama_model_get_vocab(self.model.model)
        return bool(llama_cpp.llama_vocab_is_eog(vocab, token))

    def identity(self) -> dict[str, str | None]:
        """Fingerprints of the model and of its filters."""
        return {
            "model": state.model_identity(self.path),
            "filters": state.filters_identity(self.filters),
        }

    def close(self) -> None:
        self.model.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error) -> None:
        self.close()


@contextlib.contextmanager
def no_log() -> Iterator[None]:
    """Nothing from llama.cpp's log, not even warnings."""
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_log_callback, None)


def failed(what: str) -> QFilterError:
    """For what the engine should be able to do."""
    return QFilterError(f"the engine failed ({what}); --verbose shows its log")


class Context:
    """One sequence in a bounded cache.

    Attributes:
        n_past: positions read.
    """

    def __init__(self, model: Model, context: BoundedContext, config: QFilterConfig):
        self.model, self.config = model, config
        self._context, self._ctx = context, context.ctx
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._batch = llama_cpp.llama_batch_init(config.interval, 0, 1)
        self._mark: tuple[int, ctypes.Array | None] = (0, None)
        self.n_past = 0

    # -- reading

    def read(self, tokens: list[int]) -> None:
        """Read tokens after those that were read before."""
        for _ in self.outputs(tokens, len(tokens)):
            pass

    def outputs(self, tokens: list[int], first: int = 0) -> Iterator[np.ndarray]:
        """Read tokens, batch by batch.

        A batch ends where the cache is full, so that evictions fall where they would fall token by
        token.

        Yields:
            float32 [n, n_vocab], the logits after each of tokens[first:], n of a batch at a time;
            overwritten by the next batch.

        Raises:
            QFilterError: the engine failed.
        """
        done = 0
        while done < len(tokens):
            n = min(self._room(), self.config.interval, len(tokens) - done)
            n_outputs = self._decode(tokens[done : done + n], max(0, first - done))
            done += n
            if n_outputs:
                pointer = llama_cpp.llama_get_logits(self._ctx)
                yield np.ctypeslib.as_array(pointer, shape=(n_outputs, self.model.n_vocab))

    def _room(self) -> int:
        """Tokens until an eviction has to come, or from this one to the next."""
        return self.config.max_length - self.used() or self.config.interval

    def _decode(self, tokens: list[int], first: int) -> int:
        """Decode one batch; the number of outputs, those of tokens[first:]."""
        batch = self._batch
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.n_past + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i >= first
        batch.n_tokens = len(tokens)
        if (code := llama_cpp.llama_decode(self._ctx, batch)) != 0:
            raise failed(f"llama_decode returned {code} at position {self.n_past:,}")
        self.n_past += len(tokens)
        return max(0, len(tokens) - first)

    def used(self) -> int:
        """Cells in use."""
        return self.stats().n_cells_used

    def stats(self) -> native.Stats:
        stats = native.Stats(struct_size=ctypes.sizeof(native.Stats))
        native.get_stats(self._ctx, ctypes.byref(stats))
        return stats

    # -- compressing, saving, going back

    def compress(self, n_cells: int) -> None:
        """Compact to n_cells now; nothing happens if no more are used.

        Raises:
            QFilterError: the engine failed.
        """
        if n_cells < self.used() and native.compress(self._ctx, 0, n_cells) < 0:
            raise failed("llama_qfilter_compress")

    def state(self) -> ctypes.Array:
        """What the cache holds, for `restore` of this or another context of the model."""
        size = llama_cpp.llama_state_seq_get_size(self._ctx, 0)
        data = (ctypes.c_uint8 * size)()
        if size == 0 or llama_cpp.llama_state_seq_get_data(self._ctx, data, size, 0) != size:
            raise failed("llama_state_seq_get_data")
        return data

    def restore(self, data: ctypes.Array, n_past: int) -> None:
        """Take over the state of a context that had read n_past tokens; of a context with another
        policy only if nothing had been dropped in it.

        Raises:
            QFilterError: the engine refused it (its log says why).
        """
        size = len(data)
        read = llama_cpp.llama_state_seq_set_data_ext(self._ctx, data, size, 0, STATE_RESIZE)
        if read != size:
            raise failed("a saved sequence was refused")
        self.n_past = n_past

    def mark(self, n_tokens: int) -> None:
        """`back` shall lead here from at most n_tokens later."""
        loses = self.model.forgets or self.used() + n_tokens > self.config.max_length
        self._mark = self.n_past, self.state() if loses else None

    def back(self) -> None:
        """Forget what was read since `mark`."""
        n_past, data = self._mark
        if data is not None:
            self.restore(data, n_past)
        elif llama_cpp.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            self.n_past = n_past
        else:
            raise failed(f"the cache can't be cut back to position {n_past:,}")

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        self._context.close()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *error) -> None:
        self.close()
