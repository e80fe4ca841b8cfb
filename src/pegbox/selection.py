"""Where a selection's budget goes: trained weights by depth and by operation, for `pegbox select`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput

__all__ = ["by_place", "show_selection", "table"]

BAR = 24  # characters of the longest bar


def show_selection(
    recipe: str, *, model: str | None, data: Any, overrides: Iterable[str] = (), plugins: Iterable[Path] = ()
) -> dict[str, Any]:
    """Make the recipe's selection on the model (with calibration rows where it needs statistics) and count it.

    Returns {"trained", "total", "tensors", "by_operation": {name: count}, "by_block": {number: count}, "outside"}.
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

    anatomy = Anatomy.of(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    counts = {name: n for name, n in allocation.trained(shapes).items() if n}
    operations: dict[str, int] = defaultdict(int)
    blocks: dict[int, int] = defaultdict(int)
    outside = 0
    for name, count in counts.items():
        parts = [p for p in name.removesuffix(".weight").removesuffix(".bias").split(".") if not p.isdigit()]
        operations[parts[-1]] += count
        place = anatomy.block_of(name)
        if place is None:
            outside += count
        else:
            blocks[place[1]] += count
    return {
        "trained": sum(counts.values()),
        "total": sum(p.numel() for p in model.parameters()),
        "tensors": len(counts),
        "by_operation": dict(sorted(operations.items(), key=lambda item: -item[1])),
        "by_block": dict(sorted(blocks.items())),
        "outside": outside,
    }


def table(found: dict[str, Any]) -> Any:
    """The counts as a rich renderable with bars."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    share = found["trained"] / max(found["total"], 1)
    head = Text(
        f"{found['trained']:,} of {found['total']:,} weights train ({share:.2%}), in {found['tensors']} tensors"
    )
    parts: list[Any] = [head]
    for title, counts in (("by operation", found["by_operation"]), ("by block", found["by_block"])):
        most = max(counts.values(), default=1)
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
        for name, count in counts.items():
            grid.add_row(str(name), f"{count:,}", "█" * max(1, round(BAR * count / most)))
        parts.append(grid)
    return Group(*parts)
