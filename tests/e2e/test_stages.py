"""Chains of stages: lottery tickets in two rounds, each adding to the mask of the one before."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import pegbox
from pegbox.artefact import settle
from pegbox.parts.allocation import Allocation
from pegbox.recipe import load_recipe

COUNT = 400


@pytest.fixture(scope="module")
def two_rounds(base, rows, tmp_path_factory):
    """(run, folder): probe, pick half of K, train; probe from there, pick the other half, train."""
    pick = {"do": "select", "select": {"kind": "change", "maskable": ["all-linear"], "iterations": 2}}
    pick["select"]["budget"] = {"count": COUNT}
    probe = {"tuner": {"kind": "full"}, "select": {"kind": "whole", "scope": ["all-linear"]}, "settings": {"steps": 2}}
    train = {"settings": {"steps": 2}}
    stages = [
        {"name": "probe-1", **probe},
        {"name": "pick-1", **pick, "select": {**pick["select"], "of": "probe-1"}},
        {"name": "train-1", **train, "start": "probe-1.start", "use": {"selection": "pick-1"}},
        {"name": "probe-2", **probe, "start": "train-1.end"},
        {
            "name": "pick-2",
            **pick,
            "start": "probe-2.start",
            "select": {**pick["select"], "of": "probe-2", "since": "probe-1", "taken": "pick-1"},
        },
        {"name": "train-2", **train, "start": "probe-2.start", "use": {"selection": "pick-2"}},
    ]
    recipe = load_recipe("lt-sft").plain()
    recipe["protocol"] = {"kind": "staged", "stages": stages}
    out = tmp_path_factory.mktemp("stages") / "run"
    run = pegbox.train(
        recipe, model=str(base), data=str(rows / "chat.jsonl"), out=out, steps=2, batch=2, micro_batch=2,
        max_length=200, suites=[],
    )  # fmt: skip
    return run, out / "stages"


def picked(folder, name):
    return Allocation.load(folder / name / "allocation.safetensors")


def test_the_rounds_add_up_to_the_budget(two_rounds):
    _, folder = two_rounds
    first, second = picked(folder, "pick-1"), picked(folder, "pick-2")
    counts = [sum(choice.index.numel() for choice in mask.values()) for mask in (first, second)]
    rounds = [counts[0], counts[1] - counts[0]]
    assert all(COUNT // 2 <= count <= COUNT // 2 + 40 for count in rounds)  # entries tied at the threshold all come in
    assert all(torch.isin(choice.index, second[name].index).all() for name, choice in first.items())


def test_only_what_was_picked_has_moved_at_the_end(two_rounds, base):
    """The last stage's update lies on the first one's; together they touch the second mask and nothing else."""
    run, folder = two_rounds
    tuned = settle(pegbox.load(run.path)[0]).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    mask = picked(folder, "pick-2")
    moved = 0
    for name, value in before.items():
        changed = (tuned[name] != value).flatten().nonzero().flatten()
        moved += changed.numel()
        assert torch.isin(changed, mask[name].index.long()).all() if name in mask else changed.numel() == 0
    assert moved > COUNT // 2
