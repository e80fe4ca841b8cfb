"""lm-evaluation-harness (the extra `eval`): its tasks on our model, its results as a `Measurement`.

The harness is handed the live model (a PEFT model too), so nothing is saved or loaded in between. Every metric that is
a mean over documents comes with its rows, so it can be paired like our own; other metrics come as a bare value.
What this file does not do: define tasks. The harness downloads a task's data itself, unless the task says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pegbox.errors import BadInput, MissingExtra
from pegbox.parts.calibration import bootstrap
from pegbox.parts.context import seed_of
from pegbox.parts.generation import as_evaluated
from pegbox.parts.results import Example, Measurement, Score

__all__ = ["lm_eval", "measurement_of"]


def lm_eval(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    include: Path | None = None,
) -> Measurement:
    """Run one of the harness's tasks (or groups) on `model`, in evaluation mode.

    Args:
        limit: documents per task, from the beginning. shots: examples in the prompt; None: the task's own number.
        include: a folder with further task files.

    Raises:
        MissingExtra: lm-eval is not installed. BadInput: it knows no such task.
    """
    try:
        import lm_eval as harness
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtra("lm-eval", "eval", f"The suite lm-eval:{task}") from None
    manager = TaskManager(include_path=str(include) if include is not None else None)
    if not manager.match_tasks([task]):
        raise BadInput(f"lm-eval knows no task '{task}'. List its tasks with: lm-eval ls tasks")
    with as_evaluated(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = harness.simple_evaluate(
            model=wrapped,
            tasks=[task],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return measurement_of(task, results, seed)


def measurement_of(task: str, results: Mapping[str, Any], seed: int = 0) -> Measurement:
    """The harness's result dictionary as a `Measurement`. Scores are named "metric", or "metric.subtask" in a group."""
    several = len(results.get("samples", {})) > 1
    scores: dict[str, Score] = {}
    examples: list[Example] = []
    for name, values in results["results"].items():
        rows = results.get("samples", {}).get(name, [])
        better = results.get("higher_is_better", {}).get(name, {})
        suffix = f".{name}" if several else ""
        found = {key: _rows_of(rows, metric) for key, metric in _metrics(values)}
        for key, metric in _metrics(values):
            label = f"{metric}{suffix}"
            higher = better.get(metric)
            scores[label] = _score(label, values[key], found[key], len(rows), True if higher is None else higher, seed)
        kept = {f"{metric}{suffix}": found[key] for key, metric in _metrics(values)}
        examples += [_example(name, i, row, kept) for i, row in enumerate(rows)]
    version = "+".join(f"{n}.{v}" for n, v in sorted(results.get("versions", {}).items()))
    return Measurement(suite=f"lm-eval:{task}", version=version or "1", scores=scores, examples=examples)


def _metrics(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, metric) of the numbers among "acc,none", "acc_stderr,none", "alias", ...; the first filter of each wins."""
    found: dict[str, str] = {}
    for key, value in values.items():
        metric = key.partition(",")[0]
        if "," in key and not metric.endswith("_stderr") and isinstance(value, int | float):
            found.setdefault(metric, key)
    return [(key, metric) for metric, key in found.items()]


def _rows_of(rows: list[Mapping[str, Any]], metric: str) -> list[float] | None:
    """One number per document, or None where the metric is no such thing."""
    values = [row.get(metric) for row in rows]
    plain = [float(v) for v in values if isinstance(v, int | float)]
    return plain if plain and len(plain) == len(values) else None


def _score(name: str, value: float, rows: list[float] | None, n: int, higher: bool, seed: int) -> Score:
    low = high = None
    if rows is not None and abs(sum(rows) / len(rows) - value) < 1e-6:
        interval = bootstrap(rows, seed=seed_of(seed, "bootstrap", name))
        low, high = interval.low, interval.high
    return Score(name=name, value=float(value), low=low, high=high, n=max(n, 1), higher_is_better=higher)


def _example(task: str, i: int, row: Mapping[str, Any], kept: Mapping[str, list[float] | None]) -> Example:
    answers = row.get("filtered_resps") or row.get("resps") or []
    return Example(
        row_id=f"{task}/{row.get('doc_id', i)}",
        values={name: values[i] for name, values in kept.items() if values is not None},
        group=task,
        prompt=_prompt(row.get("arguments"))[:2000],
        expected=str(row.get("target", ""))[:2000],
        answer=str(answers[0] if answers else "")[:2000],
    )


def _prompt(arguments: Any) -> str:
    """The prompt of a document's first request: [(prompt, ...), ...], or {"gen_args_0": {"arg_0": prompt, ...}}."""
    while isinstance(arguments, Mapping | list | tuple) and arguments:
        arguments = next(iter(arguments.values() if isinstance(arguments, Mapping) else arguments))
    return arguments if isinstance(arguments, str) else ""
