"""`task_balanced`: one model on K tasks at once, with losses that stop large, easy or fast tasks from dominating.

    case1   sum ce / N                                          all tokens alike
    case2   mean over samples of their token means
    case3   sum_k w_k (sum of k's ce / N_k) / sum_k w_k         a mean over tasks: MFTCoder's loss
    case4   sum_k w_k (mean over k's samples of their token means) / sum_k w_k
    focal_sample   mean_k mean_b of -alpha_k (1 - P_b)^gamma Q_b      P, Q: a sample's mean p[y] and log p[y]
    focal_task     mean_k of -alpha_k (1 - P_k)^gamma Q_k             their means over the task's samples

over the tasks that are present; N counts valid tokens. Scope "global" counts over the whole optimizer step and all
processes, so cutting it into micro-batches changes nothing; "micro" normalises inside each micro-batch, as the official
code does. Where do the w_k come from: `balances.py` (fixed, inverse size, FAMO, CoBa, a function).

Papers: MFTCoder, arXiv:2311.02303; CoBa, arXiv:2410.06741. The focal loss is its standard form at the two levels that
the paper names. Composes with every tuner; `inner` is any per-token objective (its terms and readings stay). In
evaluation mode the weights are those of a static balance, so that values of different steps compare.

Most modes are one weighted sum over tokens, known before the forward: the walk over tiles of logits is that of
`tokens`. Balances compare plain cross-entropies, whatever the inner loss. FAMO and focal losses need per-token losses
with their graph; where their weights depend on other micro-batches too, one more forward without gradient comes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.objectives.balances import BALANCE, Balance, Observed, Static, Tasks
from pegbox.objectives.base import OBJECTIVE, Objective, StepView
from pegbox.objectives.references import evaluating
from pegbox.objectives.token import PerToken, Tokens, row_weights, samples_of, valid_tokens
from pegbox.parts.balance import focal, sums_by
from pegbox.parts.context import Context
from pegbox.parts.rowsource import RowSource, turns
from pegbox.parts.view import Batch, ModelView

__all__ = ["BalancedState", "Layout", "TaskBalanced", "layout_of"]

Mode = Literal["case1", "case2", "case3", "case4", "focal_sample", "focal_task"]
FOCAL = ("focal_sample", "focal_task")


@dataclasses.dataclass
class Layout:
    """Who a batch's valid tokens belong to: n tokens, S samples, K tasks.

    sample: (n,) each token's sample. task: (S,) each sample's task. tokens: (S,) float64 valid tokens of each sample.
    """

    sample: Tensor
    task: Tensor
    tokens: Tensor

    @property
    def used(self) -> Tensor:
        """(S,) samples that have a valid token."""
        return self.tokens > 0


def layout_of(batch: Batch) -> Layout:
    """The layout of a padded or packed batch; task 0 where it names none."""
    valid = valid_tokens(batch)
    sample, ids = samples_of(batch, valid), batch.get("sample_ids")
    count = len(ids) if ids is not None else valid.shape[0]
    task = batch.get("task_ids")
    task = torch.zeros(count, dtype=torch.long) if task is None else torch.as_tensor(task)
    ones = torch.ones(sample.shape[0], dtype=torch.float64, device=valid.device)
    return Layout(sample, task.to(valid.device).long(), sums_by(ones, sample, count))


@dataclasses.dataclass
class BalancedState:
    """What a run holds: its tasks, the states of balance and inner objective, and what the running step has seen."""

    tasks: Tasks
    balance: Any
    inner: Any
    base: Tensor  # (K,) weights in evaluation
    seen: Tensor  # (K,) float64 task losses of this step's training forwards, so far
    alpha: Tensor  # (K,) focal factors
    validation: RowSource | None = None
    begun: bool = False
    prepared: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # of the running step only

    def state_dict(self) -> dict[str, Any]:
        parts = {"balance": self.balance, "inner": self.inner}
        held = {name: state.state_dict() for name, state in parts.items() if hasattr(state, "state_dict")}
        return {**held, "begun": self.begun, "seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun, self.seen = state["begun"], state["seen"].to(self.seen)
        for name in ("balance", "inner"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])


@OBJECTIVE.register
class TaskBalanced(Objective):
    """A per-token objective, combined over tasks.

    Args:
        inner: `tokens` or an objective made of it; focal modes take plain cross-entropy only.
        mode: see the module. scope: what is counted together.
        balance: the tasks' weights, for case3 and case4.
        gamma, alpha: of the focal modes; alpha one number, or one per task.
        detach_focus: the focal factor without gradient.
    """

    reproduces: ClassVar[str] = "arXiv:2311.02303"

    kind: Literal["task_balanced"] = "task_balanced"
    inner: Annotated[Objective, OBJECTIVE] = Field(default_factory=Tokens)
    mode: Mode = "case3"
    scope: Literal["global", "micro"] = "global"
    balance: Annotated[Balance, BALANCE] = Field(default_factory=Static)
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    alpha: float | tuple[float, ...] = 1.0
    detach_focus: bool = False

    def model_post_init(self, context: Any, /) -> None:
        tokens = self.tokens
        if tokens.normalize != "tokens":
            raise BadInput("objective.inner.normalize is decided by objective.scope; leave it out.")
        if self.mode in FOCAL and (tokens.token.kind != "sft" or tokens.token.needs_mean or tokens.terms):
            raise BadInput(
                f"objective.mode '{self.mode}' is made of probabilities alone: it takes plain cross-entropy without "
                "label smoothing or terms. Leave objective.inner out, or use case1 to case4."
            )
        if self.mode not in ("case3", "case4") and self.balance != Static():
            raise BadInput(f"objective.balance weighs tasks in case3 and case4; mode '{self.mode}' has no use for it.")

    @cached_property
    def tokens(self) -> Tokens:
        """The inner objective as a walk over tokens."""
        found = self.inner if isinstance(self.inner, Tokens) else getattr(self.inner, "tokens", None)
        if not isinstance(found, Tokens):
            raise BadInput(f"objective.inner: '{self.inner.kind}' is no loss per token. Use tokens or asft.")
        return found

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether the inner objective runs a reference model."""
        return self.tokens.needs_reference

    @property
    def fixed_value(self) -> bool:  # type: ignore[override]
        """False where each forward's own losses decide the weights."""
        return not self.balance.needs_losses

    @property
    def _adapts(self) -> bool:
        return not isinstance(self.balance, Static)

    # ---- set-up and counting

    def setup(self, ctx: Context) -> BalancedState:
        names = ctx.tasks or self._unnamed()
        train = ctx.streams.get("train")
        sizes = None if train is None else tuple(len(train.by_task.get(k, ())) for k in range(len(names)))
        tasks = Tasks(tuple(name or str(k) for k, name in enumerate(names)), sizes)
        alpha = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(tasks)
        if len(alpha) != len(tasks):
            raise BadInput(f"objective.alpha: {len(alpha)} factors for {len(tasks)} tasks. Give one for each.")
        balance = self.balance.setup(ctx, tasks)
        base = balance.weights if isinstance(self.balance, Static) else Static().setup(ctx, tasks).weights
        return BalancedState(
            tasks,
            balance,
            self.tokens.setup(ctx),
            base.clone(),
            torch.zeros(len(tasks), dtype=torch.float64),
            torch.tensor(alpha, dtype=torch.float64),
            ctx.streams.get("validation"),
        )

    def _unnamed(self) -> Sequence[str]:
        """Without a data set to say so, there are as many tasks as weights."""
        weights = getattr(self.balance, "weights", None)
        count = len(weights) if isinstance(weights, tuple) else 1
        return [str(k) for k in range(max(count, len(self.alpha) if isinstance(self.alpha, tuple) else 1))]

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Beside "tokens", "samples" and "micro", tokens and samples of each task that is present."""
        layout = layout_of(batch)
        tokens = layout.tokens.sum()
        found = {"tokens": tokens, "samples": layout.used.sum().double(), "micro": torch.ones_like(tokens)}
        for k in sorted(set(layout.task[layout.used].tolist())):
            mine = layout.used & (layout.task == k)
            found[f"tokens/{k}"], found[f"samples/{k}"] = layout.tokens[mine].sum(), mine.sum().double()
        return found

    def reference(self, state: BalancedState, view: ModelView, batch: Batch) -> list[Any]:
        return self.tokens.reference(state.inner, view, batch)

    # ---- one micro-batch

    def losses(
        self, state: BalancedState, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        layout = layout_of(batch)
        self._check_tasks(layout, state.tasks)
        counts = _Counts(totals if self.scope == "global" else self.count(batch), len(state.tasks))
        training = view.model.training
        weigh = self.balance.needs_losses and training
        if self.mode in FOCAL or (weigh and "weights" not in state.prepared):
            given = {**batch, "sample_weight": None} if self.mode in FOCAL else batch
            tokens = self.tokens.per_token(view, given, ref, each=True)
            loss, weights = self._from_each(state, tokens, batch, layout, counts)
        else:
            weights = state.base if not training else state.prepared.get("weights", state.balance.weights)
            factors = self._factors(layout, counts, weights)
            own = batch.get("sample_weight")
            factors = factors if own is None else factors * own.to(factors)
            tokens = self.tokens.per_token(view, {**batch, "sample_weight": factors}, ref)
            loss = tokens.loss
        share = totals["micro"].to(loss) if self.scope == "micro" else 1.0
        if training and torch.is_grad_enabled() and self._adapts:
            own_share = _Counts(totals, len(state.tasks))
            state.seen += self._by_task(-tokens.logp.double(), layout, own_share, torch.ones_like(state.base)).cpu()
        yield "tokens", loss / share
        yield from self._readings(tokens, batch, layout, totals, state, weights)
        yield from self.tokens.penalties(state.inner, view, totals)

    def _factors(self, layout: Layout, counts: _Counts, weights: Tensor) -> Tensor:
        """(S,) float64 factor of each sample's tokens in the whole sum."""
        length, task = layout.tokens.clamp(min=1), layout.task
        if self.mode == "case1":
            return torch.ones_like(length) / counts.all_tokens
        if self.mode == "case2":
            return 1 / (length * counts.all_samples)
        present = counts.present.to(weights.device)
        kept = torch.where(present, weights, torch.zeros_like(weights))
        if not float(kept.sum()):
            raise BadInput("Every task of this step has weight 0; give objective.balance.weights that leave one.")
        share = (kept / kept.sum()).to(length.device)[task]
        if self.mode == "case3":
            return share / counts.tokens.to(length.device)[task].clamp(min=1)
        return share / (length * counts.samples.to(length.device)[task].clamp(min=1))

    def _from_each(
        self, state: BalancedState, tokens: PerToken, batch: Batch, layout: Layout, counts: _Counts
    ) -> tuple[Tensor, Tensor]:
        """The loss from (n,) losses with their graph, and the weights that were used."""
        if self.mode in FOCAL:
            return self._focal(state, tokens.loss, batch, layout, counts), state.base
        ones = torch.ones_like(state.base)
        with_graph = self._by_task(tokens.loss, layout, counts, ones)
        entropy = self._by_task(-tokens.logp.double(), layout, counts, ones).cpu()  # what balances compare
        weights = self.balance.weigh(state.balance, entropy, counts.present.cpu())
        return (with_graph * weights.to(with_graph)).sum(), weights

    def _by_task(self, each: Tensor, layout: Layout, counts: _Counts, ones: Tensor) -> Tensor:
        """(K,) task losses of case3 or case4, with graph, as far as this batch holds them."""
        factors = self._factors(layout, counts, ones) * float(counts.present.sum())  # each task by its own count
        return sums_by(each * factors.to(each)[layout.sample], layout.task[layout.sample], counts.tasks)

    def _focal(self, state: BalancedState, each: Tensor, batch: Batch, layout: Layout, counts: _Counts) -> Tensor:
        logp = -each
        length = layout.tokens.clamp(min=1).to(each)
        p_mean = sums_by(logp.exp(), layout.sample, length.shape[0]) / length  # (S,) P_b
        q_mean = sums_by(logp, layout.sample, length.shape[0]) / length  # (S,) Q_b
        weight = batch.get("sample_weight")
        weight = torch.ones_like(length) if weight is None else weight.to(length)
        per_sample = layout.used.to(length) * weight / counts.samples.to(length)[layout.task].clamp(min=1)
        alpha, tasks = state.alpha.to(length), counts.present.sum().to(length).clamp(min=1)
        if self.mode == "focal_sample":
            values = focal(p_mean, q_mean, self.gamma, alpha[layout.task], self.detach_focus)
            return (per_sample * values).sum() / tasks
        p_here = sums_by(per_sample * p_mean, layout.task, counts.tasks)
        q_here = sums_by(per_sample * q_mean, layout.task, counts.tasks)
        p_task, q_task = (state.prepared.get(n) for n in ("p", "q"))
        if p_task is None or q_task is None:
            return focal(p_here, q_here, self.gamma, alpha, self.detach_focus).sum() / tasks
        p_task, q_task = p_task.to(length), q_task.to(length)
        value = focal(p_task, q_here, self.gamma, alpha)  # the factor of the whole step, constant here
        if not self.detach_focus and self.gamma > 0:
            pull = alpha * self.gamma * (1 - p_task).clamp(min=1e-12) ** (self.gamma - 1) * q_task
            value = value + pull * (p_here - p_here.detach())  # its gradient through P
        return value.sum() / tasks

    def _readings(
        self,
        tokens: PerToken,
        batch: Batch,
        layout: Layout,
        totals: Mapping[str, Tensor],
        state: BalancedState,
        weights: Tensor,
    ) -> Iterator[tuple[str, Tensor]]:
        own = dataclasses.replace(tokens, loss=tokens.loss.sum(), weights=row_weights(batch, valid_tokens(batch)))
        names = set()
        for name, value in self.tokens.reduce(own, totals):
            if name != "tokens":
                names.add(name)
                yield name, value
        by = totals["tokens"].to(tokens.logp).clamp(min=1) / totals["micro"].to(tokens.logp)
        if "_ce" not in names:
            yield "_ce", -tokens.logp.sum() / by
        if len(state.tasks) < 2:
            return
        here = _by_task(-tokens.logp, layout, len(state.tasks))
        for k, name in enumerate(state.tasks.names):
            if f"tokens/{k}" in totals:
                yield f"_loss/{name}", here[k] / totals[f"tokens/{k}"].to(here) * totals["micro"].to(here)
        if self._adapts and weights is not state.base:
            for k, name in enumerate(state.tasks.names):
                yield f"_weight/{name}", weights[k].to(here)

    def _check_tasks(self, layout: Layout, tasks: Tasks) -> None:
        if layout.task.numel() and not 0 <= int(layout.task.min()) <= int(layout.task.max()) < len(tasks):
            raise BadInput(
                f"A row has task number {int(layout.task.max())}, and the tasks are 0 to {len(tasks) - 1} "
                f"({', '.join(tasks.names)}). Number the tasks of all rows alike."
            )

    # ---- around a step

    def before_step(self, state: BalancedState, step: StepView) -> None:
        state.prepared = {}
        state.seen = torch.zeros_like(state.seen)
        if not state.begun:
            nothing = torch.full_like(state.seen, torch.nan)
            self.balance.begin(state.balance, self._observed(state, step, nothing))
            state.begun = True
        if self.scope == "micro" or float(step.totals["micro"]) <= 1:
            return
        if self.balance.needs_losses:
            losses = self._measure(state, step.view, step.batches, step.totals, step.sum_over_ranks)
            present = _Counts(step.totals, len(state.tasks)).present.cpu()
            state.prepared["weights"] = self.balance.weigh(state.balance, losses, present)
        if self.mode == "focal_task":
            state.prepared.update(self._task_means(state, step))

    def after_step(self, state: BalancedState, step: StepView) -> None:
        seen, present = step.sum_over_ranks(state.seen), _Counts(step.totals, len(state.tasks)).present.cpu()
        losses = torch.where(present, seen, torch.full_like(seen, torch.nan))
        self.balance.update(state.balance, self._observed(state, step, losses))

    def _observed(self, state: BalancedState, step: StepView, losses: Tensor) -> Observed:
        again = partial(self._measure, state, step.view, step.batches, step.totals, step.sum_over_ranks, absent=True)
        return Observed(step.step, losses, again, partial(self._validate, state, step.view))

    @torch.no_grad()
    def _measure(
        self,
        state: BalancedState,
        view: ModelView,
        batches: Sequence[Batch],
        totals: Mapping[str, Tensor],
        add: Any = lambda tensor: tensor,
        absent: bool = False,
    ) -> Tensor:
        """(K,) float64 task losses (token or sample means, as the mode has them) over batches; `absent`: NaN there."""
        plain, counts = Tokens(chunk=self.tokens.chunk), _Counts(totals, len(state.tasks))
        ones, total = torch.ones_like(state.base), torch.zeros_like(state.seen)
        for batch in batches:
            layout = layout_of(batch)
            bare = {k: v for k, v in batch.items() if k != "sample_weight"}
            logp = plain.per_token(view, bare, None).logp
            total += self._by_task(-logp.double(), layout, counts, ones).cpu()
        total = add(total)
        return torch.where(counts.present.cpu(), total, torch.full_like(total, torch.nan)) if absent else total

    def _validate(self, state: BalancedState, view: ModelView, number: int, rows: int, cursor: int) -> Tensor:
        """(K,) token means over `number` validation mini-batches, in which the tasks take turns; eval mode."""
        assert state.validation is not None
        size = max(rows, len(state.tasks))
        places = [cursor + i * size for i in range(number)]
        batches = [state.validation.batch(turns(state.validation, len(state.tasks), at, size)) for at in places]
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.count(batch).items():
                totals[name] = totals[name] + count if name in totals else count
        measure = self.model_copy(update={"mode": "case3", "balance": Static()})
        with evaluating(view.model):
            return measure._measure(state, view, batches, totals, absent=True)

    @torch.no_grad()
    def _task_means(self, state: BalancedState, step: StepView) -> dict[str, Tensor]:
        """P_k and Q_k over the whole step."""
        counts, tasks = _Counts(step.totals, len(state.tasks)), len(state.tasks)
        sums = {"p": torch.zeros_like(state.seen), "q": torch.zeros_like(state.seen)}
        for batch in step.batches:
            layout = layout_of(batch)
            bare = {k: v for k, v in batch.items() if k != "sample_weight"}
            logp = self.tokens.per_token(step.view, bare, None).logp.double()
            weight = batch.get("sample_weight")
            per_sample = counts.samples.to(logp)[layout.task].clamp(min=1) * layout.tokens.clamp(min=1)
            factor = (1.0 if weight is None else weight.to(logp)) / per_sample
            for name, values in (("p", logp.exp()), ("q", logp)):
                sums[name] += sums_by(values * factor[layout.sample], layout.task[layout.sample], tasks).cpu()
        return {name: step.sum_over_ranks(total) for name, total in sums.items()}


class _Counts:
    """Denominators as (K,) float64 tensors; absent tasks have 0."""

    def __init__(self, totals: Mapping[str, Tensor], tasks: int):
        self.tasks = tasks
        self.all_tokens = totals["tokens"].double().clamp(min=1)
        self.all_samples = totals["samples"].double().clamp(min=1)
        zero = torch.zeros_like(totals["tokens"], dtype=torch.float64)
        self.tokens = torch.stack([totals.get(f"tokens/{k}", zero).double() for k in range(tasks)])
        self.samples = torch.stack([totals.get(f"samples/{k}", zero).double() for k in range(tasks)])

    @property
    def present(self) -> Tensor:
        return self.tokens > 0


def _by_task(values: Tensor, layout: Layout, tasks: int) -> Tensor:
    """(K,) float64 sums of (n,) values."""
    return sums_by(values.detach().double(), layout.task[layout.sample], tasks)
