"""`dpo`: direct preference optimization on pairs, computed by TRL's DPO trainer.

    loss = -log sigmoid(beta (log pi/ref (chosen) - log pi/ref (rejected)))        (loss_type "sigmoid")

Paper: arXiv:2305.18290. Needs preference rows and a tuner whose base can be had back, or a second copy.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pegbox.errors import BadInput
from pegbox.objectives.base import OBJECTIVE
from pegbox.objectives.hosted import Hosted

__all__ = ["Dpo"]


@OBJECTIVE.register
class Dpo(Hosted):
    """Direct preference optimization, arXiv:2305.18290: -log sigmoid(beta (chosen - rejected log-ratio)).

    Args:
        beta: how strongly the reference holds the policy.
        loss_type: TRL's name of the variant.
        label_smoothing: the assumed share of flipped pairs (`robust`, `exo_pair` and `aot` only).
        max_length: tokens of prompt and answer; None keeps all.
    """

    host: ClassVar[Any] = "preference"
    reproduces: ClassVar[str] = "arXiv:2305.18290"

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    loss_type: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "apo_zero",
        "apo_down",
    ] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    max_length: Annotated[int, Field(ge=1)] | None = 1024

    def model_post_init(self, context: Any, /) -> None:
        if self.label_smoothing > 0 and self.loss_type not in {"robust", "exo_pair", "aot"}:
            raise BadInput(
                f"objective.label_smoothing has no meaning for loss_type '{self.loss_type}'. Set it to 0, or take "
                "loss_type robust, exo_pair or aot."
            )
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            raise BadInput("loss_type 'exo_pair' needs objective.label_smoothing above 0, e.g. 0.001.")

    def options(self) -> dict[str, Any]:
        """Fields of `trl.DPOConfig`."""
        return {
            "beta": self.beta,
            "loss_type": [self.loss_type],
            "label_smoothing": self.label_smoothing,
            "max_length": self.max_length,
        }
