"""Run settings and run folders: one home per value, changed settings named, other people's folders left alone."""

import pytest

from pegbox.errors import BadInput
from pegbox.run import build_spec
from pegbox.spec import RunSpec
from pegbox.workspace import Workspace, list_runs, read_spec


def spec(**changes):
    return build_spec("lora", **{"model": "m", "data": "x.jsonl", "steps": 5, **changes})


def test_a_run_file_reproduces_itself(tmp_path):
    first = spec(seed=3, overrides=["tuner.r=4", "train.save_every=2", "evaluation.limit=7"])
    assert first.recipe.get("tuner.r") == 4
    assert first.settings().save_every == 2
    workspace = Workspace(tmp_path / "run")
    workspace.check(first, resume=False)
    workspace.open(first)
    again = build_spec(tmp_path / "run" / "run.yaml")
    assert again.changed(first) == []
    assert again.digest() == first.digest()
    assert read_spec(tmp_path / "run").plain() == first.plain()


def test_lengths_exclude_each_other():
    with pytest.raises(BadInput, match="one of --epochs, --steps, --tokens"):
        spec(epochs=1)
    assert spec().settings(epochs=2).steps is None
    assert spec(steps=None).settings().epochs == 1
    bounded = spec(steps=None, overrides=["train.epochs=2", "train.max_steps=9"])
    assert bounded.settings().max_steps == 9
    assert bounded.settings(steps=3).max_steps is None


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("train.learning_rate=1", r"optim\.lr"),
        ("train.seed=1", "give it as seed"),
        ("train.output_dir=x", "--out"),
        ("train.hub_token=x", "secrets"),
        ("train.stepz=3", "steps"),
        ("rows.max_length=2", r"rows\.max_length"),
        ("evaluation.sweets=[a]", "suites"),
    ],
)
def test_second_homes_and_unknown_keys_are_refused(override, word):
    with pytest.raises(BadInput, match=word):
        spec(overrides=[override])


def test_other_fields_of_training_arguments_are_taken():
    assert spec(overrides=["train.dataloader_num_workers=2"]).settings().train == {"dataloader_num_workers": 2}


def test_no_model_is_an_error_that_says_what_to_give():
    with pytest.raises(BadInput, match="--model"):
        build_spec("lora", data="x.jsonl")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.check(spec(), resume=False)
    workspace.open(spec())
    with pytest.raises(BadInput, match="already holds a run"):
        workspace.check(spec(), resume=False)
    workspace.check(spec(), resume=True)
    with pytest.raises(BadInput, match=r"train\.steps: 5 -> 6"):
        workspace.check(spec(steps=6), resume=True)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        Workspace(tmp_path).check(spec(), resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no run"):
        Workspace(tmp_path / "none").check(spec(), resume=True)


def test_one_run_at_a_time(tmp_path):
    workspace = Workspace(tmp_path / "run")
    with workspace.locked(), pytest.raises(BadInput, match="another"), Workspace(tmp_path / "run").locked():
        pass


def test_runs_are_listed(tmp_path):
    for name in ("a", "b"):
        workspace = Workspace(tmp_path / name)
        workspace.open(spec())
        workspace.folder.mkdir(exist_ok=True)
        workspace.set_status("finished")
    found = list_runs(tmp_path)
    assert {run["status"] for run in found} == {"finished"}
    assert {run["recipe"] for run in found} == {"LoRA"}


def test_unknown_keys_of_a_run_file_are_refused():
    with pytest.raises(BadInput, match="Did you mean 'model'"):
        RunSpec.of({**spec().plain(), "modle": "x"})
