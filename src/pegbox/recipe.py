"""A recipe: one choice on each axis. It holds the method only; model, data and seed belong to a run.

Recipes are YAML 1.2 files (`1e-4` is a number, `no` is a string), found in the catalogue by their file's name or given
by path. Overrides are `dotted.key=value`; overriding a block's `kind` resets the block.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pegbox.analyze.base import ANALYZE, Analysis
from pegbox.data.base import DATA, DataPolicy
from pegbox.decode.base import DECODE, Decoder
from pegbox.errors import BadInput, did_you_mean
from pegbox.objectives.base import OBJECTIVE, Objective
from pegbox.optim.base import OPTIM, Step
from pegbox.parts.component import explain
from pegbox.parts.protocol import PROTOCOL, Protocol
from pegbox.parts.task import TASK, Task
from pegbox.prepare.base import PREPARE, Preparation
from pegbox.select.base import SELECT, Selector
from pegbox.tuners.axis import TUNER
from pegbox.tuners.base import Tuner
from pegbox.weights.base import WEIGHTS, WeightOp

__all__ = ["Knobs", "Recipe", "Role", "catalogue", "dump_yaml", "load_recipe", "merge", "override", "parse_yaml"]


UNSAFE = "\x85\u2028\u2029"  # line breaks to some YAML readers: then everything beyond ASCII is escaped


class Role(BaseModel):
    """A further model by role: a hub id, folder, alias or run (`of`), with its adapter on or off.

    `task` is the class a plain model is loaded as (a run knows its own): a reward model is a sequence classifier.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    of: str
    adapter: bool = True
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"


