"""ABMLL against hand-derived vectors: divergence, prior, output moments, calibration, a conjugate posterior."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from conftest import GOLDEN
from pegbox.parts.calibration import calibration
from pegbox.parts.episodes import Inner, adapt
from pegbox.parts.gaussians import kl_diagonal, neg_log_prior, output_variance, spread_of
from pegbox.parts.priors import held
from pegbox.tuners.bayesian import BayesianLoraConfig, GaussianLayer

ROOT = GOLDEN / "abmll"
CASES = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}
ROLES = ("mu_theta", "sigma_theta", "mu_phi", "sigma_phi")

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors in {ROOT}")


def named(start):
    return sorted(name for name in CASES if name.startswith(start))


def factors(name):
    data = np.load(ROOT / f"{name}.npz")
    tensors = {key: torch.from_numpy(data[key]) for key in data.files}
    for role in ROLES:
        for side in "BA":
            tensors[f"{side}_{role}"].requires_grad_()
    return tensors, CASES[name]


def gaussian(tensors, case, role):
    mean = case["scale"] * tensors[f"B_mu_{role}"] @ tensors[f"A_mu_{role}"]
    spread = spread_of(case["scale"] * tensors[f"B_sigma_{role}"] @ tensors[f"A_sigma_{role}"], case["c"])
    return mean, spread.square()


def close(ours, theirs, rtol=1e-9):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("name", named("gaussian"))
def test_divergence_and_its_gradients(name):
    tensors, case = factors(name)
    kl = kl_diagonal(*gaussian(tensors, case, "phi"), *gaussian(tensors, case, "theta"))
    close(kl.item(), case["kl_phi_theta"])
    kl.backward()
    for role in ROLES:
        for side in "BA":
            close(tensors[f"{side}_{role}"].grad, tensors[f"grad_kl_{side}_{role}"])


@pytest.mark.parametrize("name", named("gaussian"))
def test_prior(name):
    tensors, case = factors(name)
    given = *gaussian(tensors, case, "theta"), case["a0"], case["b0"]
    close(neg_log_prior(*given).item(), case["neg_log_prior_theta_without_constants"])
    close(neg_log_prior(*given, constants=True).item(), case["neg_log_prior_theta"])


@pytest.mark.parametrize("name", named("gaussian"))
def test_moments_of_the_output(name):
    tensors, case = factors(name)
    base = nn.Linear(case["i"], case["o"], bias=False).double()
    base.weight.data = tensors["W0"]
    layer = layer_of(base, case["r"], case["scale"], case["c"])
    fill(layer, {f: tensors[f"{f[-1]}_{f[:-2].replace('mean', 'mu').replace('spread', 'sigma')}_phi"] for f in FOUR})
    layer.eval()
    close(layer(tensors["x"]).detach(), tensors["out_mean"])
    _, variance = layer.moments(tensors["x"])
    close(variance.sqrt().detach(), tensors["out_std"])
    b, a = tensors["B_sigma_phi"], tensors["A_sigma_phi"]
    close(output_variance(tensors["x"], b, a, case["scale"], case["c"]).sqrt().detach(), tensors["out_std"])


@pytest.mark.parametrize("name", named("ece"))
def test_calibration(name):
    case = CASES[name]
    found = calibration(case["probs"], case["labels"], case["bins"])
    close(found.accuracy, case["accuracy"])
    close(found.ece, case["ece"])
    close(found.mce, case["mce"])
    close(found.brier, case["brier_sum_over_classes"])
    close(found.nll, case["nll"])
    full = np.flatnonzero(found.bins.count)
    table = [[b, found.bins.count[b], found.bins.confidence[b], found.bins.accuracy[b]] for b in full]
    close(np.array(table, dtype=float), np.array(case["table_bin_count_conf_acc"], dtype=float))


@pytest.mark.parametrize("name", named("kl_to_standard_normal"))
def test_divergence_from_the_standard_normal(name):
    case = CASES[name]
    mean, log_var = (torch.tensor(case[k], dtype=torch.float64) for k in ("mean", "log_var"))
    close(kl_diagonal(mean, log_var.exp(), torch.zeros_like(mean), torch.ones_like(mean)).item(), case["kl"])


@pytest.mark.parametrize("name", named("conjugate"))
def test_many_steps_reach_the_conjugate_posterior(name):
    """The inner loop on a linear-Gaussian task ends at the exact posterior, to 1 %."""
    case = {k: np.asarray(v, dtype=float) for k, v in CASES[name].items()}
    x, y = torch.from_numpy(case["X"]), torch.from_numpy(case["y"]).reshape(-1)
    count = x.shape[1]
    mean = torch.from_numpy(case["prior_mean"]).reshape(-1) * torch.ones(count, dtype=torch.float64)
    spread = torch.from_numpy(case["prior_var"]).reshape(-1).sqrt() * torch.ones(count, dtype=torch.float64)
    base = nn.Linear(count, 1, bias=False).double()
    base.weight.data.zero_()
    layer = layer_of(base, 1, 1.0, 1e-3)
    one = torch.ones(1, 1, dtype=torch.float64)
    fill(layer, {"mean_A": mean[None], "mean_B": one, "spread_A": spread[None] - 1e-3, "spread_B": one})

    def loss():
        out, variance = layer.moments(x)
        layer.prior.strength = 1.0
        fit = ((y - out[:, 0]).square() + variance[:, 0]).sum() / (2 * float(case["noise_var"]))
        return fit + layer.divergence()

    with held(layer):
        theta = {key: p for key, p in layer.named_parameters() if key.startswith("gauss_")}
        phi = adapt(layer, theta, [loss], Inner(steps=400, lr=0.005, rule="implicit"))
    found = {key.split(".")[0].removeprefix("gauss_"): value for key, value in phi.items()}
    got_mean = (found["mean_B"] @ found["mean_A"])[0]
    got_var = (found["spread_B"] @ found["spread_A"] + 1e-3)[0].square()
    close(got_mean.detach(), case["posterior_mean"].reshape(-1), rtol=0.01)
    close(got_var.detach(), case["posterior_var"].reshape(-1), rtol=0.01)


FOUR = ("mean_A", "mean_B", "spread_A", "spread_B")


def layer_of(base, rank, scale, c):
    layer = GaussianLayer(base, "linear")
    layer.add("default", BayesianLoraConfig(r=rank, alpha=scale * rank, c=c))
    layer.set_adapter("default")
    return layer.double()


def fill(layer, values):
    for name, value in values.items():
        getattr(layer, f"gauss_{name}")["default"].data = value.detach().clone()
