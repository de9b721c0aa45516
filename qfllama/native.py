"""ctypes declarations of qfilter.h, the C API of the patched llama.cpp, and what its arguments need."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)

import llama_cpp
import numpy as np

from qfllama.config import QFilterError
from qfllama.policies import TABLE, Policy

_lib = llama_cpp.llama_cpp._lib

ABI_VERSION = 5
"""LLAMA_QFILTER_ABI_VERSION of the qfilter.h that this module declares."""
KINDS = ("filters", "queries", "moments", "learned")
"""What a policy can need, in the order of `enum llama_qfilter_kind`."""
BUILD = "build it again with `pip install --force-reinstall --no-deps ./patches`"


class EngineMismatch(QFilterError, ImportError):
    """The installed llama-cpp-python has no engine of ours, or one of another version."""


def check_abi(lib) -> None:
    """Raises EngineMismatch unless the library `lib` has the C API that this file declares."""
    if not hasattr(lib, "llama_qfilter_init_from_model"):
        raise EngineMismatch(
            f"llama-cpp-python {llama_cpp.__version__} has no Q-Filters in it: "
            "install the patched build with `pip install ./patches`"
        )
    # the first engines had no version number
    has_version = hasattr(lib, "llama_qfilter_abi_version")
    version = lib.llama_qfilter_abi_version() if has_version else 1
    if version != ABI_VERSION:
        older = version < ABI_VERSION
        raise EngineMismatch(
            f"the engine in llama-cpp-python is {'older' if older else 'newer'} than this qfllama "
            f"(C API version {version}, needed {ABI_VERSION}): "
            + (BUILD if older else "install the qfllama that belongs to it with `pip install .`")
        )


def check_policies(lib) -> None:
    """Raises EngineMismatch unless the engine has the policies of `policies.TABLE`, which is written
    out there so that a --help needs no engine."""
    lib.llama_qfilter_policy_name.restype = c_char_p
    lib.llama_qfilter_policy_needs.restype = c_int32
    lib.llama_qfilter_policy_learned.restype = c_bool
    found, number = [], 0
    while (name := lib.llama_qfilter_policy_name(number)) is not None:
        needs = []
        while (kind := lib.llama_qfilter_policy_needs(number, len(needs))) >= 0:
            needs.append(KINDS[kind])
        learned = lib.llama_qfilter_policy_learned(number)
        found.append(Policy(name.decode(), number, tuple(needs), bool(learned)))
        number += 1
    if tuple(found) != TABLE:
        raise EngineMismatch(
            f"the engine in llama-cpp-python has other policies ({', '.join(p.name for p in found)})"
            f" than this qfllama: {BUILD}"
        )


check_abi(_lib)
check_policies(_lib)

FLAG_GRAPH_GATHER = 1
"""Treat the CPU as another device: move rows with ggml graphs (tests)."""
FLAG_SMALL_PARTS = 2
"""Score the archive in parts of a few rows (tests)."""
STATE_RESIZE = 1
"""Load a sequence into a cache of another size."""
STATE_KEEP_ARCHIVE = 2
"""The state is of the same sequence at an earlier position: the archive stays, up to there."""


class Vectors(ctypes.Structure):
    """`struct llama_qfilter_vectors`."""

    _fields_ = [
        ("kind", c_int32),
        ("il", c_int32),
        ("n_rows", c_uint32),
        ("n_embd", c_uint32),
        ("data", POINTER(c_float)),
    ]


class Params(ctypes.Structure):
    """`struct llama_qfilter_params`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_cells", c_uint32),
        ("n_keep", c_uint32),
        ("n_sink", c_uint32),
        ("n_window", c_uint32),
        ("policy", c_int32),
        ("flags", c_uint32),
        ("seed", c_uint32),
        ("n_vectors", c_uint32),
        ("vectors", POINTER(Vectors)),
        ("n_bytes_archive", c_uint64),
        ("archive_dir", c_char_p),
    ]


class Stats(ctypes.Structure):
    """`struct llama_qfilter_stats`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_evictions", c_uint64),
        ("n_dropped", c_uint64),
        ("n_bytes_moved", c_uint64),
        ("t_score_us", c_uint64),
        ("t_select_us", c_uint64),
        ("t_gather_us", c_uint64),
        ("n_cells_used", c_uint32),
        ("n_cells", c_uint32),
        ("n_cells_alloc", c_uint32),
        ("n_bytes_kv", c_uint64),
        ("n_bytes_kv_full", c_uint64),
        ("n_bytes_scratch", c_uint64),
        ("n_archived", c_uint64),
        ("n_bytes_archive", c_uint64),
        ("n_bytes_archive_limit", c_uint64),
        ("n_bytes_archive_written", c_uint64),
        ("t_archive_us", c_uint64),
        ("n_recalls", c_uint64),
        ("t_recall_us", c_uint64),
        ("archive_stopped", c_uint32),
        ("n_graph_nodes", c_uint64),
    ]


class SeqStats(ctypes.Structure):
    """`struct llama_qfilter_seq_stats`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_evictions", c_uint64),
        ("n_dropped", c_uint64),
        ("n_cells_used", c_uint32),
        ("pos_max", c_int32),
        ("n_archived", c_uint64),
        ("pos_archived", c_int32),
        ("n_recalled", c_uint32),
        ("n_first", c_uint32),
    ]


