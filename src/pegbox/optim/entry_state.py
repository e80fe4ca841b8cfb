"""What optimizers of a sparse tuner's values share: state that carries its positions, and comes back exactly.

A values parameter stands for k entries of a tensor (`parts.parameterinfo`). The digest of their positions goes into the
state dict, and a state that belongs to other entries is refused. On loading every state tensor keeps its own dtype;
torch's loading would cast counters and float32 moments to a parameter's 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.parameterinfo import info_of

__all__ = ["EntryOptimizer", "index_digest"]


class EntryOptimizer(torch.optim.Optimizer):
    """A torch optimizer with the state dict of this file."""

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        for number, p in enumerate(self._order()):
            digest = index_digest(p)
            if digest is not None and number in packed["state"]:
                packed["state"][number] = {**packed["state"][number], "index_digest": digest}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; raises `BadInput` for the state of other entries."""
        state = {key: dict(value) for key, value in state_dict["state"].items()}
        for number, p in enumerate(self._order()):
            entry = state.get(number, {})
            saved, here = entry.pop("index_digest", None), index_digest(p)
            other = saved is not None and here is not None and int(saved) != int(here)
            if other or any(entry[k].shape != p.shape for k in ("exp_avg", "momentum") if k in entry):
                info = info_of(p)
                raise BadInput(
                    f"The optimizer's state for '{info.name if info else number}' belongs to other entries than those"
                    " that train now. Load the adapter of the same checkpoint first."
                )
        super().load_state_dict({**state_dict, "state": state})
        for number, p in enumerate(self._order()):
            for key, value in state.get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    self.state[p][key] = value.to(p.device, copy=True)

    def _order(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def index_digest(p: Tensor) -> Tensor | None:
    """A checksum of the positions that a sparse parameter stands for; None for an ordinary one."""
    info = info_of(p)
    if info is None:
        return None
    index = info.index().to("cpu", torch.int64)
    place = torch.arange(1, index.numel() + 1)
    return ((index + 1) * (place * 2654435761 % 2147483647)).sum() % (2**53)
