"""How a tuner of ours becomes a PEFT method: the one place that extends PEFT's enum of types.

`peft.utils.register_peft_method` accepts only names that are members of the enum `PeftType`, and an enum with members
can't be subclassed; so a member is added by hand first. This leans on how `enum` stores members, not on PEFT; a test
exercises every use PEFT makes of a type (look-up by name, by value, iteration, JSON) and fails if one changes.
"""

from __future__ import annotations

from typing import Any

__all__ = ["add_peft_type", "register"]


def add_peft_type(name: str) -> Any:
    """The member `name` of `PeftType` (upper case), added if it is not there."""
    import peft.utils

    PeftType: Any = peft.utils.PeftType
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # EnumType.__setattr__ refuses new members
    return member


def register(name: str, config_class: type, model_class: type, prefix: str) -> None:
    """Make `name` (lower case) a PEFT method; done once, again is no error for the same classes."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    member = add_peft_type(name.upper())
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if present is None:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=prefix)
    elif present is not config_class:
        raise RuntimeError(f"the PEFT method '{name}' is taken by {present.__module__}.{present.__qualname__}")
