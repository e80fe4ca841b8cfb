"""The six measurements against closed forms."""

from __future__ import annotations

import pytest
import torch

from pegbox.analyze import spectra
from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries, Whole


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_is_one_for_the_same_space_and_p_over_n_for_unrelated_ones():
    w = randn(60, 40)
    assert spectra.alignment(w, w, 10) == pytest.approx(1.0, abs=1e-12)
    assert spectra.alignment(w, 3 * w, 10) == pytest.approx(1.0, abs=1e-12)
    scores = [spectra.alignment(randn(60, 40, seed=i), randn(60, 40, seed=100 + i), 10) for i in range(8)]
    assert sum(scores) / len(scores) == pytest.approx(10 / 40, abs=0.05)
    assert spectra.alignment(w, randn(60, 40, seed=1), 999) == pytest.approx(1.0)  # all vectors: the whole space
    assert spectra.alignment(
        torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2
    ) == (pytest.approx(0.5))


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_rank_of_an_update(rank):
    w = randn(20, 12)
    update = randn(20, rank, seed=1) @ randn(rank, 12, seed=2) if rank else torch.zeros(20, 12, dtype=torch.float64)
    assert spectra.update_rank(w, w + update) == rank
    assert spectra.update_rank(w.float(), (w + update).float()) == rank or rank == 0


def test_norm_change_and_histogram():
    w = torch.diag(torch.tensor([3.0, 1.0]))
    assert spectra.norm_change(w, 2 * w) == pytest.approx(3.0)
    moved = w.clone()
    moved[0, 1], moved[1, 0] = 0.5, -0.25
    counts, edges = spectra.update_histogram(w, moved, bins=4)
    assert counts.tolist() == [0, 1, 0, 1]
    assert (edges[0], edges[-1]) == (-0.5, 0.5)
    counts, _ = spectra.update_histogram(w, w)
    assert counts.sum() == 0


def test_overlap_of_selections():
    a = Allocation({"w": Entries(torch.tensor([0, 1, 2])), "v": Entries(torch.tensor([5])), "n": Whole()})
    b = Allocation({"w": Entries(torch.tensor([2, 3])), "n": Whole()})
    assert spectra.mask_overlap(a, b) == {"w": 0.5}


def test_noise_comes_off_again_bit_for_bit_also_after_an_error():
    tensors = {"w": torch.randn(50, 4), "v": torch.randn(7).to(torch.bfloat16)}
    before = {n: t.clone() for n, t in tensors.items()}
    where = Allocation({"w": Entries(torch.arange(0, 200, 2)), "v": Entries(torch.tensor([1]))})
    seen = []
    for seed in (0, 0, 1):
        with spectra.perturbed(tensors, where, 0.5, seed):
            change = (tensors["w"] - before["w"]).flatten()
            assert (change[1::2] == 0).all()
            assert change[::2].std() == pytest.approx(0.5, abs=0.15)
            seen.append(change)
        assert all(torch.equal(tensors[n], before[n]) for n in tensors)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    with pytest.raises(ZeroDivisionError), spectra.perturbed(tensors, where):
        raise ZeroDivisionError
    assert all(torch.equal(tensors[n], before[n]) for n in tensors)
    with pytest.raises(BadInput, match="not among"), spectra.perturbed({}, where):
        pass
    with pytest.raises(BadInput, match="chosen entries"), spectra.perturbed(tensors, Allocation({"w": Whole()})):
        pass


def test_all_matrices_of_two_models():
    before = {"w": randn(6, 5), "b": randn(6), "gone": randn(3, 3)}
    after = {"w": before["w"].clone(), "b": randn(6, seed=1)}
    after["w"][2, 3] += 0.1
    found = spectra.compare_spectra(before, after, top=3)
    assert set(found) == {"w"}
    assert (found["w"].moved, found["w"].update_rank) == (1, 1)
    with pytest.raises(BadInput, match="shape"):
        spectra.compare_spectra({"w": randn(2, 3)}, {"w": randn(3, 2)})
