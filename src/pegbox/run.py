"""Runs: build the settings, check them, let the recipe's protocol tell its story, write what it leaves.

settings -> RunSpec -> capability check -> Workspace -> RecipeRunner -> protocol.run(runner) -> metrics, artefact
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput, PegboxError, RunFailed, Stopped
from pegbox.parts.files import read_json
from pegbox.parts.plugins import load_plugins
from pegbox.parts.results import Metrics
from pegbox.recipe import Recipe, load_recipe, override, parse_override, parse_yaml, read_recipe
from pegbox.spec import RunSpec
from pegbox.workspace import Workspace, read_spec

__all__ = ["Run", "build_spec", "execute", "load_spec", "open_run", "preview", "schema_of", "split_overrides", "train"]

RUN_KEYS = ("train", "rows", "evaluation", "seed", "precision", "device", "attention", "trust_remote_code")


@dataclass
class Run:
    """A run's folder and what it says."""

    path: Path

    @property
    def status(self) -> str:
        """new | checked | running | finished | stopped | failed."""
        return str(Workspace(self.path).status()["status"])

    @property
    def spec(self) -> RunSpec:
        return read_spec(self.path)

    @property
    def metrics(self) -> Metrics:
        """What was measured (empty before the run has finished)."""
        path = self.path / "metrics.json"
        return Metrics.model_validate(read_json(path)) if path.is_file() else Metrics(status=self.status)

    def model(self, **options: Any) -> Any:
        """The tuned model, on its base, with its tokenizer: `(model, tokenizer)`."""
        from pegbox.artefact import load_artefact

        return load_artefact(self.path / "artefact", **options)

    def report(self, formats: Sequence[str] = ("html",)) -> list[Path]:
        """Write the report's files and return their paths."""
        from pegbox.report import write_report

        return write_report(self.path, formats=list(formats))


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    processes: int = 1,
    accelerate: Path | None = None,
    plugin: Sequence[Path] = (),
    progress: bool = False,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Run:
    """Train `recipe` and return the run.

    Args:
        recipe: a name of the catalogue, a recipe's or a run's YAML file, a mapping, or a `Recipe`.
        out: the run's folder; a new one, or with `resume` the interrupted run's. Default: runs/<recipe>-<digest>.
        dry_run: validate everything, load nothing, write nothing.
        processes: processes on this machine (data parallel). accelerate: an accelerate configuration file instead.
        progress: show a live display. callbacks: transformers `TrainerCallback`s, told of every training stage.
        settings: see `build_spec`.

    Raises:
        BadInput, Unsupported: before anything is loaded. RunFailed, Stopped, DoesNotFit: see `pegbox.errors`.
    """
    load_plugins(plugin)
    spec = build_spec(recipe, resume_from=Path(out) if resume and out is not None else None, **settings)
    folder = Path(out) if out is not None else Path("runs") / f"{_slug(recipe)}-{spec.digest()[:6]}"
    if dry_run:
        from pegbox.runner import check_spec

        check_spec(spec)
        Workspace(folder).check(spec, resume=resume)
        return Run(folder)
    if (processes > 1 or accelerate is not None) and "RANK" not in os.environ:
        from pegbox.launch import launch

        launch(spec, folder, processes=processes, accelerate=accelerate, resume=resume, plugins=plugin)
        return Run(folder)
    return execute(spec, folder, resume=resume, progress=progress, callbacks=callbacks)


def execute(
    spec: RunSpec, folder: Path, *, resume: bool = False, progress: bool = False, callbacks: Sequence[Any] = ()
) -> Run:
    """Run `spec` in `folder`. What fails leaves its reason in status.json, and everything finished before it."""
    from pegbox.engine.distributed import is_main
    from pegbox.runner import RecipeRunner, check_spec

    check_spec(spec)
    workspace = Workspace(folder)
    workspace.check(spec, resume=resume)
    with workspace.locked(main=is_main()):
        workspace.open(spec)
        workspace.set_status("running")
        try:
            runner = RecipeRunner(spec, workspace, resume=resume, progress=progress, callbacks=callbacks)
            report = spec.recipe.protocol.run(runner)
            runner.publish(report)
        except BaseException as error:
            _record(workspace, error)
            raise
        workspace.set_status("finished")
    return Run(folder)


