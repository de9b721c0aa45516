"""How long a bounded cache can be: the sizes of a model's weights, cells and archive, from the
header of its GGUF file, and how many cells fit into the memory.

The sizes of the caches are what the engine allocates, to the byte. The memory for computations is
an estimate (`offload.buffer_bytes`, `Sizes.working_bytes`).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import llama_cpp

from qfllama import gguf_header, offload, schema
from qfllama.config import QFilterConfig, QFilterError
from qfllama.context import CACHE_TYPES, cache_type, check_supported, context_params
from qfllama.engine import Model
from qfllama.layers import EVICTS, PAD, Layers, layers_of, padded, row_bytes
from qfllama.machine import available_bytes
from qfllama.offload import AUTO, RESERVE, Device
from qfllama.shape import ModelShape

GIB, MIB = 1 << 30, 1 << 20
F16, F32 = CACHE_TYPES["f16"], CACHE_TYPES["f32"]


@dataclass(frozen=True)
class Sizes:
    """What a model takes, in bytes.

    Attributes:
        path: of the file, or of any part of a split model.
        n_ctx: positions of a conversation, rounded up to 256 as `Llama` does.
        type_k, type_v: ggml types of the cache.
        weights: of each layer, the output last: the bytes that go to a GPU with it.
        all_weights: of the whole file, the token embedding included.
        buffers: an estimate of what a computation needs whatever the cache.
    """

    path: str
    shape: ModelShape
    layers: Layers
    n_ctx: int
    type_k: int
    type_v: int
    weights: tuple[int, ...]
    all_weights: int
    buffers: int

    @property
    def cell_bytes(self) -> int:
        """K and V of one position in all layers that evict."""
        return self.layers.cell_bytes(self.type_k, self.type_v)

    def kv_bytes(self, n_cells: int) -> list[int]:
        """What the cache of one conversation allocates in each layer with a bound of n_cells."""
        # a cache that bounds nothing gets llama_cpp.Llama's own batches
        bounded = n_cells < self.n_ctx
        n_batch = QFilterConfig(max_length=n_cells).interval if bounded else offload.BATCH
        n_batch = min(n_batch, self.n_ctx)
        found = self.layers.layer_bytes(n_cells, self.n_ctx, n_batch, self.type_k, self.type_v)
        return found + [0] * (len(self.weights) - 1 - len(found))

    def fixed_bytes(self, n_cells: int) -> int:
        """The part of `kv_bytes` that does not evict: windowed layers."""
        pairs = zip(self.layers.rows, self.kv_bytes(n_cells), strict=False)
        return sum(n_bytes for row, n_bytes in pairs if row.kind != EVICTS)

    def working_bytes(self, n_cells: int) -> int:
        """An estimate of what reading and evicting need for n_cells: the mask of a batch (F32 and
        F16), K and V of a layer in F32, and three scores for each KV head."""
        evicting = [row for row in self.layers.rows if row.kind == EVICTS]
        mask = offload.BATCH * (row_bytes(1, F32) + row_bytes(1, F16))
        copies = max(row.n_bytes(F32, F32) for row in evicting)
        scores = 3 * row_bytes(1, F32) * sum(row.n_head_kv for row in evicting)
        return n_cells * (mask + copies + scores)


@dataclass(frozen=True)
class Place:
    """The memory that the cells have to fit.

    Attributes:
        name: for the user: `--memory`, the names of the GPUs, or `this machine`.
        n_bytes: what weights, cache and buffers may take of it.
        free: what is free; larger than n_bytes if some of it must stay free.
        devices: the GPUs; () for memory of the machine.
        host: bytes for layers that don't go to the GPU; None: not known.
    """

    name: str
    n_bytes: int
    free: int
    devices: tuple[Device, ...] = ()
    host: int | None = None


@dataclass(frozen=True)
class Plan:
    """What fits where.

    Attributes:
        sizes: of the model.
        place: the memory.
        n_slots: how many conversations at the same time the cells are counted for.
        max_length: cells that fit for each of them; 0: nothing fits. At most n_ctx: then the cache
            is never full.
        n_gpu_layers: layers on the GPU, the output is one of them; None: there is no GPU in this plan.
        asked: the max_length that `slots` is counted for.
        slots: conversations that fit with `asked` cells each.
        has_filters: has the file filters?
    """

    sizes: Sizes
    place: Place
    n_slots: int
    max_length: int
    n_gpu_layers: int | None
    asked: int
    slots: int
    has_filters: bool

    @property
    def whole(self) -> bool:
        """Does every position have a cell?"""
        return self.max_length >= self.sizes.n_ctx

    @cached_property
    def least_bytes(self) -> int:
        """What the weights, the smallest cache and buffers take."""
        return _total(self.sizes, min(PAD, self.sizes.n_ctx), self.n_slots)

    @property
    def archive_bytes(self) -> int:
        """Host memory for an archive of all positions of all conversations."""
        return padded(self.sizes.n_ctx) * self.sizes.cell_bytes * self.n_slots

    @property
    def command(self) -> str | None:
        """The command line of a chat; None if nothing fits."""
        if self.max_length == 0:
            return None
        sizes, names = self.sizes, {number: name for name, number in CACHE_TYPES.items()}
        words = ["qfllama", "chat", sizes.path, "--max-length", self.max_length]
        words += ["--n-ctx", sizes.n_ctx]
        for name, kind in (("--type-k", sizes.type_k), ("--type-v", sizes.type_v)):
            words += [name, names[kind]] if kind != F16 else []
        if not self.has_filters:
            words += ["--policy", "kvdiff"]
        if self.n_gpu_layers is not None:
            all_there = self.n_gpu_layers == len(sizes.weights)
            words += ["--n-gpu-layers", "all" if all_there else self.n_gpu_layers]
        return shlex.join(map(str, words))


def cells_that_fit(model, **options) -> int:
    """The largest max_length that fits.

    Args:
        model: a GGUF file; only its header is read.
        options: those of `make_plan`, for example `n_slots`, `n_ctx` or `memory`.

    Returns:
        cells of each conversation, at most n_ctx.

    Raises:
        QFilterError: not even the smallest cache fits, or as `make_plan`.
    """
    return needed(make_plan(model, **options)).max_length


def needed(plan: Plan) -> Plan:
    """The plan itself; QFilterError if nothing fits."""
    if plan.max_length == 0:
        raise QFilterError(f"{plan.sizes.path}: {why_nothing_fits(plan)}")
    return plan


def make_plan(
    model,
    *,
    n_slots: int = 1,
    n_ctx: int = 0,
    max_length: int | None = None,
    memory: int | None = None,
    type_k: int | str | None = None,
    type_v: int | str | None = None,
    archive: bool = True,
    n_gpu_layers: int | str | None = AUTO,
    found: list[Device] | None = None,
    free: int | None = None,
) -> Plan:
    """What of a model fits where.

    Args:
        model: a GGUF file; only its header is read.
        n_slots: conversations at the same time, each with cells of its own.
        n_ctx: positions of a conversation; 0 for what the model was trained for.
        max_length: what `Plan.slots` is counted for; by default that of `QFilterConfig`.
        memory: bytes that weights, cache and buffers may take together. None: the free memory of
            the GPUs, less `offload.RESERVE` each. Without a GPU: half of this machine's free
            memory, as the other half is for the archive; without an archive all of it less
            `offload.RESERVE`.
        type_k, type_v: of the cache, by name or number; None: f16.
        archive: will there be an archive in memory of this machine?
        n_gpu_layers: as in `offload.choose`.
        found: the GPUs; None for those there are.
        free: bytes that are free on this machine; None for what the system says.

    Raises:
        QFilterError: no model, a model that can't have a bounded cache of these types, no n_ctx, or
            the memory is not known.
    """
    sizes = sizes_of(model, n_ctx, type_k, type_v)
    asked = min(max_length or QFilterConfig.max_length, sizes.n_ctx)
    QFilterConfig(max_length=asked)
    choice = offload.choose(model, n_gpu_layers, found=[])
    free = available_bytes() if free is None else free
    if memory is None and (choice.auto or choice.n_layers != 0):
        found = offload.devices() if found is None else found
    else:
        found = []
    try:
        has_filters = schema.read(model, compare=False) is not None
    except QFilterError:  # `qfllama inspect` says what is wrong with them
        has_filters = False
    plan = Plan(
        sizes, _place(memory, found, free, archive), n_slots, 0, None, asked, 0, has_filters
    )
    if found:
        return _on_gpu(plan, choice, archive)
    return _filled(plan, 0)


def sizes_of(model, n_ctx: int = 0, type_k=None, type_v=None) -> Sizes:
    """What the GGUF file `model` takes; as `make_plan`."""
    kinds = [cache_type(kind) for kind in (type_k, type_v)]
    kinds = [F16 if kind is None else kind for kind in kinds]
    with Model.from_header(model) as opened:
        layers, shape = layers_of(opened), opened.shape
        params = context_params(n_ctx=PAD, type_k=kinds[0], type_v=kinds[1])
        check_supported(opened, params)
    if not (n_ctx or shape.n_ctx_train):
        raise QFilterError(
            f"{model} doesn't say for how many positions it was trained: give --n-ctx"
        )
    parts = [gguf_header.scan(part) for part in gguf_header.parts(model)]
    return Sizes(
        path=str(model),
        shape=shape,
        layers=layers,
        n_ctx=padded(n_ctx or shape.n_ctx_train),
        type_k=kinds[0],
        type_v=kinds[1],
        weights=tuple(offload.layer_bytes(model)),
        all_weights=sum(gguf_header.tensor_bytes(t) for part in parts for t in part.tensors),
        buffers=offload.buffer_bytes(model),
    )


def _place(memory, found: list[Device], free: int | None, archive: bool) -> Place:
    if memory is not None:
        return Place("--memory", memory, memory)
    if found:
        there = sum(device.free for device in found)
        usable = sum(max(0, device.free - RESERVE) for device in found)
        name = ", ".join(device.name for device in found)
        return Place(name, usable, there, tuple(found), free)
    if free is None:
        raise QFilterError("this system doesn't tell how much memory is free: give --memory")
    return Place("this machine", free // 2 if archive else max(0, free - RESERVE), free)


def _on_gpu(plan: Plan, choice: offload.Offload, archive: bool) -> Plan:
    """As many cells as fit beside all layers on the GPU. If not all layers fit: the default
    max_length and as many layers as fit beside it, since more cells would slow down every token."""
    sizes, total = plan.sizes, len(plan.sizes.weights)
    if not choice.auto:
        return _filled(plan, total if choice.n_layers < 0 else min(choice.n_layers, total))
    full = _filled(plan, total)
    if full.max_length:
        return full
    n_cells = min(sizes.n_ctx, QFilterConfig.max_length)
    n = offload.layers_that_fit(*_on_devices(sizes, n_cells, plan.n_slots), plan.place.devices)
    if n > 0 and _fits(sizes, plan.place, n_cells, plan.n_slots, n):
        return _counted(replace(plan, max_length=n_cells, n_gpu_layers=n))
    if plan.place.host is None:
        return full
    machine = replace(plan, place=_place(None, [], plan.place.host, archive), n_gpu_layers=0)
    on_machine = _filled(machine, 0)
    return on_machine if on_machine.max_length else full


def _filled(plan: Plan, n_gpu_layers: int) -> Plan:
    """The plan with as many cells as fit beside n_gpu_layers layers on the GPU."""
    sizes, place = plan.sizes, plan.place

    def length(n: int) -> int:
        return min(n * PAD, sizes.n_ctx)

    n = _largest(
        sizes.n_ctx // PAD, lambda n: _fits(sizes, place, length(n), plan.n_slots, n_gpu_layers)
    )
    known = n_gpu_layers if place.devices else plan.n_gpu_layers
    return _counted(replace(plan, max_length=length(n), n_gpu_layers=known))


def _counted(plan: Plan) -> Plan:
    """The plan with the number of conversations of `asked` cells."""
    sizes, place, n_gpu = plan.sizes, plan.place, plan.n_gpu_layers or 0
    most = llama_cpp.llama_max_parallel_sequences()
    slots = _largest(most, lambda n: _fits(sizes, place, plan.asked, n, n_gpu))
    return replace(plan, slots=slots)


def _largest(upper: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `upper` that fits; 0: none. If one fits, all smaller ones do."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fits(sizes: Sizes, place: Place, n_cells: int, n_slots: int, n_gpu_layers: int) -> bool:
    if not place.devices:
        return _total(sizes, n_cells, n_slots) <= place.n_bytes
    layers, buffers = _on_devices(sizes, n_cells, n_slots)
    if offload.layers_that_fit(layers, buffers, place.devices) < n_gpu_layers:
        return False
    elsewhere = sum(layers[: len(layers) - n_gpu_layers])
    return elsewhere == 0 or place.host is None or elsewhere + buffers <= place.host


def _on_devices(sizes: Sizes, n_cells: int, n_slots: int) -> tuple[list[int], int]:
    """Bytes of each layer with its cache, the output last, and of the buffers of each device."""
    caches = [n_slots * n_bytes for n_bytes in sizes.kv_bytes(n_cells)] + [0]
    layers = [a + b for a, b in zip(sizes.weights, caches, strict=True)]
    return layers, sizes.buffers + sizes.working_bytes(n_cells)


def _total(sizes: Sizes, n_cells: int, n_slots: int) -> int:
    """Bytes of the weights, of caches and of buffers."""
    caches = n_slots * sum(sizes.kv_bytes(n_cells))
    return sizes.all_weights + caches + sizes.buffers + sizes.working_bytes(n_cells)


def why_nothing_fits(plan: Plan) -> str:
    """What is missing, and what to do about it."""
    sizes, place = plan.sizes, plan.place
    what = "a cache" if plan.n_slots == 1 else f"{plan.n_slots} caches"
    return (
        f"nothing fits: weights ({size(sizes.all_weights)}), {what} of {PAD} cells and buffers take "
        f"{size(plan.least_bytes)}, {place.name} has {size(place.n_bytes)} for them; use a smaller "
        "model or quantization, or more memory"
    )


def size(n_bytes: int) -> str:
    """1.5 GiB, 11.2 MiB or 22.5 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.1f} {name}"
    return f"{n_bytes} bytes"
