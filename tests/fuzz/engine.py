"""The engine through its C API, one thread, for any number of sequences."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
from llama_cpp._logger import set_verbose

from fuzz.cache import N_REP, Row, Settings, learned, moments
from qfllama import native
from qfllama.config import POLICIES
from qfllama.context import cache_type

set_verbose(False)

N_LAYER, N_HEAD_KV = 2, 2
HEAD_DIMS = (32, 64)  # llama.cpp rotates the quantized keys of the second


def write_models(folder: Path) -> dict[int, Path]:
    """head_dim -> a GGUF of random weights in `folder`; those that are there are kept."""
    paths = {head_dim: folder / f"d{head_dim}.gguf" for head_dim in HEAD_DIMS}
    if not all(path.is_file() for path in paths.values()):
        import tiny_models

        for head_dim, path in paths.items():
            tiny_models.write_llama(
                path.with_suffix(""),
                n_layer=N_LAYER,
                n_head=N_HEAD_KV * N_REP,
                n_head_kv=N_HEAD_KV,
                head_dim=head_dim,
            )
        tiny_models.convert([path.with_suffix("") for path in paths.values()])
    return paths


def load(path: Path) -> internals.LlamaModel:
    params = llama_cpp.llama_model_default_params()
    return internals.LlamaModel(path_model=str(path), params=params, verbose=False)


def filters(seed: int, head_dim: int) -> np.ndarray:
    """Unit vectors, float32 [n_layer, n_head_kv, head_dim]."""
    weight = np.random.default_rng(seed).normal(size=(N_LAYER, N_HEAD_KV, head_dim))
    return (weight / np.linalg.norm(weight, axis=-1, keepdims=True)).astype(np.float32)


class Engine:
    """A context with a bounded cache. ValueError when llama.cpp refuses the settings."""

    def __init__(self, model: internals.LlamaModel, settings: Settings, weight: np.ndarray):
        self.settings = settings
        self.ctx = init(model, settings, weight)
        if not self.ctx:
            raise ValueError("refused")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 2)
        self.polls_left = None  # llama.cpp asks before every operation whether to go on

        @llama_cpp.ggml_abort_callback
        def abort(_):
            if self.polls_left is None:
                return False
            self.polls_left -= 1
            return self.polls_left < 0

        self.abort = abort  # kept alive
        llama_cpp.llama_set_abort_callback(self.ctx, abort, None)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.ctx)

    # -- changing

    def decode(self, tokens: list[tuple[int, tuple[int, ...], int]], abort=None) -> int:
        """tokens: (position, sequences, id); abort: after so many polls."""
        for i, (position, sequences, token) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i] = len(sequences)
            for j, seq in enumerate(sequences):
                self.batch.seq_id[i][j] = seq
            self.batch.logits[i] = i % 3 == 0
        self.batch.n_tokens = len(tokens)
        self.polls_left = abort
        result = llama_cpp.llama_decode(self.ctx, self.batch)
        self.polls_left = None
        return result

    def compress(self, seq: int, n_keep: int, abort=None) -> int:
        self.polls_left = abort
        result = native.compress(self.ctx, seq, n_keep, self.settings.n_window)
        self.polls_left = None
        return result

    def question(self, seq: int) -> int:
        return native.question(self.ctx, seq)

    def recall(self, seq: int, n_rows: int, abort=None) -> int:
        self.polls_left = abort
        result = native.recall(self.ctx, seq, n_rows)
        self.polls_left = None
        return result

    def archived(self, seq: int, position: int) -> dict[tuple[int, int], Row]:
        """(layer, KV head) -> the row of a position in the archive; {}: there is none."""
        result = {}
        for layer in range(N_LAYER):
            stored = []
            for is_v in (False, True):
                size = native.archived(self.ctx, seq, position, layer, is_v, None, 0)
                data = ctypes.create_string_buffer(max(1, size))
                native.archived(self.ctx, seq, position, layer, is_v, data, size)
                stored.append(data.raw[:size])
            for head in range(N_HEAD_KV if stored[0] else 0):
                k, v = (row[head * (n := len(row) // N_HEAD_KV) :][:n] for row in stored)
                result[layer, head] = Row(position, k, v)
        return result

    def save_archive(self, seq: int) -> bytes:
        size = native.archive_get_data(self.ctx, seq, None, 0)
        data = (ctypes.c_uint8 * max(1, size))()
        assert native.archive_get_data(self.ctx, seq, data, size) == size
        return bytes(data)[:size]

    def restore_archive(self, data: bytes, seq: int) -> bool:
        view = (ctypes.c_uint8 * max(1, len(data))).from_buffer_copy(data or b"0")
        return native.archive_set_data(self.ctx, seq, view, len(data)) == len(data) > 0

    def save(self, seq: int | None, path: Path | None):
        """The state of one sequence or of all: bytes, or written to a file whose name returns."""
        if path is not None:
            name, tokens = str(path).encode(), (llama_cpp.llama_token * 1)(7)
            if seq is None:
                done = llama_cpp.llama_state_save_file(self.ctx, name, tokens, 1)
            else:
                done = llama_cpp.llama_state_seq_save_file(self.ctx, name, seq, tokens, 1)
            assert done, "not saved"
            return path
        if seq is None:
            size = llama_cpp.llama_state_get_size(self.ctx)
            data = (ctypes.c_uint8 * size)()
            written = llama_cpp.llama_state_get_data(self.ctx, data, size)
        else:
            size = llama_cpp.llama_state_seq_get_size(self.ctx, seq)
            data = (ctypes.c_uint8 * size)()
            written = llama_cpp.llama_state_seq_get_data(self.ctx, data, size, seq)
        assert written == size, f"{written} of {size} bytes saved"
        return bytes(data)

    def restore(self, state: bytes | Path, seq: int | None, resize: bool) -> bool:
        """resize: also from a cache of another size (a sequence in memory only)."""
        if isinstance(state, Path):
            name, tokens = str(state).encode(), (llama_cpp.llama_token * 1)()
            n = ctypes.c_size_t()
            if seq is None:
                load = llama_cpp.llama_state_load_file
                return bool(load(self.ctx, name, tokens, 1, ctypes.byref(n)))
            load = llama_cpp.llama_state_seq_load_file
            return bool(load(self.ctx, name, seq, tokens, 1, ctypes.byref(n)))
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return llama_cpp.llama_state_set_data(self.ctx, data, len(state)) == len(state)
        flags = native.STATE_RESIZE if resize else 0
        return native.state_seq_set_data(self.ctx, data, len(state), seq, flags) == len(state)

    # -- looking

    def ends(self, seq: int) -> tuple[int, int]:
        """First and last position of a sequence."""
        return (
            llama_cpp.llama_memory_seq_pos_min(self.memory, seq),
            llama_cpp.llama_memory_seq_pos_max(self.memory, seq),
        )

    def n_first(self, seq: int) -> int:
        """First positions of a sequence that always stay."""
        stats = native.SeqStats(struct_size=ctypes.sizeof(native.SeqStats))
        assert native.get_seq_stats(self.ctx, seq, ctypes.byref(stats))
        return stats.n_first

    def kept(self, seq: int, layer: int, head: int) -> list[int]:
        n = native.kept(self.ctx, seq, layer, head, None, 0)
        assert n >= 0
        out = (ctypes.c_int32 * (n + 1))(*[-7] * (n + 1))
        assert native.kept(self.ctx, seq, layer, head, out, n) == n
        assert out[n] == -7, "written beyond the capacity"
        return out[:n]

    def rows(self, seq: int) -> dict[tuple[int, int], list[Row]]:
        """(layer, KV head) -> all that a sequence holds."""
        result = {}
        for layer in range(N_LAYER):
            kept = [self.kept(seq, layer, head) for head in range(N_HEAD_KV)]
            stored = []
            for is_v in (False, True):
                size = native.rows(self.ctx, seq, layer, is_v, None, 0)
                data = ctypes.create_string_buffer(max(1, size))
                native.rows(self.ctx, seq, layer, is_v, data, size)
                stored.append((data.raw[:size], size // max(1, len(kept[0])) // N_HEAD_KV))
            for head, positions in enumerate(kept):
                k, v = (
                    [data[(i * N_HEAD_KV + head) * n :][:n] for i in range(len(positions))]
                    for data, n in stored
                )
                result[layer, head] = [Row(*row) for row in zip(positions, k, v, strict=True)]
        return result

    def stats(self) -> native.Stats:
        stats = native.Stats(struct_size=ctypes.sizeof(native.Stats))
        assert native.get_stats(self.ctx, ctypes.byref(stats))
        return stats


def init(model: internals.LlamaModel, settings: Settings, weight: np.ndarray):
    """The context, or None."""
    cparams = llama_cpp.llama_context_default_params()
    cparams.n_ctx, cparams.n_seq_max = settings.n_ctx * settings.n_seq, settings.n_seq
    cparams.n_batch, cparams.n_ubatch = settings.n_batch, settings.n_ubatch
    cparams.n_threads = cparams.n_threads_batch = 1
    cparams.kv_unified = False
    cparams.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    cparams.type_k, cparams.type_v = cache_type(settings.type_k), cache_type(settings.type_v)
    params = native.Params()
    native.params_init(ctypes.byref(params), ctypes.sizeof(params))
    for name in ("n_cells", "n_keep", "n_sink", "n_window", "seed", "flags"):
        setattr(params, name, getattr(settings, name))
    params.policy = POLICIES.index(settings.policy)
    params.n_bytes_archive = 1 << 30 if settings.archive else 0
    arrays = {"filters": weight, "moments": moments(weight), "learned": learned(weight)}
    if settings.policy == "qahead":  # qblend would take them, too
        arrays["queries"] = np.ascontiguousarray(weight[..., ::-1])
    vectors = [
        native.Vectors(
            native.KINDS.index(kind), il, rows.size // rows.shape[-1], rows.shape[-1],
            rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        )
        for kind, layers in arrays.items()
        for il, rows in enumerate(layers)
    ]  # fmt: skip
    params.n_vectors = len(vectors)
    params.vectors = (native.Vectors * len(vectors))(*vectors)
    return native.init_from_model(model.model, cparams, ctypes.byref(params))
