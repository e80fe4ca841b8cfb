"""Examples to batches: padding, packing, classification, preferences.

Shapes: B rows, T tokens, S samples (S = B unless packed). Padding is known by position, never by id, so a tokenizer
whose pad, eos and end of turn are one token loses nothing. Packed rows carry restarting position ids and no attention
mask: attention then stays inside each sample in architectures that read the restarts (`packing_leaks` finds out by
gradient whether a model does); no sample's first token is predicted from the sample before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.data.rows import Row
from pegbox.errors import BadInput

__all__ = [
    "ClassCollator",
    "PackingCollator",
    "PaddingCollator",
    "pack_lengths",
    "packing_leaks",
    "preference_records",
]

Example = dict[str, Any]
IGNORED = -100


class PaddingCollator:
    """Examples padded to the longest.

    Returns input_ids, attention_mask, labels (B, T) int64; sample_ids, task_ids (B,) int64; sample_weight (B,) float32.

    Args:
        pad_id: what fills the padding; any valid id, it is never attended to or trained.
        side: "right", or "left" (then position_ids are given too).
        multiple_of: T is rounded up to it.
    """

    def __init__(self, pad_id: int, side: str = "right", multiple_of: int = 1):
        if side not in ("right", "left"):
            raise BadInput(f"Padding side '{side}' is unknown. Known: right, left.")
        self.pad_id, self.side, self.multiple_of = pad_id, side, max(1, multiple_of)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if "parts" in examples[0]:
            return _arranged_rows(examples, self.pad_id, self.multiple_of)
        width = _round_up(max(len(e["input_ids"]) for e in examples), self.multiple_of)
        ids = torch.full((len(examples), width), self.pad_id)
        labels = torch.full_like(ids, IGNORED)
        mask = torch.zeros_like(ids)
        for i, example in enumerate(examples):
            place = self._place(len(example["input_ids"]), width)
            ids[i, place] = torch.as_tensor(example["input_ids"])
            labels[i, place] = torch.as_tensor(example["labels"])
            mask[i, place] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **_per_sample(examples)}
        if self.side == "left":
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch | _views(self, examples)

    def _place(self, length: int, width: int) -> slice:
        return slice(0, length) if self.side == "right" else slice(width - length, width)


class PackingCollator:
    """Several examples per row, first fit by falling length, in rows of at most `capacity` tokens.

    Returns input_ids, labels, position_ids, sequence_ids (B, T): `sequence_ids` says which entry of sample_ids (S,) a
    token belongs to, -1 for padding. No attention mask, and `use_cache` False: with a key-value cache models stop
    reading the restarts.
    """

    def __init__(self, pad_id: int, capacity: int, multiple_of: int = 1):
        self.pad_id, self.capacity, self.multiple_of = pad_id, capacity, max(1, multiple_of)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if "parts" in examples[0]:
            raise BadInput("rows.packing packs single examples, and these rows are packed already. Leave one out.")
        bins = pack_lengths([len(e["input_ids"]) for e in examples], self.capacity)
        width = _round_up(max(sum(len(examples[j]["input_ids"]) for j in b) for b in bins), self.multiple_of)
        ids = torch.full((len(bins), width), self.pad_id)
        labels = torch.full_like(ids, IGNORED)
        owner = torch.full_like(ids, -1)
        positions = torch.zeros_like(ids)
        for i, members in enumerate(bins):
            start = 0
            for j in members:
                length = len(examples[j]["input_ids"])
                place = slice(start, start + length)
                ids[i, place] = torch.as_tensor(examples[j]["input_ids"])
                labels[i, place] = torch.as_tensor(examples[j]["labels"])
                labels[i, start] = IGNORED  # nothing of its own sample predicts it
                owner[i, place] = j
                positions[i, place] = torch.arange(length)
                start += length
            positions[i, start:] = torch.arange(width - start)
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "sequence_ids": owner,
            "use_cache": False,
            **_per_sample(examples),
            **_views(self, examples),
        }


class ClassCollator:
    """Padded texts with one label each: labels (B,) int64 for classes, float32 for numbers to be regressed."""

    def __init__(self, pad_id: int, multiple_of: int = 1):
        self.pad_id, self.multiple_of = pad_id, max(1, multiple_of)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        width = _round_up(max(len(e["input_ids"]) for e in examples), self.multiple_of)
        batch: dict[str, Any] = {}
        for key, fill in (("input_ids", self.pad_id), ("token_type_ids", 0)):
            if key in examples[0]:
                batch[key] = torch.stack([_filled(e[key], width, fill) for e in examples])
        batch["attention_mask"] = torch.stack([_filled([1] * len(e["input_ids"]), width, 0) for e in examples])
        batch["labels"] = torch.tensor([e["labels"] for e in examples])
        return batch | _per_sample(examples)


def preference_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Preference rows in TRL's conversational form: {"prompt": messages, "chosen": messages, "rejected": messages}."""
    out = []
    for row in rows:
        if row.kind != "preference":
            raise BadInput(f"{row.source or row.id}: a preference row was expected, this is a {row.kind} row.")
        record: dict[str, Any] = {"prompt": row.messages, "chosen": row.chosen, "rejected": row.rejected}
        out.append(record | ({"tools": row.tools} if row.tools else {}))
    return out


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers whose lengths sum to at most `capacity`: first fit, longest first; items in order inside.

    Raises `BadInput` for an item longer than `capacity`.
    """
    if lengths and max(lengths) > capacity:
        raise BadInput(f"An example of {max(lengths)} tokens does not fit a packed row of {capacity}.")
    bins: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, room in enumerate(free) if room >= lengths[item]), None)
        if place is None:
            bins.append([item])
            free.append(capacity - lengths[item])
        else:
            bins[place].append(item)
            free[place] -= lengths[item]
    return sorted((sorted(b) for b in bins), key=lambda b: b[0])


def packing_leaks(model: nn.Module, length: int = 5) -> bool:
    """Whether a sample in a packed row would see the sample before it, by gradient.

    Two samples of `length` tokens in one row; the gradient of the second's logits with respect to the first's
    embeddings must be exactly zero, and the second's logits those of the sample alone. Weights, gradients, modes and
    random state are left as they were. True also for models that take no position ids.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    device = table.weight.device
    ids = torch.arange(1, 2 * length + 1, device=device)[None] % min(table.weight.shape[0], 97)
    positions = torch.arange(length, device=device).repeat(2)[None]
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    modes = {module: module.training for module in model.modules()}
    model.eval()
    hook = table.register_forward_hook(catch)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            packed = _logits(model, ids, positions)[0, length:]
            (gradient,) = torch.autograd.grad(packed.float().square().sum(), caught[0])
            alone = _logits(model, ids[:, length:], positions[:, :length])[0]
    except TypeError:
        return True
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    isolated = bool((gradient[0, :length] == 0).all())
    scale = alone.detach().float().abs().max().clamp(min=1e-6)
    return not isolated or bool((packed - alone).detach().float().abs().max() > 1e-2 * scale)


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    out = model(input_ids=ids, position_ids=positions, use_cache=False)
    return out.logits if hasattr(out, "logits") else out[0]


