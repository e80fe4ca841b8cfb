"""Evidence for MeZO: forward passes alone adapt a pre-trained model, also where the objective has no gradient.

Claims (arXiv:2305.17333): full-parameter zeroth-order steps on the loss improve a pre-trained model; so do steps on
minus the accuracy; and so they do when only LoRA or prefix parameters move.

A two-block Llama is pre-trained on "is the sum of these tokens' weights positive?", answered by one of two label tokens
after the sequence. Then 30 % of the tokens' weights change sign, such that they carry half of the sum of squares,
which brings the model to chance. From 512 examples of the changed task MeZO adapts it; accuracy is read on 2000
sequences that it never saw. Baseline: the pre-trained model (zero-shot). Nothing is chosen on what is reported.

    python evidence/mezo.py [--seeds 3] [--claims loss accuracy lora prefix] [--out evidence/results/mezo.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.optim import OPTIM
from pegbox.parts.context import Context

V, T, BATCH = 32, 12, 64
NO, YES = V, V + 1  # label tokens
# what is required of each claim: an accuracy, or points over zero-shot
CLAIMS: dict[str, dict[str, Any]] = {
    "loss": {
        "what": "loss, all parameters,",
        "form": "full",
        "steps": 1500,
        "optim": {"eps": 1e-3, "lr": 3e-4},
        "at_least": 0.68,
    },
    "accuracy": {
        "what": "accuracy, all parameters,",
        "form": "full",
        "steps": 1500,
        "optim": {"eps": 3e-2, "lr": 3e-3},
        "at_least": 0.72,
    },
    "lora": {
        "what": "loss, LoRA alone,",
        "form": "lora",
        "steps": 1500,
        "optim": {"eps": 1e-2, "lr": 1e-2},
        "gain": 0.10,
    },
    "prefix": {
        "what": "loss, a prefix alone,",
        "form": "prefix",
        "steps": 1500,
        "optim": {"eps": 1e-1, "lr": 3e-2},
        "gain": 0.10,
    },
}


class Task:
    """Sequences of tokens with weights; the label says whether their sum is positive."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(V, generator=self.generator)

    def changed(self) -> Task:
        """The same task with 30 % of the weights turned round: of 200 random choices the one nearest to half of w^2."""
        other = Task(0)
        other.generator, other.weights = self.generator, self.weights.clone()
        share = self.weights.square() / self.weights.square().sum()
        choices = [torch.randperm(V, generator=self.generator)[: round(0.3 * V)] for _ in range(200)]
        other.weights[min(choices, key=lambda c: abs(float(share[c].sum()) - 0.5))] *= -1
        return other

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(count, T) token ids and (count,) label tokens."""
        ids = torch.randint(0, V, (count, T), generator=self.generator)
        return ids, torch.where(self.weights[ids].sum(1) > 0, YES, NO)


def pretrained(task: Task, seed: int, steps: int = 300) -> LlamaForCausalLM:
    """A small Llama that solves the task."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V + 2, **shape, max_position_embeddings=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids, labels = task.draw(BATCH)
        loss = nn.functional.cross_entropy(answers(model, ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def answers(model: Any, ids: Tensor) -> Tensor:
    """(B, V + 2) logits after the sequence."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]


@torch.no_grad()
def accuracy(model: Any, ids: Tensor, labels: Tensor) -> float:
    return float((answers(model, ids)[:, [NO, YES]].argmax(-1) == labels - NO).float().mean())


def attached(model: LlamaForCausalLM, form: str) -> Any:
    """What trains: the model, LoRA on q and v, or a prefix of 5 tokens without a reparametrisation."""
    if form == "full":
        return model
    import peft

    if form == "lora":
        config: Any = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    else:
        config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    if form == "prefix":
        prefix_from_activations(tuned, model)
    return tuned


@torch.no_grad()
def prefix_from_activations(tuned: Any, model: LlamaForCausalLM) -> None:
    """Keys and values of real tokens as the prefix's start, as the official code has it."""
    ids = torch.arange(5).view(1, 5)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    rows = [t for layer in cache.layers for t in (layer.keys, layer.values)]  # each (1, heads, 5, D / heads)
    flat = torch.cat([t[0].transpose(0, 1).reshape(5, -1) for t in rows], dim=1)
    next(p for p in tuned.parameters() if p.requires_grad).copy_(flat)


class Objective:
    """Cross-entropy on the label token, or minus the accuracy, of one batch."""

    micro = 1

    def __init__(self, model: Any, kind: str, rows: tuple[Tensor, Tensor], generator: torch.Generator):
        self.model, self.kind, self.rows, self.generator = model, kind, rows, generator
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.next()

    def next(self) -> None:
        at = torch.randint(0, len(self.rows[0]), (BATCH,), generator=self.generator)
        self.batch = self.rows[0][at], self.rows[1][at]

    def value(self) -> float:
        ids, labels = self.batch
        if self.kind == "accuracy":
            return -accuracy(self.model, ids, labels)
        return float(nn.functional.cross_entropy(answers(self.model, ids), labels))


def adapt(claim: str, seed: int, steps: int | None = None) -> dict[str, float]:
    """One seed of one claim: accuracy before and after."""
    setting = CLAIMS[claim]
    task = Task(seed)
    model = pretrained(task, seed)
    solved = accuracy(model.eval(), *task.draw(2000))
    changed = task.changed()
    rows, test = changed.draw(512), changed.draw(2000)
    zero_shot = accuracy(model, *test)
    tuned = attached(model, setting["form"])
    step = OPTIM.validate({"kind": "mezo", **setting["optim"]})
    problem = Objective(tuned, claim, rows, task.generator)
    state = step.setup(Context(model=tuned, seed=seed, total_steps=setting["steps"]))
    for _ in range(steps or setting["steps"]):
        problem.next()
        step.estimate(state, problem)
    return {"pre_trained": solved, "zero_shot": zero_shot, "mezo": accuracy(tuned.eval(), *test)}


def verdict(claim: str, runs: list[dict[str, float]]) -> str:
    """Holds if every seed reaches what is required, does not hold if none does."""
    setting = CLAIMS[claim]
    least, gain = setting.get("at_least", 0.0), setting.get("gain", 0.0)
    met = [r["mezo"] >= least and r["mezo"] - r["zero_shot"] >= gain for r in runs]
    return "holds" if all(met) else "inconclusive" if any(met) else "does not hold"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--claims", nargs="+", default=list(CLAIMS), choices=list(CLAIMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mezo.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, records = time.perf_counter(), []
    for claim in given.claims:
        results = {str(seed): adapt(claim, seed) for seed in range(given.seeds)}
        records.append(
            {
                "slug": "mezo",
                "claim": f"MeZO on the {CLAIMS[claim]['what']} adapts a pre-trained model whose task has changed.",
                "baseline": "the pre-trained model, zero-shot",
                "method": {"steps": CLAIMS[claim]["steps"], "batch": BATCH, "rows": 512, **CLAIMS[claim]["optim"]},
                "required": {k: CLAIMS[claim][k] for k in ("at_least", "gain") if k in CLAIMS[claim]},
                "seeds": list(results),
                "results": results,
                "mean": {key: statistics.mean(run[key] for run in results.values()) for key in results["0"]},
                "verdict": verdict(claim, list(results.values())),
                "seconds": round(time.perf_counter() - began, 1),
                "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": 1},
            }
        )
        print(claim, json.dumps(records[-1]["results"]), records[-1]["verdict"], flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
