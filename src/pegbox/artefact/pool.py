"""The models that a run names by role (teacher, reward, reference), each base loaded once.

A role on the run's own base with its adapter off is a view of the model that trains, not a second model. Adapters of
several runs over one base share that base; a run whose update rewrites the base gets a base of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pegbox.artefact.load import load_artefact
from pegbox.artefact.manifest import MANIFEST, Manifest, artefact_folder, read
from pegbox.errors import BadInput, Unsupported, did_you_mean
from pegbox.models import Precision, Source, load, resolve
from pegbox.parts.adapters import adapter_off, adapter_on, is_adapted
from pegbox.prepare import PREPARE
from pegbox.recipe import Role

__all__ = ["Pool", "RoleModel", "stands_on_its_base"]

BEFORE = ".base"  # "<role>.base" is what a role's model was tuned from

Scope = Callable[[], AbstractContextManager[Any]]


class RoleModel(nn.Module):
    """A model as one role sees it: `forward` and `generate` run inside the role's scope (its adapter on, or off).

    `model` is the module behind it, maybe shared; code that looks inside it does so within `active()`. It has no
    parameters of its own, so it is neither moved, trained nor saved with what holds it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, scope: Scope = nullcontext):
        super().__init__()
        self.__dict__["model"] = model  # past nn.Module's registration, on purpose
        self.tokenizer = tokenizer
        self._scope = scope

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The role's view of the model, exactly undone on leaving."""
        with self._scope():
            yield self.__dict__["model"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.active() as model:
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        with self.active() as model:
            inner: Any = model
            return inner.generate(*args, **kwargs)

    @property
    def config(self) -> Any:
        return self.__dict__["model"].config


class Pool(Mapping[str, RoleModel]):
    """Role -> model, loaded on first use; frozen and in evaluation mode.

    Args:
        roles: as a recipe names them; "base" is the run's own base.
        base: the run's base.
        policy: the model that trains, if there is one. reference: the context in which it answers as its bare base
            (`Tuner.reference`), or None where no such view exists; then a frozen copy of the base is loaded.
        device, precision, trust_remote_code: for what has to be loaded.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        base: str | Path | Source,
        *,
        policy: nn.Module | None = None,
        reference: Scope | None = None,
        tokenizer: Any = None,
        device: str = "auto",
        precision: Precision = "auto",
        trust_remote_code: bool = False,
    ):
        self._roles = dict(roles)
        self._base = resolve(base)
        self._policy, self._reference, self._tokenizer = policy, reference, tokenizer
        self._options: dict[str, Any] = {
            "device": device,
            "precision": precision,
            "trust_remote_code": trust_remote_code,
        }
        self._ready: dict[str, RoleModel] = {}
        self._plain: dict[str, RoleModel] = {}  # bare bases by fingerprint and task; nothing is ever attached to these
        self._shared: dict[str, RoleModel] = {}  # bases that carry adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __getitem__(self, role: str) -> RoleModel:
        if role not in self._roles and role.endswith(BEFORE):
            return self._before(role)
        if role not in self._roles:
            raise BadInput(f"No model has the role '{role}'.{did_you_mean(role, self._roles)}")
        if role not in self._ready:
            self._ready[role] = self._make(role, self._roles[role])
        return self._ready[role]

    def _before(self, name: str) -> RoleModel:
        """What a run's model was tuned from. Raises `KeyError` for a plain model, which doesn't know it."""
        role = self._roles.get(name.removesuffix(BEFORE))
        if role is None or not (role.of == "base" or _is_run(role.of)):
            raise KeyError(name)
        if name not in self._ready:
            tuned: Any = self[name.removesuffix(BEFORE)] if role.adapter else None
            if tuned is not None and is_adapted(tuned.model) and role.of != "base" and stands_on_its_base(role.of):
                self._ready[name] = RoleModel(tuned.model, tuned.tokenizer, _Off(tuned.model))
            else:
                self._ready[name] = self._make(name, role.model_copy(update={"adapter": False}))
        return self._ready[name]

    def _make(self, name: str, role: Role) -> RoleModel:
        if role.of == "base":
            return self._own_base(role.adapter)
        if _is_run(role.of):
            return self._run(name, role)
        return self._bare(resolve(role.of), role.task)

    def _own_base(self, adapter: bool) -> RoleModel:
        if not adapter:
            return self._bare(self._base)
        if self._policy is None:
            raise Unsupported("a role on 'base' with its adapter on is the model that trains, and none trains here.")
        return RoleModel(self._policy, self._tokenizer)

    def _bare(self, source: Source, task: str = "causal-lm", precision: str | None = None) -> RoleModel:
        """A bare base: the policy's reference view, the bare view of one that is loaded already, or a fresh copy."""
        own = source.fingerprint == self._base.fingerprint and task == "causal-lm"
        if own and self._policy is not None and self._reference is not None:
            return RoleModel(self._policy, self._tokenizer, self._reference)
        precision = precision or self._options["precision"]
        key = f"{source.fingerprint} {task} {precision}"
        if key in self._shared:
            shared: Any = self._shared[key].model
            return RoleModel(shared, self._shared[key].tokenizer, _bare_view(shared))
        if key not in self._plain:
            model, tokenizer = load(source, task=task, **{**self._options, "precision": precision})
            self._plain[key] = RoleModel(model.requires_grad_(False), tokenizer)
        return self._plain[key]

    def _run(self, name: str, role: Role) -> RoleModel:
        manifest = read(role.of)
        precision = self._options["precision"]
        if precision == "auto" and manifest.root.precision == "nf4":
            precision = "nf4"
        key = f"{manifest.root.fingerprint} {manifest.root.task} {precision}"
        if not role.adapter:
            return self._bare(resolve(manifest.root.ref), manifest.root.task, precision)
        folder = _adapter_folder(Path(role.of), manifest)
        if folder is not None and key in self._shared:
            return self._another_adapter(name, folder, self._shared[key])
        model, tokenizer = load_artefact(role.of, **self._options)
        model.requires_grad_(False)
        if folder is None:
            return RoleModel(model, tokenizer)
        self._shared[key] = RoleModel(model, tokenizer)
        return RoleModel(model, tokenizer, _switch(model, "default"))

    def _another_adapter(self, name: str, folder: Path, shared: RoleModel) -> RoleModel:
        model: Any = shared.model
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        model.requires_grad_(False)
        return RoleModel(model.eval(), shared.tokenizer, _switch(model, name))


def _is_run(ref: str) -> bool:
    path = Path(ref)
    return (path / MANIFEST).exists() or (path / "artefact" / MANIFEST).exists()


def stands_on_its_base(run: str) -> bool:
    """Whether a run's model with its adapter off is what tuning began from: its base, prepared as it was, unless a
    preparation took a part of the weights out for the adapter to start from, or something else changed them too."""
    parts = [part for part in read(run, verify=False).parts if part.kind not in ("data", "json")]
    prepared = [PREPARE.validate(part.component) for part in parts if part.axis == "prepare"]
    others = [part.kind for part in parts if part.axis != "prepare"]
    return others == ["adapter"] and not any(type(p).leaves_factors for p in prepared)


def _adapter_folder(place: Path, manifest: Manifest) -> Path | None:
    """The folder of an artefact's adapter, if that is all it puts on its base."""
    applied = [part for part in manifest.parts if part.kind not in ("data", "json")]
    if len(applied) != 1 or applied[0].kind != "adapter":
        return None
    folder = artefact_folder(place) / applied[0].path
    return folder if (folder / "adapter_config.json").exists() else None


def _bare_view(model: Any) -> Scope:
    """A scope in which no adapter of a shared model acts; what trains and what is frozen stays so."""
    return _Off(model)


def _switch(model: Any, name: str) -> Scope:
    """A scope in which one adapter of a shared model is active; the one before comes back on leaving."""
    return _On(model, name)


@dataclass(frozen=True)
class _Off:
    """With equality by value, so that two views of one model can be told to be the same."""

    model: nn.Module

    def __call__(self) -> AbstractContextManager[Any]:
        return adapter_off(self.model)


@dataclass(frozen=True)
class _On:
    model: nn.Module
    name: str

    def __call__(self) -> AbstractContextManager[Any]:
        return adapter_on(self.model, self.name)
