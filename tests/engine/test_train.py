"""`train_stage` on a tiny model: exact resume, guards, evaluation, schedules, policies, owners, stopping."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.forks import in_process
from engine.helpers import COLLATE, examples, model, stage, weights
from pegbox.data.base import DataPolicy
from pegbox.engine import Listener
from pegbox.engine.checkpoint import CheckpointStore
from pegbox.errors import BadInput, Corrupt, RunFailed, Stopped, Unsupported
from pegbox.objectives.base import OBJECTIVE, Objective
from pegbox.optim.base import OPTIM, Step, StepLog
from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView

SFT = {"kind": "tokens", "token": {"kind": "sft"}}


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def steps_of(outcome: Any, event: str = "step") -> list[dict[str, Any]]:
    return [r for r in outcome.log if r["event"] == event]


def logged(folder: Any) -> list[Any]:
    """What the log says of steps and evaluations, without times."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [r for r in records if r["event"] in {"step", "eval"}]
    return [(r["event"], r["step"], r.get("loss"), r.get("metrics")) for r in kept]


class At(Listener):
    """Does something when the record of a step arrives."""

    def __init__(self, step: int, act: Any, event: str = "step"):
        self.step, self.act, self.event = step, act, event

    def record(self, record: Any) -> None:
        if record.event == self.event and record.step == self.step:
            self.act()


class Crash(BaseException):
    """Ends a run as abruptly as an exception can."""


def crash() -> None:
    raise Crash


# ---- what a step is


def test_the_loss_is_the_mean_over_all_trained_tokens_of_the_step_whatever_the_micro_batch(tmp_path):
    losses, final = {}, {}
    for micro in (1, 2, 4, 6):
        outcome, net = stage(tmp_path / str(micro), net=model(), steps=2, batch=6, micro_batch=micro)
        losses[micro], final[micro] = [r["loss"] for r in steps_of(outcome)], weights(net)
        assert (outcome.status, outcome.steps) == ("finished", 2)
    for micro in (2, 4, 6):
        assert losses[micro] == pytest.approx(losses[1], rel=1e-5)
        torch.testing.assert_close(final[micro], final[1], rtol=1e-4, atol=2e-5)


def test_the_first_steps_loss_and_gradient_are_the_closed_form(tmp_path):
    rows = examples(4)
    seen = {}

    class Look(Listener):
        def record(self, record: Any) -> None:
            seen[record.event] = record

    net = model()
    batch = COLLATE(rows)
    reference = model()
    loss = reference(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss  # transformers' mean over trained tokens
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    stage(tmp_path, net=net, train_set=rows, steps=1, callbacks=[Look()])
    assert seen["step"].loss == pytest.approx(float(loss), rel=1e-6)
    assert seen["step"].grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert seen["step"].tokens == sum(len(r["input_ids"]) for r in rows)


def test_epochs_and_tokens_become_steps(tmp_path):
    outcome, _ = stage(tmp_path / "e", steps=None, epochs=1.5, batch=8)
    assert outcome.steps == 4  # 30 rows in steps of 8
    assert steps_of(outcome)[0]["epoch"] == pytest.approx(0.4)
    outcome, _ = stage(tmp_path / "t", steps=None, tokens=100)
    assert outcome.cost.training_tokens >= 100
    assert steps_of(outcome)[-2]["tokens"] < 100


def test_cost_is_measured(tmp_path):
    outcome, net = stage(tmp_path, net=model(lora=True), probe=True, micro_batch="auto")
    cost = outcome.cost
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert cost.trainable_parameters == trained
    assert cost.optimizer_state_bytes >= 8 * trained
    assert cost.peak_saved_bytes > 0
    assert cost.training_flops > 2 * trained * cost.training_tokens
    assert cost.steps == 4
    assert cost.machine
    assert json.loads((tmp_path / "micro_batch.json").read_text())["micro"] == 4


def test_the_probe_changes_nothing(tmp_path):
    final = []
    for probe in (True, False):
        _, net = stage(tmp_path / str(probe), net=model(attention_dropout=0.1), probe=probe, eval_set=examples(4, 1))
        final.append(weights(net))
    assert equal(*final)


# ---- resuming


@pytest.mark.parametrize(("lora", "at"), [(False, 1), (True, 3), (False, 5)])
def test_a_run_that_broke_off_ends_in_the_same_weights_log_and_best(tmp_path, lora, at):
    options = {"steps": 6, "save_every": 2, "eval_every": 2, "eval_set": examples(5, 1), "select": "best"}
    whole, a = stage(tmp_path / "whole", net=model(lora, attention_dropout=0.1), **options)
    with pytest.raises(Crash):
        stage(tmp_path / "broken", net=model(lora, attention_dropout=0.1), callbacks=[At(at, crash)], **options)
    again, b = stage(tmp_path / "broken", net=model(lora, attention_dropout=0.1), resume=True, **options)
    assert equal(weights(a), weights(b))
    assert whole.best == again.best
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")
    assert whole.cost.training_tokens == again.cost.training_tokens
    assert whole.cost.training_flops == again.cost.training_flops


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "mezo"])
def test_every_optimizers_state_comes_back(tmp_path, optim):
    step = OPTIM.validate({"kind": optim, "lr": 1e-3, **({"momentum": 0.9} if optim == "sgd" else {})})
    options = {"steps": 4, "save_every": 2, "step": step}
    _, a = stage(tmp_path / "whole", **options)
    with pytest.raises(Crash):
        stage(tmp_path / "broken", callbacks=[At(3, crash)], **options)
    _, b = stage(tmp_path / "broken", resume=True, **options)
    assert equal(weights(a), weights(b))


