"""Text on its way to a terminal."""

from __future__ import annotations

import unicodedata

OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control, format (direction, among others), lone surrogates, line ends."""
JOINERS = "\u200c\u200d"


def escaped(text, limit: int | None = 300, *, lines: bool = False) -> str:
    """`text` with escapes in place of all characters that a terminal would obey.

    Models and authors of files choose texts and names freely. On a terminal these must not move the
    cursor, set the title, turn the direction of writing or answer for the user.
    Joiners stay, although they are invisible: Persian and emoji need them.

    Args:
        limit: the rest of a longer text is shown as "..."; None: no limit.
        lines: line ends and tabs stay, too; for answers and messages.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = text[:limit] + "..."
    kept = JOINERS + "\n\t" if lines else JOINERS
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode("ascii")
        if unicodedata.category(c) in OBEYED and c not in kept
        else c
        for c in text
    )
