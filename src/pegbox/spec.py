"""What a run is: model + data + recipe + training + evaluation + seed. `run.yaml` holds one, and reproduces it.

Every value has one home: the rate is `recipe.optim.lr`, the seed is `seed`; a second one is refused with the right key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pegbox.engine.settings import TrainSettings
from pegbox.errors import BadInput
from pegbox.parts.component import explain
from pegbox.recipe import Recipe

__all__ = ["DataSettings", "EvalSettings", "RunSpec"]

LENGTHS = ("epochs", "steps", "tokens")  # how long a stage trains: exactly one is given
BOUNDS = ("min_steps", "max_steps")


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class DataSettings(_Block):
    """Which rows, and how they become tokens.

    Args:
        train, validation, test: sources: a path, a hub id, the built-in `network`, or {"source", "weight", ...} blocks.
        validation_split, test_split: fractions taken from `train` by row hash where no source is given.
        limit: use at most so many rows of each set (after the split, by row hash order).
    """

    train: list[Any] = Field(default_factory=list)
    validation: list[Any] = Field(default_factory=list)
    test: list[Any] = Field(default_factory=list)
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.05
    test_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    format: str = "auto"
    map: dict[str, str] = Field(default_factory=dict)
    template: str | None = None
    train_on: Literal["assistant", "last", "all"] = "assistant"
    max_length: Annotated[int, Field(ge=8)] = 1024
    packing: bool = False
    group: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [] if value is None else [value]


class EvalSettings(_Block):
    """What is measured before and after.

    Args:
        suites: "target" (the test rows, or the validation rows where there are none), "retention", "retention-real",
            "lm-eval:TASK".
        metric: the target's metric: a kind, a block, or "file.py:function"; default: what suits the rows.
        limit: at most so many target rows.
    """

    suites: list[str] = Field(default_factory=lambda: ["target", "retention"])
    metric: str | dict[str, Any] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    batch: Annotated[int, Field(ge=1)] = 16
    limit: Annotated[int, Field(ge=1)] | None = None


class RunSpec(_Block):
    """One run, whole. `Recipe` is held resolved."""

    recipe: Recipe
    model: str
    rows: DataSettings = DataSettings()
    train: dict[str, Any] = Field(default_factory=lambda: {"epochs": 1})
    evaluation: EvalSettings = EvalSettings()
    init_from: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16", "nf4"] = "auto"
    device: str = "auto"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    trust_remote_code: bool = False

    @field_validator("train")
    @classmethod
    def _settings(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in ("seed", "precision", "device"):
            if key in given:
                raise BadInput(f"train.{key} has its home elsewhere: give it as {key}.")
        return _train_settings(given).model_dump(mode="json", exclude={"seed", "precision", "device"})

    def settings(self, **changes: Any) -> TrainSettings:
        """The engine's settings of a stage: `train`, with a stage's own values and the run's seed laid over them."""
        merged = {**self.train, **changes}
        if any(merged.get(k) is not None for k in LENGTHS if k in changes):
            merged = {k: v for k, v in merged.items() if k not in LENGTHS or k in changes}
        if changes.get("steps") is not None:  # a stage that says its steps is not bounded by the run's bounds
            merged = {k: v for k, v in merged.items() if k not in BOUNDS or k in changes}
        return _train_settings({**merged, "seed": self.seed})

    @classmethod
    def of(cls, mapping: Mapping[str, Any], where: str = "") -> RunSpec:
        """Validate a plain mapping (of `run.yaml`, or built from the command line). Raises `BadInput`."""
        block = dict(mapping)
        if isinstance(block.get("recipe"), Mapping):
            block["recipe"] = Recipe.of(block["recipe"], "recipe")
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            raise explain(error, cls, where) from None

    def plain(self) -> dict[str, Any]:
        """Plain JSON values that `of` reads back."""
        return self.model_dump(mode="json")

    def changed(self, other: RunSpec) -> list[str]:
        """Dotted keys whose values differ, with both values: "train.steps: 10 -> 20"."""
        return _differences(self.plain(), other.plain())

    def digest(self) -> str:
        """12 hex digits over everything."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:12]


def _train_settings(given: Mapping[str, Any]) -> TrainSettings:
    block = {k: v for k, v in given.items() if k in TrainSettings.model_fields}
    others = {k: v for k, v in given.items() if k not in block}  # fields of TrainingArguments
    if others:
        block["train"] = {**(block.get("train") or {}), **others}
    if all(block.get(k) is None for k in LENGTHS):
        block["epochs"] = 1
    try:
        return TrainSettings.model_validate(block)
    except ValidationError as error:
        raise explain(error, TrainSettings, "train") from None


def _differences(left: Any, right: Any, path: str = "") -> list[str]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = sorted({*left, *right})
        return [d for k in keys for d in _differences(left.get(k), right.get(k), f"{path}.{k}".lstrip("."))]
    return [] if left == right else [f"{path}: {left!r} -> {right!r}"]
