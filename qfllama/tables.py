"""Tables as text."""

from __future__ import annotations


def aligned(rows: list[list[str]], n_left: int = 1) -> str:
    """Rows of cells as lines: columns two spaces apart, the first `n_left` aligned to the left, the
    others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at < n_left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
