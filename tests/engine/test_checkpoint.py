"""A checkpoint folder counts only when it is complete."""

from __future__ import annotations

import json

import pytest
import torch

from pegbox.engine import checkpoint
from pegbox.engine.checkpoint import CheckpointStore, load_tensors, load_tree, save_tensors, save_tree
from pegbox.engine.resume import compare_settings
from pegbox.errors import BadInput, Corrupt, RunFailed


def write(store: CheckpointStore, step: int, value: float = 0.0) -> None:
    with store.opened(step) as folder:
        save_tensors(folder / "model.safetensors", {"w": torch.full((4,), value)})
        save_tree(folder, "state", {"step": step, "m": torch.ones(2)})
    store.seal(step)


def test_the_newest_complete_one_is_found(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.newest() is None
    for step in (2, 10, 9):
        write(store, step, step)
    assert store.steps() == [10, 9, 2]
    assert store.newest() == tmp_path / "checkpoint-10"
    assert torch.equal(load_tensors(store.newest() / "model.safetensors")["w"], torch.full((4,), 10.0))
    assert load_tree(store.newest(), "state")["step"] == 10


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: _truncate(f / "model.safetensors"), "bytes instead of"),
        (lambda f: _flip(f / "model.safetensors"), "checksum"),
    ],
)
def test_a_damaged_one_is_moved_aside_with_a_notice_and_the_one_before_is_taken(tmp_path, damage, what):
    store, notices = CheckpointStore(tmp_path), []
    write(store, 1)
    write(store, 2)
    damage(store.folder(2))
    assert store.newest(notices.append) == store.folder(1)
    assert len(notices) == 1
    assert what in notices[0]
    assert not store.folder(2).exists()
    assert (tmp_path / "broken-checkpoint-2.0").is_dir()
    write(store, 2)  # the place is free again
    damage(store.folder(2))
    store.newest(notices.append)
    assert (tmp_path / "broken-checkpoint-2.1").is_dir()


@pytest.mark.parametrize("best", [None, 1])
def test_rotation_keeps_the_newest_and_the_best(tmp_path, best):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        write(store, step)
    store.rotate(best)
    assert store.steps() == [4, 3] + ([1] if best else [])


def _write_until_full(store: CheckpointStore, step: int) -> None:
    with store.opened(step) as folder:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_one_before_and_says_so(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    with pytest.raises(RunFailed, match=r"step 2 .*No space left.*step 1 is intact.*--resume"):
        _write_until_full(store, 2)
    assert store.steps() == [1]
    assert store.fault(1) is None


def test_a_folder_that_holds_checkpoints_is_refused_without_resume(tmp_path):
    store = CheckpointStore(tmp_path)
    store.refuse_if_any()
    write(store, 1)
    with pytest.raises(BadInput, match="--resume"):
        store.refuse_if_any()


def test_a_pickle_in_the_place_of_tensors_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(Corrupt, match="not a readable safetensors file"):
        load_tensors(tmp_path / "model.safetensors")


def test_the_manifest_lists_every_file(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    manifest = json.loads((store.folder(1) / checkpoint.MANIFEST).read_text())
    assert set(manifest) == {"model.safetensors", "state.safetensors", "state.json"}


def test_changed_settings_are_named_with_both_values():
    before = {"train": {"batch": 8, "seed": 0}, "identity": None}
    assert compare_settings(before, json.loads(json.dumps(before))) == []
    assert compare_settings(before, {"train": {"batch": 16, "seed": 0}, "identity": None, "world": 2}) == [
        "train.batch: 8 in the checkpoint, 16 now",
        "world: None in the checkpoint, 2 now",
    ]
