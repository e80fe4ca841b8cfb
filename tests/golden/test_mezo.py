"""MeZO against the official code's numbers: steps, in-place restore, group-scaled variants, the F1 objective."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from conftest import GOLDEN, golden_cases
from pegbox.optim import OPTIM, spsa
from pegbox.optim.perturbation import InPlace
from pegbox.parts import answers
from pegbox.parts.context import Context
from pegbox.parts.directions import Directions

CASES = golden_cases("mezo", "*.npz")
STEPS = [p for p in CASES if not p.name.startswith("variants")]
VARIANTS = [p for p in CASES if p.name.startswith("variants")]
F1 = golden_cases("mezo", "f1*.json")

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors in {GOLDEN / 'mezo'}")


def read(path):
    settings = json.loads((path.parent / "cases.json").read_text())[path.stem]
    with np.load(path) as file:
        return settings, {name: torch.from_numpy(file[name]) for name in file.files}


class Net(nn.Module):
    """fc2(dropout(tanh(LayerNorm(fc1 x)))), the model of the golden runs."""

    def __init__(self, shape, dtype):
        super().__init__()
        inputs, hidden, out = shape
        self.fc1 = nn.Linear(inputs, hidden, dtype=dtype)
        self.layer_norm = nn.LayerNorm(hidden, dtype=dtype)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden, out, dtype=dtype)

    def forward(self, x):
        return self.fc2(self.dropout(torch.tanh(self.layer_norm(self.fc1(x)))))


class Batches:
    """A problem over the golden run's batches; keeps every value it gave."""

    micro = 1

    def __init__(self, model, data):
        self.model, self.data, self.at, self.values = model, data, 0, []
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def value(self):
        loss = cross_entropy(self.model(self.data["X"][self.at]), self.data["Y"][self.at]).item()
        self.values.append(loss)
        return loss


def tolerances(settings, restore):
    if settings["dtype"] == "torch.float32":
        return {"loss": 1e-6, "projected": 5e-4, "weights": 1e-5}
    width = 1e-10 if restore == "in_place" else 1e-9
    return {"loss": width, "projected": width / settings["eps"], "weights": width}


@pytest.mark.parametrize("restore", ["in_place", "exact", "snapshot"])
@pytest.mark.parametrize("path", STEPS, ids=lambda p: p.stem)
def test_steps(path, restore):
    settings, data = read(path)
    dtype = getattr(torch, settings["dtype"].removeprefix("torch."))
    model = Net(settings["shape"], dtype)
    model.load_state_dict({n: data[f"init.{n}"] for n, _ in model.named_parameters()})
    for name in settings["frozen"]:
        model.get_parameter(name).requires_grad_(False)
    step = OPTIM.validate(
        {
            "kind": "mezo",
            "lr": settings["lr"],
            "eps": settings["eps"],
            "scheme": "sequential",
            "weight_decay": settings["weight_decay"],
            "restore": restore,
        }
    )
    problem = Batches(model, data)
    state = step.setup(Context(model=model, total_steps=settings["steps"], step=lambda: problem.at))
    seeds = iter(data["seeds"].tolist())
    state.draw = lambda n: [next(seeds) for _ in range(n)]
    tol = tolerances(settings, restore)
    for k in range(settings["steps"]):
        problem.at = k
        log = step.estimate(state, problem)
        assert log.applied
        assert log.loss == pytest.approx(data["loss_plus"][k].item(), abs=tol["loss"])
        got = log.readings["projected_gradient"]
        assert got == pytest.approx(data["projected_grad"][k].item(), abs=tol["projected"])
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.detach(), data[f"step{k + 1}.{name}"], atol=tol["weights"], rtol=0)
    assert len(problem.values) == 2 * settings["steps"]


@pytest.mark.parametrize("path", STEPS, ids=lambda p: p.stem)
def test_in_place_restore_is_the_official_one(path):
    settings, data = read(path)
    names = [n.removeprefix("z1.") for n in data if n.startswith("z1.")]
    params = {n: data[f"init.{n}"].clone() for n in names}
    noise = {n: torch.cat([z.reshape(-1) for m, _, z in walked(data, params) if m == n]) for n in names}
    mover = InPlace(params, Directions("sequential"), settings["eps"])
    seed = int(data["seeds"][0])
    for offset in (+1, -1):
        mover.move(seed, offset)
    mover.home()
    for name in names:
        assert torch.equal(noise[name].view_as(params[name]), data[f"z1.{name}"])
        ulps = 4 * torch.finfo(params[name].dtype).eps * data[f"init.{name}"].abs().clamp(min=settings["eps"])
        assert ((params[name] - data[f"restored1.{name}"]).abs() <= ulps).all()


def walked(data, params):
    return Directions("sequential").walk(int(data["seeds"][0]), params)


@pytest.mark.parametrize("path", VARIANTS, ids=lambda p: p.stem)
def test_group_scaled_variants(path):
    settings, data = read(path)
    weights = {n.removeprefix("init."): t.clone().requires_grad_() for n, t in data.items() if n.startswith("init.")}
    group_of, eps = settings["param_to_group"], settings["eps"]

    def loss(at):
        h = at["embed.weight"][data["x"].long()].mean(1)
        for i in range(settings["layers"]):
            h = torch.tanh(h @ at[f"layer.{i}.weight"].T + at[f"layer.{i}.bias"])
        return cross_entropy(h @ at["lm_head.weight"].T + at["lm_head.bias"], data["y"].long())

    norms = spsa.group_norms(weights, group_of)
    compare(norms, settings["groups"], data["c_param_norm"])
    grads = dict(zip(weights, torch.autograd.grad(loss(weights), list(weights.values())), strict=True))
    compare(spsa.group_norms(grads, group_of), settings["groups"], data["c_grad_norm"])

    c = spsa.per_tensor(norms, group_of, weights)
    z = {n: data[f"pn_z.{n}"] for n in weights}
    plus, minus = (loss({n: w + s * eps / c[n] * z[n] for n, w in weights.items()}).item() for s in (1, -1))
    assert plus == pytest.approx(data["pn_l1"].item(), abs=1e-9)
    assert minus == pytest.approx(data["pn_l2"].item(), abs=1e-9)
    p = spsa.two_sided(plus, minus, eps)
    assert p == pytest.approx(data["pn_p"].item(), abs=1e-8)
    for name in weights:
        for kind in ("variance", "expectation"):
            got = data["pn_p"].item() * spsa.step_scale(kind, c[name]) * z[name]
            torch.testing.assert_close(got, data[f"pn_grad_{kind}_modified.{name}"], atol=1e-9, rtol=0)


def compare(scales, groups, expected):
    got = torch.tensor([scales[g] for g in groups], dtype=torch.float64)
    torch.testing.assert_close(got, expected.double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("path", F1, ids=lambda p: p.stem)
def test_f1(path):
    for case in json.loads(path.read_text()):
        assert answers.squad_f1(case["pred"], case["gold"]) == pytest.approx(case["f1"], abs=1e-12), case
