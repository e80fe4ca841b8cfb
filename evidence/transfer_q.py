"""Evidence for value-guided decoding: rollouts of an aligned model against rollouts of the reference, and none.

Claims (arXiv:2405.20495): E1 at equal divergence from the reference (KL of the answer's tokens, matched by
interpolation at 12 nats) transfer earns at least 0.05 more reward than Controlled Decoding (`rollout_ref`). E2
transfer, Controlled Decoding and indirect transfer earn at least 0.2 more than ARGS (`partial`) at alpha 0.05. E3
reward and divergence grow as alpha falls, for every method. At equal alpha the record shows all of them.

A: the language model is a Markov chain over 32 tokens, 24 steps. The reward is the mean over the answer of g, which is
1 on a region that is reached only through four bridge tokens of g = -0.3. The baseline is the chain tilted exactly
(soft value iteration, beta 0.05) by the reward (direct), or by another that likes bridges and part of the region
(indirect). k 8, four sampled rollouts to the end, sampled answers.

B: a small Llama trained on that chain's text is steered; the baseline is a LoRA of it, tuned on the best of 16 samples.
Greedy rollouts of 20 tokens, 32 prompts; diversity and coherence (hashed embedding) beside reward and divergence.

    python evidence/transfer_q.py [--seeds 3] [--sequences 60] [--out evidence/results/transfer_q.json]
"""

from __future__ import annotations

import copy
import statistics
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from record import arguments, verdict, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.decode.base import DECODE, DecodeContext, Decoding
from pegbox.decode.measures import coherence, diversity
from pegbox.decode.pairs import View
from pegbox.decode.rewards import IdReward

TOKENS, STEPS, BETA, PLAIN, BRIDGE = 32, 24, 0.05, 18, 22  # plain 0-17, bridge 18-21, region 22-31
ALPHAS = (0.2, 0.1, 0.05, 0.03, 0.02, 0.01)
SETTINGS: dict[str, dict[str, Any]] = {
    "partial": {"value": "partial"},
    "rollout_ref": {"value": "rollout_ref"},
    "transfer": {"value": "transfer"},
    "indirect": {"value": "transfer_indirect", "beta": BETA, "baseline": "other", "baseline_reward": "other"},
}
MATCHED = 12.0


