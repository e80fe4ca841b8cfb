"""MeZO's step: equal to an explicit vector, exact where it says so, and without a trace where none is allowed."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from optim.zeroth import Bench, Mlp, class_loss, llama, next_token_loss
from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.optim import OPTIM, spsa
from pegbox.optim.perturbation import InPlace
from pegbox.parts.directions import Directions

RESTORES = ["in_place", "exact", "snapshot"]


def noise(seed, params, scheme="keyed"):
    whole = {n: [] for n in params}
    for name, _, z in Directions(scheme).walk(seed, params):
        whole[name].append(z.reshape(-1).clone())
    return {n: torch.cat(p).view(params[n].shape) for n, p in whole.items()}


@pytest.mark.parametrize("scheme", ["keyed", "sequential"])
@pytest.mark.parametrize("restore", RESTORES)
def test_a_step_equals_the_explicit_vector(restore, scheme):
    bench = Bench(Mlp(), class_loss, restore=restore, scheme=scheme, lr=0.1, eps=1e-3, weight_decay=0.3)
    before = bench.weights()
    log = bench.run()
    (seed,), z = bench.state.trajectory.seeds, None
    z = noise(seed, before, scheme)

    def at(offset):
        with torch.no_grad():
            return float(class_loss_at({n: w + offset * 1e-3 * z[n] for n, w in before.items()}))

    plus, minus = at(1), at(-1)
    p = (plus - minus) / 2e-3
    assert log.applied
    assert float(log.loss) == pytest.approx(plus, abs=1e-12)
    assert log.readings["projected_gradient"] == pytest.approx(p, abs=1e-9)
    for name, w in before.items():
        decay = 0.3 if w.ndim == 2 else 0.0
        expected = w - 0.1 * (bench.state.trajectory.projected[0] * z[name] + decay * w)
        torch.testing.assert_close(bench.weights()[name], expected, atol=1e-12, rtol=0)


def class_loss_at(weights):
    net = Mlp()
    logits = torch.func.functional_call(net, weights, (net.x,))
    return nn.functional.cross_entropy(logits, net.y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
@pytest.mark.parametrize("scheme", ["keyed", "sequential"])
def test_exact_ways_leave_every_bit(dtype, restore, scheme):
    bench = Bench(llama(dtype), next_token_loss, restore=restore, scheme=scheme, then="sgd", eps=1e-2)
    before = bench.weights()
    bench.run()
    assert all(torch.equal(w, before[n]) for n, w in bench.weights().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_and_snapshot_take_the_same_step_bit_for_bit(dtype):
    runs = []
    for restore in ("exact", "snapshot"):
        bench = Bench(llama(dtype, tie_word_embeddings=True), next_token_loss, restore=restore, samples=2, lr=1e-2)
        bench.run(3)
        runs.append((bench.weights(), bench.state.trajectory))
    assert runs[0][1].projected == runs[1][1].projected
    assert all(torch.equal(w, runs[1][0][n]) for n, w in runs[0][0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_drifts_by_few_roundings(dtype):
    model, eps = llama(dtype), 1e-3
    params = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in params.items()}
    mover = InPlace(params, Directions(), eps, model)
    for offset in (1, -1):
        mover.move(7, offset)
    mover.home()
    z = noise(7, before)
    for n, p in params.items():
        size = torch.maximum(before[n].abs(), eps * z[n].abs()).float()
        ulp = torch.finfo(dtype).eps * 2 ** torch.floor(torch.log2(size.clamp(min=torch.finfo(dtype).tiny)))
        assert ((p.detach().float() - before[n].float()).abs() <= 4 * ulp).all()


def test_sixteen_bit_weights_are_restored_exactly_unless_told_otherwise():
    for dtype, expected in [(torch.bfloat16, "exact"), (torch.float32, "in_place")]:
        bench = Bench(llama(dtype), next_token_loss)
        bench.run()
        assert bench.state.trajectory.header.restore == expected


@pytest.mark.parametrize("restore", RESTORES)
def test_a_step_leaves_no_trace(restore):
    model = llama(attention_dropout=0.5)
    bench = Bench(model, next_token_loss, restore=restore, samples=2)
    model.train()
    model.lm_head.eval()
    flags = [m.training for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bench.run()
    assert saved == []
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert bench.forwards == 4


def test_randomness_inside_the_objective_is_the_same_on_both_sides():
    drawn = []

    def value(model):
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        assert not model.training
        return class_loss(model)

    bench = Bench(Mlp().train(), value)
    bench.run()
    assert drawn[0] == drawn[1]


def test_forwards():
    for options, expected in [({}, 2), ({"samples": 3}, 6), ({"samples": 3, "sides": 1}, 4)]:
        bench = Bench(Mlp(), class_loss, **options)
        bench.run()
        assert bench.forwards == expected


def test_one_side_is_a_forward_difference():
    bench = Bench(Mlp(), class_loss, sides=1, eps=1e-6)
    before = bench.weights()
    log = bench.run()
    z = noise(bench.state.trajectory.seeds[0], before)
    leaves = {n: w.requires_grad_() for n, w in before.items()}
    grads = torch.autograd.grad(class_loss_at(leaves), list(leaves.values()))
    slope = sum(float((g * z[n]).sum()) for n, g in zip(leaves, grads, strict=True))
    assert log.readings["projected_gradient"] == pytest.approx(slope, rel=1e-4)


def test_projected_gradient_agrees_with_autograd_and_its_error_falls_with_eps_squared():
    errors = []
    for eps in (1e-2, 1e-3, 1e-4):
        bench = Bench(Mlp(), class_loss, eps=eps)
        leaves = {n: w.requires_grad_() for n, w in bench.weights().items()}
        grads = torch.autograd.grad(class_loss_at(leaves), list(leaves.values()))
        log = bench.run()
        z = noise(bench.state.trajectory.seeds[0], leaves)
        slope = sum(float((g * z[n]).sum()) for n, g in zip(leaves, grads, strict=True))
        errors.append(abs(log.readings["projected_gradient"] - slope) / abs(slope))
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50


def test_projected_gradient_on_a_llama():
    model = llama(torch.float64)
    bench = Bench(model, next_token_loss, eps=1e-3)
    grads = torch.autograd.grad(next_token_loss(model), list(bench.params.values()))
    before = bench.weights()
    log = bench.run()
    z = noise(bench.state.trajectory.seeds[0], before)
    slope = sum(float((g * z[n]).sum()) for n, g in zip(bench.params, grads, strict=True))
    assert log.readings["projected_gradient"] == pytest.approx(slope, rel=1e-2)


def test_mean_of_estimates_points_along_the_gradient():
    net = Mlp()
    leaves = dict(net.named_parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(class_loss(net), list(leaves.values()))])
    bench = Bench(net, class_loss, samples=400, restore="snapshot", then="sgd", eps=1e-4)
    bench.run()
    estimate = torch.cat([p.grad.flatten() for p in bench.params.values()])
    cosine = float(torch.cosine_similarity(estimate, gradient, dim=0))
    expected = spsa.expected_cosine(400, gradient.numel())
    assert cosine == pytest.approx(expected, rel=0.15)


def test_the_mean_of_samples_and_their_sum():
    ends = {}
    for combine in ("mean", "sum"):
        bench = Bench(Mlp(), class_loss, samples=4, combine=combine, restore="exact", lr=1e-2)
        start = bench.weights()
        bench.run()
        ends[combine] = {n: w - start[n] for n, w in bench.weights().items()}
    for n, moved in ends["sum"].items():
        torch.testing.assert_close(moved, 4 * ends["mean"][n], atol=1e-12, rtol=0)


def test_sample_schedule():
    assert [spsa.sample_count("linear", 8, t, 20) for t in (0, 5, 10, 19)] == [1, 2, 4, 7]
    assert spsa.sample_count("constant", 8, 0, 20) == 8
    bench = Bench(Mlp(), class_loss, samples=8, sample_schedule="linear")
    bench.run(6)
    assert bench.state.trajectory.samples == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
def test_every_distribution_goes_down(distribution):
    bench = Bench(Mlp(), class_loss, distribution=distribution, lr=0.05, samples=4)
    start = float(class_loss(bench.model))
    bench.run(40)
    assert float(class_loss(bench.model)) < start - 0.05


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("bad_call", [1, 2])
def test_a_value_that_is_not_finite_moves_nothing(restore, bad_call):
    calls = []

    def value(model):
        calls.append(1)
        return math.nan if len(calls) == bad_call else class_loss(model)

    bench = Bench(Mlp(), value, restore=restore)
    before = bench.weights()
    bench.model.train()
    with pytest.raises(RunFailed, match="nan"):
        bench.run()
    assert bench.model.training
    assert len(bench.state.trajectory) == 0
    for n, w in bench.weights().items():
        torch.testing.assert_close(w, before[n], atol=1e-15 if restore == "in_place" else 0, rtol=0)


@pytest.mark.parametrize("restore", RESTORES)
def test_an_interruption_restores_the_weights(restore):
    def value(model):
        raise KeyboardInterrupt

    bench = Bench(Mlp(), value, restore=restore)
    before = bench.weights()
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    for n, w in bench.weights().items():
        torch.testing.assert_close(w, before[n], atol=1e-15, rtol=0)


def test_an_interrupted_pass_knows_which_pieces_moved():
    net = Mlp()
    params = dict(net.named_parameters())
    before = {n: p.detach().clone() for n, p in params.items()}
    mover = InPlace(params, Directions(), 0.5)
    walk = Directions.walk

    class Cut(Directions):
        def walk(self, seed, tensors):
            for i, item in enumerate(walk(self, seed, tensors)):
                if i == 2:
                    raise KeyboardInterrupt
                yield item

    mover.directions = Cut()
    with pytest.raises(KeyboardInterrupt):
        mover.move(1, 1)
    assert not torch.equal(params["first.weight"], before["first.weight"])
    mover.directions = Directions()
    mover.home()
    for n, p in params.items():
        torch.testing.assert_close(p.detach(), before[n], atol=1e-15, rtol=0)


def test_tied_embeddings_are_moved_once():
    for restore in RESTORES:
        model = llama(tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        bench = Bench(model, next_token_loss, restore=restore)
        names = list(bench.params)
        bench.run()
        assert list(bench.state.trajectory.header.names) == names
        assert "lm_head.weight" not in names


def test_frozen_tensors_stay():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().clone()
    Bench(model, next_token_loss, lr=0.1).run(2)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_an_objective_without_gradient():
    """Minus accuracy: the value is piecewise constant, only its samples lead anywhere."""

    def errors(model):
        return 1.0 - (model(model.x).argmax(-1) == model.y).double().mean()

    bench = Bench(Mlp(), errors, eps=0.3, lr=0.3, samples=4)
    start = float(errors(bench.model))
    bench.run(60)
    assert float(errors(bench.model)) <= start - 0.3


def test_the_estimate_as_a_gradient_for_another_optimizer():
    bench = Bench(Mlp(), class_loss, then={"kind": "adamw", "betas": [0.5, 0.9]}, lr=0.02, weight_decay=0.1)
    optimizer = bench.step.optimizer([{"params": list(bench.params.items())}])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {g["lr"] for g in optimizer.param_groups} == {0.02}
    start = float(class_loss(bench.model))
    for _ in range(30):
        optimizer.zero_grad()
        assert not bench.run().applied
        optimizer.step()
    assert float(class_loss(bench.model)) < start - 0.1
    assert bench.state.trajectory is None


def test_buffer_with_plain_descent_equals_the_step_in_place():
    direct = Bench(Mlp(), class_loss, restore="exact", lr=0.05, weight_decay=0.2, samples=2)
    direct.run(3)
    buffered = Bench(
        Mlp(), class_loss, restore="exact", lr=0.05, weight_decay=0.2, samples=2, then="sgd", schedule="constant"
    )
    optimizer = buffered.step.optimizer([{"params": list(buffered.params.items())}])
    for _ in range(3):
        optimizer.zero_grad()
        buffered.run()
        optimizer.step()
    for n, w in direct.weights().items():
        torch.testing.assert_close(w, buffered.weights()[n], atol=1e-7, rtol=0)


def test_the_state_resumes_where_it_was():
    whole = Bench(Mlp(), class_loss, lr=0.05)
    whole.run(6)
    first = Bench(Mlp(), class_loss, lr=0.05)
    first.run(3)
    second = Bench(Mlp(), class_loss, lr=0.05)
    second.model.load_state_dict(first.model.state_dict())
    second.state.load_state_dict(first.state.state_dict())
    second.finished = 3
    second.run(3)
    assert second.state.trajectory == whole.state.trajectory
    assert all(torch.equal(w, second.weights()[n]) for n, w in whole.weights().items())


def test_a_weight_that_reaches_the_model_unseen_is_moved_by_copy():
    class Aliased(nn.Module):
        """Uses an alias of its weight, which is another object over the same memory."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(3, dtype=torch.float64))
            self.b = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.alias = [self.w.detach()]

        def forward(self, x):
            return x @ self.alias[0] + self.b

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = []
    for restore in ("exact", "snapshot"):
        bench = Bench(Aliased(), lambda m: (m(x) - 1).square().mean(), restore=restore, lr=0.01)
        bench.run(3)
        runs.append((bench.weights(), bench.state.trajectory.projected))
        if restore == "exact":
            assert bench.state.by_copy == {"w"}
            assert bench.forwards == 7  # the first evaluation was repeated
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(w, runs[1][0][n]) for n, w in runs[0][0].items())


