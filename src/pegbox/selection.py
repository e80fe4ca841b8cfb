"""Where a selection's budget goes: trained weights by depth and by operation, for `pegbox select`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput

__all__ = ["by_place", "draw", "show_selection", "table"]

BAR = 24  # characters of the longest bar


def show_selection(
    recipe: str, *, model: str | None, data: Any, overrides: Iterable[str] = (), plugins: Iterable[Path] = ()
) -> dict[str, Any]:
    """Make the recipe's selection on the model (with calibration rows where it needs statistics) and count it.

    Returns {"trained", "total", "tensors", "inside" (the entries of these tensors), "by_operation": {name: count},
    "by_block": {number: count}, "outside"}, and "flops" where the selection spends FLOPs: the shares of full training
    asked for, planned and counted, and where the planned ones go.
    """
    from pegbox.parts.plugins import load_plugins
    from pegbox.run import build_spec
    from pegbox.runner.preview import allocate_once

    load_plugins(plugins)
    spec = build_spec(recipe, model=model, data=data, overrides=overrides)
    if spec.recipe.select is None:
        raise BadInput(f"'{recipe}' has no `select:` block; its tuner '{spec.recipe.tuner.kind}' decides by itself.")
    opened, allocation = allocate_once(spec)
    return by_place(allocation, opened.model)


def by_place(allocation: Any, model: Any) -> dict[str, Any]:
    """Count an allocation's weights by operation and by block."""
    from pegbox.parts.anatomy import Anatomy
    from pegbox.parts.packed import full_shape

    anatomy = Anatomy.of(model)
    shapes = {name: full_shape(p) for name, p in model.named_parameters()}  # of packed ones too
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = {name: n for name, n in allocation.trained(shapes).items() if n}
    placed = _placed(counts, anatomy)
    flops = _flops(allocation.facts, anatomy)
    return {
        "trained": sum(counts.values()),
        "total": sum(sizes.values()),
        "tensors": len(counts),
        "inside": sum(sizes[name] for name in counts),
        **placed,
        **({"flops": flops} if flops else {}),
    }


def _placed(counts: Mapping[str, float], anatomy: Any) -> dict[str, Any]:
    """Sums by the operation's name, by block, and outside blocks."""
    operations: dict[str, float] = defaultdict(int)
    grid: dict[str, dict[int, float]] = {}
    blocks: dict[int, float] = defaultdict(int)
    outside: float = 0
    for name, count in counts.items():
        parts = [p for p in name.removesuffix(".weight").removesuffix(".bias").split(".") if not p.isdigit()]
        operations[parts[-1]] += count
        place = anatomy.block_of(name)
        if place is None:
            outside += count
        else:
            blocks[place[1]] += count
            row = grid.setdefault(parts[-1], {})
            row[place[1]] = row.get(place[1], 0) + count
    by_operation = dict(sorted(operations.items(), key=lambda item: -item[1]))
    return {"by_operation": by_operation, "by_block": dict(sorted(blocks.items())), "outside": outside, "grid": grid}


def _flops(facts: Mapping[str, Any], anatomy: Any) -> dict[str, Any]:
    """Where a step's FLOPs go, of a selection that tells; {} of any other."""
    if "flops_own" not in facts:
        return {}
    own = {name: flops for name, flops in facts["flops_own"].items() if flops}
    shares = {key: facts[key] for key in ("rho_asked", "rho_planned", "rho_counted") if key in facts}
    parts = {
        "forward": facts["flops_forward"],
        "passing gradients on": facts["flops_through"],
        "gradients of weights": sum(own.values()),
    }
    return {**shares, "full": facts["flops_full"], "parts": parts, **_placed(own, anatomy)}


def table(found: dict[str, Any]) -> Any:
    """The counts as a rich renderable with bars."""
    from rich.console import Group
    from rich.text import Text

    share = found["trained"] / max(found["total"], 1)
    inside = found["trained"] / max(found["inside"], 1)
    head = Text(
        f"{found['trained']:,} of {found['total']:,} weights train ({share:.2%}), in {found['tensors']} tensors"
        f" ({inside:.2%} of these)"
    )
    parts: list[Any] = [head, *_bars(found)]
    if "flops" in found:
        flops = found["flops"]
        names = {"rho_asked": "asked for", "rho_planned": "planned", "rho_counted": "counted"}
        told = ", ".join(f"{word} {flops[key]:.1%}" for key, word in names.items() if key in flops)
        parts.append(Text(f"FLOPs of a step, of full training's {flops['full']:.4g}: {told}"))
        parts.append(_grid("where they go", flops["parts"]))
        parts += _bars(flops, "gradients of weights, ")
    return Group(*parts)


def draw(found: dict[str, Any], path: Path) -> None:
    """The counts as a picture, operations by blocks; its form follows from the file's ending (png, svg, pdf)."""
    from matplotlib.figure import Figure

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--picture {path}: give a file that ends in .png, .svg or .pdf.")
    names = [name for name in found["by_operation"] if name in found["grid"]]
    blocks = list(found["by_block"])
    figure = Figure(figsize=(2 + 0.25 * len(blocks), 1 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    values = [[found["grid"][name].get(block, 0) for block in blocks] for name in names]
    image = axes.imshow(values or [[0]], aspect="auto", cmap="Blues", vmin=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=7)
    axes.set_xlabel("block")
    axes.set_title(f"{found['trained']:,} of {found['total']:,} weights train", fontsize=9)
    figure.colorbar(image, ax=axes, label="trained weights")
    figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(found: dict[str, Any], of: str = "") -> list[Any]:
    return [_grid(f"{of}by operation", found["by_operation"]), _grid(f"{of}by block", found["by_block"])]


def _grid(title: str, counts: dict[Any, float]) -> Any:
    from rich.table import Table

    most = max(counts.values(), default=1) or 1
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, count in counts.items():
        grid.add_row(str(name), f"{count:,.0f}", "█" * max(1, round(BAR * count / most)))
    return grid
