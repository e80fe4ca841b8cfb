"""The PEFT method "PEGBOX_BAYESIAN_LORA": its config, and the model that puts Gaussian layers around linear ones.

Importing this module registers it. Saved are the four factors of every layer, which is theta: a task's own phi lives in
an episode only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from pegbox.errors import BadInput, did_you_mean
from pegbox.tuners.bayesian.layer import GaussianLayer
from pegbox.tuners.registration import add_peft_type, register
from pegbox.tuners.sparse.execution import base_facts
from pegbox.tuners.targets import bare_name

__all__ = ["NAME", "BayesianLoraConfig", "BayesianLoraModel", "gaussian_layers"]

KIND = "PEGBOX_BAYESIAN_LORA"
NAME = KIND.lower()
_CHOICES = {"space": ("weight", "factors"), "draws": ("local", "weight"), "spread": ("linear", "softplus")}


@dataclass
class BayesianLoraConfig(PeftConfig):
    """Gaussian low-rank changes; the options are those of `pegbox.tuners.bayesian_lora.BayesianLora`."""

    r: int = 8
    alpha: float = 16.0
    c: float = 0.02
    space: str = "weight"
    draws: str = "local"
    spread: str = "linear"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(KIND)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"bayesian_lora: {name} = {getattr(self, name)!r}.{did_you_mean('', allowed)}")
        if self.c <= 0 or self.alpha <= 0 or self.r < 1:
            raise BadInput(
                f"bayesian_lora needs c > 0, alpha > 0 and r >= 1, got c={self.c}, alpha={self.alpha}, r={self.r}."
            )
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in a fixed order."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(values["target_modules"], set):
            values["target_modules"] = sorted(values["target_modules"])
        return values


class BayesianLoraModel(BaseTuner):
    """PEFT's view of the tuner."""

    prefix: str = "gauss_"
    tuner_layer_cls = GaussianLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(  # type: ignore[override]
        self,
        config: BayesianLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, GaussianLayer):
            target.add(adapter_name, config)
            target.set_adapter(target.active_adapters)
            return
        if not _is_linear(target):
            raise BadInput(
                f"tuner.target_modules: '{current_key}' is a {type(target).__name__}, no linear layer; bayesian_lora "
                "holds distributions over matrices."
            )
        layer = GaussianLayer(target, bare_name(current_key))
        layer.add(adapter_name, config)
        layer.set_adapter(adapter_name)
        setattr(parent, target_name, layer)
        if adapter_name not in self.active_adapters:
            layer.set_adapter(self.active_adapters)


def gaussian_layers(model: nn.Module) -> dict[str, GaussianLayer]:
    """The model's Gaussian layers by the bare name of the module they wrap."""
    return {m.module_name: m for m in model.modules() if isinstance(m, GaussianLayer)}


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if weight is None or isinstance(module, nn.Embedding):
        return False
    try:
        return len(base_facts(module).shape) == 2
    except Exception:  # whatever has no matrix shape is no linear layer
        return False


register(NAME, BayesianLoraConfig, BayesianLoraModel, BayesianLoraModel.prefix)
