"""A bounded context on one thread, with the small sizes that most tests want, and batches for any
sequence."""

import ctypes

import llama_cpp._internals as internals
from llama_cpp._logger import set_verbose

from qfllama import QFilterConfig, native
from qfllama.engine import Context, Model, context_params, why_unsupported

set_verbose(False)

HOW = {
    "host": 0,
    "graph": native.FLAG_GRAPH_GATHER,
    "host, in parts": native.FLAG_SMALL_PARTS,
    "graph, in parts": native.FLAG_GRAPH_GATHER | native.FLAG_SMALL_PARTS,
}
"""Ways to score an archive -> flags of a context: by the CPU's own path or by graphs, at once or in
parts of a few rows."""


def load(path) -> Model:
    return Model(path)


class Bounded(Context):
    """A context for `n_seq` sequences of up to n_ctx positions each."""

    def __init__(
        self,
        model: internals.LlamaModel,
        config: QFilterConfig,
        *,
        n_ctx=1024,
        weight=None,
        moments=None,
        queries=None,
        learned=None,
        flags=0,
        bound=None,
        **params,
    ):
        """bound: fields of llama_qfilter_params; params: of llama_context_params."""
        params = context_params(n_ctx=n_ctx, n_batch=config.interval, **params)
        self.why_not = self.refusal(model, params)
        vectors = {
            "filters": weight, "moments": moments, "queries": queries, "learned": learned
        }  # fmt: skip
        super().__init__(
            model, params, config, {k: v for k, v in vectors.items() if v}, flags=flags,
            **(bound or {}),
        )  # fmt: skip
        self.n_vocab = model.n_vocab()

    @staticmethod
    def refusal(model, params) -> str:
        return why_unsupported(model, params)

    @property
    def batch(self):
        return self._batch

    def fill(self, parts):
        """parts: (sequence, first position, tokens), each with the logits of its last token; or
        as in Context."""
        super().fill([(*part, 1)[:4] for part in parts])

    def decode(self, tokens, seq=0, start=None) -> int:
        """llama_decode of the tokens after the sequence's last position; what it returned."""
        self.fill([(seq, self.n_past(seq) if start is None else start, tokens)])
        return self.decode_batch()

    def compress(self, n_keep, seq=0) -> int:
        """Compact a sequence to n_keep cells now; what llama_qfilter_compress returned."""
        return native.compress(self.ctx, seq, n_keep, self.config.window_length)

    def stats(self) -> native.Stats:
        stats = native.Stats(struct_size=ctypes.sizeof(native.Stats))
        assert native.get_stats(self.ctx, ctypes.byref(stats))
        return stats

    def state(self, seq=0, *, flags=0) -> bytes:
        return bytes(super().state(seq, flags=flags))

    def restore(self, state: bytes, seq=0, flags=0) -> bool:
        """Without flags, unlike Context: only from a cache of the same size."""
        return super().restore(state, seq=seq, flags=flags)


def config(**sizes) -> QFilterConfig:
    """Small sizes: a bound of 48, of which 8 go at a time."""
    return QFilterConfig(
        **{
            "max_length": 48,
            "window_length": 12,
            "sinks": 2,
            "interval": 8,
            "policy": "knorm",
            "archive": False,
        }
        | sizes
    )
