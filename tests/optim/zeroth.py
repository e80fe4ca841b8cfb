"""A hand-made `Problem` and models for the tests of zeroth-order steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pegbox.optim import OPTIM
from pegbox.parts.context import Context
from pegbox.testing import tiny_llama


class Bench:
    """One model, one value function, one step component; counts forwards."""

    micro = 1

    def __init__(self, model: nn.Module, value: Callable[[nn.Module], torch.Tensor], **options):
        self.model, self.loss, self.forwards, self.finished = model, value, 0, 0
        self.step = OPTIM.validate({"kind": "mezo", "lr": 1e-3, **options})
        self.state = self.step.setup(Context(model=model, seed=3, total_steps=20, step=lambda: self.finished))

    @property
    def params(self):
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def value(self) -> float:
        self.forwards += 1
        return float(self.loss(self.model))

    def run(self, steps=1):
        for _ in range(steps):
            log = self.step.estimate(self.state, self)
            self.finished += 1
        return log

    def weights(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}


def llama(dtype=torch.float32, **sizes):
    return tiny_llama(num_hidden_layers=1, **sizes).to(dtype)


def next_token_loss(model):
    ids = torch.arange(24).view(2, 12) % 40
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


class Mlp(nn.Module):
    """A float64 net in which nothing rounds to float32."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 8, dtype=dtype), nn.Linear(8, 3, dtype=dtype)
            self.x, self.y = torch.randn(6, 5, dtype=dtype), torch.arange(6) % 3

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def class_loss(model):
    return nn.functional.cross_entropy(model(model.x), model.y)
