"""What a selector of whole tensors under a FLOPs budget asks for: importance per tensor, and what a step would cost.

    StepSpec(...).gather(model, batches, loss, optimizer) -> {"importance": {name: I_k}, "table": T_dy, T_dw, T_fp,
                                                             "counted": exact costs, "progress": share of training done}

The costs are traced on the first batch. Where a budget is given, only the tensors that it can reach from the loss take
part in the trial step, so that the pass costs no more than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.cost_chain import chain_costs
from pegbox.parts.cost_trace import CostTable, trace
from pegbox.parts.statistics_drop import Importance, tensor_importance

__all__ = ["StepSpec", "reachable"]

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
MakeOptimizer = Callable[[], torch.optim.Optimizer]


def reachable(table: CostTable, budget: float) -> list[str]:
    """The tensors whose gradient alone fits a backward budget: a suffix of the forward order."""
    found, cumulative = [], 0.0
    for name, through in zip(reversed(table.names), reversed(table.through)):
        cumulative += through
        if cumulative > budget:
            break
        found.append(name)
    return found[::-1]


@dataclass(frozen=True)
class StepSpec:
    """A request; see the header.

    Args:
        importance: how tensors are weighed; None: not at all (no pass but the traced forward).
        cost: "measured" (traced products) or "official" (the chain model).
        batches: how many calibration batches are averaged over.
        rho: share of full training's FLOPs that can be reached at most (limits the trial); None: everything.
    """

    importance: Importance | None = "loss_drop"
    cost: Literal["measured", "official"] = "measured"
    batches: int = 1
    rho: float | None = None

    def gather(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        loss: Loss,
        optimizer: MakeOptimizer,
        *,
        progress: float = 0.0,
        checkpointing: bool = False,
    ) -> dict[str, Any]:
        """Run the passes.

        Args:
            batches: at least one; the first is traced. loss: (model, batch) -> scalar with graph.
            optimizer: the one that will step, or a fresh one like it; asked for only where a trial is taken.
            checkpointing: the training step will recompute blocks.
        """
        chosen = [batch for batch, _ in zip(batches, range(self.batches))]
        if not chosen:
            raise BadInput("A budget of FLOPs needs at least one batch to count them on. Give training rows.")
        counted = trace(model, lambda: loss(model, chosen[0]), checkpointing=checkpointing)
        if not counted.names:
            raise BadInput("The model has no tensor that could train.")
        table = counted.table() if self.cost == "measured" else chain_costs(model, _shape(chosen[0]))
        found: dict[str, Any] = {"table": table, "counted": counted, "progress": progress}
        if self.importance is not None:
            losses = [lambda batch=batch: loss(model, batch) for batch in chosen]
            step = optimizer() if self.importance == "loss_drop" else None
            names = self._reached(table)
            found["importance"] = tensor_importance(model, losses, step, kind=self.importance, names=names)
        return found

    def _reached(self, table: CostTable) -> list[str] | None:
        if self.rho is None:
            return None
        names = reachable(table, self.rho * (table.forward + table.full) - table.forward)
        return names or list(table.names[-1:])


def _shape(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """(B, n) or (B, n in, n out) of a batch of token ids."""
    main = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(main, Tensor):
        raise BadInput("cost: official counts token sequences; this batch has no input_ids. Use cost: measured.")
    decoder = batch.get("decoder_input_ids", batch.get("labels") if "decoder_attention_mask" in batch else None)
    return (*main.shape[:2], decoder.shape[1]) if isinstance(decoder, Tensor) else tuple(main.shape[:2])
