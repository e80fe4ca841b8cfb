"""Functions of a user's own, named in a configuration as "file.py:function" or "package.module:function"."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput

__all__ = ["function_at", "is_function_path"]


def is_function_path(text: str) -> bool:
    """Whether `text` names a function ("file.py:function", "module:function") rather than a role or a kind."""
    where, colon, name = text.rpartition(":")
    return bool(colon and where and name.isidentifier())


@lru_cache
def function_at(path: str) -> Callable[..., Any]:
    """The function of that name; a file is run. Raises `BadInput` where there is none."""
    where, _, name = path.rpartition(":")
    if not is_function_path(path):
        raise BadInput(f"A function is named 'file.py:function' or 'module:function', got '{path}'.")
    if where.endswith(".py"):
        file = Path(where).resolve()
        spec = importlib.util.spec_from_file_location(f"pegbox_function_{file.stem}", file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise BadInput(f"The file {where} does not exist.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise BadInput(f"The module {where} can't be imported ({error}).") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise BadInput(f"{where} has no function '{name}'.")
    return found
