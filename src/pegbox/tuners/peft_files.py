"""Reading PEFT's adapter folders without trusting them: no pickles, no keys that silently match nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from pegbox.errors import Corrupt

__all__ = ["adapter_keys", "read_adapter_config", "verify_adapter_files", "verify_loaded"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The JSON of `adapter_config.json`. Raises `Corrupt`."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise Corrupt(f"{folder / CONFIG} is missing or unreadable ({error}).") from error
    if not isinstance(config, dict):
        raise Corrupt(f"{folder / CONFIG} does not hold a JSON object.")
    return config


def verify_adapter_files(folder: Path) -> None:
    """The weights are there, as a safetensors file that opens. A pickle alone is refused."""
    if not (folder / WEIGHTS).is_file():
        pickles = [path.name for path in folder.glob("*.bin")]
        if pickles:
            raise Corrupt(f"{folder} holds only a pickle ({pickles[0]}); convert it to {WEIGHTS} in a place you trust.")
        raise Corrupt(f"{folder} has no {WEIGHTS}.")
    adapter_keys(folder)


def adapter_keys(folder: Path) -> set[str]:
    """The tensor names in the adapter file. Raises `Corrupt`."""
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"{folder / WEIGHTS} is truncated or damaged ({error}).") from error


def verify_loaded(model: nn.Module, folder: Path, adapter_name: str = "default") -> None:
    """Every tensor of the file has a place in the model and the other way round (PEFT ignores what doesn't match)."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    written = adapter_keys(folder)
    missing, extra = sorted(expected - written), sorted(written - expected)
    if missing or extra:
        raise Corrupt(
            f"{folder} does not fit this model: {len(missing)} tensors are missing from the file"
            f" ({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}), {len(extra)} have no place in the model"
            f" ({', '.join(extra[:3])}{' ...' if len(extra) > 3 else ''})."
        )
