"""A bounded llama_context without the Llama class around it: many of them on one model, and
batches for any sequence."""

import ctypes

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
from llama_cpp._logger import set_verbose

from qfllama import QFilterConfig, native
from qfllama.llama import BoundedContext, cache_type

set_verbose(False)


def load(path) -> internals.LlamaModel:
    return internals.LlamaModel(
        path_model=str(path), params=llama_cpp.llama_model_default_params(), verbose=False
    )


class Bounded:
    """A context on one thread for `n_seq` sequences of up to n_ctx positions each."""

    def __init__(
        self,
        model,
        config,
        *,
        n_ctx=1024,
        n_seq=1,
        type_k="f16",
        type_v="f16",
        weight=None,
        moments=None,
        queries=None,
        flags=0,
        offload_kqv=True,
    ):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx * n_seq, n_seq
        params.n_batch = params.n_ubatch = config.interval
        params.n_threads = params.n_threads_batch = 1
        params.offload_kqv = offload_kqv
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = cache_type(type_k), cache_type(type_v)
        self.why_not = self.refusal(model, params)
        kind = type("Context", (BoundedContext,), {"flags": flags})
        self.context = kind(
            model=model,
            params=params,
            verbose=False,
            config=config,
            weight=weight,
            moments=moments,
            queries=queries,
        )
        self.ctx = self.context.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = model.n_vocab()
        self.batch = llama_cpp.llama_batch_init(config.interval, 0, 1)

    @staticmethod
    def refusal(model, params) -> str:
        why = ctypes.create_string_buffer(256)
        native.supported(model.model, params, why, len(why))
        return why.value.decode()

    def decode(self, tokens, seq=0, start=None) -> int:
        """llama_decode of the tokens after the sequence's last position; what it returned."""
        if start is None:
            start = llama_cpp.llama_memory_seq_pos_max(self.memory, seq) + 1
        self.fill([(seq, start, tokens)])
        return llama_cpp.llama_decode(self.ctx, self.batch)

    def fill(self, parts):
        """parts: (sequence, first position, tokens)"""
        i = 0
        for seq, start, tokens in parts:
            for j, token in enumerate(tokens):
                self.batch.token[i], self.batch.pos[i] = token, start + j
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, seq
                self.batch.logits[i] = j == len(tokens) - 1
                i += 1
        self.batch.n_tokens = i

    def logits(self, i=-1) -> np.ndarray:
        """float32 [n_vocab] of the i-th output of the last batch."""
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, i)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy()

    def kept(self, layer, head, seq=0) -> np.ndarray:
        """int32 [n]: positions of one KV head."""
        n = native.kept(self.ctx, seq, layer, head, None, 0)
        assert n >= 0
        out = np.empty(n, np.int32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        native.kept(self.ctx, seq, layer, head, pointer, n)
        return out

    def rows(self, layer, seq=0) -> tuple[np.ndarray, np.ndarray]:
        """K and V of one layer as stored: uint8 [n, row_bytes]."""
        n, result = len(self.kept(layer, 0, seq)), []
        for is_v in (False, True):
            out = np.empty(native.rows(self.ctx, seq, layer, is_v, None, 0), np.uint8)
            native.rows(self.ctx, seq, layer, is_v, out.ctypes.data, out.size)
            result.append(out.reshape(n, -1))
        return result[0], result[1]

    def compress(self, n_keep, seq=0) -> int:
        """Compact a sequence to n_keep cells now; what llama_qfilter_compress returned."""
        return native.compress(self.ctx, seq, n_keep)

    def stats(self) -> native.Stats:
        stats = native.Stats(struct_size=ctypes.sizeof(native.Stats))
        assert native.get_stats(self.ctx, ctypes.byref(stats))
        return stats

    def state(self, seq=0) -> bytes:
        size = llama_cpp.llama_state_seq_get_size(self.ctx, seq)
        data = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data(self.ctx, data, size, seq) == size
        return bytes(data)

    def restore(self, state: bytes, seq=0, flags=0) -> bool:
        size = len(state)
        data = (ctypes.c_uint8 * size).from_buffer_copy(state)
        return llama_cpp.llama_state_seq_set_data_ext(self.ctx, data, size, seq, flags) == size

    def close(self):
        llama_cpp.llama_batch_free(self.batch)
        self.context.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def config(**sizes) -> QFilterConfig:
    """Small sizes: a bound of 48, of which 8 go at a time."""
    return QFilterConfig(
        **{"max_length": 48, "window_length": 12, "sinks": 2, "interval": 8, "policy": "knorm"}
        | sizes
    )
