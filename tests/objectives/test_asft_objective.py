"""ASFT: what must hold of its modes, its reference (copy, adapter switched off, role, cached) and its behaviour."""

import copy

import pytest
import torch

from objectives.steps import close, packed, padded, samples, step
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.asft import Asft, bound_gap, effective_sample_size
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama


def moved(model, seed=1, scale=0.05):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g), alpha=scale)
    return model


def lora(model=None, **options):
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj", "v_proj"], **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model or tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=2, **options))


def adapter_off(model):
    return Context(model, reference=model.disable_adapter)


# ---- modes ----


@pytest.mark.parametrize("kl", ["forward", "reverse", "k3"])
def test_no_anchor_is_dft_bit_for_bit(kl):
    model, batch = tiny_llama(), padded(samples())
    dft = step(OBJECTIVE.validate({"token": "dft"}), model, [batch])
    asft = step(Asft(lam=0.0, kl=kl), model, [batch])
    assert asft[0]["tokens"] == dft[0]["tokens"]
    assert all(torch.equal(asft[1][n], dft[1][n]) for n in dft[1])
    assert not Asft(lam=0.0).needs_reference
    assert step(Asft(mode="dft"), model, [batch])[0]["tokens"] == dft[0]["tokens"]


def test_gradient_is_the_closed_form():
    model, batch = tiny_llama().double(), padded(samples())
    objective = Asft(lam=0.3)
    state = objective.setup(Context(model))
    moved(model)
    view, totals = CausalView(model), objective.count(batch)
    ref = objective.reference(state, view, batch)
    hidden = view.hidden(batch).detach().requires_grad_()
    view.hidden = lambda b: hidden
    dict(objective.losses(state, view, batch, totals, ref))["tokens"].backward()
    targets, valid = view.targets(batch)
    with torch.no_grad():
        p = view.head(hidden[valid]).softmax(-1)
        r = CausalView(state.terms[0].model).logits(batch)[valid].softmax(-1)
        one = torch.nn.functional.one_hot(targets[valid], 288)
        py = p.gather(-1, targets[valid][:, None])
        expected = (py * (p - one) + 0.3 * (p - r)) / totals["tokens"] @ model.lm_head.weight
    assert torch.allclose(hidden.grad[valid], expected, rtol=0, atol=1e-12)
    assert not hidden.grad[~valid].any()


@pytest.mark.parametrize("kl", ["forward", "reverse", "k3"])
def test_at_the_start_the_anchor_does_nothing(kl):
    model, batch = tiny_llama(), padded(samples())
    dft = step(OBJECTIVE.validate({"token": "dft"}), model, [batch])
    asft = step(Asft(lam=1.0, kl=kl), model, [batch])
    assert abs(float(asft[0]["_kl_to_reference"])) < 1e-6
    assert close(dft[1], asft[1], 1e-7)


@pytest.mark.parametrize("kl", ["forward", "reverse", "k3"])
@pytest.mark.parametrize("mode", ["sft+kl", "asft"])
def test_padding_packing_cutting_and_chunks_change_nothing(mode, kl):
    model, items = tiny_llama(), samples()
    states = {c: Asft(mode=mode, kl=kl, lam=0.5, chunk=c) for c in (None, 3)}
    state = states[None].setup(Context(model))
    moved(model)
    whole = step(states[None], model, [padded(items)], state)
    for chunk, batches in (
        (3, [padded(items)]),
        (None, [padded(items, "left", extra=4)]),
        (None, [padded(items[:1]), padded(items[1:], extra=2)]),
        (3, [packed(items)]),
    ):
        got = step(states[chunk], model, batches, state)
        assert float(got[0]["tokens"]) == pytest.approx(float(whole[0]["tokens"]), abs=1e-6)
        assert close(whole[1], got[1])


def test_readings():
    model, batch = tiny_llama(), padded(samples())
    objective = Asft(lam=0.1)
    state = objective.setup(Context(model))
    losses, _ = step(objective, moved(model), [batch], state)
    n = float(objective.count(batch)["tokens"])
    assert {"_ce", "_p", "_rare", "_kl_to_reference", "_bound_gap", "_ess", "_kl_reverse_k3"} <= set(losses)
    assert float(losses["_bound_gap"]) > 0
    assert 1 <= float(losses["_ess"]) < n
    assert float(losses["_kl_reverse_k3"]) > 0
    assert effective_sample_size(torch.zeros(5)) == 5
    assert effective_sample_size(torch.tensor([0.0, -1000.0])) == 1
    assert effective_sample_size(torch.zeros(0)) == 0
    assert bound_gap(torch.tensor(-1.0), torch.tensor(-1.0)) == 0


