"""`pegbox plan`: what each recipe trains and needs, from shapes alone, and whether that fits the machine.

The base is built on the meta device, the tuner attached there (a selection by its shape-only count), one step counted
by `parts.cost`. Weights of a packed base are counted at their packed size. Nothing is loaded but a configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from torch import nn

from pegbox.capabilities import Facts, check
from pegbox.errors import BadInput, PegboxError
from pegbox.models import resolve
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.cost import estimate
from pegbox.recipe import Recipe, load_recipe

__all__ = ["Planned", "parse_bytes", "plan_all", "plan_recipe", "table", "trained_count"]

UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "nf4": 0.52}  # NF4 with double-quantized scales, block 64


class Planned(BaseModel):
    """One recipe's counts for one optimizer step; bytes are per process. `fits` is None where no memory was given."""

    recipe: str
    trainable_parameters: int = 0
    total_parameters: int = 0
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    total_bytes: int = 0
    step_flops: int = 0
    fits: bool | None = None
    notes: list[str] = Field(default_factory=list)


def plan_all(
    recipes: Sequence[str],
    *,
    model: str,
    data: Any = None,
    batch: int = 8,
    micro_batch: int | None = None,
    max_length: int = 512,
    precision: str = "fp32",
    memory: str | None = None,
    plugins: Iterable[Path] = (),
    overrides: Iterable[str] = (),
) -> list[Planned]:
    """A row per recipe. With `data`, the longest row's length (cut at `max_length`) is what is planned for.

    Raises `BadInput` for an unknown recipe or memory that can't be read; a composition that can't be right is a row
    with its reason.
    """
    from pegbox.parts.plugins import load_plugins

    load_plugins(plugins)
    if not recipes:
        raise BadInput("Name at least one recipe to plan.")
    cap = parse_bytes(memory) if memory is not None else None
    length = _longest(data, model, max_length) if data else max_length
    rows = []
    for name in recipes:
        recipe = load_recipe(name, overrides)
        row = _planned(recipe, name, model, batch=batch, micro=micro_batch or batch, length=length, precision=precision)
        rows.append(
            row
            if cap is None or row.notes[:1] == ["refused"]
            else row.model_copy(update={"fits": row.total_bytes <= cap})
        )
    return rows


def _planned(recipe: Recipe, name: str, model: str, *, batch: int, micro: int, length: int, precision: str) -> Planned:
    try:
        check(recipe, Facts(quantized=precision == "nf4"))
        found = plan_recipe(recipe, model, batch=batch, micro_batch=micro, length=length, precision=precision)
    except PegboxError as error:
        if not type(error).__name__ == "Unsupported":
            raise
        return Planned(recipe=name, fits=False, notes=["refused", str(error)])
    return found.model_copy(update={"recipe": name})


