"""LiNeS and the merges beside it against the official code's numbers."""

from __future__ import annotations

import json
import re

import pytest
import torch

from conftest import GOLDEN, golden_cases
from pegbox.weights import WEIGHTS
from pegbox.weights.lines import derived_alpha
from pegbox.weights.merges import tall_mask, task_arithmetic
from pegbox.weights.updates import Updates

FILES = golden_cases("lines", "golden*.json")
pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors in {GOLDEN / 'lines'}")

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6}


def state(plain, dtype=torch.float64):
    return {name: torch.tensor(values, dtype=dtype) for name, values in plain.items()}


def cases(part):
    """(file, position, case) of every case in the files that hold such a list."""
    found = []
    for path in FILES:
        listed = json.loads(path.read_text()).get(part, [])
        found += [pytest.param(path, case, id=f"{path.stem}-{part}-{i}") for i, case in enumerate(listed)]
    return found


def setting(path, dtype=torch.float64):
    data = json.loads(path.read_text())
    base = state(data["base"], dtype)
    tuned = [{n: base[n] + t for n, t in state(vector, dtype).items()} for vector in data["task_vectors"]]
    return data, base, tuned


def close(got, expected, tolerance):
    assert set(got) == set(expected)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), state(expected)[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("path", "case"), cases("cases"))
def test_scaling_and_merges(path, case, dtype):
    _, base, tuned = setting(path, dtype)
    tolerance = DTYPES[dtype]
    if case["kind"] == "single_task":
        op = WEIGHTS.validate({"kind": "lines", "alpha": case["alpha"], "beta": case["beta"]})
        result = dict(op.apply(base, [tuned[case["task"]]], None))
        close(result, case["edited"], tolerance)
        close({n: t - base[n] for n, t in result.items()}, case["scaled"], tolerance)
        return
    op = WEIGHTS.validate({**method(case["method"]), "scaler": {"kind": "lines", "alpha": None, "beta": case["beta"]}})
    updates = Updates(base, tuned)
    merged = type(op).function(updates, **op.options())
    close({n: merged.update(n) for n in updates.names}, case["merged"], tolerance)
    assert derived_alpha(updates, merged) == pytest.approx(case["alpha"], abs=tolerance)
    assert sum(float(merged.update(n).abs().sum()) for n in updates.names) == pytest.approx(
        case["norm_merged"], abs=50 * tolerance
    )
    scaled = {n: t - base[n] for n, t in op.apply(base, tuned, None)}
    close(scaled, case["scaled"], tolerance)


def method(name):
    if match := re.fullmatch(r"ties_k(\d+)_(\w+)", name):
        return {"kind": "ties", "keep": int(match[1]), "combine": match[2]}
    return {"kind": name}


def flat(update, keys):
    return torch.cat([update(name).double().reshape(-1) for name in keys])


@pytest.mark.parametrize(("path", "case"), cases("tall"))
def test_tall_masks(path, case):
    data, base, tuned = setting(path)
    updates = Updates(base, tuned)
    total = {n: sum(updates.deltas(n)) for n in data["keys"]}
    for task, expected in enumerate(case["mask"]):
        got = flat(lambda n, t=task: tall_mask(updates.delta(t, n), total[n], case["tall_lambda"]), data["keys"])
        assert got.tolist() == [float(x) for x in expected]
        op = WEIGHTS.validate({"kind": "tall", "task": task, "threshold": case["tall_lambda"]})
        result = dict(op.apply(base, tuned, None))
        masked = flat(lambda n: total[n], data["keys"]) * got
        changed = flat(lambda n, r=result: r[n] - base[n], data["keys"])
        torch.testing.assert_close(changed, masked, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("path", "case"), cases("consensus"))
def test_consensus(path, case):
    data, base, tuned = setting(path)
    op = WEIGHTS.validate({"kind": "consensus", "tasks": case["prun_thre_k"], "threshold": case["tall_lambda"]})
    result = dict(op.apply(base, tuned, None))
    total = torch.cat([sum(t[n] - base[n] for t in tuned).reshape(-1) for n in data["keys"]])
    expected = total * torch.tensor(case["mask"], dtype=torch.float64)
    torch.testing.assert_close(flat(lambda n: result[n] - base[n], data["keys"]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("path", "case"), cases("topk"))
def test_top_k(path, case):
    data, base, tuned = setting(path)
    updates = Updates(base, tuned)
    for task, expected in enumerate(case["kept"]):
        threshold = updates.threshold(task, case["k"])
        got = flat(lambda n, t=task, limit=threshold: updates.trimmed(t, n, limit), data["keys"])
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    total = torch.tensor(case["kept"], dtype=torch.float64).sum(0)
    merged = task_arithmetic(updates, keep=case["k"])
    torch.testing.assert_close(flat(merged.update, data["keys"]), total, atol=1e-12, rtol=0)