class Knobs(BaseModel):
    """Which fields a comparison may turn: the rate, the size, and further declared ones (dotted keys)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rate: str = "optim.lr"
    size: str | None = None
    more: dict[str, list[Any]] = Field(default_factory=dict)


class Recipe(BaseModel):
    """A method. Build one with `load_recipe`, or `Recipe.of(mapping)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    title: str = ""
    paper: str = ""
    summary: str = ""
    task: Annotated[Task, TASK] = Field(default_factory=lambda: TASK.validate("text"))
    prepare: list[Annotated[Preparation, PREPARE]] = Field(default_factory=list)
    select: Annotated[Selector, SELECT] | None = None
    tuner: Annotated[Tuner, TUNER] = Field(default_factory=lambda: TUNER.validate("full"))
    objective: Annotated[Objective, OBJECTIVE] = Field(default_factory=lambda: OBJECTIVE.validate({}))
    optim: Annotated[Step, OPTIM] = Field(default_factory=lambda: OPTIM.validate({}))
    data: list[Annotated[DataPolicy, DATA]] = Field(default_factory=list)
    protocol: Annotated[Protocol, PROTOCOL] = Field(default_factory=lambda: PROTOCOL.validate({}))
    weights: list[Annotated[WeightOp, WEIGHTS]] = Field(default_factory=list)
    decode: Annotated[Decoder, DECODE] | None = None
    analyze: list[Annotated[Analysis, ANALYZE]] = Field(default_factory=list)
    models: dict[str, Role] = Field(default_factory=dict)
    knobs: Knobs = Knobs()

    @classmethod
    def of(cls, mapping: Mapping[str, Any], where: str = "") -> Recipe:
        """Validate a plain mapping. Raises `BadInput` that names the key and the nearest valid one."""
        block = {**mapping}
        if isinstance(block.get("models"), Mapping):
            block["models"] = {k: {"of": v} if isinstance(v, str) else v for k, v in block["models"].items()}
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            raise explain(error, cls, where) from None

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON values, every default spelled out."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """12 hex digits over everything that changes what is trained (not title, summary, decoding, analyses)."""
        others = {"title", "paper", "summary", "knobs", "decode", "analyze"}
        body = {k: v for k, v in self.plain().items() if k not in others}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]

    def get(self, dotted: str) -> Any:
        """The value at a dotted key. Raises `BadInput` with the nearest valid key."""
        return _walk(self.plain(), dotted)


# ---- reading and writing --------------------------------------------------------------------------------------------


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2 to plain values. Raises `BadInput` with file, line and column."""
    try:
        return _yaml().load(text)
    except YAMLError as error:
        raise BadInput(f"{where} is not valid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """Plain values to YAML 1.2 that `parse_yaml` reads back unchanged."""
    out = io.StringIO()
    yaml = _yaml()
    yaml.allow_unicode = not any(c in json.dumps(value, ensure_ascii=False) for c in UNSAFE)
    yaml.dump(value, out)
    return out.getvalue()


def catalogue() -> dict[str, dict[str, Any]]:
    """Every recipe of the package by slug, as plain mappings: nothing heavy is imported."""
    found = {}
    for entry in sorted(files("pegbox.recipes").iterdir(), key=lambda p: p.name):
        if entry.name.endswith(".yaml"):
            slug = entry.name.removesuffix(".yaml")
            found[slug] = parse_yaml(entry.read_text(encoding="utf-8"), f"recipe '{slug}'")
    return found


def read_recipe(ref: str | Path) -> dict[str, Any]:
    """The plain mapping of a recipe named in the catalogue or given by path. Raises `BadInput`."""
    path = Path(ref)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise BadInput(f"No recipe file '{path}'. Give a path to a YAML file, or a name from `pegbox recipes`.")
        mapping = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    else:
        known = catalogue()
        if str(ref) not in known:
            raise BadInput(f"Unknown recipe '{ref}'.{did_you_mean(str(ref), known)}")
        mapping = known[str(ref)]
    if not isinstance(mapping, Mapping):
        raise BadInput(f"Recipe '{ref}' must be a mapping of axes to blocks, got {type(mapping).__name__}.")
    return dict(mapping)


def load_recipe(ref: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """A validated recipe from a name, a path or a mapping, with `dotted.key=value` overrides laid over it."""
    if isinstance(ref, Recipe):
        mapping, where = ref.plain(), ""
    elif isinstance(ref, Mapping):
        mapping, where = copy.deepcopy(dict(ref)), ""
    else:
        mapping, where = read_recipe(ref), ""
    for text in overrides:
        key, value = parse_override(text)
        override(mapping, key, value)
    return Recipe.of(mapping, where)


# ---- changing -------------------------------------------------------------------------------------------------------


def parse_override(text: str) -> tuple[str, Any]:
    """ "a.b=1e-4" -> ("a.b", 0.0001). Raises `BadInput` when there is no '='."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"'{text}' is not an override. Write dotted.key=value, e.g. optim.lr=1e-4.")
    return key.strip(), parse_yaml(value, f"the value of '{key}'") if value.strip() else None


def override(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in place; list items by number. A changed `kind` drops the block's other keys."""
    *path, last = dotted.split(".")
    block: Any = mapping
    for step in path:
        if isinstance(block, list):
            block = block[_position(step, block, dotted)]
            continue
        if isinstance(block.get(step), str):  # the short form `tuner: lora`
            block[step] = {"kind": block[step]}
        block[step] = dict(block[step]) if isinstance(block.get(step), Mapping) else block.get(step, {})
        block = block[step]
        if not isinstance(block, dict | list):
            raise BadInput(f"'{dotted}': '{step}' holds the value {block!r}, which has no keys.")
    if isinstance(block, list):
        block[_position(last, block, dotted)] = value
    elif last == "kind" and block.get("kind") != value:
        block.clear()
        block["kind"] = value
    else:
        block[last] = value


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`patch` laid over `base`: blocks are merged key by key, a changed `kind` replaces the block, lists replace."""
    merged = dict(base)
    for key, value in patch.items():
        present = merged.get(key)
        same_kind = (
            isinstance(present, Mapping)
            and isinstance(value, Mapping)
            and ("kind" not in value or value["kind"] == present.get("kind"))
        )
        merged[key] = merge(present, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def _position(step: str, block: list[Any], dotted: str) -> int:
    if not step.isdigit() or int(step) >= len(block):
        raise BadInput(f"'{dotted}': '{step}' is not a position in a list of {len(block)}.")
    return int(step)


def _walk(block: Any, dotted: str) -> Any:
    for step in dotted.split("."):
        if isinstance(block, list):
            block = block[_position(step, block, dotted)]
        elif isinstance(block, Mapping) and step in block:
            block = block[step]
        else:
            raise BadInput(f"Unknown key '{dotted}'.{did_you_mean(step, block if isinstance(block, Mapping) else [])}")
    return block
