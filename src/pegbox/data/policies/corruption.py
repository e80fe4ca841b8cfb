"""`corruption`: a random part of the answer's INPUT tokens is replaced, the labels stay: Masked Thought fine-tuning.

    hit_i = [u_i < r(step)] for every answer token i,   input_i = MASK where hit,   labels unchanged

A hit at i harms only the prediction of later positions. Prompt, first token and padding are never touched, position ids
and attention mask neither (except form `drop`). Each time a sample is seen it is corrupted anew; evaluation is clean.

Paper: arXiv:2403.02178. It acts on the collated batch on its device, right before the forward, so it composes with
every objective (a reference sees the same corrupted inputs) and tuner, padded or packed, and needs no worker's counter:
u_i is a hash of (seed, optimizer step, sample id, number of the token in its answer). It is therefore the same for any
number of workers, any batch size, padding side or resume point, and on every device.

What it does not do: noise or dropout on embeddings (positions are changed as tokens only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pegbox.data.base import DATA, DataPolicy
from pegbox.data.policies.rates import RATE, RateSchedule, Ratio
from pegbox.errors import BadInput, Unsupported
from pegbox.parts.context import Context, seed_of
from pegbox.parts.tokens import IGNORE, shift
from pegbox.parts.view import Batch

__all__ = ["Corruption", "CorruptionState", "answer_tokens", "corrupt", "keyed_uniform", "ordinals"]

Form = Literal["mask", "existing", "random", "drop", "self_sampled"]
_GOLDEN = -7046029254386353131  # 2^64 / phi as a signed integer: the increment of splitmix64


# ---- pure functions -------------------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64 (products wrap; shifts are logical)."""
    for multiplier, bits in ((-4658895280553007687, 30), (-7723592293110705685, 27)):
        x = (x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def keyed_uniform(seed: int, keys: Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64: a function of seed, key and counter alone. Shapes broadcast."""
    start = torch.tensor(seed, dtype=torch.int64, device=counters.device)
    state = _mix(_mix(start + keys * _GOLDEN) + (counters + 1) * _GOLDEN)
    return ((state >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def answer_tokens(batch: Batch) -> Tensor:
    """(B, T) bool: inputs that are answer tokens, i.e. whose own label is predicted from the position before."""
    _, valid = shift(batch["labels"], batch.get("sequence_ids"), batch.get("position_ids"), batch.get("attention_mask"))
    return F.pad(valid[:, :-1], (1, 0))


def ordinals(answer: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
    """(B, T) the number of each answer token among its sample's, from 0; restarts with each packed sequence."""
    before = answer.cumsum(-1) - answer.long()
    return before if sequence_ids is None else before - _before(before, sequence_ids)


def corrupt(input_ids: Tensor, hit: Tensor, replacement: Tensor | int) -> Tensor:
    """`replacement` where `hit`, the inputs elsewhere."""
    return torch.where(hit, torch.as_tensor(replacement, dtype=input_ids.dtype, device=input_ids.device), input_ids)


# ---- the policy -----------------------------------------------------------------------------------------------------


@dataclass
class CorruptionState:
    """What the tokenizer and the model say: the replacing id, ids that stay, the marker's ids, the vocabulary."""

    mask_id: int
    protected: list[int]
    marker: list[int]
    vocabulary: int

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept: every draw follows from the step."""


@DATA.register
class Corruption(DataPolicy):
    """Token corruption of answers.

    Args:
        rate: R, the share of answer tokens that is replaced once the schedule has reached it.
        schedule: how the rate gets there.
        form: what is put at a chosen position. mask: the added token `token` (`prepare: [{kind: add_token}]`);
            existing: an id that the vocabulary has already; random: with probability `replace_rate` a uniform random
            id, else `token`; drop: `token`, and no position attends to it; self_sampled: what the model itself says
            there (one further forward without gradient).
        token: the replacing token (text or id). existing: None takes the tokenizer's unk, else pad.
        replace_rate: for form random.
        temperature: for form self_sampled; 0 takes the most likely token.
        protect: tokens that stay: "eos", "special" (all special tokens), or a token's text.
        protect_from: a text such as "####" from which on the answer stays.
    """

    reproduces: ClassVar[str] = "arXiv:2403.02178"
    acts_on_views: ClassVar[bool] = True

    kind: Literal["corruption"] = "corruption"
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.2
    schedule: Annotated[RateSchedule, RATE] = Field(default_factory=Ratio)
    form: Form = "mask"
    token: str | int | None = None
    replace_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    protect: tuple[str, ...] = ()
    protect_from: str = ""

    def model_post_init(self, context: Any, /) -> None:
        for name, form in (("replace_rate", "random"), ("temperature", "self_sampled")):
            if getattr(self, name) is not None and self.form != form:
                raise BadInput(
                    f"data.corruption.{name} belongs to form '{form}', but form is '{self.form}'. Remove it."
                )
        if self.form == "self_sampled" and self.token is not None:
            raise BadInput("data.corruption.token has no use with form 'self_sampled'. Remove it.")
        self.schedule.check(self.rate, 0)

    def setup(self, ctx: Context) -> CorruptionState:
        self.schedule.check(self.rate, ctx.total_steps)
        embedding = ctx.model.get_input_embeddings()  # type: ignore[operator]
        rows, known = embedding.weight.shape[0], len(ctx.tokenizer)
        mask_id = self._mask_id(ctx.tokenizer)
        if mask_id >= rows:
            raise BadInput(
                f"The replacing token has id {mask_id}, but the model has {rows} embeddings. Resize the model "
                "(prepare: [{kind: add_token}] does), or take form: existing."
            )
        marker = ctx.tokenizer(self.protect_from, add_special_tokens=False)["input_ids"] if self.protect_from else []
        return CorruptionState(mask_id, self._protected(ctx.tokenizer), list(marker), min(rows, known))

    def prepare(self, dataset: Sequence[dict[str, Any]], ctx: Context) -> Sequence[dict[str, Any]]:
        """Checks that there is something to corrupt and that the replacing token means nothing else."""
        mask_id = self._mask_id(ctx.tokenizer) if self._needs_token else -1
        learnt = False
        for i, example in enumerate(dataset):
            labels = example.get("labels")
            if labels is None:
                raise BadInput(f"Example {i} has no labels: corruption acts on answer tokens, which labels tell apart.")
            ids = set(torch.as_tensor(labels).tolist())
            learnt = learnt or bool(ids - {IGNORE})
            if mask_id in ids:
                raise BadInput(
                    f"Example {i} has the replacing token {mask_id} among its answer's labels, so a masked position "
                    "could not be told from a real one. Choose another `token`, or add one (prepare: add_token)."
                )
        if len(dataset) and not learnt:
            raise BadInput("No example has an answer token (all labels are -100), so there is nothing to corrupt.")
        return dataset

    def on_batch(self, state: CorruptionState, batch: Batch, ctx: Context) -> Batch:
        """The corrupted batch, with the hit positions under `corrupted_ids`; the batch itself at rate 0."""
        step = ctx.step()
        rate = self.schedule.rate(self.rate, step, ctx.total_steps, ctx.seed)
        if rate <= 0:
            return batch
        if batch.get("labels") is None:
            raise BadInput("The batch has no labels: corruption acts on answer tokens, which labels tell apart.")
        answer = answer_tokens(batch)
        keys, counters = _keys(batch), ordinals(answer, batch.get("sequence_ids"))
        hit = answer & (keyed_uniform(seed_of(ctx.seed, "corruption", step), keys, counters) < rate)
        hit &= ~self._kept(state, batch)
        changed = {**batch, "corrupted_ids": hit}
        changed["input_ids"] = corrupt(
            batch["input_ids"], hit, self._replacement(state, batch, hit, keys, counters, ctx)
        )
        if self.form == "drop":
            changed["attention_mask"] = _dropped(batch, hit)
        return changed

    @property
    def _needs_token(self) -> bool:
        return self.form != "self_sampled" and not (self.form == "random" and self._share == 1)

    @property
    def _share(self) -> float:
        return 1.0 if self.replace_rate is None else self.replace_rate

    def _mask_id(self, tokenizer: Any) -> int:
        if not self._needs_token:
            return 0
        token = self.token
        if token is None and self.form == "existing":
            token = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id
        token = "<mask>" if token is None and self.form != "existing" else token
        found = token if isinstance(token, int) else _id_of(tokenizer, token)
        if found is None:
            raise BadInput(
                f"The tokenizer has no token {token!r} to put at masked positions. Add it (prepare: [{{kind: "
                "add_token}]), or take form: existing with a token of the vocabulary."
            )
        return found

    def _protected(self, tokenizer: Any) -> list[int]:
        ids: set[int] = set()
        for name in self.protect:
            if name == "eos":
                ids.add(tokenizer.eos_token_id)
            elif name == "special":
                ids.update(tokenizer.all_special_ids)
            else:
                found = _id_of(tokenizer, name)
                if found is None:
                    raise BadInput(f"data.corruption.protect: '{name}' is neither 'eos', 'special' nor a token.")
                ids.add(found)
        return sorted(ids)

    def _kept(self, state: CorruptionState, batch: Batch) -> Tensor:
        """(B, T) protected positions."""
        ids: Tensor = batch["input_ids"]
        kept = torch.isin(ids, torch.tensor(state.protected, dtype=ids.dtype, device=ids.device))
        width = len(state.marker)
        if not width or ids.shape[1] < width:
            return kept
        pattern = torch.tensor(state.marker, dtype=ids.dtype, device=ids.device)
        found = F.pad((ids.unfold(1, width, 1) == pattern).all(-1), (0, width - 1))
        found &= answer_tokens(batch)
        since = found.long().cumsum(-1)
        if batch.get("sequence_ids") is not None:
            since = since - _before(since - found.long(), batch["sequence_ids"])
        return kept | (since > 0)

    def _replacement(
        self, state: CorruptionState, batch: Batch, hit: Tensor, keys: Tensor, counters: Tensor, ctx: Context
    ) -> Tensor | int:
        if self.form == "self_sampled":
            seed = seed_of(ctx.seed, "corruption sample", ctx.step())
            return _own_words(
                ctx, batch, hit, self.temperature or 0.0, lambda k: keyed_uniform(seed + k, keys, counters)
            )
        if self.form != "random":
            return state.mask_id
        which = keyed_uniform(seed_of(ctx.seed, "corruption which", ctx.step()), keys, counters) < self._share
        u = keyed_uniform(seed_of(ctx.seed, "corruption id", ctx.step()), keys, counters)
        return torch.where(which, (u * state.vocabulary).long(), state.mask_id)


def _id_of(tokenizer: Any, token: str | None) -> int | None:
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get(token) if token is not None else None


def _keys(batch: Batch) -> Tensor:
    """(B, 1), or (B, T) where rows are packed: one key per sample, its id; a hash of its tokens if it has none."""
    ids, rows = batch.get("sample_ids"), batch.get("sequence_ids")
    if ids is None:
        answer = answer_tokens(batch)
        content = _mix(batch["input_ids"].long() + (answer.cumsum(-1) << 32))
        return torch.where(answer, content, 0).sum(-1, keepdim=True)
    ids = torch.as_tensor(ids, device=batch["input_ids"].device).long()
    return ids[:, None] if rows is None else ids[rows.clamp(min=0)]


def _before(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """(B, T) a rising count's value where each packed sequence begins."""
    first = torch.ones_like(sequence_ids, dtype=torch.bool)
    first[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return torch.where(first, values, 0).cummax(-1).values


def _dropped(batch: Batch, hit: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    if batch.get("sequence_ids") is not None or (mask is not None and mask.ndim != 2):
        raise Unsupported("Form 'drop' hides positions through a (B, T) attention mask, which packed rows don't have.")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return mask.masked_fill(hit, 0)


@torch.no_grad()
def _own_words(ctx: Context, batch: Batch, hit: Tensor, temperature: float, draw: Any) -> Tensor:
    """(B, T) ids: at each hit position what the model gives after the clean prefix before it."""
    ids = batch["input_ids"]
    columns = hit.any(0).nonzero()[:, 0]
    if not columns.numel():
        return ids
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if batch.get(k) is not None}
    training = [m for m in ctx.model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        logits = ctx.model(**inputs, use_cache=False, logits_to_keep=columns - 1).logits  # (B, hit columns, V)
    finally:
        for m in training:
            m.training = True
    if temperature > 0:  # one keyed number per position, through the inverse of the cumulated distribution
        below = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
        u = draw(0).expand_as(ids)[:, columns, None] * below[..., -1:]
        picked = torch.searchsorted(below, u.contiguous(), right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
    else:
        picked = logits.argmax(-1)
    out = ids.clone()
    out[:, columns] = picked.to(ids.dtype)
    return out
