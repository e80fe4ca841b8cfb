"""Value-guided decoding against the official code's steps, exact tables, and the official measures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import GOLDEN, golden_cases
from pegbox.decode.base import DECODE, DecodeContext
from pegbox.decode.measures import diversity, repetition
from pegbox.decode.rewards import IdReward
from pegbox.decode.values import divergence, policy

FILES = golden_cases("transfer-q", "*.json")
pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors in {GOLDEN / 'transfer-q'}")


def files(prefix):
    return [(path, json.loads(path.read_text())) for path in golden_cases("transfer-q", f"{prefix}*.json")]


# ---- the official step ----------------------------------------------------------------------------------------------

RUNS = [
    pytest.param(path, data, name, run, id=f"{path.stem}-{name}")
    for path, data in files("step")
    for name, run in data["runs"].items()
]


def model_of(path, data):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = data["config"]
    plain = {k: v for k, v in config.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**plain, rope_parameters=rope, attn_implementation="eager"))
    arrays = np.load(path.with_name(data["weights"]))
    model.load_state_dict({k: torch.tensor(arrays[k]) for k in arrays.files})
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.double().eval()


def mean_of(table):
    values = torch.tensor(table, dtype=torch.float64)
    return IdReward(lambda prompts, answers: [float(values[p + a].mean()) for p, a in zip(prompts, answers)])


def decoding(path, data, run):
    model = model_of(path, data)
    indirect = any(step["baseline_reward"] is not None for step in run["steps"])
    block = {
        "kind": "transfer_q",
        "alpha": 1.0 / run["weight"],
        "k": data["k"],
        "horizon": run["rollout_tokens"],
        "rollouts": 1,
    }
    options = {"reward": mean_of(data["reward_table"])}
    if indirect:
        block |= {"value": "transfer_indirect", "beta": data["beta"], "estimator": "none", "baseline_reward": "other"}
        options["baseline_reward"] = mean_of(data["baseline_reward_table"])
    return DECODE.validate(block).bind(DecodeContext(model, models={"baseline": model}, options=options))


@pytest.mark.parametrize(("path", "data", "name", "run"), RUNS)
def test_the_official_steps(path, data, name, run):
    decoder, prompt = decoding(path, data, run), data["prompt"]
    ids = torch.tensor([prompt])
    session, answer = decoder.begin(ids, torch.ones_like(ids)), []
    for step in run["steps"]:
        said = torch.tensor([answer], dtype=torch.long)
        scores = session.scores(said)[0]
        candidates = scores.isfinite().nonzero().flatten().tolist()
        assert sorted(candidates) == sorted(step["candidates"])
        got = scores[step["candidates"]]
        shift = torch.tensor(step["score"], dtype=torch.float64) - got  # raw logits there, log-probabilities here
        assert (shift - shift[0]).abs().max() <= 5e-6
        tokens = torch.tensor([step["candidates"]])
        values = session.values(said, tokens, [True])[0]
        torch.testing.assert_close(values, torch.tensor(step["value"], dtype=torch.float64), atol=5e-6, rtol=0)
        answer.append(step["chosen"])
        assert int(scores.argmax()) == step["chosen"]
    out = decoder.generate(ids, max_new_tokens=len(run["output"]), do_sample=False)
    assert out[0, len(prompt) :].tolist() == run["output"]


# ---- exact tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "data"), files("tabular"), ids=lambda x: getattr(x, "stem", ""))
def test_policies_of_exact_values(path, data):
    tolerance = data["tolerance"]
    for state in data["states"]:
        log_probs, values = (torch.tensor(state[k], dtype=torch.float64) for k in ("pi_sft", "Q_optimal"))
        log_probs = log_probs.log()
        for alpha, wanted in state["alpha"].items():
            scores = policy(log_probs, values, float(alpha))
            got = scores.softmax(-1)
            assert np.allclose(got, wanted["policy"], atol=tolerance, rtol=0)
            assert float(divergence(scores, log_probs)) == pytest.approx(wanted["kl_to_sft"], abs=tolerance)
            assert float((got * values).sum()) == pytest.approx(wanted["expected_Q"], abs=tolerance)


@pytest.mark.parametrize(("path", "data"), files("tabular"), ids=lambda x: getattr(x, "stem", ""))
def test_values_by_enumeration(path, data):
    """Rollouts enumerated instead of drawn: every continuation, weighted by the rolling model's probability."""
    sequences = data["sequences"]
    r, r_bl = (torch.tensor(data[k], dtype=torch.float64) for k in ("reward", "baseline_reward"))
    rho, rho_bl = (torch.tensor(data[k], dtype=torch.float64) for k in ("rho_target", "rho_baseline"))
    weight = ((r - r_bl) / data["beta"]).exp()
    for state in data["states"]:
        for token in range(data["vocab"]):
            begun = [*state["prefix"], token]
            inside = torch.tensor([s[: len(begun)] == begun for s in sequences])
            p, q = rho[inside] / rho[inside].sum(), rho_bl[inside] / rho_bl[inside].sum()
            w, target = weight[inside], r[inside]
            found = {
                "Q_optimal": (p * target).sum(),
                "Q_indirect_self_normalised": (q * w * target).sum() / (q * w).sum(),
                "Q_indirect_unnormalised": (q * w * target).sum(),
            }
            for name, value in found.items():
                assert float(value) == pytest.approx(state[name][token], abs=1e-9), (name, begun)


# ---- measures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "data"), files("metrics"), ids=lambda x: getattr(x, "stem", ""))
def test_measures(path, data):
    for row in data["rows"]:
        for n in (2, 3, 4):
            assert repetition(row["text"], n) == pytest.approx(row[f"rep_{n}"], abs=data["tolerance"])
        assert diversity(row["text"]) == pytest.approx(row["diversity"], abs=data["tolerance"])
