"""The one mixin that gives transformers' and TRL's trainers pegbox's seams: objective, step, policies, owners.

    class SeamsTrainer(Seams, transformers.Trainer): ...

Per optimizer step: all its micro-batches are fetched, moved, handed through the policies and counted; then either plain
back-propagation runs micro-batch by micro-batch (the trainer's own rhythm), or the step's estimator gets them together
as a `StepProblem`. Afterwards the trainer clips, steps and schedules, the owners of extra parameters step, the policies
are told. Hosts whose trainer owns the loss (GRPO, DPO: `objective.host`) keep theirs and still get the step, the
checkpoints and everything else.

What this file does not know: which objective, estimator or optimizer it carries; checkpoints (`resume.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pegbox.data.base import DataPolicy
from pegbox.engine.batches import positions_of, tokens_of
from pegbox.engine.distributed import Whole, full, gather_rows, mean_over_ranks, sum_over_ranks, world
from pegbox.engine.host_type import TrainerLike
from pegbox.engine.owners import Owners
from pegbox.engine.packing import restore_random, take_random
from pegbox.engine.problem import MicroLoss, NonFinite, StepProblem, named_trained, total_counts
from pegbox.errors import RunFailed, Unsupported
from pegbox.objectives.base import Objective, StepView
from pegbox.optim.base import Step, StepLog
from pegbox.parts.context import Context
from pegbox.parts.metering import measuring_flops
from pegbox.parts.view import Batch, ModelView
from pegbox.parts.watching import paused

__all__ = ["Seams", "check_step"]


def check_step(objective: Objective | None, step: Step) -> None:
    """Refuse a step that works on values with an objective that has none. Raises `Unsupported`."""
    if objective is not None and step.needs_value and objective.has_value and not objective.fixed_value:
        raise Unsupported(
            f"optim '{step.kind}' compares the loss at several points, and objective '{objective.kind}' as configured "
            "weighs its parts anew at each of them. Use a step with backward."
        )
    if objective is not None and step.needs_value and not objective.has_value:
        raise Unsupported(
            f"optim '{step.kind}' works on the loss's value, and objective '{objective.kind}' has none (its loss is "
            "constant, only its gradient means something). Use a step with backward, or an objective with a value."
        )


class Seams(TrainerLike):
    """Mixin before a trainer class; see the module's docstring.

    Args (keywords, beside the trainer's own):
        objective: what is minimised; None keeps the trainer's loss.
        step: how it is minimised; None keeps the trainer's optimizer.
        policies: data policies, acting in order.
        view: the model's view, or a function from the model to it.
        ctx: the context handed to components; its `step` and `total_steps` become live readings of this trainer.
        sharding: "none" (DDP where there are several processes) or "full" (`fully_shard`).
        precision: "fp32" or "bf16" (autocast around every forward).
        loader: makes the training loader; None keeps the trainer's.
    """

    objective: Any  # Objective | None
    step_component: Any  # Step | None
    states: Any  # component states by name, once they are made
    shell: Any  # the sharded module, where weights are sharded

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        step: Step | None = None,
        policies: Sequence[DataPolicy] = (),
        view: ModelView | Callable[[nn.Module], ModelView] | None = None,
        ctx: Context | None = None,
        sharding: str = "none",
        precision: str = "fp32",
        loader: Callable[[], Any] | None = None,
        **kwargs: Any,
    ):
        check_step(objective, step or Step(kind="none"))
        self.objective, self.step_component, self.policies = objective, step, list(policies)
        self.sharding, self.precision, self.loader = sharding, precision, loader
        super().__init__(*args, **kwargs)
        self.ctx = ctx if ctx is not None else Context(model=self.model)
        self.ctx.step = lambda: self.state.global_step
        self.owns_loss = objective is None or objective.host not in {"supervised"}
        self.states = None
        self._batches: list[Batch] = []
        self._totals: dict[str, Tensor] = {}
        self._log = StepLog(loss=0.0)
        self.step_tokens = self.step_positions = self.first_step_flops = 0
        self.count_flops = False
        self.probing = False  # batches of now are tried out, and made of any rows
        self.flops_per_position: float | None = None
        self.step_loss = torch.zeros(())
        self.grad_norm = 0.0
        self.tokens_seen = self.positions_seen = 0
        self._problem: StepProblem | None = None
        self._whole: nn.Module | None = None
        self.row_names: Callable[[Sequence[int]], Sequence[str]] = lambda ids: [str(i) for i in ids]
        if not self.owns_loss:
            self.loss_is_scaled_for_ga = True  # losses are divided by totals over the whole step
            made = view(self.model) if callable(view) and not isinstance(view, ModelView) else view
            if made is None:
                raise ValueError("an objective needs a view of the model")
            self.view = made
        self.add_callback(_AfterStep(self))

    # ---- set-up, once the number of steps is known

    def setup_components(self, total_steps: int) -> None:
        """Make the components' states; who needs them before training (for a policy's sampler) calls it earlier."""
        self.ctx.total_steps = total_steps
        states: dict[str, Any] = {"objective": self.objective.setup(self.ctx) if self.objective else None}
        states |= {f"data.{i}": policy.setup(self.ctx) for i, policy in enumerate(self.policies)}
        states["step"] = self.step_component.setup(self.ctx) if self.step_component else None
        self.states = states
        self.owners = Owners(states, self.step_component or Step(kind="none"), self.args.device)
        if not self.owns_loss and self.objective is not None:
            bound = (self.objective, states["objective"], self.view, self.ctx)
            self.micro_loss = MicroLoss(*bound, self.autocast, self.acting)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision's context around every forward."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16)

    def acting(self, batch: Batch) -> AbstractContextManager[Any]:
        """What policies hold in place for one micro-batch, from its first forward to the end of its backward."""
        stack = ExitStack()
        for i, policy in enumerate(self.policies):
            if type(policy).acting is DataPolicy.acting or self.probing:
                continue
            if self.model.training or not policy.training_only:
                stack.enter_context(policy.acting(self.states[f"data.{i}"], batch, self.ctx))
        return stack

    @property
    def plain(self) -> bool:
        """True if the step is ordinary back-propagation, which needs no `StepProblem`."""
        return self.step_component is None or type(self.step_component).estimate is Step.estimate

    def get_train_dataloader(self) -> Any:
        return self.loader() if self.loader is not None else super().get_train_dataloader()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.step_component is not None:
            named = named_trained(self.model if model is None else model)
            if not named:
                raise RunFailed("Nothing trains: no parameter of the model requires a gradient.")
            self.optimizer = self.step_component.optimizer([{"params": list(named.items())}])
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and self.step_component is not None:
            factor = self.step_component.factor(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.states is None:
            self.setup_components(max_steps)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Put a `Whole` between the model and DDP; estimators reduce for themselves and need no DDP."""
        if self.owns_loss or world() == 1:
            return super()._wrap_model(model, training, dataloader)
        if not training or self._whole is not None:
            return self._whole if training and self._whole is not None else model
        if self.sharding == "full":
            self._whole = self.shell  # sharded before the optimizer was made
        elif self.plain:
            self._whole = self.accelerator.prepare_model(Whole(model), device_placement=False)  # it is placed
        else:
            self._whole = Whole(model)
        return self._whole

    def run_job(self, job: Callable[[], Any]) -> Any:
        """Run a job inside the wrapper's forward where weights are sharded; DDP matters to backward only."""
        return self._whole(job=job) if self._whole is not None and self.sharding == "full" else job()

    # ---- one optimizer step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_tokens = sum(tokens_of(b) for b in batches)
        self.step_positions = sum(positions_of(b) for b in batches)
        self.step_loss = torch.zeros((), device=device)
        if self.owns_loss:
            return batches, items
        self._batches = [self.through_policies(self._prepare_inputs(b)) for b in batches]
        self._totals = {n: t.to(device) for n, t in total_counts(self.objective, self._batches).items()}
        self._log = StepLog(loss=0.0)
        self._sums: dict[str, Tensor] = {}
        self._outcomes: list[tuple[Tensor, dict[str, Tensor]]] = []
        if type(self.objective).before_step is not Objective.before_step:
            self._around_step(self.objective.before_step)
        return self._batches, items

    def _around_step(self, hook: Callable[[Any, StepView], None]) -> None:
        """Run an objective's hook around a step: no gradient, modes and random state as before."""
        numbers, modes = take_random(), [(m, m.training) for m in self.model.modules()]
        step = StepView(self.view, self._batches, self._totals, self.state.global_step, sum_over_ranks)
        self.model.train()
        try:
            with torch.no_grad(), self.autocast(), paused():
                self.run_job(lambda: hook(self.states["objective"], step))
        finally:
            for module, mode in modes:
                module.training = mode
            restore_random(numbers)

    def through_policies(self, batch: Batch, training: bool = True) -> Batch:
        for i, policy in enumerate(self.policies):
            if training or not policy.training_only:
                state, views = self.states[f"data.{i}"], batch.get("views")
                batch = policy.on_batch(state, batch, self.ctx)
                if views and type(policy).acts_on_views:
                    batch = {**batch, "views": {n: policy.on_batch(state, v, self.ctx) for n, v in views.items()}}
        return batch

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.count_flops and self.state.global_step == 0:
            loss = self._counted_step(model, inputs, num_items_in_batch)
        else:
            loss = self._training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss
        return loss

    def _counted_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """A step's share of FLOPs, of whatever it does: references, several forwards, backward.

        Counting makes torch take other paths, equal up to rounding. So plain back-propagation is counted on an extra
        pass that leaves no trace; what an estimator or a host's trainer does can only be counted while it happens.
        """
        if self.owns_loss or not self.plain or self.sharding == "full":
            with measuring_flops() as meter:
                loss = self._training_step(model, inputs, num_items_in_batch)
            self.first_step_flops += meter.total
            self.flops_per_position = self.first_step_flops / max(1, self.step_positions)
            return loss
        if self.flops_per_position is None:
            problem = StepProblem(self.micro_loss, [], self._totals, self.model)
            with self.owners.untouched(), problem.untouched(), measuring_flops() as meter:
                self.model.train()
                with self.acting(inputs):
                    self._summed(inputs).backward()
            self._sums, self._outcomes = {}, []
            self.flops_per_position = meter.total / max(1, positions_of(inputs))
        return self._training_step(model, inputs, num_items_in_batch)

    def _training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        if self.owns_loss:
            if not self.plain:
                raise Unsupported(
                    f"optim '{self.step_component.kind}' needs the whole step at once; {type(self).__name__} hands out "
                    "one micro-batch at a time. Use a plain optimizer with this objective."
                )
            return super().training_step(model, inputs, num_items_in_batch)
        self.model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        return self._plain_step(model, inputs) if self.plain else self._estimated_step(inputs)

    def _plain_step(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward and backward of one micro-batch. Returns its share of the loss, times the number of processes."""
        whole = model if isinstance(model, Whole) or self._whole is not None else None
        with self.acting(batch):
            loss = whole(job=lambda: self._summed(batch)) if whole is not None else self._summed(batch)
            loss = loss * world() if world() > 1 else loss
            self.accelerator.backward(loss)
        return loss.detach()

    def _one_by_one(self, batch: Batch) -> Tensor:
        """Backward of each loss before the next one's forward, so that one graph is in memory at a time."""

        def apart(loss: Tensor) -> Tensor:
            if loss.requires_grad:
                self.accelerator.backward(loss)
            return loss.detach()

        return self._summed(batch, apart)

    def _summed(self, batch: Batch, each: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
        ref = self.micro_loss.reference(batch)
        parts: list[Tensor] = []
        outcomes: dict[str, Tensor] = {}
        for name, value in self.micro_loss.losses(batch, self._totals, ref):
            if not name.startswith("_"):
                value = each(value)
                parts.append(value)
            self._read(name, value.detach(), outcomes)
        if not parts:
            raise RunFailed(f"Objective '{self.objective.kind}' gave no loss for a micro-batch.")
        if outcomes and "sample_ids" in batch:
            self._outcomes.append((batch["sample_ids"], outcomes))
        return sum(parts[1:], parts[0])

    def _read(self, name: str, value: Tensor, outcomes: dict[str, Tensor]) -> None:
        """Keep a named loss or reading: scalars are summed for the log, one per sample goes to the policies."""
        if value.ndim == 1 and name.startswith("_"):
            outcomes[name[1:]] = value
        elif value.ndim == 0:
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _estimated_step(self, inputs: Any) -> Tensor:
        """Run the estimator once, at the step's last micro-batch; before it there is nothing to do."""
        zero = torch.zeros((), device=self.args.device)
        if inputs is not self._batches[-1]:
            return zero
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        problem = StepProblem(self.micro_loss, self._batches, self._totals, self.model, optimizer, self.run_job)
        self._problem = problem
        try:
            self._log = self.step_component.estimate(self.states["step"], problem)
        except NonFinite as error:
            raise RunFailed(self.describe_non_finite(error.value, 0.0)) from error
        self._read_first_pass(problem)
        if self._log.applied or self._log.skip:
            for p in problem.params.values():
                p.grad = None  # the trainer's optimizer then has nothing to do
        elif world() > 1 and self.sharding == "none":
            for p in problem.params.values():
                if p.grad is not None:
                    p.grad = mean_over_ranks(p.grad)
        return torch.as_tensor(self._log.loss, device=self.args.device).detach().float()

    def _read_first_pass(self, problem: StepProblem) -> None:
        """Named losses and readings of each micro-batch's first forward; an estimator may run more."""
        for i, readings in sorted(problem.readings.items()):
            outcomes: dict[str, Tensor] = {}
            for name, value in readings.items():
                self._read(name, value, outcomes)
            if outcomes and "sample_ids" in self._batches[i]:
                self._outcomes.append((self._batches[i]["sample_ids"], outcomes))

    def describe_non_finite(self, loss: float, norm: float) -> str:
        """What to tell of a step whose loss or gradient is not finite: the step, its rows, what is kept."""
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm} (loss {loss:.4g})"
        ids = [int(i) for b in self._batches for i in b.get("sample_ids", [])]
        rows = f" Rows of this step: {', '.join(self.row_names(ids))}." if ids else ""
        good = next((s for s in self.store.steps() if self.store.fault(s) is None), None)
        kept = f" The checkpoint of step {good} is kept." if good else ""
        return (
            f"Step {self.state.global_step + 1}: the {what}; the weights were not changed.{rows}{kept} Lower optim.lr, "
            "raise optim.warmup, set optim.max_grad_norm, or look at these rows."
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping, also where parameters are sharded; kept for the guard against NaN."""
        if grad_norm is None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        self.grad_norm = float(full(grad_norm) if isinstance(grad_norm, Tensor) else grad_norm)
        return self.grad_norm

    def after_optimizer_step(self) -> None:
        """Owners step, the estimator is told, policies see the outcomes."""
        counts = sum_over_ranks(torch.tensor([self.step_tokens, self.step_positions]))
        self.tokens_seen += int(counts[0])
        self.positions_seen += int(counts[1])
        if self.owns_loss and self.state.num_input_tokens_seen:
            self.tokens_seen = int(self.state.num_input_tokens_seen)  # a host that samples its own rows
        if self.owns_loss:
            return
        self.owners.step(skip=self._log.skip)
        if type(self.objective).after_step is not Objective.after_step:
            self._around_step(self.objective.after_step)
        step = self.step_component
        if step is not None and type(step).after_step is not Step.after_step:
            problem = self._problem or StepProblem(
                self.micro_loss, [], self._totals, self.model, getattr(self.optimizer, "optimizer", self.optimizer)
            )
            step.after_step(self.states["step"], problem)
        self._problem = None
        self._tell_policies()

    def _tell_policies(self) -> None:
        told = [(i, p) for i, p in enumerate(self.policies) if type(p).observe is not DataPolicy.observe]
        if not told or not self._outcomes:
            return
        ids = gather_rows(torch.cat([ids for ids, _ in self._outcomes]))
        names = self._outcomes[0][1]
        outcomes = {n: gather_rows(torch.cat([o[n] for _, o in self._outcomes])) for n in names}
        for i, policy in told:
            policy.observe(self.states[f"data.{i}"], ids, outcomes)

    def step_readings(self) -> dict[str, float]:
        """This step's named losses and readings as numbers, over all processes, and what the estimator reported."""
        sums = getattr(self, "_sums", {})
        numbers = {}
        if len([n for n in sums if not n.startswith("_")]) > 1 or any(n.startswith("_") for n in sums):
            for name, value in sums.items():
                total = mean_over_ranks(value.double().cpu())
                numbers[name.lstrip("_")] = float(total * (1 if name.startswith("_") else world()))
                if name.startswith("_"):
                    numbers[name.lstrip("_")] /= max(1, len(self._batches))
        return numbers | {k: float(v) for k, v in self._log.readings.items()}

    # ---- the trainer's own questions

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's value on one batch by its own denominators; the trainer's own loss where it owns one."""
        if self.owns_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        totals = self._totals if self.model.training and self._totals else total_counts(self.objective, [inputs])
        with self.acting(inputs):
            parts = self.micro_loss.losses(inputs, totals, self.micro_loss.reference(inputs))
            loss = sum(value for name, value in parts if not name.startswith("_"))
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # counted in parts/cost.py; the trainer's count walks all parameters at every micro-batch


class _AfterStep(TrainerCallback):
    """Calls the trainer back once its optimizer has stepped."""

    def __init__(self, trainer: Seams):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.after_optimizer_step()