def c_bytes(data):
    """A pointer to the bytes of `data` (bytes, bytearray, memoryview), which are not copied."""
    return np.frombuffer(data, np.uint8).ctypes.data_as(POINTER(c_uint8))


def declare(name, restype, *argtypes):
    fn = getattr(_lib, name)
    fn.restype = restype
    fn.argtypes = argtypes
    return fn


_model_p, _context_p = llama_cpp.llama_model_p_ctypes, llama_cpp.llama_context_p_ctypes

last_error = declare("llama_qfilter_last_error", c_char_p)

policy_name = declare("llama_qfilter_policy_name", c_char_p, c_int32)
policy_needs = declare("llama_qfilter_policy_needs", c_int32, c_int32, c_int32)

params_init = declare("llama_qfilter_params_init", None, POINTER(Params), c_size_t)
supported = declare(
    "llama_qfilter_supported",
    c_bool,
    _model_p,
    llama_cpp.llama_context_params,
    c_char_p,
    c_size_t,
)
model_supported = declare("llama_qfilter_model_supported", c_bool, _model_p, c_char_p, c_size_t)
layer_evicts = declare("llama_qfilter_layer_evicts", c_bool, _model_p, c_int32)


def evicting_layers(model) -> list[int]:
    """The layers of a model (llama_model_p) whose cached keys can be evicted."""
    return [il for il in range(llama_cpp.llama_model_n_layer(model)) if layer_evicts(model, il)]


init_from_model = declare(
    "llama_qfilter_init_from_model",
    _context_p,
    _model_p,
    llama_cpp.llama_context_params,
    POINTER(Params),
)

FLOATS = POINTER(ctypes.c_float)
compress = declare("llama_qfilter_compress", c_int32, _context_p, c_int32, c_uint32, c_uint32)
compress_scored = declare(
    "llama_qfilter_compress_scored",
    c_int32,
    _context_p,
    c_int32,
    c_uint32,
    c_uint32,
    FLOATS,
    c_size_t,
)
keep_first = declare("llama_qfilter_keep_first", c_int32, _context_p, c_int32, c_uint32)
room = declare("llama_qfilter_room", c_int32, _context_p, c_int32)
rewind_limit = declare("llama_qfilter_rewind_limit", c_int32, _context_p, c_int32)
kept = declare(
    "llama_qfilter_kept",
    c_int32,
    _context_p,
    c_int32,
    c_int32,
    c_int32,
    POINTER(c_int32),
    c_size_t,
)
rows = declare(
    "llama_qfilter_rows", c_size_t, _context_p, c_int32, c_int32, c_bool, c_void_p, c_size_t
)
question = declare("llama_qfilter_question", c_int32, _context_p, c_int32)
weights = declare("llama_qfilter_weights", c_int32, _context_p, c_int32, c_int32, FLOATS, c_size_t)
recall = declare("llama_qfilter_recall", c_int32, _context_p, c_int32, c_uint32)
recalled = declare(
    "llama_qfilter_recalled", c_int32, _context_p, c_int32, POINTER(c_int32), c_size_t
)
archived = declare(
    "llama_qfilter_archived",
    c_size_t,
    _context_p,
    c_int32,
    c_int32,
    c_int32,
    c_bool,
    c_void_p,
    c_size_t,
)
archive_get_data = declare(
    "llama_qfilter_archive_get_data", c_size_t, _context_p, c_int32, POINTER(c_uint8), c_size_t
)
archive_set_data = declare(
    "llama_qfilter_archive_set_data", c_size_t, _context_p, c_int32, POINTER(c_uint8), c_size_t
)
_state = (c_size_t, _context_p, POINTER(c_uint8), c_size_t, c_int32, c_uint32)
state_seq_get_data = declare("llama_qfilter_state_seq_get_data", *_state)
state_seq_set_data = declare("llama_qfilter_state_seq_set_data", *_state)
get_stats = declare("llama_qfilter_get_stats", c_bool, _context_p, POINTER(Stats))
get_seq_stats = declare(
    "llama_qfilter_get_seq_stats", c_bool, _context_p, c_int32, POINTER(SeqStats)
)
