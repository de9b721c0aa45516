"""Checkpoint -> GGUF with upstream's converter, GGUF -> smaller GGUF with llama.cpp's quantizer.

Both run in their own process: Ctrl-C stops them at once, and if they abort, this program goes on.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .. import gguf_header
from ..config import QFilterError

OUT_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
FLOAT_TYPES = {0: "F32", 1: "F16", 30: "BF16"}


def converter_path() -> Path:
    """Upstream's convert_hf_to_gguf.py, which the patched llama-cpp-python carries."""
    package = importlib.util.find_spec("llama_cpp")
    if package is not None:
        path = Path(package.origin).parent / "converter" / "convert_hf_to_gguf.py"
        if path.is_file():
            return path
    raise QFilterError(
        "llama-cpp-python here has no converter for checkpoints; install the "
        "patched one with `pip install ./patches`"
    )


def checkpoint_to_gguf(folder, out, outtype="auto", progress=None) -> None:
    """Write the Hugging Face checkpoint in `folder` as the GGUF file `out`.

    progress: called with the size of `out` so far, in bytes. QFilterError with upstream's last
    line if its converter fails."""
    script = converter_path()
    # absolute: a name that starts with a dash would be taken for an option
    src, dst = (str(Path(path).absolute()) for path in (folder, out))
    command = [sys.executable, str(script), src, "--outfile", dst, "--outtype", outtype]
    _run(command, out, f"llama.cpp's converter cannot convert {folder}", progress)


def quantization(name: str) -> int:
    """llama.cpp's number (LLAMA_FTYPE_*) of a quantization such as Q4_K_M."""
    types = quantizations()
    if name.upper() not in types:
        raise QFilterError(
            f"unknown quantization {name}; --quantize takes one of " + ", ".join(types)
        )
    return types[name.upper()]


def quantizations() -> dict[str, int]:
    """All quantizations the installed llama.cpp knows, by name."""
    import llama_cpp

    prefix = "LLAMA_FTYPE_MOSTLY_"
    return {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32} | {
        key.removeprefix(prefix): value
        for key, value in vars(llama_cpp).items()
        if key.startswith(prefix)
    }


def needs_quantizing(gguf, name: str) -> bool:
    """Must the GGUF file be rewritten to become of type `name`?

    QFilterError if it has another quantization: quantizing twice loses more than it seems."""
    headers = [gguf_header.scan(part) for part in gguf_header.parts(gguf)]
    if headers[0].get("general.file_type") == quantization(name):
        return False
    if any(t.type not in FLOAT_TYPES for header in headers for t in header.tensors):
        raise QFilterError(
            f"{gguf} is quantized already; --quantize {name} needs a file in "
            f"{', '.join(FLOAT_TYPES.values())}, or leave --quantize out"
        )
    return True


def quantize(src, dst, name: str, progress=None) -> None:
    """Write the GGUF file `src` as `dst`, quantized to `name`. progress: as checkpoint_to_gguf."""
    command = [sys.executable, "-c", _QUANTIZE, str(src), str(dst), str(quantization(name))]
    _run(command, dst, f"llama.cpp cannot quantize {src} to {name}", progress)


_QUANTIZE = """
import ctypes, os, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
src, dst = map(os.fsencode, sys.argv[1:3])
sys.exit(llama_cpp.llama_model_quantize(src, dst, ctypes.byref(params)) and 1)
"""


def _run(command, out, failure, progress):
    """Run a process that writes the file `out`; end it when this one is interrupted."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if progress and Path(out).exists():
                    progress(Path(out).stat().st_size)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode != 0 or not Path(out).is_file():
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            cause = lines[-1] if lines else f"exit code {process.returncode}"
            raise QFilterError(f"{failure}: {cause}")
