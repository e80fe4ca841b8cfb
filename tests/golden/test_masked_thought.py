"""Masked thought against the official code: which positions are replaced, both schedules, the rate, losses."""

import json

import numpy as np
import pytest
import torch

from conftest import GOLDEN, golden_cases
from pegbox.data.policies import rates
from pegbox.data.policies.corruption import answer_tokens, corrupt, ordinals
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.schedules import cosine_floor_linear
from pegbox.tasks.views import CausalView

FILES = golden_cases("masked-thought", "masking*.json")
MODELS = golden_cases("masked-thought", "tiny_llama_loss*.npz")

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors under {GOLDEN / 'masked-thought'}")


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def golden(request):
    return json.loads(request.param.read_text())


def test_corruption_rule(golden):
    for case in golden["mask_cases"]:
        for ids, prompt, u, expected in zip(
            case["input_ids"], case["prompt_lens"], case["uniforms_answer"], case["masked_input_ids"]
        ):
            batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100] * prompt + ids[prompt:]])}
            answer = answer_tokens(batch)
            drawn = torch.tensor(u, dtype=torch.float64)[ordinals(answer).clamp(max=len(u) - 1)]
            hit = answer & (drawn < case["p"])
            assert corrupt(batch["input_ids"], hit, case["mask_id"])[0].tolist() == expected


def test_step_schedules(golden):
    g = golden["step_schedule"]
    ours = rates.Steps(warmup=g["W"])
    assert [ours.rate(g["R"], k - 1, 60, 0) for k in g["steps"]] == pytest.approx(g["rate"], abs=1e-12)
    g = golden["step_schedule_late"]
    ours = rates.Late(warmup=g["W"], after=g["A"])
    assert [ours.rate(g["R"], k - 1, 60, 0) for k in g["steps"]] == pytest.approx(g["rate"], abs=1e-12)
    g = golden["step_schedule_decreasing"]
    ours = rates.Decreasing(warmup=g["W"])
    assert [ours.rate(g["R"], k - 1, 60, 0) for k in g["steps"]] == pytest.approx(g["rate"], abs=1e-12)


def test_ratio_schedule(golden):
    g = golden["ratio_schedule"]
    ours = rates.Ratio(rho=g["rho"])
    assert [ours.rate(g["R"], s, g["S"], 0) for s in g["steps"]] == pytest.approx(g["rate"], abs=1e-12)


@pytest.mark.parametrize("name", ["lr_schedule", "lr_schedule_no_tail"])
def test_learning_rate(golden, name):
    g = golden[name]
    options = {"decay_ratio": g["lr_decay_ratio"], "floor": g["min_lr_ratio"], "tail": g["decay"]}
    ours = [cosine_floor_linear(t, g["S"], g["warmup"], **options) for t in g["steps"]]
    assert ours == pytest.approx(g["factor"], abs=1e-12)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_losses_of_a_model(path):
    from transformers import LlamaConfig, LlamaForCausalLM

    arrays = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    model.load_state_dict({k.removeprefix("w."): v for k, v in arrays.items() if k.startswith("w.")})
    view, objective = CausalView(model), OBJECTIVE.validate({})

    def loss(ids, mask=None):
        batch = {"input_ids": ids, "labels": arrays["labels"], "attention_mask": mask}
        batch["corrupted_ids"] = ids != arrays["input_ids"]
        return float(dict(objective.losses(None, view, batch, objective.count(batch), None))["tokens"])

    hit = arrays["masked_input_ids"] != arrays["input_ids"]
    logits = view.logits({"input_ids": arrays["masked_input_ids"]})
    assert torch.allclose(logits, arrays["logits_masked"], rtol=0, atol=1e-9)
    assert loss(arrays["masked_input_ids"]) == pytest.approx(float(arrays["loss_masked"]), abs=2e-6)
    assert loss(arrays["input_ids"]) == pytest.approx(float(arrays["loss_clean"]), abs=2e-6)
    assert loss(arrays["masked_input_ids"], (~hit).long()) == pytest.approx(float(arrays["loss_drop"]), abs=2e-6)
