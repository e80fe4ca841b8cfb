"""What a checkpoint holds and how training goes on from it, bit for bit: the mixin `Resumable`.

Saved: trained parameters and every buffer that has moved; the optimizer's and the scheduler's state; the states of all
components and owners; per process the random generators; the trainer's counters; the settings. Frozen weights are not
saved: they are the base's. A name that does not match on loading is refused, and so are changed settings, by name.

Beside it stands `Seams`; the two are mixed into one trainer.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.engine.checkpoint import CheckpointStore, load_tensors, load_tree, save_tensors, save_tree
from pegbox.engine.distributed import agree, barrier, full, is_main, rank, world
from pegbox.engine.host_type import TrainerLike
from pegbox.engine.packing import restore_random, take_random
from pegbox.errors import BadInput, Corrupt, PegboxError, RunFailed
from pegbox.parts.files import read_json
from pegbox.parts.parameterinfo import make_room, sized_buffers

__all__ = ["BufferWatch", "Resumable", "compare_settings", "load_optimizer", "load_weights", "saved_weights"]

_log = logging.getLogger(__name__)


class BufferWatch:
    """Tells which buffers have changed since it was made: replaced, or written to in place (their `_version` moved)."""

    def __init__(self, model: nn.Module):
        self._seen = {n: (weakref.ref(b), b._version) for n, b in model.named_buffers()}
        self._forced: set[str] = set()

    def changed(self, model: nn.Module) -> dict[str, Tensor]:
        moved: dict[str, Tensor] = {}
        for name, buffer in model.named_buffers():
            reference, version = self._seen.get(name, (lambda: None, -1))
            if reference() is not buffer or buffer._version != version or name in self._forced:
                moved[name] = buffer
        return moved

    def force(self, names: list[str]) -> None:
        """Count these as changed (they came from a checkpoint)."""
        self._forced.update(names)


def saved_weights(model: nn.Module, watch: BufferWatch | None = None) -> dict[str, Tensor]:
    """Trained parameters and moved buffers by name, whole (a collective call under sharding), as copies on the CPU."""
    moved = (watch.changed(model) | sized_buffers(model)) if watch is not None else {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: full(t.detach()).to("cpu", copy=True) for n, t in {**trained, **moved}.items()}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write saved weights into the model; returns the names of buffers. Raises `Corrupt` on names or shapes."""
    make_room(model, tensors)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    missing = sorted(set(trained) - set(tensors))
    unknown = sorted(set(tensors) - set(trained) - set(buffers))
    if missing or unknown:
        raise Corrupt(
            "The checkpoint does not fit the model. "
            + (f"Missing there: {_some(missing)}. " if missing else "")
            + (f"Unknown here: {_some(unknown)}. " if unknown else "")
            + "Was it written with other tuner or selection settings?"
        )
    for name, saved in tensors.items():
        target = trained.get(name, buffers.get(name))
        assert target is not None
        if tuple(target.shape) != tuple(saved.shape) or target.dtype != saved.dtype:
            raise Corrupt(
                f"'{name}' is {tuple(saved.shape)} {saved.dtype} in the checkpoint and {tuple(target.shape)} "
                f"{target.dtype} in the model."
            )
    with torch.no_grad():
        for name, saved in tensors.items():
            target = trained.get(name, buffers.get(name))
            assert target is not None
            target.copy_(_like(saved, target))
    return [n for n in tensors if n not in trained]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _like(saved: Tensor, target: Any) -> Tensor:
    """`saved` on the target's device, split as the target is."""
    moved = saved.to(target.device)
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(moved, target.device_mesh, target.placements)
    return moved


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state with sharded tensors made whole (a collective call then)."""
    state = optimizer.state_dict()
    whole = {
        i: {k: full(v) if isinstance(v, Tensor) else v for k, v in entry.items()} if isinstance(entry, dict) else entry
        for i, entry in state["state"].items()
    }
    return {**state, "state": whole}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore a state exactly. torch's own loading casts float32 moments to a parameter's bf16; this does not.

    An optimizer with a `load_state_dict` of its own is asked instead.
    """
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        optimizer.load_state_dict(dict(saved))
        return
    params = [p for g in optimizer.param_groups for p in g["params"]]
    indices = [i for g in saved["param_groups"] for i in g["params"]]
    if len(params) != len(indices):
        raise Corrupt(f"The checkpoint's optimizer holds {len(indices)} tensors, the run trains {len(params)}.")
    optimizer.state.clear()
    for i, p in zip(indices, params, strict=True):
        if i in saved["state"]:
            entry = saved["state"][i]
            optimizer.state[p] = {k: _state_like(v, p) if isinstance(v, Tensor) else v for k, v in entry.items()}
    for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({k: v for k, v in before.items() if k != "params"})


