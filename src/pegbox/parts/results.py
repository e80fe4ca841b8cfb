"""Numbers with their uncertainty: what evaluation returns and what `metrics.json` holds."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Cost", "Example", "Measurement", "Metrics", "Score"]

METRICS_SCHEMA = 1


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Score(_Plain):
    """One metric on one set. `low`/`high` bound a 95 % bootstrap interval; `higher_is_better` gives its direction.

    The value is the mean over rows of their value of this name, weighted by their value `weight` where given, and
    exponentiated where `exp` (perplexity).
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int
    higher_is_better: bool = True
    unit: str = ""
    weight: str = ""
    exp: bool = False


class Example(_Plain):
    """One evaluated row: stable row id, per-metric values, and what was shown and answered."""

    row_id: str
    values: dict[str, float]
    group: str = ""
    prompt: str = ""
    expected: str = ""
    answer: str = ""


class Measurement(_Plain):
    """A suite evaluated on one model: scores (also by group, keys "metric/group") and the rows behind them."""

    suite: str
    version: str = "1"
    scores: dict[str, Score]
    examples: list[Example] = Field(default_factory=list, exclude=True)  # written beside, as JSONL


class Cost(_Plain):
    """What a run used. Bytes and FLOPs are counts; seconds belong to `machine`."""

    trainable_parameters: int = 0
    total_parameters: int = 0
    optimizer_state_bytes: int = 0
    peak_saved_bytes: int | None = None  # autograd's saved tensors, on a CPU
    peak_device_bytes: int | None = None  # the allocator's peak, on a GPU
    training_flops: int | None = None
    training_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    artefact_bytes: int = 0
    machine: str = ""


class Metrics(_Plain):
    """The content of `metrics.json`."""

    version: int = METRICS_SCHEMA
    status: str = "finished"
    before: dict[str, Measurement] = Field(default_factory=dict)  # by suite; always the bare base
    after: dict[str, Measurement] = Field(default_factory=dict)
    cost: Cost = Field(default_factory=Cost)
    extra: dict[str, Any] = Field(default_factory=dict)  # a protocol's own results, e.g. a forgetting matrix
