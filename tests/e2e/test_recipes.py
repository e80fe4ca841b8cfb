"""Every recipe of the catalogue runs through `train` on a tiny model, and what it leaves is loaded and answers."""

import pytest
import torch

import pegbox
from pegbox.parts.generation import generate
from pegbox.recipe import catalogue

NETWORK = {"path": "network", "limit": 8, "families": ["subnet"]}
COMMON = {"steps": 2, "batch": 2, "micro_batch": 2, "max_length": 400, "suites": [], "eval_split": 0.0}
SMALL = {
    "mftcoder": ["tuner.r=4"],
    "corda": ["prepare.0.rank=4", "tuner.r=4", "tuner.lora_alpha=4"],
    "lift": ["select.filter_rank=4"],
    "sara": ["objective.terms.0.min_side=8"],
    "spiel": ["select.budget.density=0.05", "select.schedule.every=2", "select.schedule.accumulate=1"],
    "grpo": ["objective.num_generations=2", "objective.max_completion_length=4"],
    "dsee": ["tuner.r=4", "tuner.alpha=8", "select.rank_cap=6"],
    "lora": ["tuner.r=4"],
    "qlora": ["tuner.r=4"],
    "s2ft": ["select.ratios.o=0.25"],
    "dpo": ["tuner.r=4"],
    "morepair": ["tuner.r=4"],
}
TRAINED = [name for name, block in catalogue().items() if (block.get("protocol") or {}).get("kind") != "posthoc"]


@pytest.mark.parametrize("name", TRAINED)
def test_recipe(name, base, rows, tmp_path):
    data = {"dpo": str(rows / "prefs.jsonl"), "morepair": {"path": "repair", "limit": 8}}.get(name, NETWORK)
    run = pegbox.train(name, model=str(base), data=data, out=tmp_path / "run", overrides=SMALL.get(name, []), **COMMON)
    assert run.status == "finished"
    model, tokenizer = run.model()
    answers = generate(model, tokenizer, [[{"role": "user", "content": "hello"}]], max_new_tokens=3)
    assert len(answers) == 1
    again = run.model()[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_posthoc_recipe_scales_a_finished_run(base, tmp_path):
    tuned = pegbox.train("full", model=str(base), data=NETWORK, out=tmp_path / "tuned", **COMMON)
    half = pegbox.train(
        "lines",
        model=str(base),
        out=tmp_path / "half",
        suites=[],
        test_data=NETWORK,
        overrides=[f"models.tuned={tuned.path}", "weights.0.alpha=0.0", "weights.0.beta=0.0"],
    )
    from pegbox.models import load

    ours, bare = half.model()[0].state_dict(), load(str(base))[0].state_dict()
    assert all(torch.equal(ours[k], bare[k]) for k in bare)


def test_a_sequence_of_tasks_has_its_forgetting_matrix(base, rows, tmp_path):
    tasks = [
        {"name": "add", "rows": {"train": [str(rows / "chat.jsonl")], "validation_split": 0.3}},
        {"name": "subnet", "rows": {"train": [NETWORK], "test": [{**NETWORK, "split": "test"}]}},
    ]
    run = _sequence(base, rows, tmp_path, tasks)
    found = run.metrics.extra["sequence"]
    assert found["tasks"] == ["add", "subnet"]
    assert len(found["matrix"]) == 2
    assert {"overall_performance", "backward_transfer", "forgetting", "forward_transfer"} <= found.keys()


def _sequence(base, rows, tmp_path, tasks):
    from pegbox.recipe import load_recipe

    recipe = load_recipe("hft").plain() | {"protocol": {"kind": "sequence", "tasks": tasks}}
    return pegbox.train(
        recipe,
        model=str(base),
        data=str(rows / "chat.jsonl"),
        out=tmp_path / "run",
        overrides=["evaluation.max_new_tokens=4"],
        **COMMON,
    )


def test_classification(base, rows, tmp_path):
    block = {
        "title": "classifier",
        "task": {"kind": "classification"},
        "tuner": {"kind": "full"},
        "objective": {"kind": "classification"},
        "optim": {"kind": "adamw", "lr": 1e-3},
    }
    settings = {**COMMON, "suites": ["target"], "eval_split": 0.25}
    run = pegbox.train(block, model=str(base), data=str(rows / "labels.jsonl"), out=tmp_path / "run", **settings)
    assert run.metrics.after["target"].scores["accuracy"].n > 0
    model, _ = run.model()
    assert model.config.num_labels == 2


def test_the_same_seed_gives_the_same_weights(base, tmp_path):
    runs = [
        pegbox.train("lora", model=str(base), data=NETWORK, out=tmp_path / n, overrides=["tuner.r=4"], **COMMON)
        for n in "ab"
    ]
    first, second = (r.model()[0].state_dict() for r in runs)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_two_sparse_differences_over_one_base_compose(base, rows, tmp_path):
    """theta = base + task + language, in any order (LT-SFT, section 3)."""
    from pegbox.models import load

    data = {"task": str(rows / "chat.jsonl"), "language": NETWORK}
    for name, source in data.items():
        pegbox.train("lt-sft", model=str(base), data=source, out=tmp_path / name, **{**COMMON, "steps": 4})
    bare = dict(load(str(base))[0].named_parameters())
    states = {n: _settled(pegbox.load(tmp_path / n)[0]) for n in data}
    both = _settled(pegbox.load([tmp_path / "task", tmp_path / "language"])[0])
    swapped = _settled(pegbox.load([tmp_path / "language", tmp_path / "task"])[0])
    for name, weight in bare.items():
        added = weight + (states["task"][name] - weight) + (states["language"][name] - weight)
        assert torch.allclose(both[name], added, atol=1e-6), name
        assert torch.allclose(both[name], swapped[name], atol=1e-6), name


def _settled(model):
    from pegbox.artefact import settle

    return dict(settle(model).named_parameters())
