"""A circuit, heads by position in named groups, and how well a model does with the other heads at their means.

    F(K) = accuracy when every head not in K is replaced by its mean activation at that position

`whole tokens`: outside the circuit's positions all heads are at their means too (`ablate_non_vital`), so those tokens
are the same for every circuit and are computed once. `removed` is the other side: F(M minus T), the full model with
the heads of T alone at their means. Prakash et al., arXiv:2402.14811, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pegbox.analyze.circuits.activations import Edit, capture, last_logits
from pegbox.analyze.circuits.heads import Head, HeadView
from pegbox.analyze.circuits.passes import Passes, Tokens, passes, resumable
from pegbox.analyze.circuits.prompts import LAST, Prompts
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.files import read_json, write_json

__all__ = ["Ablation", "Circuit", "Group", "Means", "Member", "Score", "head_means"]

Member = tuple[str, Head]  # (position, head)


@dataclass(frozen=True)
class Group:
    """Heads that act at one position."""

    position: str
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class Circuit:
    """Named groups of heads. A head may stand in a circuit once per position."""

    groups: Mapping[str, Group]

    @classmethod
    def of(cls, view: HeadView, groups: Mapping[str, tuple[str, Iterable[Iterable[int]]]]) -> Circuit:
        """From {group: (position, heads)}. Raises `BadInput` for heads out of range, or twice at one position."""
        circuit = cls({name: Group(position, view.check(heads)) for name, (position, heads) in groups.items()})
        seen: set[Member] = set()
        for member in circuit.members():
            if member in seen:
                raise BadInput(f"Head {list(member[1])} is in two groups at position '{member[0]}'.")
            seen.add(member)
        return circuit

    @classmethod
    def whole(cls, view: HeadView, positions: Sequence[str]) -> Circuit:
        """Every head at every position."""
        return cls({position: Group(position, tuple(view.all())) for position in positions})

    def __len__(self) -> int:
        return sum(len(group.heads) for group in self.groups.values())

    def group(self, name: str) -> Group:
        """Raises `BadInput` with the nearest name."""
        if name not in self.groups:
            raise BadInput(f"The circuit has no group '{name}'.{did_you_mean(name, self.groups)}")
        return self.groups[name]

    def members(self) -> list[Member]:
        return [(group.position, head) for group in self.groups.values() for head in group.heads]

    @property
    def positions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.position for group in self.groups.values()))

    def without(self, members: Iterable[Member]) -> Circuit:
        """The circuit less some members; groups stay, also empty ones."""
        gone = set(members)
        return self.only(m for m in self.members() if m not in gone)

    def only(self, members: Iterable[Member]) -> Circuit:
        kept = set(members)
        return Circuit(
            {
                name: Group(group.position, tuple(h for h in group.heads if (group.position, h) in kept))
                for name, group in self.groups.items()
            }
        )

    def overlap(self, other: Circuit) -> float:
        """Share of this circuit's members that the other has too; NaN for an empty one."""
        mine = self.members()
        theirs = set(other.members())
        return sum(m in theirs for m in mine) / len(mine) if mine else float("nan")

    def random(self, view: HeadView, generator: torch.Generator) -> Circuit:
        """Groups of the same sizes and positions, of heads drawn without replacement at each position."""
        groups: dict[str, Group] = {}
        drawn = {p: torch.randperm(view.layers * view.heads, generator=generator).tolist() for p in self.positions}
        for name, group in self.groups.items():
            numbers = [drawn[group.position].pop() for _ in group.heads]
            groups[name] = Group(group.position, tuple(sorted(Head(*divmod(n, view.heads)) for n in numbers)))
        return Circuit(groups)

    def plain(self) -> dict[str, Any]:
        """As JSON: group -> position and [[layer, head], ...]."""
        return {n: {"position": g.position, "heads": [list(h) for h in g.heads]} for n, g in self.groups.items()}

    def save(self, path: Path) -> None:
        write_json(path, self.plain())

    @classmethod
    def load(cls, view: HeadView, path: Path) -> Circuit:
        """Raises `BadInput` for another form, and heads out of range."""
        content = read_json(path)
        try:
            groups = {name: (group["position"], group["heads"]) for name, group in content.items()}
        except (AttributeError, KeyError, TypeError):
            raise BadInput(f"{path} holds no circuit: {{group: {{position, heads: [[layer, head], ...]}}}}.") from None
        return cls.of(view, groups)


# ---- mean activations


