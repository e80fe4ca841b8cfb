"""Weight operations as a stage: tuned states in, one result out, kept as full tensors over the base.

The tuned inputs are the stage's start, or where it starts from the base the recipe's roles in their order. The first
operation gets them all; each further one gets the result before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.artefact import ArtefactWriter, artefact_folder, settle
from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.recipe import Recipe
from pegbox.runner.opening import Opened, open_artefact, open_base
from pegbox.spec import RunSpec
from pegbox.tuners import TUNER

__all__ = ["apply_operations", "run_operations"]


def apply_operations(
    spec: RunSpec, recipe: Recipe, source: Any, root: Any, folder: Path, start: Path | None, labels: int = 0
) -> None:
    """Apply the recipe's operations and leave the artefact in `folder/artefact`."""
    if not recipe.weights:
        raise BadInput("An apply stage needs weight operations; add a `weights:` list to the recipe.")
    tuned = _roles(spec, recipe) if start is None else [_state(open_artefact(spec, start))]
    base = open_base(spec, recipe, source, labels=labels, prepared=False)
    result = run_operations(recipe, _state(base), tuned, Anatomy.of(base.model))
    tuner = TUNER.validate("full")
    model = tuner.attach(base.model, None, Context(base.model, seed=spec.seed, tokenizer=base.tokenizer))
    _write(model, result)
    with ArtefactWriter(folder / "artefact", root) as writer:
        writer.add_tuner(tuner, model)
        if base.tokenizer is not None:
            writer.add_tokenizer(base.tokenizer)


def run_operations(
    recipe: Recipe, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Any
) -> dict[str, Tensor]:
    """The operations in order. Raises `BadInput` where the first takes another number of tuned models."""
    wanted = type(recipe.weights[0]).tuned_models
    if wanted is not None and len(tuned) != wanted:
        raise BadInput(
            f"weights '{recipe.weights[0].kind}' takes {wanted} tuned model(s), and the recipe names {len(tuned)}. "
            "Name them by role: models: {tuned: runs/a}."
        )
    if not tuned:
        raise BadInput("No tuned model to work on. Name one by role: models: {tuned: runs/a}.")
    state: dict[str, Tensor] = {}
    for operation in recipe.weights:
        state = dict(operation.apply(base, tuned, anatomy))
        tuned = [state]
    return state


def _roles(spec: RunSpec, recipe: Recipe) -> list[Mapping[str, Tensor]]:
    states: list[Mapping[str, Tensor]] = []
    for role, wanted in recipe.models.items():
        try:
            folder = artefact_folder(wanted.of)
        except BadInput as error:
            raise BadInput(f"models.{role}: {error}") from error
        states.append(_state(open_artefact(spec, folder)))
    return states


def _state(opened: Opened) -> Mapping[str, Tensor]:
    return {name: p.detach() for name, p in settle(opened.model).named_parameters()}


@torch.no_grad()
def _write(model: nn.Module, result: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in result:
            parameter.copy_(result[name])
