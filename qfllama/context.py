"""`Context`: sequences of a model in a KV cache, bounded or whole."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
from gguf.constants import GGMLQuantizationType

from qfllama import engine_log, native, offload
from qfllama.archive import Archived, limit_bytes
from qfllama.config import EngineError, QFilterConfig, QFilterError, QFilterWarning
from qfllama.policies import BY_NAME

CACHE_TYPES = {
    name: int(GGMLQuantizationType[name.upper()])
    for name in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
}
"""KV cache types by name, as llama.cpp's own command line has them."""
NO_MEMORY = re.compile(
    r"(out of|insufficient|not enough|no) memory|std::bad_alloc|"
    r"(unable|failed|cannot) (to )?allocate",
    re.IGNORECASE,
)
"""What llama.cpp and ggml's backends say when memory runs out."""

Vectors = dict[str, dict[int, np.ndarray]]
"""Kind ("filters", "queries", "moments") -> model layer -> float32 rows: filters and queries
[n_head_kv, head_dim], moments [n_head, 1 + rank, head_dim]."""


class NoMemory(QFilterError):
    """A model or a cache doesn't fit the memory of a device."""


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


def refused(
    what: str,
    lines: list[str],
    n_gpu_layers: int,
    advice: str,
    found: list[offload.Device] | None = None,
) -> QFilterError:
    """The error for what llama.cpp refused, with the first of the `lines` of its log. If memory ran
    out, the advice is about that; `found`: the GPUs, None for those there are."""
    why = lines[0] if lines else "no reason given"
    if any(NO_MEMORY.search(line) for line in lines):
        on_gpu = n_gpu_layers != 0 and (offload.devices() if found is None else found)
        advice = "use a smaller n_gpu_layers (--n-gpu-layers)" if on_gpu else "use a smaller model"
        advice += ", or a smaller cache (n_ctx, max_length)"
        return NoMemory(f"{what}: {why}; {advice}")
    return QFilterError(f"{what}: {why}; {advice}")


def context_params(
    *,
    n_ctx: int,
    n_batch: int = 512,
    n_seq: int = 1,
    n_threads: int = 1,
    type_k: int | str | None = None,
    type_v: int | str | None = None,
    **fields,
):
    """llama_context_params of a context with Flash Attention.

    Args:
        n_ctx: positions of each sequence.
        n_batch: most tokens of a batch, and of a ubatch.
        n_seq: sequences.
        n_threads: CPU threads.
        type_k, type_v: types of the cached K and V, by name or number; None: f16.
        fields: others of llama_context_params, by name.

    Raises:
        QFilterError: no such type.
    """
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = n_ctx * n_seq, n_seq
    params.n_batch = params.n_ubatch = n_batch
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_perf = True
    types = {"type_k": cache_type(type_k), "type_v": cache_type(type_v)}
    for name, value in {**fields, **types}.items():
        if value is not None:
            setattr(params, name, value)
    return params


def why_unsupported(model: internals.LlamaModel, params) -> str:
    """Why a context with these parameters can't have a bounded cache; "" if it can."""
    why = ctypes.create_string_buffer(512)
    native.supported(model.model, params, why, len(why))
    return why.value.decode()


def check_supported(model: internals.LlamaModel, params) -> None:
    """QFilterError if a context with these parameters can't have a bounded cache."""
    if why := why_unsupported(model, params):
        raise QFilterError(f"{model.path_model}: its cache can't be bounded: {why}")


