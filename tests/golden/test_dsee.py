"""DSEE against its official code: the decomposition, the scores and masks, an attention block pruned in both ways."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import GOLDEN, golden_cases
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.carried import Update
from pegbox.parts.context import Context
from pegbox.parts.coupled import structures
from pegbox.parts.decompose import decompose_low_rank_sparse, largest_rest
from pegbox.parts.indexsets import from_mask, to_mask
from pegbox.parts.pruning import global_masks, unit_scores, update_score
from pegbox.parts.removal import remove_units
from pegbox.prepare import PREPARE
from pegbox.tuners import TUNER

ROOT = GOLDEN / "dsee"
CASES = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors in {ROOT}")

ATTENTION = "bert.encoder.layer.0.attention"


def tensors(path, prefix=""):
    data = np.load(path)
    return {k.removeprefix(prefix): torch.from_numpy(np.asarray(data[k])) for k in data.files if k.startswith(prefix)}


def decompositions():
    for path in golden_cases("dsee", "decompose*.npz"):
        for group in CASES.get(path.stem, {}):
            yield pytest.param(path, group, id=f"{path.stem}-{group}")


@pytest.mark.parametrize(("path", "group"), list(decompositions()))
def test_decomposition(path, group):
    case, data = CASES[path.stem][group], tensors(path, f"{group}/")
    found = decompose_low_rank_sparse(data["W"], outer=case["outer"], start=data["V_start"])
    torch.testing.assert_close(found.s, data["S"], rtol=0, atol=1e-9)
    low_rank = data["U"] @ data["V_before_last_append"]
    torch.testing.assert_close(found.low_rank(), low_rank, rtol=0, atol=1e-9)
    assert float((data["W"] - found.low_rank()).norm()) == pytest.approx(float(data["residual"]), abs=1e-9)
    identity = torch.eye(found.u.shape[1], dtype=found.u.dtype)
    torch.testing.assert_close(found.u.mT @ found.u, identity, rtol=0, atol=1e-6)
    omega = largest_rest(data["W"], found, case["num"])
    assert torch.equal(to_mask(omega, data["W"].shape), data["omega"].bool())


@pytest.fixture(params=golden_cases("dsee", "attention_*.npz"), ids=lambda p: p.stem)
def block(request):
    """A one-block BERT with the case's attention, what was tuned on it, and the case."""
    from transformers import BertConfig, BertForSequenceClassification

    case, data = CASES[request.param.stem], tensors(request.param)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=case["hidden"], num_attention_heads=case["heads"], num_hidden_layers=1,
            intermediate_size=2 * case["hidden"], attn_implementation="eager",
        )
    )  # fmt: skip
    model = model.double().eval()
    load(model.get_submodule(ATTENTION), data, "state/")
    return model, case, data, updates_of(data, case)


def load(attention, data, prefix):
    state = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix) and "_lora_" not in k}
    attention.load_state_dict(state)


def updates_of(data, case, prefix="state/"):
    """module -> the tuned update, as an adapter's file would give it."""
    found = {}
    for role in ("query", "value"):
        part = {key: data[f"{prefix}self.{role}_lora_{key}"] for key in ("a.weight", "b.weight")}
        mask = data[f"{prefix}self.{role}_lora_s.weight_mask"].bool()
        index = from_mask(mask)
        values = data[f"{prefix}self.{role}_lora_s.weight_orig"].flatten()[index.long()]
        shape = tuple(mask.shape)
        found[f"{ATTENTION}.self.{role}"] = Update(
            shape, case["alpha"] / case["r"], part["a.weight"], part["b.weight"], index, values
        )
    return found


def tuned(model, case, updates):
    """The model with the tuner attached and the update in it."""
    from pegbox.parts.carried import carry

    tuner = TUNER.validate({"kind": "lowrank_sparse", "r": case["r"], "alpha": case["alpha"]})
    carry(model, updates)
    chosen = Allocation({f"{module}.weight": Entries(u.index) for module, u in updates.items()})
    return tuner.attach(model, chosen, Context(model)).eval()


def answer(model, x):
    attention = model.get_submodule(f"base_model.model.{ATTENTION}")
    with torch.no_grad():
        out = attention(x)
    return out[0] if isinstance(out, tuple) else out


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_tuned_output(block):
    model, case, data, updates = block
    close(answer(tuned(model, case, updates), data["x"]), data["out_tuned"])


def test_scores(block):
    model, case, data, updates = block
    named = dict(model.named_parameters())
    for role in ("query", "value"):
        name = f"{ATTENTION}.self.{role}"
        update, weight = updates[name], named[f"{name}.weight"].detach()
        score = update_score(case["mode"], weight, update.low_rank(), update.sparse())
        close(score, data[f"qv_score/{role}"].abs())
    positions = structures(Anatomy.of(model), ("heads",))[0].share("q").positions
    unscaled = {n: u.dense().abs() / u.scale for n, u in updates.items()}
    close(unit_scores({n: (s, positions) for n, s in unscaled.items()}), data["head_score/ABS"])
    both = {n: (s + named[f"{n}.weight"].detach().abs(), positions) for n, s in unscaled.items()}
    close(unit_scores(both), data["head_score/WABS"])


def masks_of(model, case, updates):
    prune = PREPARE.validate(
        {"kind": "prune", "mode": case["mode"], "ratio": case["p"], "update_ratio": case["p_ad"], "of": "tune"}
    )
    attention = {n: p.detach() for n, p in model.named_parameters() if ATTENTION in n and p.ndim == 2}
    adapted = [f"{module}.weight" for module in updates]
    scores = {n: prune._score(n, attention[n], updates, Context(model)) for n in adapted}
    others = {n: w.abs() for n, w in attention.items() if n not in adapted}
    return {**global_masks(others, case["p"]), **global_masks(scores, case["p_ad"])}


def test_masks(block):
    model, case, data, updates = block
    found = masks_of(model, case, updates)
    expected = {k.removeprefix("S1/"): v.bool() for k, v in data.items() if k.startswith("S1/")}
    assert {name.removeprefix(f"{ATTENTION}.").removesuffix(".weight") for name in found} == set(expected)
    for name, mask in expected.items():
        assert torch.equal(found[f"{ATTENTION}.{name}.weight"], mask), name


def test_masked_output(block):
    model, case, data, updates = block
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks_of(model, case, updates).items():
            named[name].masked_fill_(~mask, 0)
    close(answer(tuned(model, case, updates), data["x"]), data["out_unstructured"])


def test_heads_removed(block):
    model, case, data, updates = block
    structure = structures(Anatomy.of(model), ("heads",))[0]
    prune = PREPARE.validate({"kind": "prune", "heads": case["heads_removed"], "of": "tune"})
    named = {n: p.detach() for n, p in model.named_parameters()}
    heads = prune._lowest_heads(structure, named, updates)
    assert heads == sorted(data["pruned_heads"].tolist())
    from pegbox.prepare.prune import _cut

    left = _cut(updates, structure, heads)
    remove_units(model, {structure.name: heads})
    expected = updates_of(data, case, "structured_state/")
    for name, parameter in model.get_submodule(ATTENTION).named_parameters():
        close(parameter.detach(), data[f"structured_state/{name}"])
    for module, update in expected.items():
        close(left[module].dense(), update.dense())
    close(answer(tuned(model, case, left), data["x"]), data["out_heads_removed"])
