"""What every benchmark says about where and how it ran."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import date
from pathlib import Path

import llama_cpp

import qfllama


def provenance(threads: int) -> dict[str, str]:
    """Command, date, machine and versions of this run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {threads} threads, {platform.system()}",
        "qfllama": qfllama.__version__,
        "llama-cpp-python": llama_cpp.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
