"""What a report is made from: `Comparison`, plain data that a comparison or a single run fills and all forms render.

It holds numbers and texts only, is written as `comparison.json`, and needs no model, recipe or run to be read again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pegbox.errors import Corrupt
from pegbox.parts.calibration import Verdict
from pegbox.parts.files import read_json, write_json
from pegbox.parts.findings import Finding
from pegbox.parts.results import Cost, Score

__all__ = ["Comparison", "Curve", "Entry", "Rate", "Sample", "Told", "Trial"]

COMPARISON_SCHEMA = 1


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Told(_Plain):
    """A paired difference, oriented so that positive is better, and what it amounts to.

    Args:
        value, low, high: the difference and its 95 % interval. `log`: of logarithms (perplexity).
        p: two-sided; adjusted: after Holm over the recipes. verdict: in words; None for a mere change.
    """

    value: float
    low: float
    high: float
    p: float
    adjusted: float | None = None
    verdict: Verdict | None = None
    log: bool = False


class Trial(_Plain):
    """A setting that was tried: the rate, and what it gave on validation (None: it failed)."""

    rate: float
    value: float | None = None
    status: str = "finished"


class Rate(_Plain):
    """The learning rate and how it was come by; no trials means the published one."""

    key: str = "optim.lr"
    value: float | None = None
    trials: list[Trial] = Field(default_factory=list)
    score: str = ""  # what trials were judged by
    at_edge: bool = False
    seconds: float = 0.0  # what the trials took


class Curve(_Plain):
    """One training: points of its log. Lists of equal length; `eval_*` are the evaluations during training."""

    seed: int = 0
    steps: list[int] = Field(default_factory=list)
    loss: list[float | None] = Field(default_factory=list)
    rate: list[float | None] = Field(default_factory=list)
    eval_steps: list[int] = Field(default_factory=list)
    eval_values: list[float | None] = Field(default_factory=list)
    eval_name: str = ""


class Entry(_Plain):
    """One row: a recipe over its seeds, or a free row (the base, the base with examples in its prompt).

    Args:
        scores: by suite, then by name ("verified", "verified/intent"), pooled over the seeds.
        changes: against the bare base. verdicts: against the reference. Both by suite, then by name.
        status: finished | failed | incomplete (some seeds are missing). reason: of a failure.
        cost: the mean over the seeds. recipe: its resolved YAML.
    """

    name: str
    title: str = ""
    kind: Literal["recipe", "free", "imported"] = "recipe"
    status: str = "finished"
    reason: str = ""
    seeds: list[int] = Field(default_factory=list)
    scores: dict[str, dict[str, Score]] = Field(default_factory=dict)
    changes: dict[str, dict[str, Told]] = Field(default_factory=dict)
    verdicts: dict[str, dict[str, Told]] = Field(default_factory=dict)
    cost: Cost | None = None
    rate: Rate | None = None
    flags: list[str] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    recipe: str = ""
    paper: str = ""


class Sample(_Plain):
    """One test row with the answers of every entry (of one seed), and whether each was right."""

    row_id: str
    prompt: str
    expected: str = ""
    group: str = ""
    answers: dict[str, str] = Field(default_factory=dict)
    values: dict[str, float] = Field(default_factory=dict)


class Comparison(_Plain):
    """Everything a report says.

    Args:
        primary: the score that counts, on the suite `target`. margin: differences below it count as equal.
        lock: what all rows share, as plain names and values. notes: what the reader must know first, e.g.
            "one seed, published rates: not a ranking".
    """

    version: int = COMPARISON_SCHEMA
    title: str = "Comparison"
    model: str = ""
    data: str = ""
    primary: str = ""
    reference: str | None = None
    margin: float | None = None
    entries: list[Entry] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
    findings: list[Finding] = Field(default_factory=list)  # of analyses, with the names of what they looked at
    lock: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: str = ""

    def entry(self, name: str) -> Entry:
        return next(e for e in self.entries if e.name == name)

    @property
    def base(self) -> Entry | None:
        """The bare base's row."""
        return next((e for e in self.entries if e.kind == "free" and e.name == "base"), None)

    def retention(self) -> list[tuple[str, str]]:
        """(suite, score) of what was measured beside the target, without groups and calibration errors."""
        found: dict[tuple[str, str], None] = {}
        for entry in self.entries:
            for suite, scores in entry.scores.items():
                found.update({(suite, n): None for n in scores if suite != "target" and "/" not in n and "." not in n})
        return list(found)

    def groups(self) -> list[str]:
        """The groups of the primary score."""
        start = f"{self.primary}/"
        names = [n for e in self.entries for n in e.scores.get("target", {}) if n.startswith(start)]
        return sorted({n.removeprefix(start) for n in names})

    def plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        write_json(path, self.plain())

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Read what `save` wrote. Raises `Corrupt`."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise Corrupt(f"{path} is not a readable comparison ({error.error_count()} faults).") from error

    def __rich__(self) -> Any:
        from pegbox.report.terminal import terminal

        return terminal(self)
