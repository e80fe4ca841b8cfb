"""Evidence for emulated fine-tuning: a small model's tuning, added to a large model while it decodes.

Claims (arXiv:2310.12962, sections 4.1 to 4.3, in small): E1 the large model, up-scaled by a tuned small pair, knows
more than the tuned small model (at least 10 points of exact match on entities that tuning never saw). E2 it behaves as
the tuning taught (compliance at least 30 points above the large base). E3 two behaviours mix: each trait's rate is
monotone in lambda, within 5 points. Measured beside them, as a limit: what becomes of compliance where pre-training
never ended an answer, so that the large model gives the end no probability to lift.

A world of 400 entities, each with a place and a year. Half of the pre-training text states facts, half answers a
question with the place or the year, then ends (20 %) or goes on (80 %; in the limit's twin 0 and 100 %). The large
model (2 layers, D 64) can hold all facts, the small one (1 layer, D 8) can't. Tuning, on 60 entities: answer the place,
then end. All is greedy, on held-out entities; seeds draw the world and the models; nothing is chosen on the results.

For E3 the small model is tuned twice, to end its answers with a mark, and to answer with the place's capital twin; the
deltas are mixed with lambda and 1 - lambda.

    python evidence/eft.py [--seeds 3] [--out evidence/results/eft.json]
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import torch
from record import arguments, verdict, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.decode.base import DECODE, DecodeContext, Decoding
from pegbox.decode.sweep import behaviour_sweep

ENTITIES, PLACES, YEARS, TUNED = 400, 40, 40, 60
PRETRAIN, TUNE, BATCH = 1200, 120, 64
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)

PLACE, YEAR, Q, A, END, NEXT, MARK, PLAIN = range(8)
FIRST = 8  # entities, places, years, places in capitals
PLACE_AT, YEAR_AT, CAPITAL_AT = FIRST + ENTITIES, FIRST + ENTITIES + PLACES, FIRST + ENTITIES + PLACES + YEARS
VOCABULARY = CAPITAL_AT + PLACES


class World:
    """Facts, and the texts that speak of them."""

    def __init__(self, seed: int, ending: float = 0.2):
        self.generator = torch.Generator().manual_seed(seed)
        self.ending = ending  # how often a pre-training answer ends
        order = torch.randperm(ENTITIES, generator=self.generator)
        self.seen, self.held_out = order[:TUNED], order[TUNED:]
        self.place = torch.randint(PLACES, (ENTITIES,), generator=self.generator)
        self.year = torch.randint(YEARS, (ENTITIES,), generator=self.generator)

    def draw(self, high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), generator=self.generator)

    def chance(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator)

    def pretraining(self, n: int) -> Tensor:
        """(n, 5) texts: "e PLACE p NEXT NEXT" or "Q e A answer END|NEXT"; an answer's place is in capitals as often as
        not, and its end is marked as often as not, so that every behaviour has been seen."""
        e = self.draw(ENTITIES, n)
        kind = self.chance(n) < 0.5
        place, year = PLACE_AT + self.place[e], YEAR_AT + self.year[e]
        fact = torch.stack(
            [
                FIRST + e,
                torch.where(kind, PLACE, YEAR),
                torch.where(kind, place, year),
                torch.full_like(e, NEXT),
                torch.full_like(e, NEXT),
            ],
            1,
        )
        capital = torch.where(self.chance(n) < 0.25, CAPITAL_AT + self.place[e], place)
        ends = self.chance(n)
        last = torch.where(ends < self.ending, END, torch.where(ends < self.ending + 0.2, MARK, NEXT))
        asked = torch.stack(
            [torch.full_like(e, Q), FIRST + e, torch.full_like(e, A), torch.where(kind, capital, year), last], 1
        )
        return torch.where((self.chance(n) < 0.5)[:, None], fact, asked)

    def tuning(self, n: int, place_at: int = PLACE_AT, last: int = END) -> Tensor:
        """(n, 5) texts of the tuned behaviour on the entities that tuning sees."""
        e = self.seen[self.draw(TUNED, n)]
        rows = [
            torch.full_like(e, Q),
            FIRST + e,
            torch.full_like(e, A),
            place_at + self.place[e],
            torch.full_like(e, last),
        ]
        return torch.stack(rows, 1)

    def questions(self) -> Tensor:
        """(340, 3) prompts about held-out entities."""
        e = self.held_out
        return torch.stack([torch.full_like(e, Q), FIRST + e, torch.full_like(e, A)], 1)


def model(seed: int, layers: int, width: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=max(width // 16, 1), max_position_embeddings=16, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def fit(net: nn.Module, batches: Any, steps: int, rate: float, answers_only: bool) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        ids = batches()
        labels = ids.clone()
        if answers_only:
            labels[:, :3] = -100
        optimizer.zero_grad()
        net(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)


def tuned_copy(world: World, base: Any, **behaviour: int) -> Any:
    net = model(0, base.config.num_hidden_layers, base.config.hidden_size)
    net.load_state_dict(base.state_dict())
    net.requires_grad_(True)
    fit(net, lambda: world.tuning(BATCH, **behaviour), TUNE, 3e-3, answers_only=True)
    return net


def emulated(anchor: Any, reference: Any, tuned: dict[str, Any], weights: list[float]) -> Decoding:
    deltas = [{"tuned": n, "reference": "reference", "weight": w} for n, w in zip(tuned, weights)]
    block = {"kind": "emulated", "deltas": deltas}
    return DECODE.validate(block).bind(DecodeContext(anchor, models={"reference": reference, **tuned}))


def answers(speaker: Any, world: World) -> Tensor:
    """(340, 2) greedy answers."""
    ids = world.questions()
    return speaker.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)[:, 3:]


def scored(speaker: Any, world: World) -> dict[str, float]:
    """Exact match (the place is right) and compliance (some place, then the end)."""
    said = answers(speaker, world)
    right = said[:, 0] == PLACE_AT + world.place[world.held_out]
    place = (said[:, 0] >= PLACE_AT) & (said[:, 0] < YEAR_AT)
    return {
        "exact": float(right.float().mean()),
        "compliance": float((place & (said[:, 1] == END)).float().mean()),
    }


def pretrained(seed: int, ending: float = 0.2) -> tuple[World, Any, Any]:
    """A world, and a large and a small model of it."""
    world = World(seed, ending)
    large, small = model(seed, 2, 64), model(seed + 1, 1, 8)
    for net in (large, small):
        fit(net, lambda: world.pretraining(BATCH), PRETRAIN, 3e-3, answers_only=False)
    return world, large, small


def up_scaling(world: World, large: Any, small: Any) -> dict[str, dict[str, float]]:
    tuned, whole = tuned_copy(world, small), tuned_copy(world, large)
    found = {"large base": large, "small base": small, "small tuned": tuned, "large tuned": whole}
    for weight in (0.5, 1.0):
        found[f"emulated {weight:g}"] = emulated(large, small, {"tuned": tuned}, [weight])
    return {name: scored(speaker, world) for name, speaker in found.items()}


def interpolation(world: World, large: Any, small: Any) -> dict[str, list[float]]:
    """Rates of the mark and of capitals at each lambda, two deltas over the large base."""
    traits = {"mark": tuned_copy(world, small, last=MARK), "capital": tuned_copy(world, small, place_at=CAPITAL_AT)}
    questions = [" ".join(map(str, row)) for row in world.questions().tolist()]

    def at(value: float) -> list[str]:
        said = answers(emulated(large, small, traits, [value, 1 - value]), world)
        return [" ".join(map(str, row)) for row in said.tolist()]

    judges = {
        "mark": lambda _, a: float(a.split()[1] == str(MARK)),
        "capital": lambda _, a: float(int(a.split()[0]) >= CAPITAL_AT),
    }
    points = behaviour_sweep(at, questions, judges, LAMBDAS)
    return {name: [p.scores[name] for p in points] for name in judges}


def monotone(rates: list[float], rising: bool, slack: float = 0.05) -> bool:
    steps = [(b - a) if rising else (a - b) for a, b in pairwise(rates)]
    return min(steps) >= -slack and (rates[-1] > rates[0]) == rising


def mean(rows: list[dict[str, dict[str, float]]], name: str, key: str) -> float:
    return statistics.mean(row[name][key] for row in rows)


def main() -> None:
    args = arguments("eft", __doc__, seeds=3)
    seeds = list(range(1, args.seeds + 1))
    families = [pretrained(seed) for seed in seeds]
    rows = [up_scaling(*family) for family in families]
    mixed = [interpolation(*family) for family in families]
    never = [up_scaling(*pretrained(seed, ending=0.0)) for seed in seeds]
    gain = mean(rows, "emulated 1", "exact") - mean(rows, "small tuned", "exact")
    taught = mean(rows, "emulated 1", "compliance") - mean(rows, "large base", "compliance")
    checks = {
        "E1 knows more than the tuned small model": {"points": round(100 * gain, 1), "bar": 10, "holds": gain >= 0.10},
        "E2 behaves as tuned": {"points": round(100 * taught, 1), "bar": 30, "holds": taught >= 0.30},
        "E3 behaviours mix monotonically": {
            "holds": all(monotone(m["mark"], True) and monotone(m["capital"], False) for m in mixed)
        },
    }
    write(
        args.out,
        "eft",
        {
            "claim": "A small pair's tuning, added to a large model's log-probabilities while it decodes, keeps the "
            "large model's knowledge and shows the tuned behaviour (arXiv:2310.12962).",
            "baseline": "The tuned small model, and the large base.",
            "method": f"Worlds of {ENTITIES} entities; pre-training {PRETRAIN} steps, tuning {TUNE} steps on {TUNED} "
            "entities; greedy answers about the others. Nothing is chosen.",
            "seeds": seeds,
            "results": {
                "up_scaling": {
                    name: {key: mean(rows, name, key) for key in ("exact", "compliance")} for name in rows[0]
                },
                "per_seed": rows,
                "never_ending": {
                    name: {key: mean(never, name, key) for key in ("exact", "compliance")} for name in never[0]
                },
                "interpolation": {"lambda": list(LAMBDAS), "rates": mixed},
            },
            "checks": checks,
            "verdict": verdict(checks),
        },
    )


if __name__ == "__main__":
    main()
