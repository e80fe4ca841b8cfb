"""Calibration batches for preparations, and input covariances block by block: one block's are held at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy, Piece
from pegbox.parts.blocks import BlockWalk
from pegbox.parts.statistics import StatSpec, collect
from pegbox.parts.statistics_pass import Collector
from pegbox.parts.view import SIDE_KEYS

__all__ = ["block_covariances", "row_batches", "text_batches"]

_TEXT_BATCH = 8


def row_batches(batches: Iterable[Mapping[str, Any]], samples: int, length: int) -> list[Mapping[str, Any]]:
    """The first `samples` sequences of the run's batches, each cut to `length` tokens. Raises `BadInput` for none."""
    taken: list[Mapping[str, Any]] = []
    left = samples
    for batch in batches:
        if left <= 0:
            break
        inputs = {k: v[:left, :length] for k, v in batch.items() if isinstance(v, Tensor) and k not in SIDE_KEYS}
        inputs |= {k: v for k, v in batch.items() if not isinstance(v, Tensor) and k not in SIDE_KEYS}
        taken.append(inputs)
        left -= len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    if not taken:
        raise BadInput("There is no calibration row. Give the run training rows, or a calibration text.")
    return taken


def text_batches(
    path: Path, tokenizer: Any, samples: int, length: int, generator: torch.Generator
) -> list[Mapping[str, Any]]:
    """`samples` windows of a text at random places, tokenized and cut to `length` tokens."""
    if tokenizer is None:
        raise BadInput("A calibration text needs a tokenizer.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"The calibration text {path} can't be read ({error}). Name a text file in UTF-8.") from error
    window = min(len(text), 8 * length)  # characters: tokens are rarely longer
    if not text.strip():
        raise BadInput(f"The calibration text {path} is empty.")
    places = torch.randint(len(text) - window + 1, (samples,), generator=generator).tolist()
    rows = [tokenizer(text[at : at + window], add_special_tokens=False)["input_ids"][:length] for at in places]
    rows = [row for row in rows if row]
    return [_padded(rows[at : at + _TEXT_BATCH]) for at in range(0, len(rows), _TEXT_BATCH)]


def _padded(rows: Sequence[Sequence[int]]) -> Mapping[str, Any]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def block_covariances(
    model: nn.Module, anatomy: Anatomy, pieces: Sequence[Piece], spec: StatSpec, batches: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Piece], Mapping[str, Tensor]]]:
    """(matrices, covariance by module) block by block, for the weights as they are when the block is reached.

    The caller must not change a block before the next one is asked for: later blocks see its outputs. A model with
    several lists of blocks, or targets outside them, is gone through at once.
    """
    inside = len(anatomy.stacks) == 1 and all(piece.block is not None for piece in pieces)
    if not inside:
        whole = collect(model, _all(spec, len(batches)), batches)
        _warn_of_few(pieces, whole.tokens)
        yield list(pieces), whole["input_covariance"]
        return
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        walk = BlockWalk(model, anatomy=anatomy)
        inputs = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]
        with torch.no_grad():
            walks = [walk.begin(batch) for batch in inputs]
            for index in range(len(walk)):
                group = [piece for piece in pieces if piece.block is not None and piece.block[1] == index]
                collector = Collector(spec, "batch", anatomy, group)
                with collector.attached(model):
                    for batch, state in zip(inputs, walks):
                        collector.begin(batch)
                        walk.step(state)
                        collector.end()
                if index == 0:
                    _warn_of_few(pieces, collector.tokens)
                if group:
                    yield group, collector.results()[0]["input_covariance"]
    finally:
        for module, mode in modes.items():
            module.training = mode


def _all(spec: StatSpec, count: int) -> StatSpec:

    return replace(spec, batches=count)


def _warn_of_few(pieces: Sequence[Piece], tokens: int) -> None:
    widest = max(piece.shape[1] for piece in pieces)
    if 0 < tokens < widest / 4:
        warnings.warn(
            f"{tokens} calibration tokens for inputs of width {widest}: the covariance's rank is below a quarter of "
            "it. Use more or longer rows.",
            stacklevel=3,
        )
