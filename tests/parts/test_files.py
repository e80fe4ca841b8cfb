"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pegbox.errors import BadInput, Corrupt, RunFailed
from pegbox.parts import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_holds_what_was_given_and_leaves_nothing_beside(tmp_path):
    files.write_text(tmp_path / "sub" / "a.txt", "größer\n")
    files.write_json(tmp_path / "sub" / "b.json", {"x": [1, 2]})
    files.write_tensors(tmp_path / "sub" / "c.safetensors", {"t": torch.arange(6).reshape(2, 3).T}, {"made": "here"})
    assert (tmp_path / "sub" / "a.txt").read_text(encoding="utf-8") == "größer\n"
    assert files.read_json(tmp_path / "sub" / "b.json") == {"x": [1, 2]}
    assert names(tmp_path / "sub") == ["a.txt", "b.json", "c.safetensors"]


def test_nan_is_refused_in_json_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"x": float("nan")})
    assert files.read_json(path) == {"x": 1}


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_reading_bad_json_names_the_file(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(Corrupt, match=r"a\.json"):
        files.read_json(path)


def test_a_failed_block_leaves_the_former_folder_whole(tmp_path):
    final = tmp_path / "artefact"
    with files.staged_folder(final) as place:
        (place / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), files.staged_folder(final) as place:
        (place / "a").write_text(str(1 / 0))
    assert (final / "a").read_text() == "1"
    assert names(tmp_path) == ["artefact"]


def test_the_former_folder_is_replaced_whole(tmp_path):
    final = tmp_path / "artefact"
    for content in ("1", "2"):
        with files.staged_folder(final) as place:
            (place / content).write_text(content)
    assert names(final) == ["2"]
    assert names(tmp_path) == ["artefact"]


def test_a_swap_cut_in_two_is_finished_by_the_next_reader(tmp_path, monkeypatch):
    final = tmp_path / "artefact"
    with files.staged_folder(final) as place:
        (place / "a").write_text("1")
    real, calls = os.rename, []

    def dies_at_the_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt), files.staged_folder(final) as place:
        (place / "a").write_text("2")
    monkeypatch.undo()
    assert not final.exists()
    files.recover_folder(final)
    assert (final / "a").read_text() == "1"
    assert names(tmp_path) == ["artefact"]


@pytest.mark.parametrize(
    ("number", "expected", "words"),
    [
        (errno.ENOSPC, RunFailed, "No space left"),
        (errno.EDQUOT, RunFailed, "No space"),
        (errno.EROFS, BadInput, "writ"),
    ],
)
def test_the_systems_refusals_become_clear_errors(tmp_path, monkeypatch, number, expected, words):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    for write in (
        lambda: files.write_text(tmp_path / "a.txt", "x"),
        lambda: files.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}),
        lambda: _stage(tmp_path / "folder"),
    ):
        with pytest.raises(expected, match=words):
            write()
    assert names(tmp_path) == []


def _stage(folder: Path) -> None:
    with files.staged_folder(folder) as place:
        (place / "a").write_text("x")


def test_a_real_limit_on_the_file_size_leaves_no_half_written_tensors(tmp_path):
    code = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\nfrom pegbox.errors import RunFailed\n"
        "from pegbox.parts.files import write_tensors\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try:\n    write_tensors(Path(sys.argv[1]), {'x': torch.ones(100000)})\n"
        "except RunFailed:\n    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], check=False)
    assert done.returncode == 7
    assert names(tmp_path) == []


def test_what_dead_processes_left_is_swept(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pegbox.parts.files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as place:\n    (place / 'a').write_text('x')\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "artefact")], check=False)
    assert len(names(tmp_path)) == 1
    _stage(tmp_path / "artefact")
    assert names(tmp_path) == ["artefact"]


def _try_lock(folder: Path, answer) -> None:
    try:
        with files.lock_folder(folder):
            answer.put("got it")
    except BadInput as error:
        answer.put(str(error))


def test_a_folders_lock_is_held_against_other_processes_and_released(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    for held in (True, False):
        if held:
            with files.lock_folder(tmp_path / "run"):
                child = context.Process(target=_try_lock, args=(tmp_path / "run", answers))
                child.start()
                child.join()
            assert "in use by another process" in answers.get()
        else:
            _try_lock(tmp_path / "run", answers)
            assert answers.get() == "got it"


def test_the_hash_of_a_file_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256_file(tmp_path / "a") == known
