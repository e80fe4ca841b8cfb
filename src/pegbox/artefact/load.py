"""Loading what a run left: the base, checked by its fingerprint, then part after part.

Which code reads a part is looked up by the part's kind; the readers here hand over to the component that wrote it,
found on its axis by name. Nothing here knows a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pegbox.artefact.manifest import Manifest, Part, artefact_folder, check_base, check_chain, read
from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase
from pegbox.models import Loaded, Precision, Source, fingerprint_model, load, load_tokenizer, resolve
from pegbox.optim.base import OPTIM
from pegbox.prepare.base import PREPARE
from pegbox.tuners.axis import TUNER

__all__ = ["Reader", "load_artefact", "read_parts", "register_reader", "settle"]

Reader = Callable[[nn.Module, Part, Path, bool], nn.Module]  # (model, part, its folder, trainable) -> model


def load_artefact(
    place: str | Path | Sequence[str | Path],
    *,
    base: str | Path | Source | nn.Module | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    trainable: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """The tuned model and its tokenizer.

    Args:
        place: a run's folder, an artefact's, or several of them over one root: their parts are put on in order.
        base: the base if it is no longer found by its recorded name, or a bare model in memory (used, not copied).
        precision: auto takes nf4 where the update was made on it, else what `pegbox.models.load` takes.
        trainable: the last part's parameters require gradients again.

    Raises:
        BadInput: nothing there; the base isn't found.
        Corrupt: a damaged file, named. WrongBase: another base, or parts that don't fit each other.
    """
    places = [place] if isinstance(place, str | Path) else list(place)
    if not places:
        raise BadInput("No artefact given.")
    folders_given = [artefact_folder(p).resolve() for p in places]
    if len(set(folders_given)) < len(places):
        raise BadInput(f"An artefact is given twice and would count twice: {', '.join(map(str, places))}.")
    manifests = [read(p) for p in places]
    whole = _joined(manifests)
    model, tokenizer = _base(whole, base, device, precision, attn_implementation, trust_remote_code)
    folders = [artefact_folder(p) for p, manifest in zip(places, manifests) for _ in manifest.parts]
    model = read_parts(model, whole, folders, trainable=trainable)
    if whole.tokenizer is not None:
        tokenizer = load_tokenizer_of(artefact_folder(places[-1]), whole)
    _stop_at(model, whole.stop_ids)
    return Loaded(model.eval(), tokenizer)


def read_parts(
    model: nn.Module, manifest: Manifest, folders: Path | Sequence[Path], *, trainable: bool = False
) -> nn.Module:
    """Put a manifest's parts onto its bare base, in order; `folders` is the artefact's folder (or one per part)."""
    places = [folders] * len(manifest.parts) if isinstance(folders, Path) else list(folders)
    steps = [(part, place) for part, place in zip(manifest.parts, places) if part.kind not in ("data", "json")]
    for number, (part, place) in enumerate(steps):
        if number:
            model = settle(model)
        model = _READERS[part.kind](model, part, place / part.path, trainable and number == len(steps) - 1)
    return model


def settle(model: nn.Module) -> nn.Module:
    """Write an attached update into the weights, so that a further part stands on a plain model.

    Raises:
        Unsupported: the update is of a form that can't be merged.
    """
    if not hasattr(model, "peft_config"):
        return model
    merge: Any = getattr(model, "merge_and_unload", None)
    try:
        if merge is None:
            raise NotImplementedError(f"{type(model).__name__} has no weights to merge into")
        settled: nn.Module = merge()
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise Unsupported(f"a further update can't stand on this adapter, because it doesn't merge: {error}") from error
    source = getattr(model, "pegbox_source", None)
    if source is not None:
        settled.pegbox_source = source
    return settled


def register_reader(kind: str, reader: Reader) -> None:
    """Let `reader` read parts of a kind, in place of the built-in one if there is one."""
    _READERS[kind] = reader


def load_tokenizer_of(folder: Path, manifest: Manifest) -> Any:
    """The tokenizer an artefact carries. Raises `Corrupt` if it can't be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder / str(manifest.tokenizer)))
    except (OSError, ValueError) as error:
        raise Corrupt(f"{folder}: its tokenizer can't be read ({error}).") from error


