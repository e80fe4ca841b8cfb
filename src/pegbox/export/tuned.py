"""A tuned model as the plain tensors of its base's architecture, one after the other.

Attached updates are merged layer by layer: a layer is merged, its tensors are handed out, and it is put back exactly,
so no second copy of the model exists at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.artefact import Manifest, load_artefact, read
from pegbox.artefact.manifest import artefact_folder
from pegbox.errors import BadInput, PegboxError, Unsupported
from pegbox.models import Loaded, Source, load, resolve

__all__ = ["Opened", "open_tuned", "plain_model", "stored_names", "tuned_tensors"]

_FORMS = (NotImplementedError, AttributeError, ValueError, TypeError)  # what PEFT's layers raise if they can't merge


@dataclass
class Opened:
    """A run opened for export, in float32.

    Args:
        model: tuned; where the run stood on packed weights, on their unpacked values.
        source: the base's.
        packed: whether the run stood on packed weights, so that `model` isn't the very model that was trained.
    """

    folder: Path
    manifest: Manifest
    source: Source
    model: nn.Module
    tokenizer: Any
    packed: bool


def open_tuned(run: str | Path, *, base: str | Path | None = None, device: str = "auto") -> Opened:
    """Load a run's tuned model for export. Raises as `load_artefact` does."""
    folder = artefact_folder(run)
    manifest = read(folder)
    packed = manifest.root.precision == "nf4"
    given: Any = base
    if packed:
        given = _unpacked_base(manifest, base, device)
    model, tokenizer = load_artefact(folder, base=given, device=device, precision="fp32")
    source = plain_model(model).pegbox_source
    assert isinstance(source, Source)
    return Opened(folder, manifest, source, model, tokenizer, packed)


def _unpacked_base(manifest: Manifest, base: str | Path | None, device: str) -> nn.Module:
    """The 4-bit base's own values as float32: what the update was trained on."""
    root = manifest.root
    source = resolve(base if base is not None else root.ref, revision=root.revision)
    loaded: Loaded = load(source, device=device, precision="nf4", task=root.task, model_kwargs=root.model_kwargs)
    model: Any = loaded.model
    unpacked: nn.Module = model.dequantize().float()
    unpacked.pegbox_source = source  # type: ignore[assignment]
    return unpacked


def plain_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def tuned_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and stored buffer of the tuned model under its base's name, tied ones under each of their names.

    A tensor is valid until the next one is asked for: clone it to keep it.

    Raises:
        Unsupported: the update isn't one of weights (a prompt, a prefix, a network beside), or can't be merged.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise Unsupported(
                f"adapter '{name}' ({config.peft_type.value}) is a prompt; it has no place in the weights."
            )
    with torch.no_grad():
        yield from _walk(plain_model(model), "")


def stored_names(model: nn.Module) -> tuple[list[str], bool]:
    """The names a checkpoint of the tuned model holds, and whether ties are kept.

    A tie is cut where only one side of it was tuned.
    """
    inner = plain_model(model)
    with torch.device("meta"):
        bare = type(inner)._from_config(inner.config)
    bare.tie_weights()
    every = list(bare.state_dict())
    once = {name for name, _ in bare.named_parameters()}
    tied = [name for name in every if name not in once and name in dict(bare.named_parameters(remove_duplicate=False))]
    groups = [{n for n, p in bare.named_parameters(remove_duplicate=False) if p is bare.get_parameter(t)} for t in tied]
    if any(_is_tuned(inner, name) for group in groups for name in group):
        return every, False
    return [name for name in every if name not in tied], bool(tied)


def _is_tuned(inner: nn.Module, name: str) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(inner.get_submodule(name.rpartition(".")[0]), BaseTunerLayer)


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        yield from _walk(_active_copy(module), prefix)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise Unsupported(f"{prefix.rstrip('.')}: trained tokens can't be merged here; merge them with PEFT first.")
    if isinstance(module, BaseTunerLayer):
        with _merged(module, prefix.rstrip(".")) as merged:
            yield from _walk(merged, prefix)
        return
    for name, tensor in [*module.named_parameters(recurse=False), *_stored_buffers(module)]:
        yield prefix + name, tensor.detach()
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.")


def _stored_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    skipped = module._non_persistent_buffers_set
    return [(name, b) for name, b in module.named_buffers(recurse=False) if name not in skipped]


def _active_copy(module: Any) -> nn.Module:
    names = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[names[0]] if names and not module.disable_adapters else module.original_module


@contextmanager
def _merged(layer: Any, name: str) -> Iterator[nn.Module]:
    """The base layer with the update in its weights; afterwards the base is as it was, bit for bit."""
    before = {k: v.clone() for k, v in layer.state_dict().items() if k.startswith("base_layer.")}
    try:
        layer.merge(safe_merge=True)
    except PegboxError:
        raise
    except _FORMS as error:
        raise Unsupported(f"{name}: this update can't be merged into the weight ({error}).") from error
    try:
        if not layer.merged:
            raise BadInput(f"{name}: no adapter is active, so there is nothing to merge.")
        yield layer.get_base_layer()
    finally:
        layer.unmerge()
        layer.load_state_dict(before, strict=False)
