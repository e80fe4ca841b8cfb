"""Where downloaded, converted and computed things are kept between runs, and how two processes make one only once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pegbox.parts.files import staged_folder, writing

__all__ = ["cache_dir", "cached_folder"]


def cache_dir() -> Path:
    """PEGBOX_CACHE, or the platform's cache folder with `pegbox` in it. Not made here."""
    if given := os.environ.get("PEGBOX_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pegbox"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "pegbox" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pegbox"


def cached_folder(group: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `group/name` of the cache, filled by `make(empty folder)` if it isn't there yet.

    It appears complete or not at all; of several processes one makes it and the others wait.
    """
    final = cache_dir() / group / name
    if final.exists():
        return final
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{name}.lock"):
            if not final.exists():
                with staged_folder(final) as temporary:
                    make(temporary)
    return final