def build_spec(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    model: str | None = None,
    data: Any = None,
    eval_data: Any = None,
    test_data: Any = None,
    eval_split: float | None = None,
    test_split: float | None = None,
    format: str | None = None,
    map: Mapping[str, str] | None = None,
    template: str | None = None,
    train_on: str | None = None,
    max_length: int | None = None,
    packing: bool | None = None,
    group: str | None = None,
    limit: int | None = None,
    metric: str | None = None,
    suites: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    micro_batch: int | str | None = None,
    tracker: Sequence[str] | None = None,
    precision: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    init_from: str | None = None,
    trust_remote_code: bool | None = None,
    overrides: Iterable[str] = (),
    resume_from: Path | None = None,
) -> RunSpec:
    """One run's settings from a recipe (or a run.yaml) and what is given beside it; what is not given stays.

    Args:
        model: a hub id, a folder, a GGUF file, an alias. data, eval_data, test_data: row sources.
        overrides: "dotted.key=value"; keys that begin with train, rows, evaluation, seed, precision, device or
            attention belong to the run, all others to the recipe.
        resume_from: the folder of a run to take everything that is not given from.
    """
    block = _starting_block(recipe, resume_from)
    given = {
        "model": model,
        "seed": seed,
        "precision": precision,
        "device": device,
        "init_from": init_from,
        "trust_remote_code": trust_remote_code,
        "rows.train": data,
        "rows.validation": eval_data,
        "rows.test": test_data,
        "rows.validation_split": eval_split,
        "rows.test_split": test_split,
        "rows.format": format,
        "rows.map": dict(map) if map else None,
        "rows.template": template,
        "rows.train_on": train_on,
        "rows.max_length": max_length,
        "rows.packing": packing,
        "rows.group": group,
        "rows.limit": limit,
        "evaluation.metric": metric,
        "evaluation.suites": list(suites) if suites is not None else None,
        "evaluation.max_new_tokens": max_new_tokens,
        "train.batch": batch,
        "train.micro_batch": _micro(micro_batch),
        "train.tracker": list(tracker) if tracker else None,
    }
    for key, value in given.items():
        if value is not None:
            override(block, key, value)
    _set_length(block, epochs=epochs, steps=steps, tokens=tokens)
    for_run, for_recipe = split_overrides(overrides)
    for target, texts in ((block, for_run), (block["recipe"], for_recipe)):
        for text in texts:
            override(target, *parse_override(text))
    if not block.get("model"):
        raise BadInput("No model. Give --model: a hub id, a local folder, a GGUF file, or smollm2-135m-q4.")
    return RunSpec.of(block)


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """(those of the run's own settings, those of its recipe), told apart by their first key."""
    found: tuple[list[str], list[str]] = ([], [])
    for text in overrides:
        found[parse_override(text)[0].split(".")[0] not in RUN_KEYS].append(text)
    return found


def _starting_block(recipe: Any, resume_from: Path | None) -> dict[str, Any]:
    if resume_from is not None and (resume_from / "run.yaml").is_file():
        return read_spec(resume_from).plain()
    if isinstance(recipe, Recipe):
        return {"recipe": recipe.plain()}
    if isinstance(recipe, Mapping):
        return {"recipe": copy.deepcopy(dict(recipe))} if "recipe" not in recipe else copy.deepcopy(dict(recipe))
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        block = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if isinstance(block, Mapping) and "recipe" in block:  # a run.yaml, or a run's recipe.yaml
            inner = block["recipe"]
            inner = read_recipe(inner) if isinstance(inner, str) else dict(inner)
            rest = {k: v for k, v in block.items() if k not in {"recipe", "versions"}}
            return {**copy.deepcopy(rest), "recipe": inner}
    return {"recipe": read_recipe(recipe)}


def _set_length(block: dict[str, Any], **lengths: Any) -> None:
    given = {k: v for k, v in lengths.items() if v is not None}
    if len(given) > 1:
        raise BadInput(f"Give one of --epochs, --steps, --tokens; got {', '.join('--' + k for k in given)}.")
    if given:
        kept = {k: v for k, v in (block.get("train") or {}).items() if k not in lengths}
        block["train"] = {**kept, **given}


def _micro(value: int | str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not str(value).isdigit() or int(value) < 1:
        raise BadInput(f"--micro-batch {value}: give auto, or a number of rows.")
    return int(value)


def _slug(recipe: Any) -> str:
    return Path(recipe).stem if isinstance(recipe, str | Path) else "run"


def _record(workspace: Workspace, error: BaseException) -> None:
    """Leave the state and its reason behind; nothing here may hide `error`."""
    if isinstance(error, Stopped | KeyboardInterrupt):
        workspace.set_status("stopped", reason=str(error) or "interrupted")
    else:
        reason = str(error) if isinstance(error, PegboxError) else f"{type(error).__name__}: {error}"
        kind = "failed" if isinstance(error, RunFailed) or not isinstance(error, PegboxError) else "refused"
        workspace.set_status("failed", reason=reason, kind=kind)


def open_run(path: str | Path) -> Run:
    """A finished or interrupted run by its folder. Raises `BadInput` if there is none."""
    read_spec(Path(path))
    return Run(Path(path))


def schema_of(subject: str) -> dict[str, Any]:
    """The JSON schema of run.yaml ("run"), a recipe, a line of log.jsonl ("log"), or metrics.json ("metrics")."""
    if subject == "run":
        return RunSpec.model_json_schema()
    if subject == "recipe":
        return Recipe.model_json_schema()
    if subject == "metrics":
        return Metrics.model_json_schema()
    if subject == "log":
        from pegbox.engine.log import LogRecord

        return LogRecord.model_json_schema()
    raise BadInput(f"No schema of '{subject}'. There are: run, recipe, log, metrics.")


def load_spec(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name, file or run.yaml."""
    return load_recipe(_starting_block(recipe, None)["recipe"], overrides)


def preview(
    data: Any,
    *,
    model: str | None = None,
    format: str = "auto",
    map: Mapping[str, str] | None = None,
    template: str | None = None,
    train_on: str = "assistant",
    max_length: int = 1024,
    rows: int = 3,
) -> dict[str, Any]:
    """What `pegbox data` shows, as plain values: format, counts, lengths, and the first rows with their masks.

    Without a model there are no tokens, so masks and lengths are left out.
    """
    from pegbox.data.dataset import load_rows
    from pegbox.data.preview import preview as summarise

    found = load_rows(data, mapping=map, format=format)
    tokenizer = None
    if model is not None:
        from pegbox.models import load_tokenizer

        tokenizer = load_tokenizer(model)
    return summarise(found, tokenizer, rows, template=template, train_on=train_on, max_length=max_length)
