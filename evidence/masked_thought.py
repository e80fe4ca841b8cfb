"""Evidence for masked thought: masking reasoning steps in training helps a model that already can, on little data.

Claims (arXiv:2403.02178), on a pre-trained model and arithmetic word problems with short written steps, at equal steps:
A1 held-out exact match is at least 2 points above SFT's on average over seeds; A2 the held-out loss at the end is lower
(and the training loss higher) in every seed; A3 hiding the question harms the answer's likelihood more, in every seed;
B  when one number in a given step is wrong, accuracy drops less.

Rows are those MultiArith solutions whose own final answer is right: 300 to train on, 60 to choose the rate by, the rest
to report on. Both methods get the same rows, order, steps and choice of rates (on a seed of its own). The dependency
profile is this project's own measure; the paper's could not be read.

    python evidence/masked_thought.py --model DIR_OR_GGUF --data arithmetic/MultiArith/test.json
        [--seeds 3] [--epochs 8] [--rates 1e-5 3e-5 1e-4] [--out evidence/results/masked_thought.json]

About 25 minutes per training of SmolLM2-135M on two cores: 12 trainings by default. `--smoke` takes a tiny random model
and a few rows, to see that everything runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.data.base import DATA
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.parts.schedules import factor
from pegbox.tasks.views import CausalView

METHODS: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "mft": {"kind": "corruption", "rate": 0.3, "form": "existing", "schedule": "ratio"},
}
BATCH = 8
Row = dict[str, Any]


# ---- rows -----------------------------------------------------------------------------------------------------------


def final_number(text: str) -> float | None:
    """The number after "The answer is", else the last one."""
    said = re.search(r"answer is\s*(-?[\d,]+(?:\.\d+)?)", text)
    found = [said.group(1)] if said else re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def read(path: Path) -> list[Row]:
    """Question, written steps and answer of every solution whose own answer is right."""
    rows = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        steps = record["output"].replace("\nA:", "").strip()
        if final_number(steps) == float(record["answer"]):
            rows.append({"question": record["instruction"].strip(), "steps": steps, "answer": float(record["answer"])})
    return rows


def invented(count: int) -> list[Row]:
    """Rows in the same form, for a smoke test."""
    rows = []
    for i in range(count):
        a, b, c = i % 7 + 1, i % 5 + 1, i % 3
        steps = f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}. The answer is {a + b - c}."
        rows.append({"question": f"{a} and {b} less {c}?", "steps": steps, "answer": float(a + b - c)})
    return rows


def prompt_of(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def encode(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """Token ids of prompt, steps and end, and how many of them are the prompt."""
    prompt = tokenizer(prompt_of(row), add_special_tokens=False)["input_ids"]
    answer = tokenizer(" " + row["steps"], add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def collate(encoded: list[tuple[list[int], int]], ids: list[int]) -> dict[str, Tensor]:
    width = max(len(tokens) for tokens, _ in encoded)
    batch = {"input_ids": torch.zeros(len(encoded), width, dtype=torch.long)}
    batch["attention_mask"], batch["labels"] = torch.zeros_like(batch["input_ids"]), batch["input_ids"] - 100
    for i, (tokens, prompt) in enumerate(encoded):
        row = torch.tensor(tokens)
        batch["input_ids"][i, : len(row)], batch["attention_mask"][i, : len(row)] = row, 1
        batch["labels"][i, prompt : len(row)] = row[prompt:]
    return {**batch, "sample_ids": torch.tensor(ids)}


# ---- training -------------------------------------------------------------------------------------------------------


def train(model: nn.Module, tokenizer: Any, rows: list[Row], method: str, rate: float, seed: int, epochs: int) -> float:
    """Full fine-tuning; returns the mean loss of the last epoch's batches as the model saw them."""
    encoded = [encode(tokenizer, row) for row in rows]
    draw, order = random.Random(seed), []
    for _ in range(epochs):
        numbers = list(range(len(rows)))
        draw.shuffle(numbers)
        order += [numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)]
    done = [0]
    ctx = Context(model, seed=seed, total_steps=len(order), step=lambda: done[0], tokenizer=tokenizer)
    block = METHODS[method]
    policy = DATA.validate({**block, "token": int(tokenizer.convert_tokens_to_ids(MASK))}) if block else None
    state = policy.setup(ctx) if policy else None
    objective, view = OBJECTIVE.validate({}), CausalView(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor("cosine", len(order), 0.01))
    model.train()
    seen = []
    for numbers in order:
        batch: Any = collate([encoded[i] for i in numbers], numbers)
        batch = policy.on_batch(state, batch, ctx) if policy else batch
        loss = dict(objective.losses(None, view, batch, objective.count(batch), None))["tokens"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        done[0] += 1
        seen.append(loss.item())
    model.eval()
    return statistics.mean(seen[-(len(order) // epochs) :])


# ---- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def continued(model: Any, tokenizer: Any, starts: list[str], new: int) -> list[str]:
    """Greedy continuations, in batches padded on the left."""
    tokenizer.padding_side, out = "left", []
    for i in range(0, len(starts), 16):
        given = tokenizer(starts[i : i + 16], return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(
            **{k: given[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=new, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        out += tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def exact_match(model: Any, tokenizer: Any, rows: list[Row], starts: list[str] | None = None, new: int = 96) -> float:
    """Share of rows whose continuation ends in the right number."""
    answers = continued(model, tokenizer, starts or [prompt_of(r) for r in rows], new)
    return statistics.mean(final_number(a) == r["answer"] for a, r in zip(answers, rows))


def with_a_wrong_step(row: Row, draw: random.Random) -> str | None:
    """The prompt and the first sentences up to a result, which is made wrong by one; None without such a step."""
    found = re.match(r"(.*?=\s*)(\d+)", row["steps"], flags=re.S)
    return f"{prompt_of(row)} {found.group(1)}{int(found.group(2)) + draw.choice([1, 2])}" if found else None


@torch.no_grad()
def losses(model: nn.Module, tokenizer: Any, rows: list[Row], hide: str | None = None, last: int = 0) -> float:
    """Mean loss per answer token; `hide` "question" or "far" (all answer inputs but the `last` ones) are masked."""
    view, objective, total, count = CausalView(model), OBJECTIVE.validate({}), 0.0, 0.0
    mask = int(tokenizer.convert_tokens_to_ids(MASK))
    for i in range(0, len(rows), 16):
        encoded = [encode(tokenizer, r) for r in rows[i : i + 16]]
        for shift in range(last if hide == "far" else 1):  # positions whose distance window ends at the same place
            batch = collate(encoded, list(range(len(encoded))))
            answer = batch["labels"] != -100
            if hide == "question":
                batch["input_ids"] = torch.where(~answer & (batch["attention_mask"] == 1), mask, batch["input_ids"])
            elif hide == "far":
                place = answer.cumsum(-1)
                near = (place % last == shift) | (place > place.max(-1, keepdim=True).values - last)
                batch["input_ids"] = torch.where(answer & ~near, mask, batch["input_ids"])
            n = objective.count(batch)
            total += float(dict(objective.losses(None, view, batch, n, None))["tokens"] * n["tokens"])
            count += float(n["tokens"])
    return total / count


def dependency_profile(model: nn.Module, tokenizer: Any, rows: list[Row]) -> dict[str, float]:
    """How much the answer's loss grows when the question, or all but every k-th answer token, is hidden."""
    clean = losses(model, tokenizer, rows)
    grown = {"question": losses(model, tokenizer, rows, "question") - clean}
    return grown | {f"far {k}": losses(model, tokenizer, rows, "far", k) - clean for k in (2, 4)}


def measure(model: Any, tokenizer: Any, rows: list[Row], seed: int, new: int = 96) -> dict[str, Any]:
    draw = random.Random(seed)
    spoilt = [(r, s) for r in rows if (s := with_a_wrong_step(r, draw))]
    given = [s.rsplit("=", 1)[0] + "=" for _, s in spoilt]  # the same prefix, the result left to the model
    right = exact_match(model, tokenizer, [r for r, _ in spoilt], given, new)
    wrong = exact_match(model, tokenizer, [r for r, _ in spoilt], [s for _, s in spoilt], new)
    return {
        "exact_match": exact_match(model, tokenizer, rows, new=new),
        "held_out_loss": losses(model, tokenizer, rows),
        "drop_after_a_wrong_step": right - wrong,
        "profile": dependency_profile(model, tokenizer, rows),
    }


# ---- the story ------------------------------------------------------------------------------------------------------

MASK = "<unk>"


def load(path: str) -> tuple[Any, Any]:
    global MASK
    if path == "tiny":
        from pegbox.testing import tiny_llama, tiny_tokenizer

        return tiny_llama(), tiny_tokenizer()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(path)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name} if file.is_file() else {
        "pretrained_model_name_or_path": path
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    MASK = "<|endoftext|>"  # of SmolLM2: in the vocabulary, never in an answer (turns end with another token)
    assert tokenizer.convert_tokens_to_ids(MASK) != tokenizer.eos_token_id
    return model, tokenizer


def verdicts(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    pairs = [(r["sft"], r["mft"]) for r in runs.values()]
    gain = statistics.mean(m["exact_match"] - s["exact_match"] for s, m in pairs)
    regular = [m["held_out_loss"] < s["held_out_loss"] and m["train_loss"] > s["train_loss"] for s, m in pairs]
    question = [m["profile"]["question"] > s["profile"]["question"] for s, m in pairs]
    steadier = [m["drop_after_a_wrong_step"] < s["drop_after_a_wrong_step"] for s, m in pairs]
    word = {True: "holds", False: "does not hold"}
    return {
        "A1 exact match +2 points on average": word[gain >= 0.02],
        "A2 held-out loss lower, training loss higher": word[all(regular)],
        "A3 depends more on the question": word[all(question)],
        "B  drops less after a wrong step": word[all(steadier)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "masked_thought.json")
    given = parser.parse_args()
    if not given.smoke and given.data is None:
        parser.error("give --data (and --model), or --smoke")
    began = time.perf_counter()
    base, tokenizer = load("tiny" if given.smoke else given.model)
    rows = invented(40) if given.smoke else read(given.data)
    random.Random(0).shuffle(rows)
    sizes, new = ((16, 8), 6) if given.smoke else ((300, 60), 96)
    training, choosing, test = rows[: sizes[0]], rows[sizes[0] : sum(sizes)], rows[sum(sizes) :]

    def tuned(method: str, rate: float, seed: int) -> tuple[Any, float]:
        model = copy.deepcopy(base)
        return model, train(model, tokenizer, training, method, rate, seed, given.epochs)

    curves: dict[str, dict[str, float]] = {}
    for method in METHODS:
        curves[method] = {}
        for rate in given.rates:
            model, _ = tuned(method, rate, 1000)
            curves[method][str(rate)] = -losses(model, tokenizer, choosing)
            print("choosing", method, rate, curves[method], flush=True)
    best = {method: float(max(curve, key=lambda k: curve[k])) for method, curve in curves.items()}
    runs: dict[str, dict[str, Any]] = {}
    for seed in range(given.seeds):
        runs[str(seed)] = {}
        for method in METHODS:
            model, seen = tuned(method, best[method], seed)
            runs[str(seed)][method] = {"train_loss": seen, **measure(model, tokenizer, test, seed, new)}
            print(seed, method, json.dumps(runs[str(seed)][method]), flush=True)
    record = {
        "slug": "masked-thought",
        "claim": "Masking reasoning steps' inputs regularises: better held-out answers, more weight on the question.",
        "baseline": {"method": "sft", "rate": best["sft"]},
        "method": {**(METHODS["mft"] or {}), "rate_of_learning": best["mft"]},
        "rows": {"train": len(training), "validation": len(choosing), "test": len(test)},
        "epochs": given.epochs,
        "rate_curves": curves,
        "base": measure(base.eval(), tokenizer, test, 0, new),
        "seeds": list(runs),
        "results": runs,
        "verdicts": verdicts(runs),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["verdicts"], indent=1))


if __name__ == "__main__":
    main()
