"""Rewards of answers, from a classifier with one output, a function on text, or a function on token ids.

All of them score batches of (prompt, answer) and return float32 on the CPU; a reward that is no finite number is an
error that shows the row. Texts are decoded without special tokens, and a reward model reads them through its own
tokenizer and template, so that nothing of the policy's format leaks into them.

What this file does not do: say which answers to score (`pegbox.decode.rollouts`, `pegbox.decode.transfer_q`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pegbox.decode.base import module_of
from pegbox.decode.prompts import frame
from pegbox.errors import BadInput, RunFailed
from pegbox.parts.functions import function_at, is_function_path
from pegbox.parts.generation import Messages, as_evaluated

__all__ = ["ClassifierReward", "IdReward", "Reward", "TextReward", "reward_of"]

Ids = list[list[int]]


class Reward:
    """Scores (prompt, answer) pairs of token ids. `rows` counts what it scored."""

    rows = 0

    def __call__(self, prompts: Ids, answers: Ids) -> Tensor:
        """(N,) float32 rewards. Raises `RunFailed` where one is no finite number."""
        values = torch.as_tensor(self.score(prompts, answers), dtype=torch.float32).reshape(-1).cpu()
        if len(values) != len(answers):
            raise RunFailed(f"The reward gave {len(values)} values for {len(answers)} answers.")
        wrong = (~torch.isfinite(values)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise RunFailed(
                f"The reward of row {row} is {float(values[row])}: {self.shown(prompts[row], answers[row])}"
            )
        self.rows += len(values)
        return values

    def score(self, prompts: Ids, answers: Ids) -> Any:
        raise NotImplementedError

    def shown(self, prompt: list[int], answer: list[int]) -> str:
        """A row for an error's message."""
        return f"token ids {prompt} -> {answer}"

    def prompt_ids(self, messages: Messages) -> list[int] | None:
        """What stands for the prompt in calls, where the messages are known; None: the policy's own prompt ids."""
        return None


class IdReward(Reward):
    """A function of lists of prompt ids and answer ids."""

    def __init__(self, function: Callable[[Ids, Ids], Any]):
        self.function = function

    def score(self, prompts: Ids, answers: Ids) -> Any:
        return self.function(prompts, answers)


class TextReward(Reward):
    """A function of texts: `f(prompts=[...], completions=[...]) -> [float]` as TRL's, or `f(text) -> float` of both."""

    def __init__(self, function: Callable[..., Any], tokenizer: Any):
        if tokenizer is None:
            raise BadInput("A reward on text needs the policy's tokenizer.")
        self.function, self.tokenizer = function, tokenizer
        names = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        self._whole = len(names) == 1 and names != ["completions"]

    def score(self, prompts: Ids, answers: Ids) -> Any:
        asked, said = self._texts(prompts), self._texts(answers)
        if self._whole:
            return [float(self.function(p + a)) for p, a in zip(asked, said)]
        return self.function(prompts=asked, completions=said)

    def _texts(self, rows: Ids) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def shown(self, prompt: list[int], answer: list[int]) -> str:
        return " -> ".join(repr(text[-200:]) for text in self._texts([prompt, answer]))

    def prompt_ids(self, messages: Messages) -> list[int]:
        return frame(self.tokenizer, messages, "raw")


class ClassifierReward(Reward):
    """A sequence classifier with one output, reading texts through its own tokenizer.

    Args:
        policy: the tokenizer that answers (and, without messages, prompts) are decoded with.
        batch_tokens: positions per forward, padding included.
    """

    def __init__(self, model: Any, tokenizer: Any, policy: Any, batch_tokens: int = 16_384):
        self.source, self.module, self.tokenizer, self.policy = model, module_of(model), tokenizer, policy
        self.batch_tokens = batch_tokens
        config: Any = self.module.config
        if tokenizer is None or policy is None:
            raise BadInput("A reward model needs its own tokenizer and the policy's.")
        if config.num_labels != 1:
            raise BadInput(f"A reward model has one output; this one has {config.num_labels} labels.")
        if tokenizer.pad_token_id is None or config.pad_token_id is None:
            raise BadInput(
                "The reward model has no padding token, so batches of different lengths can't be scored. Set "
                "tokenizer.pad_token and model.config.pad_token_id."
            )
        self._own_prompts: dict[tuple[int, ...], list[int]] = {}

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The messages in the reward model's own template, or as plain text where it has none; by its own tokenizer."""
        form = "template" if getattr(self.tokenizer, "chat_template", None) else "raw"
        ids = frame(self.tokenizer, messages, form)
        self._own_prompts[tuple(ids)] = ids
        return ids

    @torch.no_grad()
    def score(self, prompts: Ids, answers: Ids) -> Tensor:
        rows = [self._row(p, a) for p, a in zip(prompts, answers)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        values = torch.empty(len(rows))
        with as_evaluated(self.module):
            while order:
                width = len(rows[order[-1]])
                chosen = order[-max(1, self.batch_tokens // max(width, 1)) :]
                del order[-len(chosen) :]
                values[chosen] = self._forward([rows[i] for i in chosen])
        return values

    def _row(self, prompt: list[int], answer: list[int]) -> list[int]:
        said = self.policy.decode(answer, skip_special_tokens=True)
        own = self._own_prompts.get(tuple(prompt))
        if own is not None:
            return own + self.tokenizer(said, add_special_tokens=False)["input_ids"]
        return self.tokenizer(self.policy.decode(prompt, skip_special_tokens=True) + said)["input_ids"]

    def _forward(self, rows: Ids) -> Tensor:
        width, device = max(map(len, rows)), next(self.module.parameters()).device
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, device=device)
            mask[i, : len(row)] = 1
        if hasattr(self.source, "active"):
            with self.source.active() as model:
                return model(input_ids=ids, attention_mask=mask).logits.float().reshape(-1).cpu()
        return self.module(input_ids=ids, attention_mask=mask).logits.float().reshape(-1).cpu()

    def shown(self, prompt: list[int], answer: list[int]) -> str:
        return repr(self.policy.decode(answer, skip_special_tokens=True)[-200:])


def reward_of(name: str, given: Any, role: Callable[[str], Any], policy: Any) -> Reward:
    """The reward meant by a recipe's text (a role, or "file.py:function") or by an object handed over in Python."""
    if isinstance(given, Reward):
        return given
    if callable(given) and not hasattr(given, "config"):
        return TextReward(given, policy)
    if given is None and is_function_path(name):
        return TextReward(function_at(name), policy)
    model = role(name) if given is None else given
    return ClassifierReward(model, getattr(model, "tokenizer", None), policy)


def finished(answers: Sequence[Sequence[int]], ends: frozenset[int]) -> list[bool]:
    """Whether each answer has ended."""
    return [any(token in ends for token in answer) for answer in answers]
