"""What choosing principal weights costs: randomized beside exact decomposition at 2048 x 2048, and a whole refresh.

python benchmarks/sparse_refresh.py [--size 2048] [--rank 64] [--out benchmarks/results/sparse_refresh.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from pegbox.parts.indexsets import overlap
from pegbox.select import SELECT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_refresh.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(options.size, options.size, generator=g)).Q for _ in range(2))
    weight = (left * torch.arange(1.0, options.size + 1) ** -0.7) @ right.T  # a decaying spectrum, as trained ones have
    seconds, chosen = {}, {}
    for method in ("randomized", "exact"):
        block = {"kind": "low_rank_magnitude", "filter_rank": options.rank, "svd": method, "budget": {"density": 0.05}}
        start = time.process_time()
        chosen[method] = SELECT.validate(block).select(None, {"w": weight}, None, g)["w"].index
        seconds[method] = time.process_time() - start
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "size": options.size,
        "rank": options.rank,
        "cpu_seconds": seconds,
        "randomized_over_exact": seconds["randomized"] / seconds["exact"],
        "overlap": overlap(chosen["randomized"], chosen["exact"]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