# ---- references ----


@pytest.mark.parametrize("kl", ["forward", "k3"])
def test_adapter_off_equals_a_copy_of_the_base(kl):
    base, batch = tiny_llama(), padded(samples())
    model = moved(lora(copy.deepcopy(base)))
    objective = Asft(lam=0.5, kl=kl)
    off = step(objective, model, [batch], ctx=adapter_off(model))
    apart = OBJECTIVE.validate({"kind": "asft", "lam": 0.5, "kl": kl, "anchor": "teacher"})
    role = step(apart, model, [batch], ctx=Context(model, roles={"teacher": base}))
    assert off[0]["tokens"] == role[0]["tokens"]
    assert all(torch.equal(off[1][n], role[1][n]) for n in off[1])
    assert float(off[0]["_kl_to_reference"]) > 1e-4


@pytest.mark.parametrize("where", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("kl", ["forward", "k3"])
def test_an_adapter_on_the_head_is_switched_off_too(where, kl):
    base, batch = tiny_llama(), padded(samples())
    model = moved(lora(copy.deepcopy(base), **where))
    off = step(Asft(lam=0.5, kl=kl, chunk=4), model, [batch], ctx=adapter_off(model))
    role = step(Asft(lam=0.5, kl=kl, anchor="t"), model, [batch], ctx=Context(model, roles={"t": base}))
    assert float(off[0]["tokens"]) == pytest.approx(float(role[0]["tokens"]), abs=1e-6)


def snapshot(model):
    return {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}, [
        (n, m.training, getattr(m, "disable_adapters", None), str(getattr(m, "_active_adapter", None)))
        for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_reference_pass_leaves_no_trace(fails, monkeypatch):
    model, batch = moved(lora(lora_dropout=0.5)), padded(samples())
    model.train()
    model.base_model.model.model.layers[0].eval()  # a mode of its own
    objective, ctx = Asft(lam=0.5), adapter_off(model)
    state, view = objective.setup(ctx), CausalView(model)
    weights, modes = snapshot(model)
    random = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(model.base_model.model.model.norm, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            objective.reference(state, view, batch)
    else:
        first, second = (objective.reference(state, view, batch)[0] for _ in range(2))
        assert torch.equal(first.rows, second.rows)  # dropout is off
    after, modes_after = snapshot(model)
    assert modes == modes_after
    assert all(torch.equal(weights[n], after[n]) for n in weights)
    assert torch.equal(random, torch.get_rng_state())


def test_the_reference_keeps_no_graph():
    model, batch = moved(lora()), padded(samples())
    objective = Asft(lam=0.5)
    state = objective.setup(adapter_off(model))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ref = objective.reference(state, CausalView(model), batch)[0]
        logits = ref.tile(slice(0, 3))
    assert not saved
    assert not ref.rows.requires_grad
    assert not logits.requires_grad


def test_full_tuning_keeps_a_frozen_copy_and_no_adapter_needs_one():
    model = tiny_llama()
    state = Asft(lam=0.1).setup(Context(model))
    copy_ = state.terms[0].model
    before = {n: p.clone() for n, p in copy_.named_parameters()}
    assert not any(p.requires_grad for p in copy_.parameters())
    assert not copy_.training
    step(Asft(lam=0.1), moved(model), [padded(samples())], state)
    assert all(torch.equal(p, before[n]) for n, p in copy_.named_parameters())
    half = Asft(lam=0.1, reference_dtype="bfloat16").setup(Context(model))
    assert next(half.terms[0].model.parameters()).dtype == torch.bfloat16
    adapted = lora()
    assert Asft(lam=0.1).setup(adapter_off(adapted)).terms[0].model is None


def test_cached_references_are_run_once_per_sample():
    model, items = moved(lora()), samples()
    objective = Asft(lam=0.5, kl="k3", cache_reference=True)
    ctx = adapter_off(model)
    state = objective.setup(ctx)
    live = step(Asft(lam=0.5, kl="k3"), model, [padded(items)], ctx=ctx)
    first = step(objective, model, [padded(items)], state)
    order = [2, 0, 3, 1]
    again = step(objective, model, [padded([items[i] for i in order], "left", ids=torch.tensor(order))], state)
    assert state.terms[0].passes == 1
    assert live[0]["tokens"] == first[0]["tokens"]
    assert float(again[0]["tokens"]) == pytest.approx(float(first[0]["tokens"]), abs=1e-6)
    fresh = objective.setup(ctx)
    fresh.load_state_dict(state.state_dict())
    step(objective, model, [padded(items)], fresh)
    assert fresh.terms[0].passes == 0


def test_a_cache_that_can_not_be_right_is_refused():
    model, items = lora(), samples()
    objective = Asft(lam=0.5, kl="k3", cache_reference=True)
    state, view = objective.setup(adapter_off(model)), CausalView(model)
    batch = padded(items)
    with pytest.raises(Unsupported, match="changes the inputs"):
        objective.reference(state, view, {**batch, "corrupted_ids": torch.zeros_like(batch["input_ids"]).bool()})
    with pytest.raises(Unsupported, match="packed"):
        objective.reference(state, view, packed(items))
    with pytest.raises(BadInput, match="sample_ids"):
        objective.reference(state, view, {**batch, "sample_ids": None})
    objective.reference(state, view, batch)
    with pytest.raises(BadInput, match="length or mask changed"):
        objective.reference(state, view, padded(samples((9, 8, 7, 6))))


def test_references_that_can_not_be_right_are_refused():
    model = tiny_llama()
    with pytest.raises(BadInput, match="shares the storage of the trained weight"):
        Asft(anchor="teacher").setup(Context(model, roles={"teacher": model}))
    bigger = tiny_llama(vocab_size=300)
    with pytest.raises(BadInput, match="288 tokens, the reference 'teacher' has 300"):
        Asft(anchor="teacher").setup(Context(model, roles={"teacher": bigger}))
    with pytest.raises(BadInput, match=r"neither 'base' nor a role.*there: judge"):
        Asft(anchor="teacher").setup(Context(model, roles={"judge": bigger}))
    for bad in ({"lam": -0.1}, {"lam": float("nan")}, {"mode": "asf"}, {"kl": "fwd"}, {"label_smoothing": 0.1}):
        with pytest.raises(BadInput):
            OBJECTIVE.validate({"kind": "asft", **bad})


def test_virtual_tokens_in_front_are_aligned():
    from peft import PromptTuningConfig, get_peft_model

    base, batch = tiny_llama(), padded(samples())
    model = get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    off = step(Asft(lam=0.5), model, [batch], ctx=adapter_off(model))
    role = step(Asft(lam=0.5, anchor="t"), model, [batch], ctx=Context(model, roles={"t": base}))
    assert off[0]["tokens"] == role[0]["tokens"]
    assert float(off[0]["_kl_to_reference"]) > 0


# ---- behaviour ----


def test_dft_hardly_learns_a_token_the_base_gives_no_mass():
    """The gradient is scaled by p: a new token with p near 1/V grows far more slowly than under SFT."""
    grown = {}
    for mode in ("sft", "dft"):
        model = tiny_llama()
        ids = torch.arange(16)[None].repeat(4, 1)
        labels = torch.full_like(ids, -100)
        labels[:, 8:] = 280  # never an input before
        batch = {"input_ids": ids, "labels": labels}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        view = CausalView(model)
        _, valid = view.targets(batch)

        def probability(view=view, batch=batch, valid=valid):
            with torch.no_grad():
                return view.logits(batch)[valid].softmax(-1)[:, 280].mean().item()

        start = probability()
        for _ in range(20):
            step(Asft(mode=mode), model, [batch])
            optimizer.step()
        grown[mode] = probability() - start
    assert grown["sft"] > 0
    assert grown["dft"] / grown["sft"] < 0.1


def test_dft_equals_trls(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from pegbox.testing import tiny_tokenizer

    model, items = tiny_llama(), samples()
    batch = padded(items)
    ours, _ = step(OBJECTIVE.validate({"token": "dft"}), model, [batch])
    rows = [{"input_ids": i.tolist(), "labels": i.tolist()} for i, _ in items]
    args = SFTConfig(
        output_dir=str(tmp_path), loss_type="dft", report_to=[], use_cpu=True, bf16=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    theirs = trainer.compute_loss(trainer.model, inputs)
    assert float(theirs) == pytest.approx(float(ours["tokens"]), abs=1e-5)
