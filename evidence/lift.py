"""LIFT's claim that principal weights carry a model's knowledge: noise on them hurts most.

    python evidence/lift.py [--model smollm2-135m-q4] [--seeds 3] [--texts 12] [--out evidence/results/lift.json]

To 5 % of every linear layer's weights N(0, scale^2) noise is added, the same scale whatever the choice: the entries
largest after a rank reduction (LIFT), the largest as they are, and random ones. Measured: perplexity of plain English.
Scale 0.01 is the paper's; a second one, 0.05, is reported beside it. Arguments are fixed before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from pegbox.analyze.spectra import perturbed
from pegbox.evaluate.run import measure
from pegbox.evaluate.suites import Suite, retention
from pegbox.models import load
from pegbox.parts.anatomy import Anatomy
from pegbox.select import SELECT
from pegbox.tasks.views import CausalView

BUDGET = {"density": 0.05}
CHOICES: dict[str, dict[str, Any]] = {
    "principal": {"kind": "low_rank_magnitude", "filter_rank": 32, "budget": BUDGET},
    "magnitude": {"kind": "magnitude", "budget": BUDGET},
    "random": {"kind": "random", "budget": BUDGET},
}
SCALES = (0.01, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-q4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lift.json")
    given = parser.parse_args()
    began = time.perf_counter()
    model, tokenizer = load(given.model)
    view, weights = CausalView(model), dict(model.named_parameters())
    english = next(part for part in retention(given.texts).parts if part.score == "perplexity")
    suite = Suite("english", [english])

    def perplexity() -> float:
        return measure(view, tokenizer, suite).scores["perplexity"].value

    base = perplexity()
    anatomy = Anatomy.of(model)
    rises: dict[str, dict[str, dict[str, float]]] = {}
    for seed in range(given.seeds):
        generator = torch.Generator().manual_seed(seed)
        chosen = {n: SELECT.validate(b).select(anatomy, weights, None, generator) for n, b in CHOICES.items()}
        for scale in SCALES:
            found = {}
            for name, allocation in chosen.items():
                with torch.no_grad(), perturbed(weights, allocation, scale, seed):
                    found[name] = perplexity() / base - 1
            rises.setdefault(str(scale), {})[str(seed)] = found
            print(seed, scale, found, flush=True)
    checks = {scale: {seed: held(r) for seed, r in by_seed.items()} for scale, by_seed in rises.items()}
    every = [all(c.values()) for by_seed in checks.values() for c in by_seed.values()]
    record = {
        "slug": "lift",
        "claim": "Noise on principal weights raises perplexity more than on as many chosen by magnitude or at random.",
        "baseline": "the same number of entries by magnitude, and at random",
        "method": "5 % of each linear layer, rank 32, noise of 0.01 and 0.05",
        "seeds": [str(seed) for seed in range(given.seeds)],
        "summary": summary(rises, base),
        "results": {"perplexity": base, "relative rise": rises},
        "checks": checks,
        "verdict": "holds" if all(every) else "inconclusive" if any(every) else "does not hold",
        "seconds": round(time.perf_counter() - began, 1),
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(record["summary"], record["verdict"], record["seconds"], "s")


def held(rise: dict[str, float]) -> dict[str, bool]:
    """The claim on one seed: above both, and at least 1.5 times random's rise."""
    return {
        "above magnitude": rise["principal"] > rise["magnitude"],
        "1.5 times random": rise["principal"] > 0 and rise["principal"] >= 1.5 * rise["random"],
    }


def summary(rises: dict[str, dict[str, dict[str, float]]], base: float) -> str:
    """Mean relative rises per scale, in words."""
    parts = []
    for scale, by_seed in rises.items():
        means = {n: sum(r[n] for r in by_seed.values()) / len(by_seed) for n in CHOICES}
        parts.append(f"noise {scale}: " + ", ".join(f"{n} {100 * m:+.2f} %" for n, m in means.items()))
    return f"perplexity {base:.1f} changes by: " + "; ".join(parts)


if __name__ == "__main__":
    main()
