"""Evaluating a model without leaving a trace: no graph, evaluation mode, and the host's random state put back.

It does not protect weights: that is a mover's work (`perturbation.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["isolated"]


@contextmanager
def isolated(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Gradients off and every module in evaluation mode; yields a function that rewinds all random states.

    Evaluations that are compared call it before each, so that whatever is random in them is the same. When the context
    ends, also on an error, random states and train/eval flags are as they were.
    """
    rewind = _random_state()
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield rewind
    finally:
        for module in training:
            module.training = True
        rewind()


def _random_state() -> Callable[[], None]:
    host, generator, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind() -> None:
        torch.set_rng_state(host)
        np.random.set_state(generator)
        random.setstate(python)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return rewind
