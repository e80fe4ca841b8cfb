"""Evidence for "which weights move": one comparison of all sparse and structured recipes with LoRA and full tuning.

Every recipe of the family has as many trainable weights as LoRA of its published rank where it has a size to set, the
same rows, steps and choice of rates on validation. The task: MAWPS word problems, answered by an equation, right if its
value is (`solved`). Retention beside it: knowledge, arithmetic, English text.

Claims, one per system, as its paper makes them against LoRA or full tuning, told by the comparison's own statistics
(two-level bootstrap, Holm): better than LoRA at equal count, or equal within the margin. Retention stands beside it.

    python evidence/which_weights.py --data arithmetic/mawps [--model smollm2-135m-q4] [--steps 48] [--trials 3]
        [--seeds 3] [--work which-weights] [--recipes lora full lift ...]

About 5 seconds per step of SmolLM2-135M on two cores. `--work` holds the comparison and its page; broken off,
the same command goes on.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import arguments, write_all

FAMILY = ["lift", "lt-sft", "hft", "spiel", "s2ft", "neuroada", "dsee", "sara", "spt", "greentrainer"]
CLAIMS = {
    "lift": "arXiv:2506.00772: principal weights learn more than LoRA at equal count",
    "lt-sft": "arXiv:2110.07560: the weights that move most suffice",
    "hft": "arXiv:2404.18466: half of the matrices learn as much and forget less than all",
    "spiel": "arXiv:2401.16405: sparse tuning with regrowth is as good as LoRA at equal count or better",
    "s2ft": "arXiv:2412.06289: selected heads and channels are as good as LoRA at equal count or better",
    "neuroada": "arXiv:2510.18940: a few weights per neuron are as good as LoRA at equal count or better",
    "dsee": "arXiv:2111.00160: low rank with a sparse rest is as good as LoRA",
    "sara": "arXiv:2409.06633: the smallest weights learn the task and keep the prior",
    "spt": "arXiv:2303.08566: budgets placed by sensitivity are as good as LoRA or better",
    "greentrainer": "arXiv:2309.13192: half of the FLOPs give the quality of full tuning",
}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


# ---- the task


def solved(answer: str, row: Any) -> bool:
    """Whether the answer's equation comes to the row's number (its reference equation's value), within 1e-3."""
    return _equal(_value(answer), _value(row.messages[-1]["content"]))


def _equal(got: float | None, wanted: float | None) -> bool:
    return got is not None and wanted is not None and abs(got - wanted) <= 1e-3 * max(1.0, abs(wanted))


def _value(equation: str) -> float | None:
    """The value of "X=(8.0*(5.0+7.0))": numbers and + - * / alone; None for anything else."""
    text = equation.strip().partition("\n")[0].lower().removeprefix("x").strip().removeprefix("=").strip()
    try:
        return _evaluated(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError, OverflowError):
        return None


def _evaluated(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_evaluated(node.left), _evaluated(node.right)))
    raise ValueError("not arithmetic")


def rows_of(folder: Path, work: Path, tests: int, validation: int) -> dict[str, Path]:
    """MAWPS as prompt and completion: train as it is, validation and test shuffled with a fixed seed and cut."""
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, file, count in (
        ("train", "trainset", None),
        ("valid", "validset", validation),
        ("test", "testset", tests),
    ):
        records = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
        records = [r for r in records if _equal(_value(r["equation"]), float(r["ans"]))]
        random.Random(0).shuffle(records)
        found[name] = work / f"{name}.jsonl"
        lines = [
            json.dumps({"prompt": f"Write the equation.\n{r['original_text']}", "completion": r["equation"]})
            for r in records[:count]
        ]
        found[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


# ---- the comparison and what it says


def compared(args: argparse.Namespace) -> Any:
    from pegbox.compare import compare

    rows = rows_of(args.data, args.work / "rows", args.tests, 60)
    return compare(
        list(args.recipes),
        out=args.work / "comparison",
        model=args.model,
        data=[str(rows["train"])],
        eval_data=[str(rows["valid"])],
        test_data=[str(rows["test"])],
        metric=f"{Path(__file__).resolve()}:solved",
        steps=args.steps,
        batch=8,
        max_length=256,
        max_new_tokens=32,
        seeds=args.seeds,
        trials=args.trials,
        match="params",
        select="last",
        reference="lora",
        estimate=False,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


def records(found: Any, seeds: int) -> list[dict[str, Any]]:
    """One record per system that was compared."""
    return [_record(found, entry, seeds) for entry in found.entries if entry.name in CLAIMS]


def _record(found: Any, entry: Any, seeds: int) -> dict[str, Any]:
    common = {
        "slug": entry.name,
        "claim": f"{CLAIMS[entry.name]} (MAWPS, SmolLM2-135M)",
        "baseline": "LoRA, as many trainable weights where the recipe has a size, same rows, steps, tuning",
        "method": f"recipe {entry.name}, {'; '.join(entry.flags) or 'size matched'}",
        "seeds": list(range(1, seeds + 1)),
    }
    if entry.status != "finished":
        return {**common, "results": {"status": entry.status, "reason": entry.reason}, "verdict": "inconclusive"}
    told = entry.verdicts["target"][found.primary]
    results = {
        "solved": {e.name: e.scores["target"][found.primary].value for e in found.entries if "target" in e.scores},
        "difference": [told.value, told.low, told.high],
        "words": told.verdict,
        "retention": {name: score.value for name, score in entry.scores.get("retention", {}).items()},
        "trainable": entry.cost.trainable_parameters if entry.cost else None,
        "rate": entry.rate.value if entry.rate else None,
    }
    return {**common, "results": results, "verdict": _judged(told), "summary": _summary(results, entry.name)}


def _judged(told: Any) -> str:
    """Holds where the recipe is better than or, within the margin, equal to the reference."""
    words = str(told.verdict)
    return "does not hold" if words == "worse" else "holds" if words.startswith(("better", "equal")) else "inconclusive"


def _summary(results: dict[str, Any], name: str) -> str:
    low, high = results["difference"][1:]
    ours, theirs = results["solved"][name], results["solved"].get("lora", float("nan"))
    return f"solved {ours:.1%}, LoRA {theirs:.1%}; difference {results['difference'][0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--data", type=Path, required=True, help="MAWPS: trainset.json, validset.json, testset.json"
        )
        parser.add_argument("--model", default="smollm2-135m-q4")
        parser.add_argument("--steps", type=int, default=48)
        parser.add_argument("--trials", type=int, default=3)
        parser.add_argument("--tests", type=int, default=150)
        parser.add_argument("--work", type=Path, default=Path("which-weights"))
        parser.add_argument("--recipes", nargs="+", default=["lora", "full", *FAMILY])

    args = arguments("which_weights", __doc__, 3, extend)
    found = compared(args)
    write_all(args.out, records(found, args.seeds))


if __name__ == "__main__":
    main()
