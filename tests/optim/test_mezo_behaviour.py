"""MeZO adapts a pre-trained model by forward passes alone: the experiments of `evidence/mezo.py`, on one seed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "evidence" / "mezo.py"


def evidence():
    spec = importlib.util.spec_from_file_location("evidence_mezo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["loss", "accuracy"])
def test_it_reaches_what_the_claim_requires(claim):
    script = evidence()
    result = script.adapt(claim, 0)
    assert result["pre_trained"] > 0.9
    assert result["zero_shot"] < 0.6
    assert script.verdict(claim, [result]) == "holds", result
