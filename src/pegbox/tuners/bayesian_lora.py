"""LoRA with a Gaussian over the change of every weight: the prior (theta) that tasks begin from, or a task's own (phi).

    dW ~ N(s B A, (s B' A' + c)^2) entry by entry,   s = alpha / r

The tuner of ABMLL (Zhang, Snell and Griffiths, arXiv:2508.14285). Trained alone it is variational LoRA; `optim:
episodic` gives every task a posterior of its own and the terms `kl_to_prior` and `prior` tie the two. The base may be
quantized: it is not touched. Merging and exporting take the mean. `bayesian/layer.py` does the work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from pegbox.errors import BadInput, Corrupt, Unsupported
from pegbox.parts.allocation import Allocation
from pegbox.parts.context import Context
from pegbox.tuners.axis import TUNER
from pegbox.tuners.base import Tuner

__all__ = ["BayesianLora", "export_mean"]


@TUNER.register
class BayesianLora(Tuner):
    """A distribution over low-rank changes.

    Args:
        r, alpha: rank of the mean's and of the spread's pair; s = alpha / r.
        c: the spread at the start, of every entry.
        target_modules: where; linear layers.
        space: "weight" (the change is Gaussian), or "factors" (the entries of B and A are: less work in the
        divergence). draws: "local" (per output, the default in space "weight") or "weight" (one change per forward,
            the only way in space "factors").
        spread: "linear" in its product (it may cross zero; only its square matters) or "softplus" of it.
    """

    kind: Literal["bayesian_lora"] = "bayesian_lora"

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    c: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | str = ("q", "v")
    space: Literal["weight", "factors"] = "weight"
    draws: Literal["local", "weight"] | None = None
    spread: Literal["linear", "softplus"] = "linear"

    reproduces: ClassVar[str] = "arXiv:2508.14285"
    has_prior: ClassVar[bool] = True
    holds_vectors: ClassVar[bool] = False
    merge: ClassVar[Literal["exact", "lossy", "no"]] = "lossy"

    @model_validator(mode="after")
    def _fits(self) -> BayesianLora:
        if self.space == "factors" and self.draws == "local":
            raise BadInput(
                "tuner.draws: in space 'factors' the output is not Gaussian; use draws: weight, or leave it out."
            )
        if self.space == "factors" and self.spread == "softplus":
            raise BadInput("tuner.spread: in space 'factors' spreads are numbers of their own; use spread: linear.")
        return self

    def config(self, **changes: Any) -> Any:
        """The PEFT config of this block (imports PEFT)."""
        from pegbox.tuners.bayesian import BayesianLoraConfig

        draws = self.draws or ("local" if self.space == "weight" else "weight")
        options = {"r": self.r, "alpha": self.alpha, "c": self.c, "space": self.space, "spread": self.spread}
        return BayesianLoraConfig(**{**options, "draws": draws, **changes})

    def attach(self, model: nn.Module, allocation: Allocation | None, ctx: Context) -> nn.Module:
        from pegbox.tuners.peft_methods import attach_peft, task_type_of
        from pegbox.tuners.targets import peft_targets

        if allocation:
            raise Unsupported(
                f"tuner '{self.kind}' can't hold a selection of weights ({len(allocation)} tensors selected). Leave "
                f"out "
                "`select:`, and name layers by tuner.target_modules."
            )
        targets = peft_targets(model, self.target_modules)
        return attach_peft(model, self.config(target_modules=targets, task_type=task_type_of(model)))

    def reference(self, model: Any) -> AbstractContextManager[Any]:
        return model.disable_adapter()

    def save(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        from pegbox.tuners.peft_methods import save_peft

        return save_peft(model, folder)

    def load(self, model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
        from pegbox.tuners.bayesian import NAME
        from pegbox.tuners.peft_files import read_adapter_config
        from pegbox.tuners.peft_methods import load_peft

        written = str(read_adapter_config(folder).get("peft_type", "")).lower()
        if written != NAME:
            raise Corrupt(f"{folder} holds a '{written}' adapter, not a Gaussian one.")
        return load_peft(model, folder, trainable=trainable)


def export_mean(model: Any, folder: Path) -> None:
    """Write the mean as an ordinary PEFT LoRA adapter, which answers as the tuned model does in evaluation."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    from pegbox.tuners.bayesian import gaussian_layers

    name, tensors, layers = str(model.active_adapter), {}, gaussian_layers(model)
    layers = {module: layer for module, layer in layers.items() if name in layer.options}
    if not layers:
        raise BadInput("The model has no Gaussian layer whose mean could be exported.")
    for module, layer in layers.items():
        for factor in ("A", "B"):
            value = getattr(layer, f"gauss_mean_{factor}")[name]
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = value.detach().cpu().contiguous()
    config = model.peft_config[name]
    folder.mkdir(parents=True, exist_ok=True)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=sorted(layers),
        task_type=config.task_type,
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
        inference_mode=True,
    )
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