def test_float32_moments_over_bf16_weights_come_back_uncast(tmp_path):
    options = {"steps": 4, "save_every": 2, "step": OPTIM.validate({"kind": "sgd", "lr": 1e-2, "momentum": 0.9})}
    _, a = stage(tmp_path / "whole", net=model().bfloat16(), **options)
    with pytest.raises(Crash):
        stage(tmp_path / "broken", net=model().bfloat16(), callbacks=[At(3, crash)], **options)
    _, b = stage(tmp_path / "broken", net=model().bfloat16(), resume=True, **options)
    assert equal(weights(a), weights(b))


def _killed(out: Any, at: int, lora: bool) -> None:
    kill = At(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    stage(out, net=model(lora, attention_dropout=0.1), steps=5, save_every=2, callbacks=[kill])


@pytest.mark.parametrize(("at", "lora"), [(3, True), (4, False)])
def test_kill_9_and_resume_end_in_the_same_weights(tmp_path, at, lora):
    _, a = stage(tmp_path / "whole", net=model(lora, attention_dropout=0.1), steps=5, save_every=2)
    assert in_process(_killed, tmp_path / "killed", at, lora) == -signal.SIGKILL
    _, b = stage(tmp_path / "killed", net=model(lora, attention_dropout=0.1), steps=5, save_every=2, resume=True)
    assert equal(weights(a), weights(b))


def test_resuming_a_finished_run_trains_nothing_more(tmp_path):
    _, a = stage(tmp_path, steps=3, save_every=3)
    outcome, b = stage(tmp_path, steps=3, save_every=3, resume=True)
    assert outcome.status == "finished"
    assert steps_of(outcome) == []
    assert equal(weights(a), weights(b))


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    assert stage(tmp_path, resume=True)[0].steps == 4


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    stage(tmp_path, steps=2, save_every=2)
    with pytest.raises(BadInput, match="--resume"):
        stage(tmp_path, steps=2, save_every=2)


def test_changed_settings_are_refused_by_name(tmp_path):
    stage(tmp_path, steps=2, save_every=2, identity={"recipe": {"optim": {"lr": 1e-2}}, "data": "abc"})
    changed = {"recipe": {"optim": {"lr": 1e-3}}, "data": "abc"}
    with pytest.raises(BadInput, match=r"identity.recipe.optim.lr: 0.01 in the checkpoint, 0.001 now"):
        stage(tmp_path, steps=2, save_every=2, identity=changed, resume=True)
    with pytest.raises(BadInput, match=r"train.steps: 2 in the checkpoint, 9 now"):
        stage(tmp_path, steps=9, save_every=2, identity=changed, resume=True)


def test_a_damaged_checkpoint_is_skipped_and_the_one_before_used(tmp_path):
    _, a = stage(tmp_path / "whole", steps=6, save_every=2)
    with pytest.raises(Crash):
        stage(tmp_path / "b", steps=6, save_every=2, callbacks=[At(5, crash)])
    broken = tmp_path / "b/checkpoints/checkpoint-4/optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-7])
    outcome, b = stage(tmp_path / "b", steps=6, save_every=2, resume=True)
    assert equal(weights(a), weights(b))
    assert (tmp_path / "b/checkpoints/broken-checkpoint-4.0").is_dir()
    assert "step 4 (optimizer.safetensors has" in steps_of(outcome, "notice")[0]["text"]


def test_adapter_keys_that_do_not_match_are_refused(tmp_path):
    stage(tmp_path, net=model(lora=True), steps=2, save_every=2)
    folder = tmp_path / "checkpoints/checkpoint-2"
    tensors = load_file(str(folder / "model.safetensors"))
    name = next(iter(tensors))
    save_file({n.replace("q_proj", "k_proj"): t for n, t in tensors.items()}, str(folder / "model.safetensors"))
    CheckpointStore(tmp_path / "checkpoints").seal(2)
    with pytest.raises(Corrupt, match=r"Missing there: .*q_proj.*Unknown here: .*k_proj"):
        stage(tmp_path, net=model(lora=True), steps=2, save_every=2, resume=True)
    save_file({**tensors, name: tensors[name][:-1].clone()}, str(folder / "model.safetensors"))
    CheckpointStore(tmp_path / "checkpoints").seal(2)
    with pytest.raises(Corrupt, match=f"'{name}' is"):
        stage(tmp_path, net=model(lora=True), steps=2, save_every=2, resume=True)


def test_there_is_no_pickle_in_a_checkpoint(tmp_path):
    stage(tmp_path, steps=2, save_every=2)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl"}
    assert not any(b"PK\x03\x04" in p.read_bytes()[:4] or p.read_bytes()[:1] == b"\x80" for p in files)


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.5])
    outcome, _ = stage(
        tmp_path,
        steps=8,
        eval_every=2,
        save_every=2,
        save_total_limit=1,
        select="best",
        metric="score",
        higher_is_better=False,
        evaluator=lambda net: {"score": next(values)},
    )
    assert outcome.best == {"step": 4, "metric": "score", "value": 1.0}
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [8, 4]


