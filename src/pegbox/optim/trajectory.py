"""A whole training run as a few kilobytes: per step a seed, a scalar and a rate, and the weights can be had back.

    w_{t+1} = (1 - lr_t decay) w_t - lr_t * mean_i p_{t,i} z(seed_{t,i})

Replaying needs the start weights and this file, no data and no forward pass. What the noise depends on (scheme,
distribution, kind of device, names, shapes, dtypes) and how weights were restored is recorded and checked. 4 bytes for
a seed, 4 for p, 4 for the rate; p and rate take 8 each where the trained weights are float64. MeZO, arXiv:2305.17333.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.optim.perturbation import Mover, Restore, make_mover
from pegbox.parts.directions import Directions, Distribution, Scheme

__all__ = ["Header", "Trajectory", "fingerprint"]

FORMAT = 1


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and values of the trained tensors at the start."""
    total = hashlib.sha256()
    for name, param in params.items():
        total.update(json.dumps([name, list(param.shape), str(param.dtype)]).encode())
        total.update(param.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class Header:
    """All that a replay depends on besides the numbers of the steps."""

    names: tuple[str, ...]
    start: str  # fingerprint of the trained tensors before the first step
    eps: float
    scheme: Scheme
    distribution: Distribution
    restore: Restore
    sides: Literal[1, 2]
    combine: Literal["mean", "sum"]
    device: str  # kind of device that drew the noise; another kind draws other numbers
    dtypes: str  # of all trained tensors, comma separated
    decay: float = 0.0
    decayed: tuple[int, ...] = ()  # positions in `names`
    averaged: int = 1  # the result is the mean of the last so many iterates

    def directions(self) -> Directions:
        return Directions(self.scheme, self.distribution)

    def precision(self) -> torch.dtype:
        """What p and rates are rounded to, in training as in the file, so that a replay uses the same numbers."""
        return torch.float64 if "float64" in self.dtypes else torch.float32

    def shrink(self, rate: float) -> dict[str, float]:
        """By name, what decay multiplies a tensor with in one step."""
        return {self.names[i]: 1.0 - rate * self.decay for i in self.decayed} if self.decay else {}

    def moves(self, seeds: list[int], projected: list[float], rate: float) -> list[tuple[int, float]]:
        """The update of one step, as multiples of directions."""
        share = len(seeds) if self.combine == "mean" else 1
        return [(seed, -rate * p / share) for seed, p in zip(seeds, projected, strict=True)]


@dataclass
class Trajectory:
    """The steps of a run: `seeds` and `projected` over all samples of all steps, `rates` and `samples` over steps."""

    header: Header
    seeds: list[int] = field(default_factory=list)
    projected: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rates)

    def append(self, seeds: list[int], projected: list[float], rate: float) -> None:
        """One step."""
        self.seeds += seeds
        self.projected += projected
        self.rates.append(rate)
        self.samples.append(len(seeds))

    def truncate(self, steps: int) -> Trajectory:
        """The first `steps` steps alone: the weights as they were then. Raises `BadInput`."""
        if not 0 <= steps <= len(self):
            raise BadInput(f"Can't cut to {steps} steps: the trajectory has {len(self)}.")
        n = sum(self.samples[:steps])
        header = replace(self.header, averaged=max(1, min(self.header.averaged, steps)))
        return Trajectory(header, self.seeds[:n], self.projected[:n], self.rates[:steps], self.samples[:steps])

    def average(self, last: int) -> Trajectory:
        """The same steps, ending in the mean of the last `last` iterates. Raises `BadInput`."""
        if not 1 <= last <= len(self):
            raise BadInput(f"Can't average {last} iterates: the trajectory has {len(self)} steps.")
        return replace(self, header=replace(self.header, averaged=last))

    def replay(self, params: Mapping[str, nn.Parameter], *, model: nn.Module | None = None, check: bool = True) -> None:
        """Write the final weights into `params`, which hold the start weights. No data, no forward.

        Weights restored in place are replayed with their rounding, so the result is equal bit for bit on the same
        kind of device in every restore mode.

        Raises:
            WrongBase: other names, dtypes or start weights (the last not looked at with `check=False`), or tensors on
                another kind of device than the noise came from.
        """
        self._refuse_other(params, check)
        make = self._mover(params, model)
        mean: dict[str, Tensor] = {}
        for step, (seeds, projected, rate) in enumerate(self._steps()):
            mover = make()
            for seed in seeds if self.header.restore == "in_place" else []:
                mover.move(seed, +1)
                if self.header.sides == 2:
                    mover.move(seed, -1)
            mover.settle(self.header.moves(seeds, projected, rate), self.header.shrink(rate))
            if self.header.averaged > 1:
                _gather(mean, params, step - (len(self) - self.header.averaged))
        with torch.no_grad():
            for name, value in mean.items():
                params[name].copy_(value)
        if mean:
            make().settle([], {})  # tells modules that cache what they compute from their values

    def save(self, path: Path) -> None:
        """Write one safetensors file: 12 bytes a sample of a float32 run with one sample a step."""
        exact = self.header.precision()
        tensors = {
            "seeds": torch.tensor(self.seeds, dtype=torch.int64).to(torch.int32),  # below 1e9: fits
            "projected": torch.tensor(self.projected, dtype=exact),
            "rates": torch.tensor(self.rates, dtype=exact),
        }
        if any(n != 1 for n in self.samples):
            tensors["samples"] = torch.tensor(self.samples, dtype=torch.int16)
        save_file(tensors, str(path), metadata={"pegbox_trajectory": str(FORMAT), "header": _pack(asdict(self.header))})

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read what `save` wrote. Raises `Corrupt`."""
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("pegbox_trajectory") != str(FORMAT):
                    raise Corrupt(f"{path} is not a trajectory file of format {FORMAT}.")
                values = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
            return cls.from_values({**values, "header": _unpack(meta["header"])})
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, zlib.error) as error:
            raise Corrupt(
                f"{path} is not a readable trajectory ({error}). Take a complete copy of the file."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {
            "header": _pack(asdict(self.header)),
            "seeds": torch.tensor(self.seeds, dtype=torch.int64),
            "projected": torch.tensor(self.projected, dtype=torch.float64),
            "rates": torch.tensor(self.rates, dtype=torch.float64),
            "samples": torch.tensor(self.samples, dtype=torch.int64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Trajectory:
        """The trajectory that `state_dict` described."""
        values = {name: state[name].tolist() for name in ("seeds", "projected", "rates", "samples")}
        return cls.from_values({**values, "header": _unpack(state["header"])})

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Trajectory:
        """Put together and checked. Raises `ValueError`."""
        known = {f.name for f in fields(Header)}
        given = values["header"].items()
        named: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given if k in known}
        header = Header(**named)
        rates = list(values["rates"])
        samples = list(values.get("samples") or [1] * len(rates))
        if not (len(samples) == len(rates) and sum(samples) == len(values["seeds"]) == len(values["projected"])):
            raise ValueError("seeds, projected gradients, rates and samples do not fit together")
        return cls(header, list(values["seeds"]), list(values["projected"]), rates, samples)

    def _steps(self) -> list[tuple[list[int], list[float], float]]:
        steps, at = [], 0
        for rate, n in zip(self.rates, self.samples, strict=True):
            steps.append((self.seeds[at : at + n], self.projected[at : at + n], rate))
            at += n
        return steps

    def _mover(self, params: Mapping[str, nn.Parameter], model: nn.Module | None) -> Callable[[], Mover]:
        own = {name: params[name] for name in self.header.names}
        restore: Restore = "in_place"  # without moves in between it writes the update alone, as the other modes do
        return lambda: make_mover(restore, own, self.header.directions(), self.header.eps, model)

    def _refuse_other(self, params: Mapping[str, nn.Parameter], check: bool) -> None:
        header = self.header
        missing = [name for name in header.names if name not in params]
        if missing or len(params) != len(header.names):
            extra = sorted(set(params) - set(header.names))
            raise WrongBase(
                f"The trajectory moves {len(header.names)} tensors; missing here {missing[:3]}, not in it {extra[:3]}. "
                "Give it the model it was trained on, with the same tensors trainable."
            )
        own = {name: params[name] for name in header.names}
        if _dtypes(own) != header.dtypes:
            raise WrongBase(f"Trained as {header.dtypes}, given {_dtypes(own)}: load the base in that dtype.")
        kinds = {p.device.type for p in own.values()}
        if kinds != {header.device}:
            raise WrongBase(f"The noise was drawn on {header.device}; move the model there first (it is on {kinds}).")
        if check and fingerprint(own) != header.start:
            raise WrongBase(
                f"The start weights differ (recorded {header.start[:12]}, given {fingerprint(own)[:12]}). "
                "Replay on the untouched base, with the tuner initialised by the same seed."
            )


def describe(params: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `Header` that follow from the trained tensors."""
    device = next(iter(params.values())).device.type
    return {"names": tuple(params), "start": fingerprint(params), "device": device, "dtypes": _dtypes(params)}


def _dtypes(params: Mapping[str, Tensor]) -> str:
    return ",".join(sorted({str(p.dtype).removeprefix("torch.") for p in params.values()}))


@torch.no_grad()
def _gather(mean: dict[str, Tensor], params: Mapping[str, Tensor], k: int) -> None:
    """Running mean of the iterates k = 0, 1, ...; nothing for k < 0."""
    for name, param in params.items() if k >= 0 else ():
        if k == 0:
            mean[name] = param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)
        else:
            mean[name].lerp_(param.to(mean[name].dtype), 1.0 / (k + 1))


def _pack(header: dict[str, Any]) -> str:
    return base64.b85encode(zlib.compress(json.dumps(header).encode(), 9)).decode()


def _unpack(text: str) -> dict[str, Any]:
    return dict(json.loads(zlib.decompress(base64.b85decode(text))))
