"""Learning-rate schedules as pure functions: the multiplier of the peak rate after t finished steps of S.

    linear                t <= w: t / w;  then m + (1 - m) (S - t) / (S - w)
    cosine                t <= w: t / w;  then m + (1 - m) (1 + cos(pi (t - w) / (S - w))) / 2
    cosine_floor_linear   t <= w: t / w;  then cosine down to the floor m at step c = 0.6 S;  then m (S - t) / (S - c)

The last one is the schedule of the MetaMath and MAmmoTH runs of Masked Thought (arXiv:2403.02178). Whoever builds a
`LambdaLR` passes the result of `factor`. Nothing here knows an optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pegbox.errors import BadInput, did_you_mean

__all__ = ["SCHEDULES", "constant", "cosine", "cosine_floor_linear", "factor", "linear", "warmup_steps"]


def warmup_steps(total: int, fraction: float) -> int:
    """The number of warm-up steps that `fraction` of `total` means, rounded up as transformers does."""
    return math.ceil(total * fraction - 1e-9)


def _ramp(step: int, warmup: int) -> float | None:
    """t / w inside the warm-up, None behind it."""
    return step / warmup if step < warmup else None


def constant(step: int, total: int, warmup: int = 0) -> float:
    """1 after the warm-up."""
    ramp = _ramp(step, warmup)
    return 1.0 if ramp is None else ramp


def linear(step: int, total: int, warmup: int = 0, *, floor: float = 0.0) -> float:
    """From 1 at the end of the warm-up straight to `floor` at `total`."""
    ramp = _ramp(step, warmup)
    return floor + (1 - floor) * max(0.0, (total - step) / max(1, total - warmup)) if ramp is None else ramp


def cosine(step: int, total: int, warmup: int = 0, *, floor: float = 0.0) -> float:
    """Half a cosine from 1 at the end of the warm-up to `floor` at `total`."""
    ramp = _ramp(step, warmup)
    if ramp is not None:
        return ramp
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_floor_linear(
    step: int,
    total: int,
    warmup: int = 0,
    *,
    decay_ratio: float = 0.6,
    floor: float = 0.05,
    tail: bool = True,
) -> float:
    """Cosine from 1 to `floor` at `decay_ratio * total`, then linear to 0 (or flat at the floor without `tail`).

    A warm-up longer than `decay_ratio * total` leaves no room for the cosine: the rate goes from 1 to the floor there.
    """
    ramp = _ramp(step, warmup)
    if ramp is not None:
        return ramp
    corner = decay_ratio * total
    if step <= corner:
        progress = (step - warmup) / (corner - warmup) if corner > warmup else 1.0
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor * max(0.0, (total - step) / (total - corner)) if tail else floor


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "cosine": cosine,
    "cosine_floor_linear": cosine_floor_linear,
    "linear": linear,
}


def factor(name: str, total: int, warmup: int | float = 0, **options: float | bool) -> Callable[[int], float]:
    """The multiplier of the peak rate as a function of finished steps.

    Args:
        name: a key of `SCHEDULES`.
        total: optimizer steps of the whole training, S.
        warmup: warm-up steps (int), or their fraction of `total` (float below 1).
        options: further arguments of that schedule, e.g. `floor=0.05`.

    Raises:
        BadInput: an unknown name; a negative warm-up; a warm-up that leaves no step at the peak.
    """
    if name not in SCHEDULES:
        raise BadInput(f"Unknown learning-rate schedule '{name}'.{did_you_mean(name, SCHEDULES)}")
    ramp = warmup_steps(total, warmup) if isinstance(warmup, float) and warmup < 1 else int(warmup)
    if warmup < 0 or (total > 0 and ramp > total):
        raise BadInput(f"warmup: {warmup} of {total} steps can't be; give 0 to {total} steps, or a fraction below 1.")
    schedule = SCHEDULES[name]
    return lambda step: schedule(step, total, ramp, **options)
