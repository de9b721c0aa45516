"""The policies: how each scores cached keys, and which vectors of the file it needs.

The table is the engine's, written out here so that `--help` needs no engine; `native` compares the
two when the engine is loaded.
"""

from __future__ import annotations

from typing import NamedTuple


class Policy(NamedTuple):
    """One way to score cached keys.

    Attributes:
        name: as in `QFilterConfig.policy` and `--policy`.
        number: its place in `enum llama_qfilter_policy`.
        needs: kinds of vectors it can work with ("filters", "queries", "moments"), the best
            first; it takes the first kind that the file has. Empty: it needs none.
        learned: does it need learned filters, too?
    """

    name: str
    number: int
    needs: tuple[str, ...] = ()
    learned: bool = False

    def takes(self, kinds) -> list[str]:
        """Which of these kinds of vectors it takes; [] if they are not enough."""
        found = [kind for kind in self.needs if kind in kinds][:1]
        if self.learned:
            return [*found, "learned"] if found and "learned" in kinds else []
        return found

    def works_with(self, kinds) -> bool:
        """Do these kinds of vectors have all that it needs?"""
        return not self.needs or bool(self.takes(kinds))


TABLE = (
    Policy("qfilters", 0, ("filters",)),
    Policy("knorm", 1),
    Policy("streaming", 2),
    Policy("keydiff", 3),
    Policy("random", 4),
    Policy("qfilters2", 5, ("moments",)),
    Policy("qblend", 6, ("queries", "filters")),
    Policy("kvdiff", 7),
    Policy("qahead", 8, ("queries",)),
    Policy("learned", 9, ("queries", "filters"), learned=True),
)
NAMES = tuple(policy.name for policy in TABLE)
CALIBRATED = tuple(policy.name for policy in TABLE if policy.needs)
"""Policies that need what `qfllama convert` puts into the file."""
BY_NAME = {policy.name: policy for policy in TABLE}
