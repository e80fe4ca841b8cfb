"""Which modules a tuner goes to: words for parts of a model, names and patterns, resolved to module names of one model.

Everything goes through the model's anatomy ("all-linear", "attention", "mlp & blocks 0-5", "q_proj", "re:..."); a name
that the anatomy has no piece for is looked up among all modules. A target that matches nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy

__all__ = ["bare_name", "peft_targets", "resolve_targets"]


def resolve_targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Names, in the bare model, of the modules that `targets` mean. Raises `BadInput` for one that matches none."""
    words = targets if isinstance(targets, str) else sorted(targets)
    try:
        return Anatomy.of(model).resolve(words)
    except BadInput as error:
        found = _by_name(model, [words] if isinstance(words, str) else words)
        if found is None:
            raise BadInput(f"target_modules: {error}") from None
        return found


def peft_targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """As `resolve_targets`, but plain names that PEFT reads the same way stay as they are: a short config."""
    found = resolve_targets(model, targets)
    words = [targets] if isinstance(targets, str) else sorted(targets)
    named = _by_name(model, words)
    return words if named is not None and set(named) == set(found) and len(words) < len(found) else found


def bare_name(name: str) -> str:
    """A module's name in the bare base: without the levels that tuner layers add."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _by_name(model: nn.Module, words: list[str]) -> list[str] | None:
    """Modules called exactly so, whatever they are; None if a word matches none."""
    names = list(dict.fromkeys(bare_name(name) for name, _ in model.named_modules() if name))
    found = []
    for word in words:
        matched = [name for name in names if name == word or name.endswith("." + word)]
        if not matched:
            return None
        found += matched
    return list(dict.fromkeys(found))
