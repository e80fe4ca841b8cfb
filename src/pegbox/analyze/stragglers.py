"""Which layers make interpolation fail, and whether thinning out their update repairs it.

    L_l(t): the loss with layer l alone moved from theta(a) towards the tuned model by t

    lag        the smallest t at which 90 % of the drop L_l(0) - L_l(1) is reached (late: the layer lags behind)
    barrier    max_t L_l(t) - chord          sharpness   of layer l alone, at theta(a)

arXiv:2410.16476 reports that the sharpness of a few straggler layers, not of the whole model, goes with accuracy out of
distribution, and that sparsity there mitigates the failure. Its text gives no procedure that we could read, so scores
and repair here are ours: decision 0151. The loss is the task's on target rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from pegbox.analyze.apgd import Ball
from pegbox.analyze.base import ANALYZE, Analysis, Subject
from pegbox.analyze.groups import Grain, layers_of
from pegbox.analyze.path import GRID, Put, checked_grid, defined, measured, report_path, walking
from pegbox.analyze.sharpness import layerwise_sharpness, sharpness, task_loss
from pegbox.errors import BadInput
from pegbox.parts.component import AXES
from pegbox.parts.findings import Finding, Grid, Picture, Series
from pegbox.parts.generation import as_evaluated

__all__ = ["LayerScore", "Stragglers", "lag", "layer_profile", "pick_stragglers"]

By = Literal["barrier", "lag", "sharpness"]
Rule = Literal["top", "outliers"]


# ---- numbers


class LayerScore(BaseModel):
    """One layer's scores; larger: more of a straggler."""

    model_config = ConfigDict(frozen=True)
    lag: float = 0.0
    barrier: float = 0.0
    sharpness: float = 0.0


def lag(grid: Sequence[float], losses: Sequence[float], share: float = 0.9) -> float:
    """The smallest t of the grid at which `share` of the whole drop is reached; 0 where the loss does not drop."""
    drop = losses[0] - losses[-1]
    if drop <= 0:
        return 0.0
    return next(t for t, loss in zip(grid, losses, strict=True) if losses[0] - loss >= share * drop)


def pick_stragglers(
    scores: Mapping[str, LayerScore], by: By = "barrier", rule: Rule = "top", share: float = 0.1
) -> list[str]:
    """The stragglers among layers, the worst first; ties in `by` are broken by sharpness.

    Args:
        rule: "top": the largest `share` of the layers, at least one; "outliers": those above the median by more than
            twice the median absolute deviation.
    """
    if not scores:
        raise BadInput("There is no layer to choose from.")
    if not 0 < share <= 1:
        raise BadInput(f"The share of straggler layers is above 0 and at most 1, got {share}.")
    order = sorted(scores, key=lambda n: (getattr(scores[n], by), scores[n].sharpness), reverse=True)
    if rule == "top":
        return order[: max(1, round(share * len(order)))]
    values = [getattr(s, by) for s in scores.values()]
    middle = statistics.median(values)
    spread = statistics.median(abs(v - middle) for v in values)
    return [n for n in order if getattr(scores[n], by) > middle + 2 * spread]


@torch.no_grad()
def layer_profile(
    put: Put,
    loss: Callable[[], float],
    layers: Mapping[str, Sequence[str]],
    at: float,
    grid: Sequence[float],
) -> dict[str, list[float]]:
    """L_l(t) of every layer: all tensors at amount `at`, the layer's own at (1-t) at + t.

    Args:
        put: puts a model at amounts by tensor name (`path.walking`). grid: of t, from 0 to 1.
    """
    found = {}
    for layer, names in layers.items():
        curve = []
        for t in grid:
            put(dict.fromkeys(names, (1 - t) * at + t), at)
            curve.append(loss())
        found[layer] = curve
    put(at)
    return found


def excess(grid: Sequence[float], losses: Sequence[float]) -> float:
    """max_t L(t) - ((1-t) L(0) + t L(1)) over a profile."""
    return max(v - ((1 - t) * losses[0] + t * losses[-1]) for t, v in zip(grid, losses, strict=True))


# ---- the analysis


