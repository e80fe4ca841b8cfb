"""Additive differences as runs leave them on disk, and a model on which one of them acts for a while.

    with acting(model, phi):   theta + phi          outside: theta, bit for bit

What can be read: a run's or an artefact's folder whose update is additive (a sparse adapter of differences), a
difference file, and composable-sft's `pytorch_diff.bin`. Tensors that such an update replaces whole (a head trained
beside it) are left out: they belong to the task that they were trained for.

Source of the use: Ansell et al., arXiv:2110.07560, where the source language's difference acts while a task is learnt.
What this does not do: check which base a file without a record was made on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase, did_you_mean
from pegbox.parts import deltas
from pegbox.parts.composable_sft import read_composable_sft
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.files import read_json
from pegbox.parts.indexsets import index_dtype, numel
from pegbox.parts.rowsets import flat_of_columns, unpack_columns

__all__ = ["acting", "base_parameters", "base_recorded", "checked_difference", "read_difference"]

_PREFIX, _LAYER, _COPY = "base_model.model.", ".base_layer.", ".modules_to_save."


# ---- on a model


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by the bare model's names, also below adapters; what adapters added is left out.

    Where an adapter trains a copy of a module whole, the copy stands under the module's name.
    """
    wrapped = hasattr(model, "peft_config")
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        bare = name.replace("_orig_mod.", "").removeprefix("module.")
        if not wrapped:
            found[bare] = parameter
            continue
        if ".original_module." in bare:
            continue
        head, copied, tail = bare.removeprefix(_PREFIX).partition(_COPY)
        bare = f"{head}.{tail.partition('.')[2]}" if copied else head.replace(_LAYER, ".")
        if copied or _LAYER in name or not _added(model, name):
            found[bare] = parameter
    return found


