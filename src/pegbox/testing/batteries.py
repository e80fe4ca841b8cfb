"""Batteries: what every part of an axis must hold, whatever it does. Derive a test class and set `component`.

Needs pytest.

Only contracts are tested here; what a method itself promises is tested beside it.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pegbox.parts.allocation import Allocation, Entries, Units
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.component import Component
from pegbox.parts.context import Context
from pegbox.testing.fakes import tiny_batch, tiny_llama, tiny_tokenizer

__all__ = [
    "AnalysisBattery",
    "DecoderBattery",
    "ObjectiveBattery",
    "PolicyBattery",
    "PreparationBattery",
    "SelectorBattery",
    "StepBattery",
    "TunerBattery",
    "WeightOpBattery",
]


class Battery:
    """What holds for every component: its block reads back, and unknown keys are refused."""

    component: ClassVar[Any]
    axis: ClassVar[str] = ""

    def make(self) -> Any:
        return self.component

    def test_its_block_reads_back(self) -> None:
        from pegbox.parts.component import AXES

        component = self.make()
        again = AXES[self.axis].validate(component.model_dump(mode="json"))
        assert again == component

    def test_unknown_keys_are_refused(self) -> None:
        from pegbox.errors import BadInput
        from pegbox.parts.component import AXES

        with pytest.raises(BadInput, match="no_such_option"):
            AXES[self.axis].validate({**self.make().model_dump(mode="json"), "no_such_option": 1})

    def test_it_is_frozen(self) -> None:
        assert isinstance(self.make(), Component)
        assert type(self.make()).model_config.get("frozen") is True


class SelectorBattery(Battery):
    """Selectors: deterministic for a seed, inside the model, as many as counted, saved and read unchanged."""

    axis = "select"

    def model(self) -> nn.Module:
        return tiny_llama()

    def stats(self, model: nn.Module) -> Any:
        """Override where the selector needs statistics."""
        return None

    def allocate(self, seed: int = 0) -> tuple[nn.Module, Allocation]:
        model = self.model()
        generator = torch.Generator().manual_seed(seed)
        weights = dict(model.named_parameters())
        return model, self.make().select(Anatomy.of(model), weights, self.stats(model), generator)

    def test_same_seed_same_selection(self) -> None:
        assert self.allocate(3)[1].digest() == self.allocate(3)[1].digest()

    def test_it_selects_inside_the_model(self) -> None:
        model, allocation = self.allocate()
        named = dict(model.named_parameters())
        assert allocation
        for name, choice in allocation.items():
            assert name in named
            if isinstance(choice, Entries):
                index = choice.index.long()
                assert index.numel() == index.unique().numel()
                assert torch.equal(index, index.sort().values)
                assert int(index.min()) >= 0
                assert int(index.max()) < named[name].numel()
            if isinstance(choice, Units):
                assert int(choice.index.max()) < named[name].shape[choice.axis]

    def test_it_changes_nothing(self) -> None:
        model = self.model()
        before = copy.deepcopy(model.state_dict())
        weights = dict(model.named_parameters())
        self.make().select(Anatomy.of(model), weights, self.stats(model), torch.Generator().manual_seed(0))
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_count_from_shapes_is_the_count(self) -> None:
        model, allocation = self.allocate()
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        counted = {n: c for n, c in self.make().count(Anatomy.of(model), shapes).items() if c}
        assert sum(counted.values()) == sum(allocation.trained(shapes).values())

    def test_saved_and_read(self, tmp_path: Path) -> None:
        _, allocation = self.allocate()
        allocation.save(tmp_path / "a.safetensors")
        assert Allocation.load(tmp_path / "a.safetensors").digest() == allocation.digest()


class TunerBattery(Battery):
    """Tuners: nothing changes at attachment, updates are saved and loaded exactly, the base comes back."""

    axis = "tuner"
    allocation: ClassVar[Allocation | None] = None
    starts_at_base: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-6

    def model(self) -> nn.Module:
        return tiny_llama()

    def attached(self, dtype: torch.dtype = torch.float32) -> Any:
        base = self.model().to(dtype)
        torch.manual_seed(0)  # PEFT draws its initial values from the global generator
        return self.make().attach(base, self.allocation, Context(base, seed=1, tokenizer=tiny_tokenizer()))

    def moved(self, steps: int = 2, dtype: torch.dtype = torch.float32) -> Any:
        """Attached and trained a little, so that the update is not nothing."""
        model = self.attached(dtype)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2)
        batch = tiny_batch()
        for _ in range(steps):
            loss = model(**_inputs(batch), labels=batch["labels"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    def test_attached_it_answers_as_the_base(self) -> None:
        if not self.starts_at_base:
            return
        assert torch.allclose(_logits(self.attached()), _logits(self.model()), atol=self.tolerance)

    def test_something_trains_and_moves(self) -> None:
        assert not torch.allclose(_logits(self.moved()), _logits(self.model()), atol=1e-4)

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model = self.moved()
        self.make().save(model, tmp_path)
        wanted = _logits(model)
        loaded = self.make().load(self.model(), tmp_path)
        assert torch.allclose(_logits(loaded), wanted, atol=self.tolerance)
        assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".md"}

    def test_loaded_again_it_can_train_on(self, tmp_path: Path) -> None:
        self.make().save(self.moved(), tmp_path)
        loaded = self.make().load(self.model(), tmp_path, trainable=True)
        assert any(p.requires_grad for p in loaded.parameters())

    def test_the_base_comes_back(self) -> None:
        if not type(self.make()).reference_view:
            return
        model = self.moved()
        tuned = _logits(model)
        with self.make().reference(model):
            assert torch.allclose(_logits(model), _logits(self.model()), atol=self.tolerance)
        assert torch.equal(_logits(model), tuned)

    def test_the_base_comes_back_after_an_exception(self) -> None:
        if not type(self.make()).reference_view:
            return
        model = self.moved()
        tuned = _logits(model)
        try:
            with self.make().reference(model):
                raise KeyError("stop")
        except KeyError:
            pass
        assert torch.equal(_logits(model), tuned)

    def test_merging_keeps_the_answers(self) -> None:
        if type(self.make()).merge == "no" or not hasattr(self.attached(), "merge_and_unload"):
            return
        model = self.moved()
        wanted = _logits(model)
        assert torch.allclose(_logits(model.merge_and_unload()), wanted, atol=1e-4)

    def test_half_precision_bases_train(self) -> None:
        model = self.moved(dtype=torch.bfloat16)
        assert torch.isfinite(_logits(model)).all()

    def test_gradient_checkpointing_gives_the_same_gradient(self) -> None:
        plain, checkpointed = (self._gradients(on) for on in (False, True))
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name

    def _gradients(self, checkpointing: bool) -> dict[str, Tensor]:
        model = self.attached()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = tiny_batch()
        model(**_inputs(batch), labels=batch["labels"]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def test_no_position_sees_later_ones(self) -> None:
        if not type(self.make()).keeps_causality:
            return
        model = self.moved()
        embed = model.get_input_embeddings()
        ids = tiny_batch(rows=1)["input_ids"]
        rows = embed(ids).detach().requires_grad_(True)
        out = model(inputs_embeds=rows).logits[:, -ids.shape[1] :]
        out[0, 4].sum().backward()
        assert rows.grad is not None
        assert rows.grad[0, 5:].abs().max() == 0
        assert rows.grad[0, :5].abs().max() > 0


class ObjectiveBattery(Battery):
    """Objectives: they divide by what they counted, so cutting a step into micro-batches changes nothing."""

    axis = "objective"
    tolerance: ClassVar[float] = 1e-5

    def view(self) -> Any:
        from pegbox.tasks.views import CausalView

        return CausalView(tiny_llama())

    def context(self, view: Any) -> Context:
        return Context(view.model, seed=1, tokenizer=tiny_tokenizer(), total_steps=10)

    def total(self, view: Any, state: Any, batches: list[dict[str, Any]]) -> Tensor:
        """The step's loss over its micro-batches."""
        objective = self.make()
        counted = [objective.count(b) for b in batches]
        totals = {k: torch.stack([c[k].double() for c in counted]).sum() for k in counted[0]}
        loss = torch.zeros(())
        for batch in batches:
            with torch.no_grad():
                ref = objective.reference(state, view, batch)
            for name, value in objective.losses(state, view, batch, totals, ref):
                if not name.startswith("_"):
                    loss = loss + value
        return loss

    def test_micro_batches_add_up(self) -> None:
        view = self.view()
        state = self.make().setup(self.context(view))
        batch = tiny_batch(rows=4)
        halves = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
        whole, cut = self.total(view, state, [batch]), self.total(view, state, halves)
        assert torch.allclose(whole, cut, rtol=self.tolerance, atol=self.tolerance)

    def test_padding_does_not_count(self) -> None:
        view = self.view()
        state = self.make().setup(self.context(view))
        batch = tiny_batch()
        fills = {"input_ids": 258, "attention_mask": 0, "labels": -100}
        longer = {
            k: torch.cat([v, torch.full((v.shape[0], 3), fills[k])], 1) if k in fills else v for k, v in batch.items()
        }
        assert torch.allclose(
            self.total(view, state, [batch]), self.total(view, state, [longer]), rtol=1e-4, atol=self.tolerance
        )

    def test_the_value_is_the_sum_of_the_losses(self) -> None:
        objective, view = self.make(), self.view()
        if not type(objective).has_value:
            return
        state, batch = objective.setup(self.context(view)), tiny_batch()
        with torch.no_grad():
            ref = objective.reference(state, view, batch)
            value = objective.value(state, view, batch, objective.count(batch), ref)
        assert value is not None
        assert torch.allclose(value, self.total(view, state, [batch]).detach(), atol=self.tolerance)

    def test_gradients_are_finite_and_not_all_zero(self) -> None:
        view = self.view()
        state = self.make().setup(self.context(view))
        self.total(view, state, [tiny_batch()]).backward()
        gradients = [p.grad for p in view.model.parameters() if p.grad is not None]
        assert gradients
        assert all(torch.isfinite(g).all() for g in gradients)
        assert max(float(g.abs().max()) for g in gradients) > 0


