"""Making a comparison's lock from its settings: hashes of the base and the rows, versions, everything shared."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pegbox.compare.lock import Lock
from pegbox.compare.rates import ladder
from pegbox.compare.settings import TUNING_SEED, CompareSettings
from pegbox.models import resolve
from pegbox.recipe import Recipe
from pegbox.run import build_spec
from pegbox.runner.data import RunData
from pegbox.runner.suites import Suites
from pegbox.workspace import library_versions

__all__ = ["make_lock"]


def make_lock(settings: CompareSettings) -> Lock:
    """The lock that these settings, this base and these rows amount to."""
    spec = build_spec(Recipe(), **settings.run)
    data = RunData(spec.rows)
    train = {k: v for k, v in spec.train.items() if v is not None and k not in {"tracker", "log_every", "save_every"}}
    return Lock(
        model=spec.model,
        fingerprint=resolve(spec.model).fingerprint,
        data={"sources": data.names(), **data.digests()},
        encoding={
            "template": _template(spec.rows.template),
            "train_on": spec.rows.train_on,
            "max_length": spec.rows.max_length,
            "packing": spec.rows.packing,
        },
        training={
            **train,
            "precision": spec.precision,
            "budget": settings.budget,
            "match": settings.match,
            "select": settings.select,
            "overrides": [*settings.run.get("overrides", []), *settings.overrides],
        },
        evaluation={"suites": Suites(spec, data).versions(), "decoding": "greedy", "margin": settings.margin},
        seeds=settings.report_seeds,
        trials={"count": settings.trials, "rates": list(ladder(settings.trials)), "seed": TUNING_SEED},
        libraries=library_versions(),
    )


def _template(template: str | None) -> str:
    if template is None:
        return "the tokenizer's"
    path = Path(template)
    text = path.read_text(encoding="utf-8") if path.is_file() else template
    return hashlib.sha256(text.encode()).hexdigest()[:16]