# ---- a disk that fails


def test_a_full_disk_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from pegbox.engine import resume

    calls = itertools.count()

    def full(folder: Any, name: str, tree: Any) -> None:
        if next(calls) >= 7:  # inside the second checkpoint
            (folder / f"{name}.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(folder, name, tree)

    save = resume.save_tree
    monkeypatch.setattr(resume, "save_tree", full)
    with pytest.raises(RunFailed, match=r"step 4 .*No space left on device.*step 2 is intact"):
        stage(tmp_path / "b", steps=6, save_every=2)
    monkeypatch.undo()
    assert CheckpointStore(tmp_path / "b/checkpoints").steps() == [2]
    _, b = stage(tmp_path / "b", steps=6, save_every=2, resume=True)
    _, a = stage(tmp_path / "a", steps=6, save_every=2)
    assert equal(weights(a), weights(b))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_in_the_middle_of_a_run_is_a_clear_error(tmp_path):
    folder = tmp_path / "checkpoints"

    def lock() -> None:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)

    with pytest.raises(RunFailed, match="step 4 could not be written"):
        stage(tmp_path, steps=6, save_every=2, callbacks=[At(3, lock)])
    folder.chmod(0o755)
    assert CheckpointStore(folder).fault(2) is None


# ---- guards


class Spoiled(DataPolicy):
    """Makes the loss of one row NaN, through its weight."""

    kind: Literal["spoiled"] = "spoiled"
    row: int = 7

    def on_batch(self, state: Any, batch: Any, ctx: Any) -> Any:
        weight = batch["sample_weight"].clone()
        weight[batch["sample_ids"] == self.row] = float("nan")
        return {**batch, "sample_weight": weight}


