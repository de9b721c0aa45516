"""Queries and keys from llama.cpp while it runs a GGUF file, as they enter attention.

llama.cpp hands every node of a computed graph to a callback (cb_eval). With Flash Attention on,
the attention of every architecture is one node, whose inputs are the final queries (after norm,
bias, RoPE) and the rows of the K cache. So this works without knowing the architecture.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import llama_cpp
import numpy as np

from .. import engine_log
from .. import native_calibration as native
from ..config import QFilterError
from ..machine import n_threads
from ..offload import Cache
from . import native_model

N_BATCH = 256


class Attention:
    """One call of attention; its arrays are made when asked for.

    layer: the model layer whose keys are attended; start: position of the first query
    n_head_kv: KV heads of the layer; scale: factor of q.k in front of the softmax
    """

    def __init__(self, tensor, attn, start):
        self._tensor, self._attn = tensor, attn
        self.layer, self.start, self.n_tokens = attn.il, start, attn.n_tokens
        self.n_head_kv, self.scale, self.softcap = attn.n_head_kv, attn.kq_scale, attn.softcap

    def queries(self, at=None) -> np.ndarray:
        """float32 [n_head, n, head_dim], of all tokens of the call or those with indices `at`."""
        attn = self._attn
        queries = self._get(0, (attn.n_head, attn.n_tokens, attn.head_dim))
        return queries if at is None else queries[:, at]

    def keys(self) -> np.ndarray:
        """float32 [n_head_kv, start + n_tokens, head_dim], as stored in the cache."""
        attn = self._attn
        keys = self._get(1, (attn.n_head_kv, attn.n_kv, attn.head_dim))
        return keys[:, : self.start + self.n_tokens]

    def values(self) -> np.ndarray:
        """float32 [n_head_kv, start + n_tokens, head_dim of V], as stored in the cache."""
        attn = self._attn
        values = self._get(2, (attn.n_head_kv, attn.n_kv, attn.n_embd_v))
        return values[:, : self.start + self.n_tokens]

    def _get(self, i, shape):
        out = np.empty(shape, np.float32)
        native.attn_get(self._tensor, i, out.ctypes.data)
        return out


class LlamaModel:
    """A GGUF file that llama.cpp runs, on the GPU if there is one.

    n_ctx: longest sequence it will read; n_gpu_layers: see engine.Model

    Attributes:
        offload: how many layers are on the GPU."""

    route = "llama"

    def __init__(self, gguf, n_ctx: int, n_gpu_layers: int | str = "auto"):
        self._error = None
        self._stopped = False
        with ExitStack() as stack:
            stack.enter_context(engine_log.errors())
            loaded = native_model.loaded(gguf, n_gpu_layers=n_gpu_layers, caches=[Cache(n_ctx)])
            model = stack.enter_context(loaded)
            self.offload, self._model = model.offload, model
            self._context = stack.enter_context(self._open(model, n_ctx))
            self._ropes = stack.enter_context(closing(native_model.Ropes(self._context)))
            # the computing thread is never interrupted: Ctrl-C reaches the thread that waits for
            # it. It ends before the data that it works on is freed
            self._thread = stack.enter_context(ThreadPoolExecutor(1))
            # start it now: if Ctrl-C came while it starts, nobody would wait for it
            self._thread.submit(int).result()
            self._close = stack.pop_all()

    def _open(self, model, n_ctx):
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)
        try:
            return native_model.context(
                model, n_ctx, N_BATCH, n_threads=n_threads(), cb_eval=self._callback
            )
        except QFilterError as error:
            raise QFilterError(
                f"{error}; try a smaller --max-seq-len or `--backend torch`"
            ) from None

    def to_cached(self, vectors: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Vectors in the layout of K cache rows, which is that of this route's queries, too."""
        return vectors

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text in the middle of others."""
        return self._model.tokens(text)

    def before_rope(self, layer: int, positions, queries: np.ndarray) -> np.ndarray | None:
        """See native_model.Ropes.back; the queries in the layout of this route."""
        return self._ropes.back(layer, positions, queries)

    def read(self, tokens: list[int], observe, progress=lambda n: None) -> None:
        """Run one sequence from an empty cache; observe(Attention) at every attention layer,
        progress(tokens) after every batch."""
        llama_cpp.llama_memory_clear(self._context.memory, False)
        for start in range(0, len(tokens), N_BATCH):
            self._observe, self._start = observe, start
            try:
                self._thread.submit(self._decode, tokens[start : start + N_BATCH], start).result()
            except BaseException:
                self._stopped = True
                # Ctrl-C may come before submit returns: when this job has ended, so has that one
                native_model.finish(self._thread.submit(int))
                raise
            progress(len(tokens[start : start + N_BATCH]))

    def _decode(self, tokens, start):
        self._context.fill([(0, start, tokens, 0)])
        result = self._context.decode_batch()
        if self._error is not None:
            raise self._error
        if result != 0 and not self._stopped:
            raise QFilterError(
                f"llama.cpp cannot read the calibration text (error {result}): is there enough "
                "memory? try a smaller --max-seq-len"
            )

    def _on_node(self, tensor, ask, _):
        """cb_eval: with `ask`, is this node wanted? Without: the node is computed; False stops."""
        try:
            attn = native.Attn()
            if self._stopped or not native.attn_of(tensor, ctypes.byref(attn)):
                return False
            if not ask:
                self._observe(Attention(tensor, attn, self._start))
            return True
        except BaseException as error:  # noqa: BLE001 - raised again by _decode
            self._error, self._stopped = error, True
            return False

    def close(self) -> None:
        self._close.close()
