"""MeZO moves whatever a tuner trains: sparse values in every execution, LoRA, IA3, prompts; each way back agrees."""

from __future__ import annotations

import peft
import pytest
import torch

import pegbox
from optim.zeroth import Bench, llama


def tuned(kind: str):
    base = llama()
    for p in base.parameters():
        p.requires_grad_(False)
    common = {"task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **common),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **common
        ),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **common),
        "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"], **common),
    }
    torch.manual_seed(0)
    if kind in configs:
        return peft.get_peft_model(base, configs[kind]())
    sparse = pegbox.SparseConfig(execution=kind, select={"kind": "magnitude", "budget": {"density": 0.2}}, **common)
    return peft.get_peft_model(base, sparse)


def value(model):
    ids = torch.arange(24).view(2, 12) % 40
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -12:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["in_place", "scatter", "bypass", "lora", "ia3", "prompt", "embedding"])
def test_every_way_back_agrees(kind):
    runs = {}
    for restore in ("in_place", "exact", "snapshot"):
        bench = Bench(tuned(kind), value, restore=restore, lr=1e-2, eps=1e-2)
        frozen = {n: p.detach().clone() for n, p in bench.model.named_parameters() if not p.requires_grad}
        bench.run(3)
        runs[restore] = (bench.weights(), bench.state.trajectory.projected, float(value(bench.model)))
        if kind != "in_place":  # whose base holds the tuned entries
            assert all(torch.equal(bench.weights()[n], w) for n, w in frozen.items())
    exact, snapshot, in_place = (runs[r] for r in ("exact", "snapshot", "in_place"))
    assert exact[1] == snapshot[1]
    assert all(p != 0 for p in exact[1])
    assert exact[2] == snapshot[2]
    assert in_place[1] == pytest.approx(exact[1], rel=2e-2, abs=1e-3)
    assert in_place[2] == pytest.approx(exact[2], abs=1e-4)


def test_the_sparse_tuners_base_follows_its_values():
    bench = Bench(tuned("in_place"), value, lr=1e-2, eps=1e-2, restore="exact")
    before = float(value(bench.model))
    bench.run(2)
    after = float(value(bench.model))
    with bench.model.disable_adapter():
        assert float(value(bench.model)) == before
    assert after != before
    assert float(value(bench.model)) == after
