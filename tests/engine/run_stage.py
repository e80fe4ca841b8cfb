"""A program for tests that need processes of their own: trains the tiny model and writes its final weights.

python run_stage.py OUT '{"lora": false, "sharding": "none", ...}' [resume]
Environment of a launcher (RANK, WORLD_SIZE, ...) makes it one of several processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

torch.set_num_threads(1)

from helpers import examples, model, stage, weights  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from pegbox.engine import Listener, LogRecord  # noqa: E402
from pegbox.engine.distributed import full, is_main  # noqa: E402
from pegbox.errors import PegboxError  # noqa: E402
from pegbox.optim.base import OPTIM  # noqa: E402


class Trouble(Listener):
    """Kills or stops this process at a given step's record."""

    def __init__(self, kill_at: int | None, term_at: int | None, slow: float):
        self.kill_at, self.term_at, self.slow = kill_at, term_at, slow

    def record(self, record: LogRecord) -> None:
        if record.event == "step":
            time.sleep(self.slow)
            if record.step == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if record.step == self.term_at:
                os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    lora, dropout = options.pop("lora", False), options.pop("dropout", 0.1)
    trouble = Trouble(options.pop("kill_at", None), options.pop("term_at", None), options.pop("slow", 0.0))
    if options.pop("evaluation", False):
        options |= {"eval_set": examples(6, 1), "eval_every": 2}
    if "step" in options:
        options["step"] = OPTIM.validate(options["step"])
    net: Any = model(lora, attention_dropout=dropout)
    if not dropout and lora:
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    try:
        outcome, net = stage(out, net=net, callbacks=[trouble], resume=len(sys.argv) > 3, **options)
    except PegboxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    final = {n: full(p) for n, p in weights(net).items()}
    if is_main():
        save_file(final, str(out / "final.safetensors"))
        (out / "outcome.json").write_text(json.dumps({"log": outcome.log, "best": outcome.best}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