@pytest.mark.parametrize("restore", RESTORES)
def test_modules_that_cache_their_values_are_told(restore):
    class Cached(nn.Module):
        """Holds a product of its values and renews it only when told."""

        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.touch()

        def touch(self):
            self.cache = self.values.detach() * 2

        def forward(self, x):
            return x * self.cache

    x = torch.arange(3, dtype=torch.float64)
    bench = Bench(Cached(), lambda m: (m(x) - 5).square().mean(), restore=restore, lr=1e-3)
    log = bench.run()
    assert log.readings["projected_gradient"] != 0
    assert torch.equal(bench.model.cache, bench.model.values.detach() * 2)


# ---- refusals


@pytest.mark.parametrize(
    "block",
    [
        {"eps": 0},
        {"eps": -1e-3},
        {"eps": math.inf},
        {"samples": 0},
        {"sides": 3},
        {"restore": "hope"},
        {"max_grad_norm": 1.0},
        {"then": "mezo"},
        {"then": {"kind": "adamw", "lr": 1e-3}},
        {"scheme": "official"},
    ],
)
def test_bad_options(block):
    with pytest.raises(BadInput):
        OPTIM.validate({"kind": "mezo", **block})


def test_a_resolved_block_validates_again():
    step = OPTIM.validate({"kind": "mezo", "then": {"kind": "adamw", "betas": [0.5, 0.9]}})
    assert OPTIM.validate(step.model_dump(mode="json")) == step
    assert OPTIM.validate({"kind": "mezo"}).model_dump(mode="json")["then"] is None


def test_nothing_to_train_and_integers_are_refused():
    model = Mlp()
    model.requires_grad_(False)
    with pytest.raises(Unsupported, match="no tensor"):
        Bench(model, class_loss).run()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)

    bench = Bench(Whole(), lambda m: 1.0)
    with pytest.raises(Unsupported, match="int32"):
        bench.step._refuse({"w": bench.model.w})


def test_groups_without_a_scale_are_refused():
    with pytest.raises(BadInput, match="group 'head'"):
        spsa.per_tensor({"body": 1.0}, {"w": "head"}, ["w"])
    assert spsa.per_tensor({"body": 0.0}, {"w": "body"}, ["w"]) == {"w": 1.0}
    assert spsa.step_scale("variance", 3.0) == 3.0
    assert spsa.step_scale("expectation", 3.0) == 1.0
    assert spsa.zeroth_order_scales(lambda g: -2.0, ["a"]) == {"a": 2.0}
    norms = spsa.group_norms({"w": torch.full((4,), 2.0)}, {"w": "g"}, per_root=True)
    assert norms["g"] == pytest.approx(2.0)
