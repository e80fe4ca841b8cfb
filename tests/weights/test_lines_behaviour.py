"""What LiNeS does to a trained net: the trade-off of `evidence/lines.py`, on one seed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "evidence" / "lines.py"


@pytest.mark.slow
def test_scaling_traces_a_trade_off_and_recovers_what_was_lost():
    spec = importlib.util.spec_from_file_location("evidence_lines", SCRIPT)
    evidence = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evidence)
    result = evidence.one_seed(0)
    assert result["base"]["controls"] > 0.9
    assert result["tuned"]["controls"] < result["base"]["controls"] - 0.1  # there is something to win back
    assert all(evidence.checks(result).values()), evidence.checks(result)
