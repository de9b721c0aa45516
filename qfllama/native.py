"""ctypes declarations of qfilter.h, the C API of the patched llama.cpp; nothing else."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)

import llama_cpp

from qfllama.config import QFilterError
from qfllama.policies import TABLE, Policy

_lib = llama_cpp.llama_cpp._lib

ABI_VERSION = 2
"""Of qfilter.h, for which this file was written."""
KINDS = ("filters", "queries", "moments")
"""enum llama_qfilter_kind."""
ACCEPTED = (ABI_VERSION, 1)  # remove `, 1` once the engine has llama_qfilter_abi_version()


class EngineMismatch(QFilterError, ImportError):
    """The installed llama-cpp-python has no engine of ours, or one of another version."""


def check_abi(lib) -> None:
    """Raises EngineMismatch unless the library `lib` has the C API that this file declares."""
    if not hasattr(lib, "llama_qfilter_init_from_model"):
        raise EngineMismatch(
            f"llama-cpp-python {llama_cpp.__version__} has no Q-Filters in it: "
            "install the patched build with `pip install ./patches`"
        )
    numbered = hasattr(lib, "llama_qfilter_abi_version")
    version = lib.llama_qfilter_abi_version() if numbered else 1
    if version not in ACCEPTED:
        older = version < ABI_VERSION
        raise EngineMismatch(
            f"the engine in llama-cpp-python is {'older' if older else 'newer'} than this qfllama "
            f"(C API version {version}, needed {ABI_VERSION}): "
            + (
                "build it again with `pip install --force-reinstall --no-deps ./patches`"
                if older
                else "install the qfllama that belongs to it with `pip install .`"
            )
        )


def check_policies(lib) -> None:
    """Raises EngineMismatch unless the engine has the policies of `policies.TABLE`, which is written
    out there so that a --help needs no engine."""
    lib.llama_qfilter_policy_name.restype = c_char_p
    lib.llama_qfilter_policy_needs.restype = c_int32
    found, number = [], 0
    while (name := lib.llama_qfilter_policy_name(number)) is not None:
        needs, j = [], 0
        while (kind := lib.llama_qfilter_policy_needs(number, j)) >= 0:
            needs.append(KINDS[kind])
            j += 1
        found.append(Policy(name.decode(), number, tuple(needs)))
        number += 1
    if tuple(found) != TABLE:
        raise EngineMismatch(
            f"the engine in llama-cpp-python has other policies ({', '.join(p.name for p in found)})"
            " than this qfllama: build it again with `pip install --force-reinstall --no-deps "
            "./patches`"
        )


check_abi(_lib)
if hasattr(_lib, "llama_qfilter_policy_name"):  # remove this line with `ACCEPTED`
    check_policies(_lib)

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


def declare(name, restype, *argtypes):
    """A function of the library, with its types."""
    fn = getattr(_lib, name)
    fn.restype = restype
    fn.argtypes = argtypes
    return fn


default_params = declare("llama_qfilter_default_params", Params)
supported = declare(
    "llama_qfilter_supported",
    c_bool,
    llama_cpp.llama_model_p_ctypes,
    llama_cpp.llama_context_params,
    c_char_p,
    c_size_t,
)
model_supported = declare(
    "llama_qfilter_model_supported", c_bool, llama_cpp.llama_model_p_ctypes, c_char_p, c_size_t
)
layer_evicts = declare(
    "llama_qfilter_layer_evicts", c_bool, llama_cpp.llama_model_p_ctypes, c_int32
)
init_from_model = declare(
    "llama_qfilter_init_from_model",
    llama_cpp.llama_context_p_ctypes,
    llama_cpp.llama_model_p_ctypes,
    llama_cpp.llama_context_params,
    POINTER(Params),
)
compress = declare(
    "llama_qfilter_compress", c_int32, llama_cpp.llama_context_p_ctypes, c_int32, c_uint32
)
kept = declare(
    "llama_qfilter_kept",
    c_int32,
    llama_cpp.llama_context_p_ctypes,
    c_int32,
    c_int32,
    c_int32,
    POINTER(c_int32),
    c_size_t,
)
rows = declare(
    "llama_qfilter_rows",
    c_size_t,
    llama_cpp.llama_context_p_ctypes,
    c_int32,
    c_int32,
    c_bool,
    c_void_p,
    c_size_t,
)
get_stats = declare(
    "llama_qfilter_get_stats", c_bool, llama_cpp.llama_context_p_ctypes, POINTER(Stats)
)
