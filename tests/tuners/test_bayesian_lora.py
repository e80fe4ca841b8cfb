"""Gaussian low-rank adapters: what they are at the start, their samples, their divergence, what they leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.allocation import Allocation, Whole
from pegbox.parts.context import Context
from pegbox.parts.gaussians import (
    by_rows,
    implicit_rows,
    kl_diagonal,
    neg_log_prior,
    output_variance,
    proximal,
    spread_of,
)
from pegbox.parts.priors import drawn, held, prior_layers
from pegbox.testing import tiny_batch, tiny_llama
from pegbox.tuners.axis import TUNER
from pegbox.tuners.bayesian import BayesianLoraConfig, GaussianLayer
from pegbox.tuners.bayesian.layer import FACTORS
from pegbox.tuners.bayesian_lora import export_mean


def tuned(seed=0, shake=0.0, **options):
    model = tiny_llama(seed)
    wrapped = TUNER.validate({"kind": "bayesian_lora", "r": 4, **options}).attach(model, None, Context(model=model))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad and shake:
                p.add_(shake * torch.randn_like(p))
    return wrapped.eval()


def layer(rows=5, columns=7, r=2, shake=0.3, **options):
    torch.manual_seed(0)
    made = GaussianLayer(nn.Linear(columns, rows, bias=False), "x")
    made.add("default", BayesianLoraConfig(**{"r": r, "alpha": 2.0 * r, "c": 0.1, **options}))
    made.set_adapter("default")
    made.double()
    with torch.no_grad():
        for value in made.gaussian().values():
            value.add_(shake * torch.randn_like(value))
    return made


INPUTS = {k: v for k, v in tiny_batch().items() if k in ("input_ids", "attention_mask")}


# ---- the start


@pytest.mark.parametrize("space", ["weight", "factors"])
def test_the_mean_answers_as_the_base_at_the_start(space):
    """Untrained, mean mode is the base bit for bit; also with the adapter off."""
    base = tiny_llama()(**INPUTS).logits
    model = tuned(space=space)
    assert torch.equal(model(**INPUTS).logits, base)
    with TUNER.validate({"kind": "bayesian_lora"}).reference(model), drawn(model, "sample"):
        assert torch.equal(model(**INPUTS).logits, base)
    with drawn(model, "sample"):
        assert not torch.equal(model(**INPUTS).logits, base)


@pytest.mark.parametrize("draws", ["local", "weight"])
def test_sampled_outputs_have_the_variance_of_the_spread(draws):
    """At the start a sampled output varies by c^2 |x|^2; both ways of drawing agree with the moments, mean too."""
    made = layer(shake=0.0, draws=draws)
    x = torch.randn(3, 7, dtype=torch.float64)
    made.draw = "sample"
    with torch.no_grad():
        draws_ = torch.stack([made(x) for _ in range(2500)])
    torch.testing.assert_close(draws_.var(0), 0.01 * x.square().sum(-1, keepdim=True).expand(3, 5), rtol=0.2, atol=0)
    assert (draws_.mean(0) - made.base_layer(x)).abs().max() < 5 * 0.1 * x.norm(dim=-1).max() / 2500**0.5


@pytest.mark.parametrize("spread", ["linear", "softplus"])
def test_local_and_weight_draws_agree_away_from_the_start(spread):
    x = torch.randn(2, 7, dtype=torch.float64)
    moments = []
    for draws in ("local", "weight"):
        made = layer(draws=draws, spread=spread)
        made.draw = "sample"
        with torch.no_grad():
            out = torch.stack([made(x) for _ in range(2500)])
        mean, variance = made.moments(x)
        torch.testing.assert_close(out.var(0), variance.detach(), rtol=0.2, atol=0)
        assert ((out.mean(0) - made.base_layer(x) - mean).abs() < 5 * (variance / 2500).sqrt()).all()
        moments.append((mean, variance))
    torch.testing.assert_close(moments[0], moments[1])


@given(
    r=st.integers(1, 4),
    rows=st.integers(4, 70),
    columns=st.integers(4, 70),
    c=st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
)
def test_the_expanded_variance_is_the_square(r, rows, columns, c, seed):
    g = torch.Generator().manual_seed(seed)
    b, a, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((rows, r), (r, columns), (3, columns)))
    wanted = x.square() @ (0.7 * b @ a + c).square().T
    torch.testing.assert_close(output_variance(x, b, a, 0.7, c), wanted, rtol=1e-9, atol=1e-9)
    soft = spread_of(0.7 * b @ a, c, "softplus")
    torch.testing.assert_close(output_variance(x, b, a, 0.7, c, "softplus"), x.square() @ soft.square().T)


# ---- the divergence


@given(seed=st.integers(0, 50))
def test_divergence_is_torchs(seed):
    """KL equals torch.distributions' to 1e-10, is never negative, and 0 for equal distributions only."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    spreads = torch.rand(2, 4, 5, generator=g, dtype=torch.float64) + 0.05
    ours = kl_diagonal(means[0], spreads[0] ** 2, means[1], spreads[1] ** 2)
    theirs = kl_divergence(Normal(means[0], spreads[0]), Normal(means[1], spreads[1])).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert ours > 0
    assert kl_diagonal(means[0], spreads[0] ** 2, means[0], spreads[0] ** 2) == 0


