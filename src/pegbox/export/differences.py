"""How far an exported model's answers are from those of the model it was made from, and what rounding cost.

max |z_exported - z_tuned| over all logits z of a batch of prompts,   each prompt run by itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PROMPTS", "Rounding", "compare_logits", "logits_of", "prompt_ids"]

PROMPTS = (
    "What is the capital of France?",
    "Write a short Python function that returns the n-th Fibonacci number.",
    "Summarise in one sentence: The committee met on Tuesday, could not agree on the budget, and adjourned for a week.",
    "A train leaves at 14:20 and arrives at 17:05. How long does the journey take?",
)


def prompt_ids(tokenizer: Any, prompts: Sequence[str] | None, vocabulary: int) -> list[Tensor]:
    """Token ids (1, T) per prompt, in the chat template where there is one; without a tokenizer, seeded random ids."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocabulary, (1, 24), generator=generator) for _ in PROMPTS]
    return [_encode(tokenizer, prompt) for prompt in prompts or PROMPTS]


def _encode(tokenizer: Any, prompt: str) -> Tensor:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    return torch.tensor([tokenizer(prompt)["input_ids"]])


@torch.no_grad()
def logits_of(model: nn.Module, ids: Sequence[Tensor]) -> list[Tensor]:
    """Logits per prompt, float32 on the CPU, in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    return [model(input_ids=one.to(device)).logits.float().cpu() for one in ids]


def compare_logits(expected: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Largest and mean absolute difference, and how often the first choice is the same (over positions)."""
    differences = [(a - b).abs() for a, b in zip(expected, found, strict=True)]
    same = [(a.argmax(-1) == b.argmax(-1)).float().flatten() for a, b in zip(expected, found, strict=True)]
    return {
        "max_logit_difference": max(float(d.max()) for d in differences),
        "mean_logit_difference": float(torch.cat([d.flatten() for d in differences]).mean()),
        "same_first_choice": float(torch.cat(same).mean()),
    }


@dataclass
class Rounding:
    """What writing in a narrower dtype costs, summed over tensors: entries whose whole update vanished, and error."""

    changed: int = 0
    lost: int = 0
    update_square: float = 0.0
    error_square: float = 0.0
    unknown: int = 0  # tensors that the base's files don't hold under this name

    def add(self, base: Tensor | None, tuned: Tensor, rounded: Tensor) -> None:
        """Count one tensor. An update is lost where the rounded value equals the base's rounded value."""
        if base is None or base.shape != tuned.shape:
            self.unknown += 1
            return
        wide, base = tuned.float(), base.to(tuned.device)
        moved = wide != base.float()
        self.changed += int(moved.sum())
        self.lost += int((moved & (rounded == base.to(rounded.dtype))).sum())
        self.update_square += float((wide - base.float()).double().square().sum())
        self.error_square += float((rounded.float() - wide).double().square().sum())

    def summary(self) -> dict[str, Any]:
        """Plain values for a report."""
        ratio = (self.error_square / self.update_square) ** 0.5 if self.update_square else 0.0
        return {
            "changed_entries": self.changed,
            "updates_lost_to_rounding": self.lost,
            "rounding_over_update": ratio,  # Frobenius norms over all tensors
            **({"tensors_not_compared": self.unknown} if self.unknown else {}),
        }
