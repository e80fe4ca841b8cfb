"""A subject for analyses without a run: a tiny Llama, a moved copy of it, and rows with choices."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.data.rows import Row
from pegbox.parts.pairs import ModelPair
from pegbox.parts.results import Measurement, Score
from pegbox.parts.task import TASK
from pegbox.parts.view import Batch
from pegbox.testing.fakes import tiny_llama, tiny_tokenizer

__all__ = ["TinySubject"]


class TinySubject:
    """See `pegbox.analyze.base.Subject`.

    Args:
        folder: for files. shift: deviation of the noise by which the tuned model's blocks differ.
    """

    def __init__(self, folder: Path, shift: float = 0.05):
        self.name, self.seed, self.folder = "tuned", 0, folder
        self.task, self.tokenizer = TASK.validate("text"), tiny_tokenizer()
        self.base = tiny_llama().eval()
        self.tuned = copy.deepcopy(self.base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.tuned.named_parameters():
                if ".layers." in name:
                    parameter += shift * torch.randn(parameter.shape, generator=generator)

    def digest(self) -> str:
        """Of everything in both models."""
        parts = hashlib.sha256()
        for model in (self.base, self.tuned):
            for name, tensor in model.state_dict().items():
                parts.update(name.encode() + tensor.numpy().tobytes())
            parts.update(repr([(m.training, "forward" in vars(m)) for m in model.modules()]).encode())
            parts.update(repr([p.requires_grad for p in model.parameters()]).encode())
        return parts.hexdigest()

    def pair(self) -> ModelPair:
        return ModelPair(self.tuned, self.base)

    def weights(self) -> tuple[nn.Module, Mapping[str, Tensor], Mapping[str, Tensor]]:
        states = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (self.base, self.tuned)]
        return copy.deepcopy(self.base), states[0], states[1]

    def rows(self, source: Any = None) -> list[Row]:
        asked = [
            [{"role": "user", "content": f"which, {i}?"}, {"role": "assistant", "content": "AB"[i % 2]}]
            for i in range(6)
        ]
        return [
            Row(f"r{i}", "chat", messages=messages, answer="AB"[i % 2], meta={"choices": ["A", "B"]})
            for i, messages in enumerate(asked)
        ]

    def batches(self, rows: Sequence[Any], size: int = 8) -> Iterator[Batch]:
        examples = list(self.task.encode(list(rows), self.tokenizer))
        collate = self.task.collator(self.tokenizer)
        for start in range(0, len(examples), size):
            yield collate(examples[start : start + size])

    def define(self, suite: str, source: Any) -> None:
        """Every suite is the same rows."""

    @torch.no_grad()
    def measure(self, model: nn.Module, suite: str, *, generating: bool = True) -> Measurement:
        """The mean loss on the rows."""
        view, total = self.task.view(model.eval()), 0.0
        batches = list(self.batches(self.rows()))
        for batch in batches:
            targets, counted = view.targets(batch)
            total += float(nn.functional.cross_entropy(view.logits(batch)[counted], targets[counted]))
        score = Score(name="loss", value=total / len(batches), n=6, higher_is_better=False)
        return Measurement(suite=suite, scores={"loss": score})
