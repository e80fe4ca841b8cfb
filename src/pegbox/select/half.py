"""Half fine-tuning: in each round a balanced random half of the matrices trains, the other half keeps its value.

    v_t = v_{t-1} - eta * grad_v L(theta_{t-1}),   psi_t = psi_{t-1},   theta = {v, psi} drawn anew per round

"HFT: Half Fine-Tuning for Large Language Models" (arXiv:2404.18466). A round is a stage, a task, or (with a schedule)
a number of steps. Composes with any objective and optimizer over the full tuner. Where matrices differ in size (grouped
queries) half of the matrices is not half of the parameters: `balance: params` picks the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import seed_of
from pegbox.parts.draws import Balance, Level, as_allocation, draw, items_of
from pegbox.select.base import SELECT, Schedule, Selector

__all__ = ["Half"]


@SELECT.register
class Half(Selector):
    """A balanced random share of the matrices.

    Args:
        level: "category": half of the attention, half of the MLP matrices and one of two norms in every block (the
            method); "layer": half of a block's matrices whatever they are; "model": half of all; "params": as
            category, balanced by parameters.
        ratio: the share that trains, in (0, 1].
        balance: "count" matrices, or "params".
        categories: what is drawn. Blocks' matrices of other categories follow `always_on`.
        always_on: words for modules that train in every round. Default: everything that is not drawn (embeddings,
            head, final norm). An empty list freezes all that.
        slices: draw the parts of fused matrices (qkv, gate-up) separately.
        seed: of the draw; default: the run's. round: which round of this seed.
        schedule: draw again every so many steps.
    """

    kind: Literal["half"] = "half"
    level: Literal["category", "layer", "model", "params"] = "category"
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    balance: Balance = "count"
    categories: tuple[Literal["attention", "mlp", "mixer", "norm"], ...] = ("attention", "mlp", "norm")
    always_on: tuple[str, ...] | None = None
    slices: bool = False
    seed: int | None = None
    round: Annotated[int, Field(ge=0)] = 0
    schedule: Schedule = Schedule()

    reproduces: ClassVar[str] = "arXiv:2404.18466"
    produces: ClassVar[frozenset[str]] = frozenset({"whole"})
    moves: ClassVar[Literal["never", "slots", "set"]] = "set"
    needs_weights: ClassVar[bool] = False
    picks_vectors: ClassVar[bool] = True

    def model_post_init(self, context: Any, /) -> None:
        if self.seed is not None and self.schedule.every is not None:
            raise BadInput(
                "select.seed fixes one draw per round, and select.schedule.every asks for a new one while training. "
                "Leave out one of them."
            )

    def select(
        self,
        anatomy: Anatomy,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        allocation = self._draw(anatomy, generator)
        for name in allocation:
            if name in weights and not weights[name].is_floating_point():
                raise BadInput(
                    f"'{name}' is stored as {weights[name].dtype}, and a packed matrix can't train itself. Load the "
                    "base in fp32 or bf16, or leave its category out of select.categories."
                )
        return Allocation({name: choice for name, choice in allocation.items() if name in weights})

    def count(self, anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        allocation = self._draw(anatomy, torch.Generator().manual_seed(0))
        return Allocation({n: c for n, c in allocation.items() if n in shapes}).trained(shapes)

    def _draw(self, anatomy: Anatomy, generator: torch.Generator) -> Allocation:
        own = self.seed if self.seed is not None else int(torch.randint(2**62, (), generator=generator))
        stream = torch.Generator().manual_seed(seed_of(own, "half", self.round))
        items = items_of(anatomy, self.categories, self.slices)
        level: Level = "category" if self.level == "params" else self.level
        balance: Balance = "params" if self.level == "params" else self.balance
        allocation = as_allocation(draw(items, level, self.ratio, balance, stream))
        drawn = {name for item in items for name in item.parameters}
        for name in self._always_on(anatomy, drawn):
            allocation[name] = Whole()
        if not allocation:
            raise BadInput("No tensor would train: raise select.ratio or name modules in select.always_on.")
        return allocation

    def _always_on(self, anatomy: Anatomy, drawn: set[str]) -> list[str]:
        if self.always_on is None:
            return [name for name in anatomy.parameters("all") if name not in drawn]
        return anatomy.parameters(self.always_on) if self.always_on else []
