"""ctypes declarations of qfilter.h, the C API of the patched llama.cpp; nothing else."""

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
    c_uint32,
    c_uint64,
    c_void_p,
)

import llama_cpp

_lib = llama_cpp.llama_cpp._lib

if not hasattr(_lib, "llama_qfilter_init_from_model"):
    raise ImportError(
        f"llama-cpp-python {llama_cpp.__version__} has no Q-Filters in it: "
        "install the patched build with `pip install ./patches`"
    )

FLAG_GRAPH_GATHER = 1
"""Treat the CPU as another device: move rows with ggml graphs (tests)."""


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
        ("n_filters", c_uint32),
        ("filters", POINTER(POINTER(c_float))),
        ("n_rank", c_uint32),
        ("moments", POINTER(POINTER(c_float))),
        ("queries", POINTER(POINTER(c_float))),
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


default_params = _function("llama_qfilter_default_params", Params)
supported = _function(
    "llama_qfilter_supported",
    c_bool,
    llama_cpp.llama_model_p_ctypes,
    llama_cpp.llama_context_params,
    c_char_p,
    c_size_t,
)
model_supported = _function(
    "llama_qfilter_model_supported", c_bool, llama_cpp.llama_model_p_ctypes, c_char_p, c_size_t
)
layer_evicts = _function(
    "llama_qfilter_layer_evicts", c_bool, llama_cpp.llama_model_p_ctypes, c_int32
)
init_from_model = _function(
    "llama_qfilter_init_from_model",
    llama_cpp.llama_context_p_ctypes,
    llama_cpp.llama_model_p_ctypes,
    llama_cpp.llama_context_params,
    POINTER(Params),
)
compress = _function(
    "llama_qfilter_compress", c_int32, llama_cpp.llama_context_p_ctypes, c_int32, c_uint32
)
kept = _function(
    "llama_qfilter_kept",
    c_int32,
    llama_cpp.llama_context_p_ctypes,
    c_int32,
    c_int32,
    c_int32,
    POINTER(c_int32),
    c_size_t,
)
rows = _function(
    "llama_qfilter_rows",
    c_size_t,
    llama_cpp.llama_context_p_ctypes,
    c_int32,
    c_int32,
    c_bool,
    c_void_p,
    c_size_t,
)
get_stats = _function(
    "llama_qfilter_get_stats", c_bool, llama_cpp.llama_context_p_ctypes, POINTER(Stats)
)
ropes_init = _function("llama_qfilter_ropes_init", c_void_p, llama_cpp.llama_context_p_ctypes)
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
attn_of = _function("llama_qfilter_attn_of", c_bool, c_void_p, POINTER(Attn))
attn_get = _function("llama_qfilter_attn_get", None, c_void_p, c_bool, c_void_p)
