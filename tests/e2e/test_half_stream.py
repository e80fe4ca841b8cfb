"""Half fine-tuning over a stream of tasks: a new half per task, the other half exact, resumed with the same split."""

import itertools

import pytest
import torch
from transformers import TrainerCallback

import pegbox
from pegbox.artefact.load import load_artefact
from pegbox.models import load
from pegbox.parts.allocation import Allocation
from pegbox.recipe import load_recipe

COMMON = {"batch": 2, "micro_batch": 2, "max_length": 200, "suites": [], "steps": 3}


class Breaks(TrainerCallback):
    """Ends the second stage with an error before its third step."""

    def __init__(self):
        self.stages = 0

    def on_train_begin(self, args, state, control, **_):
        self.stages += 1

    def on_step_begin(self, args, state, control, **_):
        if self.stages == 2 and state.global_step == 2:
            raise RuntimeError("on purpose")


def options(base, rows, **more):
    tasks = [{"name": f"t{i}", "rows": {"train": [str(rows / "chat.jsonl")], "validation_split": 0.3}} for i in (1, 2)]
    recipe = load_recipe("hft").plain() | {"protocol": {"kind": "sequence", "tasks": tasks}}
    overrides = ["evaluation.max_new_tokens=2", "optim.lr=1e-3", "optim.weight_decay=0.1", "train.save_every=1"]
    return {"recipe": {**recipe, **more}, "model": str(base), "data": str(rows / "chat.jsonl"), "overrides": overrides}


@pytest.fixture(scope="module")
def stream(base, rows, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEGBOX_CACHE", str(base / "cache"))
        return pegbox.train(out=tmp_path_factory.mktemp("stream") / "run", **options(base, rows), **COMMON)


def states(run, base):
    """The bare base's state, then each stage's end."""
    ends = [load_artefact(run.path / "stages" / name / "artefact")[0] for name in ("t1", "t2")]
    return [dict(model.named_parameters()) for model in (load(str(base))[0], *ends)]


def test_each_task_moves_its_own_half_and_nothing_else(stream, base):
    """What a task doesn't draw is bit for bit what the task before left, under decay and clipping."""
    splits = [Allocation.load(stream.path / "stages" / n / "allocation.safetensors") for n in ("t1", "t2")]
    assert set(splits[0]) != set(splits[1])
    for split, before, after in zip(splits, states(stream, base), states(stream, base)[1:]):
        moved = {n for n in after if not torch.equal(before[n], after[n])}
        assert moved <= set(split)
        assert any("q_proj" in n or "up_proj" in n for n in moved)
    found = stream.metrics.extra["sequence"]
    assert len(found["matrix"]) == len(found["matrix"][0]) == 2


def test_resumed_in_the_middle_of_a_round_it_has_the_same_split(stream, base, rows, tmp_path):
    """Broken off inside the second task and resumed: the same halves, the same weights bit for bit."""
    with pytest.raises(RuntimeError, match="on purpose"):
        pegbox.train(out=tmp_path / "run", callbacks=[Breaks()], **options(base, rows), **COMMON)
    again = pegbox.train(out=tmp_path / "run", resume=True, **options(base, rows), **COMMON)
    for name in ("t1", "t2"):
        one, two = (Allocation.load(r.path / "stages" / name / "allocation.safetensors") for r in (stream, again))
        assert one.digest() == two.digest()
    for one, two in zip(states(stream, base), states(again, base)):
        assert all(torch.equal(one[n], two[n]) for n in one)


def test_the_soft_form_holds_the_half_of_each_round(stream, base, rows, tmp_path):
    """Everything trains; what the hard form would freeze in the round moves less than without the pull."""
    found = []
    for weight in (0.0, 400.0):
        term = {"kind": "l2_to_start", "weight": weight, "outside": {"kind": "half"}}
        soft = options(base, rows, select=None, objective={"token": {"kind": "sft"}, "terms": [term]})
        soft["overrides"] = ["evaluation.max_new_tokens=2"]
        soft["recipe"]["optim"] = {"kind": "sgd", "lr": 1e-3, "schedule": "constant", "warmup": 0}
        run = pegbox.train(out=tmp_path / f"{weight}", **soft, **COMMON)
        ends = states(run, base)
        found.append([{n: float((b[n] - a[n]).norm()) for n in a} for a, b in itertools.pairwise(ends)])
    for name, plain, pulled in zip(("t1", "t2"), *found):
        split = Allocation.load(stream.path / "stages" / name / "allocation.safetensors")
        held = [n for n in plain if n not in split and "proj" in n]
        assert len(held) == 7
        free = [n for n in split if "proj" in n]
        ratios = [sum(pulled[n] for n in names) / sum(plain[n] for n in names) for names in (held, free)]
        assert 0 < ratios[0] < 0.9, ratios  # three steps, the first of them at the start
        assert ratios[0] < ratios[1], ratios
        if name == "t1":  # later rounds of the two runs begin from different weights
            assert ratios[1] > 0.95, ratios
        assert all(pulled[n] > 0 for n in held)
