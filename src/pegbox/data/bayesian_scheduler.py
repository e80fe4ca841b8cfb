"""`bayesian_scheduler`: a weight per training row, learnt while training from its tension with a small trusted set.

    p(w, theta | D_ft, D_safe) ~ p(D_safe | theta) prod_i p(z_i | theta)^(w_i) p(theta) p(w)
    theta:      mean_safe l + mean_b w_b l_b        w: mean_b w_b l_b + priors, the losses of the same forward

l is a row's mean loss per token. A row that fits well once the model also fits the trusted rows keeps a low loss and
gains weight; one that fights them fades. No labels, no attack simulated. With `optimizer: sgld` the logits are samples
of the posterior, and their mean and spread over the samples are reported; `adamw` finds one point.

Paper: arXiv:2510.27172. The policy adds trusted rows to each batch and weighs all rows, so any objective that takes
row weights works; a row's loss is a mean over its tokens with `objective: {kind: task_balanced, mode: case2}`. Composes
with every tuner. Differences from the released code: decision 0162.

Limit: what is seen is the LEVEL of a row's loss. Benign rows that are harder than the harmful answers lose weight too;
`baseline` takes out the base model's loss, or the task's running mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pegbox.data.base import DATA, DataPolicy
from pegbox.data.schedulers import NeuralScheduler, Posterior, ScalarScheduler, fingerprint_of, summary
from pegbox.errors import BadInput, Unsupported
from pegbox.parts.context import Context
from pegbox.parts.files import write_json, write_tensors, write_text
from pegbox.parts.langevin import Langevin
from pegbox.parts.rowsource import RowSource
from pegbox.parts.sampleweights import Activation, auroc, count_prior, entropy_prior, gaussian_prior
from pegbox.parts.tokens import score, shift
from pegbox.parts.view import Batch

__all__ = ["BayesianScheduler", "SchedulerState", "joined", "mean_losses"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
STREAM = "safe"


def mean_losses(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) each row's mean loss over its valid tokens, from (B, T, V) logits; 0 for a row without any."""
    args = (batch.get("sequence_ids"), batch.get("position_ids"), batch.get("attention_mask"))
    targets, valid = shift(batch["labels"], *args, batch.get("corrupted_ids"))
    losses = torch.zeros(valid.shape, dtype=logits.dtype, device=logits.device)
    losses[valid] = -score(logits[valid], targets[valid]).logp.to(losses)
    return losses.sum(1) / valid.sum(1).clamp(min=1)


def joined(user: Batch, safe: Batch) -> dict[str, Any]:
    """Two batches as one, padded to the wider one. Raises `Unsupported` for batches of different forms."""
    tensors = {k for k, v in user.items() if isinstance(v, Tensor)}
    if tensors - {"corrupted_ids"} != {k for k, v in safe.items() if isinstance(v, Tensor)}:
        raise Unsupported(
            "The trusted rows come in another form than the training rows (packed against padded). Leave the layout "
            "policy out, or use rows.packing for both."
        )
    width = max(user["input_ids"].shape[1], safe["input_ids"].shape[1])
    fills = {"labels": -100, "sequence_ids": -1}
    out: dict[str, Any] = {k: v for k, v in user.items() if not isinstance(v, Tensor)}
    offset = len(user["sample_ids"])
    for name in tensors:
        parts = [user[name], safe[name] if name in safe else torch.zeros_like(safe["input_ids"], dtype=torch.bool)]
        if name == "sequence_ids":
            parts[1] = torch.where(parts[1] >= 0, parts[1] + offset, parts[1])
        if parts[0].ndim == 2:
            fill = fills.get(name, 0)
            parts = [F.pad(p, (0, width - p.shape[1]), value=fill) for p in parts]
            if name == "position_ids":
                parts = [_counted_on(p, q.shape[1]) for p, q in zip(parts, (user[name], safe[name]))]
        out[name] = torch.cat(parts)
    return out


def _counted_on(positions: Tensor, width: int) -> Tensor:
    """Padding behind packed rows gets positions of its own, as the collator gives it."""
    positions = positions.clone()
    positions[:, width:] = torch.arange(positions.shape[1] - width, device=positions.device)
    return positions


def _number(value: Tensor) -> float | None:
    """A number for JSON; None for one that is not known yet."""
    return float(value) if math.isfinite(value) else None


