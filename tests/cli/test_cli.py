"""The command line: light to start, exit codes that mean something, errors that name the thing and the remedy."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pegbox.cli.main import COMMANDS, app
from pegbox.errors import BadInput, DoesNotFit, PegboxError, Stopped, WrongBase

runner = CliRunner()


def run(*words):
    """Run a command in this process; errors of ours come out as exceptions, as `main` sees them."""
    return runner.invoke(app, [str(w) for w in words], catch_exceptions=True)


def script(*words):
    command = [sys.executable, "-m", "pegbox.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom pegbox.cli.main import app\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'pydantic', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command():
    text = run("--help").output
    for command in (*COMMANDS, "generate"):
        assert command in text


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "runs"])
def test_every_command_has_help(command):
    assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["train", "loraa", "--model", "m", "--data", "d"], BadInput, "Did you mean 'lora'"),
        (["train", "lora", "--data", "d.jsonl"], BadInput, "--model"),
        (["train", "lora", "--model", "m", "--data", "network", "--dry-run", "x"], BadInput, "key=value"),
        (["train", "lora", "optim.lrr=1", "--model", "m", "--data", "network"], BadInput, r"optim\.lrr"),
        (["train", "lora", "--model", "m", "--data", "network", "--epochs", "1", "--steps", "2"], BadInput, "--epochs"),
        (["train", "lora", "--model", "m", "--data", "network", "--micro-batch", "many"], BadInput, "micro-batch"),
        (["recipes", "nope"], BadInput, "Known"),
        (["recipes", "--axis", "selekt"], BadInput, "select"),
        (["report", "/no/such/folder"], BadInput, "metrics"),
        (["runs", "show", "/no/such/folder"], BadInput, "no run"),
        (["compare", "lora", "--out", "/tmp/none-such-comparison"], BadInput, "--model and --data"),
        (["evidence", "nope"], BadInput, "No evidence"),
        (["plan", "lora", "--model", "m", "--memory", "lots"], BadInput, "24GiB"),
    ],
)
def test_bad_input_is_refused_before_anything_heavy(words, error, text):
    done = run(*words)
    assert isinstance(done.exception, error), done.exception
    assert re.search(text, str(done.exception)), str(done.exception)


def test_exit_codes():
    assert [e.exit_code for e in (PegboxError, BadInput, DoesNotFit, Stopped, WrongBase)] == [1, 2, 3, 4, 5]
    done = script("recipes", "nope")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_recipes_as_json_and_a_new_one(tmp_path, monkeypatch):
    rows = json.loads(run("recipes", "--json").output)
    assert {"lora", "lift", "hft"} <= {row["name"] for row in rows}
    assert all({"title", "axes", "paper", "evidence"} <= row.keys() for row in rows)
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "new", "mine").exit_code == 0
    from pegbox.recipe import load_recipe

    assert load_recipe(tmp_path / "mine.yaml").title == "mine"
    assert isinstance(run("recipes", "new", "mine").exception, BadInput)


@pytest.mark.parametrize("subject", ["run", "recipe", "log", "metrics"])
def test_schemas(subject):
    schema = json.loads(run("schema", subject).output)
    assert schema["properties"]


def test_data_shows_rows_without_a_model():
    shown = json.loads(run("data", "network:train:5", "--json").output)
    assert shown["format"] == "network"


def test_a_dry_run_writes_nothing(tmp_path):
    out = tmp_path / "run"
    done = run("train", "lora", "--model", "m", "--data", "network", "--steps", 2, "--out", out, "--dry-run")
    assert done.exit_code == 0, done.exception
    assert not out.exists()


def test_a_plugin_adds_a_kind(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from pegbox.select.base import SELECT, Selector\n"
        "@SELECT.register\n"
        "class Mine(Selector):\n"
        "    kind: Literal['mine_of_test'] = 'mine_of_test'\n"
        "    produces = frozenset({'whole'})\n"
    )
    (tmp_path / "mine.yaml").write_text("select: {kind: mine_of_test}\ntuner: {kind: full}\n")
    words = ["train", tmp_path / "mine.yaml", "--model", "m", "--data", "network", "--dry-run", "--out", tmp_path / "r"]
    assert isinstance(run(*words).exception, BadInput)
    assert run(*words, "--plugin", tmp_path / "mine.py").exit_code == 0


def test_a_plugin_that_fails_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    words = ["train", "lora", "--model", "m", "--data", "network", "--plugin", tmp_path / "bad.py", "--dry-run"]
    assert "ZeroDivisionError" in str(run(*words).exception)
