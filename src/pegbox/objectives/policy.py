"""`grpo`: rewards of the model's own answers, relative to the other answers to the same prompt.

    A_i = (R_i - mean(R)) / std(R);   loss = -mean min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta k3(ref)

Paper: arXiv:2402.03300; computed by TRL's GRPO trainer. The reward is a checker of the task or a metric, by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pegbox.objectives.base import OBJECTIVE
from pegbox.objectives.hosted import Hosted

__all__ = ["Grpo"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


@OBJECTIVE.register
class Grpo(Hosted):
    """Group relative policy optimization, arXiv:2402.03300: advantages within a group of answers to one prompt.

    Args:
        reward: whose verdict is the reward: "task" (the task's own checker), or a metric's name.
        num_generations: answers per prompt, the group.
        beta: factor of the KL to the reference; 0 runs no reference.
        epsilon: the ratio's clip range.
        num_iterations: updates per generated batch.
        loss_type: how tokens are averaged, by TRL's name.
        scale_rewards: whether advantages are divided by the group's or batch's deviation.
        max_completion_length, temperature, top_p: of the answers drawn.
    """

    host: ClassVar[Any] = "policy"
    reproduces: ClassVar[str] = "arXiv:2402.03300"

    kind: Literal["grpo"] = "grpo"
    reward: str = "task"
    num_generations: Annotated[int, Field(ge=2)] = 8
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    epsilon: Positive = 0.2
    num_iterations: Count = 1
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    max_completion_length: Count = 256
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def options(self) -> dict[str, Any]:
        """Fields of `trl.GRPOConfig`."""
        return self.model_dump(exclude={"kind", "reward"})
