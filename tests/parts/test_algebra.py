"""State-dict algebra: readers, arithmetic, exact order statistics, the streaming writer."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.algebra import (
    StateReader,
    check_alike,
    difference,
    ema_,
    interpolate,
    l1_norm,
    magnitude_threshold,
    weighted_sum,
    write_state,
)


def state(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7, generator=g).to(dtype),
        "b.bias": torch.randn(3, generator=g).to(dtype),
        "ids": torch.arange(4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shard", [1, 150, 1 << 20])
def test_written_stream_reads_back_bit_for_bit(tmp_path, dtype, shard):
    tensors = {**state(dtype=dtype), "odd": torch.ones(3, dtype=torch.uint8), "flag": torch.tensor(True)}
    tensors["last"] = torch.randn(2, 2)
    files = write_state(tensors.items(), tmp_path / "out", tensors, max_shard_bytes=shard)
    reader = StateReader(tmp_path / "out")
    assert set(reader) == set(tensors)
    for name, tensor in tensors.items():
        assert reader[name].dtype == tensor.dtype
        assert torch.equal(reader[name], tensor)
        assert reader.shape(name) == tuple(tensor.shape)
    together = {}
    for file in files:
        together |= load_file(file)  # the official reader agrees
    assert all(torch.equal(together[n], t) for n, t in tensors.items())
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith("part-")]
    if shard == 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_reader_of_a_file_and_of_shards_without_index(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"y": torch.zeros(2)}, tmp_path / "two.safetensors")
    assert set(StateReader(tmp_path / "one.safetensors")) == {"x"}
    both = StateReader(tmp_path)
    assert len(both) == 2
    assert "y" in both
    with pytest.raises(KeyError):
        both["z"]


def test_reader_refuses_pickles_damage_and_holes(tmp_path):
    with pytest.raises(BadInput, match="No safetensors"):
        StateReader(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="only pickles"):
        StateReader(tmp_path)
    with pytest.raises(BadInput, match="not a safetensors file"):
        StateReader(tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(200)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-8])
    with pytest.raises(Corrupt, match="damaged"):
        StateReader(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(Corrupt, match="gone"):
        StateReader(tmp_path)


def test_writer_refuses_wrong_streams_and_leaves_nothing(tmp_path):
    a = torch.ones(2)
    for stream, names, said in [
        ([("a", a), ("a", a)], ["a"], "twice"),
        ([("a", a)], ["a", "b"], "never came"),
        ([("c", a)], ["a"], "without being expected"),
        ([("a", torch.ones(2, dtype=torch.complex64))], ["a"], "can't hold"),
    ]:
        with pytest.raises(BadInput, match=said):
            write_state(stream, tmp_path / "out", names)
        assert not list(tmp_path.iterdir())


def test_a_failing_stream_keeps_the_folder_that_stood_there(tmp_path):
    write_state([("a", torch.ones(2))], tmp_path / "out", ["a"])

    def failing():
        yield "a", torch.zeros(2)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_state(failing(), tmp_path / "out", ["a", "b"])
    assert torch.equal(StateReader(tmp_path / "out")["a"], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_interpolation_is_exact_at_its_ends_and_rounded_once(dtype):
    base, tuned = state(0, dtype)["a.weight"], state(1, dtype)["a.weight"]
    assert interpolate(base, tuned, 0.0) is base
    assert torch.equal(interpolate(base, tuned, 1.0), tuned)
    exact = base.double() + 0.3 * (tuned.double() - base.double())
    torch.testing.assert_close(
        interpolate(base, tuned, 0.3), exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=5e-7
    )


def test_sums_differences_norms():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    assert weighted_sum([a, b], [2.0, -1.0]).tolist() == [1.5, -8.0]
    assert a.tolist() == [1.0, -2.0]  # inputs are left alone
    assert difference(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert difference(a.double(), b).dtype == torch.float64
    assert l1_norm([a, b]) == 7.5
    with pytest.raises(BadInput):
        weighted_sum([], [])


def test_ema_follows_its_closed_form():
    average = {"w": torch.zeros(2, dtype=torch.float64), "n": torch.tensor(0)}
    for _ in range(5):
        ema_(average, {"w": torch.ones(2, dtype=torch.float64), "n": torch.tensor(7)}, 0.9)
    assert average["w"][0].item() == pytest.approx(1 - 0.9**5, abs=1e-14)
    assert average["n"].item() == 7


def test_other_names_and_shapes_are_refused_with_both():
    base = state()
    with pytest.raises(BadInput, match=r"'b.bias' is not in the tuned model"):
        check_alike(base, {k: v for k, v in base.items() if k != "b.bias"})
    with pytest.raises(BadInput, match=r"'new' is not in the base"):
        check_alike(base, {**base, "new": torch.ones(1)})
    with pytest.raises(BadInput, match=r"\(5, 7\) in the base and \(7, 5\)"):
        check_alike(base, {**base, "a.weight": base["a.weight"].T})


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    cut=st.integers(0, 60),
    rank=st.integers(1, 60),
    double=st.booleans(),
)
def test_magnitude_threshold_is_kthvalue(values, cut, rank, double):
    flat = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
    parts = [flat[:cut], flat[cut:]]
    rank = min(rank, len(values))
    assert magnitude_threshold(lambda: parts, rank) == float(flat.abs().kthvalue(rank).values)


def test_magnitude_threshold_refuses_a_rank_outside():
    with pytest.raises(BadInput, match="rank 4"):
        magnitude_threshold(lambda: [torch.ones(3)], 4)