class World:
    """The chain, and the two rewards."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        chain = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
        for token in range(TOKENS):
            spread = (0.92, 0.05, 0.0) if token < PLAIN else (0.45, 0.0, 0.5) if token < BRIDGE else (0.33, 0.0, 0.62)
            counts = (6, 1, 0) if token < PLAIN else (3, 0, 5) if token < BRIDGE else (2, 0, 6)
            for (low, high), mass, count in zip(((0, PLAIN), (PLAIN, BRIDGE), (BRIDGE, TOKENS)), spread, counts):
                chosen = low + torch.randperm(high - low, generator=self.generator)[:count]
                weights = torch.rand(len(chosen), generator=self.generator, dtype=torch.float64) + 0.3
                chain[token, chosen] += mass * weights / weights.sum() if count else 0.0
            chain[token, :PLAIN] += (1 - chain[token].sum()) / PLAIN
        self.chain = chain
        self.gain = torch.cat(
            [0.1 * torch.rand(PLAIN, generator=self.generator), torch.full((4,), -0.3), torch.ones(10)]
        )
        self.other = torch.cat([torch.zeros(PLAIN), torch.full((4,), 0.5), torch.ones(4), torch.zeros(6)])

    def tilted(self, gain: Tensor) -> Tensor:
        """(24, 32, 32) the chain tilted by exp(mean gain / beta), step by step."""
        value = torch.zeros(TOKENS, dtype=torch.float64)
        steps = []
        for _ in range(STEPS):
            scores = self.chain.log() + (gain.double() / (STEPS * BETA) + value)
            value = scores.logsumexp(-1)
            steps.append(scores.softmax(-1))
        return torch.stack(steps[::-1])


class Chain(nn.Module):
    """A chain as a causal model: logits from the last token, and from the step where it is tilted."""

    def __init__(self, steps: Tensor):
        super().__init__()
        self.steps, self.head = steps.log(), nn.Linear(1, TOKENS)
        self.config = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=None)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Any = None, use_cache: bool = False) -> Any:
        step = min(input_ids.shape[1] - 1, len(self.steps) - 1)
        return SimpleNamespace(logits=self.steps[step][input_ids[:, -1]][:, None])


def mean_reward(gain: Tensor) -> IdReward:
    """The mean over the first 24 tokens of the answer."""
    table = gain.tolist()
    return IdReward(lambda _, rows: [sum(table[t] for t in row[:STEPS]) / len(row[:STEPS]) for row in rows])


def drawn(decoding: Decoding, sequences: int, seed: int) -> Tensor:
    """(sequences, 24) sampled answers, straight from the sessions (a chain has no `generate`)."""
    torch.manual_seed(seed)
    ids = torch.arange(sequences)[:, None] % PLAIN
    session, said = decoding.begin(ids, torch.ones_like(ids), cached=False), ids[:, :0]
    for _ in range(STEPS):
        said = torch.cat([said, torch.multinomial(session.scores(said).softmax(-1), 1)], -1)
    return said


def chains(seed: int, sequences: int) -> dict[str, Any]:
    """Reward and total divergence of every method at every alpha."""
    world = World(seed)
    reference = Chain(world.chain[None])
    models = {"baseline": Chain(world.tilted(world.gain)), "other": Chain(world.tilted(world.other))}
    options = {"reward": mean_reward(world.gain), "baseline_reward": mean_reward(world.other)}
    found: dict[str, Any] = {}
    for name, block in SETTINGS.items():
        found[name] = []
        for alpha in ALPHAS:
            rolls = {} if name == "partial" else {"rollouts": 4, "rollout_temperature": 1.0, "horizon": STEPS - 1}
            whole = {"kind": "transfer_q", "k": 8, "alpha": alpha, **rolls, **block}
            decoding = DECODE.validate(whole).bind(DecodeContext(reference, models=models, options=options))
            found[name].append(point(decoding, drawn(decoding, sequences, seed), world, alpha))
    plain = DECODE.validate({"kind": "transfer_q", "value": "partial", "k": 8, "alpha": 1e9})
    decoding = plain.bind(DecodeContext(reference, options=options))
    found["reference"] = point(decoding, drawn(decoding, sequences, seed), world, None)
    return found


def point(decoding: Decoding, said: Tensor, world: World, alpha: float | None) -> dict[str, Any]:
    rewards = mean_reward(world.gain)([[]] * len(said), said.tolist())
    return {
        "alpha": alpha,
        "reward": float(rewards.mean()),
        "error": float(rewards.std() / len(rewards) ** 0.5),
        "divergence": decoding.summary()["divergence"] * STEPS,
    }


# ---- B: a small Llama and its LoRA ----------------------------------------------------------------------------------


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def fit(net: nn.Module, texts: Any, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        ids = texts()
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    net.eval()


def texts_of(world: World, n: int) -> Tensor:
    ids = torch.randint(PLAIN, (n, 1), generator=world.generator)
    for _ in range(STEPS):
        rows = world.chain[ids[:, -1]]
        ids = torch.cat([ids, torch.multinomial(rows, 1, generator=world.generator)], -1)
    return ids


def llamas(seed: int, prompts: int = 32) -> dict[str, Any]:
    """Reward, divergence, diversity, coherence of partial, rollout_ref and transfer on a small Llama."""
    from peft import LoraConfig, get_peft_model

    world = World(seed)
    base = llama(seed)
    fit(base, lambda: texts_of(world, 64), 400, 3e-3)
    reward = mean_reward(world.gain)
    torch.manual_seed(seed)
    best = best_of_16(base, reward)
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules="all-linear"))
    fit(tuned, lambda: best[torch.randint(len(best), (32,), generator=world.generator)], 150, 2e-3)
    tuned.requires_grad_(False)
    ids = torch.arange(prompts)[:, None] % PLAIN
    models, found = {"off": View(tuned, adapter=False), "baseline": tuned}, {}
    for name in ("partial", "rollout_ref", "transfer"):
        found[name] = []
        for alpha in ALPHAS[::2]:
            block = {"kind": "transfer_q", "value": name, "k": 8, "horizon": 20, "alpha": alpha, "reference": "off"}
            decoding = DECODE.validate(block).bind(DecodeContext(tuned, models=models, options={"reward": reward}))
            torch.manual_seed(seed)
            out = decoding.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=True, top_k=0
            )
            found[name].append({**point(decoding, out[:, 1:], world, alpha), **said_well(ids, out[:, 1:])})
    return found


def best_of_16(base: Any, reward: IdReward) -> Tensor:
    """(64, 25) texts, each the best of 16 sampled from the base."""
    base.requires_grad_(False)
    starts = (torch.arange(64) % PLAIN)[:, None].repeat_interleave(16, 0)
    out = base.generate(starts, attention_mask=torch.ones_like(starts), max_new_tokens=STEPS, do_sample=True, top_k=0)
    scores = reward([[]] * len(out), out[:, 1:].tolist()).view(64, 16)
    return out.view(64, 16, -1)[torch.arange(64), scores.argmax(-1)]


def said_well(ids: Tensor, said: Tensor) -> dict[str, float]:
    asked, answers = ([" ".join(map(str, row)) for row in rows.tolist()] for rows in (ids, said))
    return {
        "diversity": statistics.mean(diversity(text) for text in answers),
        "coherence": coherence(asked, answers, hashed),
    }


def hashed(texts: Any) -> np.ndarray:
    """(N, 64) counts of words by their number: an embedding without a model."""
    found = np.zeros((len(texts), 64))
    for row, text in enumerate(texts):
        for word in text.split():
            found[row, int(word) % 64] += 1
    return found


# ---- the verdict ----------------------------------------------------------------------------------------------------


def at_divergence(points: list[dict[str, Any]], nats: float) -> float:
    """The reward at a divergence, between the two points around it; the last point's where none goes so far."""
    ordered = sorted(points, key=lambda p: p["divergence"])
    return float(np.interp(nats, [p["divergence"] for p in ordered], [p["reward"] for p in ordered]))


