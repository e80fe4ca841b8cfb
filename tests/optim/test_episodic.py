"""Episodes: the inner loop, its outer gradients, what it leaves untouched, and what is refused."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn import functional as F

from pegbox.engine.problem import MicroLoss, StepProblem, total_counts
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.optim.base import OPTIM
from pegbox.optim.episodic import episodes_of
from pegbox.parts.context import Context
from pegbox.parts.episodes import Inner, adapt, swapped
from pegbox.parts.priors import held, prior_layers
from pegbox.tasks.text import TextTask
from pegbox.testing import tiny_batch, tiny_llama
from pegbox.tuners.axis import TUNER

PRIORS = [{"kind": "kl_to_prior", "weight": 1.0, "warmup": 0.0}, {"kind": "prior", "weight": 1.0}]
LORA = {"kind": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
GAUSS = {"kind": "bayesian_lora", "r": 4}


def model_with(block, shake=0.05):
    model = tiny_llama()
    torch.manual_seed(0)
    wrapped = TUNER.validate(block).attach(model, None, Context(model=model))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(shake * torch.randn_like(p))
    return wrapped


def batches(tasks=2):
    found = []
    for task in range(tasks):
        for query in (0, 1):
            found.append({**tiny_batch(seed=10 * task + query), "episode": torch.tensor([task, query])})
    return found


def problem_of(model, terms=(), given=None):
    objective = OBJECTIVE.validate({"terms": list(terms)})
    ctx = Context(model=model)
    loss = MicroLoss(objective, objective.setup(ctx), TextTask().view(model), ctx)
    given = given if given is not None else batches()
    return StepProblem(loss, given, total_counts(objective, given), model)


def step(**options):
    return OPTIM.validate({"kind": "episodic", **options})


def estimate(model, terms=(), given=None, **options):
    problem, optim = problem_of(model, terms, given), step(**options)
    torch.manual_seed(1)
    log = optim.estimate(optim.setup(Context(model=model)), problem)
    return log, {name: p.grad.clone() for name, p in problem.params.items()}


def snapshot(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


# ---- the inner loop


def test_without_priors_the_inner_loop_is_plain_descent_on_lora():
    """With beta = gamma = 0 and a vanishing spread the inner steps are those of SGD on LoRA, step for step."""
    ours = model_with({**GAUSS, "c": 1e-12, "target_modules": ["q_proj", "v_proj"]}, shake=0.0)
    lora = model_with({**LORA, "lora_alpha": 16}, shake=0.0)
    pairs = {}
    theirs = dict(lora.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "gauss_mean_" in name:
                other = theirs[name.replace("gauss_mean_", "lora_").replace(".default", ".default.weight")]
                p.copy_(other.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(pairs))))
                pairs[name] = other
            elif "gauss_spread" in name:
                p.zero_()
    problem = problem_of(ours)
    sgd = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.5)
    plain = problem_of(lora)
    for steps in (1, 2, 3):
        sgd.zero_grad()
        sum(loss for n, loss in plain.apart(0, [0]) if not n.startswith("_")).backward()
        sgd.step()
        with held(ours):
            phi = adapt(
                ours, problem.params, [lambda: dict(problem.apart(0, [0]))["tokens"]], Inner(steps=steps, lr=0.5)
            )
        for name, other in pairs.items():
            torch.testing.assert_close(phi[name], other.detach(), atol=1e-5, rtol=1e-5)


def test_no_steps_leave_theta():
    """K = 0: phi is theta exactly."""
    model = model_with(GAUSS)
    problem = problem_of(model, PRIORS)
    with held(model):
        phi = adapt(model, problem.params, [], Inner(steps=0))
    assert all(torch.equal(phi[name], p) for name, p in problem.params.items())


def moved(model, beta, rule="auto", steps=4, lr=0.5):
    problem = problem_of(model, [{"kind": "kl_to_prior", "weight": beta, "per": "sum", "warmup": 0.0}])
    torch.manual_seed(2)
    with held(model):
        losses = [lambda: sum(v for n, v in problem.apart(0, [0]) if not n.startswith("_"))]
        phi = adapt(model, problem.params, losses, Inner(steps=steps, lr=lr, rule=rule))
    return sum(float((phi[n] - p).square().sum()) for n, p in problem.params.items()) ** 0.5


def test_a_stronger_prior_moves_less():
    """In the stable range the displacement falls with beta; beyond it, implicit steps hold it down."""
    model = model_with({**GAUSS, "c": 0.5}, shake=0.02).eval()
    distances = [moved(model, beta) for beta in (0, 1e-3, 1e-2, 0.1, 1, 1e2, 1e4, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4 * distances[0]


def test_explicit_steps_beyond_stability_are_refused():
    model = model_with({**GAUSS, "c": 0.5}, shake=0.02).eval()
    assert moved(model, 1e-4, rule="explicit") == moved(model, 1e-4)
    with pytest.raises(BadInput, match="must stay below 1"):
        moved(model, 1e4, rule="explicit")


def test_steps_by_norm_move_every_tensor_alike():
    model = model_with(LORA)
    problem = problem_of(model)
    losses = [lambda: dict(problem.apart(0, [0]))["tokens"]]
    phi = adapt(model, problem.params, losses, Inner(steps=1, lr=0.1, scale="tensor"))
    for name, p in problem.params.items():
        assert float((phi[name] - p).norm()) == pytest.approx(0.1, rel=1e-4)


# ---- what stays as it was


@pytest.mark.parametrize("block", [GAUSS, LORA, {"kind": "full"}])
def test_theta_and_base_stay_bit_for_bit(block):
    """Also after an exception in the middle."""
    model = model_with(block)
    before, parameters = snapshot(model), {n: id(p) for n, p in model.named_parameters()}
    terms = PRIORS if block is GAUSS else ()
    estimate(model, terms, inner={"steps": 3, "lr": 0.1})
    problem = problem_of(model)

    def fail():
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="middle"), held(model):
        adapt(model, problem.params, [lambda: dict(problem.apart(0, [0]))["tokens"], fail], Inner(steps=2))
    after = snapshot(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert parameters == {n: id(p) for n, p in model.named_parameters()}
    assert all(layer.prior is None for layer in prior_layers(model))


def test_memory_does_not_grow_with_tasks():
    """As many tensors live after 12 tasks as after 2."""
    model, counts = model_with(GAUSS), []
    optim = step(inner={"steps": 1})
    for tasks in (2, 2, 12):
        problem = problem_of(model, PRIORS, batches(tasks))
        optim.estimate(optim.setup(Context(model=model)), problem)
        del problem
        gc.collect()
        counts.append(sum(torch.is_tensor(o) for o in gc.get_objects()))
    assert counts[1] == counts[2]


def test_swapped_reaches_tied_weights():
    model = tiny_llama(tie_word_embeddings=True)
    new = torch.zeros_like(model.lm_head.weight)
    with swapped(model, {"model.embed_tokens.weight": new}):
        assert model.lm_head.weight is new
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- outer gradients


def learnt(problem, i):
    """phi after two steps on micro-batch i."""
    losses = [lambda: dict(problem.apart(i, [i]))["tokens"]]
    return adapt(problem.model, problem.params, losses, Inner(steps=2, lr=0.2))


def test_first_order_maml_is_the_querys_gradient_at_phi():
    model = model_with(LORA)
    _, grads = estimate(model, inner={"steps": 2, "lr": 0.2})
    problem, wanted = problem_of(model), {}
    for support, query in ((0, 1), (2, 3)):
        phi = learnt(problem, support)
        with swapped(model, phi):
            found = torch.autograd.grad(dict(problem.apart(query, [query]))["tokens"], list(phi.values()))
        for name, grad in zip(phi, found):
            wanted[name] = wanted.get(name, 0) + grad / 2
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-5)


def test_reptile_is_the_difference():
    model = model_with(LORA)
    log, grads = estimate(model, data_grad="difference", inner={"steps": 2, "lr": 0.2})
    problem = problem_of(model)
    ends = [learnt(problem, i) for i in (0, 2)]
    for name, p in problem.params.items():
        wanted = (p - (ends[0][name] + ends[1][name]) / 2).detach()
        torch.testing.assert_close(grads[name], wanted, atol=1e-6, rtol=1e-5)
    assert log.readings["episode/tokens"] > 0


def test_the_priors_terms_pull_theta_alone():
    """Without the data's gradient, the outer gradient is that of the terms with phi fixed."""
    model = model_with(GAUSS)
    _, grads = estimate(model, PRIORS, data_grad="none", inner={"steps": 3, "lr": 0.3})
    assert any(g.abs().sum() > 0 for g in grads.values())
    _, none = estimate(model, (), data_grad="none", inner={"steps": 3, "lr": 0.3})
    assert all(g.abs().sum() == 0 for g in none.values())


