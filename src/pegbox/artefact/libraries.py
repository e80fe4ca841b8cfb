"""The versions of the libraries that decide what a model computes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["versions"]

_PACKAGES = ("pegbox", "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Package -> version of those that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
