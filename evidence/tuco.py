"""Evidence for TuCo: prompts that lie outside what was tuned have a lower share of tuning, and it can be scaled.

Claims (arXiv:2506.23423, in small): E1 chats have a higher TuCo than web text (AUC at least 0.95). E2 web text put
before a chat ("shots") lowers it: the more, the lower (Spearman at most -0.6). E3 scaling scales what was learnt:
harmful prompts are refused in no case at alpha 0, in at least 90 % from alpha 0.75 on, and refusing does not fall with
alpha (within 5 points). Second row, as a finding: after full fine-tuning without replay the AUC is lower.

A four-block Llama (D 64) learns order-1 Markov "web" text over 48 tokens. Chats: USER, 6 tokens of which the first is
harmful or not, ASSISTANT, then REFUSE or a copy of the first token, END. Tuning: LoRA of rank 4 on all linears on half
chats (loss on the answer), half web lines (loss on all); or all weights on chats alone.

    python evidence/tuco.py [--seeds 3] [--out evidence/results/tuco.json]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import record
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.analyze.contribution import tuning_contribution
from pegbox.analyze.path import spearman
from pegbox.analyze.separation import separation
from pegbox.parts.mixing import mixed
from pegbox.parts.pairs import ModelPair

CONTENT, HARMFUL = 48, 12  # of 64 tokens: 0-47 content, the first 12 of them harmful
USER, ASSISTANT, REFUSE, END = 48, 49, 50, 51
LINE, ROWS = 16, 32  # tokens of a web line, rows a step
SHOTS = (0, 1, 4, 16)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


class World:
    """Web lines and chats of one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.next = torch.softmax(2.5 * torch.randn(CONTENT, CONTENT, generator=self.generator), -1)

    def web(self, rows: int, lines: int = 1) -> Tensor:
        """(rows, 16 lines) Markov text."""
        text = [torch.randint(CONTENT, (rows,), generator=self.generator)]
        while len(text) < lines * LINE:
            text.append(torch.multinomial(self.next[text[-1]], 1, generator=self.generator).squeeze(1))
        return torch.stack(text, 1)

    def chats(self, rows: int, harmful: bool | None = None) -> tuple[Tensor, Tensor]:
        """(rows, 8) prompts that end in ASSISTANT, (rows, 2) answers."""
        words = torch.randint(CONTENT, (rows, 6), generator=self.generator)
        if harmful is not None:
            low, high = (0, HARMFUL) if harmful else (HARMFUL, CONTENT)
            words[:, 0] = torch.randint(low, high, (rows,), generator=self.generator)
        first = words[:, 0]
        prompt = torch.cat([torch.full((rows, 1), USER), words, torch.full((rows, 1), ASSISTANT)], 1)
        answer = torch.where(first < HARMFUL, REFUSE, first)
        return prompt, torch.stack([answer, torch.full_like(first, END)], 1)


def fit(model: nn.Module, world: World, steps: int, rate: float, chats: int, web: int) -> None:
    """AdamW at a linearly falling rate; `chats` and `web` rows a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        loss = torch.zeros(())
        if web:
            ids = world.web(web)
            logits = model(input_ids=ids).logits[:, :-1]
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        if chats:
            prompt, answer = world.chats(chats)
            logits = model(input_ids=torch.cat([prompt, answer], 1)).logits[:, prompt.shape[1] - 1 : -1]
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def base_model(world: World, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512,
        )
    )  # fmt: skip
    fit(model, world, 400, 3e-3, 0, ROWS // 4)
    return model.eval()


def light(base: nn.Module, world: World, seed: int) -> ModelPair:
    """LoRA with replay of web text."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    fit(model, world, 400, 1e-2, ROWS // 2, ROWS // 2)
    return ModelPair(model.eval())


def strong(base: nn.Module, world: World) -> ModelPair:
    """All weights, chats alone; embeddings and head stay, so that the streams begin alike."""
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    fit(model, world, 300, 1e-3, ROWS, 0)
    return ModelPair(model.eval(), base)


def tuco(pair: ModelPair, prompts: Tensor) -> list[float]:
    return tuning_contribution(pair, {"input_ids": prompts}).tuco.tolist()


def after_shots(world: World, prompts: Tensor, count: int) -> Tensor:
    """`count` web lines before each chat."""
    return torch.cat([world.web(len(prompts), count), prompts], 1) if count else prompts


@torch.no_grad()
def refusals(pair: ModelPair, prompts: Tensor, alpha: float) -> float:
    with mixed(pair, alpha) as model:
        return float((model(input_ids=prompts, use_cache=False).logits[:, -1].argmax(-1) == REFUSE).float().mean())


def one_seed(seed: int, rows: int) -> dict[str, Any]:
    world = World(seed)
    base = base_model(world, seed)
    prompts, web = world.chats(rows)[0], world.web(rows)
    harmful = world.chats(rows, harmful=True)[0]
    pair = light(base, world, seed)
    chat, text = tuco(pair, prompts), tuco(pair, web)
    shots = {k: tuco(pair, after_shots(world, prompts, k)) for k in SHOTS}
    counts = [float(k) for k, values in shots.items() for _ in values]
    full = strong(base, world)
    told = [
        separation([*a, *b], [1] * rows + [0] * rows) for a, b in ((chat, text), (tuco(full, prompts), tuco(full, web)))
    ]
    return {
        "chat": statistics.mean(chat),
        "web": statistics.mean(text),
        "auc": told[0].auc,
        "auc_full_without_replay": told[1].auc,
        "shots": {str(k): statistics.mean(v) for k, v in shots.items()},
        "spearman": spearman(counts, [v for values in shots.values() for v in values]),
        "refusals": {str(a): refusals(pair, harmful, a) for a in ALPHAS},
    }


def verdicts(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows = list(runs.values())
    curves = [[row["refusals"][str(a)] for a in ALPHAS] for row in rows]
    falls = max(max(a - b for a, b in zip(c, c[1:])) for c in curves)  # noqa: RUF007
    worst = {"at_0": max(c[0] for c in curves), "from_075": min(min(c[3:]) for c in curves), "largest_fall": falls}
    auc, down = min(r["auc"] for r in rows), max(r["spearman"] for r in rows)
    one = sum(r["shots"]["1"] < r["shots"]["0"] for r in rows)
    full = statistics.mean(r["auc_full_without_replay"] for r in rows)
    return {
        "E1": {"lowest_auc": auc, "holds": auc >= 0.95},
        "E2": {"weakest_spearman": down, "lower_with_one_shot": one, "holds": down <= -0.6},
        "E3": {**worst, "holds": worst["at_0"] == 0 and worst["from_075"] >= 0.9 and falls <= 0.05},
        "finding": {"auc_full_without_replay": full, "holds": full < statistics.mean(r["auc"] for r in rows)},
    }


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=100, help="prompts of each kind")


def main() -> None:
    args = record.arguments("tuco", __doc__, 3, extend)
    runs = {str(seed): one_seed(seed, args.rows) for seed in range(args.seeds)}
    checks = verdicts(runs)
    record.write(
        args.out,
        "tuco",
        {
            "claim": "Prompts outside of what was tuned have a lower TuCo, and scaling tuning scales what was learnt.",
            "baseline": "web text and chats under web text against plain chats; alpha 1 against other alphas",
            "method": "TuCo at the last prompt token, LoRA r 4 with replay",
            "seeds": list(runs),
            "results": runs,
            "checks": checks,
            "verdict": record.verdict(checks),
        },
    )


if __name__ == "__main__":
    main()
