"""Every PEFT method as a tuner: `kind` is the lower-case PEFT type, the block's other keys are its config's fields.

PEFT's configs are dataclasses that check nothing, so keys are checked against the fields and values against the type
hints. The block keeps what the user wrote, as plain JSON; PEFT's own defaults fill the rest.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import typing
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from torch import nn

from pegbox.errors import BadInput, Corrupt, Unsupported, did_you_mean
from pegbox.parts.allocation import Allocation
from pegbox.parts.context import Context
from pegbox.parts.initial import apply_initial
from pegbox.tuners.base import Tuner
from pegbox.tuners.peft_files import read_adapter_config, verify_adapter_files, verify_loaded
from pegbox.tuners.targets import peft_targets

__all__ = ["PeftTuner", "attach_peft", "config_class", "option_hints", "peft_kinds", "peft_tuner", "task_type_of"]

# Fields that PEFT or the run fills in; a user has no business setting them.
_NOT_OPTIONS = frozenset(
    {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
)
_TARGETED = ("target_modules", "exclude_modules", "feedforward_modules")


def peft_kinds() -> list[str]:
    """The kinds that PEFT itself offers here, e.g. "lora", "ia3" (imports PEFT)."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(str(member.value).lower() for member in PEFT_TYPE_TO_CONFIG_MAPPING)


