"""`pegbox demo`: a real language model, fine-tuned in three ways on the built-in network task, and the page that says
what each way gained, forgot and cost. One seed and published rates: a demonstration, not a ranking.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MODEL", "RECIPES", "demo"]

MODEL = "smollm2-135m-q4"
RECIPES = ("lora", "lift", "full")
OVERRIDES = {"lora": ["optim.lr=1.5e-3"], "lift": ["optim.lr=5e-4"], "full": ["optim.lr=1e-4"]}


def demo(
    out: str | Path = "demo",
    *,
    quick: bool = False,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = False,
    model: str = MODEL,
) -> Any:
    """Run the demonstration in `out`; returns its `Comparison`. `quick`: an eighth of the steps, a quarter of the rows.

    Interrupted, the same call goes on.
    """
    from pegbox.compare import compare

    steps, tests = (4, 12) if quick else (28, 36)
    return compare(
        [named(recipe) for recipe in RECIPES],
        out=out,
        model=model,
        data=["network"],
        test_data=[f"network:test:{tests}"],
        eval_data=["network:validation:12"],
        steps=steps,
        batch=8,
        max_length=256,
        max_new_tokens=48,
        seeds=1,
        trials=0,
        select="last",
        reference="lora",
        estimate=False,
        progress=progress,
        say=say,
    )


def named(recipe: str) -> dict[str, Any]:
    """A recipe of the catalogue at the rate that the demonstration uses, stated on the page."""
    from pegbox.recipe import load_recipe

    return {**load_recipe(recipe, OVERRIDES[recipe]).plain(), "slug": recipe}