def _joined(manifests: list[Manifest]) -> Manifest:
    """Several artefacts over one root as one; the last one's tokenizer and stop ids count."""
    first, last = manifests[0], manifests[-1]
    for other in manifests[1:]:
        check_base(other, first.root.fingerprint, f"'{first.root.ref}', the first artefact's root,")
    whole = last.model_copy(update={"root": first.root, "parts": [part for m in manifests for part in m.parts]})
    check_chain(whole)
    return whole


def _base(
    manifest: Manifest,
    base: str | Path | Source | nn.Module | None,
    device: str,
    precision: Precision,
    attention: str | None,
    trusted: bool,
) -> Loaded:
    root = manifest.root
    arguments = {**root.model_kwargs, **_preparations_arguments(manifest)}
    if isinstance(base, nn.Module):
        _check_module(manifest, base, arguments)
        source = getattr(base, "pegbox_source", None)
        return Loaded(base, load_tokenizer(source) if source is not None else None)
    source = _find(manifest, base)
    check_base(manifest, source.fingerprint, f"'{source.ref}'")
    return load(
        source,
        device=device,
        precision="nf4" if precision == "auto" and root.precision == "nf4" else precision,
        task=root.task,
        attn_implementation=attention,
        trust_remote_code=trusted,
        model_kwargs=arguments,
    )


def _find(manifest: Manifest, base: str | Path | Source | None) -> Source:
    if base is not None:
        return resolve(base)
    revision = manifest.root.revision if manifest.root.kind == "hub" else None
    try:
        return resolve(manifest.root.ref, revision=revision)
    except BadInput as error:
        raise BadInput(
            f"The artefact's base '{manifest.root.ref}' was not found ({error}) Give a copy of it as base=..."
        ) from error


def _check_module(manifest: Manifest, base: nn.Module, arguments: Mapping[str, Any]) -> None:
    if hasattr(base, "peft_config"):
        raise BadInput("base has an adapter attached. Give the bare model (model.unload()), or leave base out.")
    if getattr(base, "pegbox_source", None) is None and fingerprint_model(base) != manifest.root.fingerprint:
        raise WrongBase(
            f"The given model has fingerprint {fingerprint_model(base)}, but the artefact was made on "
            f"{manifest.root.fingerprint} ('{manifest.root.ref}'). If it is that model in another dtype, load it with "
            "pegbox.models.load, or give the checkpoint it came from as base=."
        )
    check_base(manifest, fingerprint_model(base), "The given model")
    if "quantization_config" in arguments:
        raise Unsupported("this artefact's base is rewritten while it loads; give its name or folder as base=.")


def _preparations_arguments(manifest: Manifest) -> dict[str, Any]:
    """Arguments of loading that preparations ask for."""
    found: dict[str, Any] = {}
    for part in manifest.parts:
        if part.axis == "prepare":
            found.update(PREPARE.validate(part.component).load_kwargs())
    return found


def _stop_at(model: nn.Module, stop_ids: list[int]) -> None:
    settings = getattr(model, "generation_config", None)
    if settings is not None and stop_ids:
        settings.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)


# ---- readers ----------------------------------------------------------------------------------------------------


def _read_preparation(model: nn.Module, part: Part, folder: Path, trainable: bool) -> nn.Module:
    PREPARE.validate(part.component).replay(model, folder)
    return model


def _read_update(model: nn.Module, part: Part, folder: Path, trainable: bool) -> nn.Module:
    return TUNER.validate(part.component).load(model, folder, trainable=trainable)


def _read_step(model: nn.Module, part: Part, folder: Path, trainable: bool) -> nn.Module:
    return OPTIM.validate(part.component).load(model, folder)


def _read_modules(model: nn.Module, part: Part, folder: Path, trainable: bool) -> nn.Module:
    """Whole tensors by name, copied over the model's."""
    import torch
    from safetensors.torch import load_file

    state = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(str(path)).items():
            place = state.get(name)
            if place is None or place.shape != tensor.shape:
                raise Corrupt(f"{path}: '{name}' {tuple(tensor.shape)} has no place in this model.")
            with torch.no_grad():
                place.copy_(tensor)
    return model


_READERS: dict[str, Reader] = {
    "prep": _read_preparation,
    "packed": _read_preparation,
    "adapter": _read_update,
    "delta": _read_update,
    "trajectory": _read_step,
    "modules": _read_modules,
}
