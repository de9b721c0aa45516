"""ctypes declarations of qfilter.h and qfilter-calibration.h, the C API of the patched llama.cpp;
nothing else."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)

import llama_cpp

ABI_VERSION = 2
"""LLAMA_QFILTER_ABI_VERSION of the qfilter.h that this module declares."""

INSTALL = "install the engine of this qfllama with `pip install ./patches`"

_lib = llama_cpp.llama_cpp._lib


def _abi_version() -> int:
    """Of the engine: 0 for stock llama.cpp, 1 for engines that did not tell theirs yet."""
    if hasattr(_lib, "llama_qfilter_abi_version"):
        return _lib.llama_qfilter_abi_version()
    return int(hasattr(_lib, "llama_qfilter_init_from_model"))


if (_found := _abi_version()) != ABI_VERSION:
    what = f"an engine of version {_found}, this qfllama needs version {ABI_VERSION}"
    raise ImportError(
        f"llama-cpp-python {llama_cpp.__version__} has "
        f"{what if _found else 'no Q-Filters in it'}: {INSTALL}"
    )

KINDS = ("filters", "queries", "moments")
"""What a policy can need, in the order of `enum llama_qfilter_kind`."""
FLAG_GRAPH_GATHER = 1
"""Treat the CPU as another device: move rows with ggml graphs (tests)."""
STATE_RESIZE = 1
"""Load a sequence into a cache of another size."""


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
    ]


class SeqStats(ctypes.Structure):
    """`struct llama_qfilter_seq_stats`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_evictions", c_uint64),
        ("n_dropped", c_uint64),
        ("n_cells_used", c_uint32),
        ("pos_max", c_int32),
    ]


class Attn(ctypes.Structure):
    """`struct llama_qfilter_attn`."""

    _fields_ = [
        ("il", c_int32),
        ("head_dim", c_int32),
        ("n_head", c_int32),
        ("n_tokens", c_int32),
        ("n_head_kv", c_int32),
        ("n_kv", c_int32),
        ("kq_scale", c_float),
    ]


def _function(name, restype, *argtypes):
    fn = getattr(_lib, name)
    fn.restype = restype
    fn.argtypes = argtypes
    return fn


_model_p, _context_p = llama_cpp.llama_model_p_ctypes, llama_cpp.llama_context_p_ctypes

last_error = _function("llama_qfilter_last_error", c_char_p)

policy_name = _function("llama_qfilter_policy_name", c_char_p, c_int32)
policy_needs = _function("llama_qfilter_policy_needs", c_int32, c_int32, c_int32)

params_init = _function("llama_qfilter_params_init", None, POINTER(Params), c_size_t)
supported = _function(
    "llama_qfilter_supported",
    c_bool,
    _model_p,
    llama_cpp.llama_context_params,
    c_char_p,
    c_size_t,
)
model_supported = _function("llama_qfilter_model_supported", c_bool, _model_p, c_char_p, c_size_t)
layer_evicts = _function("llama_qfilter_layer_evicts", c_bool, _model_p, c_int32)
init_from_model = _function(
    "llama_qfilter_init_from_model",
    _context_p,
    _model_p,
    llama_cpp.llama_context_params,
    POINTER(Params),
)

compress = _function("llama_qfilter_compress", c_int32, _context_p, c_int32, c_uint32, c_uint32)
room = _function("llama_qfilter_room", c_int32, _context_p, c_int32)
rewind_limit = _function("llama_qfilter_rewind_limit", c_int32, _context_p, c_int32)
kept = _function(
    "llama_qfilter_kept",
    c_int32,
    _context_p,
    c_int32,
    c_int32,
    c_int32,
    POINTER(c_int32),
    c_size_t,
)
rows = _function(
    "llama_qfilter_rows", c_size_t, _context_p, c_int32, c_int32, c_bool, c_void_p, c_size_t
)
state_seq_set_data = _function(
    "llama_qfilter_state_seq_set_data",
    c_size_t,
    _context_p,
    POINTER(c_uint8),
    c_size_t,
    c_int32,
    c_uint32,
)
get_stats = _function("llama_qfilter_get_stats", c_bool, _context_p, POINTER(Stats))
get_seq_stats = _function(
    "llama_qfilter_get_seq_stats", c_bool, _context_p, c_int32, POINTER(SeqStats)
)

# qfilter-calibration.h

attn_of = _function("llama_qfilter_attn_of", c_bool, c_void_p, POINTER(Attn))
attn_get = _function("llama_qfilter_attn_get", None, c_void_p, c_bool, c_void_p)
ropes_init = _function("llama_qfilter_ropes_init", c_void_p, _context_p)
ropes_free = _function("llama_qfilter_ropes_free", None, c_void_p)
ropes_back = _function(
    "llama_qfilter_ropes_back",
    c_bool,
    c_void_p,
    c_int32,
    c_void_p,
    c_int64,
    c_int64,
    c_void_p,
)