class StepBattery(Battery):
    """Optimizers: they lower a quadratic, skip what does not train, and go on exactly after a save."""

    axis = "optim"

    def parameters(self) -> dict[str, nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return {
            "a.weight": nn.Parameter(torch.randn(4, 3, generator=generator)),
            "a.bias": nn.Parameter(torch.randn(4, generator=generator)),
        }

    def build(self, named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return self.make().optimizer([{"params": list(named.items())}])

    @staticmethod
    def walk(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = torch.stack([(p**2).sum() for p in named.values()]).sum()
            loss.backward()
            optimizer.step()
        return float(loss)

    def test_it_lowers_a_quadratic(self) -> None:
        if not type(self.make()).needs_backward:
            return
        named = self.parameters()
        first = float(sum((p**2).sum() for p in named.values()))
        assert self.walk(named, self.build(named), 20) < first

    def test_it_goes_on_exactly_after_a_save(self) -> None:
        if not type(self.make()).needs_backward:
            return
        straight, cut = self.parameters(), self.parameters()
        self.walk(straight, self.build(straight), 6)
        optimizer = self.build(cut)
        self.walk(cut, optimizer, 3)
        kept = copy.deepcopy(optimizer.state_dict())
        optimizer = self.build(cut)
        optimizer.load_state_dict(kept)
        self.walk(cut, optimizer, 3)
        assert all(torch.equal(straight[n], cut[n]) for n in straight)

    def test_its_rate_ends_where_the_schedule_says(self) -> None:
        factor = self.make().factor(20)
        values = [factor(step) for step in range(21)]
        assert all(0 <= v <= 1 + 1e-12 for v in values)
        assert max(values) > 0.9


class PolicyBattery(Battery):
    """Data policies: the same for a seed and a step, labels left alone unless declared, nothing outside targets hit."""

    axis = "data"

    def changed(self, step: int = 5, seed: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
        model = tiny_llama()
        ctx = Context(model, seed=seed, total_steps=10, step=lambda: step, tokenizer=tiny_tokenizer())
        policy, batch = self.make(), tiny_batch()
        kept = {k: v.clone() for k, v in batch.items()}
        return kept, dict(policy.on_batch(policy.setup(ctx), batch, ctx))

    def test_same_seed_and_step_same_batch(self) -> None:
        (_, first), (_, second) = self.changed(), self.changed()
        assert all(torch.equal(first[k], second[k]) for k in first if isinstance(first[k], Tensor))

    def test_labels_stay(self) -> None:
        before, after = self.changed()
        if not type(self.make()).changes_labels:
            assert torch.equal(before["labels"], after["labels"])

    def test_the_given_batch_is_not_written_into(self) -> None:
        model, batch = tiny_llama(), tiny_batch()
        kept = {k: v.clone() for k, v in batch.items()}
        ctx = Context(model, seed=1, total_steps=10, step=lambda: 5, tokenizer=tiny_tokenizer())
        self.make().on_batch(self.make().setup(ctx), batch, ctx)
        assert all(torch.equal(kept[k], batch[k]) for k in kept)


class PreparationBattery(Battery):
    """Preparations: the model computes the same where declared, and replay from the record gives the same weights."""

    axis = "prepare"
    tolerance: ClassVar[float] = 1e-4

    def batches(self) -> Any:
        return lambda: iter([tiny_batch(seed=s) for s in range(4)])

    def prepared(self) -> tuple[nn.Module, dict[str, Any]]:
        model = tiny_llama()
        ctx = Context(model, seed=1, tokenizer=tiny_tokenizer())
        record = self.make().apply(model, self.batches(), ctx)
        return model, record

    def test_replay_gives_the_same_weights(self, tmp_path: Path) -> None:
        model, record = self.prepared()
        self.make().save(record, tmp_path)
        again = tiny_llama()
        self.make().replay(again, tmp_path)
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".safetensors", ".json"}


class WeightOpBattery(Battery):
    """Weight operations: all tensors once, in the base's dtype; an update of nothing gives the base."""

    axis = "weights"
    tuned_inputs: ClassVar[int] = 1

    def states(self, shift: float) -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
        model = tiny_llama()
        base = {n: p.detach() for n, p in model.named_parameters()}
        tuned = []
        for i in range(self.tuned_inputs):
            generator = torch.Generator().manual_seed(i)
            tuned.append({n: t + shift * torch.randn(t.shape, generator=generator) for n, t in base.items()})
        return model, base, tuned

    def test_every_tensor_once(self) -> None:
        model, base, tuned = self.states(0.1)
        found = list(self.make().apply(base, tuned, Anatomy.of(model)))
        assert sorted(n for n, _ in found) == sorted(base)
        assert all(t.dtype == base[n].dtype and t.shape == base[n].shape for n, t in found)

    def test_no_update_gives_the_base(self) -> None:
        model, base, tuned = self.states(0.0)
        found = dict(self.make().apply(base, tuned, Anatomy.of(model)))
        assert all(torch.equal(found[n], base[n]) for n in base)

    def test_a_missing_tensor_is_named(self) -> None:
        from pegbox.errors import BadInput

        model, base, tuned = self.states(0.1)
        name = next(iter(base))
        del tuned[0][name]
        with pytest.raises(BadInput, match=name):
            list(self.make().apply(base, tuned, Anatomy.of(model)))


class DecoderBattery(Battery):
    """Decoders: caches, padding and streaming change nothing; a seed decides; the models are as before.

    Every role is a tiny model near the base (`reward`: a classifier with one output); override `options` for what a
    configuration can't hold. `greedy`: whether a greedy call gives the same answer each time.
    """

    axis = "decode"
    greedy: ClassVar[bool] = True

    def options(self) -> dict[str, Any]:
        return {}

    def near(self, seed: int) -> Any:
        """The base moved a little, so that it answers otherwise."""
        model = tiny_llama()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=generator))
        model.generation_config.eos_token_id = None
        return model.eval()

    def role(self, name: str, seed: int) -> Any:
        from types import SimpleNamespace

        if name not in ("reward", "baseline_reward"):
            return self.near(seed)
        from transformers import LlamaForSequenceClassification

        config = tiny_llama().config
        config.num_labels = 1
        scorer = LlamaForSequenceClassification(config).eval()
        return SimpleNamespace(model=scorer, tokenizer=tiny_tokenizer(), active=lambda: nullcontext(scorer))

    def bound(self) -> Any:
        from pegbox.decode.base import DecodeContext

        component = self.make()
        models = {name: self.role(name, seed) for seed, name in enumerate(component.roles(), 2)}
        base = self.near(0) if type(component).needs_tuned else None
        return component.bind(DecodeContext(self.near(1), tiny_tokenizer(), models, base, self.options()))

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Two prompts of different length, padded on the left."""
        ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        return ids, mask

    def answers(self, decoding: Any, rows: slice = slice(0, 2), skip: int = 0, **options: Any) -> Tensor:
        ids, mask = (t[rows, skip:] for t in self.prompts())
        torch.manual_seed(0)
        given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 258, **options}
        return decoding.generate(ids, **given)[:, ids.shape[1] :]

    def test_the_same_seed_gives_the_same_answers(self) -> None:
        decoding = self.bound()
        for sample in (False, True):
            first, second = (self.answers(decoding, do_sample=sample, top_k=0) for _ in range(2))
            assert torch.equal(first, second)

    def test_caches_change_nothing(self) -> None:
        decoding = self.bound()
        assert torch.equal(self.answers(decoding), self.answers(decoding, use_cache=False))

    def test_a_padded_batch_gives_what_its_rows_give(self) -> None:
        if not self.greedy:
            return
        together = self.answers(self.bound())
        assert torch.equal(together[:1], self.answers(self.bound(), slice(0, 1), skip=3))
        assert torch.equal(together[1:], self.answers(self.bound(), slice(1, 2)))

    def test_the_models_are_as_before(self) -> None:
        decoding = self.bound()
        models = [decoding.host, *decoding.__dict__["others"]]
        decoding.host.train()
        before = [copy.deepcopy(m.state_dict()) for m in models]
        flags = [[(p.requires_grad, m.training) for p in m.parameters()] for m in models]
        self.answers(decoding)
        for model, state, kept in zip(models, before, flags):
            assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
            assert [(p.requires_grad, model.training) for p in model.parameters()] == kept

    def test_it_answers_messages_and_streams(self) -> None:
        from pegbox.parts.generation import generate, stream

        decoding, messages = self.bound(), [{"role": "user", "content": "hello"}]
        whole = generate(decoding, decoding.tokenizer, [messages, messages], max_new_tokens=5)
        pieces = list(stream(decoding, decoding.tokenizer, messages, max_new_tokens=5))
        if self.greedy:
            assert whole == ["".join(pieces)] * 2

    def test_it_scores_whole_texts_or_says_that_it_does_not(self) -> None:
        from pegbox.errors import Unsupported

        decoding, (ids, mask) = self.bound(), self.prompts()
        if not type(self.make()).scores:
            with pytest.raises(Unsupported, match="probability"):
                decoding(input_ids=ids)
            return
        logits = decoding(input_ids=ids, attention_mask=mask).logits[1]
        assert torch.allclose(logits.exp().sum(-1), torch.ones(ids.shape[1]), atol=1e-5)
        assert torch.equal(self.answers(decoding)[1, :1], logits[-1:].argmax(-1))

    def test_its_summary_can_be_written(self) -> None:
        import json

        decoding = self.bound()
        self.answers(decoding)
        assert json.loads(json.dumps(decoding.summary())) == decoding.summary()

    def test_beams_are_refused(self) -> None:
        from pegbox.errors import Unsupported

        decoding = self.bound()
        if not decoding.plain():
            with pytest.raises(Unsupported, match="num_beams"):
                self.answers(decoding, num_beams=2)


class AnalysisBattery(Battery):
    """Analyses: a finding that can be written and drawn, the same for a seed; the models are as before."""

    axis = "analyze"

    def subject(self, folder: Any, shift: float = 0.05) -> Any:
        from pegbox.testing.subject import TinySubject

        return TinySubject(folder, shift)

    def test_its_finding_is_plain_and_reads_back(self, tmp_path: Any) -> None:
        import json

        from pegbox.parts.findings import Finding

        found = self.make().run(self.subject(tmp_path))
        again = Finding.model_validate(json.loads(json.dumps(found.model_dump(mode="json"), allow_nan=False)))
        assert again.numbers.keys() == found.numbers.keys()
        assert found.kind == self.make().kind
        assert found.title
        assert len({p.key for p in found.pictures}) == len(found.pictures)

    def test_it_finds_the_same_again(self, tmp_path: Any) -> None:
        first, second = (self.make().run(self.subject(tmp_path / n)) for n in "ab")
        assert first.model_dump_json() == second.model_dump_json()

    def test_the_models_are_as_before(self, tmp_path: Any) -> None:
        subject = self.subject(tmp_path)
        before = subject.digest()
        self.make().run(subject)
        assert subject.digest() == before


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """(2, 10, V) logits on fixed rows without padding."""
    model.eval()
    ids = tiny_batch(rows=2, pad=0, seed=9)["input_ids"]
    return model(input_ids=ids).logits[:, -ids.shape[1] :].float()
