"""The suites of one run: which rows under which metrics, measured, kept, and read back.

"target" is the test rows (the validation rows where there are none) under the metrics that suit them; "validation" is
what checkpoints and rates are chosen on; "task:<name>" are suites that a protocol defines; the rest come with pegbox.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pegbox.data.rows import Row
from pegbox.decode.base import Decoding
from pegbox.decode.view import DecodedView
from pegbox.errors import BadInput, Unsupported
from pegbox.evaluate.base import METRIC, Metric
from pegbox.evaluate.encoding import encoder_from
from pegbox.evaluate.metrics import metric_from
from pegbox.evaluate.run import measure, read_examples, write_examples
from pegbox.evaluate.suites import Suite, suite_named, target
from pegbox.parts.files import read_json, write_json
from pegbox.parts.results import Measurement
from pegbox.parts.task import Task
from pegbox.parts.view import ModelView
from pegbox.recipe import Recipe
from pegbox.runner.data import RunData
from pegbox.spec import RunSpec

__all__ = ["Suites", "shots_before"]


class Suites:
    """Measures models on the suites of a run.

    Args:
        spec, data: the run's settings and rows. shots: so many training rows stand before each target prompt.
    """

    def __init__(self, spec: RunSpec, data: RunData, shots: int = 0):
        self.spec, self.data, self.shots = spec, data, shots
        self._defined: dict[str, RunData] = {}
        self._made: dict[str, Suite] = {}
        decoder = spec.recipe.decode
        self.answers_only = decoder is not None and not type(decoder).scores  # no likelihoods exist under the decoder
        asked = [s for s in spec.evaluation.suites if s != "target" or data.target]
        self.names = tuple(s for s in asked if not self.answers_only or self._by_answers(s))

    def define(self, name: str, data: RunData) -> None:
        """A further suite over other rows."""
        self._defined[name] = data

    def _by_answers(self, name: str) -> bool:
        """Whether answers alone decide a suite: rows of the user's own do (by the metrics that read answers)."""
        if name.startswith("lm-eval:") or name in ("target", "validation"):
            return not name.startswith("lm-eval:")
        return all(type(p.metric).needs_generation for p in suite_named(name).parts)

    # ---- what is measured

    def suite(self, name: str) -> Suite:
        """A suite by name, made once."""
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Suite:
        if name in ("target", "validation") or name in self._defined:
            data = self._defined.get(name, self.data)
            rows = data.rows("validation") if name == "validation" else data.target
            if not rows:
                raise BadInput(f"There are no rows for '{name}'. Give --test-data, or a larger --eval-split.")
            rows = rows[: self.spec.evaluation.limit]
            if self.shots:
                rows = shots_before(rows, data.rows("train"), self.shots)
            return target(rows, self.metrics(rows), name=name)
        return suite_named(name)

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """The user's metric first, if one was given, then what suits the rows."""
        wanted = self.spec.evaluation.metric
        suited = [self._metric({"kind": kind}) for kind in self.spec.recipe.task.metrics(rows)]
        if self.answers_only:
            suited = [m for m in suited if m.needs_generation]
        if wanted is None and not suited:
            assert self.spec.recipe.decode is not None
            raise BadInput(
                f"decode '{self.spec.recipe.decode.kind}' gives answers and no likelihoods, and no metric on answers "
                "suits these rows. Give one: --metric exact_match, f1, contains, or file.py:function."
            )
        if wanted is None:
            return suited
        first = self._metric(dict(wanted)) if isinstance(wanted, Mapping) else metric_from(wanted)
        return [first, *(m for m in suited if m.key != first.key and not m.needs_generation)]

    def _metric(self, block: dict[str, Any]) -> Metric:
        if "max_new_tokens" in METRIC[block["kind"]].model_fields:
            block.setdefault("max_new_tokens", self.spec.evaluation.max_new_tokens)
        return METRIC.validate(block)

    def digest(self, name: str) -> str:
        """Names everything that decides a suite's values on a given model."""
        if name.startswith("lm-eval:"):
            return name
        suite = self.suite(name)
        parts = [[p.score, p.metric.model_dump(mode="json"), [row.id for row in p.rows]] for p in suite.parts]
        content = [suite.name, suite.version, parts, self.shots, self.spec.rows.template, self.spec.rows.max_length]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def versions(self) -> dict[str, str]:
        """Suite name -> what it is made of, for a comparison's lock."""
        return {name: self.digest(name) for name in self.names}

    # ---- measuring

    def measure(
        self, model: nn.Module, tokenizer: Any, recipe: Recipe, name: str, *, generating: bool = True
    ) -> Measurement:
        """Score `model` on the suite; without `generating`, by those of its metrics that draw no answers, if any."""
        if name.startswith("lm-eval:"):
            from pegbox.evaluate.bridge import lm_eval

            return lm_eval(model, tokenizer, name.partition(":")[2], batch_size=self.spec.evaluation.batch)
        suite = self.suite(name) if generating else self.suite(name).without_generation()
        task = recipe.task
        if not task.causal and any(type(p.metric).encoding == "scoring" for p in suite.parts):
            raise Unsupported(
                f"suite '{name}' asks for text; task '{task.kind}' gives none. Leave it out of the suites."
            )
        data = self._defined.get(name, self.data)
        view: ModelView = DecodedView(model) if isinstance(model, Decoding) else task.view(model)
        return measure(
            view,
            tokenizer,
            suite,
            encode=self._encode(task, tokenizer, data, model),
            batch_size=self.spec.evaluation.batch,
        )

    def _encode(self, task: Task, tokenizer: Any, data: RunData, model: nn.Module) -> Any:
        device = next(model.parameters()).device

        def one(row: Row) -> list[dict[str, Any]]:
            return list(data.encode([row], task, tokenizer))

        return encoder_from(one, task.collator(tokenizer), batch_size=self.spec.evaluation.batch, device=device)

    def evaluator(self, recipe: Recipe) -> Callable[[nn.Module, Any], Mapping[str, float]] | None:
        """What training asks during a run, where it selects on a metric other than the objective's loss."""
        if self.spec.settings().metric == "loss" or not self.data.rows("validation"):
            return None

        def score(model: nn.Module, tokenizer: Any) -> Mapping[str, float]:
            found = self.measure(model, tokenizer, recipe, "validation")
            return {name: s.value for name, s in found.scores.items()}

        return score

    # ---- kept results

    def write(self, path: Path, measurement: Measurement) -> None:
        """A measurement and its examples, side by side."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_examples(measurement, path.with_suffix(".jsonl"))
        write_json(path, measurement.model_dump(mode="json"))

    def read(self, path: Path) -> Measurement:
        """What `write` wrote."""
        found = Measurement.model_validate(read_json(path))
        return found.model_copy(update={"examples": read_examples(path.with_suffix(".jsonl"))})

    def write_examples(self, folder: Path, suite: str, when: str, measurement: Measurement) -> None:
        """`examples/<suite>.<before|after>.jsonl`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_examples(measurement, folder / f"{suite.replace(':', '-').replace('/', '-')}.{when}.jsonl")


def shots_before(rows: Sequence[Row], train: Sequence[Row], count: int) -> list[Row]:
    """Each row with `count` answered training rows before it: of its own task where there are enough."""
    shown = []
    for row in rows:
        same = [t for t in train if t.task == row.task and t.messages]
        pool = same if len(same) >= count else [t for t in train if t.messages]
        before = [message for t in pool[:count] for message in t.messages if message.get("role") != "system"]
        system = [m for m in row.messages if m.get("role") == "system"]
        rest = [m for m in row.messages if m.get("role") != "system"]
        shown.append(replace(row, messages=[*system, *before, *rest]))
    return shown
