"""A run as an ordinary model: updates merged, written shard by shard in a chosen dtype, and compared with the run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pegbox.artefact.load import load_artefact
from pegbox.errors import BadInput, did_you_mean
from pegbox.export.card import write_export_card
from pegbox.export.differences import Rounding, compare_logits, logits_of, prompt_ids
from pegbox.export.tuned import Opened, open_tuned, plain_model, stored_names, tuned_tensors
from pegbox.models import load, unpacked_folder
from pegbox.parts.algebra import StateReader, write_state
from pegbox.parts.files import staged_folder

__all__ = ["DTYPES", "export_merged", "pick_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD = 2 << 30


def pick_dtype(name: str | None, opened: Opened) -> torch.dtype:
    """The dtype meant; by default the base checkpoint's own (float32 for a GGUF file). Raises `BadInput`."""
    if name is None:
        return _stored_dtype(opened) or torch.float32
    if name not in DTYPES:
        raise BadInput(f"Unknown dtype '{name}'.{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def _stored_dtype(opened: Opened) -> torch.dtype | None:
    reader = StateReader(unpacked_folder(opened.source))
    dtypes = {reader[name].dtype for name in list(reader)[:8]} & set(DTYPES.values())
    return dtypes.pop() if len(dtypes) == 1 else None


def export_merged(
    run: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    check: bool = True,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    max_shard_bytes: int = _SHARD,
) -> dict[str, Any]:
    """Write the tuned model as a transformers folder.

    Args:
        dtype: float32, bfloat16 or float16; None keeps the base checkpoint's.
        check: run `prompts` (default: four built-in ones) through both models afterwards.

    Returns:
        folder, dtype, bytes, what rounding cost, and, checked, the largest and the mean logit difference and how often
        the first choice is the same: of the written weights computed in float32, and, in a narrower dtype, in that.

    Raises:
        Unsupported: the update has no form as weights. Also what `load_artefact` and writing raise.
    """
    target = Path(out)
    opened = open_tuned(run, base=base, device=device)
    chosen = pick_dtype(dtype, opened)
    ids = prompt_ids(opened.tokenizer, prompts, plain_model(opened.model).config.vocab_size)
    expected = _trained_logits(run, opened, base, device, ids) if check else []
    rounding = Rounding()
    with staged_folder(target) as place:
        names, tied = stored_names(opened.model)
        write_state(_rounded(opened, set(names), chosen, rounding), place / "w", names, max_shard_bytes=max_shard_bytes)
        for path in (place / "w").iterdir():
            path.rename(place / path.name)
        (place / "w").rmdir()
        _write_settings(opened, place, chosen, tied)
        report = {"dtype": str(chosen).removeprefix("torch."), **rounding.summary()}
        write_export_card(place, opened, "merged model", report)
    kwargs = opened.manifest.root.model_kwargs
    task = opened.manifest.root.task
    report = {"folder": str(target), "bytes": sum(p.stat().st_size for p in target.glob("*.safetensors")), **report}
    del opened
    gc.collect()
    if check:
        report |= _measured(target, task, kwargs, chosen, device, ids, expected)
    return report


def _trained_logits(
    run: str | Path, opened: Opened, base: str | Path | None, device: str, ids: Sequence[Tensor]
) -> list[Tensor]:
    """Of the model as it was trained: on packed weights, if it was."""
    if not opened.packed:
        return logits_of(opened.model, ids)
    return logits_of(load_artefact(run, base=base, device=device).model, ids)


def _rounded(opened: Opened, names: set[str], dtype: torch.dtype, rounding: Rounding) -> Iterator[tuple[str, Tensor]]:
    """The tuned tensors in the dtype they are written in; what is not floating stays."""
    base = StateReader(unpacked_folder(opened.source))
    for name, tensor in tuned_tensors(opened.model):
        if name not in names:
            continue
        if not tensor.is_floating_point():
            yield name, tensor
            continue
        rounded = tensor.to(dtype)
        rounding.add(base.get(name), tensor, rounded)
        yield name, rounded


def _write_settings(opened: Opened, place: Path, dtype: torch.dtype, tied: bool) -> None:
    inner = plain_model(opened.model)
    config = type(inner.config).from_dict(inner.config.to_dict())
    config.dtype, config._name_or_path = dtype, ""
    config.architectures = [type(inner).__name__]
    if getattr(config, "tie_word_embeddings", False) and not tied:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(place)
    if getattr(inner, "generation_config", None) is not None:
        inner.generation_config.save_pretrained(place)
    if opened.tokenizer is not None:
        opened.tokenizer.save_pretrained(place)


def _measured(
    folder: Path,
    task: str,
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    ids: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> dict[str, Any]:
    model: Any = load(folder, device=device, precision="fp32", task=task, model_kwargs=kwargs).model
    found: dict[str, Any] = compare_logits(expected, logits_of(model, ids))
    if dtype != torch.float32:
        narrow = compare_logits(expected, logits_of(model.to(dtype), ids))
        name = str(dtype).removeprefix("torch.")
        found |= {f"{key}_computed_in_{name}": value for key, value in narrow.items()}
    return found