def config_class(kind: str) -> type[Any]:
    """PEFT's config dataclass for `kind`."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind.upper()]]


@functools.cache
def option_hints(kind: str) -> dict[str, Any]:
    """The options of a PEFT method with their type hints."""
    cls = config_class(kind)
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and f.name not in _NOT_OPTIONS}


class PeftTuner(Tuner):
    """A PEFT method, configured by its own options."""

    model_config = ConfigDict(extra="allow")

    part_kind: ClassVar[str] = "adapter"

    @model_validator(mode="before")
    @classmethod
    def _check(cls, block: Any) -> Any:
        if not isinstance(block, Mapping):
            return block
        kind = str(block.get("kind", cls.model_fields["kind"].default))
        hints = option_hints(kind)
        options = {}
        for key, value in block.items():
            if key == "kind":
                continue
            if key not in hints:
                raise BadInput(f"Unknown key 'tuner.{key}' for {kind}.{did_you_mean(key, hints)}")
            options[key] = _checked(f"tuner.{key}", value, hints[key])
        _construct(kind, {**_known_later(hints), **options})  # PEFT's own cross-checks
        return {"kind": kind, **options}

    @property
    def options(self) -> dict[str, Any]:
        """The block without `kind`, plain JSON."""
        return dict(self.model_extra or {})

    def config(self, **changes: Any) -> Any:
        """A fresh PEFT config with this block's options."""
        return _construct(self.kind, {**self.options, **changes})

    def attach(self, model: nn.Module, allocation: Allocation | None, ctx: Context) -> nn.Module:
        if allocation:
            raise Unsupported(
                f"tuner '{self.kind}' can't hold a selection of weights ({len(allocation)} tensors selected)."
                " Leave out `select:` or use tuner 'sparse'."
            )
        hints = option_hints(self.kind)
        changes: dict[str, Any] = {}
        for key in _TARGETED:
            if self.options.get(key) is not None:
                changes[key] = peft_targets(model, self.options[key])
        if self.options.get("task_type") is None and "task_type" in hints:
            changes["task_type"] = task_type_of(model)
        if "total_step" in hints and self.options.get("total_step") is None:
            changes["total_step"] = max(ctx.total_steps, 1)
        return attach_peft(model, self.config(**changes))

    def reference(self, model: Any) -> AbstractContextManager[Any]:
        return model.disable_adapter()

    def save(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        return save_peft(model, folder)

    def load(self, model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
        written = str(read_adapter_config(folder).get("peft_type", "")).lower()
        if written != self.kind:
            raise Corrupt(f"{folder} holds a '{written}' adapter, not '{self.kind}'.")
        return load_peft(model, folder, trainable=trainable)


@functools.cache
def peft_tuner(kind: str) -> type[PeftTuner]:
    """The component class of one PEFT method."""
    namespace = {
        "__module__": __name__,
        "__annotations__": {"kind": Literal[kind]},
        "kind": kind,
        "__doc__": f"PEFT's {config_class(kind).__name__.removesuffix('Config')}, by its own options.",
        "keeps_causality": kind not in {"adaption_prompt"},
        "takes_factors": kind == "lora",
        "merge": "lossy" if hasattr(_model_class(kind), "merge_and_unload") else "no",
        "several_active": kind not in _ONE_ACTIVE,
    }
    return type(f"{kind.title().replace('_', '')}Tuner", (PeftTuner,), namespace)


_ONE_ACTIVE = {"prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "adaption_prompt"}


def attach_peft(model: nn.Module, config: Any, adapter_name: str = "default") -> nn.Module:
    """`get_peft_model`, with PEFT's complaints about the user's options as `BadInput`."""
    from peft import get_peft_model

    try:
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except (ValueError, TypeError) as error:
        kind = str(config.peft_type.value).lower()
        raise BadInput(f"tuner '{kind}' can't be attached to {type(model).__name__}: {error}") from error
    apply_initial(model, wrapped, adapter_name)
    return wrapped


def save_peft(model: Any, folder: Path) -> dict[str, Any]:
    """Write the active adapter into `folder` in PEFT's own layout; returns the part entry."""
    name = str(model.active_adapter)
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    _flatten(folder, name)
    kind = str(model.peft_config[name].peft_type.value).lower()
    return {"peft_type": kind, "files": sorted(path.name for path in folder.iterdir())}


def load_peft(model: nn.Module, folder: Path, *, trainable: bool) -> nn.Module:
    """`PeftModel.from_pretrained` that refuses pickles, and files that don't fit instead of ignoring what doesn't."""
    from peft import PeftModel

    verify_adapter_files(folder)
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise Corrupt(f"{folder} does not load onto this model: {error}") from error
    verify_loaded(loaded, folder)
    return loaded


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's task type, read off the name of the model's class."""
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    name = type(model).__name__
    return next((task for end, task in endings.items() if name.endswith(end)), None)


def _checked(where: str, value: Any, hint: Any) -> Any:
    """`value` validated against `hint`, as plain JSON."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
    except Exception:  # a hint pydantic has no schema for
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return _plain(adapter.validate_python(value))
    except ValidationError as error:
        if isinstance(value, str) and _fits_template(value, hint):
            return value
        faults = "; ".join(dict.fromkeys(fault["msg"] for fault in error.errors(include_url=False)))
        raise BadInput(f"{where}: {faults} (got {value!r}).") from None


def _fits_template(value: str, hint: Any) -> bool:
    """Whether `value` is a literal of `hint` with its [placeholder] filled by a number ("pissa_niter_16")."""
    literals = [hint] if isinstance(hint, str) else list(typing.get_args(hint))
    for literal in literals:
        if isinstance(literal, str):
            pattern = re.sub(r"\\\[.*?\\\]", r"\\d+", re.escape(literal))
            if re.fullmatch(pattern, value):
                return True
        elif typing.get_args(literal) and _fits_template(value, literal):
            return True
    return False


def _known_later(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Stand-ins, for PEFT's checks alone, for what is known once the model and the length of training are."""
    stand_ins: dict[str, Any] = {"task_type": "CAUSAL_LM", "total_step": 1000, "tfinal": 0, "tinit": 0}
    return {key: value for key, value in stand_ins.items() if key in hints}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _construct(kind: str, options: dict[str, Any]) -> Any:
    try:
        return config_class(kind)(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise BadInput(f"tuner '{kind}': {error}") from error


def _model_class(kind: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    return PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[kind.upper()])


def _flatten(folder: Path, adapter: str) -> None:
    """PEFT writes any adapter but 'default' into a folder of its own; a part has one adapter and one place for it."""
    inner = folder / adapter
    if adapter != "default" and inner.is_dir():
        for path in inner.iterdir():
            path.replace(folder / path.name)
        inner.rmdir()