@dataclass
class SchedulerState:
    """What a run holds: the scheduler, who is who, the place in the trusted rows, samples of the posterior, losses."""

    scheduler: Any
    place: dict[int, int]  # sample id -> position in the training set
    names: list[str]
    tasks: Tensor  # (N,) task number of each row
    safe: RowSource
    ctx: Context
    posterior: Posterior
    reference: Tensor | None = None  # (N,) base losses
    cursor: int = 0
    updates: int = 0
    at: int = -1  # the running step
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))  # (N,) last seen
    level: dict[int, float] = field(default_factory=dict)  # running mean loss by task
    curve: list[dict[str, float]] = field(default_factory=list)
    batches: list[tuple[Tensor, Batch]] = field(default_factory=list)  # of the running step
    words: dict[str, str] = field(default_factory=dict)

    def rows(self, sample_ids: Tensor) -> Tensor:
        """(B,) positions in the training set. Raises `BadInput` for an id that is not there."""
        try:
            return torch.tensor([self.place[int(i)] for i in sample_ids], dtype=torch.long)
        except KeyError as error:
            raise BadInput(f"The row with id {error} is not in the training set that the scheduler weighs.") from None

    def state_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler.state_dict(),
            "posterior": self.posterior.state_dict(),
            "reference": self.reference,
            "cursor": self.cursor,
            "updates": self.updates,
            "losses": self.losses.clone(),
            "level": dict(self.level),
            "curve": list(self.curve),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        self.posterior.load_state_dict(state["posterior"])
        self.reference, self.cursor, self.updates = state["reference"], state["cursor"], state["updates"]
        self.losses, self.level, self.curve = state["losses"].clone(), dict(state["level"]), list(state["curve"])

    def report(self, labels: Mapping[str, bool] | None = None, worst: int = 20) -> dict[str, Any]:
        """Weights as they are and over the posterior's samples; the rows of least weight; AUROC where harmful rows are
        known (row id -> harmful), 1 where every benign row weighs more."""
        weights = self.scheduler.all_weights().float().cpu()
        mean = self.posterior.mean if self.posterior.samples else weights
        order = mean.argsort()[:worst].tolist()
        found: dict[str, Any] = {
            **summary(weights, self.posterior),
            "suspicious": [[self.names[i], float(mean[i]), _number(self.losses[i])] for i in order],
            "curve": self.curve,
        }
        if labels is not None:
            known = [i for i, name in enumerate(self.names) if name in labels]
            benign = torch.tensor([not labels[self.names[i]] for i in known])
            found["auroc"] = auroc(mean[known], benign)
        return found


