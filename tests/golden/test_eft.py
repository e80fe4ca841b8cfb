"""Emulated fine-tuning against the reference values: the combination, its filter, the acceptance rule, whole runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import GOLDEN, golden_cases
from pegbox.decode.base import DECODE, DecodeContext
from pegbox.decode.combine import combine, residual, top_p_set, verify

FILES = golden_cases("eft", "*.json")
pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors in {GOLDEN / 'eft'}")


def files(prefix):
    return [(path, json.loads(path.read_text())) for path in golden_cases("eft", f"{prefix}*.json")]


def cases(prefix, key):
    return [
        pytest.param(data, case, id=f"{path.stem}-{i}")
        for path, data in files(prefix)
        for i, case in enumerate(data[key])
    ]


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(got, expected, tolerance):
    torch.testing.assert_close(got.double(), tensor(expected), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("data", "case"), cases("combine", "cases"))
def test_combination(data, case):
    logits = {name: tensor(values) for name, values in data["logits"].items()}
    tuned = [logits[name] for name in case["uses"]]
    got = combine(logits["anchor"], tuned, [logits["ref"]] * len(tuned), case["weights"])
    close(got, case["log_probs"], data["tolerance"])


@pytest.mark.parametrize(("data", "case"), cases("filter", "cases"))
def test_filter(data, case):
    logits = {name: tensor(values) for name, values in data["logits"].items()}
    if case["p"] < 1:
        assert top_p_set(logits["ft"], case["p"]).int().tolist() == case["in_set"]
    got = combine(logits["anchor"], [logits["ft"]], [logits["ref"]], [1.0], case["p"])
    close(got, case["log_probs"], data["tolerance"])


@pytest.mark.parametrize(("data", "case"), cases("speculative", "cases"))
def test_speculative_rounds(data, case):
    p, q, tokens = tensor(case["p"])[None], tensor(case["q"])[None], torch.tensor([case["draft"]])
    block = tokens.shape[1]
    kept = int(verify(p[:, :block], q, tokens, tensor([case["uniforms"]])).long().cumprod(-1).sum())
    assert kept == case["accepted"]
    following = p[0, block] if kept == block else residual(p[0, kept], q[0, kept])
    close(following, case["next_token_distribution"], data["tolerance"])


# ---- whole runs on tiny models --------------------------------------------------------------------------------------

RUNS = [
    pytest.param(path, data, run, id=f"{path.stem}-{i}")
    for path, data in files("tiny_runs")
    for i, run in enumerate(data["runs"])
]


def models(path, data, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    arrays = np.load(path.with_name(data["weights"].split(",")[0].strip()))
    found = {}
    for name in ("anchor", "ref", "ft"):
        config = data["anchor_config"] if name == "anchor" else data["small_config"]
        plain = {k: v for k, v in config.items() if k != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        model = LlamaForCausalLM(LlamaConfig(**plain, rope_parameters=rope, attn_implementation="eager"))
        state = {k.split("/", 1)[1]: torch.tensor(arrays[k]) for k in arrays.files if k.startswith(f"{name}/")}
        model.load_state_dict(state)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        found[name] = model.to(dtype).eval()
    return found


def decoding(found, run, **options):
    delta = {"tuned": "ft", "reference": "ref", "weight": run["weight"]}
    block = {"kind": "emulated", "deltas": [delta], "top_p": run["top_p"], **options}
    return DECODE.validate(block).bind(DecodeContext(found["anchor"], models=found))


def greedy(decoder, prompt, count, **options):
    ids = torch.tensor([prompt])
    return decoder.generate(ids, max_new_tokens=count, do_sample=False, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("path", "data", "run"), RUNS)
def test_whole_runs(path, data, run, dtype):
    found = models(path, data, dtype)
    wanted = run["greedy_tokens"]
    plain = decoding(found, run)
    tolerance = data["tolerance"]["log_probs_float64" if dtype == torch.float64 else "log_probs_float32"]
    ids = torch.tensor([run["prompt"] + wanted])
    got = plain(input_ids=ids).logits[0, len(run["prompt"]) - 1 :].log_softmax(-1)
    close(got[: len(run["first_three_log_probs"])], run["first_three_log_probs"], tolerance)
    assert greedy(plain, run["prompt"], len(wanted)) == wanted
    assert greedy(plain, run["prompt"], len(wanted), use_cache=False) == wanted
    for block in (1, 3, 4):
        assert greedy(decoding(found, run, block_size=block), run["prompt"], len(wanted)) == wanted


@pytest.mark.parametrize(("path", "data"), files("tiny_runs"), ids=lambda x: getattr(x, "stem", ""))
def test_whole_runs_in_a_batch(path, data):
    """Prompts of different length, padded on the left, give what each gives alone.

    In float32: transformers' eager attention casts its mask's smallest float64 to float32, which makes padding NaN.
    """
    found = models(path, data, torch.float32)
    settings = {(run["weight"], run["top_p"]) for run in data["runs"]}
    for weight, top_p in sorted(settings, key=str):
        runs = [r for r in data["runs"] if (r["weight"], r["top_p"]) == (weight, top_p)]
        width, count = max(len(r["prompt"]) for r in runs), min(len(r["greedy_tokens"]) for r in runs)
        gaps = [width - len(r["prompt"]) for r in runs]
        ids = torch.tensor([[0] * g + r["prompt"] for g, r in zip(gaps, runs)])
        mask = torch.tensor([[0] * g + [1] * len(r["prompt"]) for g, r in zip(gaps, runs)])
        for options in ({}, {"block_size": 3}):
            decoder = decoding(found, runs[0], **options)
            out = decoder.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
            assert out[:, width:].tolist() == [r["greedy_tokens"][:count] for r in runs]
