"""Circuits against vectors from the official functions: path patching, mean ablation, masks, cross-model patching.

A case file is told by what it holds: `stages` (path patching), `circuit` (mean ablation), `cases` with a `mask` (masks)
or a `mode` (cross-model patching). Weights and tokens are in the folder's one .npz; the model's shape is in whichever
case file has a `config`.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from pegbox.analyze.circuits import Circuit, Head, HeadView, Means, Prompts, Triples, capture, head_means, head_parts
from pegbox.analyze.circuits.activations import last_logits
from pegbox.analyze.circuits.circuit import Ablation
from pegbox.analyze.circuits.cross import cross_logits
from pegbox.analyze.circuits.masks import mask_loss, masked_logits
from pegbox.analyze.circuits.paths import path_patching

ROOT = GOLDEN / "entity-tracking"
NAMES = {0: "last", 2: "label", -1: "previous_label"}
FILES = sorted(ROOT.rglob("*.json")) if ROOT.is_dir() else []

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors in {ROOT}")


@lru_cache
def read(path):
    return json.loads(path.read_text())


@lru_cache
def arrays(folder):
    return {name: value for file in sorted(folder.glob("*.npz")) for name, value in np.load(file).items()}


def config_of(folder):
    return next(read(p)["config"] for p in sorted(folder.glob("*.json")) if "config" in read(p))


@lru_cache
def view_of(folder, group):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config_of(folder)}
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))
    state = {k.removeprefix(group): torch.from_numpy(v) for k, v in arrays(folder).items() if k.startswith(group)}
    missing = set(model.state_dict()) - set(state)
    assert missing <= ({"lm_head.weight"} if settings.get("tie_word_embeddings") else set())
    model.load_state_dict(state, strict=not missing)
    return HeadView(model.double().eval())


def prompts_of(folder, name, struct=None):
    """Positions by the README's rules; for corrupt tokens the previous label is the fixed one of the last stage."""
    ids = torch.from_numpy(arrays(folder)[f"{name}_tokens"])
    last = ids.shape[1] - 1
    positions = {"label": torch.full((len(ids),), last - 2)}
    found = [(row[: last - 2] == row[last - 2]).nonzero().flatten() for row in ids]
    if struct is not None:
        positions["previous_label"] = torch.as_tensor(struct).expand(len(ids)).clone()
    elif all(len(places) == 1 for places in found):
        positions["previous_label"] = torch.cat(found)
    answers = torch.from_numpy(arrays(folder)["answers"]) if name == "base" else None
    return Prompts(ids, torch.ones_like(ids, dtype=torch.bool), positions, answers)


def members(block):
    return [(NAMES[int(place)], Head(*head)) for place, heads in block.items() for head in heads]


def close(found, wanted, tolerance):
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=tolerance)


def cases(key, inner=None):
    """(file, index) of every case of one kind."""
    found = []
    for path in FILES:
        blocks = read(path).get(key)
        if isinstance(blocks, list):
            found += [(path, i) for i, block in enumerate(blocks) if inner is None or inner in block]
    return found


def tolerance(path, name, default):
    value = read(path).get("tolerance", default)
    return value.get(name, default) if isinstance(value, dict) else value


def ids(value):
    return value.stem if hasattr(value, "stem") else str(value)


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "whole"])
@pytest.mark.parametrize(("path", "index"), cases("stages"), ids=ids)
def test_path_patching(path, index, resume):
    """Sender scores equal the official functions', receivers by q and by v, or none."""
    case, folder = read(path), path.parent
    stage = case["stages"][index]
    position = NAMES[stage["sender_and_receiver_position"]]
    struct = case["struct_reader_corrupt_position"] if position == "previous_label" else None
    found = path_patching(
        view_of(folder, "base/"), prompts_of(folder, "base"), prompts_of(folder, "corrupt", struct),
        receivers=stage["receivers"], composition=stage["composition"], position=position, resume=resume,
    )  # fmt: skip
    close(found.clean, case["p_clean"], 1e-5)
    close(found.scores, stage["scores"], tolerance(path, "scores_abs", 2e-5))
    if "top" in stage:
        assert [list(head) for head in found.top(len(stage["top"]))] == stage["top"]


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "whole"])
@pytest.mark.parametrize("path", [p for p in FILES if "circuit" in read(p)], ids=ids)
def test_mean_ablation(path, resume):
    case, folder = read(path), path.parent
    view, clean = view_of(folder, "base/"), prompts_of(folder, "base")
    layers = range(config_of(folder)["num_hidden_layers"])
    values = torch.stack([torch.from_numpy(arrays(folder)[f"mean/model.layers.{n}.self_attn.o_proj"]) for n in layers])
    own = head_means(view, prompts_of(folder, "source"), batch=3)
    torch.testing.assert_close(own.values, values, rtol=0, atol=5e-6)
    ablation = Ablation(view, clean, Means(values, torch.ones(values.shape[1])), resume=resume)
    groups = {NAMES[int(k)]: (NAMES[int(k)], heads) for k, heads in case["circuit"].items()}
    circuit = Circuit.of(view, groups)
    for name, ablate in (("ablate_non_vital", True), ("keep_non_vital", False)):
        if name in case["last_logits"]:
            close(ablation.logits(circuit, ablate), case["last_logits"][name], tolerance(path, "logits", 5e-6))
    close(last_logits(view, clean).detach(), case["plain_last_logits"], tolerance(path, "logits", 5e-6))


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "whole"])
@pytest.mark.parametrize(("path", "index"), cases("cases", "mask"), ids=ids)
def test_masks(path, index, resume):
    case, folder = read(path)["cases"][index], path.parent
    view = view_of(folder, "base/")
    base = prompts_of(folder, "base").asking(torch.tensor(case["targets"]))
    mask = torch.tensor(case["mask"], dtype=torch.float64, requires_grad=True)
    parts = head_parts(view, members({str(case["position"]): case["heads"]}))
    logits = masked_logits(view, parts, Triples(base, prompts_of(folder, "source")), mask, resume=resume)
    loss = mask_loss(logits, base.right(), mask, case["lam"])
    (grad,) = torch.autograd.grad(loss, [mask])
    close(logits.detach(), case["logits"], tolerance(path, "logits", 5e-6))
    close(loss.detach(), case["loss"], tolerance(path, "loss", 5e-6))
    close(grad, case["grad"], tolerance(path, "grad", 1e-4))


@pytest.mark.parametrize(("path", "index"), cases("cases", "mode"), ids=ids)
@torch.no_grad()
def test_cross_model_patching(path, index):
    case, folder = read(path)["cases"][index], path.parent
    view, clean = view_of(folder, "base/"), prompts_of(folder, "base")
    mode = "output" if case["mode"] == "output" else "".join(sorted(c[0] for c in case["components"]))
    donor = capture(view_of(folder, "ft/"), clean, ("o", "q", "k", "v"))
    found = cross_logits(view, clean, donor, members(case["heads_by_position"]), mode)
    close(found, case["logits"], tolerance(path, "logits", 5e-6))
    close(donor.logits, read(path)["ft_last_logits"], tolerance(path, "logits", 5e-6))