@pytest.mark.parametrize("terms", [(), PRIORS])
def test_second_order_is_the_finite_difference(terms):
    """Order 2 differentiates the query's loss after the inner steps; checked against differences in a direction."""
    block = {**GAUSS, "c": 1e-6} if terms else LORA
    model = model_with({**block, "target_modules": ["q_proj"]}, shake=0.2).double().eval()
    optim = step(order=2, inner={"steps": 2, "lr": 0.1, "rule": "explicit"})
    weak = [{**t, "weight": 1e-12} for t in terms]
    problem = problem_of(model, weak)

    def value():
        torch.manual_seed(0)
        log = optim.estimate(optim.setup(Context(model=model)), problem)
        return float(log.loss), {n: p.grad.clone() for n, p in problem.params.items()}

    _, grads = value()
    torch.manual_seed(3)
    direction = {n: torch.randn_like(p) for n, p in problem.params.items() if "spread" not in n}
    ends = []
    for sign in (1, -2):
        for name, d in direction.items():
            problem.params[name].data += sign * 1e-4 * d
        ends.append(value()[0])
    slope = (ends[0] - ends[1]) / 2e-4
    assert sum(float((grads[n] * d).sum()) for n, d in direction.items()) == pytest.approx(slope, rel=2e-2)


def test_a_carried_posterior_goes_on_from_task_to_task():
    model = model_with(GAUSS)
    optim, problem = step(begin="carry", data_grad="none", inner={"steps": 1}), problem_of(model, PRIORS)
    state = optim.setup(Context(model=model))
    optim.estimate(state, problem)
    first = {n: p.clone() for n, p in state.phi.items()}
    assert first.keys() == problem.params.keys()
    again = optim.setup(Context(model=model))
    again.load_state_dict(state.state_dict())
    optim.estimate(again, problem)
    assert any(not torch.equal(first[n], again.phi[n]) for n in first)


