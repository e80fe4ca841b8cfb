"""Handing a run out: as a merged model, a LoRA adapter, a GGUF file, or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput, did_you_mean
from pegbox.export.gguf import export_gguf, find_converter
from pegbox.export.hub import export_hub
from pegbox.export.lora import export_lora
from pegbox.export.merged import export_merged

__all__ = ["FORMS", "export", "export_gguf", "export_hub", "export_lora", "export_merged", "find_converter"]

_RANK = 64
FORMS = ("merged", "lora", "gguf", "hub")


def export(
    run: str | Path,
    *,
    to: str,
    out: str | Path,
    base: str | Path | None = None,
    dtype: str | None = None,
    rank: int = _RANK,
    check: bool = True,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Export a run or an artefact; returns a plain report (see the form's own function).

    Args:
        to: merged | lora | gguf | hub.
        out: a new folder (merged, lora), a new file (gguf), a repository's name (hub).
        dtype: for merged and gguf. rank: for lora (64).
        check: compare logits on `prompts` with the run's.

    Raises:
        BadInput: an unknown form, an option that the form doesn't take, or an `out` that is already there.
    """
    if to not in FORMS:
        raise BadInput(f"Unknown export form '{to}'.{did_you_mean(to, FORMS)}")
    _check_options(to, {"dtype": dtype, "rank": None if rank == _RANK else rank, "base": base, "prompts": prompts})
    if to == "hub":
        return export_hub(run, str(out))
    place = Path(out)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise BadInput(f"{place} is already there. Choose a new place for the export.")
    common: dict[str, Any] = {"base": base, "check": check, "prompts": prompts, "device": device}
    if to == "lora":
        return export_lora(run, place, rank=rank, **common)
    write = export_merged if to == "merged" else export_gguf
    return write(run, place, dtype=dtype, **common)


_TAKES = {
    "merged": {"dtype", "base", "prompts"},
    "gguf": {"dtype", "base", "prompts"},
    "lora": {"rank", "base", "prompts"},
    "hub": set(),
}


def _check_options(to: str, given: dict[str, Any]) -> None:
    wrong = [name for name, value in given.items() if value is not None and name not in _TAKES[to]]
    if wrong:
        raise BadInput(f"Export to {to} takes no {wrong[0]}. It takes: {', '.join(sorted(_TAKES[to])) or 'nothing'}.")
