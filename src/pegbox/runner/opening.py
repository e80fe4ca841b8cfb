"""Opening models: the bare base, and what a stage or a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from pegbox.models import Source
from pegbox.recipe import Recipe
from pegbox.spec import RunSpec

__all__ = ["Opened", "open_artefact", "open_base", "precision_of"]


class Opened(NamedTuple):
    """A model, its tokenizer, and the artefact folder it came from (None: the bare base)."""

    model: nn.Module
    tokenizer: Any
    artefact: Path | None = None


def precision_of(spec: RunSpec) -> str:
    """The base's precision with `auto` resolved: fp32 on a CPU, bf16 on a GPU."""
    from pegbox.models import pick_device

    if spec.precision != "auto":
        return spec.precision
    return "fp32" if pick_device(spec.device).type == "cpu" else "bf16"


def open_base(spec: RunSpec, recipe: Recipe, source: Source, *, labels: int = 0, prepared: bool = True) -> Opened:
    """The base in the run's precision; with `prepared`, preparations that act while loading are in effect."""
    options: dict[str, Any] = {"device": spec.device, "precision": precision_of(spec)}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    options["trust_remote_code"] = spec.trust_remote_code
    arguments = loading_arguments(recipe) if prepared else {}
    if arguments:
        options["model_kwargs"] = arguments
    if labels:
        options["labels"] = labels
    model, tokenizer = recipe.task.load(source, **options)
    return Opened(model, _speaking(tokenizer, spec, recipe))


def open_artefact(spec: RunSpec, folder: Path, *, trainable: bool = False) -> Opened:
    """A stage's or a run's tuned model."""
    from pegbox.artefact import load_artefact

    model, tokenizer = load_artefact(
        folder,
        device=spec.device,
        precision=precision_of(spec),  # type: ignore[arg-type]
        trainable=trainable,
        attn_implementation=None if spec.attention == "auto" else spec.attention,
        trust_remote_code=spec.trust_remote_code,
    )
    return Opened(model, tokenizer, folder)


def loading_arguments(recipe: Recipe) -> dict[str, Any]:
    """What the recipe's preparations ask of `from_pretrained`."""
    merged: dict[str, Any] = {}
    for preparation in recipe.prepare:
        merged |= dict(preparation.load_kwargs())
    return merged


def _speaking(tokenizer: Any, spec: RunSpec, recipe: Recipe) -> Any:
    """The tokenizer with the run's chat template as its own, so that training, generation and the artefact agree."""
    if tokenizer is None or not recipe.task.causal:
        return tokenizer
    from pegbox.data.templates import resolve_template

    resolve_template(tokenizer, spec.rows.template).install()
    return tokenizer
