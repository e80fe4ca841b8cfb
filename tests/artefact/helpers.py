"""What the tests of artefacts and exports share."""

from __future__ import annotations

import torch

from pegbox.models import load
from pegbox.parts.context import Context
from pegbox.tuners.axis import TUNER


def tuned_model(source, block, seed=0, allocation=None):
    """(tuner, model): a tuner attached to the base and moved off its initial value."""
    tuner = TUNER.validate(block)
    bare = load(source, device="cpu").model
    model = tuner.attach(bare, allocation, Context(model=bare)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return tuner, model


LORA = {"kind": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]}