def _added(model: nn.Module, name: str) -> bool:
    """Whether a parameter lies inside an adapter's layer, beside its base layer."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if hasattr(module, "base_layer"):
            return True
    return False


@contextmanager
def acting(model: nn.Module, delta: Delta, parameters: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """theta + phi inside, the very theta outside, also after an exception; O(entries), nothing dense.

    Gradients taken inside are those at theta + phi. Adapters that write their entries into the base write them on top
    of phi and take them out again before phi leaves. `parameters`: of `base_parameters`, where they are at hand.

    Raises `WrongBase` for names and shapes that don't fit, `Unsupported` for packed or sharded weights.
    """
    places = base_parameters(model) if parameters is None else parameters
    for name in delta:
        _check_writable(name, places)
    _take_out(model)
    undo = deltas.apply(delta, places)
    try:
        yield
    finally:
        _take_out(model)
        deltas.revert(undo)


def _check_writable(name: str, places: Mapping[str, nn.Parameter]) -> None:
    parameter = places.get(name)
    if parameter is None:
        return  # `deltas.apply` says what is wrong
    if hasattr(parameter, "device_mesh"):
        raise Unsupported(f"'{name}' is sharded over processes, so a difference can't be written into it. Use DDP.")
    if not parameter.is_floating_point():
        raise Unsupported(
            f"'{name}' is stored as {parameter.dtype}: a difference can't be added to packed weights. Load the base in "
            "fp32 or bf16."
        )


def _take_out(model: nn.Module) -> None:
    """Let layers that hold tuned entries in the base's weights put the pretrained ones back; their next forward writes
    them again."""
    for module in model.modules():
        give_back = getattr(module, "revert", None)
        if callable(give_back) and hasattr(module, "base_layer"):
            give_back()


# ---- on disk


def read_difference(place: str | Path, model: nn.Module) -> Delta:
    """What `place` adds to the base's tensors of `model` by name; all pieces are of mode "add", on the CPU.

    Raises:
        BadInput: nothing there, or an update that is no additive difference.
        Corrupt: a damaged file. WrongBase: a tensor that the model has not, or has in another shape.
    """
    path, shapes = Path(place), _Shapes(model)
    if path.is_file() and path.suffix == ".bin":
        delta = read_composable_sft(path)
    elif path.is_file():
        delta = deltas.load(path)
    else:
        delta = _of_folder(path, shapes)
    replaced = [name for name, piece in delta.items() if piece.mode == "set" and piece.index is not None]
    if replaced:
        raise BadInput(
            f"{path}: '{replaced[0]}' is stored as new values, not as a difference, so it can't be put on and taken "
            "off. Train it with tuner: {kind: sparse, coordinates: delta}."
        )
    delta = Delta({name: piece for name, piece in delta.items() if piece.mode == "add"})
    if not delta:
        raise BadInput(f"{path} holds no additive difference.")
    for name, piece in delta.items():
        if shapes.of(name, path) != piece.shape:
            raise WrongBase(f"{path}: '{name}' has shape {piece.shape}, and {shapes.of(name, path)} in this model.")
    return delta


def checked_difference(place: str | Path, model: nn.Module, where: str, *, other_base: bool = False) -> Delta:
    """`read_difference`, refused where the place records another base than this model's (`WrongBase`).

    where: the option's name, for the message. other_base: take it all the same.
    """
    recorded, own = base_recorded(place), getattr(model, "pegbox_source", None)
    if recorded is not None and own is not None and recorded != own.fingerprint and not other_base:
        raise WrongBase(
            f"{where}: {place} was made on the base {recorded}, and this model is {own.fingerprint}. Give other_base: "
            "true to take it all the same."
        )
    return read_difference(place, model)


def base_recorded(place: str | Path) -> str | None:
    """The fingerprint of the base that a run or artefact was made on; None for a bare file."""
    folder = _artefact(Path(place))
    return None if folder is None else str(read_json(folder / "artefact.json")["root"]["fingerprint"])


def _artefact(place: Path) -> Path | None:
    return next((p for p in (place, place / "artefact") if (p / "artefact.json").is_file()), None)


def _of_folder(place: Path, shapes: _Shapes) -> Delta:
    if (place / "adapter_config.json").is_file():
        return _of_adapter(place, shapes)
    folder = _artefact(place)
    if folder is None:
        raise BadInput(f"{place} is no finished run, artefact, adapter folder or difference file (.safetensors, .bin).")
    total = Delta()
    for part in read_json(folder / "artefact.json")["parts"]:
        if part["kind"] in ("data", "json"):
            continue
        if not part.get("additive"):
            raise BadInput(
                f"{place}: its part '{part['path']}' ({part['kind']}) is no additive difference. Train it with tuner: "
                "{kind: sparse, coordinates: delta}."
            )
        total = deltas.add(total, _of_adapter(folder / part["path"], shapes))
    return total


def _of_adapter(folder: Path, shapes: _Shapes) -> Delta:
    """A sparse adapter's entries, those it no longer trains included."""
    config = read_json(folder / "adapter_config.json")
    if config.get("coordinates") != "delta" or config.get("sites"):
        raise BadInput(f"{folder} is no sparse adapter of differences (coordinates: delta).")
    try:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise Corrupt(f"{folder} has no readable adapter ({error}).") from error
    total, scale = Delta(), float(config.get("scale", 1.0))
    for left in ("", "left_"):
        found = Delta()
        for key, values in tensors.items():
            module, ending, _ = key.removeprefix(_PREFIX).partition(".sparse_")
            tensor = key.rsplit(".sparse_", 1)[-1].partition("_")[0]
            if not ending or not key.endswith(f".sparse_{tensor}_{left}values") or not values.numel():
                continue
            name = f"{module}.{tensor}"
            index = tensors[key.removesuffix("values") + "index"]
            found[name] = _piece(shapes.of(name, folder), index, values.float() * scale, name in shapes.transposed)
        total = deltas.add(total, found)
    return total


def _piece(shape: tuple[int, ...], index: Tensor, values: Tensor, transposed: bool) -> Piece:
    if index.ndim == 2:  # column numbers per row; the values lie in the order of flat positions
        index = flat_of_columns(unpack_columns(index), shape, transposed)
    order = index.long().argsort()
    return Piece(shape, values.flatten()[order], index[order].to(index_dtype(numel(shape))))


class _Shapes:
    """Shapes of a model's base by tensor name, and which weights lie as (in, out)."""

    def __init__(self, model: nn.Module):
        self.known = {name: tuple(p.shape) for name, p in base_parameters(model).items()}
        modules = {name.removeprefix(_PREFIX).removesuffix(".base_layer"): m for name, m in model.named_modules()}
        self.transposed = {f"{name}.weight" for name, m in modules.items() if type(m).__name__ == "Conv1D"}

    def of(self, name: str, place: Path) -> tuple[int, ...]:
        if name not in self.known:
            raise WrongBase(f"{place} changes '{name}', which is not in this model.{did_you_mean(name, self.known)}")
        return self.known[name]
