"""A user's own metric, `f.py:fn` or `package.module:fn`: a function of the answer and the row.

    def fn(answer: str, row) -> float | bool | dict[str, float]

With a dict, the value under the function's name (or the only one) is the score; the others stand beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from pegbox.errors import BadInput, RunFailed
from pegbox.evaluate.base import METRIC, Metric
from pegbox.evaluate.metrics.generated import Generated

__all__ = ["Function", "metric_from"]


@METRIC.register
class Function(Generated):
    """Scores answers with a Python function.

    Args:
        path: "file.py:function" or "module:function". The file is run: use your own.
        better: whether "higher" or "lower" values are better.
    """

    kind: Literal["function"] = "function"
    path: str
    better: Literal["higher", "lower"] = "higher"

    @field_validator("path")
    @classmethod
    def _form(cls, path: str) -> str:
        module, _, name = path.rpartition(":")
        if not module or not name.isidentifier():
            raise BadInput(f"A metric function is named 'file.py:function' or 'module:function', got '{path}'.")
        return path

    @property
    def key(self) -> str:
        return self.path.rpartition(":")[2]

    @property
    def direction(self) -> bool:
        return self.better == "higher"

    def judge(self, answer: str, row: Any) -> dict[str, float]:
        try:
            returned = _function(self.path)(answer, row)
        except Exception as error:
            raise RunFailed(
                f"The metric {self.path} failed on row {row.id}: {type(error).__name__}: {error}"
            ) from error
        values = returned if isinstance(returned, dict) else {self.key: returned}
        if self.key not in values and len(values) == 1:
            values = {self.key: next(iter(values.values()))}
        if self.key not in values or not all(_is_number(v) for v in values.values()):
            raise RunFailed(
                f"The metric {self.path} returned {returned!r} on row {row.id}. Return a finite number, or a dict of "
                f"them with '{self.key}' among its keys."
            )
        return {name: float(value) for name, value in values.items()}


def metric_from(spec: str) -> Metric:
    """A metric from the command line's text: a kind's name, or "f.py:fn"."""
    if ":" in spec:
        metric = METRIC.validate({"kind": "function", "path": spec})
        _function(spec)  # a missing file or name is found before anything runs
        return metric
    return METRIC.validate(spec)


@lru_cache
def _function(path: str) -> Callable[[str, Any], Any]:
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        file = Path(where).resolve()
        spec = importlib.util.spec_from_file_location(f"pegbox_metric_{file.stem}", file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise BadInput(f"The metric file {where} does not exist.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise BadInput(f"The metric module {where} can't be imported ({error}).") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadInput(f"{where} has no function '{name}'.")
    return function


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)
