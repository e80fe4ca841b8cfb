"""Kill a training run at random moments until it is done, many times: is a run ever lost, are the weights ever other?

    python benchmarks/kills.py [--kills 50] [--seed 0]

A tiny Llama trains with dropout, shuffling, accumulation, evaluation and a checkpoint at every second step. It is
killed with SIGKILL after a random time, resumed, killed again, and so on; moments inside a checkpoint being written are
made as likely as the rest by aiming half of the kills at them. When it finishes, its weights are compared bit for bit
with those of a run that was never killed, and the next one begins, until the number of kills is reached. Full weights
and LoRA take turns. Writes `benchmarks/results/kills.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from pegbox.data.collate import PaddingCollator  # noqa: E402
from pegbox.engine import TrainSettings, train_stage  # noqa: E402
from pegbox.objectives.base import OBJECTIVE  # noqa: E402
from pegbox.optim.base import OPTIM  # noqa: E402
from pegbox.parts.context import Context  # noqa: E402
from pegbox.tasks.views import CausalView  # noqa: E402
from pegbox.testing import tiny_llama  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "kills.json"
STEPS = 12


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(0, 256, (8 + i % 9,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": ids, "sample_id": i})
    return made


def build(lora: bool) -> Any:
    base = tiny_llama(attention_dropout=0.1, attn_implementation="eager")
    if not lora:
        return base
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))


def train(out: Path, lora: bool) -> None:
    """Train to the end, from wherever the folder stands, and write the final weights."""
    model = build(lora)
    train_stage(
        model,
        CausalView,
        rows(40, 0),
        rows(6, 1),
        PaddingCollator(258),
        OBJECTIVE.validate({"kind": "tokens", "token": {"kind": "sft"}}),
        OPTIM.validate({"kind": "adamw", "lr": 1e-2}),
        [],
        TrainSettings(
            steps=STEPS, batch=8, micro_batch=4, save_every=2, eval_every=4, device="cpu", save_total_limit=2
        ),
        out,
        Context(model=model),
        resume=True,
    )
    final = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(final, str(out / "final.tmp"))
    os.replace(out / "final.tmp", out / "final.safetensors")


def fork(function: Callable[..., None], *args: Any) -> Any:
    """Start it in a process of its own; nothing is imported again. Its output goes to a file."""

    def run() -> None:
        log = open(args[0].with_suffix(".log"), "ab")  # noqa: SIM115 (lives as long as the process)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            function(*args)
        except BaseException as error:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(getattr(error, "exit_code", 1) or 1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def saving(out: Path) -> bool:
    """True while a checkpoint without a manifest lies there: one is being written."""
    folder = out / "checkpoints"
    try:
        return any(not (p / "manifest.json").exists() for p in folder.glob("checkpoint-*"))
    except OSError:
        return False


def kill_somewhere(process: Any, out: Path, draw: random.Random, span: float) -> str | None:
    """Kill the process at a random moment; returns where ("saving", "training"), or None if it was done before."""
    until = time.monotonic() + draw.uniform(0.0, span)
    aimed = draw.random() < 0.5  # at a checkpoint being written, from that moment on
    while process.is_alive():
        hit = saving(out)
        if time.monotonic() >= until and (hit or not aimed):
            if aimed:
                time.sleep(draw.uniform(0.0, 0.02))
                hit = saving(out)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return ("saving" if hit else "training") if process.exitcode == -signal.SIGKILL else None
        time.sleep(0.0005)
    process.join()
    return None


def finish(out: Path, lora: bool, whole: dict[str, torch.Tensor]) -> str:
    """Resume a run until its end and compare its weights with those of the run that was never killed."""
    process = fork(train, out, lora)
    process.join()
    if process.exitcode != 0:
        sys.stderr.write(out.with_suffix(".log").read_text()[-2000:])
        return "lost"
    final = load_file(str(out / "final.safetensors"))
    return "same_weights" if all(torch.equal(final[n], t) for n, t in whole.items()) else "other_weights"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    wanted, seed = vars(parser.parse_args()).values()
    torch.set_num_threads(1)
    build(True)  # import everything before forking
    root, draw = Path(tempfile.mkdtemp(prefix="kills-")), random.Random(seed)
    whole, spans = {}, {}
    for lora in (False, True):
        began = time.monotonic()
        process = fork(train, root / f"whole-{lora}", lora)
        process.join()
        spans[lora] = time.monotonic() - began
        whole[lora] = load_file(str(root / f"whole-{lora}" / "final.safetensors"))
    kills: dict[str, int] = {"training": 0, "saving": 0}
    ends = {"same_weights": 0, "other_weights": 0, "lost": 0}
    runs = skipped = 0
    result: dict[str, Any] = {}
    while sum(kills.values()) < wanted:
        lora, out = runs % 2 == 1, root / f"run-{runs}"
        for _ in range(8):
            where = kill_somewhere(fork(train, out, lora), out, draw, spans[lora])
            if where is None:
                spans[lora] *= 0.8  # it was done before its moment came
                break
            kills[where] += 1
        ends[finish(out, lora, whole[lora])] += 1
        runs += 1
        skipped += len(list((out / "checkpoints").glob("broken-*")))
        shutil.rmtree(out)
        result = {"kills": kills, "runs": runs, **ends, "incomplete_checkpoints_skipped": skipped, "seed": seed}
        result |= {"torch": torch.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    shutil.rmtree(root, ignore_errors=True)
    return 0 if ends["same_weights"] == runs else 1


if __name__ == "__main__":
    sys.exit(main())