def _per_sample(examples: Sequence[Example]) -> dict[str, Tensor]:
    return {
        "sample_ids": torch.tensor([e["sample_id"] for e in examples], dtype=torch.int64),
        "sample_weight": torch.tensor([e.get("weight", 1.0) for e in examples], dtype=torch.float32),
        "task_ids": torch.tensor([e.get("task_id", 0) for e in examples], dtype=torch.int64),
    }


def _views(collate: Callable[[list[Example]], dict[str, Any]], examples: Sequence[Example]) -> dict[str, Any]:
    """The examples' other forms as batches of their own, by name; a form that no example has is left out."""
    if not any("views" in e for e in examples):
        return {}
    names = dict.fromkeys(name for e in examples for name in e.get("views", {}))
    return {"views": {name: collate([e["views"][name] for e in examples if name in e["views"]]) for name in names}}


def _arranged_rows(rows: Sequence[Example], pad_id: int, multiple_of: int) -> dict[str, Any]:
    """Rows that hold several examples each (`data.layouts`), in the form of `PackingCollator`."""
    longest = max(max(len(r["input_ids"]), r["width"]) for r in rows)
    width = _round_up(longest, multiple_of)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full_like(ids, IGNORED)
    owner = torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    samples: list[Example] = []
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.as_tensor(row["input_ids"])
        labels[i, :length] = torch.as_tensor(row["labels"])
        start = 0
        for j, size in enumerate(row["parts"]):
            owner[i, start : start + size] = len(samples)
            positions[i, start : start + size] = torch.arange(size)
            samples.append({"sample_id": row["sample_ids"][j], "weight": row["weights"][j], "task_id": row["task_id"]})
            start += size
        positions[i, length:] = torch.arange(width - length)
        if row["cross_attend"]:
            positions[i] = torch.arange(width)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "sequence_ids": owner,
        "use_cache": False,
        **_per_sample(samples),
    }


def _filled(values: Sequence[int], width: int, fill: int) -> Tensor:
    out = torch.full((width,), fill)
    out[: len(values)] = torch.as_tensor(values)
    return out


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
