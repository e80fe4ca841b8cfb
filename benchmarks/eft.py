"""Emulated fine-tuning's cost over its members' own: time of a step, the combination's share, memory, blocks.

    python benchmarks/eft.py [--layers 30] [--tokens 32] [--repeats 3]

A random Llama of SmolLM2-135M's shape as anchor and a pair of a third of its blocks, vocabulary 32,768, float32, one
thread, a prompt of 64 tokens. Each member's own greedy `generate` and the joint one take turns in one process; seconds
are the process's own CPU time. Then the pair as one base with its adapter on and off: its parameters count once.
Blocks: how many calls of the anchor a token takes, sampled, where the anchor is near the reference. Targets: joint <=
1.10 of the members' sum; the combination <= 3 % of a step; anchor calls <= 0.4 per token at an acceptance of 0.7 or
more.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write
from peft import LoraConfig, get_peft_model

from pegbox.decode.base import DECODE, DecodeContext
from pegbox.decode.combine import combine
from pegbox.decode.pairs import View

TARGETS = {"joint_over_sum": 1.10, "combination_share": 0.03, "anchor_calls_per_token": 0.4}
V = 32_768


def near(model: Any, scale: float, seed: int) -> Any:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(scale * weight.std() * torch.randn(weight.shape, generator=generator))
    return other


def quiet(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def bound(anchor: Any, models: dict[str, Any], **block: Any) -> Any:
    block = {"kind": "emulated", "deltas": [{"reference": "reference"}], **block}
    return DECODE.validate(block).bind(DecodeContext(anchor, models=models))


def answer(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    given = {"max_new_tokens": tokens, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given)


def steps(layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Joint steps over the sum of the members' own, two models and one adapted model as the pair."""
    anchor = quiet(smollm_shaped(layers, 1, vocab_size=V))
    reference = quiet(smollm_shaped(max(layers // 3, 1), 2, vocab_size=V))
    tuned = quiet(near(reference, 0.02, 3))
    adapted = quiet(
        get_peft_model(copy.deepcopy(reference), LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    )
    off = View(adapted, adapter=False)
    ids = torch.randint(0, V, (1, 64), generator=torch.Generator().manual_seed(0))
    pair = bound(anchor, {"tuned": tuned, "reference": reference})
    one = bound(anchor, {"tuned": adapted, "reference": off})

    def bare() -> None:
        with off.active():
            answer(adapted.get_base_model(), ids, tokens)

    jobs = {
        "anchor": lambda: answer(anchor, ids, tokens),
        "tuned": lambda: answer(tuned, ids, tokens),
        "reference": lambda: answer(reference, ids, tokens),
        "adapter on": lambda: answer(adapted.get_base_model(), ids, tokens),
        "adapter off": bare,
        "joint": lambda: answer(pair, ids, tokens),
        "joint, adapter": lambda: answer(one, ids, tokens),
    }
    seconds = in_turns(jobs, repeats)
    logits = [torch.randn(1, V) for _ in range(3)]
    combined = in_turns(
        {"combine": lambda: [combine(logits[0], [logits[1]], [logits[2]], [1.0]) for _ in range(50)]}, 3
    )
    alone = seconds["anchor"] + seconds["tuned"] + seconds["reference"]
    adapter = seconds["anchor"] + seconds["adapter on"] + seconds["adapter off"]
    held = {p.data_ptr(): p.numel() for m in one.members for p in m.module.parameters()}
    apart = {p.data_ptr(): p.numel() for m in (anchor, reference) for p in m.parameters()}
    return {
        "seconds": seconds,
        "joint_over_sum": seconds["joint"] / alone,
        "joint_over_sum_adapter": seconds["joint, adapter"] / adapter,
        "joint_over_anchor_and_two_small": seconds["joint"] / seconds["anchor"],
        "two_small_over_anchor": (seconds["tuned"] + seconds["reference"]) / seconds["anchor"],
        "combination_share": combined["combine"] / 50 / (seconds["joint"] / tokens),
        "parameters_of_the_pair_over_one_base": sum(held.values()) / sum(apart.values()),
    }


def blocks(tokens: int) -> dict[str, Any]:
    """Acceptance and calls of the anchor per token, sampled, for blocks of 4; small models, counts only."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    reference = quiet(smollm_shaped(2, 2, **shape))
    models = {"reference": reference, "tuned": quiet(near(reference, 0.02, 3))}
    found = {}
    for scale in (0.0, 0.1, 0.3):
        anchor = quiet(near(reference, scale, 5))
        joint = bound(anchor, models, block_size=4)
        torch.manual_seed(0)
        answer(joint, torch.arange(8)[None], tokens, do_sample=True, top_k=0)
        counted = joint.summary()
        a = counted["acceptance"]
        found[f"anchor {scale:g} from the reference"] = {
            "acceptance": a,
            "anchor_calls_per_token": counted["calls"]["anchor"] / tokens,
            "expected": (1 - a) / (1 - a**5) if a < 1 else 0.2,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="eft")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = steps(args.layers, args.tokens, args.repeats)
    write(args.name, {**found, "blocks": blocks(200)}, TARGETS)


if __name__ == "__main__":
    main()
