"""Meta-learning: training over episodes, each a few rows of one task, so that a new task is learnt from a few examples.

Every step draws `tasks` tasks with rows to learn from and rows to be judged on (`data: episodes`, laid behind the
recipe's own policies); what is made of them is the step's affair (`optim: episodic`: MAML, Reptile, amortized Bayes).
How well unseen tasks are learnt is measured by the recipe's analyses (`analyze: few_shot`), on base and tuned model
alike. Zhang, Snell and Griffiths, arXiv:2508.14285; Finn et al., arXiv:1703.03400.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pegbox.errors import BadInput
from pegbox.parts.protocol import BASE, PROTOCOL, Protocol, Report, Runner
from pegbox.parts.results import Metrics
from pegbox.protocols.single import findings, measure

__all__ = ["Meta"]

Count = Annotated[int, Field(ge=1)]


@PROTOCOL.register
class Meta(Protocol):
    """Train over episodes from the base; then the recipe's suites and analyses.

    Args:
        tasks: per step. support, query: rows of each to learn from, and to be judged on (0: on the support).
        at_once: rows per forward; it must divide both. Default: as many as do.

    The batch is tasks x (support + query), whatever the run's settings say.
    """

    kind: Literal["meta"] = "meta"
    tasks: Count = 4
    support: Count = 8
    query: Annotated[int, Field(ge=0)] = 8
    at_once: Count | None = None

    analyzes: ClassVar[bool] = True
    gives_episodes: ClassVar[bool] = True

    @model_validator(mode="after")
    def _divides(self) -> Meta:
        if self.at_once is not None and (self.support % self.at_once or self.query % self.at_once):
            raise BadInput(
                f"protocol.at_once = {self.at_once} must divide support ({self.support}) and query ({self.query})."
            )
        return self

    def run(self, runner: Runner) -> Report:
        before = measure(runner, BASE)
        sizes = {"tasks": self.tasks, "support": self.support, "query": self.query}
        rows = self.at_once or math.gcd(self.support, self.query)
        settings = {"batch": self.tasks * (self.support + self.query), "micro_batch": rows}
        patch = {"settings": settings, "also": {"data": [{"kind": "episodes", **sizes}]}}
        stage = runner.stage(patch, name="train")
        extra = {"episodes": sizes, **findings(runner, stage.end)}
        return Report(Metrics(before=before, after=measure(runner, stage.end), cost=stage.cost, extra=extra), stage.end)