@pytest.mark.parametrize("options", [{}, {"spread": "softplus"}, {"space": "factors", "draws": "weight"}])
def test_a_layers_divergence_has_autograds_gradient_in_all_eight_factors(options):
    made, other = layer(**options), layer(**options, shake=0.1)
    phi, theta = made.gaussian(), other.gaussian()
    values = [*phi.values(), *theta.values()]
    torch.autograd.gradcheck(
        lambda *t: made.kl(dict(zip(FACTORS, t[:4])), dict(zip(FACTORS, t[4:]))), values, eps=1e-7, atol=1e-4
    )
    assert float(made.kl(phi, phi)) == 0
    assert float(made.kl(phi, theta)) > 0


def test_rows_in_parts_give_the_whole():
    """The divergence in ranges of rows equals the divergence at once, gradients too."""
    made, other = layer(rows=11), layer(rows=11, shake=0.1)
    given = [*made.gaussian().values(), *other.gaussian().values()]

    def part(start, stop, *t):
        return kl_diagonal(*made._moments(t[:4], start, stop), *made._moments(t[4:], start, stop))

    found = []
    for limit in (1 << 20, 14):
        value = by_rows(part, 11, 7, *given, limit=limit)
        found.append((value, *torch.autograd.grad(value, given)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_the_outer_gradient_of_the_divergence_is_the_pull_by_precision():
    """d KL / d mu_theta = -(mu_phi - mu_theta) / sigma_theta^2, projected on the factors."""
    made, other = layer(), layer(shake=0.1)
    phi, theta = made.gaussian(), other.gaussian()
    scale = made._scale("default")
    mean_p, mean_t = (scale * v["mean_B"] @ v["mean_A"] for v in (phi, theta))
    spread = scale * theta["spread_B"] @ theta["spread_A"] + 0.1
    pull = -(mean_p - mean_t) / (spread.square() + 1e-12)
    grads = torch.autograd.grad(made.kl(phi, theta), [theta["mean_B"], theta["mean_A"]])
    torch.testing.assert_close(grads[0], scale * pull @ theta["mean_A"].T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grads[1], scale * theta["mean_B"].T @ pull, rtol=1e-8, atol=1e-8)


def test_phases_say_what_a_gradient_reaches():
    made = layer()
    with held(made) as layers:
        theta = made.gaussian()
        made.prior.phase = "inner"
        assert not made.prior_energy(1.0, 0.01).requires_grad
        made.prior.phase = "outer"
        assert torch.autograd.grad(made.prior_energy(1.0, 0.01), list(theta.values()))[0].abs().sum() > 0
        assert layers == [made]
    assert made.prior is None
    with pytest.raises(RuntimeError, match="stop"), held(made):
        raise RuntimeError("stop")
    assert made.prior is None


def test_prior_is_the_normal_gamma():
    mean, var = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 4.0])
    wanted = -Normal(0.0, 1.0).log_prob(mean).sum() - torch.distributions.Gamma(2.0, 0.3).log_prob(1 / var).sum()
    torch.testing.assert_close(neg_log_prior(mean, var, 2.0, 0.3, constants=True), wanted)


# ---- stable steps


@given(strength=st.floats(0, 1e8), lr=st.floats(1e-4, 10.0))
def test_a_proximal_step_never_overshoots(strength, lr):
    """Without a loss, the step lies between where it was and the prior, for every strength."""
    mean, towards = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 1.0])
    new = proximal(mean, torch.zeros(2), towards, lr, torch.tensor(strength))
    assert ((new - towards).abs() <= (mean - towards).abs() + 1e-6).all()
    assert ((new - towards) * (mean - towards) >= -1e-6).all()


