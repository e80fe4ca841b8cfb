"""Which trained parameters are pulled by weight decay, and parameter groups made from that.

Tensors of two or more axes decay; vectors, scalars, norms and biases do not. That is the rule by which everybody trains
transformers, and as a predicate it also catches `model.norm.weight`, which rules by substring miss. A sparse tuner's
vector of values counts as the tensor it stands for (`parts.parameterinfo`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pegbox.parts.parameterinfo import info_of

__all__ = ["decays", "split_decay"]

_NEVER = re.compile(r"(^|[._])(bias|norm|layernorm|layer_norm|rmsnorm|ln|ln_\w+|norm\d+)($|[._])", re.IGNORECASE)


def decays(name: str, param: Tensor) -> bool:
    """True if weight decay pulls this parameter. `name` may be empty where it is not known."""
    info = info_of(param)
    axes = param.ndim if info is None else len(info.shape)
    return axes >= 2 and not _NEVER.search(name if info is None else info.name)


def split_decay(groups: Iterable[Mapping[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Split every group without a "weight_decay" of its own into a decayed and an exempt group.

    "params" may hold tensors or (name, tensor) pairs (all of a group alike, as torch wants it). Empty groups go;
    everything else in a group ("lr", an owner's name) is kept on both halves. With no decay at all nothing is split.
    """
    result: list[dict[str, Any]] = []
    for group in groups:
        group = {**group, "params": list(group["params"])}
        if "weight_decay" in group or weight_decay == 0:
            result.append({"weight_decay": weight_decay, **group})
            continue
        halves: dict[bool, list[Any]] = {True: [], False: []}
        for item in group["params"]:
            name, param = item if isinstance(item, tuple) else ("", item)
            halves[decays(name, param)].append(item)
        for decayed, members in halves.items():
            if members:
                result.append({**group, "params": members, "weight_decay": weight_decay if decayed else 0.0})
    return [group for group in result if group["params"]]
