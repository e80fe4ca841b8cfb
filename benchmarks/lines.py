"""LiNeS on files: one streamed pass over a checkpoint against copying the file, and the memory it takes.

    python benchmarks/lines.py [--megabytes 512] [--repeats 3]

A random checkpoint of equal blocks in shards of 64 MB, base and tuned, float32 and bfloat16. Copies (to disk, synced)
and passes alternate in one process. Memory is the peak of anonymous resident bytes during a pass over that before it:
mapped pages of the files belong to the system's cache. Writes benchmarks/results/lines.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pegbox.parts.algebra import StateReader, write_state
from pegbox.parts.files import fsync_tree
from pegbox.weights import WEIGHTS

RESULTS = Path(__file__).parent / "results" / "lines.json"
SHARD = 64 << 20
WIDTH = 724
TARGETS = {"speed_over_copy": 0.5, "peak_extra_bytes": 2 * SHARD}


def names(megabytes: int, dtype: torch.dtype) -> list[str]:
    """Blocks of four square matrices."""
    blocks = max(2, megabytes * (1 << 20) // (4 * WIDTH * WIDTH * dtype.itemsize))
    return [f"layers.{i}.attn.{part}.weight" for i in range(blocks) for part in "qkvo"]


def checkpoint(seed: int, megabytes: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name in names(megabytes, dtype):
        yield name, torch.randn(WIDTH, WIDTH, generator=generator).to(dtype)


def write(folder: Path, seed: int, megabytes: int, dtype: torch.dtype) -> None:
    write_state(checkpoint(seed, megabytes, dtype), folder, names(megabytes, dtype), max_shard_bytes=SHARD)


def anonymous() -> int:
    """Resident bytes that are not mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The largest anonymous size while the block runs, over its start."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self.running = False
        self.thread.join()
        self.extra = self.most - self.start


def seconds(job: Callable[[], Any]) -> float:
    before = time.perf_counter()
    job()
    return time.perf_counter() - before


def measure(folder: Path, megabytes: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    base, tuned = folder / "base", folder / "tuned"
    write(base, 0, megabytes, dtype)
    write(tuned, 1, megabytes, dtype)
    size = sum(p.stat().st_size for p in tuned.glob("*.safetensors"))
    op = WEIGHTS.validate({"kind": "lines", "alpha": 0.3})

    def copy() -> None:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(tuned, folder / "copy", copy_function=_plain_copy)
        fsync_tree(folder / "copy")

    def edit() -> None:
        readers = StateReader(base), StateReader(tuned)
        write_state(op.apply(readers[0], [readers[1]], None), folder / "out", readers[0], max_shard_bytes=SHARD)

    copies, passes, extra = [], [], []
    edit()
    for _ in range(repeats):
        copies.append(seconds(copy))
        with Peak() as peak:
            passes.append(seconds(edit))
        extra.append(peak.extra)
    return {
        "bytes": size,
        "copy_seconds": statistics.median(copies),
        "pass_seconds": statistics.median(passes),
        "speed_over_copy": statistics.median(copies) / statistics.median(passes),
        "peak_extra_bytes": max(extra),
    }


def _plain_copy(source: str, target: str) -> None:
    """Read and write every byte (no cloning by the file system)."""
    with open(source, "rb") as read, open(target, "wb") as written:
        while block := read.read(1 << 22):
            written.write(block)
    os.utime(target)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "threads": 1, "torch": torch.__version__},
        "targets": TARGETS,
    }
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            result[str(dtype).removeprefix("torch.")] = measure(Path(folder), given.megabytes, dtype, given.repeats)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
