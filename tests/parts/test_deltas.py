"""Difference files: exact there and back in every dtype, algebra, refusals, and composable-sft's format."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import GOLDEN
from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase
from pegbox.parts import deltas
from pegbox.parts.composable_sft import decode, read_composable_sft
from pegbox.parts.deltas import Delta, Piece

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 4), "a.bias": (5,), "b.weight": (3, 2, 2)}
    return {n: (torch.randn(s, generator=g) * scale).to(dtype) for n, s in shapes.items()}


def sparse(dtype=torch.float32, seed=1):
    return Delta(
        {
            "a.weight": Piece((5, 4), tensors(dtype, seed)["a.weight"].flatten()[:6], torch.arange(0, 12, 2).int()),
            "b.weight": Piece((3, 2, 2), tensors(dtype, seed)["b.weight"]),
        }
    )


def equal(a, b):
    return all(torch.equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_revert_is_exact_also_for_two_that_overlap_in_any_order(dtype):
    base = tensors(dtype)
    for order in ((1, 2), (2, 1)):
        here = {n: t.clone() for n, t in base.items()}
        undos = [deltas.apply(sparse(seed=s), here) for s in order]
        assert not equal(here, base)
        for undo in reversed(undos):
            deltas.revert(undo)
        assert equal(here, base)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 50), power=st.integers(-12, 12))
@settings(max_examples=25, deadline=None)
def test_a_difference_of_values_reproduces_the_tuned_tensors_exactly(dtype, seed, power):
    base, tuned = tensors(dtype, seed), tensors(dtype, seed + 1, 2.0**power)
    tuned["a.bias"] = base["a.bias"].clone()
    delta = deltas.difference(base, tuned)
    assert "a.bias" not in delta
    deltas.apply(delta, base)
    assert equal(base, tuned)


def test_a_difference_of_changes_is_near_and_composes():
    base, tuned = tensors(), tensors(seed=3)
    delta = deltas.difference(base, tuned, mode="add")
    assert deltas.density(delta) == 1.0
    deltas.apply(delta, base)
    for name in tuned:
        torch.testing.assert_close(base[name], tuned[name], rtol=0, atol=1e-6)
    small = deltas.difference(tensors(), {n: t + 1e-9 for n, t in tensors().items()}, mode="add", threshold=1e-7)
    assert not small


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_files_come_back_as_they_were(tmp_path, values):
    delta = Delta({n: Piece(p.shape, p.values.to(values), p.index, p.mode) for n, p in sparse().items()})
    delta["a.bias"] = Piece((5,), torch.ones(2, dtype=values), torch.tensor([1, 3], dtype=torch.int64), "set")
    deltas.save(delta, tmp_path / "d.safetensors", {"base": "x"})
    back = deltas.load(tmp_path / "d.safetensors")
    assert list(back) == list(delta)
    for name, piece in delta.items():
        assert (back[name].mode, back[name].shape) == (piece.mode, piece.shape)
        assert torch.equal(back[name].values, piece.values)
        assert (back[name].index is None) == (piece.index is None)
        assert piece.index is None or torch.equal(back[name].index, piece.index)


def test_eight_bytes_per_entry(tmp_path):
    k = 20000
    delta = Delta({"w": Piece((500, 400), torch.randn(k), torch.arange(k, dtype=torch.int32))})
    assert delta.nbytes() == 8 * k
    deltas.save(delta, tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").stat().st_size <= 8 * k * 1.01


def test_sums_scales_and_intersections_are_those_of_dense_tensors():
    a, b = sparse(seed=1), sparse(seed=2)
    b["a.weight"] = Piece((5, 4), torch.ones(3), torch.tensor([2, 3, 19], dtype=torch.int32))
    dense = {n: deltas.dense(a[n]) + deltas.dense(b[n]) for n in a}
    for first, second in ((a, b), (b, a)):
        total = deltas.add(first, second)
        for name in a:
            torch.testing.assert_close(deltas.dense(total[name]), dense[name])
    assert deltas.add(a, b)["a.weight"].index.tolist() == [0, 2, 3, 4, 6, 8, 10, 19]
    torch.testing.assert_close(deltas.dense(deltas.scale(a, -2.0)["a.weight"]), -2 * deltas.dense(a["a.weight"]))
    mixed = deltas.compose([a, b], [2.0, 0.5])
    want = 2 * deltas.dense(a["a.weight"]) + 0.5 * deltas.dense(b["a.weight"])
    torch.testing.assert_close(deltas.dense(mixed["a.weight"]), want)
    assert deltas.intersection(a, b)["a.weight"].index.tolist() == [2]
    assert deltas.overlaps(a, b) == {"a.weight": 1 / 3, "b.weight": 1.0}
    conflict = deltas.sign_conflicts(a, deltas.scale(a, -1.0))
    assert set(conflict.values()) == {1.0}
    assert set(deltas.sign_conflicts(a, a).values()) == {0.0}


def test_values_can_not_be_added_or_scaled():
    whole = deltas.difference(tensors(), tensors(seed=4))
    with pytest.raises(Unsupported, match="values, not as a change"):
        deltas.add(whole, whole)
    with pytest.raises(Unsupported, match="values, not as a change"):
        deltas.scale(whole, 2.0)
    with pytest.raises(BadInput, match="2 differences but 1 weights"):
        deltas.compose([sparse(), sparse()], [1.0])


def test_nothing_is_written_where_something_does_not_fit():
    base = tensors()
    before = {n: t.clone() for n, t in base.items()}
    wrong = Delta({**sparse(), "c.weight": Piece((1,), torch.ones(1))})
    with pytest.raises(WrongBase, match=r"c\.weight"):
        deltas.apply(wrong, base)
    with pytest.raises(WrongBase, match="shape"):
        deltas.apply(Delta({"a.bias": Piece((4,), torch.ones(4))}), base)
    assert equal(base, before)
    deltas.apply(wrong, base, strict=False)
    assert not equal(base, before)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    deltas.save(sparse(), path)
    whole = path.read_bytes()
    for damage in (whole[:-5], whole[:20], b"", b"pickle" * 10):
        path.write_bytes(damage)
        with pytest.raises(Corrupt):
            deltas.load(path)
    bad = Delta({"w": Piece((3,), torch.ones(2), torch.tensor([2, 1], dtype=torch.int32))})
    deltas.save(bad, path)
    with pytest.raises(Corrupt, match="sorted"):
        deltas.load(path)
    bad = Delta({"w": Piece((3,), torch.ones(2), torch.tensor([1, 7], dtype=torch.int32))})
    deltas.save(bad, path)
    with pytest.raises(Corrupt, match="sorted"):
        deltas.load(path)


def encode(dense):
    """composable-sft's coding: sorted positions with the first dimension fastest, as steps."""
    at = dense.nonzero()
    multipliers = np.cumprod([1, *dense.shape[:-1]])
    flat = (at.numpy() * multipliers).sum(1)
    order = np.argsort(flat)
    values = dense[tuple(at.T)].numpy()[order]
    return {"size": list(dense.shape), "index_steps": list(np.diff(flat[order], prepend=0)), "values": list(values)}


