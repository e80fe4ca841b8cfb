"""The tuner axis: our own kinds from a table, and every method of PEFT under the lower-case name of its type.

PEFT takes seconds to import, so it is imported only when a kind is asked for that is not in the table.
"""

from __future__ import annotations

from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.component import Axis
from pegbox.tuners.base import Tuner

__all__ = ["TUNER", "TunerAxis"]


class TunerAxis(Axis[Tuner]):
    """`kinds()` lists the table alone; a look-up and `all_kinds()` reach PEFT's methods too."""

    def __getitem__(self, kind: str) -> type[Tuner]:
        self.load()
        if kind in self._table:
            return self._table[kind]
        from pegbox.tuners.peft_methods import peft_kinds, peft_tuner

        if kind not in peft_kinds():
            raise BadInput(f"Unknown tuner kind '{kind}'.{did_you_mean(kind, self.all_kinds())}")
        return peft_tuner(kind)

    def all_kinds(self) -> list[str]:
        """Every kind that a look-up accepts, PEFT's methods included (imports PEFT)."""
        from pegbox.tuners.peft_methods import peft_kinds

        return sorted({*self.kinds(), *peft_kinds()})


TUNER: TunerAxis = TunerAxis("tuner", Tuner, "pegbox.tuners")
