"""Which trained parameters are pulled by weight decay, and parameter groups made from that.

A parameter may carry its own answer: a tuner that knows better sets `param.pegbox_decay` to True or False (the 1-d
values of a sparse tuner are weights of a matrix; a learned scale is not). Without it the shape and the name decide:
tensors of two or more axes decay, vectors, scalars, norms and biases do not. That is the rule by which everybody trains
transformers, and as a predicate it also catches `model.norm.weight`, which rules by substring miss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["decays", "split_decay"]

_NEVER = re.compile(r"(^|[._])(bias|norm|layernorm|layer_norm|rmsnorm|ln|ln_\w+|norm\d+)($|[._])", re.IGNORECASE)


def decays(name: str, param: Tensor) -> bool:
    """True if weight decay pulls this parameter. `name` may be empty where it is not known."""
    own = getattr(param, "pegbox_decay", None)
    if own is not None:
        return bool(own)
    return param.ndim >= 2 and not _NEVER.search(name)


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
