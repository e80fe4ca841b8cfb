"""What the command line's comparison can do besides: several cells at once, budgets, matched sizes, imported runs."""

import json

import pytest
from typer.testing import CliRunner

import pegbox
from pegbox.cli.main import app
from pegbox.errors import BadInput

COMMON = ["--batch", 2, "--max-length", 200, "--suite", "target", "--json", "--yes", "train.micro_batch=2"]
SMALL = ["evaluation.max_new_tokens=4"]


def call(*words):
    """The JSON that a command prints; its error, if it fails."""
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


@pytest.fixture
def compared(base, rows, tmp_path):
    """Runs `pegbox compare RECIPES OPTIONS` on the tiny model with published rates; rows by name."""

    def run(recipes, *options, seeds=1):
        words = ["compare", *recipes, *COMMON, *SMALL, "--out", tmp_path / "cmp", "--model", base]
        words += ["--data", rows / "chat.jsonl", "--eval-split", 0.2, "--test-split", 0.25]
        words += ["--trials", 0, "--seeds", seeds, "--select", "last"]
        return {row["name"]: row for row in call(*words, *options)["entries"]}

    return run


@pytest.mark.slow
def test_several_cells_at_once_give_what_one_after_another_gives(compared, base, rows, tmp_path):
    together = compared(["lora"], "--steps", 2, "--jobs", 2, seeds=2)["lora"]
    assert together["status"] == "finished"
    assert together["seeds"] == [1, 2]
    words = ["compare", "lora", *COMMON, *SMALL, "--out", tmp_path / "alone", "--model", base, "--steps", 2]
    words += ["--data", rows / "chat.jsonl", "--eval-split", 0.2, "--test-split", 0.25]
    alone = call(*words, "--trials", 0, "--seeds", 2, "--select", "last")
    row = next(e for e in alone["entries"] if e["name"] == "lora")
    assert row["scores"] == together["scores"]


@pytest.mark.slow
def test_a_finished_run_is_shown_as_a_row(compared, base, rows, tmp_path):
    pegbox.train(
        "full", model=str(base), data=str(rows / "chat.jsonl"), out=tmp_path / "own", steps=2, batch=2, micro_batch=2,
        max_length=200, suites=["target"], eval_split=0.25, overrides=SMALL,
    )  # fmt: skip
    found = compared(["lora"], "--steps", 2, "--import", tmp_path / "own")
    assert any("own" in name for name in found)


@pytest.mark.parametrize("budget", ["flops=5e9", pytest.param("seconds=2", marks=pytest.mark.slow)])
def test_a_budget_in_flops_or_seconds_gives_every_row_its_steps(compared, budget):
    found = compared(["lora"], "--budget", budget)
    assert found["lora"]["status"] == "finished"


def test_sizes_are_matched_by_parameters(compared):
    found = compared(["lora", "lift"], "--steps", 2, "--match", "params", "--reference", "lora")
    sizes = [found[name]["cost"]["trainable_parameters"] for name in ("lora", "lift")]
    assert abs(sizes[1] / sizes[0] - 1) < 0.1


@pytest.mark.slow
def test_sizes_are_matched_by_memory(compared):
    found = compared(["lora"], "--steps", 2, "--match", "memory=2GiB")
    assert found["lora"]["status"] == "finished"


def test_a_match_that_is_none_of_the_known_is_refused(compared):
    with pytest.raises(BadInput, match="memory"):
        compared(["lora"], "--steps", 2, "--match", "weight")


def test_cells_are_listed_and_run_one_by_one(compared, tmp_path):
    compared(["lora"], "--steps", 2)
    (cell,) = call("compare", "--out", tmp_path / "cmp", "--list-cells", "--json")
    assert (cell["cell"], cell["status"]) == ("lora/seed-1", "finished")
    assert call("compare", "--out", tmp_path / "cmp", "--cell", "lora/seed-1", "--json") == [cell]
    shown = CliRunner().invoke(app, ["compare", "--out", str(tmp_path / "cmp"), "--list-cells"])
    assert "lora/seed-1" in shown.stdout


def test_a_seed_laid_over_all_rows_is_refused(compared):
    with pytest.raises(BadInput, match="--seeds"):
        compared(["lora"], "--steps", 2, "seed=4")


def test_a_sweep_names_the_best(base, rows, tmp_path):
    words = ["sweep", "lora", "optim.lr=1e-4:1e-2:log", "tuner.r=2,4", "evaluation.max_new_tokens=4"]
    words += ["--model", base, "--data", rows / "chat.jsonl", "--out", tmp_path / "sweep", "--trials", 2]
    words += ["--steps", 2, "--batch", 2, "--max-length", 200, "--json"]
    found = call(*words)
    assert len(found["trials"]) == 2
    assert {t["settings"]["tuner.r"] for t in found["trials"]} == {2, 4}
    assert found["best"] in found["trials"]
    assert call(*words) == found
