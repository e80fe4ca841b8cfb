"""The soft form of half fine-tuning: everything trains, and the half that would be frozen is drawn to its start."""

from __future__ import annotations

import itertools

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.objectives.terms import TERM
from pegbox.parts.allocation import Units, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.select import SELECT
from pegbox.testing import tiny_llama

HALF = {"kind": "half", "always_on": ["embedding", "head"]}


def term(weight=1.0, **outside):
    return TERM.validate({"kind": "l2_to_start", "weight": weight, "outside": {**HALF, **outside}})


def drawn(model, ctx, **options):
    selector = SELECT.validate({**HALF, **options})
    weights = dict(model.named_parameters())
    return selector.select(Anatomy.of(model), weights, None, ctx.generator("select", ctx.round))


@pytest.mark.parametrize("round_", [0, 3])
def test_it_covers_what_the_selection_of_the_round_leaves_out(round_):
    """The very complement of the split that training by halves would draw in this round."""
    model = tiny_llama()
    ctx = Context(model, seed=4, round=round_)
    state = term().setup(ctx)
    picked = drawn(model, ctx)
    assert set(state.tensors) == {n for n, _ in model.named_parameters()} - set(picked)
    other = Context(model, seed=4, round=round_ + 1)
    assert set(term().setup(other).tensors) != set(state.tensors)


def test_the_gradient_is_twice_lambda_times_the_distance_and_only_there():
    model = tiny_llama().double()
    ctx = Context(model, seed=1)
    made = term(weight=0.25)
    state = made.setup(ctx)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    value = made.penalty(state, model)
    value.backward()
    expected = sum(
        float((p - start[n]).detach().square().sum()) for n, p in model.named_parameters() if n in state.tensors
    )
    assert float(value) == pytest.approx(0.25 * expected)
    for name, p in model.named_parameters():
        if name in state.tensors:
            torch.testing.assert_close(p.grad, 0.5 * (p.detach() - start[name]))
        else:
            assert p.grad is None


def test_slices_are_covered_in_part():
    """Of a fused matrix the rows that are not drawn are held, the others are free."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    ctx = Context(model, seed=2)
    made, picked = term(slices=True), drawn(model, ctx, slices=True)
    state = made.setup(ctx)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    made.penalty(state, model).backward()
    names = [n for n, choice in picked.items() if isinstance(choice, Units)]
    assert names
    for name in names:
        free = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        free.index_fill_(picked[name].axis, picked[name].index.long(), True)
        gradient = model.get_parameter(name).grad
        assert torch.equal(gradient == 0, free)
        assert torch.allclose(gradient[~free], torch.tensor(2.0))


def test_a_larger_weight_holds_more_and_tends_to_freezing():
    """On a quadratic, minimised: the held part's distance falls with lambda, the free part tends to freezing's."""
    model = tiny_llama().double()
    ctx = Context(model, seed=0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    goal = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in start.items()}
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"]
    names += ["model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"]
    picked = [n for n in names if n in drawn(model, ctx)]
    held = [n for n in names if n not in picked]
    assert picked
    assert held

    def loss(weights):
        """Coupled, so that holding one half moves the other's optimum."""
        apart = sum((w - goal[n]).square().sum() for n, w in weights.items())
        return apart + (sum(w.sum() for w in weights.values()) / 16 - 1).square()

    def solved(lam, frozen=()):
        with torch.no_grad():
            for name, value in start.items():
                model.get_parameter(name).copy_(value)
        made = term(weight=lam)
        state = made.setup(ctx)
        weights = {n: model.get_parameter(n) for n in names}
        free = [w for n, w in weights.items() if n not in frozen]
        stepper = torch.optim.LBFGS(free, lr=1, max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure():
            stepper.zero_grad()
            total = loss(weights) + (made.penalty(state, model) if lam else 0)
            total.backward()
            return total

        stepper.step(closure)
        return {n: w.detach().clone() for n, w in weights.items()}

    limit = solved(0, frozen=held)
    found = [solved(lam) for lam in (0.0, 0.1, 1.0, 10.0, 1e3, 1e5)]
    distance = [sum(float((one[n] - start[n]).square().sum()) for n in held) for one in found]
    assert all(b < a for a, b in itertools.pairwise(distance))
    gaps = [max(float((one[n] - limit[n]).abs().max()) for n in picked) for one in found]
    assert gaps[-1] < 1e-3 * gaps[0]
    assert gaps[0] > 5e-3


def test_nothing_to_hold_and_selections_that_move_are_refused():
    model = tiny_llama()
    with pytest.raises(BadInput, match="leaves no trained weight"):
        term(ratio=1, always_on=["all"]).setup(Context(model))
    with pytest.raises(BadInput, match="statistics or moves"):
        term(schedule={"every": 5})
    with pytest.raises(BadInput, match="statistics or moves"):
        TERM.validate({"kind": "l2_to_start", "outside": {"kind": "change"}})
    with pytest.raises(BadInput, match="ratio"):
        term(ratio=2)


def test_a_whole_selection_is_what_the_selector_says():
    assert set(drawn(tiny_llama(), Context(tiny_llama())).values()) == {Whole()}
