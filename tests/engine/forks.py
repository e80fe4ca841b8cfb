"""Running a function in processes of its own, forked so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["free_port", "in_process", "in_processes"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _child(function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(env)
    try:
        function(*args)
    except BaseException as error:
        traceback.print_exc()
        os._exit(getattr(error, "exit_code", 1) if isinstance(error, Exception) else 1)
    os._exit(0)


def in_processes(function: Callable[..., Any], count: int, *args: Any, timeout: float = 120) -> list[int]:
    """Run `function(*args)` in `count` processes that may form a group; returns their exit codes."""
    context, port = multiprocessing.get_context("fork"), str(free_port())
    workers = []
    for rank in range(count):
        env = {} if count == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        workers.append(context.Process(target=_child, args=(function, args, env)))
        workers[-1].start()
    for worker in workers:
        worker.join(timeout)
        if worker.is_alive():
            worker.kill()
            worker.join()
    return [int(w.exitcode if w.exitcode is not None else -99) for w in workers]


def in_process(function: Callable[..., Any], *args: Any) -> int:
    return in_processes(function, 1, *args)[0]
