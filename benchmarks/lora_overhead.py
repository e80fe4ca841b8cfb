"""A LoRA step through pegbox over the same step in plain peft + transformers.Trainer, in one process.

    python benchmarks/lora_overhead.py [--layers 6] [--tokens 128] [--batch 4] [--steps 12] [--rounds 6]

Both train the same LoRA on the same rows of equal length, at SmolLM2-135M's sizes (fewer layers by default), with the
same optimizer, in turns: round by round, so that a busy machine slows both. Counts come first: peak bytes that autograd
saves, per micro-batch. Two plain runs are compared: `plain` is what everybody writes (labels given to the model, whose
loss takes all logits), `same_loss` gives the trainer pegbox's tiled loss, so that it differs in nothing but the engine.
Times are CPU seconds of the process on one thread, which
a busy machine does not stretch, and wall seconds; a round's value is the least step of each contender, the result the
median over rounds of the rounds' ratios. Writes `benchmarks/results/lora_overhead.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pegbox.data.collate import PaddingCollator  # noqa: E402
from pegbox.engine import TrainSettings, train_stage  # noqa: E402
from pegbox.objectives.base import OBJECTIVE  # noqa: E402
from pegbox.optim.base import OPTIM  # noqa: E402
from pegbox.parts.context import Context  # noqa: E402
from pegbox.parts.metering import machine, saved_bytes  # noqa: E402
from pegbox.tasks.views import CausalView  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "lora_overhead.json"
SFT = OBJECTIVE.validate({"kind": "tokens", "token": {"kind": "sft"}})


class Times(TrainerCallback):
    """(CPU, wall) seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self.began = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = (time.process_time(), time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append((time.process_time() - self.began[0], time.perf_counter() - self.began[1]))


def build(layers: int, vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))


def rows(count: int, tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": x, "labels": x, "sample_id": i} for i, x in enumerate(ids)]


class Plain:
    """transformers.Trainer over peft; with `same_loss` its loss is the one pegbox's objective computes."""

    def __init__(self, options: argparse.Namespace, same_loss: bool):
        self.options, self.same_loss = options, same_loss
        self.model = build(options.layers, options.vocabulary)
        self.collate = PaddingCollator(0)

    def batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        keys = ("input_ids", "attention_mask", "labels")
        return {k: v for k, v in self.collate(examples).items() if k in keys}

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        if not self.same_loss:
            return self.model(**batch).loss
        view = CausalView(self.model)
        full = {**batch, "sample_weight": torch.ones(len(batch["input_ids"]))}
        parts = SFT.losses(SFT.setup(Context(model=self.model)), view, full, SFT.count(full), None)
        return sum(value for name, value in parts if not name.startswith("_"))  # type: ignore[return-value]

    def run(self, steps: int, out: Path) -> list[tuple[float, float]]:
        plain, times = self, Times()

        class WithLoss(Trainer):
            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Any:
                if plain.same_loss:
                    return plain.loss(inputs)
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=self.options.batch,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        data = rows(64, self.options.tokens, self.options.vocabulary)
        trainer = WithLoss(self.model, arguments, data_collator=self.batch, train_dataset=data, callbacks=[times])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return times.seconds


class Pegbox:
    """The same through the engine."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.model = build(options.layers, options.vocabulary)
        self.collate = PaddingCollator(0)

    def batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collate(examples)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        parts = SFT.losses(SFT.setup(Context(model=self.model)), CausalView(self.model), batch, SFT.count(batch), None)
        return sum(value for name, value in parts if not name.startswith("_"))  # type: ignore[return-value]

    def run(self, steps: int, out: Path) -> list[tuple[float, float]]:
        times, data = Times(), rows(64, self.options.tokens, self.options.vocabulary)
        settings = TrainSettings(
            steps=steps, batch=self.options.batch, micro_batch=self.options.batch, device="cpu", probe=False
        )
        train_stage(
            self.model,
            CausalView,
            data,
            None,
            self.collate,
            SFT,
            OPTIM.validate({"kind": "adamw", "lr": 1e-4}),
            [],
            settings,
            out,
            Context(model=self.model),
            callbacks=[times],
        )
        return times.seconds


def peak(contender: Any, options: argparse.Namespace) -> int:
    """Peak bytes that autograd saves in forward and backward of one micro-batch."""
    batch = contender.batch(rows(options.batch, options.tokens, options.vocabulary))
    contender.model.train()
    with saved_bytes(contender.model) as saved:
        contender.loss(batch).backward()
    contender.model.zero_grad()
    return saved.peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("layers", 6),
        ("tokens", 128),
        ("batch", 4),
        ("steps", 8),
        ("rounds", 6),
        ("vocabulary", 8192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    contenders = {"plain": Plain(options, False), "same_loss": Plain(options, True), "pegbox": Pegbox(options)}
    saved = {name: peak(contender, options) for name, contender in contenders.items()}
    root = Path(tempfile.mkdtemp(prefix="overhead-"))
    clocks = ("cpu", "wall")
    least: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in contenders} for clock in clocks}
    for turn in range(options.rounds):
        order = list(contenders)[turn % 3 :] + list(contenders)[: turn % 3]
        for name in order:
            seconds = contenders[name].run(options.steps, root / f"{name}-{turn}")[2:]  # the first steps warm up
            for i, clock in enumerate(clocks):
                least[clock][name].append(min(step[i] for step in seconds))
    ratios = {
        clock: {
            f"over_{name}": statistics.median(a / b for a, b in zip(times["pegbox"], times[name]))
            for name in ("plain", "same_loss")
        }
        for clock, times in least.items()
    }
    result = {
        "setting": vars(options),
        "saved_bytes": saved,
        "seconds_per_step": {c: {n: statistics.median(v) for n, v in times.items()} for c, times in least.items()},
        "time_ratio": ratios,
        "saved_ratio": {f"over_{n}": saved["pegbox"] / saved[n] for n in ("plain", "same_loss")},
        "torch": torch.__version__,
        "machine": machine(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
