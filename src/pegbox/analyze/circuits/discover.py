"""How circuits are found: a cascade of groups, each by path patching through the group before it.

    value fetcher         last            direct effect on the logits
    position transmitter  last            through the value fetchers' queries
    position detector     label           through the transmitters' values
    structure reader      previous label  through the detectors' values

The k senders with the most negative scores form a group; a head found again later at the same position stays in the
later group. Prakash et al., arXiv:2402.14811, section 3.2. Tasks of another shape give stages of their own, or `prune`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pegbox.analyze.circuits.circuit import Circuit
from pegbox.analyze.circuits.heads import Head, HeadView
from pegbox.analyze.circuits.paths import path_patching
from pegbox.analyze.circuits.prompts import LAST, Prompts
from pegbox.errors import BadInput, did_you_mean

__all__ = ["BOX_CASCADE", "Discovery", "Stage", "cascade", "check_sizes"]


@dataclass(frozen=True)
class Stage:
    """One group: where its heads act, and through which earlier group's `composition` ("" for the logits).

    Args:
        size: k, how many heads are taken at most. corrupt_position: the corrupt prompts' own, if it has another name.
    """

    name: str
    position: str
    size: int
    through: str = ""
    composition: str | None = None
    corrupt_position: str | None = None


BOX_CASCADE = (
    Stage("value fetcher", LAST, 20),
    Stage("position transmitter", LAST, 5, "value fetcher", "q"),
    Stage("position detector", "label", 10, "position transmitter", "v"),
    Stage("structure reader", "previous_label", 5, "position detector", "v"),
)


@dataclass(frozen=True)
class Discovery:
    """The circuit, and by group the scores (L, H) behind it."""

    circuit: Circuit
    scores: Mapping[str, Tensor]


def check_sizes(view: HeadView, stages: Sequence[Stage], sizes: Mapping[str, int] | None = None) -> list[Stage]:
    """The stages with other sizes. Raises `BadInput` for unknown groups, and more heads than the model has."""
    known = [stage.name for stage in stages]
    for name in sizes or {}:
        if name not in known:
            raise BadInput(f"Unknown group '{name}'.{did_you_mean(name, known)}")
    found = []
    for i, stage in enumerate(stages):
        size = (sizes or {}).get(stage.name, stage.size)
        if not 0 < size <= view.layers * view.heads:
            raise BadInput(f"Group '{stage.name}' of {size} heads: the model has {view.layers * view.heads}.")
        if stage.through and stage.through not in known[:i]:
            raise BadInput(f"Group '{stage.name}' goes through '{stage.through}', which is no earlier group.")
        found.append(Stage(stage.name, stage.position, size, stage.through, stage.composition, stage.corrupt_position))
    return found


def cascade(
    view: HeadView, clean: Prompts, corrupt: Prompts, stages: Sequence[Stage] = BOX_CASCADE,
    sizes: Mapping[str, int] | None = None, *, tokens: int = 4096, batch: int = 32, resume: bool | None = None,
) -> Discovery:  # fmt: skip
    """Find the groups one after another. A group is smaller than its size where fewer senders have a negative score,
    and empty where the group that it goes through is."""
    found: dict[str, list[Head]] = {}
    scores: dict[str, Tensor] = {}
    chosen = check_sizes(view, stages, sizes)
    for stage in chosen:
        receivers = found[stage.through] if stage.through else []
        if stage.through and not receivers:
            found[stage.name] = []
            continue
        result = path_patching(
            view, clean, corrupt, receivers=receivers, composition=stage.composition, position=stage.position,
            corrupt_position=stage.corrupt_position, tokens=tokens, batch=batch, resume=resume,
        )  # fmt: skip
        scores[stage.name] = result.scores
        found[stage.name] = [head for head in result.top(stage.size) if result.scores[head] < 0]
    groups: dict[str, tuple[str, list[Head]]] = {}
    for i, stage in enumerate(chosen):
        later = {h for other in chosen[i + 1 :] if other.position == stage.position for h in found[other.name]}
        groups[stage.name] = stage.position, [head for head in found[stage.name] if head not in later]
    return Discovery(Circuit.of(view, groups), scores)
