"""The mathematics of simultaneous perturbation: tensors and numbers in, numbers out.

    p = (L(w + eps z) - L(w - eps z)) / (2 eps),   E[p z] = grad L + O(eps^2)

and its group-scaled forms: perturb group g by eps z / c_g, and step along c_g z (variance modified: same expectation,
other variance) or along z (expectation modified: the expectation is grad_g / c_g). MeZO, arXiv:2305.17333. It does not
evaluate or move anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import Tensor

from pegbox.errors import BadInput

__all__ = [
    "Modification",
    "expected_cosine",
    "group_norms",
    "one_sided",
    "per_tensor",
    "sample_count",
    "step_scale",
    "two_sided",
    "zeroth_order_scales",
]

Modification = Literal["variance", "expectation"]


def two_sided(plus: float, minus: float, eps: float) -> float:
    """The projected gradient from both sides; its error is of order eps^2."""
    return (plus - minus) / (2 * eps)


def one_sided(plus: float, here: float, eps: float) -> float:
    """The projected gradient from one side; its error is of order eps."""
    return (plus - here) / eps


def sample_count(schedule: Literal["constant", "linear"], most: int, step: int, total: int) -> int:
    """Directions per step: `most`, or rising linearly with the finished steps, max(1, floor(most * step / total))."""
    if schedule == "constant" or total == 0:
        return most
    return max(1, math.floor(most * step / total))


def group_norms(tensors: Mapping[str, Tensor], group_of: Mapping[str, str], per_root: bool = False) -> dict[str, float]:
    """The Euclidean norm of each group of tensors (weights, or gradients), in float64.

    `per_root` divides by sqrt(number of entries), so that groups of different size compare. (The official code divides
    the parameter norm by its own root there, which is a slip.)
    """
    squares: dict[str, float] = {}
    entries: dict[str, int] = {}
    for name, tensor in tensors.items():
        group = _group(name, group_of)
        squares[group] = squares.get(group, 0.0) + float(tensor.detach().double().square().sum())
        entries[group] = entries.get(group, 0) + tensor.numel()
    return {g: math.sqrt(s / (entries[g] if per_root else 1)) for g, s in squares.items()}


def zeroth_order_scales(projected: Callable[[str], float], groups: Iterable[str]) -> dict[str, float]:
    """c_g = |p_g|, the projected gradient when group g alone is moved: E|p_g| grows with the gradient's norm."""
    return {group: abs(projected(group)) for group in groups}


def per_tensor(scales: Mapping[str, float], group_of: Mapping[str, str], names: Iterable[str]) -> dict[str, float]:
    """c of every tensor from c of its group; 0 means "use 1". Raises `BadInput` on a group without a scale."""
    result = {}
    for name in names:
        group = _group(name, group_of)
        if group not in scales:
            raise BadInput(f"No scale for group '{group}' (of '{name}'). Groups with one: {', '.join(sorted(scales))}.")
        scale = scales[group]
        if not math.isfinite(scale) or scale < 0:
            raise BadInput(f"The scale of group '{group}' is {scale}; it must be a finite number, 0 or larger.")
        result[name] = scale if scale > 0 else 1.0
    return result


def step_scale(kind: Modification, scale: float) -> float:
    """What z is multiplied by in the step when the perturbation was z / `scale`."""
    return scale if kind == "variance" else 1.0


def expected_cosine(samples: int, size: int) -> float:
    """cos(mean of n estimates, gradient) ~ sqrt(n / (n + d + 1)) for a linear loss and Gaussian z."""
    return math.sqrt(samples / (samples + size + 1))


def _group(name: str, group_of: Mapping[str, str]) -> str:
    if name not in group_of:
        raise BadInput(f"'{name}' belongs to no group. Named tensors: {', '.join(sorted(group_of))}.")
    return group_of[name]