def plan_recipe(
    recipe: Recipe,
    model: str,
    *,
    batch: int | None = None,
    micro_batch: int = 8,
    length: int = 512,
    precision: str = "fp32",
    checkpointing: bool = False,
) -> Planned:
    """Count one step of `recipe` on `model`: `batch` rows of `length` tokens, `micro_batch` at a time."""
    attached, notes = _attached(recipe, model)
    if checkpointing:
        attached.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    view = recipe.task.view(attached)
    accumulation = max(1, -(-(batch or micro_batch) // micro_batch))
    counted = estimate(attached, (micro_batch, length), view=view, step=recipe.optim, accumulation=accumulation)
    trained = counted.trainable_parameters
    frozen = counted.total_parameters - trained
    weights = int(frozen * BYTES_PER_WEIGHT[precision] + trained * 4)
    reference = _reference_bytes(recipe, counted.total_parameters, precision)
    if reference:
        notes.append("a frozen copy of the base is held for the reference")
    activations = counted.saved_bytes + counted.working_bytes
    if precision != "fp32":
        activations //= 2
        notes.append("activations taken at half of float32's")
    total = (
        weights
        + reference
        + counted.gradient_bytes
        + counted.optimizer_state_bytes
        + activations
        + counted.buffer_bytes
    )
    return Planned(
        recipe=recipe.title,
        trainable_parameters=trained,
        total_parameters=counted.total_parameters,
        weight_bytes=weights + reference,
        gradient_bytes=counted.gradient_bytes,
        optimizer_bytes=counted.optimizer_state_bytes,
        activation_bytes=activations,
        total_bytes=total,
        step_flops=counted.step_flops,
        notes=[*notes, *counted.notes],
    )


def trained_count(recipe: Recipe, model: str) -> int:
    """How many weights a recipe trains on a model."""
    attached, _ = _attached(recipe, model)
    return sum(p.numel() for p in attached.parameters() if p.requires_grad)


def _attached(recipe: Recipe, model: str) -> tuple[nn.Module, list[str]]:
    """The base on the meta device with the recipe's tuner on it."""
    base = recipe.task.load_meta(resolve(model, weights=False))
    ctx = Context(base)
    notes: list[str] = []
    tuner, selector = recipe.tuner, recipe.select
    if selector is None:
        return tuner.attach(base, None, ctx), notes
    if "select" in type(tuner).model_fields:  # the tuner counts a selection from shapes by itself
        block = selector.model_dump(mode="json")
        return tuner.model_copy(update={"select": block}).attach(base, None, ctx), notes
    if selector.needs_weights:
        notes.append(f"select '{selector.kind}' needs weights or data: counted as if every tensor trained")
        return tuner.attach(base, None, ctx), notes
    allocation = selector.select(Anatomy.of(base), dict(base.named_parameters()), None, ctx.generator("select", 0))
    return tuner.attach(base, allocation, ctx), notes


def _reference_bytes(recipe: Recipe, total: int, precision: str) -> int:
    if not recipe.objective.needs_reference:
        return 0
    return 0 if type(recipe.tuner).reference_view else int(total * BYTES_PER_WEIGHT[precision])


def _longest(data: Any, model: str, most: int) -> int:
    from pegbox.data.dataset import encode_rows, load_rows
    from pegbox.models import load_tokenizer

    encoded = encode_rows(load_rows(data).rows, load_tokenizer(model), max_length=most, overlong="drop")
    return int(encoded.report.longest)


def parse_bytes(text: str) -> int:
    """ "24GiB", "8 GB", "512MiB" -> bytes. Raises `BadInput`."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = found[2].lower().removesuffix("b") if found else ""
    factor = BINARY.get(unit) or UNITS.get(unit)
    if not found or factor is None:
        raise BadInput(f"'{text}' is not an amount of memory. Write e.g. 24GiB, 8GB or 512MiB.")
    return int(float(found[1]) * factor)


def table(rows: Sequence[Planned]) -> Any:
    """The rows as a rich table; what was assumed stands below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False)
    headings = ("recipe", "trains", "weights", "gradients", "optimizer", "activations", "total", "TFLOPs/step", "fits")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in {"recipe", "fits"} else "right")
    notes = []
    for row in rows:
        if row.notes[:1] == ["refused"]:
            shown.add_row(row.recipe, *["-"] * 7, "refused")
            notes.append(Text(f"{row.recipe}: {row.notes[1]}"))
            continue
        sizes = (row.weight_bytes, row.gradient_bytes, row.optimizer_bytes, row.activation_bytes, row.total_bytes)
        fits = {None: "", True: "yes", False: "no"}[row.fits]
        share = f"{row.trainable_parameters:,} ({row.trainable_parameters / row.total_parameters:.2%})"
        shown.add_row(row.recipe, share, *map(_size, sizes), f"{row.step_flops / 1e12:.3f}", fits)
        notes += [Text(f"{row.recipe}: {note}") for note in row.notes]
    return Group(shown, *notes)


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