def test_an_implicit_step_of_a_factor_solves_its_quadratic():
    """min_d g d + 1/2 d H d + |d|^2 / (2 lr), row by row."""
    g = torch.Generator().manual_seed(0)
    grad, other = torch.randn(4, 2, generator=g), torch.randn(2, 6, generator=g)
    curvature = torch.rand(4, 6, generator=g)
    move = implicit_rows(grad, other, curvature, 0.3)
    for j, row in enumerate(move):
        hessian = other @ curvature[j].diag() @ other.T
        torch.testing.assert_close(grad[j] + hessian @ row + row / 0.3, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(implicit_rows(grad, other, 0 * curvature, 0.3), -0.3 * grad)


def test_implicit_steps_over_factors_are_the_proximal_ones():
    made = layer(space="factors", draws="weight")
    start = {k: v.detach().clone() for k, v in made.gaussian().items()}
    with held(made):
        made.prior.values = {k: v + 0.2 for k, v in start.items()}
        made.prior.strength = 50.0
        loss_grad = {k: torch.ones_like(v) for k, v in start.items()}
        precision = 1 / ((start["spread_A"] + 0.2 + 0.1).square() + 1e-12)
        total = loss_grad["mean_A"] + 50.0 * precision * -0.2
        moves = made.implicit({**loss_grad, "mean_A": total}, dict.fromkeys(FACTORS, 0.1))
    wanted = proximal(start["mean_A"], loss_grad["mean_A"], start["mean_A"] + 0.2, 0.1, 50.0 * precision)
    torch.testing.assert_close(start["mean_A"] + moves["mean_A"], wanted)


# ---- what it leaves


def test_the_exported_mean_is_a_lora_adapter(tmp_path):
    """peft's LoRA with the exported factors gives mean mode's logits."""
    from peft import PeftModel

    model = tuned(shake=0.2)
    export_mean(model, tmp_path / "lora")
    other = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(other(**INPUTS).logits, model(**INPUTS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(BadInput, match="no Gaussian layer"):
        export_mean(other, tmp_path / "none")


@pytest.mark.parametrize("options", [{}, {"space": "factors"}, {"spread": "softplus", "draws": "weight"}])
def test_saved_and_loaded_it_is_the_same_distribution(options, tmp_path):
    """Saved are the four factors per layer: two pairs of LoRA's."""
    from safetensors.torch import load_file

    model, tuner = tuned(shake=0.2, **options), TUNER.validate({"kind": "bayesian_lora", "r": 4, **options})
    tuner.save(model, tmp_path)
    again = tuner.load(tiny_llama(), tmp_path).eval()
    for how in ("mean", "sample"):
        found = []
        for m in (model, again):
            torch.manual_seed(3)
            with drawn(m, how):
                found.append(m(**INPUTS).logits)
        assert torch.equal(*found)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    lora = sum(4 * sum(part.shape) for part in prior_layers(model))
    assert sum(t.numel() for t in kept.values()) == 2 * lora
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**INPUTS).logits, again(**INPUTS).logits, atol=1e-5, rtol=1e-5)


def test_a_merge_is_undone():
    model = tuned(shake=0.2)
    before = model(**INPUTS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**INPUTS).logits, before, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**INPUTS).logits, before, atol=1e-5, rtol=1e-5)


def test_a_packed_base_is_left_alone():
    """Over a base without floating weights there are samples and means, and no merge."""
    made = layer()
    made.base_layer.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match="packed"):
        made.merge()


# ---- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"c": 0.0}, "tuner.c"),
        ({"c": -1.0}, "tuner.c"),
        ({"r": 0}, "tuner.r"),
        ({"space": "factors", "draws": "local"}, "not Gaussian"),
        ({"space": "factors", "spread": "softplus"}, "spread: linear"),
    ],
)
def test_options_that_make_no_distribution(options, words):
    with pytest.raises(BadInput, match=words):
        TUNER.validate({"kind": "bayesian_lora", **options})


def test_a_rank_above_the_shorter_side():
    with pytest.raises(BadInput, match=r"above the shorter side.*at most 16"):
        tuned(r=17)


def test_configs_are_checked_too():
    for wrong in ({"c": 0}, {"space": "nowhere"}, {"r": 0}):
        with pytest.raises(BadInput):
            BayesianLoraConfig(**wrong)


def test_other_misuses(tmp_path):
    tuner, model = TUNER.validate({"kind": "bayesian_lora"}), tiny_llama()
    with pytest.raises(BadInput, match="selection"):
        tuner.attach(model, Allocation({"x": Whole()}), Context(model=model))
    embedding = TUNER.validate({"kind": "bayesian_lora", "target_modules": ["embed_tokens"]})
    with pytest.raises(BadInput, match="no linear layer"):
        embedding.attach(model, None, Context(model=model))
    lora = TUNER.validate({"kind": "lora", "r": 2, "target_modules": ["q_proj"]})
    lora.save(lora.attach(tiny_llama(), None, Context(model=model)), tmp_path)
    with pytest.raises(Corrupt, match="not a Gaussian one"):
        tuner.load(tiny_llama(), tmp_path)


def test_a_second_adapter_has_a_distribution_of_its_own():
    model = tuned(shake=0.1)
    first = model(**INPUTS).logits
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert not torch.equal(model(**INPUTS).logits, first)
    model.set_adapter("default")
    assert torch.equal(model(**INPUTS).logits, first)
