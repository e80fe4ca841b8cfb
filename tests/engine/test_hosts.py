"""The mixin over TRL's trainers: GRPO with a checker as its reward, DPO, SFT from one's own script."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.helpers import model, stage, weights
from pegbox.engine.hosts import arguments_class, trainer_class
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.optim.base import OPTIM
from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def checker(completions: Any, answer: Any, **_: Any) -> list[float]:
    """Rewards bytes of the lower half; `answer` is a column of the data."""
    assert len(answer) == len(completions)
    return [float(len(c[0]["content"])) + 0.1 * (i % 2) for i, c in enumerate(completions)]


def prompts(count: int = 8) -> Any:
    from datasets import Dataset

    rows = [{"prompt": [{"role": "user", "content": f"add {i}"}], "answer": str(i)} for i in range(count)]
    return Dataset.from_list(rows)


def hosted(out: Any, kind: str, train_set: Any, net: Any = None, **options: Any) -> Any:
    net = model(lora=True) if net is None else net
    options = {"steps": 3, "batch": 4, "micro_batch": 2, **options}
    objective = options.pop("objective", {})
    return stage(
        out,
        net=net,
        view=None,
        collator=None,
        train_set=train_set,
        objective=OBJECTIVE.validate({"kind": kind, **objective}),
        ctx=Context(model=net, tokenizer=TOKENIZER),
        **options,
    )


def test_grpo_trains_on_a_checkers_reward_and_resumes(tmp_path):
    net = model(lora=True)
    before = weights(net)
    options = {"objective": {"num_generations": 2, "max_completion_length": 4}, "rewards": [checker], "save_every": 2}
    outcome, _ = hosted(tmp_path, "grpo", prompts(), net, **options)
    assert outcome.steps == 3
    assert any(not torch.equal(before[n], p) for n, p in weights(net).items())
    record = next(r for r in outcome.log if r["event"] == "step")
    assert record["readings"]["rewards/checker/mean"] > 0
    assert outcome.cost.training_tokens > 0
    assert [r["step"] for r in outcome.log if r["event"] == "save"] == [2, 3]
    again, other = hosted(tmp_path, "grpo", prompts(), None, resume=True, **options)
    assert again.steps == 3
    assert all(torch.equal(weights(net)[n], p) for n, p in weights(other).items())


def test_grpo_without_a_reward_and_with_a_zeroth_order_step_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"'grpo' refuses these settings: .*divisible by num_generations"):
        hosted(tmp_path, "grpo", prompts(), rewards=[checker])
    with pytest.raises(BadInput, match="no multiple of 3 rows"):
        hosted(tmp_path, "grpo", prompts(), rewards=[checker], micro_batch=3)
    with pytest.raises(BadInput, match="needs a reward"):
        hosted(tmp_path, "grpo", prompts())
    with pytest.raises(Unsupported, match="has none"):
        hosted(tmp_path, "grpo", prompts(), rewards=[checker], step=OPTIM.validate("mezo"))
    with pytest.raises(Unsupported, match="not tokens"):
        hosted(tmp_path, "grpo", prompts(), rewards=[checker], steps=None, tokens=100)


def test_dpo_trains_evaluates_and_leaves_no_adapter_behind(tmp_path):
    from datasets import Dataset

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [
        {"prompt": [{"role": "user", "content": f"add {i}"}], "chosen": answer("yes"), "rejected": answer("never")}
        for i in range(8)
    ]
    data = Dataset.from_list(rows)
    outcome, net = hosted(tmp_path, "dpo", data, eval_set=data, eval_every=2, steps=4)
    losses = [r["loss"] for r in outcome.log if r["event"] == "step"]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference agree
    assert losses[-1] < losses[0]
    assert [r["step"] for r in outcome.log if r["event"] == "eval"] == [2, 4]
    assert set(net.peft_config) == {"default"}


def test_sft_trainer_takes_an_objective_a_step_and_safe_checkpoints_from_ones_own_script(tmp_path):
    from datasets import Dataset

    rows = [{"input_ids": [i + 3, 4, 5, 6, 7, 8], "labels": [-100, 4, 5, 6, 7, 8]} for i in range(16)]
    objective = OBJECTIVE.validate({"kind": "tokens", "token": {"kind": "sft"}})

    def trainer(steps: int) -> Any:
        torch.manual_seed(0)
        arguments = arguments_class("sft")(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            seed=3,
        )
        return trainer_class("sft")(
            model=model(lora=True),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=TOKENIZER,
            objective=objective,
            step=OPTIM.validate({"kind": "adamw", "lr": 1e-2, "schedule": "constant", "warmup": 0.0}),
            view=CausalView,
        )

    first = trainer(4)
    first.train()
    losses = [r["loss"] for r in first.state.log_history if "loss" in r]
    assert losses[-1] < losses[0]
    assert first.store.steps() == [4, 2]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt*"))
    (tmp_path / "checkpoint-4" / "optimizer.safetensors").unlink()
    second = trainer(4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert (tmp_path / "broken-checkpoint-4.0").is_dir()
    assert all(torch.equal(p, weights(second.model)[n]) for n, p in weights(first.model).items())


def test_an_unknown_host_is_named():
    with pytest.raises(Unsupported, match="Did you mean 'policy'"):
        trainer_class("polic")