class Context(Archived):
    """Sequences in a KV cache, whole or bounded: upstream's wrapper with what our cache can do.

    Positions of a sequence start at 0 and go on to n_ctx, whatever its cells hold.

    Attributes:
        config: the bound; None for the whole cache.
        n_seq: sequences, each with cells of its own.
    """

    def __init__(
        self,
        model: internals.LlamaModel,
        params,
        config: QFilterConfig | None = None,
        vectors: Vectors | None = None,
        *,
        verbose: bool = False,
        **bound,
    ):
        """
        Args:
            params: llama_context_params, see `context_params`.
            vectors: what the policy needs, see `needs.for_policy`.
            bound: fields of llama_qfilter_params that replace those of `config`.

        Raises:
            QFilterError: llama.cpp refused (in its own words).
        """
        self.config, self.n_seq = config, params.n_seq_max
        self._vectors, self._bound = vectors or {}, bound
        self._batch = None
        self._pid = os.getpid()
        n_ctx = params.n_ctx // params.n_seq_max
        cells = f"{config.max_length:,} cells" if config is not None else "the whole cache"
        with engine_log.errors(verbose) as lines:
            try:
                super().__init__(model=model, params=params, verbose=verbose)
            except QFilterError:
                raise
            except ValueError:
                raise refused(
                    f"no context for {n_ctx:,} positions and {cells}",
                    lines,
                    model.params.n_gpu_layers,
                    "use a smaller n_ctx or max_length; verbose shows the engine's log",
                ) from None

    def _init_from_model(self, model, params):
        """Called by upstream's constructor (patches/0002-*.patch)."""
        if self.config is None:
            return llama_cpp.llama_init_from_model(model, params)
        check_supported(self.model, params)
        config, bound = self.config, native.Params()
        native.params_init(ctypes.byref(bound), ctypes.sizeof(bound))
        bound.n_cells, bound.n_keep = config.max_length, config.n_keep
        bound.n_sink, bound.n_window = config.sinks, config.window_length
        bound.policy, bound.seed = BY_NAME[config.policy].number, config.seed
        bound.n_bytes_archive = limit_bytes(config)
        if isinstance(config.archive, str):
            bound.archive_dir = os.fsencode(config.archive)
        vectors = [
            native.Vectors(
                native.KINDS.index(kind), il, rows.size // rows.shape[-1], rows.shape[-1],
                rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            )
            for kind, by_layer in self._vectors.items()
            for il, rows in by_layer.items()
        ]  # fmt: skip
        bound.n_vectors, bound.vectors = len(vectors), (native.Vectors * len(vectors))(*vectors)
        for name, value in self._bound.items():
            setattr(bound, name, value)
        made = native.init_from_model(model, params, ctypes.byref(bound))
        why = native.last_error().decode()
        if not made and config.archive_limit is None and why.startswith("an archive of"):
            warnings.warn(
                f"no archive, what is evicted is gone: {why}; give an archive_limit, or a folder",
                QFilterWarning,
                stacklevel=2,
            )
            bound.n_bytes_archive = 0
            made = native.init_from_model(model, params, ctypes.byref(bound))
        return made

    # -- what it holds

    def stats(self) -> native.Stats:
        """What the cache did since it was made, and what it holds over all sequences; see
        llama_qfilter_stats. The whole cache has only numbers of cells."""
        stats = native.Stats(struct_size=ctypes.sizeof(native.Stats))
        if not native.get_stats(self.ctx, ctypes.byref(stats)):
            stats.n_cells_used = sum(self.n_past(seq) for seq in range(self.n_seq))
            stats.n_cells = stats.n_cells_alloc = llama_cpp.llama_n_ctx(self.ctx)
        return stats

    def n_past(self, seq: int = 0) -> int:
        """Positions of a sequence, up to the last one that it holds."""
        return llama_cpp.llama_memory_seq_pos_max(self.memory, seq) + 1

    def used(self, seq: int = 0) -> int:
        """Cells that a sequence uses."""
        return self.seq_stats(seq).n_cells_used

    def seq_stats(self, seq: int = 0) -> native.SeqStats:
        """What a sequence holds and lost, see llama_qfilter_seq_stats. For the whole cache, or a
        sequence that doesn't exist, only n_cells_used and pos_max are set."""
        stats = native.SeqStats(struct_size=ctypes.sizeof(native.SeqStats))
        if not native.get_seq_stats(self.ctx, seq, ctypes.byref(stats)):
            stats.n_cells_used, stats.pos_max = self.n_past(seq), self.n_past(seq) - 1
        return stats

    def keep_first(self, n: int, seq: int = 0) -> int:
        """Always keep the first n positions of a sequence; returns how many (qfilter.h)."""
        return native.keep_first(self.ctx, seq, n)

    def room(self, seq: int = 0) -> int:
        """Tokens that a sequence can read before the next eviction; if one is due now, before the
        one after it. For the whole cache: until it is full."""
        if self.config is None:
            return llama_cpp.llama_n_ctx(self.ctx) // self.n_seq - self.n_past(seq)
        return native.room(self.ctx, seq) or self.config.interval

    def kept(self, layer: int, head: int, seq: int = 0) -> np.ndarray:
        """The positions whose keys a KV head of a layer holds: int32 [cells used], ascending.

        Raises:
            QFilterError: no bounded cache, or no such layer, head or sequence.
        """
        if (n := self._n_kept(layer, head, seq)) < 0:
            raise QFilterError(f"no layer {layer} with a KV head {head}: check both numbers")
        out = np.empty(n, dtype=np.int32)
        native.kept(
            self.ctx, seq, layer, head, out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n
        )
        return out

    def _n_kept(self, layer: int, head: int, seq: int) -> int:
        return native.kept(self.ctx, seq, layer, head, None, 0)

    def rows(self, layer: int, seq: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """K and V of a layer as they are stored: two arrays uint8 [cells used, row_bytes], in the
        order of `kept`; a row holds all KV heads, in the cache's own type.

        Raises:
            QFilterError: no such layer.
        """
        n_cells, result = self.used(seq), []
        for is_v in (False, True):
            size = native.rows(self.ctx, seq, layer, is_v, None, 0)
            if size == 0 and n_cells > 0:
                raise QFilterError(f"no layer {layer}: check the number")
            out = np.empty(size, dtype=np.uint8)
            native.rows(self.ctx, seq, layer, is_v, out.ctypes.data, size)
            result.append(out.reshape(n_cells, size // max(1, n_cells)))
        return result[0], result[1]

    def n_head_kv(self, layer: int, seq: int = 0) -> int:
        """KV heads of a layer that evicts."""
        return next(ih for ih in itertools.count() if self._n_kept(layer, ih, seq) < 0)

    def rewind_limit(self, seq: int = 0) -> int:
        """The first position to which a sequence can be cut back."""
        return native.rewind_limit(self.ctx, seq)

    # -- reading

    def fill(self, parts: Iterable[tuple[int, int, list[int], int]]) -> None:
        """Fill the batch of the next `decode_batch`.

        Args:
            parts: (sequence, first position, tokens, how many of the last tokens get logits).
        """
        if self._batch is None:
            self._batch = llama_cpp.llama_batch_init(self.params.n_batch, 0, 1)
            self._exit_stack.callback(llama_cpp.llama_batch_free, self._batch)
        batch, i = self._batch, 0
        for seq, start, tokens, n_outputs in parts:
            first = len(tokens) - n_outputs
            for j, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, start + j
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
                batch.logits[i] = j >= first
                i += 1
        batch.n_tokens = i

    def decode_batch(self) -> int:
        """Call llama_decode() on the batch of `fill`; returns its code, 0 for success."""
        return llama_cpp.llama_decode(self.ctx, self._batch)

    def outputs(self, tokens: list[int], first: int = 0, seq: int = 0) -> Iterator[np.ndarray]:
        """Read tokens after those that a sequence has, batch by batch.

        A batch ends where the cache is full. So evictions happen at the same positions as if the
        tokens were read one by one.

        Yields:
            float32 [n, n_vocab] for each batch, the logits after its n tokens of tokens[first:];
            overwritten by the next batch.

        Raises:
            EngineError: llama.cpp failed.
        """
        n_vocab, done, start = self.model.n_vocab(), 0, self.n_past(seq)
        while done < len(tokens):
            n = min(self.params.n_batch, len(tokens) - done)
            n = min(n, self.room(seq)) if self.config is not None else n
            n_outputs = max(0, min(n, done + n - first))
            self.fill([(seq, start + done, tokens[done : done + n], n_outputs)])
            if (code := self.decode_batch()) != 0:
                raise EngineError(f"llama_decode returned {code} at position {start + done:,}")
            done += n
            if n_outputs:
                pointer = llama_cpp.llama_get_logits(self.ctx)
                yield np.ctypeslib.as_array(pointer, shape=(n_outputs, n_vocab))

    def read(self, tokens: list[int], *, logits: bool = False, seq: int = 0) -> None:
        """Read tokens after those that a sequence has. With `logits=True` the method `logits` gives
        those after the last token.

        Raises:
            EngineError: llama.cpp failed.
        """
        for _ in self.outputs(tokens, len(tokens) - logits, seq):
            pass

    def logits(self, i: int = -1) -> np.ndarray:
        """float32 [n_vocab], a copy of the i-th output of the last batch."""
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, i)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),)).copy()

    # -- compressing

    def compress(
        self,
        n_cells: int,
        window: int | None = None,
        seq: int = 0,
        scores: np.ndarray | None = None,
    ) -> bool:
        """Compress a sequence to n_cells now; False if there was nothing to do.

        Args:
            window: last positions that stay; by default `QFilterConfig.window_of(n_cells)`.
            scores: in place of the policy's: float32 [heads, cells used], the KV heads of all
                layers that evict, the cells in the order of `kept`.

        Raises:
            EngineError: llama.cpp failed; what the sequence has left is in `n_past`.
        """
        window = self.config.window_of(n_cells) if window is None else window
        if n_cells >= self.used(seq):
            return False
        if scores is None:
            code = native.compress(self.ctx, seq, n_cells, window)
        else:
            scores = np.ascontiguousarray(scores, np.float32)
            data = scores.ctypes.data_as(native.FLOATS)
            code = native.compress_scored(self.ctx, seq, n_cells, window, data, scores.size)
        if code < 0:
            raise EngineError(f"llama_qfilter_compress failed: {native.last_error().decode()}")
        return code == 0

    def close(self) -> None:
        """Free the cache."""
        if os.getpid() == self._pid:
            super().close()
        else:  # a copy that fork() made: what the engine works with is the parent's
            self._exit_stack.pop_all()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *error) -> None:
        self.close()
