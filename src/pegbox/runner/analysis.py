"""Analyses in a run: the models they look at are opened on first use, one subject after another.

A subject is a stage's end, or a model that the recipe names by role (a run, or any model). Where a tuned model is one
adapter over the bare base, base and tuned model share their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.artefact import artefact_folder, read, settle
from pegbox.artefact.load import read_parts
from pegbox.artefact.pool import stands_on_its_base
from pegbox.errors import BadInput
from pegbox.models import resolve
from pegbox.parts.adapters import is_adapted
from pegbox.parts.findings import Finding
from pegbox.parts.pairs import ModelPair
from pegbox.parts.results import Measurement
from pegbox.parts.task import Task
from pegbox.parts.view import Batch
from pegbox.prepare.base import PREPARE
from pegbox.recipe import Recipe
from pegbox.runner.data import RunData
from pegbox.runner.opening import Opened, open_artefact, open_base
from pegbox.runner.suites import Suites
from pegbox.spec import DataSettings, RunSpec

__all__ = ["LiveSubject", "analyze"]


class LiveSubject:
    """See `pegbox.analyze.base.Subject`.

    Args:
        artefact: the tuned model's artefact folder. model: or a plain model's name, where it is none.
    """

    def __init__(
        self,
        spec: RunSpec,
        data: RunData,
        measuring: Suites,
        source: Any,
        *,
        name: str,
        folder: Path,
        artefact: Path | None = None,
        model: str | None = None,
    ):
        self.spec, self.data, self.measuring, self.source = spec, data, measuring, source
        self.name, self.folder, self.seed = name, folder, spec.seed
        self.task: Task = spec.recipe.task
        self.artefact, self.model = artefact, model
        self._tuned: Opened | None = None
        self._base: Opened | None = None
        self._plain: Opened | None = None  # handed out by `weights`

    # ---- models

    @property
    def tokenizer(self) -> Any:
        return self._any().tokenizer

    @property
    def recipe(self) -> Recipe:
        return self.spec.recipe

    def opened(self) -> nn.Module:
        return self.tuned().model

    def _any(self) -> Opened:
        """Whatever is open already: all of them speak the same tokens, on one device."""
        return self._plain or self._tuned or self._base or self.tuned()

    def tuned(self) -> Opened:
        """The tuned model as it stands."""
        if self._tuned is None:
            if self.artefact is not None:
                self._tuned = open_artefact(self.spec, self.artefact)
            else:
                assert self.model is not None
                other = resolve(self.model)
                self._tuned = open_base(self.spec, self.spec.recipe, other, labels=self._labels, prepared=False)
        return self._tuned

    def base(self) -> Opened:
        """What tuning began from: the bare base, under preparations that leave it whole (channels in a new order)."""
        if self._base is None:
            bare = open_base(self.spec, self.spec.recipe, self.source, labels=self._labels, prepared=False)
            self._base = bare._replace(model=self._prepared(bare.model))
        return self._base

    def _prepared(self, model: nn.Module) -> nn.Module:
        if self.artefact is None:
            return model
        manifest = read(self.artefact, verify=False)
        parts = [part for part in manifest.parts if part.axis == "prepare"]
        if not parts or any(type(PREPARE.validate(part.component)).leaves_factors for part in parts):
            return model
        return read_parts(model, manifest.model_copy(update={"parts": parts}), self.artefact)

    @property
    def _labels(self) -> int:
        return len(self.data.labels)

    def pair(self) -> ModelPair:
        tuned = self.tuned()
        if self.artefact is not None and is_adapted(tuned.model) and stands_on_its_base(str(self.artefact)):
            return ModelPair(tuned.model)
        base = self.base()
        both = (tuned.tokenizer, base.tokenizer) if tuned.tokenizer is not None and base.tokenizer is not None else None
        return ModelPair(tuned.model, base.model, both)

    def weights(self) -> tuple[nn.Module, Mapping[str, Tensor], Mapping[str, Tensor]]:
        tuned = _state(settle(self.tuned().model))
        self._tuned = None  # its adapter is gone; opened anew if it is asked for
        self._plain, self._base = self.base(), None
        model = self._plain.model
        return model, {name: tensor.clone() for name, tensor in _state(model).items()}, tuned

    # ---- rows

    def rows(self, source: Any = None) -> list[Any]:
        data = self.data if source is None else self._other(source)
        if not data.target:
            raise BadInput("The analysis needs rows to look at. Give --data: a file, a hub id, or 'network'.")
        return data.target[: self.spec.evaluation.limit]

    def batches(self, rows: Sequence[Any], size: int = 8) -> Iterator[Batch]:
        opened = self._any()
        examples = list(self.data.encode(list(rows), self.task, opened.tokenizer))
        collate = self.task.collator(opened.tokenizer)
        device = next(opened.model.parameters()).device
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size])
            yield {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}

    def define(self, suite: str, source: Any) -> None:
        self.measuring.define(suite, self._other(source))

    def measure(self, model: nn.Module, suite: str, *, generating: bool = True) -> Measurement:
        recipe = self.spec.recipe
        return self.measuring.measure(model, self._any().tokenizer, recipe, suite, generating=generating)

    def _other(self, source: Any) -> RunData:
        given = source if isinstance(source, list) else [source]
        settings = {**self.spec.rows.model_dump(), "train": [], "validation": [], "test": given}
        return RunData(DataSettings.model_validate(settings))


def analyze(
    spec: RunSpec, data: RunData, measuring: Suites, source: Any, folder: Path, artefact: tuple[str, Path] | None
) -> list[Finding]:
    """Every analysis of the recipe on every subject; what one opened is freed before the next is opened.

    Args:
        artefact: (name, folder) of the one tuned model; None: the recipe's roles.
    """
    recipe = spec.recipe
    if recipe.analyze and any(type(a).needs_rows for a in recipe.analyze) and not data.target:
        raise BadInput("These analyses look at rows, and there are none. Give --data (or rows.test).")
    found = []
    for name, place in [artefact] if artefact is not None else _roles(recipe):
        given = {"artefact": place} if isinstance(place, Path) else {"model": place}
        for number, analysis in enumerate(recipe.analyze):
            subject = LiveSubject(
                spec, data, measuring, source, name=name, folder=folder / f"{number}-{analysis.kind}", **given
            )
            finding = analysis.run(subject)
            found.append(finding.model_copy(update={"subject": name}))
            del subject
    return found


def _roles(recipe: Recipe) -> list[tuple[str, Path | str]]:
    """(name, artefact folder or plain model) of each role. Raises `BadInput` where there is none."""
    if not recipe.models:
        raise BadInput("No tuned model to look at. Name one by role: models.tuned=runs/a (a run, or any model).")
    found: list[tuple[str, Path | str]] = []
    for role, wanted in recipe.models.items():
        path = Path(wanted.of)
        if (path / "artefact.json").is_file() or (path / "artefact").is_dir() or (path / "run.yaml").is_file():
            try:
                found.append((path.name or role, artefact_folder(wanted.of)))
            except BadInput as error:
                raise BadInput(f"models.{role}: {error}") from error
        else:
            found.append((role, wanted.of))
    return found


@torch.no_grad()
def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
