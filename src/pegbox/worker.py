"""One process of several: what `pegbox.launch` starts. Runs a settings file in a folder and ends with its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pegbox.errors import PegboxError
from pegbox.spec import RunSpec

__all__ = ["worker"]


def worker(arguments: Sequence[str]) -> int:
    """One process: settings file, run folder, "new" or "resume", plugins. Returns the exit code."""
    import torch.distributed as dist

    from pegbox.parts.plugins import load_plugins
    from pegbox.recipe import parse_yaml
    from pegbox.run import execute

    settings, folder, how, *plugins = arguments
    load_plugins(plugins)
    spec = RunSpec.of(parse_yaml(Path(settings).read_text(encoding="utf-8"), settings))
    if not dist.is_initialized():
        import torch

        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        execute(spec, Path(folder), resume=how == "resume", progress=True)
    except PegboxError as error:
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1:]))
