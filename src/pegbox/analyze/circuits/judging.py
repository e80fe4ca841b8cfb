"""Is a circuit the mechanism? Faithful, complete, minimal, and better than chance.

    faithfulness  F(K) / F(M)
    completeness  |F(K minus T) - F(M minus T)| over subsets T of K
    minimality    score(v) = F(K minus S_v) / F(K minus S_v minus v) - 1, S_v: the partners whose removal beside v costs
    random        circuits of the same group sizes, of heads drawn without replacement

Prakash et al., arXiv:2402.14811, section 3.3, after Wang et al., arXiv:2211.00593. Two heads are one only if layer AND
head are equal; the official code's test leaves partners out that share either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pegbox.analyze.circuits.circuit import Ablation, Circuit, Member
from pegbox.analyze.circuits.heads import Head
from pegbox.errors import BadInput

__all__ = ["Gap", "Minimality", "completeness", "faithfulness", "minimality", "random_circuits"]


def faithfulness(ablation: Ablation, circuit: Circuit, ablate_non_vital: bool = True) -> float:
    """F(K) / F(M). Raises `BadInput` where the model's accuracy is 0."""
    whole = ablation.check()
    return ablation.circuits([circuit], ablate_non_vital)[0].accuracy / whole


def random_circuits(ablation: Ablation, circuit: Circuit, draws: int, generator: torch.Generator) -> list[float]:
    """F of random circuits of the same group sizes."""
    drawn = [circuit.random(ablation.view, generator) for _ in range(draws)]
    return [score.accuracy for score in ablation.circuits(drawn)] if drawn else []


@dataclass(frozen=True)
class Gap:
    """One subset T: its name and size, F(K minus T), F(M minus T)."""

    name: str
    size: int
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        return abs(self.circuit - self.model)


def completeness(
    ablation: Ablation, circuit: Circuit, *, draws: int = 20, generator: torch.Generator,
    subsets: dict[str, Iterable[Member]] | None = None,
) -> list[Gap]:  # fmt: skip
    """Random halves of the circuit, each whole group, and given subsets. Raises `BadInput` for an empty subset."""
    members = circuit.members()
    named: dict[str, list[Member]] = {}
    for draw in range(draws):
        order = torch.randperm(len(members), generator=generator)[: len(members) // 2]
        named[f"half {draw}"] = [members[i] for i in sorted(order.tolist())]
    for name, group in circuit.groups.items():
        named[name] = [(group.position, head) for head in group.heads]
    named |= {name: list(subset) for name, subset in (subsets or {}).items()}
    for name, subset in named.items():
        if not subset:
            raise BadInput(f"Completeness over the subset '{name}', which is empty. Leave it out.")
        foreign = set(subset) - set(members)
        if foreign:
            raise BadInput(f"Subset '{name}' has heads that the circuit has not, e.g. {sorted(foreign)[0]}.")
    left = ablation.circuits([circuit.without(subset) for subset in named.values()])
    whole = ablation.removed(list(named.values()))
    return [
        Gap(name, len(subset), a.accuracy, b.accuracy)
        for (name, subset), a, b in zip(named.items(), left, whole, strict=True)
    ]


@dataclass(frozen=True)
class Minimality:
    """The circuit of the members worth keeping, and every member's score and partners."""

    circuit: Circuit
    scores: dict[Member, float]
    partners: dict[Member, tuple[Head, ...]]


def minimality(ablation: Ablation, circuit: Circuit, *, share: float = 0.3, threshold: float = 0.01) -> Minimality:
    """Every member against its group, and the circuit of those that score at least `threshold`.

    Args:
        share: of the partners with a positive cost that make S_v, rounded down, at least one.
    """
    scores: dict[Member, float] = {}
    partners: dict[Member, tuple[Head, ...]] = {}
    for group in circuit.groups.values():
        members = [(group.position, head) for head in group.heads]
        drops = _pair_drops(ablation, circuit, members)
        for i, member in enumerate(members):
            costs = {j: drops[i][i] - drops[i][j] for j in range(len(members)) if j != i}
            chosen = _costliest(costs, share)
            partners[member] = tuple(members[j][1] for j in chosen)
        left = [[(group.position, partner) for partner in partners[m]] for m in members]
        sets = [s for m, gone in zip(members, left) for s in (gone, [*gone, m])]
        found = [score.accuracy for score in ablation.circuits([circuit.without(s) for s in sets])] if sets else []
        scores |= {m: _gain(found[2 * i], found[2 * i + 1]) for i, m in enumerate(members)}
    return Minimality(circuit.only(m for m, score in scores.items() if score >= threshold), scores, partners)


def _pair_drops(ablation: Ablation, circuit: Circuit, members: Sequence[Member]) -> list[list[float]]:
    """drops[i][j] = F(K without i and j); the diagonal: without i alone."""
    pairs = [(i, j) for i in range(len(members)) for j in range(i, len(members))]
    if not pairs:
        return []
    left = [circuit.without({members[i], members[j]}) for i, j in pairs]
    table = [[0.0] * len(members) for _ in members]
    for (i, j), score in zip(pairs, ablation.circuits(left)):
        table[i][j] = table[j][i] = score.accuracy
    return table


def _costliest(costs: dict[int, float], share: float) -> list[int]:
    """The partners of highest cost: a share of those whose cost is positive."""
    positive = sorted((j for j, cost in costs.items() if cost > 0), key=lambda j: (-costs[j], j))
    return positive[: max(1, math.floor(share * len(positive)))] if positive else []


def _gain(with_it: float, without: float) -> float:
    """with / without - 1; infinite where nothing is right without it, 0 where nothing is right at all."""
    if without == 0:
        return math.inf if with_it > 0 else 0.0
    return with_it / without - 1