def test_the_first_loss_that_is_not_finite_ends_the_run_before_the_weights_change(tmp_path):
    net = model()
    with pytest.raises(RunFailed) as caught:
        stage(tmp_path, net=net, steps=20, save_every=1, policies=[Spoiled()])
    text = str(caught.value)
    assert "row0007" in text
    assert "loss is nan" in text
    step = int(text.split("Step ")[1].split(":")[0])
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    good = CheckpointStore(tmp_path / "checkpoints").newest()
    if step > 1:
        assert f"checkpoint of step {step - 1} is kept" in text
        assert good.name == f"checkpoint-{step - 1}"


def test_a_value_that_is_not_finite_ends_a_zeroth_order_run_with_step_and_rows(tmp_path):
    net = model()
    with pytest.raises(RunFailed, match=r"Step \d+: the loss is nan.*row0007"):
        stage(tmp_path, net=net, steps=20, policies=[Spoiled()], step=OPTIM.validate({"kind": "mezo", "lr": 1e-4}))
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_zeroth_order_needs_a_value(tmp_path):
    with pytest.raises(Unsupported, match="has none"):
        stage(tmp_path, objective=OBJECTIVE.validate({"kind": "grpo"}), step=OPTIM.validate("mezo"))


def test_nothing_to_train_is_said(tmp_path):
    with pytest.raises(RunFailed, match="Nothing trains"):
        stage(tmp_path, net=model().requires_grad_(False))


# ---- evaluation