def averaged(rows: list[dict[str, Any]], name: str) -> list[dict[str, float]]:
    keys = [k for k, v in rows[0][name][0].items() if isinstance(v, float)]
    return [{k: statistics.mean(row[name][i][k] for row in rows) for k in keys} for i in range(len(rows[0][name]))]


def grows(points: list[dict[str, float]], key: str, slack: float) -> bool:
    values = [p[key] for p in points]  # alpha falls along the list
    return all(b >= a - slack for a, b in pairwise(values)) and values[-1] > values[0]


def main() -> None:
    args = arguments("transfer_q", __doc__, 3, lambda p: p.add_argument("--sequences", type=int, default=60))
    seeds = list(range(1, args.seeds + 1))
    rows = [chains(seed, args.sequences) for seed in seeds]
    curves = {name: averaged(rows, name) for name in SETTINGS}
    matched = {name: at_divergence(curves[name], MATCHED) for name in ("transfer", "rollout_ref")}
    at = {name: curves[name][ALPHAS.index(0.05)]["reward"] for name in SETTINGS}
    checks = {
        "E1 at 12 nats transfer is above Controlled Decoding": {
            **matched,
            "bar": 0.05,
            "holds": matched["transfer"] >= matched["rollout_ref"] + 0.05,
        },
        "E2 rollouts beat none at alpha 0.05": {
            **at,
            "bar": 0.2,
            "holds": all(at[name] >= at["partial"] + 0.2 for name in ("transfer", "rollout_ref", "indirect")),
        },
        "E3 reward and divergence grow as alpha falls": {
            "holds": all(grows(c, "divergence", 0.2) and grows(c, "reward", 0.03) for c in curves.values())
        },
    }
    small = [llamas(seed) for seed in seeds]
    write(
        args.out,
        "transfer_q",
        {
            "claim": "Rollouts of an aligned model guide decoding to more reward at equal divergence than rollouts of "
            "the reference, and both to more than rewards of partial texts (arXiv:2405.20495).",
            "baseline": "ARGS (partial), Controlled Decoding by Monte Carlo (rollout_ref), the reference.",
            "method": f"A: Markov chain, {args.sequences} sampled answers of {STEPS} tokens per point, k 8, n 4. B: a "
            "small Llama, its LoRA tuned on the best of 16, greedy rollouts of 20. Nothing is chosen.",
            "seeds": seeds,
            "results": {
                "chains": curves,
                "reference": statistics.mean(row["reference"]["reward"] for row in rows),
                "llamas": {name: averaged(small, name) for name in small[0]},
            },
            "checks": checks,
            "verdict": verdict(checks),
        },
    )


if __name__ == "__main__":
    main()
