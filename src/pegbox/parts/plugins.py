"""A user's own components: `--plugin file.py` imports the file, and its decorators register what it defines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput, did_you_mean

__all__ = ["load_plugins", "user_function"]


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Import each file once. Raises `BadInput` with the file and the exception's own words."""
    for path in paths:
        _import(Path(path))


def user_function(ref: str) -> Callable[..., Any]:
    """The function of "file.py:name". Raises `BadInput`."""
    file, colon, name = ref.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise BadInput(f"'{ref}' is not a function reference. Write file.py:function.")
    module = _import(Path(file))
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise BadInput(f"{file} has no function '{name}'.{did_you_mean(name, functions)}")
    return found


def _import(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"No plugin file '{path}'. Give the path of a Python file.")
    name = f"pegbox_plugin_{path.stem}_{abs(hash(str(path.resolve()))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"'{path}' can't be imported as Python. Its name should end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise BadInput(f"Plugin {path} failed to import: {type(error).__name__}: {error}") from error
    return module