def test_evaluation_is_the_mean_over_the_whole_set_and_changes_nothing(tmp_path):
    rows = examples(7, 3)
    nets = []
    for every in (None, 1):
        outcome, net = stage(tmp_path / str(every), net=model(attention_dropout=0.1), eval_every=every, eval_set=rows)
        nets.append(weights(net))
    assert equal(*nets)
    batch = COLLATE(rows)
    net.eval()
    with torch.no_grad():
        loss = net(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    assert steps_of(outcome, "eval")[-1]["metrics"]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_best_weights_on_any_metric_come_back_at_the_end(tmp_path):
    kept, values = [], iter([0.2, 0.9, 0.5])

    def evaluator(net: Any) -> dict[str, float]:
        assert not net.training
        kept.append(weights(net))
        return {"accuracy": next(values), "other": 0.0}

    outcome, net = stage(tmp_path, steps=6, eval_every=2, select="best", metric="accuracy", evaluator=evaluator)
    assert outcome.best == {"step": 4, "metric": "accuracy", "value": 0.9}
    assert equal(weights(net), kept[1])
    assert steps_of(outcome, "eval")[1]["metrics"] == {"accuracy": 0.9, "other": 0.0}


def test_early_stopping_counts_evaluations_without_a_better_value(tmp_path):
    values = [1.0, 2.0, 0.5, 0.6, 0.7, 0.1]
    options = {"steps": 12, "eval_every": 2, "early_stopping": 2, "metric": "cost", "higher_is_better": False}

    def evaluator() -> Any:
        left = iter(values)
        return lambda net: {"cost": next(left)}

    outcome, _ = stage(tmp_path / "a", evaluator=evaluator(), **options)
    assert (outcome.status, outcome.steps) == ("stopped_early", 10)
    assert outcome.best["step"] == 6
    # stopped and saved at that very step: a resume does not go on
    outcome, _ = stage(tmp_path / "b", evaluator=evaluator(), save_every=2, **options)
    again, _ = stage(tmp_path / "b", evaluator=evaluator(), save_every=2, resume=True, **options)
    assert (again.status, again.steps) == ("stopped_early", 10)


def test_an_unknown_metric_names_those_measured(tmp_path):
    with pytest.raises(BadInput, match=r"metric 'acuracy'.*Did you mean 'accuracy'"):
        stage(tmp_path, eval_every=1, metric="acuracy", evaluator=lambda net: {"accuracy": 1.0})


def test_best_without_any_evaluation_is_refused(tmp_path):
    with pytest.raises(BadInput, match="eval_every"):
        stage(tmp_path, select="best")


# ---- SIGTERM


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_to_the_same_weights(tmp_path):
    _, a = stage(tmp_path / "a", net=model(attention_dropout=0.1), steps=5)
    with pytest.raises(Stopped, match=r"after step 3 of 5.*--resume") as caught:
        stage(tmp_path / "b", net=model(attention_dropout=0.1), steps=5, callbacks=[At(2, terminate)])
    assert caught.value.exit_code == 4
    assert CheckpointStore(tmp_path / "b/checkpoints").steps() == [3]
    _, b = stage(tmp_path / "b", net=model(attention_dropout=0.1), steps=5, resume=True)
    assert equal(weights(a), weights(b))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_inside_an_evaluation_leaves_it_and_the_resumed_run_makes_up_for_it(tmp_path):
    options = {"steps": 4, "eval_every": 2, "select": "best", "metric": "n", "higher_is_better": True}
    whole, a = stage(tmp_path / "a", evaluator=lambda net: {"n": 1.0}, **options)

    def stopped(net: Any) -> dict[str, float]:
        terminate()
        raise AssertionError("the evaluation went on")

    with pytest.raises(Stopped, match="after step 2"):
        stage(tmp_path / "b", evaluator=stopped, **options)
    again, b = stage(tmp_path / "b", evaluator=lambda net: {"n": 1.0}, resume=True, **options)
    assert [r["step"] for r in steps_of(again, "eval")] == [2, 4]
    assert again.best == whole.best
    assert equal(weights(a), weights(b))


# ---- schedules, policies, owners, estimators


class Refresh:
    """Remembers when it was called; has a state."""

    def __init__(self, every: int):
        self.every, self.calls = every, []

    def refresh(self, step: int, net: Any, optimizer: Any) -> None:
        assert isinstance(optimizer, torch.optim.AdamW)
        self.calls.append(step)
        with torch.no_grad():
            next(net.parameters()).mul_(0.9)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": list(self.calls)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.calls = list(saved["calls"])


def test_schedules_run_before_every_nth_step_and_survive_a_resume(tmp_path):
    whole = Refresh(2)
    _, a = stage(tmp_path / "a", steps=7, callbacks=[whole])
    assert whole.calls == [2, 4, 6]
    with pytest.raises(Crash):
        stage(tmp_path / "b", steps=7, save_every=2, callbacks=[Refresh(2), At(5, crash)])
    again = Refresh(2)
    _, b = stage(tmp_path / "b", steps=7, save_every=2, resume=True, callbacks=[again])
    assert again.calls == [2, 4, 6]
    assert equal(weights(a), weights(b))


class Watcher(DataPolicy):
    """Orders rows from the back, and keeps what it is told."""

    kind: Literal["watcher"] = "watcher"

    def setup(self, ctx: Any) -> Any:
        return {"ids": [], "devices": set()}

    def sampler(self, state: Any, dataset: Any, ctx: Any) -> Any:
        return range(len(dataset) - 1, -1, -1)

    def on_batch(self, state: Any, batch: Any, ctx: Any) -> Any:
        assert not torch.is_inference_mode_enabled()
        state["devices"].add((batch["input_ids"].device.type, ctx.step()))
        return batch

    def observe(self, state: Any, sample_ids: Any, outcomes: Any) -> None:
        assert outcomes["per_sample"].shape == sample_ids.shape
        state["ids"] += sample_ids.tolist()


class PerSample(Objective):
    """Cross-entropy with a loss per sample and a learned temperature of its own."""

    kind: Literal["per_sample"] = "per_sample"
    needs_reference: ClassVar[bool] = True
    order: ClassVar[list[str]] = []

    def setup(self, ctx: Context) -> Any:
        owner = torch.nn.Module()
        owner.temperature = torch.nn.Parameter(torch.zeros(()))
        return owner

    def count(self, batch: Any) -> dict[str, torch.Tensor]:
        self.order.append("count")
        return {"rows": torch.tensor(float(len(batch["input_ids"])), dtype=torch.float64)}

    def reference(self, state: Any, view: Any, batch: Any) -> Any:
        assert not torch.is_grad_enabled()
        self.order.append("reference")
        return view.logits(batch).detach()

    def losses(self, state: Any, view: Any, batch: Any, totals: Any, ref: Any) -> Any:
        self.order.append("losses")
        logits = view.logits(batch) * state.temperature.exp()
        per_sample = logits.log_softmax(-1)[..., 0].mean(1).neg()
        yield "main", per_sample.sum() / totals["rows"]
        yield "pull", 0.1 * (logits - ref).square().mean() / totals["rows"]
        yield "_per_sample", per_sample


def test_policies_objectives_and_owners_see_what_they_should(tmp_path):
    PerSample.order.clear()
    outcome, _ = stage(tmp_path, steps=2, objective=PerSample(), policies=[Watcher()])
    state = outcome.states["data.0"]
    assert state["ids"] == [19, 18, 17, 16, 15, 14, 13, 12]
    assert state["devices"] == {("cpu", 0), ("cpu", 1)}
    # both micro-batches are counted before any forward, and each reference runs before its policy's forward
    assert PerSample.order[:6] == ["count", "count", "reference", "losses", "reference", "losses"]
    readings = steps_of(outcome)[-1]["readings"]
    assert set(readings) == {"main", "pull"}
    assert sum(readings.values()) == pytest.approx(steps_of(outcome)[-1]["loss"], rel=1e-5)
    assert float(outcome.states["objective"].temperature.detach()) != 0.0


def test_owners_are_saved_and_resumed(tmp_path):
    options = {"steps": 5, "objective": PerSample(), "policies": [], "save_every": 2}
    whole, a = stage(tmp_path / "a", **options)
    with pytest.raises(Crash):
        stage(tmp_path / "b", callbacks=[At(3, crash)], **options)
    again, b = stage(tmp_path / "b", resume=True, **options)
    assert equal(weights(a), weights(b))
    assert torch.equal(whole.states["objective"].temperature, again.states["objective"].temperature)


class Probing(Step):
    """An estimator that uses everything a `Problem` offers, then fills gradients by plain back-propagation."""

    kind: Literal["probing"] = "probing"
    lr: float = 1e-2
    warmup: float = 0.0
    schedule: Literal["constant"] = "constant"
    mode: str = "fill"

    def optimizer(self, groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in groups[0]["params"]], lr=self.lr)

    def setup(self, ctx: Context) -> Any:
        return {"after": 0}

    def estimate(self, state: Any, problem: Any) -> StepLog:
        before = {n: p.detach().clone() for n, p in problem.params.items()}
        first = problem.value()
        with problem.untouched():
            for p in problem.params.values():
                p.data.add_(1.0)
            torch.rand(3)
            assert problem.value() != first
        assert all(torch.equal(p, before[n]) for n, p in problem.params.items())
        assert problem.value() == first  # dropout repeats
        buffers = [torch.zeros_like(p) for p in problem.params.values()]
        total = 0.0
        for i in range(problem.micro):
            loss = sum(v for n, v in problem.losses(i) if not n.startswith("_"))
            problem.backward(loss, into=buffers, retain=True)
            problem.backward(loss)
            total += float(loss)
        assert total == pytest.approx(first, rel=1e-5)
        for p, b in zip(problem.params.values(), buffers):
            torch.testing.assert_close(p.grad, b)
        assert torch.equal(problem.reduce(buffers[0]), buffers[0])
        return StepLog(loss=total, applied=self.mode == "applied", skip=self.mode == "skip", readings={"first": first})

    def after_step(self, state: Any, problem: Any) -> None:
        state["after"] += 1


