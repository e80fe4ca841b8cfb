"""What is checked before a weight is loaded: capabilities, training data named, settings that fit together."""

from __future__ import annotations

import os

from pegbox.capabilities import Facts, check
from pegbox.errors import BadInput
from pegbox.spec import RunSpec

__all__ = ["check_spec", "facts_of"]


def facts_of(spec: RunSpec, row_kinds: frozenset[str] = frozenset(), has_checker: bool = True) -> Facts:
    """What the settings say about the run."""
    return Facts(
        quantized=spec.precision == "nf4",
        sharded=spec.settings().sharding == "full",
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        row_kinds=row_kinds,
        has_checker=has_checker,
    )


def check_spec(spec: RunSpec) -> None:
    """Raise `BadInput` or `Unsupported`; nothing heavy is loaded."""
    check(spec.recipe, facts_of(spec))
    if spec.recipe.protocol.trains and not spec.rows.train:
        raise BadInput("No training rows. Give --data: a file, a folder, a hub id, or the built-in 'network'.")
    recipe = spec.recipe
    if not (recipe.protocol.trains or recipe.weights or recipe.analyze or recipe.decode):
        raise BadInput(
            "This recipe neither trains nor has weight operations, a decoder or analyses; add `weights:`, `decode:` or "
            "`analyze:`."
        )
    for suite in spec.evaluation.suites:
        _check_suite(suite)


def _check_suite(suite: str) -> None:
    from pegbox.errors import did_you_mean

    known = ("target", "retention", "retention-real", "validation", "lm-eval:TASK")
    if suite not in known[:-1] and not suite.startswith("lm-eval:"):
        raise BadInput(f"Unknown suite '{suite}'.{did_you_mean(suite, known)}")
