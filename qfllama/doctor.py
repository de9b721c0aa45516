"""What is installed, what it runs on, whether a model is supported, and whether a real run is right.

Nothing of the engine is imported before it is asked for: a missing or broken engine is a finding.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path

from qfllama import gguf_header
from qfllama.config import QFilterConfig, QFilterError
from qfllama.machine import available_bytes, cpu_name
from qfllama.shape import model_shape

PACKAGES = ("qfllama", "llama-cpp-python", "gguf", "numpy")
NOT_KNOWN = "not known"


def examine(
    model=None,
    *,
    type_k: str | None = None,
    type_v: str | None = None,
    n_threads: int = 1,
    n_gpu_layers: int | str = "auto",
) -> dict:
    """All findings, as plain JSON values.

    Args:
        model: a GGUF file to check as well.
        type_k, type_v: names of the types of its cache; None: f16.
        n_gpu_layers: of the model, as in `engine.Model`.

    Returns:
        versions (package -> version), machine, engine, backends, devices, model (None: none was
        given), checks (a list of name, where, ok, text) and ok: are all checks ok?

    Raises:
        QFilterError: the file is no model, or there is no such type.
    """
    found = {"versions": _versions(), "machine": _machine(), "engine": None}
    found |= {"backends": [], "devices": [], "model": None}
    if model is not None:
        model_shape(model)  # raises a clear error for a file that is no model
    try:
        found["engine"] = _engine()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        found["checks"] = [_check("engine", "", False, str(error))]
    else:
        found["checks"] = [_check("engine", "", True, "it has the C API that this qfllama needs")]
        found |= _hardware()
        types = _types(type_k, type_v)
        found["checks"] += _self_test(n_threads, types)
        if model is not None:
            facts, checks = _model(model, types, n_threads, n_gpu_layers)
            found["model"] = facts
            found["checks"] += checks
    found["ok"] = all(check["ok"] for check in found["checks"])
    return private(found)


def private(value):
    """`value` (nested dicts and lists) with ~ for the home directory in every text."""
    if isinstance(value, dict):
        return {name: private(item) for name, item in value.items()}
    if isinstance(value, list):
        return [private(item) for item in value]
    home = os.path.expanduser("~").rstrip(os.sep)
    if not isinstance(value, str) or not os.path.isabs(home):
        return value
    for folder in {home, os.path.realpath(home)}:
        value = value.replace(folder + os.sep, "~" + os.sep)
    return value


def _check(name: str, where: str, ok: bool, text: str) -> dict:
    return {"name": name, "where": where, "ok": ok, "text": " ".join(text.split())}


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions | {"python": platform.python_version()}


def _machine() -> dict:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_name(),
        "cpus": count,
        "free_bytes": available_bytes(),
    }


def _engine() -> dict:
    import llama_cpp

    from qfllama import backends, native, policies

    version, commit = backends.versions()
    return {
        "version": llama_cpp.__version__,
        "c_api": native.ABI_VERSION,
        "ggml": version,
        "ggml_commit": NOT_KNOWN if commit in ("", "unknown") else commit,
        "gpu_offload": bool(llama_cpp.llama_supports_gpu_offload()),
        "mmap": bool(llama_cpp.llama_supports_mmap()),
        "most_conversations": llama_cpp.llama_max_parallel_sequences(),
        "policies": list(policies.NAMES),
        "build": " ".join(llama_cpp.llama_print_system_info().decode().replace("|", " ").split()),
    }


def _hardware() -> dict:
    from qfllama import backends

    names = ("name", "description", "kind", "backend")
    return {
        "backends": backends.backends(),
        "devices": [
            {name: getattr(device, name) for name in names}
            | {"free_bytes": device.free or None, "total_bytes": device.total or None}
            for device in backends.devices()
        ],
    }


def _types(type_k: str | None, type_v: str | None) -> dict[str, str | None]:
    """The types by their fields of llama_context_params; QFilterError for an unknown one."""
    from qfllama.context import cache_type

    for name in (type_k, type_v):
        cache_type(name)
    return {"type_k": type_k, "type_v": type_v}


def _self_test(n_threads: int, types: dict) -> list[dict]:
    """The checks with a small generated model: on the CPU, and on the GPU if there is one."""
    from qfllama import offload, selftest

    places = [("CPU", 0)]
    if gpus := offload.devices():
        places.append((", ".join(gpu.name for gpu in gpus), "all"))
    checks = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "self-test.gguf")
        selftest.write_model(path)
        for where, n_gpu_layers in places:
            checks += _run(path, f"small model, {where}", True, n_gpu_layers, n_threads, types)
    return checks


def _run(path, where, made_here, n_gpu_layers, n_threads, types) -> list[dict]:
    from qfllama import selftest
    from qfllama.engine import Model
    from qfllama.offload import Cache

    try:
        caches = [Cache(selftest.N_CELLS)]
        with Model(path, n_gpu_layers=n_gpu_layers, caches=caches) as model:
            checks = selftest.run(model, made_here=made_here, n_threads=n_threads, **types)
    except QFilterError as error:
        return [_check("load", where, False, str(error))]
    return [_check(check.name, where, check.ok, check.text) for check in checks]


def _model(path, types: dict, n_threads: int, n_gpu_layers) -> tuple[dict, list[dict]]:
    """Facts about a model, and the checks of it."""
    from qfllama.context import context_params, why_unsupported
    from qfllama.engine import Model
    from qfllama.layers import EVICTS, layers_of

    shape, where = model_shape(path), "model"
    facts = {
        "file": str(path),
        "files": len(gguf_header.parts(path)),
        "name": shape.name,
        "architecture": shape.architecture,
        "n_ctx_train": shape.n_ctx_train,
        "type_k": types["type_k"] or "f16",
        "type_v": types["type_v"] or "f16",
        "supported": False,
    }
    params = context_params(n_ctx=256, **types)
    try:
        with Model.from_header(path) as model:
            layers = layers_of(model)
            why = why_unsupported(model, params)
    except QFilterError as error:
        why = str(error)
    if why:
        return facts | {"why": why}, [_check("supported", where, False, why)]
    n_evict = sum(row.kind == EVICTS for row in layers.rows)
    checks = [_check("supported", where, True, f"{n_evict} of {len(layers.rows)} layers evict")]
    filters, fit = _filters(path)
    checks += [] if fit is None else [_check("filters", where, fit, filters)]
    facts |= {
        "supported": True,
        "why": None,
        "layers": len(layers.rows),
        "evicting_layers": n_evict,
        "filters": filters,
        "flash_attention": _flash_attention(layers, params),
        "n_gpu_layers": _offload(path, shape, n_gpu_layers, params),
    }
    return facts, checks + _run(path, where, False, n_gpu_layers, n_threads, types)


def _filters(path) -> tuple[str, bool | None]:
    """(text about the filters, do they belong to the model?); (text, None) without filters."""
    from qfllama import schema
    from qfllama.fit import fit

    try:
        filters = schema.read(path)
    except QFilterError as error:
        return str(error), False
    if filters is None:
        return "none: `qfllama convert` makes them; --policy kvdiff needs none", None
    return fit(filters).summary, True


def _flash_attention(layers, params) -> list[dict]:
    """Which devices support the attention of the layers that cache keys, by shape: for a prompt and
    for one token."""
    from qfllama import backends, offload
    from qfllama.layers import NOTHING, UNKNOWN

    shapes = {
        (row.n_head, row.n_head_kv, row.n_k // row.n_head_kv, row.n_v // row.n_head_kv)
        for row in layers.rows
        if row.kind not in (NOTHING, UNKNOWN)
    }
    names = {device.name for device in offload.devices()}
    there = [d for d in backends.devices() if d.name in names or (not names and d.kind == "CPU")]
    found = []
    for device in there:
        for n_head, n_head_kv, dim_k, dim_v in sorted(shapes):
            shape = {"n_head": n_head, "n_head_kv": n_head_kv, "dim_k": dim_k, "dim_v": dim_v}
            prompt, one = (
                backends.has_flash_attention(
                    device, **shape, type_k=params.type_k, type_v=params.type_v,
                    n_tokens=n, softcap=layers.softcap,
                )
                for n in (QFilterConfig().interval, 1)
            )  # fmt: skip
            found.append({"device": device.name, **shape, "prompt": prompt, "one_token": one})
    return found


def _offload(path, shape, n_gpu_layers, params) -> str:
    """Where the layers are, as far as it is known before the model is loaded."""
    from qfllama import offload

    if not offload.devices():
        return "there is no GPU: everything runs on the CPU"
    n_cells = QFilterConfig.max_length
    n_cells = min(n_cells, shape.n_ctx_train or n_cells)
    cache = offload.Cache(n_cells, params.type_k, params.type_v)
    choice = offload.choose(path, n_gpu_layers, [cache])
    if choice.auto:
        return f"{choice.n_layers} of {choice.total} layers on the GPU, the others on the CPU"
    return "all on the GPU" if choice.n_layers < 0 else f"the last {choice.n_layers} on the GPU"
