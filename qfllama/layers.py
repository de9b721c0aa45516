"""What each layer of a model keeps in its cache, from the header of the GGUF file alone.

llama.cpp reads the header and says which layers evict; no weights are loaded and nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import llama_cpp
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qfllama import gguf_header
from qfllama.engine import Model

PAD = 256
"""Cells are allocated in steps of this many (LLAMA_QFILTER_PAD)."""
EVICTS, WINDOW, NOTHING, UNKNOWN = "evicts", "window", "nothing", "unknown"


@dataclass(frozen=True)
class LayerRows:
    """What a layer keeps of one position.

    Attributes:
        kind: `evicts`: its cells are bounded; `window`: a fixed number of cells; `nothing`: it has
            no cache of its own; `unknown`: a cache of fixed size that the header doesn't tell.
        n_k, n_v: numbers in a row of K and of V, all KV heads.
        n_head, n_head_kv: query heads and KV heads.
    """

    kind: str
    n_k: int
    n_v: int
    n_head: int
    n_head_kv: int

    def n_bytes(self, type_k: int, type_v: int) -> int:
        """Bytes of K and V of one position, in these ggml types."""
        return row_bytes(self.n_k, type_k) + row_bytes(self.n_v, type_v)


@dataclass(frozen=True)
class Layers:
    """The caches of a model.

    Attributes:
        rows: one of each layer.
        n_window: positions that a windowed layer sees; 0: there are none.
        recurrent: does it also have states of fixed size, which the header doesn't tell?
        softcap: of the logits of attention; 0.0: none.
    """

    rows: tuple[LayerRows, ...]
    n_window: int
    recurrent: bool
    softcap: float

    def cell_bytes(self, type_k: int, type_v: int) -> int:
        """Bytes of one cell: K and V of one position in all layers that evict."""
        return sum(row.n_bytes(type_k, type_v) for row in self.rows if row.kind == EVICTS)

    def layer_bytes(
        self, n_cells: int, n_ctx: int, n_batch: int, type_k: int, type_v: int
    ) -> list[int]:
        """Bytes that the cache of one sequence allocates in each layer; states of recurrent layers
        are not among them.

        Args:
            n_cells: the bound, max_length.
            n_ctx: positions of a sequence.
            n_batch: tokens of the largest batch.
        """
        n_alloc = allocated(n_cells, n_ctx)
        # as in llama_memory_qfilter::create() and llama_kv_cache_iswa()
        n_window = min(max(n_alloc, padded(self.n_window + n_batch)), n_ctx)
        n_window = padded(min(n_window, self.n_window + n_batch))
        cells = {EVICTS: n_alloc, WINDOW: n_window}
        return [cells.get(row.kind, 0) * row.n_bytes(type_k, type_v) for row in self.rows]


def padded(n_cells: int) -> int:
    return -(-n_cells // PAD) * PAD


def allocated(n_cells: int, n_ctx: int) -> int:
    """Cells that the engine allocates for a bound of n_cells."""
    return min(padded(min(n_cells, n_ctx)), n_ctx)


def row_bytes(n: int, kind: int) -> int:
    """Bytes of n numbers in a ggml type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return n // block * size


def layers_of(model: Model) -> Layers:
    """The caches of a model; it can be one of `Model.from_header`.

    Raises:
        QFilterError: the cache of such a model can't be bounded.
    """
    evicting = set(model.evicting_layers())
    header, shape = gguf_header.scan_first(model.path)[1], model.shape

    def key(name: str, default):
        return header.get(f"{shape.architecture}.attention.{name}", default)

    n_embd = header.get(f"{shape.architecture}.embedding_length")
    n_head = shape.n_head if isinstance(shape.n_head, int) else max(shape.n_head)
    dims = {EVICTS: (shape.head_dim, int(key("value_length", n_embd // max(n_head, 1))))}
    dims[WINDOW] = (
        int(key("key_length_swa", dims[EVICTS][0])),
        int(key("value_length_swa", dims[EVICTS][1])),
    )
    hybrid = bool(llama_cpp.llama_model_is_hybrid(model.model))
    n_window = llama_cpp.llama_model_n_swa(model.model)
    n_layer = llama_cpp.llama_model_n_layer(model.model)
    n_own = n_layer - int(key("shared_kv_layers", 0))

    def row(il: int) -> LayerRows:
        kind, (n_head, n_head_kv) = EVICTS, shape.heads(il)
        if il not in evicting:
            own_keys = n_head_kv > 0 and il < n_own and n_window > 0
            kind = UNKNOWN if hybrid else WINDOW if own_keys else NOTHING
        dim_k, dim_v = dims[WINDOW if kind == WINDOW else EVICTS]
        return LayerRows(kind, n_head_kv * dim_k, n_head_kv * dim_v, n_head, n_head_kv)

    rows = tuple(row(il) for il in range(n_layer))
    windowed = any(row.kind == WINDOW for row in rows)
    softcap = header.get(f"{shape.architecture}.attn_logit_softcapping", 0.0)
    return Layers(rows, n_window if windowed else 0, hybrid, float(softcap))
