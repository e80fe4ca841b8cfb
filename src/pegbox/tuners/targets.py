"""Which modules a tuner goes to: words for parts of a model, names and patterns, resolved to module names of one model.

"all-linear" means every linear layer but the output head; other words ("attention", "mlp", ...) are resolved through
the model's anatomy; anything else is a suffix or a regular expression as PEFT reads them. A target that matches nothing
is refused, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from pegbox.errors import BadInput, did_you_mean

__all__ = ["is_linear", "linear_modules", "no_match", "resolve_targets"]

WORDS = ("all-linear", "attention", "mlp")


def resolve_targets(model: nn.Module, targets: str | Iterable[str]) -> str | list[str]:
    """`targets` with words replaced by the names of the modules they mean in `model`.

    A regular expression (a string that is not a word) comes back as it is. Raises `BadInput` for an entry that matches
    no module.
    """
    names = [_bare(name) for name, _ in model.named_modules() if name]
    if isinstance(targets, str) and targets not in WORDS:
        if not any(re.fullmatch(targets, name) for name in names):
            raise no_match(targets, names)
        return targets
    found: list[str] = []
    for word in [targets] if isinstance(targets, str) else sorted(targets):
        if word in WORDS:
            found += _resolve_word(model, word)
        elif any(name == word or name.endswith("." + word) for name in names):
            found.append(word)
        else:
            raise no_match(word, names)
    return list(dict.fromkeys(found))


def linear_modules(model: nn.Module) -> list[str]:
    """Names of all linear layers (dense, transposed or quantized), the output head and classifier left out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {"lm_head", "score", "classifier", "qa_outputs"}  # newly initialised or tied: never tuned by default
    found = []
    for name, module in model.named_modules():
        bare = _bare(name)
        if is_linear(module) and module is not head and bare.rsplit(".", 1)[-1] not in heads and bare not in found:
            found.append(bare)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x W^T + b: `nn.Linear` and its quantized forms, or transformers' `Conv1D`."""
    if isinstance(module, nn.Linear):
        return True
    name = type(module).__name__
    quantized = hasattr(module, "in_features") and hasattr(module, "out_features") and "Linear" in name
    return (quantized and not hasattr(module, "base_layer")) or name == "Conv1D"


def no_match(target: object, names: Iterable[str]) -> BadInput:
    """The error for a target that matches no module, naming what there is."""
    ends = {name.rsplit(".", 1)[-1] for name in names}
    known = [end for end in ends if end and not end.isdigit()]
    return BadInput(
        f"target_modules: '{target}' matches no module of this model.{did_you_mean(str(target), known)}"
        f" Or use a word for a part of the model: {', '.join(WORDS)}."
    )


def _resolve_word(model: nn.Module, word: str) -> list[str]:
    if word == "all-linear":
        found = linear_modules(model)
    else:
        from pegbox.parts.anatomy import Anatomy

        found = [_bare(name) for name in Anatomy.of(model).resolve(word)]
    if not found:
        raise BadInput(f"target_modules: this model has no '{word}' to tune. Name its modules instead.")
    return found


def _bare(name: str) -> str:
    """A module's name in the bare base: without the levels that tuner layers add."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
