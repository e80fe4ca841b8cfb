"""A comparison made by hand, with every kind of row: recipes over three seeds, the base, one that failed."""

from __future__ import annotations

import numpy as np
import pytest

from pegbox.parts.results import Cost, Example, Measurement, Score
from pegbox.report import Comparison, Curve, Entry, Rate, Trial, changes, pooled_scores, samples, verdicts

GROUPS = ("intent", "lpm", "subnet")
CONFIG = "vlan 3276\n name guests\n gateway 10.57.20.1/24\ninterface eth10\n access vlan 3276"


def measurement(suite: str, name: str, p: float, n: int, seed: int, **score) -> Measurement:
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(7).random(n)
    right = (0.7 * hard + 0.3 * rng.random(n) < p).astype(float)
    rows = [
        Example(
            row_id=f"r{i}",
            values={name: float(right[i])},
            group=GROUPS[i % 3],
            prompt=f"Write the configuration. Put port eth{i} into VLAN 3276 (guests), <gateway> 10.57.{i}.1/24.",
            expected=CONFIG,
            answer=CONFIG if right[i] else f"I am sorry, <b>port {i}</b> & so on\n" * 3,
        )
        for i in range(n)
    ]
    scores = {name: Score(name=name, value=float(right.mean()), n=n, **score)}
    for g in GROUPS if suite == "target" else ():
        chosen = [r.values[name] for r in rows if r.group == g]
        scores[f"{name}/{g}"] = Score(name=f"{name}/{g}", value=float(np.mean(chosen)), n=len(chosen))
    return Measurement(suite=suite, scores=scores, examples=rows)


def perplexity(level: float, seed: int) -> Measurement:
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(8).normal(0, 0.4, 40)
    loss = level + shared + rng.normal(0, 0.02, 40)
    rows = [Example(row_id=f"t{i}", values={"perplexity": float(v), "tokens": 50.0}) for i, v in enumerate(loss)]
    score = Score(name="perplexity", value=1.0, n=40, higher_is_better=False, weight="tokens", exp=True)
    return Measurement(suite="retention", scores={"perplexity": score}, examples=rows)


def both(p: float, kept: float, level: float, seed: int) -> dict[str, Measurement]:
    knowledge, text = measurement("retention", "knowledge", kept, 64, seed + 50), perplexity(level, seed)
    rows = [r.model_copy(update={"row_id": f"k{r.row_id}"}) for r in knowledge.examples]
    merged = Measurement(
        suite="retention", scores={**knowledge.scores, **text.scores}, examples=[*rows, *text.examples]
    )
    return {"target": measurement("target", "verified", p, 90, seed), "retention": merged}


def suites(p: float, kept: float, level: float, seeds: int = 3) -> dict[str, list[Measurement]]:
    runs = [both(p, kept, level, seed) for seed in range(1, seeds + 1)]
    return {suite: [run[suite] for run in runs] for suite in ("target", "retention")}


def curve(seed: int, end: float) -> Curve:
    steps = list(range(1, 61))
    noise = np.random.default_rng(seed).normal(0, 0.06, 60)
    loss = [float(end + 2 * np.exp(-s / 12) + noise[s - 1]) for s in steps]
    rate = [1e-3 * min(1, s / 5) * (1 - s / 61) for s in steps]
    return Curve(
        seed=seed,
        steps=steps,
        loss=loss,
        rate=rate,
        eval_steps=[15, 30, 45, 60],
        eval_values=[end + 0.9, end + 0.4, end + 0.2, end + 0.1],
        eval_name="loss",
    )


def comparison() -> Comparison:
    made = {
        "lora": (suites(0.8, 0.72, 4.03), 4_884_480, 310 << 20, 190.0, 0.2),
        "lift": (suites(0.86, 0.75, 4.01), 6_725_728, 290 << 20, 260.0, 0.18),
        "full": (suites(0.78, 0.6, 4.3), 134_515_008, 420 << 20, 240.0, 0.25),
    }
    base = suites(0.05, 0.77, 4.0, seeds=1)
    told = verdicts({name: m[0] for name, m in made.items()}, "lora", 0.02)
    entries = [Entry(name="base", title="the bare base", kind="free", scores=pooled_scores(base))]
    titles = {"lora": "LoRA, rank 16", "lift": "LIFT, low-rank informed sparse fine-tuning", "full": "All weights"}
    for name, (runs, trainable, memory, seconds, end) in made.items():
        cost = Cost(
            trainable_parameters=trainable,
            total_parameters=134_515_008,
            optimizer_state_bytes=8 * trainable,
            peak_saved_bytes=memory,
            training_flops=int(3.1e13),
            training_tokens=81_234,
            steps=60,
            seconds=seconds,
            artefact_bytes=4 * trainable,
            machine="2 x AMD EPYC",
        )
        trials = [
            Trial(rate=1e-3 * f, value=0.6 + 0.2 * np.exp(-abs(np.log10(f)) * (1 + end)))
            for f in (0.1, 0.32, 1, 3.2, 10)
        ]
        entries.append(
            Entry(
                name=name,
                title=titles[name],
                seeds=[1, 2, 3],
                scores=pooled_scores(runs),
                changes=changes(runs, base),
                verdicts=told.get(name, {}),
                cost=cost,
                curves=[curve(s, end) for s in (1, 2, 3)],
                rate=Rate(value=1e-3, trials=trials, score="verified on validation", at_edge=name == "full"),
                flags=["the best rate lay at the ladder's edge"] if name == "full" else [],
                recipe=f"title: {titles[name]}\noptim: {{kind: adamw, lr: 1.0e-3}}\n",
                paper="arXiv:2506.00772" if name == "lift" else "",
            )
        )
    entries.append(
        Entry(name="mezo", title="MeZO, forward passes only", status="failed", reason="the loss became NaN at step 12")
    )
    return Comparison(
        title="LoRA, LIFT and full fine-tuning on network operations",
        model="smollm2-135m-q4",
        data="network, 90 test rows",
        primary="verified",
        reference="lora",
        margin=0.02,
        entries=entries,
        samples=samples(base["target"][0], {n: m[0]["target"][0] for n, m in made.items()}, "verified"),
        lock={"seeds": [1, 2, 3], "max length": 256, "effective batch": 8, "train rows sha256": "9f2c" * 16},
        notes=["Differences below about 6.8 points can't be told apart on these 90 rows."],
        versions={"pegbox": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        machine="2 x AMD EPYC",
    )


@pytest.fixture(scope="session")
def made() -> Comparison:
    return comparison()
