"""TuCo against hand-derived vectors: the decomposition, its curves, and generation with the tuning scaled."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from pegbox.analyze.contribution import share, tuning_contribution
from pegbox.parts.mixing import mixed
from pegbox.parts.pairs import ModelPair

ROOT = GOLDEN / "tuco"
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def read(path):
    return json.loads(path.read_text())


def is_models(path):
    return "rows" in read(path)


FILES = sorted(ROOT.glob("*.json")) if ROOT.is_dir() else []
MODELS = [p for p in FILES if is_models(p)]
TOYS = [p for p in FILES if "FTC" in read(p)]
ROWS = [(p, i) for p in MODELS for i in range(len(read(p)["rows"]))]

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors in {ROOT}")


def build(config, arrays, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**config, "attn_implementation": "eager"}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
    missing = set(model.state_dict()) - set(state)
    assert missing <= ({"lm_head.weight"} if config.get("tie_word_embeddings") else set())
    model.load_state_dict(state, strict=not missing)
    return model.to(dtype).eval()


def pair_of(path, dtype):
    case = read(path)
    data = np.load(path.parent / Path(case["weights"].split()[0]))
    parts = [{k.removeprefix(g): data[k] for k in data.files if k.startswith(g)} for g in ("pt/", "ft/")]
    base, tuned = (build(case["config"], part, dtype) for part in parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ModelPair(tuned, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("path", "row"), ROWS, ids=lambda v: v.stem if isinstance(v, Path) else str(v))
def test_decomposition(path, row, dtype):
    case = read(path)
    expected, tolerance = case["rows"][row], case.get("tolerance", {"float64": 5e-6, "float32": 2e-4})[dtype]
    batch = {"input_ids": torch.tensor([expected["prompt"]])}
    pair = pair_of(path, DTYPES[dtype])
    found = tuning_contribution(pair, batch, tokens=True, output=True)
    two = tuning_contribution(pair, batch, norm=2)
    measured = {
        "tuco": found.tuco[0],
        "preco": found.preco[0],
        "tuco_l2": two.tuco[0],
        "output_co": found.output[0],
        "beta_all_tokens_per_layer": found.all_tokens[0],
        "beta_last_token_per_layer": found.curve[0],
        "per_token": found.per_token[0],
        "PTC_sum_last": found.base_sum[0],
        "FTC_sum_last": found.tuned_sum[0],
        "x0_last": found.start[0],
        "xL_last": found.end[0],
    }
    for name, value in measured.items():
        if name in expected:
            wanted = torch.tensor(expected[name], dtype=torch.float64)
            torch.testing.assert_close(
                value.double(), wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    if "sum_of_norms_WRONG" in expected:
        assert abs(float(found.tuco[0]) - expected["sum_of_norms_WRONG"]) > tolerance


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("path", "row"), ROWS, ids=lambda v: v.stem if isinstance(v, Path) else str(v))
def test_scaling(path, row, dtype):
    case = read(path)
    expected, tolerance = case["rows"][row], case.get("tolerance", {"float64": 5e-6, "float32": 2e-4})[dtype]
    pair = pair_of(path, DTYPES[dtype])
    ids = torch.tensor([expected["prompt"]])
    for alpha, wanted in _alphas(expected["alpha"]):
        values = dict(wanted)
        tokens = next(v for k, v in values.items() if "token" in k or "greedy" in k)
        logits = next(v for k, v in values.items() if "logits" in k)
        with mixed(pair, alpha) as model:
            found = model(input_ids=ids, use_cache=False).logits[0, -1]
            drawn = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(tokens), do_sample=False
            )[0, ids.shape[1] :]
        torch.testing.assert_close(found.double(), torch.tensor(logits, dtype=torch.float64), rtol=0, atol=tolerance)
        if dtype == "float64":
            assert drawn.tolist() == tokens


def _alphas(block):
    entries = block.items() if isinstance(block, dict) else ((b["alpha"], b) for b in block)
    return [(float(alpha), value) for alpha, value in entries]


@pytest.mark.parametrize("path", TOYS, ids=lambda p: p.stem)
def test_the_papers_worked_example(path):
    case = read(path)
    tuned, base = (torch.tensor(case[k], dtype=torch.float64).cumsum(0) for k in ("FTC", "PTC"))
    torch.testing.assert_close(share(base, tuned), torch.tensor(case["beta_per_layer"]).double(), rtol=0, atol=1e-7)
    assert float(share(base[-1], tuned[-1])) == pytest.approx(case["tuco"])
    end = torch.tensor(case["x0"], dtype=torch.float64) + base[-1] + tuned[-1]
    assert end.tolist() == pytest.approx(case["final_state"])
