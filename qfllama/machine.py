"""Where and how a measurement ran: command, machine, versions; CPUs and free memory."""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


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
    affinity = hasattr(os, "sched_getaffinity")
    n = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    for group in _groups("cpu"):
        with suppress(OSError, ValueError):  # version 2; "max": as many as there are
            quota, period = (group / "cpu.max").read_text().split()
            n = min(n, math.ceil(int(quota) / int(period)))
        with suppress(OSError, ValueError):  # version 1; -1: as many as there are
            quota = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
            n = min(n, math.ceil(quota / period) if quota > 0 else n)
    return max(n, 1)


def available_bytes() -> int | None:
    """Memory that this process can get, free or reclaimable, in bytes; None where the system
    doesn't tell (only Linux does)."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None
    files = ("memory.max", "memory.current", "inactive_file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for group in _groups("memory"):
        for limit, used, reclaimable in (files, old):
            with suppress(OSError, ValueError):  # "max": no limit
                left = int((group / limit).read_text()) - int((group / used).read_text())
                words = (group / "memory.stat").read_text().split()
                # files that were read and are not in use, as Kubernetes counts
                left += int(dict(zip(words[::2], words[1::2], strict=False)).get(reclaimable, 0))
                free = min(free, max(0, left))
    return free


def _groups(controller: str) -> list[Path]:
    """The folders of this process's control groups, from its own to the root: what a container, a
    service or a job may use at most."""
    folders = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                root = CGROUPS if controllers == "" else CGROUPS / controller
                own = root / name.lstrip("/")
                folders += [own, *(path for path in own.parents if path.is_relative_to(root))]
    return folders