def _state_like(value: Tensor, p: Tensor) -> Tensor:
    return _like(value, p) if hasattr(p, "device_mesh") and value.shape == p.shape else value


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of settings that differ, each with both values."""
    lines = []
    for key in sorted({*saved, *now}):
        before, after = saved.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += compare_settings(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} in the checkpoint, {after!r} now")
    return lines


class Resumable(TrainerLike):
    """Mixin that replaces the trainer's checkpoints. Attributes that whoever makes the trainer may set:

    store: where they go; by default the trainer's output folder. settings: a JSON value that must be the same on
    resuming. watch: the model's buffers. extra: objects with state_dict/load_state_dict saved beside, by name.
    """

    store: CheckpointStore
    settings: dict[str, Any]
    watch: BufferWatch
    extra: dict[str, Any]
    _sealed: int | None = None  # the step of the last checkpoint that this process saw completed

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.store = CheckpointStore(Path(self.args.output_dir), self.args.save_total_limit)
        self.settings, self.extra, self.watch = {}, {}, BufferWatch(self.model)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As the trainer's; True means the newest complete checkpoint, from the start if there is none."""
        if resume_from_checkpoint is True:
            newest = self.store.newest()
            resume_from_checkpoint = str(newest) if newest is not None else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write the checkpoint of the current step. Raises `RunFailed` on every process if any can't."""
        step = self.state.global_step
        if self._sealed == step:
            return
        weights = saved_weights(self.model, self.watch)
        optimizer = optimizer_state(getattr(self.optimizer, "optimizer", self.optimizer))
        failure: Exception | None = None
        if is_main():
            failure = self._attempt(lambda: self._write_shared(step, weights, optimizer))
        barrier()
        if not agree(failure is not None):
            failure = self._attempt(lambda: self._write_own(step))
        self._raise_together(failure, step)
        if is_main():
            failure = self._attempt(lambda: self.store.seal(step))
        self._raise_together(failure, step)
        self._sealed = step
        if is_main():
            self.store.rotate(self.best_step())
        barrier()

    def _attempt(self, write: Any) -> Exception | None:
        try:
            write()
        except Exception as error:
            return error
        return None

    def _raise_together(self, failure: Exception | None, step: int) -> None:
        if not agree(failure is not None):
            return
        if is_main():
            import shutil

            shutil.rmtree(self.store.folder(step), ignore_errors=True)
        if isinstance(failure, PegboxError):
            raise failure
        if failure is not None:
            raise self.store.failure(step, failure) from failure
        raise RunFailed(f"Another process could not write its part of the checkpoint of step {step}.")

    def _write_shared(self, step: int, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        with self.store.opened(step) as folder:
            save_tensors(folder / "model.safetensors", weights)
            save_tree(folder, "optimizer", optimizer)
            save_tree(folder, "scheduler", self.lr_scheduler.state_dict())
            self.state.stateful_callbacks = {}
            self.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "settings.json").write_text(json.dumps(self.settings), encoding="utf-8")
            save_tree(folder, "extra", {name: thing.state_dict() for name, thing in self.extra.items()})

    def _write_own(self, step: int) -> None:
        folder = self.store.folder(step)
        save_tree(folder, f"random-{rank()}", take_random())
        save_tree(folder, f"states-{rank()}", self._own_state())

    def _own_state(self) -> dict[str, Any]:
        counts = {"tokens": self.tokens_seen, "positions": self.positions_seen, "flops": self.flops_per_position}
        return {"owners": self.owners.state_dict(), **counts}

    def best_step(self) -> int | None:
        """The step of the best checkpoint so far, kept whatever its age."""
        return self.state.best_global_step or None

    def check_settings(self, folder: Path) -> None:
        """Raises `BadInput` naming every setting that differs from the checkpoint's."""
        differing = compare_settings(read_json(folder / "settings.json"), json.loads(json.dumps(self.settings)))
        if differing:
            raise BadInput(
                "The settings differ from those of the run that is to be resumed:\n  "
                + "\n  ".join(differing)
                + "\nResume with the same settings, or start a new run in another folder."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.check_settings(folder)
        buffers = load_weights(self.model, load_tensors(folder / "model.safetensors"))
        self.watch.force(buffers)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, device = Path(checkpoint), self.args.device
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        load_optimizer(optimizer, load_tree(folder, "optimizer", device))
        self.lr_scheduler.load_state_dict(load_tree(folder, "scheduler"))
        if not (folder / f"states-{rank()}.json").is_file():
            raise BadInput(f"The checkpoint was written by fewer processes than the {world()} of now.")
        states = load_tree(folder, f"states-{rank()}", device)
        self.owners.load_state_dict(states["owners"])
        self.tokens_seen, self.positions_seen = states["tokens"], states["positions"]
        self.flops_per_position = states["flops"]
        saved = load_tree(folder, "extra", device)
        for name, thing in self.extra.items():
            if name in saved:
                thing.load_state_dict(saved[name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(load_tree(Path(checkpoint), f"random-{rank()}"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no gradient scaler: precisions are fp32 and bf16."""

    def load_best(self) -> bool:
        """Put the best checkpoint's weights into the model; False if there is none."""
        step = self.best_step()
        if step is None or step == self.state.global_step:
            return step is not None
        fault = self.store.fault(step)
        if fault is not None:
            raise Corrupt(f"The best checkpoint, of step {step}, can't be read: {fault}.")
        load_weights(self.model, load_tensors(self.store.folder(step) / "model.safetensors"))
        return True
