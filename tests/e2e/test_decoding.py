"""Decoding recipes from end to end on tiny models: a posthoc run, what it leaves, and the options of the commands."""

import json

import pytest
import yaml
from typer.testing import CliRunner

import pegbox
from pegbox.cli.main import app
from pegbox.errors import BadInput, Unsupported
from pegbox.parts.generation import generate
from pegbox.scoring import evaluate
from pegbox.testing import tiny_llama, tiny_tokenizer

COMMON = {"steps": 3, "batch": 2, "micro_batch": 2, "max_length": 200, "suites": [], "eval_split": 0.0}
SMALL = ["evaluation.max_new_tokens=6", "evaluation.limit=3"]
ASK = [[{"role": "user", "content": "add 1 and 2"}]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A smaller base of the same vocabulary, in a folder."""
    folder = tmp_path_factory.mktemp("small")
    tiny_llama(5, hidden_size=16, intermediate_size=24).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(small, base, rows, tmp_path_factory):
    import os

    os.environ["PEGBOX_CACHE"] = str(base / "cache")
    out = tmp_path_factory.mktemp("tuned") / "run"
    data = str(rows / "chat.jsonl")
    return pegbox.train(
        "lora", model=str(small), data=data, out=out, overrides=["tuner.r=4", "optim.lr=0.05"], **COMMON
    )


@pytest.fixture(scope="module")
def upscaled(base, rows, tuned, tmp_path_factory):
    return pegbox.train(
        "eft",
        model=str(base),
        test_data=str(rows / "chat.jsonl"),
        out=tmp_path_factory.mktemp("eft") / "run",
        suites=["target", "retention"],
        overrides=[*SMALL, f"models.tuned={tuned.path}"],
    )


def test_a_posthoc_run_measures_base_and_decoded(upscaled):
    """No weights are made; base and decoded answers are measured on the target rows, likelihoods too."""
    metrics = upscaled.metrics
    assert metrics.before["target"].scores.keys() == metrics.after["target"].scores.keys()
    assert metrics.before["retention"].scores.keys() == metrics.after["retention"].scores.keys()
    values = [m["retention"].scores["perplexity"].value for m in (metrics.before, metrics.after)]
    assert values[0] != values[1]
    assert set(metrics.extra["decoding"]["calls"]) == {"anchor", "tuned", "tuned.base"}
    assert not (upscaled.path / "artefact").exists()
    record = json.loads((upscaled.path / "decoding.json").read_text())
    assert record["decode"]["kind"] == "emulated"
    assert set(record["models"]) == {"tuned"}
    assert upscaled.report(["html"])[0].stat().st_size > 500


def test_a_decoding_run_answers_by_its_decoder(upscaled, base, tuned):
    """`pegbox generate RUN` is the same as naming the decoder and its roles on the base."""
    from pegbox.ask import answers, open_any
    from pegbox.runner.decoding import roles_from

    model, tokenizer = open_any(str(upscaled.path))
    wanted = generate(model, tokenizer, ASK, max_new_tokens=6)
    shown = answers(str(upscaled.path), ASK, beside="base", max_new_tokens=6)[0]
    assert shown["run"] == wanted[0]
    assert shown["base"] == generate(*open_any(str(base)), ASK, max_new_tokens=6)[0]
    named = answers(str(base), ASK, decode="eft", roles=roles_from([f"tuned={tuned.path}"]), max_new_tokens=6)[0]
    assert wanted[0] in named.values()


def test_weight_zero_is_the_base(base, rows, tuned, tmp_path):
    run = pegbox.train(
        "eft",
        model=str(base),
        test_data=str(rows / "chat.jsonl"),
        out=tmp_path / "run",
        suites=["target"],
        overrides=[*SMALL, f"models.tuned={tuned.path}", "decode.deltas=[{tuned: tuned, weight: 0.0}]"],
    )
    before, after = (m["target"].scores for m in (run.metrics.before, run.metrics.after))
    assert {n: s.value for n, s in before.items()} == pytest.approx({n: s.value for n, s in after.items()}, rel=1e-5)


def test_the_commands(base, rows, tuned, tmp_path):
    """generate, chat and evaluate take --decode (a kind, a block, a file, a recipe) and --role."""
    runner = CliRunner()
    block = "{kind: emulated, top_p: 0.9, block_size: 2}"
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"kind": "emulated", "top_p": 0.9, "block_size": 2}))
    role = ["--role", f"tuned={tuned.path}", "--device", "cpu"]
    said = []
    for decode in (block, str(file)):
        words = ["generate", str(base), "add 1 and 2", "--decode", decode, *role, "--max-new-tokens", "5", "--json"]
        done = runner.invoke(app, words)
        assert done.exit_code == 0, done.output
        said.append(done.stdout)
    assert said[0] == said[1]
    done = runner.invoke(app, ["chat", str(base), "--decode", "eft", *role, "--max-new-tokens", "4"], input="hello\n\n")
    assert done.exit_code == 0, done.output
    words = ["evaluate", str(base), "--data", str(rows / "chat.jsonl"), "--suite", "target", "--decode", "emulated"]
    done = runner.invoke(app, [*words, *role, "--max-new-tokens", "4", "--limit", "2", "--vs", str(base), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scores"]


def test_evaluating_a_decoding_run(upscaled):
    found = evaluate(str(upscaled.path), suites=["target"], max_new_tokens=4, limit=2)
    assert found.rows()


def test_a_tuned_run_as_the_anchor_of_another(base, tuned, small):
    """Down-scaling: the pair may be larger than the anchor, and the anchor a run of its own."""
    from pegbox.ask import open_any
    from pegbox.runner.decoding import roles_from

    roles = roles_from([f"large={base}", f"other={base}"])
    block = {"kind": "emulated", "deltas": [{"tuned": "large", "reference": "other"}]}
    model, tokenizer = open_any(str(tuned.path), decode=block, roles=roles)
    plain, _ = open_any(str(tuned.path))
    assert generate(model, tokenizer, ASK, max_new_tokens=6) == generate(plain, tokenizer, ASK, max_new_tokens=6)


def test_what_is_refused(base, rows, tuned, tmp_path):
    data = str(rows / "chat.jsonl")
    with pytest.raises(Unsupported, match=r"models: \{tuned"):
        pegbox.train("eft", model=str(base), test_data=data, out=tmp_path / "a")
    named = [f"models.tuned={tuned.path}", "protocol.kind=staged", "protocol.stages=[{name: one}]"]
    with pytest.raises(Unsupported, match="measures models as they are"):
        pegbox.train("eft", model=str(base), data=data, out=tmp_path / "b", overrides=named)
    with pytest.raises(Unsupported, match="draws text"):
        pegbox.train(
            "eft", model=str(base), data=data, out=tmp_path / "c", overrides=[*named[:1], "task.kind=classification"]
        )
    from pegbox.ask import open_any
    from pegbox.runner.decoding import roles_from

    with pytest.raises(BadInput, match="decode kind 'emulatd'"):
        open_any(str(base), decode="emulatd")
    with pytest.raises(BadInput, match="no `decode:` block"):
        open_any(str(base), decode="lora")
    with pytest.raises(BadInput, match="--decode"):
        open_any(str(base), roles=roles_from([f"tuned={tuned.path}"]))
    with pytest.raises(BadInput, match="left"):
        roles_from(["tuned"])
    with pytest.raises(BadInput, match="What 'tuned' was tuned from"):
        open_any(str(base), decode="emulated", roles=roles_from([f"tuned={base}"]))


# ---- value-guided ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A classifier with one output, in a folder."""
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("scorer")
    config = tiny_llama(7).config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def guided(base, rows, tuned, out, *overrides):
    return pegbox.train(
        "transfer-q",
        model=str(base),
        test_data=str(rows / "chat.jsonl"),
        out=out,
        overrides=[*SMALL, f"models.baseline={tuned.path}", "decode.k=3", "decode.horizon=3", *overrides],
    )


@pytest.fixture(scope="module")
def aligned(base, rows, tmp_path_factory):
    import os

    os.environ["PEGBOX_CACHE"] = str(base / "cache")
    out, data = tmp_path_factory.mktemp("aligned") / "run", str(rows / "chat.jsonl")
    return pegbox.train("lora", model=str(base), data=data, out=out, overrides=["tuner.r=4", "optim.lr=0.05"], **COMMON)


def test_a_value_guided_run(base, rows, aligned, scorer, tmp_path):
    """Measured on answers alone: likelihood metrics and suites are left out, before and after alike."""
    reward = f"models.reward={{of: {scorer}, task: sequence-classification}}"
    run = guided(base, rows, aligned, tmp_path / "run", reward)
    metrics = run.metrics
    assert set(metrics.before) == set(metrics.after) == {"target"}
    assert set(metrics.after["target"].scores) == {"exact_match"}
    found = metrics.extra["decoding"]
    assert found["rewards"] > 0
    assert set(found["tokens"]) == {"reference", "baseline"}
    from pegbox.ask import answers

    shown = answers(str(run.path), ASK, max_new_tokens=3)[0]
    assert set(shown) == {"prompt", "run"}
    assert run.report(["html"])[0].stat().st_size > 500


def test_a_function_as_reward(base, rows, aligned, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(prompts, completions):\n    return [float(len(set(c))) for c in completions]\n")
    run = guided(base, rows, aligned, tmp_path / "run", f"decode.reward={file}:score", "decode.value=rollout_ref")
    assert run.metrics.extra["decoding"]["divergence"] >= 0
    words = ["generate", str(base), "hello", "--decode", f"{{kind: best_of, n: 3, reward: '{file}:score'}}", "--json"]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    with pytest.raises(BadInput, match="no function 'other'"):
        guided(base, rows, aligned, tmp_path / "b", f"decode.reward={file}:other")


def test_a_reward_role_from_the_command_line(base, aligned, scorer):
    roles = ["--role", f"baseline={aligned.path}", "--role", f"reward=classifier:{scorer}"]
    words = ["generate", str(base), "hello", "--decode", "{kind: transfer_q, k: 2, horizon: 2}", *roles, "--json"]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.output


def test_likelihoods_that_do_not_exist_are_refused(base, rows, aligned, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(text):\n    return 0.0\n")
    with pytest.raises(Unsupported, match="no probability"):
        guided(base, rows, aligned, tmp_path / "r", f"decode.reward={file}:score", "evaluation.metric=perplexity")


def test_a_training_recipe_is_measured_through_its_decoder(base, rows, tmp_path):
    """Scaled to nothing, what a run learnt in its adapter doesn't show: after is before; the run answers so too."""
    from pegbox.ask import answers

    run = pegbox.train(
        {"tuner": {"kind": "lora", "r": 4}, "optim": {"lr": 0.05}, "decode": {"kind": "scaled", "alpha": 0.0}},
        model=str(base),
        data=str(rows / "chat.jsonl"),
        out=tmp_path / "run",
        overrides=SMALL,
        **{**COMMON, "suites": ["target"], "eval_split": 0.25},
    )
    before, after = (m["target"].scores["perplexity"].value for m in (run.metrics.before, run.metrics.after))
    assert after == pytest.approx(before, rel=1e-4)
    shown = answers(str(run.path), ASK, beside="base", max_new_tokens=4)[0]
    assert shown["run"] == shown["base"]
