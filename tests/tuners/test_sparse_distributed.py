"""The sparse tuner over two processes: DDP (with a refresh) and fully_shard give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sparse_two_processes.py")


@pytest.mark.distributed_slow
@pytest.mark.parametrize("mode", ["ddp", "fully_shard"])
def test_two_processes_equal_one(mode):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), mode]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "OK" in done.stdout
