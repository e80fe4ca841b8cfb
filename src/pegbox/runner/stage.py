"""One stage: open the start, prepare, select, attach, train, leave an artefact.

What a stage decides before training (preparation records, the allocation) is written down first, so that a stage killed
in the middle goes on with the same decisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.allocation import Allocation
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context, seed_of
from pegbox.parts.files import read_json, replace_folder, write_json
from pegbox.parts.packed import FloatingWeights
from pegbox.parts.results import Cost
from pegbox.recipe import Recipe
from pegbox.runner.data import RunData
from pegbox.runner.opening import Opened, precision_of
from pegbox.spec import RunSpec

__all__ = ["StageJob", "TrainedStage"]

ALLOCATION = "allocation.safetensors"


@dataclass
class TrainedStage:
    """What a stage's work returns to the runner."""

    cost: Cost
    log: list[dict[str, Any]] = field(default_factory=list)
    readings: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageJob:
    """Everything one stage needs.

    Args:
        folder: the stage's own folder. start: the artefact folder it begins from, None for the bare base.
        open_start: opens the start; `weights_of` gives the bare state of another stage's start or end by name.
        patch: what the protocol laid over the recipe beside recipe blocks (use, settings, round, ...).
    """

    spec: RunSpec
    recipe: Recipe
    folder: Path
    start: Path | None
    data: RunData
    patch: Mapping[str, Any]
    open_start: Callable[[Recipe, bool], Opened]
    weights_of: Callable[[str, str], Mapping[str, Any]]
    allocation_of: Callable[[str], Allocation]
    root: Any
    folder_of: Callable[[str], Path] | None = None
    source: Any = None
    evaluator: Callable[[nn.Module, Any], Mapping[str, float]] | None = None
    progress: bool = False
    callbacks: Sequence[Any] = ()
    resume: bool = False
    name: str = "train"

    # ---- the three things a stage can do

    def train(self) -> TrainedStage:
        """Prepare, select, attach, train; leave the artefact."""
        from pegbox.engine import train_stage

        began = time.perf_counter()
        continued = self._continues()
        opened = self.open_start(self.recipe, continued)
        model, tokenizer = opened.model, opened.tokenizer
        ctx = self._context(model, tokenizer)
        records = self._prepare(model, ctx)
        allocation = self._allocate(model, ctx)
        if not continued:
            with torch.random.fork_rng(devices=[]):  # PEFT draws initial values from the global generator
                torch.manual_seed(seed_of(self.spec.seed, "attach", self.name))
                model = self.recipe.tuner.attach(_plain(model), allocation, ctx)
        ctx.model = model
        if type(self.recipe.tuner).reference_view:
            ctx.reference = lambda: self.recipe.tuner.reference(model)
        task, host = self.recipe.task, self.recipe.objective.host
        ctx.roles = self._roles(model, tokenizer, ctx)
        self._check_packing(model)
        schedules = self._schedules(ctx)
        before = time.perf_counter() - began
        outcome = train_stage(
            model,
            task.view,
            self._examples("train", tokenizer, host),
            self._examples("validation", tokenizer, host),
            task.collator(tokenizer, **self._collation()) if host == "supervised" else None,
            self.recipe.objective,
            self.recipe.optim,
            self.recipe.data,
            self.settings(),
            self.folder,
            ctx,
            callbacks=[*schedules, *self._listeners(), *self.callbacks],
            evaluator=self._evaluator(tokenizer),
            resume=self.resume,
            rewards=self._rewards() if host == "policy" else (),
            streams=self._streams(tokenizer) if host == "supervised" else None,
            identity={"recipe": self.recipe.digest(), "base": self.root.fingerprint, "data": self.data.digests()},
            selection_digest=allocation.digest() if allocation is not None else None,
        )
        for preparation, _, record in records:
            if record:
                preparation.finish(model, record)
        self._write_artefact(model, tokenizer, records, outcome, continued)
        self._save_policies(outcome)
        cost = outcome.cost.model_copy(update={"seconds": outcome.cost.seconds + before})
        readings = {"status": outcome.status, "best": outcome.best, "selections": _told(allocation, schedules)}
        return TrainedStage(cost, outcome.log, {k: v for k, v in readings.items() if v is not None})

    def select(self) -> TrainedStage:
        """Make the allocation only."""
        if self.recipe.select is None:
            raise BadInput(f"stage '{self.name}' selects, but has no `select:` block.")
        began = time.perf_counter()
        opened = self.open_start(self.recipe, False)
        self._allocate(opened.model, self._context(opened.model, opened.tokenizer))
        return TrainedStage(Cost(seconds=time.perf_counter() - began))

    def allocate(self, model: nn.Module, tokenizer: Any) -> Allocation | None:
        """The allocation on a given model, for looking at."""
        return self._allocate(model, self._context(model, tokenizer))

    # ---- settings and data

    def settings(self) -> Any:
        """The engine's settings of this stage; `share` is a stage's part of the run's length."""
        given = dict(self.patch.get("settings") or {})
        share = given.pop("share", None)
        settings = self.spec.settings(**given)
        if share is not None:
            settings = settings.model_copy(update=_scaled(settings, float(share)))
        precision = "bf16" if precision_of(self.spec) in {"bf16", "nf4"} and _on_gpu(self.spec) else "fp32"
        return settings.model_copy(update={"precision": precision})

    def _examples(self, use: str, tokenizer: Any, host: str) -> Any:
        rows = self.data.rows(use)
        if not rows:
            return None
        if host == "supervised":
            return self._encoded(use, tokenizer)
        from datasets import Dataset

        from pegbox.data.collate import preference_records

        return Dataset.from_list(preference_records(rows) if host == "preference" else _prompts(rows))

    def _encoded(self, use: str, tokenizer: Any) -> Any:
        """Encoded rows, as the data policies word them, with the other forms that the objective reads."""
        from pegbox.data.viewed import joined

        task, rows = self.recipe.task, self.data.rows(use)
        written: Sequence[Any] = rows
        for policy in self.recipe.data:
            written = policy.rewrite(written)
        same = written is rows
        encoded = self.data.encoded(use, task, tokenizer) if same else self.data.encode(written, task, tokenizer)
        wanted = self.recipe.objective.view_names
        made = [found for policy in self.recipe.data for found in policy.views(rows, wanted).items()] if wanted else []
        return joined(encoded, {name: self.data.encode(other, task, tokenizer) for name, other in made}, wanted)

    def _streams(self, tokenizer: Any) -> dict[str, Any]:
        """What the data policies draw from beside the training rows, encoded like those."""
        found: dict[str, Any] = {}
        for policy in self.recipe.data:
            for name, source in policy.sources().items():
                found[name] = self.data.encode(self.data.other(source), self.recipe.task, tokenizer)
        return found

    def _save_policies(self, outcome: Any) -> None:
        """What data policies learnt, in folders data-0, data-1, ... of the stage."""
        from pegbox.data.base import DataPolicy

        for i, policy in enumerate(self.recipe.data):
            if type(policy).save is not DataPolicy.save and _main():
                temporary = self.folder / f".data-{i}"
                temporary.mkdir(parents=True, exist_ok=True)
                policy.save(outcome.states[f"data.{i}"], temporary)
                replace_folder(temporary, self.folder / f"data-{i}")

    def _evaluator(self, tokenizer: Any) -> Callable[[nn.Module], Mapping[str, float]] | None:
        score = self.evaluator
        return None if score is None else lambda model: score(model, tokenizer)

    def _rewards(self) -> list[Callable[..., list[float]]]:
        """The rows' own checkers as one reward function for a policy objective."""
        from pegbox.parts.answers import checker_for

        rows = {row.id: row for row in self.data.rows("train")}

        def verified(completions: Sequence[Any], row_id: Sequence[str], **_: Any) -> list[float]:
            texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
            return [float(checker_for(rows[i])(rows[i], text)) for text, i in zip(texts, row_id)]

        return [verified]

    def _collation(self) -> dict[str, Any]:
        return {"packing": self.spec.rows.packing, "max_length": self.spec.rows.max_length}

    def _context(self, model: nn.Module, tokenizer: Any) -> Context:
        return Context(
            model=model,
            seed=self.spec.seed,
            tokenizer=tokenizer,
            folder_of=self.folder_of,
            round=int(self.patch.get("round", 0)),
        )

    def _roles(self, model: nn.Module, tokenizer: Any, ctx: Context) -> Mapping[str, nn.Module]:
        """The recipe's other models, each base loaded once, on first use."""
        from pegbox.artefact import Pool

        return Pool(
            self.recipe.models,
            self.source,
            policy=model,
            reference=ctx.reference,
            tokenizer=tokenizer,
            device=self.spec.device,
            precision=precision_of(self.spec),  # type: ignore[arg-type]
            trust_remote_code=self.spec.trust_remote_code,
        )

    def _check_packing(self, model: nn.Module) -> None:
        """Refuse packing where one row could see another."""
        from pegbox.data.collate import packing_leaks

        if self.spec.rows.packing and packing_leaks(model):
            raise Unsupported(
                f"packing: in {type(model).__name__} a row can see the one packed before it (found by a probe of "
                "gradients). Use rows.packing=false."
            )

    def batches(
        self, tokenizer: Any, count: int | None = None, size: int = 8, order: torch.Generator | None = None
    ) -> Callable[[], Iterable[Any]]:
        """Calibration batches: the first training rows, in the data's own order, `size` at a time; by `order` rows are
        drawn instead."""
        examples = self._encoded("train", tokenizer)
        collate = self.recipe.task.collator(tokenizer)
        size = min(size, len(examples))
        rows = range(len(examples)) if order is None else torch.randperm(len(examples), generator=order).tolist()

        def run() -> Iterable[Any]:
            limit = len(examples) if count is None else min(len(examples), count * size)
            for first in range(0, limit, size):
                yield collate([examples[rows[i]] for i in range(first, min(first + size, limit))])

        return run

    # ---- decisions, written down before training

    def _prepare(self, model: nn.Module, ctx: Context) -> list[tuple[Any, Path, dict[str, Any]]]:
        """Apply the recipe's preparations to a bare base; costly ones (over batches) are replayed when resumed."""
        if self.start is not None:  # they stand in the start's own parts
            return []
        done = []
        for i, preparation in enumerate(self.recipe.prepare):
            folder = self.folder / f"prep-{i}"
            record: dict[str, Any] = {}
            if folder.is_dir() and type(preparation).needs_batches:
                preparation.replay(model, folder)
            else:
                batches = self.batches(ctx.tokenizer) if preparation.needs_batches else tuple
                record = preparation.apply(model, batches, ctx)
                temporary = self.folder / f".prep-{i}"
                temporary.mkdir(parents=True, exist_ok=True)
                preparation.save(record, temporary)
                replace_folder(temporary, folder)
            done.append((preparation, folder, record))
        return done

    def _allocate(self, model: nn.Module, ctx: Context) -> Allocation | None:
        path = self.folder / ALLOCATION
        other = (self.patch.get("use") or {}).get("selection")
        if path.is_file():
            allocation = Allocation.load(path)
        elif other is not None:
            allocation = self.allocation_of(other)
        elif self.recipe.select is None:
            return None
        else:
            allocation = self._select(model, ctx)
        self._compare(allocation)
        if not path.is_file() and _main():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}")
            allocation.save(temporary)
            temporary.replace(path)
        return allocation

    def _select(self, model: nn.Module, ctx: Context) -> Allocation:
        selector = self.recipe.select
        assert selector is not None
        plain = _plain(model)
        anatomy = Anatomy.of(plain)
        stats = self._statistics(plain, ctx)
        generator = ctx.generator("select", self.patch.get("round", 0))
        return selector.select(anatomy, FloatingWeights(plain), stats, generator)

    def _statistics(self, model: nn.Module, ctx: Context) -> Mapping[str, Any] | None:
        """What the selector asked for: other stages' weights, or a pass over calibration batches."""
        assert self.recipe.select is not None
        wanted = self.recipe.select.statistics()
        if wanted is None:
            return None
        stages = getattr(wanted, "weights_of", None)
        if stages is not None:
            found: dict[str, Any] = {key: self.weights_of(stage, point) for key, (stage, point) in stages.items()}
            return {**found, **{key: self.allocation_of(stage) for key, stage in wanted.allocations_of.items()}}
        if hasattr(wanted, "gather"):
            return self._gather(wanted, model, ctx)
        from pegbox.parts.statistics import collect

        view = self.recipe.task.view(model)
        batches = self.batches(ctx.tokenizer, wanted.batches, wanted.batch_size)
        return collect(model, wanted, batches(), loss=self._loss_of(view, ctx))

    def _gather(self, wanted: Any, model: nn.Module, ctx: Context, optimizer: Any = None) -> Mapping[str, Any]:
        """A request that runs passes of its own, on the model as it is: before training, or at a step of it.

        Before training the trial optimizer is a fresh one; later rows are drawn by the seed and the step.
        """
        settings, step = self.settings(), ctx.step()
        micro = settings.micro_batch if isinstance(settings.micro_batch, int) else min(8, settings.batch)
        order = ctx.generator("gather", step) if step else None
        fresh = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
        found: Mapping[str, Any] = wanted.gather(
            model,
            self.batches(ctx.tokenizer, wanted.batches, micro, order)(),
            self._loss_of(self.recipe.task.view(model), ctx),
            lambda: optimizer or self.recipe.optim.optimizer([{"params": fresh}]),
            progress=step / ctx.total_steps if ctx.total_steps else 0.0,
            checkpointing=settings.gradient_checkpointing,
        )
        return found

    def _loss_of(self, view: Any, ctx: Context) -> Callable[[nn.Module, Any], Any]:
        objective = self.recipe.objective
        state = objective.setup(ctx)

        def loss(_: nn.Module, batch: Any) -> Any:
            ref = None
            if objective.needs_reference:
                with torch.no_grad(), _disable_current_modes():  # not part of what is traced
                    ref = objective.reference(state, view, batch)
            value = objective.value(state, view, batch, objective.count(batch), ref)
            if value is None:
                raise Unsupported(f"objective '{objective.kind}' has no value to gather statistics with.")
            return value

        return loss

    def _compare(self, allocation: Allocation) -> None:
        from pegbox.engine.distributed import check_same_on_ranks

        check_same_on_ranks(allocation.digest())

    def _schedules(self, ctx: Context) -> list[Any]:
        """Selections done again during training, as the tuner knows how to move them."""
        selector = self.recipe.select
        schedule = getattr(selector, "schedule", None)
        if selector is None or schedule is None or not schedule.moves:
            return []
        in_steps = schedule.in_steps(len(self.data.rows("train")) / self.settings().batch)
        selector = selector.model_copy(update={"schedule": in_steps})
        ctx.gather = lambda wanted, optimizer: self._gather(wanted, ctx.model, ctx, optimizer)
        found = self.recipe.tuner.schedules(selector, ctx)
        if not found:
            raise Unsupported(
                f"tuner '{self.recipe.tuner.kind}' can't move the selection of '{selector.kind}' during training; "
                "leave out select.schedule."
            )
        return list(found)

    def _listeners(self) -> list[Any]:
        if not self.progress or not _main():
            return []
        from pegbox.engine.display import ProgressDisplay

        return [ProgressDisplay(label=self.recipe.title or self.name)]

    # ---- the artefact

    def _continues(self) -> bool:
        """Whether training goes on with the very tuner that the start's last part holds."""
        if self.start is None:
            return False
        manifest = read_json(self.start / "artefact.json")
        applied = [part for part in manifest["parts"] if part["kind"] not in ("data", "json")]
        if not applied or applied[-1]["kind"] != "adapter" or type(self.recipe.tuner).part_kind != "adapter":
            return False
        if applied[-1]["component"] != self.recipe.tuner.model_dump(mode="json"):
            return False
        return self._same_selection(self.start.parent / ALLOCATION)

    def _same_selection(self, before: Path) -> bool:
        """Whether this stage trains what the start's stage trained; else its update is one of its own, on top."""
        other = (self.patch.get("use") or {}).get("selection")
        if other is None:
            return "select" not in self.patch
        return before.is_file() and Allocation.load(before).digest() == self.allocation_of(other).digest()

    def _write_artefact(
        self,
        model: nn.Module,
        tokenizer: Any,
        records: list[tuple[Any, Path, dict[str, Any]]],
        outcome: Any,
        continued: bool,
    ) -> None:
        from pegbox.artefact import ArtefactWriter
        from pegbox.engine.distributed import barrier

        if _main():
            with ArtefactWriter(
                self.folder / "artefact", self.root, start=self.start, replace_last=continued
            ) as writer:
                for preparation, folder, _ in records:
                    writer.add_recorded(preparation, folder)
                writer.add_tuner(self.recipe.tuner, model, additive=self.recipe.tuner.additive)
                writer.add_step(self.recipe.optim, outcome.states.get("step"))
                if tokenizer is not None:
                    writer.add_tokenizer(tokenizer)
            size = sum(p.stat().st_size for p in (self.folder / "artefact").rglob("*") if p.is_file())
            outcome.cost.artefact_bytes = size
        barrier()


