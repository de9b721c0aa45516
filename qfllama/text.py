"""Text on its way to a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` with each control character but tab and newline as U+FFFD.

    A model writes what it likes and a file is called what its author likes; on a terminal that
    must not move the cursor, change the title or answer for the user.
    """
    return _CONTROL.sub("\ufffd", text)
