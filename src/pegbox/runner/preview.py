"""Looking before running: a selection made once, on the base, without a run folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput
from pegbox.models import resolve
from pegbox.runner.data import RunData
from pegbox.runner.opening import Opened, open_base
from pegbox.runner.stage import StageJob
from pegbox.spec import RunSpec

__all__ = ["allocate_once"]


def allocate_once(spec: RunSpec) -> tuple[Opened, Any]:
    """The base, and the allocation that the recipe's selector makes on it."""
    source = resolve(spec.model)
    opened = open_base(spec, spec.recipe, source)

    def no_stage(name: str, *_: Any) -> Any:
        raise BadInput(f"this selection needs the finished stage '{name}'; it can be shown only after a run.")

    with tempfile.TemporaryDirectory() as scratch:
        job = StageJob(
            spec=spec,
            recipe=spec.recipe,
            folder=Path(scratch),
            start=None,
            data=RunData(spec.rows),
            patch={},
            open_start=lambda recipe, trainable: opened,
            weights_of=no_stage,
            allocation_of=no_stage,
            root=None,
        )
        return opened, job.allocate(opened.model, opened.tokenizer)
