"""Where and how a measurement ran: command, machine, versions; CPUs and free memory."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path


def provenance(threads: int) -> dict[str, str]:
    """Command, date, machine and versions of this run."""
    import llama_cpp

    import qfllama

    return {
        "command": command_line(),
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {threads} threads, {platform.system()}",
        "qfllama": qfllama.__version__,
        "llama-cpp-python": llama_cpp.__version__,
        "python": platform.python_version(),
    }


def command_line() -> str:
    """The command that runs here, as one would type it."""
    program = Path(sys.argv[0])
    ours = program.stem == "qfllama" or program.parts[-2:] == ("qfllama", "__main__.py")
    words = ["qfllama"] if ours else ["python", sys.argv[0]]
    return shlex.join([*words, *sys.argv[1:]])


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def n_threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS, or one for every CPU that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int | None:
    """Memory that this process can get, free or reclaimable, in bytes; None where the system
    doesn't tell (only Linux does)."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None
    with suppress(OSError, ValueError):  # a container's limit; "max": none
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, max(0, limit - int((group / "memory.current").read_text())))
    return free