@dataclass(frozen=True)
class Means:
    """Mean o_proj inputs by column from the end: `values` (L, T, W), `counts` (T,) of prompts behind each."""

    values: Tensor
    counts: Tensor

    def at(self, width: int) -> Tensor:
        """(L, width, W) of the last columns. Raises `BadInput` where prompts are longer than those of the means."""
        if width > self.values.shape[1] or bool((self.counts[-width:] == 0).any()):
            raise BadInput(
                f"Prompts of {width} tokens, and means over prompts of at most {int((self.counts > 0).sum())}: take "
                "the means over prompts that are as long."
            )
        return self.values[:, -width:]


@torch.no_grad()
def head_means(view: HeadView, prompts: Prompts, batch: int = 32) -> Means:
    """Streaming means in float32 (float64 for float64 models) of every head at every column, padding left out."""
    sums = counts = None
    for part in prompts.batches(batch):
        cache = capture(view, part)
        real = part.mask.to(cache["o", 0].device)
        here = torch.stack([(cache["o", layer].float() if cache["o", layer].dtype != torch.float64
                             else cache["o", layer]).masked_fill(~real[..., None], 0).sum(0)
                            for layer in range(view.layers)])  # fmt: skip
        lacking = prompts.width - part.width
        here = torch.nn.functional.pad(here, (0, 0, lacking, 0))
        seen = torch.nn.functional.pad(real.sum(0), (lacking, 0))
        sums = here if sums is None else sums + here
        counts = seen if counts is None else counts + seen
    assert sums is not None
    assert counts is not None
    return Means(sums / counts.clamp(min=1)[None, :, None], counts)


# ---- ablation


@dataclass(frozen=True)
class Score:
    """Accuracy, and the mean log-probability of the answers, which tells equal accuracies apart."""

    accuracy: float
    logprob: float