def save_stage(folder: Path, entry: Mapping[str, Any]) -> None:
    """Write stage.json: the mark of a finished stage."""
    write_json(folder / "stage.json", dict(entry))


def _told(allocation: Allocation | None, schedules: Sequence[Any]) -> list[dict[str, Any]] | None:
    """What selections had to tell of themselves, in order; None where they had nothing."""
    first = [{"step": 0, **allocation.facts}] if allocation is not None and allocation.facts else []
    told = first + [facts for schedule in schedules for facts in getattr(schedule, "told", [])]
    return told or None


def _plain(model: nn.Module) -> nn.Module:
    """The bare model below an attached update, with the update written into its weights."""
    from pegbox.artefact import settle

    return settle(model)


def _prompts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows for a policy host: the conversation up to its last answer, and the row's id for its checker."""
    from pegbox.evaluate.base import prompt_of

    return [{"prompt": prompt_of(row), "row_id": row.id} for row in rows]


def _scaled(settings: Any, share: float) -> dict[str, Any]:
    if not 0 < share <= 1:
        raise BadInput(f"A stage's share of the training must lie in (0, 1], got {share}.")
    if settings.steps is not None:
        return {"steps": max(1, round(settings.steps * share))}
    if settings.tokens is not None:
        return {"tokens": max(1, round(settings.tokens * share))}
    return {"epochs": settings.epochs * share}


def _on_gpu(spec: RunSpec) -> bool:
    from pegbox.models import pick_device

    return pick_device(spec.device).type != "cpu"


def _main() -> bool:
    from pegbox.engine.distributed import is_main

    return is_main()
