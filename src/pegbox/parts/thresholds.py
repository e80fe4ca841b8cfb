"""One absolute threshold for many tensors: the entries whose magnitude lies below it.

    M = {|w| < theta}        theta given, or the q-quantile of |w| over all tensors together

Pure functions. A quantile holds four bytes per weight, and ties at it are left out, so that M may be a little smaller
than asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.indexsets import from_mask

__all__ = ["below", "quantile_threshold"]


def below(weight: Tensor, theta: float, *, exclude_zeros: bool = False, where: str = "a weight") -> Tensor:
    """Sorted flat positions with |w| < theta, w any shape. Raises `BadInput` for NaN or an integer tensor."""
    _check(weight, where)
    size = weight.detach().abs()
    if bool(torch.isnan(size).any()):
        raise BadInput(f"{where} has NaN entries, so its smallest can't be chosen.")
    mask = size < theta
    return from_mask(mask & (size > 0) if exclude_zeros else mask)


def quantile_threshold(weights: Mapping[str, Tensor], density: float, *, exclude_zeros: bool = False) -> float:
    """theta with floor(density * N) of the N entries of all tensors strictly below it (fewer where there are ties).

    exclude_zeros leaves exact zeros out of N. Raises `BadInput` where theta would be 0, or an entry is NaN.
    """
    total = sum(w.numel() for w in weights.values())
    wide = any(w.dtype == torch.float64 for w in weights.values())
    sizes, start = np.empty(total, np.float64 if wide else np.float32), 0
    for name, weight in weights.items():
        _check(weight, name)
        part = weight.detach().reshape(-1).abs().to("cpu", torch.float64 if wide else torch.float32).numpy()
        part = part[part > 0] if exclude_zeros else part
        if np.isnan(part.sum()) and np.isnan(part).any():
            raise BadInput(f"{name} has NaN entries, so its smallest can't be chosen.")
        sizes[start : start + part.size] = part
        start += part.size
    sizes = sizes[:start]
    count = int(density * start)
    if count >= start:
        return float("inf")
    sizes.partition(count)
    theta = float(sizes[count])
    if theta == 0:
        raise BadInput(
            f"More than {density:.3%} of the entries are exactly 0, so that none lies below the threshold. Set"
            " exclude_zeros=true, or a higher density."
        )
    return theta


def _check(weight: Tensor, where: str) -> None:
    if not weight.is_floating_point():
        raise BadInput(f"{where} is stored as {weight.dtype}; entries of a packed or integer tensor can't train.")
