"""`RecipeRunner`: carries out what a protocol asks for: stages (cached, resumable), evaluations (cached), answers.

A stage is named by the hash of what it is made of; asked for again with the same making it is read back, with another
it is refused. Evaluations of the bare base are kept in the cache folder: ten recipes measure their base once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pegbox.artefact import ArtefactWriter, CardInfo, DataEntry, root_of
from pegbox.errors import BadInput, did_you_mean
from pegbox.models import resolve
from pegbox.parts.allocation import Allocation
from pegbox.parts.component import explain
from pegbox.parts.files import read_json, write_json
from pegbox.parts.findings import Finding
from pegbox.parts.protocol import BASE, ModelRef, Report, StageResult
from pegbox.parts.results import Cost, Measurement
from pegbox.recipe import Recipe, dump_yaml, merge
from pegbox.runner.data import RunData
from pegbox.runner.opening import Opened, open_artefact, open_base, precision_of
from pegbox.runner.stage import ALLOCATION, StageJob, TrainedStage, save_stage
from pegbox.runner.suites import Suites
from pegbox.spec import DataSettings, RunSpec
from pegbox.workspace import Workspace

__all__ = ["RecipeRunner"]

NOT_BLOCKS = {"do", "use", "settings", "rows", "round"}  # in a stage's key as they are
ALSO = "also"  # entries behind the recipe's own lists


class RecipeRunner:
    """See the module. One per run; a protocol holds it through the `Runner` contract."""

    def __init__(
        self,
        spec: RunSpec,
        workspace: Workspace,
        *,
        resume: bool = False,
        progress: bool = False,
        callbacks: Sequence[Any] = (),
    ):
        self.spec, self.workspace, self.resume, self.progress = spec, workspace, resume, progress
        self.callbacks = tuple(callbacks)
        self.source = resolve(spec.model)
        self.data = RunData(spec.rows)
        self.recheck_with_rows()
        self.measuring = Suites(spec, self.data)
        self.suites = self.measuring.names
        self.has_operations = bool(spec.recipe.weights)
        self.has_analyses = bool(spec.recipe.analyze)
        self.has_decoder = spec.recipe.decode is not None
        self._decoded: tuple[ModelRef, Any] | None = None
        self._opened: tuple[ModelRef, Opened] | None = None

    def recheck_with_rows(self) -> None:
        """The capability check again, now that the rows' kinds are known."""
        from pegbox.capabilities import check
        from pegbox.runner.checks import facts_of

        rows = self.data.rows("train") or self.data.target
        checker = bool(rows) and all(row.answer is not None for row in rows)
        check(self.spec.recipe, facts_of(self.spec, self.data.kinds, checker))

    # ---- stages

    def stage(self, patch: Mapping[str, Any], *, start: ModelRef = BASE, name: str) -> StageResult:
        """See `Runner.stage`."""
        recipe = self._recipe(patch)
        folder = self.workspace.stage(name)
        key = self._key(recipe, patch, start)
        done = self._finished(folder, key, name)
        if done is not None:
            return done
        self._opened = None
        do = patch.get("do", "train")
        job = self._job(recipe, patch, start, folder, name)
        made = {"train": job.train, "select": job.select, "apply": lambda: self._apply(recipe, job)}[do]()
        entry = {
            "version": 1,
            "key": key,
            "name": name,
            "do": do,
            "start": [start.stage, start.point],
            "recipe": recipe.plain(),
            "cost": made.cost.model_dump(mode="json"),
            "readings": made.readings,
        }
        if _main():
            folder.mkdir(parents=True, exist_ok=True)
            save_stage(folder, entry)
        return self._result(folder, entry, made.log)

    def _recipe(self, patch: Mapping[str, Any]) -> Recipe:
        blocks = {k: v for k, v in patch.items() if k not in NOT_BLOCKS and k != ALSO}
        plain = {k: v for k, v in self.spec.recipe.plain().items() if k != "protocol"}
        unknown = [k for k in blocks if k not in Recipe.model_fields]
        if unknown:
            raise BadInput(f"Unknown key '{unknown[0]}' in a stage.{did_you_mean(unknown[0], Recipe.model_fields)}")
        laid = merge(plain, blocks)
        for key, entries in (patch.get(ALSO) or {}).items():
            laid[key] = [*laid[key], *entries]
        recipe = Recipe.of(laid)
        return self._redrawn(recipe, int(patch.get("round", 0)))

    @staticmethod
    def _redrawn(recipe: Recipe, round_: int) -> Recipe:
        """A selector with rounds draws anew in each of them."""
        if recipe.select is None or round_ == 0 or "round" not in type(recipe.select).model_fields:
            return recipe
        return recipe.model_copy(update={"select": recipe.select.model_copy(update={"round": round_})})

    def _key(self, recipe: Recipe, patch: Mapping[str, Any], start: ModelRef) -> str:
        rest = {k: patch.get(k) for k in sorted(NOT_BLOCKS)}
        shared = {
            "base": self.source.fingerprint,
            "rows": self.spec.rows.model_dump(mode="json"),
            "settings": self.spec.train,
            "seed": self.spec.seed,
        }
        begun = None if start.stage is None else read_json(self.workspace.stage(start.stage) / "stage.json")["key"]
        content = [recipe.digest(), rest, shared, begun, start.point, self.spec.init_from]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _finished(self, folder: Path, key: str, name: str) -> StageResult | None:
        path = folder / "stage.json"
        if not path.is_file():
            return None
        entry = read_json(path)
        if entry["key"] != key:
            raise BadInput(
                f"stage '{name}' in {self.workspace.folder} was made from other settings, data or base. "
                "Use another --out, or delete the run."
            )
        return self._result(folder, entry, [])

    def _result(self, folder: Path, entry: Mapping[str, Any], log: list[dict[str, Any]]) -> StageResult:
        start = ModelRef(*entry["start"])
        cost = Cost.model_validate(entry["cost"])
        return StageResult(entry["name"], folder, start, ModelRef(entry["name"]), cost, dict(entry["readings"]), log)

    def _job(self, recipe: Recipe, patch: Mapping[str, Any], start: ModelRef, folder: Path, name: str) -> StageJob:
        rows = patch.get("rows")
        data = self.data if rows is None else RunData(_other_rows(self.spec, rows))
        begin = self._artefact_of(start)
        return StageJob(
            spec=self.spec,
            recipe=recipe,
            folder=folder,
            start=begin,
            data=data,
            patch=patch,
            open_start=lambda r, trainable: self._open_start(r, begin, trainable),
            weights_of=self._weights_of,
            allocation_of=lambda stage: Allocation.load(self.workspace.stage(stage) / ALLOCATION),
            folder_of=lambda stage: self.workspace.stage(stage) / "artefact",
            source=self.source,
            root=root_of(
                self.source,
                task=recipe.task.model_task,
                precision=precision_of(self.spec),
                model_kwargs=self._model_arguments(),
            ),
            evaluator=self.measuring.evaluator(recipe),
            progress=self.progress,
            callbacks=self.callbacks,
            resume=(folder / "checkpoints").is_dir(),
            name=name,
        )

    def _model_arguments(self) -> dict[str, Any]:
        """What the base's own loading needs beside its name: the number of classes of a classifier."""
        return {"num_labels": len(self.data.labels)} if self.data.kinds == {"classification"} else {}

    # ---- models

    def _artefact_of(self, ref: ModelRef) -> Path | None:
        """The artefact that holds `ref`; None for the bare base."""
        if ref.stage is None:
            return _run_artefact(self.spec.init_from) if self.spec.init_from is not None else None
        entry = read_json(self.workspace.stage(ref.stage) / "stage.json")
        if ref.point == "start":
            return self._artefact_of(ModelRef(*entry["start"]))
        return self.workspace.stage(ref.stage) / "artefact"

    def _open_start(self, recipe: Recipe, folder: Path | None, trainable: bool) -> Opened:
        if folder is not None:
            return open_artefact(self.spec, folder, trainable=trainable)
        return open_base(self.spec, recipe, self.source, labels=len(self.data.labels))

    def open(self, ref: ModelRef) -> Opened:
        """The model at `ref`, kept until another is asked for. The base is always the bare one."""
        if self._opened is None or self._opened[0] != ref:
            self._opened = None  # free the other model first
            if ref.stage is None:
                opened = open_base(
                    self.spec, self.spec.recipe, self.source, labels=len(self.data.labels), prepared=False
                )
            else:
                folder = self._artefact_of(ref)
                opened = open_artefact(self.spec, folder) if folder else self.open(BASE)
            self._opened = (ref, opened)
        return self._opened[1]

    def _weights_of(self, stage: str, point: str) -> Mapping[str, Any]:
        """The full state of another stage's start or end, by the bare base's parameter names."""
        from pegbox.artefact import settle

        ref = ModelRef(stage, point)
        folder = self._artefact_of(ref)
        opened = open_artefact(self.spec, folder) if folder else open_base(self.spec, self.spec.recipe, self.source)
        return {name: p.detach() for name, p in settle(opened.model).named_parameters()}

    def _apply(self, recipe: Recipe, job: StageJob) -> TrainedStage:
        from pegbox.runner.posthoc import apply_operations

        began = time.perf_counter()
        if _main():
            labels = len(self.data.labels)
            apply_operations(self.spec, recipe, self.source, job.root, job.folder, job.start, labels)
        return TrainedStage(Cost(seconds=time.perf_counter() - began))

    # ---- measuring

    def define(self, suite: str, rows: Any) -> None:
        """See `Runner.define`."""
        self.measuring.define(suite, RunData(_other_rows(self.spec, rows)))

    def evaluate(self, ref: ModelRef, suite: str, *, decoded: bool = False) -> Measurement:
        """See `Runner.evaluate`."""
        kept = self._kept_evaluation(ref, suite)
        if kept is not None and decoded:
            kept = self.workspace.folder / "evaluations" / f"decoded-{self._decoder_key()}-{kept.name}"
        if kept is not None and kept.is_file():
            return self.measuring.read(kept)
        opened = self.open(ref)
        model = self._decoding(ref) if decoded else opened.model
        found = self.measuring.measure(model, opened.tokenizer, self.spec.recipe, suite)
        if kept is not None and _main():
            self.measuring.write(kept, found)
        return found

    def _decoder_key(self) -> str:
        recipe = self.spec.recipe.plain()
        content = json.dumps([recipe["decode"], recipe["models"]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def _decoding(self, ref: ModelRef) -> Any:
        """The recipe's decoder on the model at `ref` and the models of its roles, kept until another is asked for."""
        from pegbox.runner.decoding import bound

        if self._decoded is None or self._decoded[0] != ref:
            artefact = None if ref == BASE else self._artefact_of(ref)
            self._decoded = (ref, bound(self.spec, self.open(ref), artefact))
        return self._decoded[1]

    def decoding(self) -> dict[str, Any]:
        """See `Runner.decoding`."""
        return self._decoded[1].summary() if self._decoded is not None else {}

    def analyze(self, ref: ModelRef | None = None) -> list[Finding]:
        """See `Runner.analyze`."""
        from pegbox.runner.analysis import analyze

        self._opened = None
        folder = None if ref is None else self._artefact_of(ref)
        named = None if folder is None else (self.workspace.folder.name, folder)
        place = self.workspace.file("analysis")
        return analyze(self.spec, self.data, self.measuring, self.source, place, named)

    def _kept_evaluation(self, ref: ModelRef, suite: str) -> Path | None:
        name = suite.replace(":", "-").replace("/", "-")
        if ref.stage is None:
            from pegbox.models import cache_dir

            parts = [
                self.source.fingerprint,
                precision_of(self.spec),
                self.spec.attention,
                self.measuring.digest(suite),
            ]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
            return cache_dir() / "evaluations" / f"{key}.json"
        entry = read_json(self.workspace.stage(ref.stage) / "stage.json")
        return self.workspace.folder / "evaluations" / f"{ref.stage}-{ref.point}-{entry['key']}-{name}.json"

    def generate(self, ref: ModelRef, messages: list[list[dict[str, Any]]]) -> list[str]:
        """See `Runner.generate`."""
        from pegbox.parts.generation import generate

        opened = self.open(ref)
        limit = self.spec.evaluation.max_new_tokens
        return generate(opened.model, opened.tokenizer, messages, max_new_tokens=limit)

    # ---- the end

    def publish(self, report: Report) -> None:
        """Write metrics, examples, the joined log, and the artefact with its card."""
        if not _main():
            return
        folder, metrics = self.workspace.folder, report.metrics
        stage_artefact = self._artefact_of(report.final)
        if stage_artefact is not None:
            self._publish_artefact(stage_artefact, report)
            size = sum(p.stat().st_size for p in self.workspace.artefact.rglob("*") if p.is_file())
            metrics.cost.artefact_bytes = size
        for when, measured in (("before", metrics.before), ("after", metrics.after)):
            for suite, measurement in measured.items():
                self.measuring.write_examples(folder / "examples", suite, when, measurement)
        if self.has_decoder:
            from pegbox.runner.decoding import record

            write_json(folder / "decoding.json", record(self.spec, self.source))
        write_json(folder / "metrics.json", metrics.model_dump(mode="json"))
        self._join_logs()

    def _publish_artefact(self, source: Path, report: Report) -> None:
        recipe = self.spec.recipe
        licence = None
        card = CardInfo(
            title=f"{self.spec.model}, tuned with {recipe.title or 'pegbox'}",
            recipe=recipe.title,
            recipe_yaml=dump_yaml(recipe.plain()),
            data=[
                DataEntry(name=", ".join(self.data.names()), role=use, rows=entry["rows"], sha256=entry["sha256"])
                for use, entry in self.data.digests().items()
            ],
            metrics=report.metrics,
            licence=licence,
        )
        root = root_of(
            self.source,
            task=recipe.task.model_task,
            precision=precision_of(self.spec),
            model_kwargs=self._model_arguments(),
        )
        with ArtefactWriter(self.workspace.artefact, root, start=source) as writer:
            tokenizer = self.open(report.final).tokenizer
            if tokenizer is not None:
                writer.add_tokenizer(tokenizer)
            writer.add_card(card)

    def _join_logs(self) -> None:
        """One log.jsonl for the run: the stages' logs in order, each record with its stage's name."""
        stages = [p for p in (self.workspace.folder / "stages").glob("*") if (p / "log.jsonl").is_file()]
        target = self.workspace.file("log.jsonl")
        with target.with_suffix(".tmp").open("w", encoding="utf-8") as out:
            for stage in sorted(stages, key=lambda p: (p / "log.jsonl").stat().st_mtime):
                for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines():
                    out.write(json.dumps({"stage": stage.name, **json.loads(line)}) + "\n")
        shutil.move(target.with_suffix(".tmp"), target)


def _other_rows(spec: RunSpec, rows: Any) -> Any:
    """The run's encoding with other rows: a source, a list of sources, or a block of row settings."""
    block = {**spec.rows.model_dump(), "validation": [], "test": []}
    own = dict(rows) if isinstance(rows, Mapping) and "train" in rows else {"train": rows}
    try:
        return DataSettings.model_validate({**block, **own})
    except ValidationError as error:
        raise explain(error, DataSettings, "rows") from None


def _run_artefact(run: str) -> Path:
    from pegbox.artefact import artefact_folder

    return artefact_folder(run)


def _main() -> bool:
    from pegbox.engine.distributed import is_main

    return is_main()