def test_official_files_are_read_and_nothing_else_in_them_is_run(tmp_path):
    dense = torch.zeros(3, 4, 2)
    dense.view(-1)[[1, 5, 8, 23]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    head = torch.randn(2, 3)
    path = tmp_path / "pytorch_diff.bin"
    torch.save({"diffs": {"w": encode(dense), "empty": encode(torch.zeros(2))}, "abs": {"head": head}}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # why an allowance is needed at all
    delta = read_composable_sft(path)
    assert delta["w"].index.tolist() == [1, 5, 8, 23]
    assert torch.equal(deltas.dense(delta["w"]).view(3, 4, 2), dense)
    assert torch.equal(delta["head"].values, head)
    assert delta["head"].mode == "set"
    assert "empty" not in delta

    class Hostile:
        def __reduce__(self):
            return (exec, ("raise SystemExit('run')",))

    torch.save({"diffs": {"w": Hostile()}, "abs": {}}, path)
    with pytest.raises(Corrupt, match="readable"):
        read_composable_sft(path)
    path.write_bytes(b"nothing")
    with pytest.raises(Corrupt):
        read_composable_sft(path)


GOLDEN_SFT = GOLDEN / "lt-sft" / "cases.json"


@pytest.mark.skipif(not GOLDEN_SFT.is_file(), reason=f"no golden vectors in {GOLDEN_SFT.parent}")
def test_official_codings_decode_to_their_dense_matrices():
    for case, described in json.loads(GOLDEN_SFT.read_text()).items():
        data = np.load(GOLDEN_SFT.parent / f"{case}.npz")
        for name, coded in described["official_encoding"].items():
            piece = decode(coded)
            want = torch.from_numpy(data[f"sft/diff_dense/{name}"])
            torch.testing.assert_close(deltas.dense(piece).view(want.shape).double(), want, rtol=0, atol=1e-12)


def test_a_difference_does_not_count_twice():
    """Applied again without being reverted it is refused; on other tensors, reverted, or on purpose it is not."""
    delta, here = sparse(seed=1), tensors()
    before = {n: t.clone() for n, t in here.items()}
    undo = deltas.apply(delta, here)
    with pytest.raises(BadInput, match=r"stands on 'a\.weight' already"):
        deltas.apply(delta, here)
    deltas.apply(delta, tensors())
    twice = deltas.apply(delta, here, again=True)
    deltas.revert(twice)
    deltas.revert(undo)
    assert equal(here, before)
    deltas.revert(deltas.apply(delta, here))
    assert equal(here, before)
