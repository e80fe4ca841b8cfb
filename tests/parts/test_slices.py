"""Updates of rows and columns: files found where runs leave them, refusals of damaged ones, bounds."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.slices import KIND, Slice, adapter_folder, read_slices


def write(folder, index, values, slices=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    block = {"peft_type": KIND, "coordinates": "delta", "slices": slices or {"a.b": [1, 5]}, "base": "x", **config}
    (folder / "adapter_config.json").write_text(json.dumps(block))
    stem = "base_model.model.a.b.slice_"
    save_file({stem + "index": index, stem + "values": values}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("inner", ["", "adapter", "artefact/adapter"])
def test_it_is_found_in_a_run_an_artefact_or_alone(tmp_path, inner):
    write(tmp_path / inner, torch.tensor([4, 1], dtype=torch.int32), torch.ones(3, 2))
    assert adapter_folder(tmp_path) == tmp_path / inner
    found = read_slices(tmp_path)
    piece = found["a.b.weight"]
    assert (piece.axis, piece.length, piece.shape, piece.mode, found.base) == (1, 5, (3, 5), "add", "x")
    assert piece.index.tolist() == [4, 1]
    assert found.entries() == 6


def test_absolute_values_are_to_be_set(tmp_path):
    write(tmp_path, torch.tensor([1], dtype=torch.int32), torch.ones(3, 1), coordinates="absolute")
    assert read_slices(tmp_path)["a.b.weight"].mode == "set"


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="holds no adapter"):
        read_slices(tmp_path)
    write(tmp_path, torch.tensor([1], dtype=torch.int32), torch.ones(3, 1), peft_type="LORA")
    with pytest.raises(BadInput, match="a 'LORA' adapter"):
        read_slices(tmp_path)
    write(tmp_path, torch.tensor([1], dtype=torch.int32), torch.ones(3, 1), slices={"a.c": [1, 5]})
    with pytest.raises(Corrupt, match="no readable adapter"):
        read_slices(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(Corrupt, match="no readable adapter"):
        read_slices(tmp_path)


@pytest.mark.parametrize(("index", "values"), [([5], (3, 1)), ([-1], (3, 1)), ([1, 1], (3, 2)), ([1], (3, 2))])
def test_positions_lie_inside_and_stand_once(index, values):
    with pytest.raises(BadInput):
        Slice(1, 5, torch.tensor(index), torch.ones(values))
