"""What runs inside the sandbox, before the untrusted program and around it: limits first, then the program.

    python -I -S -B sandbox_child.py CONFIG          CONFIG: JSON, see `main`

Started as a script of its own, with the standard library alone, so that nothing of the parent is there to be reached.
On Linux (x86-64, ARM64) the kernel keeps the limits: Landlock allows writing beneath the box only, and a seccomp filter
refuses sockets, new processes, signals to others, and changes of owner or mode. Elsewhere, or where the kernel has
neither, an audit hook of Python does as much as it can for Python programs; compiled ones then have limits of time,
memory and file size only. Reading is not restricted.

What this file does not do: choose limits, or judge what happened (`sandbox.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import struct
import sys
import types
from typing import Any

# --- Landlock: no writing outside -----------------------------------------------------------------------------------

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_WRITES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # write, remove and make anything
_SINCE = ((2, 1 << 13), (3, _TRUNCATE), (5, 1 << 15))  # refer, truncate, ioctl on devices, by version
_NO_NEW_PRIVILEGES, _SECCOMP = 38, 22


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The kernel's Landlock version, 0 where it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(_libc().syscall(_CREATE, None, 0, 1)))


def _landlock(folder: str) -> bool:
    """From now on only files beneath `folder` (and /dev/null) can be written, made or removed."""
    libc, version = _libc(), landlock_version()
    if not version:
        return False
    access = _WRITES | sum(bit for since, bit in _SINCE if version >= since)
    words = [access, 3 if version >= 4 else 0, 3 if version >= 6 else 0]  # files; TCP; abstract sockets, signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = ctypes.create_string_buffer(struct.pack("QQQ", *words), 24)
    ruleset = libc.syscall(_CREATE, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    for path, allowed in ((folder, access), ("/dev/null", access & (_WRITE_FILE | _TRUNCATE))):
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, handle), 12)
        libc.syscall(_ADD, ruleset, 1, rule, 0)
        os.close(handle)
    done = libc.syscall(_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done


# --- seccomp: no network, no processes ------------------------------------------------------------------------------

# Numbers of system calls: refused outright, then those that are looked at.
_CALLS: dict[str, dict[str, Any]] = {
    "x86_64": {
        "arch": 0xC000003E,
        "refused": (
            *(41, 57, 58, 62, 90, 91, 92, 93, 94, 101, 109, 112, 165, 188, 189, 190, 200, 250, 260, 268),
            *(272, 308, 321, 425, 452),
        ),
        "clone": 56,
        "clone3": 435,
        "tgkill": 234,
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "refused": (5, 6, 7, 40, 52, 53, 54, 55, 97, 117, 129, 130, 154, 157, 198, 219, 268, 280, 425, 452),
        "clone": 220,
        "clone3": 435,
        "tgkill": 131,
    },
}
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # BPF operations
_ALLOW, _KILL, _REFUSE, _ABSENT = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
_THREAD = 0x00010000  # CLONE_THREAD


def _filter(calls: dict[str, Any], pid: int) -> list[tuple[int, int, int, int]]:
    """The program over (number, architecture, arguments): (operation, jump if true, jump if false, value)."""
    # Each block loads what it looks at and ends in a return, or falls through to the next.
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, calls["arch"]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32's own table
        (_RETURN, 0, 0, _KILL),
    ]
    for number in calls["refused"]:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    program += [(_EQUAL, 0, 1, calls["clone3"]), (_RETURN, 0, 0, _ABSENT)]  # libraries then use clone
    program += [
        (_EQUAL, 0, 4, calls["clone"]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, _THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    program += [
        (_EQUAL, 0, 4, calls["tgkill"]),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 0, 1, pid),  # abort() signals its own process
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _seccomp() -> bool:
    calls = _CALLS.get(platform.machine())
    if calls is None or not sys.platform.startswith("linux"):
        return False
    program = _filter(calls, os.getpid())
    packed = b"".join(struct.pack("HBBI", *line) for line in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)), 16)
    return _libc().prctl(_SECCOMP, 2, head, 0, 0) == 0


# --- limits without the kernel's help -------------------------------------------------------------------------------

_REFUSED_EVENTS = (
    *("socket.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "pty."),
    *(
        "ctypes.",
        "os.chmod",
        "os.chown",
        "os.setxattr",
        "signal.pthread_kill",
        "_posixsubprocess",
        "mmap.",
        "os.killpg",
    ),
)
_PATH_EVENTS = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _audit(folder: str) -> None:
    """A hook that can't be taken out again; what a program does without asking Python escapes it."""
    root = os.path.realpath(folder)
    inside, real, words = root + os.sep, os.path.realpath, (str, bytes, os.PathLike)

    def outside(path: Any) -> bool:
        if not isinstance(path, words):
            return False
        return not (real(os.fsdecode(path)) + os.sep).startswith(inside)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            refused = outside(args[0]) and args[0] != os.devnull
        elif event.startswith(_PATH_EVENTS):
            refused = any(outside(a) for a in args)
        else:
            refused = event.startswith(_REFUSED_EVENTS)
        if refused:
            raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(hook)


def _resources(config: dict[str, Any]) -> None:
    try:
        import resource
    except ImportError:
        return  # not on Windows
    wanted = {
        "RLIMIT_CPU": int(config["seconds"]) + 1,
        "RLIMIT_FSIZE": config["file_bytes"],
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 256,
    }
    if config["memory"]:
        wanted["RLIMIT_AS"] = config["memory"]
    if not config["processes"]:
        wanted["RLIMIT_NPROC"] = 64  # counts the user's processes; the filter is what forbids them
    for name, value in wanted.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))


def confine(config: dict[str, Any]) -> dict[str, bool]:
    """Set every limit on this process, for good. Says which of the kernel's are in force."""
    if config["kernel"] and sys.platform.startswith("linux"):
        _libc().prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    files = bool(config["kernel"]) and _landlock(config["box"])
    calls = bool(config["kernel"]) and not config["processes"] and _seccomp()
    _resources(config)
    return {"files": files, "calls": calls}


# --- the program ----------------------------------------------------------------------------------------------------


def _run_python(paths: list[str], sentinel: str) -> None:
    """Run the files one after the other in one module, then print the sentinel; it is printed by no other way out."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    write = os.write
    for path in paths:
        with open(path, encoding="utf-8") as file:
            code = compile(file.read(), os.path.basename(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)
    sys.stdout.flush()
    write(1, f"\n{sentinel}\n".encode())


def main() -> None:
    """CONFIG: box, seconds, memory, file_bytes, processes (may it make any), kernel, and `argv` (a program to become)
    or `python` (files to run here). The sentinel comes on standard input, if at all."""
    config = json.loads(sys.argv[1])
    sentinel = sys.stdin.readline().strip()
    sys.argv = ["candidate"]
    os.chdir(config["box"])
    held = confine(config)
    if config.get("argv"):
        os.execv(config["argv"][0], config["argv"])
    if not (held["files"] and held["calls"]):
        _audit(config["box"])
    _run_python(config["python"], sentinel)


if __name__ == "__main__":
    main()
