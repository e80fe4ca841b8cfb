"""Several processes on this machine: a launcher (torch's or accelerate's) starts `pegbox.worker` in each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pegbox.errors import BadInput, PegboxError, RunFailed
from pegbox.parts.files import write_text
from pegbox.recipe import dump_yaml
from pegbox.spec import RunSpec

__all__ = ["launch"]


def launch(
    spec: RunSpec,
    folder: Path,
    *,
    processes: int,
    accelerate: Path | None = None,
    resume: bool = False,
    plugins: Sequence[Path] = (),
) -> None:
    """Run `spec` in `processes` processes and wait. Raises the error class that belongs to the workers' exit code."""
    if accelerate is not None and not accelerate.is_file():
        raise BadInput(f"No accelerate configuration file '{accelerate}'. Make one with `accelerate config`.")
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "run.yaml"
        write_text(settings, dump_yaml(spec.plain()))
        arguments = [str(settings), str(folder), "resume" if resume else "new", *map(str, plugins)]
        code = subprocess.run([*_starter(processes, accelerate), "pegbox.worker", *arguments], check=False).returncode
    if code == 0:
        return
    status = _reason(folder)
    for kind in _subclasses(PegboxError):
        if kind.exit_code == code and code != 1:
            raise kind(status)
    raise RunFailed(status)


def _starter(processes: int, accelerate: Path | None) -> list[str]:
    if accelerate is not None:
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate), "-m"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
    ]


def _reason(folder: Path) -> str:
    from pegbox.workspace import Workspace

    status = Workspace(folder).status()
    return str(status.get("reason") or f"the workers in {folder} ended with an error; their output says which.")


def _subclasses(cls: type[PegboxError]) -> list[type[PegboxError]]:
    return [c for sub in cls.__subclasses__() for c in (sub, *_subclasses(sub))]
