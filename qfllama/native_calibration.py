"""ctypes declarations of the unstable part of the C API, which only calibration uses."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_float, c_int32, c_int64, c_void_p

import llama_cpp

from qfllama.native import declare


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
        ("softcap", c_float),
        ("n_embd_v", c_int32),
    ]


ropes_init = declare("llama_qfilter_ropes_init", c_void_p, llama_cpp.llama_context_p_ctypes)
ropes_free = declare("llama_qfilter_ropes_free", None, c_void_p)
ropes_back = declare(
    "llama_qfilter_ropes_back",
    c_bool,
    c_void_p,
    c_int32,
    c_void_p,
    c_int64,
    c_int64,
    c_void_p,
)
attn_of = declare("llama_qfilter_attn_of", c_bool, c_void_p, POINTER(Attn))
attn_get = declare("llama_qfilter_attn_get", None, c_void_p, c_int32, c_void_p)
