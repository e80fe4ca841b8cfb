"""What FLOPs are worth in electricity and carbon, by figures that the user gives.

    kWh = FLOPs / (device FLOP/s * utilisation) * watts / 3.6e6        g CO2e = kWh * carbon intensity

An estimate of the accelerator alone: no host, no cooling, no manufacture.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Energy"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Energy(BaseModel):
    """A device and its electricity.

    Args:
        flops_per_second: the device's peak. utilisation: the share of it that training reaches, in (0, 1].
        watts: drawn while training. carbon: grams of CO2e per kWh of the supply.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops_per_second: Positive
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    watts: Positive
    carbon: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def kwh(self, flops: float) -> float:
        """Kilowatt hours of so many FLOPs."""
        return flops / (self.flops_per_second * self.utilisation) * self.watts / 3.6e6

    def grams(self, flops: float) -> float:
        """Grams of CO2e of so many FLOPs."""
        return self.kwh(flops) * self.carbon
