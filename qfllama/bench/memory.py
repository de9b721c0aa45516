"""Memory of this process and of this machine, as far as the system tells."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

MIB = 1 << 20


def resident_bytes(field: str = "RssAnon") -> int | None:
    """Memory of this process without mapped files; `VmRSS`: with the mapped weights. None where the
    system doesn't tell (only Linux does)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def give_back_freed() -> None:
    """Give freed memory back to the system, so that new allocations count as growth. glibc only."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
