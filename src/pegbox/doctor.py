"""What this machine offers, and what is broken: the findings that `pegbox doctor` prints."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from typing import Literal, NamedTuple

from pegbox.workspace import library_versions

__all__ = ["Finding", "examine"]

EXTRAS = {
    "bitsandbytes": ("quant", "NF4 bases and 8-bit optimizers"),
    "lm_eval": ("eval", "the lm-eval bridge"),
}


class Finding(NamedTuple):
    """One thing looked at: ok, missing (optional, the detail says what for), or broken (the detail says the remedy)."""

    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str


def examine() -> list[Finding]:
    """Everything, cheapest first."""
    return [_python(), _libraries(), *_devices(), _memory(), _disk(), _registration(), *_extras(), _converter()]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "broken", platform.python_version() + ("" if good else ": 3.11 needed"))


def _libraries() -> Finding:
    return Finding("libraries", "ok", ", ".join(f"{k} {v}" for k, v in library_versions().items() if k != "python"))


def _devices() -> list[Finding]:
    import torch

    found = [Finding("cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(Finding(f"cuda:{i}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        found.append(Finding("cuda", "missing", "no GPU seen by torch; everything runs on the CPU"))
    return found


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")


def _disk() -> Finding:
    from pegbox.models import cache_dir

    folder = cache_dir()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**30
    writable = os.access(there, os.W_OK)
    detail = f"{folder}, {free:.1f} GiB free" + ("" if writable else "; not writable: set PEGBOX_CACHE")
    return Finding("cache", "ok" if writable else "broken", detail)


def _registration() -> Finding:
    try:
        from pegbox.tuners.sparse import SparseConfig

        SparseConfig(task_type="CAUSAL_LM")
    except Exception as error:
        return Finding("peft", "broken", f"pegbox's tuners do not register with this PEFT ({error}); use peft 0.21.")
    return Finding("peft", "ok", "pegbox's tuners are registered")


def _extras() -> list[Finding]:
    found = []
    for package, (extra, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        detail = purpose if there else f"needed for {purpose}: pip install 'pegbox[{extra}]'"
        found.append(Finding(package, "ok" if there else "missing", detail))
    return found


def _converter() -> Finding:
    from pegbox.export import find_converter

    path = find_converter()
    detail = str(path) if path else "llama.cpp's convert_hf_to_gguf.py not found (only export --to gguf needs it)"
    return Finding("gguf converter", "ok" if path else "missing", detail)
