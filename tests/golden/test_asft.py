"""ASFT and DFT against the official trainer's numbers (and LLaMA-Factory's): losses, per-token values, gradients."""

import json

import numpy as np
import pytest
import torch

from conftest import GOLDEN, golden_cases
from pegbox.objectives.asft import Asft, bound_gap, effective_sample_size
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.parts.tokens import k3, score, shift

CASES = golden_cases("asft", "case*.npz")
MODES = {"sft": "sft", "dft": "dft", "sft_kl": "sft+kl", "asft": "asft"}

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors under {GOLDEN / 'asft'}")


class Given:
    """A view whose 'model' is given logits: the rows are the logits and the head is the identity."""

    def __init__(self, logits, ref=None):
        self.model, self.rows, self.ref = torch.nn.Module(), logits, ref
        self.vocabulary = logits.shape[-1]
        self.head_parameters = []

    def hidden(self, batch):
        return self.rows

    def head(self, rows):
        return rows

    def targets(self, batch):
        return shift(batch["labels"])


class GivenReference:
    """A reference whose rows at valid positions are given logits."""

    def __init__(self, logits):
        self.logits = logits

    def rows(self, view, batch):
        from pegbox.objectives.references import ReferenceRows

        return ReferenceRows(logits=self.logits[view.targets(batch)[1]])

    def logp(self, view, batch):
        targets, valid = view.targets(batch)
        return score(self.logits[valid], targets[valid]).logp


@pytest.fixture(params=CASES, ids=lambda p: p.stem)
def case(request):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(request.param).items()}
    return arrays, json.loads((GOLDEN / "asft" / "losses.json").read_text())[request.param.stem]


def run(arrays, expected, mode, dtype=torch.float64, totals=None, **options):
    objective = Asft(mode=mode, lam=expected["kl_weight"], **options)
    state = objective.setup(Context(torch.nn.Linear(1, 1)))
    for i in range(len(state.terms)):
        state.terms[i] = GivenReference(arrays["ref_logits"].to(dtype))
    logits = arrays["logits"].to(dtype).requires_grad_()
    view, batch = Given(logits), {"labels": arrays["labels"]}
    totals = totals or objective.count(batch)
    losses = dict(objective.losses(state, view, batch, totals, objective.reference(state, view, batch)))
    losses["tokens"].backward()
    return losses, logits.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("normalize", ["tokens", "micro"])
def test_losses_and_gradients(case, mode, dtype, tolerance, chunk, normalize):
    arrays, expected = case
    losses, grad = run(arrays, expected, MODES[mode], dtype, chunk=chunk, normalize=normalize)
    assert float(losses["tokens"]) == pytest.approx(expected[f"loss_{mode}"], abs=tolerance)
    assert torch.allclose(grad.double(), arrays[f"grad_{mode}"], rtol=0, atol=tolerance)


def test_per_token_values(case):
    arrays, expected = case
    targets, valid = shift(arrays["labels"])
    scores = score(arrays["logits"][valid], targets[valid], arrays["ref_logits"][valid])
    assert valid.sum() == expected["valid_tokens"]
    dft = OBJECTIVE.validate({"token": "dft"}).token.per_token(scores)
    assert torch.allclose(dft, arrays["token_dft"], rtol=0, atol=1e-10)
    assert torch.allclose(scores.kl, arrays["token_kl_forward"], rtol=0, atol=1e-10)


def test_global_token_count(case):
    arrays, expected = case
    totals = {"tokens": torch.tensor(50.0, dtype=torch.float64), "micro": torch.tensor(1.0, dtype=torch.float64)}
    losses, _ = run(arrays, expected, "dft", totals=totals)
    assert float(losses["tokens"]) == pytest.approx(expected["lf_dft_num_items_50"], abs=1e-10)


def test_llama_factory_agrees(case):
    arrays, expected = case
    losses, _ = run(arrays, expected, "asft")
    assert float(losses["tokens"]) == pytest.approx(expected["lf_asft"], abs=1e-10)
    assert float(losses["_kl_to_reference"]) == pytest.approx(expected["lf_kl_forward_mean"], abs=1e-10)


def test_other_divergences_and_readings(case):
    arrays, expected = case
    targets, valid = shift(arrays["labels"])
    rows, ref, y = arrays["logits"][valid], arrays["ref_logits"][valid], targets[valid]
    reverse = score(rows, y, ref, direction="reverse")
    assert float(reverse.kl.mean()) == pytest.approx(expected["reverse_kl_mean_ours"], abs=1e-10)
    assert float(k3(reverse.logp, reverse.ref_logp).mean()) == pytest.approx(expected["k3_mean_ours"], abs=1e-10)
    gap = bound_gap(reverse.logp, reverse.ref_logp).mean()
    assert float(gap) == pytest.approx(expected["bound_gap_sft_mean_ours"], abs=1e-10)
    ess = effective_sample_size(reverse.logp - reverse.ref_logp)
    assert float(ess) == pytest.approx(expected["ess_ours"], abs=1e-10)
    losses, _ = run(arrays, expected, "asft")
    assert float(losses["_bound_gap"]) == pytest.approx(expected["bound_gap_sft_mean_ours"], abs=1e-10)
    assert float(losses["_ess"]) == pytest.approx(expected["ess_ours"], abs=1e-10)
    losses, _ = run(arrays, expected, "asft", kl="k3")
    assert float(losses["_kl_to_reference"]) == pytest.approx(expected["k3_mean_ours"], abs=1e-10)