@DATA.register
class BayesianScheduler(DataPolicy):
    """Rows weighed against a trusted set.

    Args:
        safe: the trusted rows (prompts with safe answers), a source as `--data` takes it.
        mode: plain: safe + weighted; mixed: lam safe + (1 - lam) weighted; weighted; sft: the rows as they are;
            anchored: safe + unweighted. `lam` falls by `lam_drop` over the whole training, not below 0.
        ratio: trusted rows per training row in a batch.
        scheduler: scalar, or neural with the model under `models: {scheduler: ...}` as its encoder.
        activation: of the logits. start: where scalar logits begin; None: 0.1, or 1 in weight for the others.
        optimizer: adamw (`betas`), or sgld and psgld with `temperature`, `burn_in` updates before samples count.
        lr: of the logits or the network.
        entropy, gaussian (with mu, sigma), benign_share (with count_sigma): priors on scalar logits.
        baseline: what is taken out of a row's loss before the scheduler sees it: none, base (the untuned model's on the
            same row) or group (its task's running mean).
        recompute: measure the losses again after the step (one forward), instead of those of the step's own forward.
        normalise, refresh_every: of a neural scheduler; after so many updates all rows are scored again (None: once per
            epoch).
        initial, frozen: a saved scheduler to go on from, and whether it learns on.
    """

    reproduces: ClassVar[str] = "arXiv:2510.27172"
    needs_row_losses: ClassVar[bool] = True

    kind: Literal["bayesian_scheduler"] = "bayesian_scheduler"
    safe: Any
    mode: Literal["plain", "mixed", "weighted", "sft", "anchored"] = "plain"
    lam: Annotated[float, Field(ge=0, le=1)] = 0.9
    lam_drop: Annotated[float, Field(ge=0, le=1)] = 1.0
    ratio: Annotated[int, Field(ge=1)] = 1
    scheduler: Literal["scalar", "neural"] = "scalar"
    activation: Activation = "softmax"
    start: float | None = None
    optimizer: Literal["adamw", "sgld", "psgld"] = "adamw"
    lr: Positive = 5e-3
    betas: tuple[float, float] = (0.9, 0.95)
    temperature: NotNegative = 1.0
    burn_in: Annotated[int, Field(ge=0)] = 0
    entropy: NotNegative = 0.0
    gaussian: NotNegative = 0.0
    mu: float = 0.0
    sigma: Positive = 1.0
    benign_share: Annotated[float, Field(gt=0, le=1)] | None = None
    count_sigma: Positive = 0.1
    baseline: Literal["none", "base", "group"] = "none"
    recompute: bool = False
    normalise: Literal["dataset", "batch"] = "dataset"
    refresh_every: Annotated[int, Field(ge=1)] | None = None
    initial: str | None = None
    frozen: bool = False

    def model_post_init(self, context: Any, /) -> None:
        if not self.safe:
            raise BadInput("data.bayesian_scheduler needs `safe`: a source of trusted rows, e.g. safe: safe.jsonl.")
        if self.benign_share is not None and self.activation == "softmax":
            raise BadInput(
                "data.bayesian_scheduler.benign_share: softmax weights always sum to the number of rows, so an expected"
                " count says nothing. Use activation: sigmoid, or leave it out."
            )
        if self.scheduler == "neural" and (self.entropy or self.gaussian or self.benign_share is not None):
            raise BadInput("Priors act on one logit per row; scheduler 'neural' has none. Leave them out.")
        if self.frozen and self.initial is None:
            raise BadInput("data.bayesian_scheduler.frozen keeps a saved scheduler as it is: name it under `initial`.")

    @property
    def _anchored(self) -> bool:
        return self.mode in ("plain", "mixed", "anchored")

    @property
    def _weighs(self) -> bool:
        return self.mode in ("plain", "mixed", "weighted")

    def sources(self) -> Mapping[str, Any]:
        return {STREAM: self.safe}

    # ---- set-up

    def setup(self, ctx: Context) -> SchedulerState:
        train, safe = ctx.streams.get("train"), ctx.streams.get(STREAM)
        if train is None or not len(train):
            raise BadInput("The scheduler weighs training rows, and there are none.")
        if safe is None or not len(safe):
            raise BadInput("data.bayesian_scheduler.safe holds no rows: the trusted set is what all weights come from.")
        examples = [train.examples[i] for i in range(len(train))]
        ids = [int(e["sample_id"]) for e in examples]
        if len(set(ids)) != len(ids) or any("parts" in e for e in examples):
            raise BadInput("Each training row needs an id of its own; use no layout that joins or repeats rows.")
        state = SchedulerState(
            scheduler=self._scheduler(ctx, len(ids)),
            place={sample: i for i, sample in enumerate(ids)},
            names=[str(e.get("row_id", i)) for i, e in zip(ids, examples)],
            tasks=torch.tensor([int(e.get("task_id", 0)) for e in examples]),
            safe=safe,
            ctx=ctx,
            posterior=Posterior(len(ids)),
            losses=torch.full((len(ids),), math.nan),
        )
        state.words = {"scheduler": self.scheduler, "activation": self.activation}
        if self.scheduler == "neural":
            state.words["encoder"] = fingerprint_of(state.scheduler.encoder)
        if self.initial is not None:
            self._go_on(state)
        if self.baseline == "base":
            state.reference = self._base_losses(ctx, train)
        if self.scheduler == "neural":
            self._rescore(state)
            if not self.frozen:
                state.scheduler.settle()
        return state

    def _scheduler(self, ctx: Context, count: int) -> Any:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1 and (self.recompute or self.scheduler == "neural"):
            raise Unsupported("scheduler: neural and recompute read the rows of one process; train in one process.")
        make = partial(self._optimizer, ctx)
        if self.scheduler == "scalar":
            prior = self._prior if self.entropy or self.gaussian or self.benign_share is not None else None
            start = (
                self.start
                if self.start is not None
                else {"softmax": 0.1, "sigmoid": 0.0, "linear": 1.0}[self.activation]
            )
            return ScalarScheduler(count, self.activation, start, make, prior, self.frozen)
        if "scheduler" not in ctx.roles:
            raise BadInput("scheduler: neural reads rows with a small model; name it as models: {scheduler: ...}.")
        import copy

        role: Any = ctx.roles["scheduler"]
        encoder = copy.deepcopy(getattr(role, "model", role) if not hasattr(role, "get_input_embeddings") else role)
        table = encoder.get_input_embeddings().weight
        if ctx.tokenizer is not None and table.shape[0] < len(ctx.tokenizer):
            raise BadInput(
                f"The scheduler's model has {table.shape[0]} tokens, the tokenizer {len(ctx.tokenizer)}: it must read "
                "the same ones. Name a model of the same family."
            )
        generator = ctx.generator("scheduler head")
        made = NeuralScheduler(
            encoder, table.shape[1], count, self.activation, self.normalise, make, self.frozen, generator
        )
        return made.to(ctx.device)

    def _optimizer(self, ctx: Context, parameters: list[Any]) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=0.0)
        noise = ctx.generator("scheduler noise", device=parameters[0].device if self.scheduler == "scalar" else "cpu")
        return Langevin(
            parameters, self.lr, self.temperature, preconditioned=self.optimizer == "psgld", generator=noise
        )

    def _prior(self, logits: Tensor, weights: Tensor) -> Tensor:
        total = logits.new_zeros(())
        if self.entropy:
            total = total + self.entropy * entropy_prior(logits)
        if self.gaussian:
            total = total + self.gaussian * gaussian_prior(logits, self.mu, self.sigma)
        if self.benign_share is not None:
            total = total + count_prior(weights, self.benign_share, self.count_sigma)
        return total

    def _go_on(self, state: SchedulerState) -> None:
        from safetensors import safe_open

        file = Path(str(self.initial))
        file = file / "scheduler.safetensors" if file.is_dir() else file
        if not file.is_file():
            raise BadInput(f"No scheduler file {file}. A run leaves one in its stage's folder, under data-0.")
        with safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            state.scheduler.take(tensors, opened.metadata() or {})

    @torch.no_grad()
    def _base_losses(self, ctx: Context, train: RowSource) -> Tensor:
        found = []
        training = [m for m in ctx.model.modules() if m.training]
        with ctx.as_reference():
            ctx.model.eval()
            for first in range(0, len(train), 8):
                batch = train.batch(range(first, min(first + 8, len(train))))
                found.append(self._measure(ctx, batch))
        for m in training:
            m.training = True
        return torch.cat(found)

    @torch.no_grad()
    def _measure(self, ctx: Context, batch: Batch) -> Tensor:
        keys = ("input_ids", "attention_mask", "position_ids")
        inputs = {k: batch[k] for k in keys if batch.get(k) is not None}
        return mean_losses(ctx.model(**inputs, use_cache=False).logits.float(), batch).cpu()

    @torch.no_grad()
    def _rescore(self, state: SchedulerState) -> None:
        train = state.ctx.streams["train"]
        for first in range(0, len(train), 16):
            rows = list(range(first, min(first + 16, len(train))))
            state.scheduler.refresh(torch.tensor(rows), train.batch(rows))

    # ---- a step

    def on_batch(self, state: SchedulerState, batch: Batch, ctx: Context) -> Batch:
        """The batch with trusted rows behind its own, every row with its weight."""
        ids = batch["sample_ids"]
        rows = state.rows(ids)
        self._begin(state, ctx.step())
        if self._weighs and (self.recompute or self.scheduler == "neural"):
            state.batches.append((rows, batch))
        own = batch.get("sample_weight")
        factor = torch.ones(len(ids)) if own is None else own.clone()
        if self._weighs:
            factor = factor.to(ids.device).float() * state.scheduler.weights(rows, batch).to(ids.device).float()
        share, lam = self._shares(ctx)
        if not self._anchored:
            return {**batch, "sample_weight": factor.to(ids.device)}
        count = len(ids) * self.ratio
        drawn = state.safe.drawn(state.cursor, count, ctx.seed, STREAM)
        state.cursor += count
        safe = dict(state.safe.batch(drawn))
        safe["sample_ids"] = -1 - safe["sample_ids"]  # never taken for a training row
        safe["task_ids"] = torch.zeros_like(safe["task_ids"])  # their own tasks' numbers are none of the run's
        whole = joined(batch, safe)
        # the objective's mean over all rows becomes a mean over each kind
        own_part = factor.to(ids.device) * share * (1 + self.ratio)
        trusted = torch.full((count,), lam * (1 + 1 / self.ratio), device=ids.device)
        whole["sample_weight"] = torch.cat([own_part, trusted.to(own_part)])
        return whole

    def _begin(self, state: SchedulerState, step: int) -> None:
        """Forget the last step's batches; refuse an objective that never tells of its rows' losses."""
        if state.at == step:
            return
        if self._weighs and state.at >= 0 and not state.updates:
            raise BadInput(
                "The scheduler learns from each row's loss, and the objective reports none. Use objective: {kind: "
                "task_balanced, mode: case2}, or another one on tokens."
            )
        state.at, state.batches = step, []

    def _shares(self, ctx: Context) -> tuple[float, float]:
        """Factors of the training rows' mean and of the trusted rows' mean."""
        if self.mode != "mixed":
            return 1.0, 1.0
        lam = max(0.0, self.lam - self.lam_drop * ctx.step() / max(1, ctx.total_steps))
        return 1 - lam, lam

    def observe(self, state: SchedulerState, sample_ids: Tensor, outcomes: dict[str, Tensor]) -> None:
        """The scheduler's step: the losses of the step's own forward, or measured again."""
        kept = state.batches
        if not self._weighs or "sample_ce" not in outcomes:
            return
        mine = sample_ids >= 0
        rows, losses = state.rows(sample_ids[mine]), outcomes["sample_ce"][mine].detach().float().cpu()
        if self.recompute:
            losses = torch.cat([self._measure(state.ctx, batch) for _, batch in kept])
            rows = torch.cat([found for found, _ in kept])
        state.losses[rows] = losses
        seen = self._centred(state, rows, losses)
        if self.scheduler == "scalar":
            state.scheduler.update(rows, seen)
        else:
            start = 0
            for found, batch in kept:
                state.scheduler.update(found, seen[start : start + len(found)], batch)
                start += len(found)
        state.updates += 1
        self._after(state)

    def _centred(self, state: SchedulerState, rows: Tensor, losses: Tensor) -> Tensor:
        if self.baseline == "base":
            assert state.reference is not None
            return losses - state.reference[rows]
        if self.baseline == "none":
            return losses
        tasks, out = state.tasks[rows], losses.clone()
        for task in tasks.unique().tolist():
            here = losses[tasks == task].mean().item()
            state.level[task] = 0.9 * state.level.get(task, here) + 0.1 * here
            out[tasks == task] -= state.level[task]
        return out

    def _after(self, state: SchedulerState) -> None:
        count = len(state.names)
        every = self.refresh_every
        if self.scheduler == "neural" and not self.frozen and every is not None and state.updates % every == 0:
            self._rescore(state)
            state.scheduler.settle()
        weights = state.scheduler.all_weights()
        if state.updates > self.burn_in:
            state.posterior.add(weights)
        if state.updates % max(1, count // 16) == 0:
            state.curve.append({"update": float(state.updates), **summary(weights.float().cpu(), state.posterior)})

    def save(self, state: SchedulerState, folder: Path) -> None:
        """`scheduler.safetensors`, `weights.jsonl` (row id, weight, posterior mean and deviation, last loss) and
        `report.json` in an existing folder."""
        import json

        tensors = {k: v.contiguous().cpu() for k, v in state.scheduler.tensors().items()}
        write_tensors(folder / "scheduler.safetensors", tensors, state.words)
        weights = state.scheduler.all_weights().float().cpu()
        columns = (state.names, weights.tolist(), state.posterior.mean.tolist(), state.posterior.std.tolist())
        lines = [
            json.dumps({"id": n, "weight": w, "mean": m, "std": s, "loss": loss if math.isfinite(loss) else None})
            for n, w, m, s, loss in zip(*columns, state.losses.tolist())
        ]
        write_text(folder / "weights.jsonl", "".join(line + "\n" for line in lines))
        write_json(folder / "report.json", state.report())