class Remedy(BaseModel):
    """Shares of the stragglers' update to set to zero; the best by validation rows is taken.

    Args:
        sparsity: shares to try. target: by size of the update, or of the tuned weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    sparsity: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = [0.5]
    target: Literal["delta", "weight"] = "delta"


@ANALYZE.register
class Stragglers(Analysis):
    """Path, sharpness of the whole and of each layer, straggler layers, and the sparsity repair.

    Args:
        at: the amount at which sharpness and profiles are taken. rho, norm, adaptive, steps, restarts: see `sharpness`.
        normalize: normalise logits before the loss; None: for classifiers. average: random moves, not the worst.
        layers: how parameters are grouped. examples, batch: target rows behind the losses.
        profile: points of t of the layers' own paths. by, rule, share: which layers are stragglers.
        grid, shifted, generate: of the path (see `path`). remedy: what to try on the stragglers; None: nothing.
        remedy_on: the suite that the remedy is chosen by.
    """

    kind: Literal["sharpness"] = "sharpness"
    at: Annotated[float, Field(ge=0, le=1)] = 0.5
    rho: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    norm: Literal["linf", "l2"] = "linf"
    adaptive: bool = True
    steps: Annotated[int, Field(ge=1)] = 20
    restarts: Annotated[int, Field(ge=1)] = 1
    average: bool = False
    normalize: bool | None = None
    layers: Grain = "block"
    examples: Annotated[int, Field(ge=1)] = 1024
    batch: Annotated[int, Field(ge=1)] = 128
    profile: list[float] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    by: By = "barrier"
    rule: Rule = "top"
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    grid: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=lambda: list(GRID))
    shifted: dict[str, Any] = Field(default_factory=dict)
    generate: bool = False
    remedy: Remedy | None = Remedy()
    remedy_on: str = "target"

    needs_rows: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2410.16476; arXiv:2302.07011"

    @field_validator("grid", "profile")
    @classmethod
    def _grid(cls, grid: list[float]) -> list[float]:
        return checked_grid(grid)

    def run(self, subject: Subject) -> Finding:
        suites = defined(subject, self.shifted)
        if self.remedy_on not in suites:
            raise BadInput(f"analyze.remedy_on: '{self.remedy_on}' is none of the suites {', '.join(suites)}.")
        model, base, tuned = subject.weights()
        model.float()
        batches = list(subject.batches(subject.rows()[: self.examples], self.batch))
        finding = Finding(kind=self.kind, title="Sharpness, straggler layers and the path", notes=[_NOTE])
        report_path(finding, self.grid, measured(subject, model, base, tuned, suites, self.grid, self.generate))
        layers = layers_of(model, self.layers)
        loss = task_loss(subject.task.view(model))
        scores = self._scores(finding, model, base, tuned, layers, loss, batches, subject)
        found = pick_stragglers(scores, self.by, self.rule, self.share)
        _report_layers(finding, scores, found)
        if self.remedy is not None and found:
            self._repair(finding, subject, model, base, tuned, {n: layers[n] for n in found}, suites)
        return finding

    def _scores(
        self,
        finding: Finding,
        model: nn.Module,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        layers: Mapping[str, list[str]],
        loss: Any,
        batches: Sequence[Any],
        subject: Subject,
    ) -> dict[str, LayerScore]:
        """Every layer's scores at `at`; the whole model's sharpness goes into the finding."""

        def mean_loss() -> float:
            with as_evaluated(model):
                return _mean_loss(model, loss, batches)

        normalize = not subject.task.causal if self.normalize is None else self.normalize
        options: dict[str, Any] = {
            "ball": Ball(self.rho, self.norm, self.adaptive), "steps": self.steps, "restarts": self.restarts,
            "mode": "average" if self.average else "worst", "normalize": normalize, "seed": subject.seed,
        }  # fmt: skip
        with walking(model, base, tuned) as put:
            profiles = layer_profile(put, mean_loss, layers, self.at, self.profile)
            put(self.at)
            whole = sharpness(model, loss, batches, **options)
            each = layerwise_sharpness(model, loss, batches, layers, **options)
        finding.numbers |= {"sharpness": whole.sharpness, "loss": whole.base_loss}
        if whole.error is not None:
            finding.numbers["error_rise"] = whole.error
        finding.pictures.append(_profiles(profiles, self.profile))
        return {
            name: LayerScore(
                lag=lag(self.profile, curve), barrier=excess(self.profile, curve), sharpness=each[name].sharpness
            )
            for name, curve in profiles.items()
        }

    def _repair(
        self,
        finding: Finding,
        subject: Subject,
        model: nn.Module,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        layers: Mapping[str, list[str]],
        suites: Sequence[str],
    ) -> None:
        """The path anew with the stragglers' update thinned out."""
        assert self.remedy is not None
        names = [name for names in layers.values() for name in names]
        curves = {}
        for share in self.remedy.sparsity:
            block = {"kind": "sparsify", "layers": names, "sparsity": share, "target": self.remedy.target}
            thinned = dict(AXES["weights"].validate(block).apply(base, [tuned], None))
            curves[share] = measured(subject, model, base, thinned, suites, self.grid, self.generate)

        def best_of(share: float) -> float:
            judged = curves[share][self.remedy_on]
            return max(s.value if s.higher_is_better else -s.value for s in judged)

        chosen = max(self.remedy.sparsity, key=best_of)
        finding.numbers["remedy_sparsity"] = chosen
        report_path(finding, self.grid, curves[chosen], label="_repaired")


_NOTE = (
    "Sharpness is the rise of the loss in a small ball around the weights at the given amount; a straggler is a layer "
    "whose own path has a barrier, lags, or is sharp."
)


def _mean_loss(model: nn.Module, loss: Any, batches: Sequence[Any]) -> float:
    """The loss of a task, each batch counting alike."""
    values = []
    for batch in batches:
        logits, targets = loss(model, batch)
        values.append(float(nn.functional.cross_entropy(logits.float(), targets)))
    return statistics.fmean(values)


def _report_layers(finding: Finding, scores: Mapping[str, LayerScore], stragglers: Sequence[str]) -> None:
    rows: list[list[Any]] = [
        [name, s.barrier, s.lag, s.sharpness, "straggler" if name in stragglers else ""] for name, s in scores.items()
    ]
    columns = ["layer", "barrier", "lag", "sharpness", ""]
    finding.tables.append(Grid(title="Layers", columns=columns, rows=rows))
    bars = Series(xs=[float(i) for i in range(len(rows))], ys=[s.sharpness for s in scores.values()])
    finding.pictures.append(
        Picture(
            key="sharpness-layers", title="Sharpness of each layer", x_label="layer, shallow to deep",
            y_label="rise of the loss", series=[bars], form="bars",
        )
    )  # fmt: skip
    finding.numbers["straggler_sharpness"] = scores[stragglers[0]].sharpness if stragglers else 0.0
    finding.details["stragglers"] = list(stragglers)


def _profiles(profiles: Mapping[str, Sequence[float]], grid: Sequence[float]) -> Picture:
    series = [
        Series(name=name if len(profiles) <= 8 else "", xs=list(grid), ys=list(c)) for name, c in profiles.items()
    ]
    return Picture(
        key="layer-profiles", title="Each layer moved alone", x_label="t, towards the tuned model", y_label="loss",
        series=series,
    )  # fmt: skip
