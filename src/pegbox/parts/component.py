"""Components and axes: how a recipe's blocks find the classes that do the work.

A *component* is one frozen pydantic model: its fields are the options a user may set, its `kind` names it on its axis,
its methods do the work, its class constants say what it can do. An *axis* is an open table of kinds: built-in ones are
registered when the axis's package is imported, third parties' through an entry-point group or a plugin file. State
(tensors, counters, optimizers) never lives in a component.

What this file does not know: any particular axis or method.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.json_schema import GetJsonSchemaHandler, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from pegbox.errors import BadInput, did_you_mean

__all__ = ["AXES", "Axis", "Component", "explain"]


class Component(BaseModel):
    """One choice on one axis. Frozen; unknown keys are refused; `kind` is a `Literal` in every concrete class."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=True)

    kind: str
    reproduces: ClassVar[str] = ""  # the paper this is from, e.g. "arXiv:2506.00772, section 3"


C = TypeVar("C", bound=Component)

AXES: dict[str, Axis[Any]] = {}  # every axis by name


class Axis(Generic[C]):
    """An open table of component classes.

    Args:
        name: what the axis is called in a recipe, e.g. "select".
        base: the class that every component on this axis derives from.
        package: the package whose import registers the built-in kinds, e.g. "pegbox.select".
        default: the kind meant by a block without `kind`, if any.
    """

    def __init__(self, name: str, base: type[C], package: str, default: str | None = None):
        self.name, self.base, self.package, self.default = name, base, package, default
        self._table: dict[str, type[C]] = {}
        self._loaded = self._describing = False
        AXES[name] = self

    def register(self, cls: type[C]) -> type[C]:
        """Class decorator: enter `cls` under its `kind`. A kind can be entered once."""
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise TypeError(f"{cls.__name__} must give `kind` a default: kind: Literal['x'] = 'x'")
        present = self._table.get(kind)
        if present is not None and present.__qualname__ != cls.__qualname__:
            raise BadInput(f"{self.name} kind '{kind}' is taken by {present.__module__}.{present.__qualname__}.")
        self._table[kind] = cls
        return cls

    def load(self) -> None:
        """Import the built-in kinds, then the entry points of the group `pegbox.<axis>`; once."""
        if self._loaded:
            return
        self._loaded = True
        importlib.import_module(self.package)
        for point in entry_points(group=f"pegbox.{self.name}"):
            point.load()

    def kinds(self) -> dict[str, type[C]]:
        """All known kinds, by name."""
        self.load()
        return dict(sorted(self._table.items()))

    def __getitem__(self, kind: str) -> type[C]:
        self.load()
        if kind not in self._table:
            raise BadInput(f"Unknown {self.name} kind '{kind}'.{did_you_mean(kind, self._table)}")
        return self._table[kind]

    def validate(self, value: Any) -> C:
        """A component from a component, a kind's name, or a mapping with `kind`. Raises `BadInput`."""
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise BadInput(f"{self.name}: expected a kind's name or a block with 'kind', got {value!r}.")
        kind = value.get("kind", self.default)
        if kind is None:
            raise BadInput(f"{self.name}: the block needs a 'kind'.{did_you_mean('', self.kinds())}")
        return self._build(self[str(kind)], {**value, "kind": str(kind)})

    def _build(self, cls: type[C], block: dict[str, Any]) -> C:
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            raise explain(error, cls, self.name) from None

    # An axis is used as a field's annotation: `select: Annotated[Selector, SELECT]`.
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda c: c.model_dump(mode="json"), when_used="always"
            ),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The union of the schemas of all known kinds; inside itself an axis is its kinds' names alone."""
        kinds = self.kinds()
        if self._describing:
            return {"type": "object", "properties": {"kind": {"enum": list(kinds)}}}
        self._describing = True
        try:
            return handler(core_schema.union_schema([cls.__pydantic_core_schema__ for cls in kinds.values()]))
        finally:
            self._describing = False


def explain(error: ValidationError, model: type[BaseModel], where: str) -> BadInput:
    """Turn pydantic's error into one sentence per fault, with the dotted key and the nearest valid one."""
    lines = []
    for fault in error.errors(include_url=False):
        path = ".".join([where, *(str(p) for p in fault["loc"])]).lstrip(".")
        if fault["type"] == "extra_forbidden":
            known = _fields_at(model, fault["loc"][:-1])
            lines.append(f"Unknown key '{path}'.{did_you_mean(str(fault['loc'][-1]), known)}")
        else:
            lines.append(f"{path}: {fault['msg']} (got {fault['input']!r}).")
    return BadInput("\n".join(lines))


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for step in path:
        field = model.model_fields.get(str(step))
        inner = field.annotation if field is not None else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)
