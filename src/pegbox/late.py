"""Registering pegbox's tuners with PEFT without importing PEFT: right after somebody does.

`import pegbox` has to be enough for `PeftModel.from_pretrained` to know pegbox's tuners, and PEFT takes seconds to
import, which the command line and everyone who only reads recipes should not pay. So a finder watches for `peft` and
calls back once its import has finished. Nothing in PEFT is changed by this file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["after_import"]


class _Finder(MetaPathFinder):
    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then, self.looking = name, then, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.looking:
            return None
        self.looking = True  # the search below comes through here again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, finder: _Finder):
        self.inner, self.finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.inner
        sys.meta_path.remove(self.finder)
        self.inner.exec_module(module)
        self.finder.then()


def after_import(name: str, then: Callable[[], None]) -> None:
    """Call `then` once the top-level module `name` is imported: now, if it is already."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        then()
    else:
        sys.meta_path.insert(0, _Finder(name, then))
