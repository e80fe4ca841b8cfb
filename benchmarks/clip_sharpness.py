"""APGD's passes and time against the plain loop, its memory, and an interpolation streamed over files.

    python benchmarks/clip_sharpness.py [--layers 4] [--tokens 64] [--batch 4] [--steps 20] [--megabytes 512]

The plain loop takes one forward and backward for the gradient and one forward to judge, each step. A random Llama of
SmolLM2's block shape, vocabulary 8192, float32, one thread; passes alternate in one process. Copies are counted among
the tensors alive at each forward; the interpolation's memory is the peak of anonymous resident bytes over that before.
Writes benchmarks/results/clip-sharpness.json.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import lines
import measure
import torch
from torch import nn

from pegbox.analyze.apgd import Ball
from pegbox.analyze.groups import layers_of
from pegbox.analyze.sharpness import sharpness
from pegbox.parts.algebra import StateReader, write_state
from pegbox.weights import WEIGHTS

TARGETS = {"time_over_plain_loop": 0.6, "backwards": 20, "copies_of_what_moves": 4, "peak_over_allowed": 1.0}


def next_token(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def plain_loop(model: nn.Module, ids: torch.Tensor, steps: int, rho: float) -> None:
    """The same moves with two forwards a step, as the reference code does; linf, adaptive, no cuts."""
    weights = list(model.parameters())
    with torch.no_grad():
        start = [w.clone() for w in weights]
        next_token(model, ids)
    move, before = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    best = [torch.zeros_like(w) for w in weights]
    for _ in range(steps):
        gradients = torch.autograd.grad(next_token(model, ids), weights)
        with torch.no_grad():
            for i, (w, g) in enumerate(zip(weights, gradients)):
                limit = rho * start[i].abs()
                z = torch.minimum(torch.maximum(move[i] + 2 * limit * g.sign(), -limit), limit)
                move[i], before[i] = 0.75 * z + 0.25 * before[i], move[i]
                w.copy_(start[i] + move[i])
            next_token(model, ids)
            for kept, m in zip(best, move):
                kept.copy_(m)
    with torch.no_grad():
        for w, value in zip(weights, start):
            w.copy_(value)


def interpolation(folder: Path, megabytes: int) -> dict[str, Any]:
    """Peak memory of one streamed pass, against one model and two tensors."""
    for seed, name in enumerate(("base", "tuned")):
        lines.write(folder / name, seed, megabytes, torch.float32)
    op = WEIGHTS.validate({"kind": "interpolate", "amount": 0.3})

    def run() -> None:
        readers = StateReader(folder / "base"), StateReader(folder / "tuned")
        write_state(op.apply(readers[0], [readers[1]], None), folder / "out", readers[0], max_shard_bytes=lines.SHARD)

    with lines.Peak() as peak:  # no run before it: freed memory that is kept would hide what a run takes
        run()
    allowed = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors")) + 2 * 4 * lines.WIDTH**2
    return {"interpolation_extra_bytes": peak.extra, "peak_over_allowed": peak.extra / allowed}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 4), ("tokens", 64), ("batch", 4), ("steps", 20), ("repeats", 3), ("megabytes", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = interpolation(Path(folder), given.megabytes)
    model = measure.smollm_shaped(given.layers).eval()
    ids = torch.randint(0, 8000, (given.batch, given.tokens), generator=torch.Generator().manual_seed(0))
    ball, rho = Ball(1e-3), 1e-3
    taken = measure.in_turns(
        {
            "ours": lambda: sharpness(model, next_token, [ids], ball=ball, steps=given.steps),
            "plain loop": lambda: plain_loop(model, ids, given.steps, rho),
        },
        given.repeats,
    )
    layer = next(names for name, names in layers_of(model).items() if ".layers." in name)
    copies, found = copies_alive(model, ids, ball, given.steps, layer)
    result |= {
        "seconds_of": taken,
        "time_over_plain_loop": taken["ours"] / taken["plain loop"],
        "forwards": found.forwards,
        "backwards": found.backwards,
        "copies_of_what_moves": copies,
    }
    measure.write("clip-sharpness", {"arguments": vars(given), **result}, TARGETS)


def copies_alive(model: nn.Module, ids: torch.Tensor, ball: Ball, steps: int, layer: list[str]) -> tuple[float, Any]:
    """Tensors of the layer's shapes that exist at a forward and did not before, as a multiple of the layer."""
    moving = [dict(model.named_parameters())[name] for name in layer]
    shapes, most = {p.shape for p in moving}, [0]

    def alive() -> dict[int, int]:
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape in shapes]
        return {t.data_ptr(): t.nbytes for t in tensors}

    before = alive()

    def loss(moved: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        most[0] = max(most[0], sum(size for place, size in alive().items() if place not in before))
        return next_token(moved, batch)

    found = sharpness(model, loss, [ids], ball=ball, steps=steps, params=layer)
    return most[0] / sum(p.nbytes for p in moving), found


if __name__ == "__main__":
    main()
