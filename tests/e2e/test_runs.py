"""Runs as a user meets them: folders protected, bad rows named, the wrong base refused, resuming, reports."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import pegbox
from pegbox.errors import BadInput, Corrupt, PegboxError, RunFailed, WrongBase
from pegbox.scoring import evaluate
from pegbox.testing import tiny_llama, tiny_tokenizer

SETTINGS = {"steps": 3, "batch": 2, "micro_batch": 2, "max_length": 200, "suites": ["target"], "eval_split": 0.25}
SMALL = ["tuner.r=4", "evaluation.max_new_tokens=4"]


@pytest.fixture(scope="module")
def finished(base, rows, tmp_path_factory):
    os.environ["PEGBOX_CACHE"] = str(base / "cache")
    out = tmp_path_factory.mktemp("finished") / "run"
    return pegbox.train("lora", model=str(base), data=str(rows / "chat.jsonl"), out=out, overrides=SMALL, **SETTINGS)


def test_what_a_run_leaves(finished):
    there = {p.name for p in finished.path.iterdir()}
    assert {"run.yaml", "recipe.yaml", "metrics.json", "log.jsonl", "artefact", "examples", "stages"} <= there
    assert not list(finished.path.rglob("*.bin"))
    assert not list(finished.path.rglob("*.pt"))
    metrics = finished.metrics
    assert metrics.before["target"].scores.keys() == metrics.after["target"].scores.keys()
    assert metrics.cost.trainable_parameters > 0
    assert metrics.cost.training_flops > 0


def test_a_finished_run_is_not_overwritten(finished, base, rows):
    with pytest.raises(BadInput, match="already holds a run"):
        pegbox.train("lora", model=str(base), data=str(rows / "chat.jsonl"), out=finished.path, **SETTINGS)


def test_a_report_is_written(finished):
    paths = finished.report(["html", "csv"])
    assert all(p.stat().st_size > 200 for p in paths)


def test_the_run_verifies_and_notices_damage(finished, tmp_path):
    import shutil

    from pegbox.workspace import verify_run

    assert any("artefact verified" in line for line in verify_run(finished.path))
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    file = next((copy / "artefact").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(Corrupt, match=file.name):
        verify_run(copy)


def test_another_base_is_refused(finished, tmp_path):
    tiny_llama(seed=5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(WrongBase, match="fingerprint"):
        pegbox.load(finished.path, base=str(tmp_path))


def test_evaluate_against_the_base(finished):
    found = evaluate(finished.path, vs="base", max_new_tokens=4)
    entry = next(e for e in found.rows() if e["suite"] == "target" and "difference" in e)
    assert entry["difference_low"] <= entry["difference"] <= entry["difference_high"]


def test_a_chat_without_an_answer_is_named(base, rows, tmp_path):
    with pytest.raises(BadInput, match=r"broken\.jsonl"):
        pegbox.train("lora", model=str(base), data=str(rows / "broken.jsonl"), out=tmp_path / "r", **SETTINGS)


def test_malformed_rows_name_file_line_and_column(base, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": }\n')
    with pytest.raises(BadInput, match=r"bad\.jsonl, line 2"):
        pegbox.train("lora", model=str(base), data=str(path), out=tmp_path / "r", **SETTINGS)


def test_a_target_that_matches_nothing(base, rows, tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        pegbox.train(
            "lora",
            model=str(base),
            data=str(rows / "chat.jsonl"),
            out=tmp_path / "r",
            overrides=["tuner.target_modules=[nowhere]"],
            **SETTINGS,
        )


@pytest.mark.parametrize("density", [0, -0.1, 1.5])
def test_density_outside_its_range(base, rows, tmp_path, density):
    with pytest.raises(BadInput, match="density"):
        pegbox.train(
            "lift",
            model=str(base),
            data=str(rows / "chat.jsonl"),
            out=tmp_path / "r",
            overrides=[f"select.budget.density={density}"],
            **SETTINGS,
        )


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(base, rows, tmp_path):
    with pytest.raises(RunFailed, match=r"Step \d+: the loss is nan(.|\n)*Rows of this step: [0-9a-f]{16}"):
        pegbox.train(
            "full",
            model=str(base),
            data=str(rows / "chat.jsonl"),
            out=tmp_path / "r",
            overrides=["optim.kind=sgd", "optim.lr=1e30", "optim.max_grad_norm=0", "optim.warmup=0"],
            **{**SETTINGS, "steps": 8},
        )
    assert pegbox.open_run(tmp_path / "r").status == "failed"


def test_killed_and_resumed_ends_in_the_same_weights(base, rows, tmp_path):
    """A run killed with SIGKILL in the middle, resumed, against one that was left alone."""
    import torch

    words = ["lora", "--model", base, "--data", rows / "chat.jsonl", "--steps", 12, "--batch", 2, "--micro-batch", 1]
    words += [*SMALL, "train.save_every=2", "evaluation.suites=[]", "tuner.lora_dropout=0.1", "--json"]
    command = [sys.executable, "-m", "pegbox.cli", "train", *map(str, words)]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    cut = [*command, "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "stages" / "train" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len([e for e in _events(log) if e == "step"]) >= 5:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    done = subprocess.run([*cut, "--resume"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (pegbox.load(tmp_path / n)[0].state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_changed_settings_on_resume_are_named(finished, base, rows):
    with pytest.raises(BadInput, match=r"seed: 0 -> 7"):
        pegbox.train("lora", out=finished.path, resume=True, seed=7)


def test_errors_of_ours_are_not_value_errors():
    assert not issubclass(PegboxError, ValueError)


def _events(log):
    events = []
    for line in log.read_text().splitlines():
        try:
            events.append(json.loads(line)["event"])
        except (ValueError, KeyError):
            continue
    return events
