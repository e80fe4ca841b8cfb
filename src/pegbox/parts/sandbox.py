"""The sandbox: run a program that nobody trusts, with limits on time, memory, files, network and processes.

    run(["/usr/bin/prog"], box) -> Outcome          run_python([file, ...], box) -> Outcome

A run is a process group of its own in an own folder, with an own environment, killed whole when its time is up; what
keeps the other limits is in `sandbox_child.py`. A program has `finished` only if it printed a sentinel, a random word
that is made for each run and printed behind the last test: leaving early by `exit(0)` is no success.

`languages.py` compiles and tests candidates with it. What it does not do: hide files from reading, or stand against a
program that looks the sentinel up in its own process.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pegbox.errors import BadInput
from pegbox.parts import sandbox_child

__all__ = ["DEFAULT", "Limits", "Outcome", "Status", "box", "isolation", "run", "run_python"]

Status = Literal["passed", "failed", "left_early", "timeout", "memory", "not_compiled"]
_CHILD = Path(sandbox_child.__file__)


class Limits(BaseModel):
    """What a program may use.

    Args:
        seconds: wall-clock time of a run; processor time is held to about the same.
        compile_seconds: of a compiler. memory: bytes of address space (of heap for Java). file_bytes: of any one file.
        output_bytes: kept of what it printed, from the end.
        kernel: use the kernel's isolation where there is any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    compile_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    memory: Annotated[int, Field(ge=1 << 26)] = 1 << 30
    file_bytes: Annotated[int, Field(ge=1)] = 1 << 24
    output_bytes: Annotated[int, Field(ge=0)] = 1 << 14
    kernel: bool = True


DEFAULT = Limits()


class Outcome(BaseModel):
    """How a run ended.

    status: passed (all of it ran) | failed (an error, or a non-zero exit) | left_early (exit 0 before the last test)
    | timeout | memory | not_compiled. output: the end of what it printed, errors behind it. seconds: wall-clock.
    """

    model_config = ConfigDict(frozen=True)

    status: Status
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def isolation() -> dict[str, bool]:
    """What the kernel can enforce here: `files` (writes stay in the box), `calls` (no network, no processes)."""
    linux = sys.platform.startswith("linux")
    return {
        "files": sandbox_child.landlock_version() > 0,
        "calls": linux and os.uname().machine in sandbox_child._CALLS,
    }


@contextmanager
def box() -> Iterator[Path]:
    """A fresh folder for one candidate, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="pegbox-box-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


def run_python(files: Sequence[Path], folder: Path, limits: Limits = DEFAULT) -> Outcome:
    """Run Python files one after the other in one name space; passed if the last one reached its end."""
    return _run({"python": [str(f) for f in files]}, folder, limits, secrets.token_hex(16), limits.seconds)


def run(
    argv: Sequence[str],
    folder: Path,
    limits: Limits = DEFAULT,
    *,
    sentinel: str | None = None,
    compiling: bool = False,
    limit_memory: bool = True,
) -> Outcome:
    """Run a program.

    Args:
        argv: the program's absolute path and its arguments.
        sentinel: passed only if it printed this line and exited with 0; None: exit 0 is enough.
        compiling: a compiler: other time, and it may start processes.
        limit_memory: hold its address space to `limits.memory` (a JVM reserves more than it uses).
    """
    if not argv or not Path(argv[0]).is_file():
        raise BadInput(f"The program '{argv[0] if argv else ''}' does not exist. Give its absolute path.")
    seconds = limits.compile_seconds if compiling else limits.seconds
    return _run({"argv": list(argv)}, folder, limits, sentinel, seconds, compiling, limit_memory)


def _run(
    job: dict[str, Any],
    folder: Path,
    limits: Limits,
    sentinel: str | None,
    seconds: float,
    compiling: bool = False,
    limit_memory: bool = True,
) -> Outcome:
    config = {
        **job,
        "box": str(folder),
        "seconds": seconds,
        "memory": limits.memory if limit_memory and not compiling else 0,
        "file_bytes": limits.file_bytes,
        "processes": compiling,
        "kernel": limits.kernel,
    }
    argv = [sys.executable, "-I", "-S", "-B", str(_CHILD), json.dumps(config)]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:  # files: endless output can't fill memory
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        late = _wait(process, "" if "argv" in job else sentinel or "", seconds)
        took = time.perf_counter() - began
        said, complained = _tail(out, limits.output_bytes), _tail(errors, limits.output_bytes)
    reached = sentinel is None or said.rstrip().rpartition("\n")[2].strip() == sentinel
    if sentinel is not None:
        said = said.replace(sentinel, "").rstrip("\n")
    status = _status(process.returncode, reached, late, complained)
    return Outcome(status=status, output="\n".join(t for t in (said, complained) if t), seconds=took)


def _wait(process: subprocess.Popen[bytes], word: str, seconds: float) -> bool:
    """Until it ends or its time is up; then everything of its group is killed. Says whether it was late."""
    late = False
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(f"{word}\n".encode())
            process.stdin.close()
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return late


def _status(code: int, reached: bool, late: bool, complained: str) -> Status:
    if late or code == -signal.SIGXCPU:
        return "timeout"
    if code == 0:
        return "passed" if reached else "left_early"
    if any(word in complained for word in ("MemoryError", "std::bad_alloc", "OutOfMemoryError")):
        return "memory"
    return "failed"


def _tail(file: Any, size: int) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - size - 64))  # the sentinel's line beside what is asked for
    return str(file.read().decode("utf-8", errors="replace"))


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of the caller's: no keys, no proxies, no paths into its packages."""
    home = str(folder)
    path = os.pathsep.join(("/usr/local/bin", "/usr/bin", "/bin"))
    return {"PATH": path, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