class Ablation:
    """Measures circuits of one model on one set of prompts with answers.

    Args:
        means: of every head (see `head_means`).
        batch: prompts at a time. tokens: of one pass, at most.
        resume: see `path_patching`.

    What is the same for all circuits is computed once and kept: keys and values of every prompt.
    """

    def __init__(
        self, view: HeadView, prompts: Prompts, means: Means, *, batch: int = 32, tokens: int = 4096,
        resume: bool | None = None,
    ):  # fmt: skip
        prompts.right()
        self.view, self.prompts, self.means, self.tokens = view, prompts, means, tokens
        means.at(prompts.width)
        self.resume = resumable(view, prompts) if resume is None else resume
        self.parts = list(prompts.batches(batch))
        self._kept: dict[tuple[tuple[str, ...], bool], list[Passes]] = {}
        self._model: Score | None = None

    @property
    def model(self) -> Score:
        """The model as it is."""
        if self._model is None:
            with torch.no_grad():
                scored = [self._scored(last_logits(self.view, part)[:, None], part) for part in self.parts]
            self._model = self._joined(scored)[0]
        return self._model

    def check(self) -> float:
        """The model's accuracy. Raises `BadInput` where it is 0, so that no share of it exists."""
        if self.model.accuracy == 0:
            raise BadInput(
                "The model answers none of these prompts right (accuracy 0), so no share of its accuracy can be given. "
                "Take an easier task (fewer boxes), or a model that can do it."
            )
        return self.model.accuracy

    def circuits(self, circuits: Sequence[Circuit], ablate_non_vital: bool = True) -> list[Score]:
        """F(K) of each. Elsewhere than at the circuits' positions heads are at their means, or free."""
        positions = self._positions(circuits)
        keep = torch.stack([self._mask(c.members(), positions) for c in circuits])
        return self._measure(keep, positions, ablate_non_vital)

    def removed(self, subsets: Sequence[Iterable[Member]]) -> list[Score]:
        """F(M minus T): of the full model with the members of T alone at their means."""
        lists = [list(subset) for subset in subsets]
        positions = tuple(dict.fromkeys([*(p for members in lists for p, _ in members), LAST]))
        keep = torch.stack([~self._mask(members, positions) for members in lists])
        return self._measure(keep, positions, False)

    @torch.no_grad()
    def logits(self, circuit: Circuit, ablate_non_vital: bool = True) -> Tensor:
        """(B, V) last-token logits under one circuit."""
        positions = self._positions([circuit])
        keep = self._mask(circuit.members(), positions)[None]
        runs = self._passes(positions, ablate_non_vital)
        return torch.cat([self._run(run, keep, positions, ablate_non_vital)[:, 0] for run in runs])

    def _positions(self, circuits: Sequence[Circuit]) -> tuple[str, ...]:
        sets = {c.positions for c in circuits}
        if len(sets) > 1 and len({frozenset(s) for s in sets}) > 1:
            raise BadInput("Circuits measured together stand at the same positions.")
        given = next(iter(sets), ())
        return given if LAST in given else (*given, LAST)

    def _mask(self, members: Iterable[Member], positions: Sequence[str]) -> Tensor:
        """(P, L, H) bool."""
        mask = torch.zeros(len(positions), self.view.layers, self.view.heads, dtype=torch.bool)
        for position, head in members:
            mask[positions.index(position), head.layer, head.head] = True
        return mask

    @torch.no_grad()
    def _measure(self, keep: Tensor, positions: tuple[str, ...], ablate_non_vital: bool) -> list[Score]:
        free = [not ablate_non_vital and bool(mask.all()) for mask in keep]  # nothing is ablated: the model itself
        todo = [i for i, plain in enumerate(free) if not plain]
        found: dict[int, Score] = {}
        if todo:
            scored = []
            for run, part in zip(self._passes(positions, ablate_non_vital), self.parts):
                room = run.room(self.tokens)
                logits = [
                    self._run(run, keep[todo[i : i + room]], positions, ablate_non_vital)
                    for i in range(0, len(todo), room)
                ]
                scored.append(self._scored(torch.cat(logits, 1), part))
            found = dict(zip(todo, self._joined(scored)))
        return [found.get(i) or self.model for i in range(len(keep))]

    def _passes(self, positions: tuple[str, ...], ablate_non_vital: bool) -> list[Passes]:
        key = positions, ablate_non_vital
        if key not in self._kept:
            self._kept[key] = [self._first(part, positions, ablate_non_vital) for part in self.parts]
        return self._kept[key]

    def _first(self, part: Prompts, positions: tuple[str, ...], ablate_non_vital: bool) -> Passes:
        columns = part.columns(positions)
        if not ablate_non_vital:
            tokens = Tokens.since(columns.min(1).values, part.width)
            return passes(self.view, part, tokens, resume=self.resume)
        order = [*(i for i, name in enumerate(positions) if name != LAST), positions.index(LAST)]
        means = self.means.at(part.width)
        held = {layer: means[layer][None] for layer in range(self.view.layers)}
        return passes(self.view, part, Tokens.only(columns[:, order]), held, self.resume)

    def _run(self, run: Passes, keep: Tensor, positions: tuple[str, ...], ablate_non_vital: bool) -> Tensor:
        """(B, S, V) under masks (S, P, L, H)."""
        place = run.tokens.index(run.prompts.columns(positions))  # (B, P) where each position stands among the tokens
        rows = torch.arange(len(place), device=place.device)[:, None]
        at = run.prompts.columns(positions)
        means = self.means.at(run.prompts.width)
        keep = keep.to(place.device)

        def ablate(layer: int) -> Edit:
            def act(x: Tensor) -> Tensor:
                y = x.clone()
                own = x[rows, :, place].unflatten(-1, (self.view.heads, -1))  # (B, P, S, H, d)
                mean = means[layer][at].to(x.dtype).unflatten(-1, (self.view.heads, -1))[:, :, None]
                mask = keep[:, :, layer].transpose(0, 1)[None, ..., None]  # (1, P, S, H, 1)
                y[rows, :, place] = torch.where(mask, own, mean).flatten(-2)
                return y

            return act

        edits = {("o", layer): ablate(layer) for layer in range(self.view.layers) if not bool(keep[:, :, layer].all())}
        start = 0 if ablate_non_vital else min(layer for _, layer in edits) if edits else 0
        return run.run(len(keep), edits, start)[0]

    def _scored(self, logits: Tensor, part: Prompts) -> tuple[Tensor, Tensor]:
        """Sums over the rows of right answers and of log-probabilities, (S,) each, from (B, S, V)."""
        answers = part.right()[:, None]
        logprob = logits.float().log_softmax(-1).gather(-1, answers[..., None].expand(-1, logits.shape[1], 1))[..., 0]
        return (logits.argmax(-1) == answers).sum(0).cpu(), logprob.double().sum(0).cpu()

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Score]:
        right, logprob = (sum(p[i] for p in parts) for i in (0, 1))
        n = len(self.prompts)
        return [Score(int(r) / n, float(p) / n) for r, p in zip(right, logprob)]  # type: ignore[arg-type]
