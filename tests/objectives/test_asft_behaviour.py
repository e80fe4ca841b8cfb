"""The experiment of `evidence/asft.py`, one seed: the anchor keeps what DFT and SFT forget."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_anchor_keeps_what_dft_and_sft_forget():
    path = Path(__file__).parents[2] / "evidence" / "asft.py"
    spec = importlib.util.spec_from_file_location("evidence_asft", path)
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    results = experiment.one_seed(0)
    assert all(experiment.checks(results).values()), results
    assert results["asft 0.1"]["loss_b"] < results["asft 0.05"]["loss_b"] < results["dft"]["loss_b"]
    assert results["dft"]["loss_a"] > results["sft"]["loss_a"]  # over-confident: its likelihood is no measure here
