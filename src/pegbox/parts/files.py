"""Writing files so that a crash, a full disk or a second process never leaves half a result.

A file is written under a temporary name, synced, then renamed; a folder is filled under a temporary name beside its
place, synced whole, then swapped in. If the process dies between the two renames of a swap, the next reader or writer
finishes it (`recover_folder`), so a previous folder is never lost. Locks are advisory and end with their process.

What this file does not know: what the files mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pegbox.errors import BadInput, Corrupt, PegboxError, RunFailed

if TYPE_CHECKING:  # this file is imported by commands that never need torch
    from torch import Tensor

__all__ = [
    "fsync_tree",
    "lock_folder",
    "read_json",
    "recover_folder",
    "replace_folder",
    "sha256_file",
    "staged_folder",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
    "writing",
]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BLOCK = 1 << 22  # bytes read at a time when hashing


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into errors that say what to do.

    Raises:
        RunFailed: the disk (or the quota) is full.
        BadInput: the place can't be written.
    """
    try:
        yield
    except PegboxError:
        raise
    except Exception as error:  # safetensors wraps the operating system's error in a class of its own
        code = _error_number(error)
        if code in _FULL:
            raise RunFailed(
                f"No space left while writing {path}. Nothing half-written was left; free some space and run again."
            ) from error
        if code in _DENIED:
            raise BadInput(f"{path} can't be written ({os.strerror(code)}). Choose a writable folder.") from error
        raise


def _error_number(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    text = str(error)  # e.g. "... No space left on device (os error 28)"
    _, found, tail = text.rpartition("os error ")
    digits = tail.split(")")[0]
    return int(digits) if found and digits.isdigit() else 0


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name, sync, rename."""
    temporary = _beside(path)
    with writing(path), _removed_on_error(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Tensors are moved to the CPU and made contiguous."""
    from safetensors.torch import save_file

    temporary = _beside(path)
    with writing(path), _removed_on_error(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, str(temporary), metadata=dict(metadata) if metadata else None)
        _fsync_file(temporary)
        os.replace(temporary, path)
        _fsync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `Corrupt` if it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise Corrupt(f"{path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Corrupt(f"{path} is not valid JSON ({error}).") from error


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def fsync_tree(folder: Path) -> None:
    """Make a folder's content durable: every file, then every folder from the inside out."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _fsync_file(Path(root) / name)
        _fsync_folder(Path(root))


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` that takes its place when the block ends well and vanishes when it doesn't.

    A folder that stood at `final` stays whole and readable until the new one is complete and synced.
    """
    final = final.absolute()
    recover_folder(final)
    _sweep(final)
    temporary = _beside(final)
    with writing(final), _removed_on_error(temporary):
        temporary.mkdir(parents=True)
        yield temporary
        fsync_tree(temporary)
        replace_folder(temporary, final)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put the folder `temporary` at `final`, removing what stood there last."""
    old = _old(final)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    _fsync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Finish a swap that a crash cut in two: without a `final`, its predecessor comes back; with one, it goes."""
    old = _old(final)
    if not old.exists():
        return
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):  # another reader was faster
            os.rename(old, final)


@contextmanager
def lock_folder(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of `folder` (made if absent); it ends with the block or the process, whichever comes first.

    Args:
        wait: seconds to wait for another holder; negative waits for ever.

    Raises:
        BadInput: another process holds it, or the folder can't be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=wait)
        try:
            lock.acquire()
        except Timeout:
            raise BadInput(
                f"{folder} is in use by another process. Wait for it to end, or choose another folder."
            ) from None
    try:
        yield
    finally:
        lock.release()


def _beside(path: Path) -> Path:
    """A fresh hidden name in the same folder (so that a rename stays on one file system), telling who made it."""
    path = path.absolute()  # "." has no name
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _old(final: Path) -> Path:
    final = final.absolute()
    return final.with_name(f".{final.name}.old")


def _sweep(final: Path) -> None:
    """Remove temporaries that dead processes of this host left beside `final`."""
    for left in final.parent.glob(f".{final.name}.tmp-{socket.gethostname()}-*"):
        owner = left.name.rsplit("-", 2)[1]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _removed_on_error(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _fsync_file(path: Path) -> None:
    with path.open("rb" if os.name == "posix" else "rb+") as file:
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    if os.name != "posix":  # other systems refuse to open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
