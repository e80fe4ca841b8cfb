"""Value-guided decoding's cost: with caches over without, and the baseline's tokens over re-reading every prompt.

    python benchmarks/transfer_q.py [--tokens 128] [--repeats 1]

A random Llama (4 blocks, D 128, vocabulary 8192) as reference and another as baseline, k 10, one greedy rollout of 20
tokens, a prompt of 32 tokens, float32, one thread. The same decoder runs with `use_cache` on and off: the tokens must
be equal. Seconds are the process's own CPU time. Then tokens through the baseline at a prompt of 200, against what
reading prompt, answer and candidate anew for each rollout takes (the official code). Targets: >= 3 x faster at 128
tokens, >= 5 x fewer baseline tokens, tokens per step <= k n (H + 1), no tensor left behind by a step.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write

from pegbox.decode.base import DECODE, DecodeContext
from pegbox.decode.rewards import IdReward

TARGETS = {"uncached_over_cached": 3.0, "official_over_ours_tokens": 5.0}
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
K, H = 10, 20


def reward(prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    return [sum(token % 7 for token in row) / len(row) for row in answers]


def decoder() -> Any:
    models = []
    for seed in (1, 2):
        model = smollm_shaped(4, seed, **SHAPE)
        model.generation_config.eos_token_id = None
        models.append(model.eval().requires_grad_(False))
    block = {"kind": "transfer_q", "k": K, "horizon": H, "alpha": 0.2}
    context = DecodeContext(models[0], models={"baseline": models[1]}, options={"reward": IdReward(reward)})
    return DECODE.validate(block).bind(context)


def answer(model: Any, prompt: int, tokens: int, cached: bool = True) -> torch.Tensor:
    ids = torch.arange(prompt)[None] + 5
    given = {"max_new_tokens": tokens, "do_sample": False, "use_cache": cached}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given)


def counted(prompt: int = 200, tokens: int = 8) -> dict[str, Any]:
    """Tokens through the baseline, and what the official code would put through it."""
    model = decoder()
    answer(model, prompt, tokens)
    ours = model.summary()["tokens"]["baseline"]
    official = sum(K * (prompt + t + 1 + H - 1) for t in range(tokens))  # prefill of each row, then H - 1 steps
    bound = prompt + tokens * K * (H + 1)
    return {"ours": ours, "bound": bound, "official": official, "official_over_ours_tokens": official / ours}


def left_behind() -> int:
    """Tensors alive after a step beyond those alive before it."""
    model = decoder()
    ids = torch.arange(32)[None]
    session = model.begin(ids, torch.ones_like(ids))
    session.scores(ids[:, :0])
    alive = []
    for length in (1, 2):
        session.scores(ids[:, :length])
        gc.collect()
        alive.append(sum(1 for o in gc.get_objects() if torch.is_tensor(o)))
    return alive[1] - alive[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--name", default="transfer_q")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, said = decoder(), {}

    def job(cached: bool) -> None:
        said[cached] = answer(model, 32, args.tokens, cached)

    seconds = in_turns({"cached": lambda: job(True), "uncached": lambda: job(False)}, args.repeats)
    write(
        args.name,
        {
            "tokens": args.tokens,
            "seconds": seconds,
            "uncached_over_cached": seconds["uncached"] / seconds["cached"],
            "same_tokens": bool(torch.equal(said[True], said[False])),
            "baseline_tokens": counted(),
            "tensors_left_behind": left_behind(),
        },
        TARGETS,
    )


if __name__ == "__main__":
    main()
