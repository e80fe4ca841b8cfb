"""MORepair against the official collator and loss: token lists, losses, gradients of the head, Top-k."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import GOLDEN, golden_cases
from pegbox.data.separated import collate_separated
from pegbox.objectives.views import MultiView
from pegbox.parts.context import Context
from pegbox.parts.passes import pass_at_k, top_k
from pegbox.tasks.views import CausalView

FILES = golden_cases("morepair", "*.json")
CASES = [(f.stem, name, case) for f in FILES for name, case in json.loads(f.read_text()).items()]
TOLERANCE = 2e-6  # transformers takes this loss in float32

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors under {GOLDEN / 'morepair'}")


def cases(*keys):
    found = [(f"{file}-{name}", name, case) for file, name, case in CASES if all(k in case for k in keys)]
    return pytest.mark.parametrize(("name", "case"), [(n, c) for _, n, c in found], ids=[i for i, _, _ in found])


def collated(case):
    options = {"eos_id": case["eos_id"], "pad_id": case["pad_id"], "max_length": case["max_len"]}
    return collate_separated(case["features"], **options, loss_on="all", eos_as_pad=True)


def model_of(arrays):
    weights = {k.removeprefix("w."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("w.")}
    embedding = weights["model.embed_tokens.weight"]
    layers = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("model.layers."))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=embedding.shape[0],
            hidden_size=embedding.shape[1],
            intermediate_size=weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings="lm_head.weight" not in weights,
        )
    ).double()
    model.load_state_dict(weights, strict=False)
    return model.eval()


def as_batch(views):
    def side(batch):
        rows = batch["input_ids"].shape[0]
        return {**batch, "sample_ids": torch.arange(rows), "sample_weight": torch.ones(rows)}

    return {**side(views["pred"]), "views": {"explain": side(views["expl"])}}


@cases("features", "pred", "expl")
def test_the_collator_gives_the_same_batches(name, case):
    for view, batch in collated(case).items():
        assert {k: v.tolist() for k, v in batch.items()} == case[view]


@cases("losses", "features")
@pytest.mark.parametrize("execution", ["sequential", "joined"])
def test_losses_and_gradients(name, case, execution):
    path = GOLDEN / "morepair" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no weights {path.name}")
    arrays = dict(np.load(path))
    model, batch = model_of(arrays), as_batch(collated(case))
    seen = {}
    for key, expected in case["losses"].items():
        only = key in ("pred", "expl")
        weights = {"weight": float(key == "pred"), "lam": float(key == "expl")} if only else {"lam": float(key)}
        views = {"explain": weights["lam"]}
        objective = MultiView(weight=weights.get("weight", 1.0), views=views, execution=execution)
        model.zero_grad()
        state = objective.setup(Context(model))
        items = objective.losses(state, CausalView(model), batch, objective.count(batch), None)
        loss = sum(value for title, value in items if not title.startswith("_"))
        loss.backward()
        assert float(loss) == pytest.approx(expected, abs=TOLERANCE), key
        seen[key] = float(loss)
        grad = arrays.get(f"grad_lm_head_lam{key}")
        if grad is not None:
            assert torch.allclose(model.lm_head.weight.grad, torch.from_numpy(grad), rtol=0, atol=TOLERANCE)
    assert len(seen) > 1


@cases("passed", "topk_percent")
def test_top_k_and_pass_at_k(name, case):
    for k, expected in case["topk_percent"].items():
        assert 100 * top_k(case["passed"], int(k)) == pytest.approx(expected, abs=1e-9)
    for k, expected in case["pass_at_k_unbiased"].items():
        assert 100 * pass_at_k(case["passed"], int(k)) == pytest.approx(expected, abs=1e-9)