def test_an_estimator_gets_the_whole_step(tmp_path):
    net = model(attention_dropout=0.1)
    before = weights(net)
    outcome, _ = stage(tmp_path / "a", net=net, step=Probing(), steps=2)
    assert not equal(before, weights(net))
    assert outcome.states["step"] == {"after": 2}
    assert steps_of(outcome)[0]["readings"]["first"] == pytest.approx(steps_of(outcome)[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("mode", ["applied", "skip"])
def test_an_estimator_that_applied_its_update_or_skips_leaves_the_optimizer_still(tmp_path, mode):
    net = model()
    before = weights(net)
    outcome, _ = stage(tmp_path, net=net, step=Probing(mode=mode), steps=2)
    assert equal(before, weights(net))
    assert outcome.steps == 2


def test_policies_are_told_the_outcomes_of_an_estimators_first_forwards(tmp_path):
    outcome, _ = stage(tmp_path, steps=2, objective=PerSample(), policies=[Watcher()], step=Probing(), batch=2)
    assert outcome.states["data.0"]["ids"] == [19, 18, 17, 16]


def test_an_estimator_and_plain_back_propagation_take_the_same_steps(tmp_path):
    class Plain(Probing):
        kind: Literal["plain"] = "plain"
        estimate = Step.estimate

    _, a = stage(tmp_path / "a", step=Probing())
    _, b = stage(tmp_path / "b", step=Plain())
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-5, atol=1e-6)


def test_bf16_runs_under_autocast_with_float32_weights(tmp_path):
    seen = set()
    net = model()
    net.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.add((m.weight.dtype, o.dtype)))
    outcome, _ = stage(tmp_path, net=net, precision="bf16", eval_set=examples(4), eval_every=2)
    assert seen == {(torch.float32, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert len(steps_of(outcome, "eval")) == 2


def test_the_model_is_left_as_it_was_found(tmp_path):
    net = model()
    net.config.use_cache = True
    stage(tmp_path, net=net)
    assert net.config.use_cache is True


def test_buffers_that_moved_are_saved(tmp_path):
    def build() -> Any:
        net = model()
        net.register_buffer("index", torch.zeros(3, dtype=torch.int64))
        net.register_buffer("still", torch.zeros(2))
        return net

    class Move(Refresh):
        def refresh(self, step: int, net: Any, optimizer: Any) -> None:
            net.index = net.index + step

    _, a = stage(tmp_path / "a", net=build(), steps=5, save_every=2, callbacks=[Move(1)])
    with pytest.raises(Crash):
        stage(tmp_path / "b", net=build(), steps=5, save_every=2, callbacks=[Move(1), At(3, crash)])
    saved = load_file(str(tmp_path / "b/checkpoints/checkpoint-2/model.safetensors"))
    assert "index" in saved
    assert "still" not in saved
    _, b = stage(tmp_path / "b", net=build(), steps=5, save_every=2, callbacks=[Move(1)], resume=True)
    assert torch.equal(a.index, b.index)
    assert int(a.index[0]) == 1 + 2 + 3 + 4


def test_a_view_may_be_given_as_it_is_and_unknown_callbacks_are_refused(tmp_path):
    net = model()
    stage(tmp_path / "a", net=net, view=CausalView(net), steps=1)
    with pytest.raises(TypeError, match="callbacks must be"):
        stage(tmp_path / "b", callbacks=[object()])


@pytest.mark.parametrize(("bounds", "steps"), [({"max_steps": 3}, 3), ({"min_steps": 12}, 12), ({}, 10)])
def test_a_stage_is_as_long_as_its_bounds_allow(bounds, steps, tmp_path):
    """Two epochs of twenty rows in steps of four are ten steps, or what the bounds make of them."""
    outcome, _ = stage(tmp_path, steps=None, epochs=2, **bounds)
    assert outcome.steps == steps