def test_readings_name_every_term():
    log, _ = estimate(model_with(GAUSS), PRIORS, inner={"steps": 2})
    assert {"episode/tokens", "episode/kl_to_prior", "episode/prior", "episode/moved", "episode/support_first"} <= set(
        log.readings
    )
    assert float(log.loss) == pytest.approx(
        sum(log.readings[f"episode/{k}"] for k in ("tokens", "kl_to_prior", "prior"))
    )


# ---- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner": {"steps": -1}}, "steps"),
        ({"inner": {"lr": 0}}, "lr"),
        ({"order": 2, "data_grad": "none"}, "order: 2"),
        ({"begin": "carry"}, "carried over"),
        ({"update": "mezo"}, "plain optimizer"),
        ({"update": "nothing"}, "Unknown optim"),
    ],
)
def test_options(options, words):
    with pytest.raises(BadInput, match=words):
        step(**options)


@pytest.mark.parametrize("term", ["kl_to_prior", "prior"])
def test_negative_weights_of_terms(term):
    with pytest.raises(BadInput, match="weight"):
        OBJECTIVE.validate({"terms": [{"kind": term, "weight": -1.0}]})


def test_terms_need_layers_with_a_distribution():
    with pytest.raises(BadInput, match="bayesian_lora"):
        problem_of(model_with(LORA), PRIORS)


def test_batches_must_be_episodes_with_support():
    with pytest.raises(BadInput, match=r"protocol: \{kind: meta\}"):
        episodes_of([tiny_batch()])
    with pytest.raises(BadInput, match="no support"):
        episodes_of([{"episode": torch.tensor([0, 1])}])


def test_second_order_and_checkpointing():
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(Unsupported, match="checkpointing"):
        step(order=2).setup(Context(model=model))


def test_plain_scores_equal_the_closed_forms():
    """Inside `differentiable_twice` values and first gradients are what they are outside."""
    from pegbox.parts.tokens import differentiable_twice, score

    logits = torch.randn(5, 11, requires_grad=True)
    other, targets = torch.randn(5, 11), torch.randint(11, (5,))
    for direction in ("forward", "reverse"):
        outside = score(logits, targets, other, direction=direction, mean=True)
        with differentiable_twice():
            inside = score(logits, targets, other, direction=direction, mean=True)
        for a, b in zip(outside, inside):
            torch.testing.assert_close(a, b)
            if a.requires_grad:
                found = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (a, b)]
                torch.testing.assert_close(*found)
    with differentiable_twice():
        torch.testing.assert_close(score(logits, targets).logp, -F.cross_entropy(logits, targets, reduction="none"))
