"""Directions that are regenerated, not stored: the official stream, any order, the three distributions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.parts import directions as module
from pegbox.parts.directions import Directions, check_directions


def tensors(*shapes, dtype=torch.float32):
    return {f"t{i}": torch.zeros(s, dtype=dtype) for i, s in enumerate(shapes)}


def whole(directions, seed, params):
    parts = {name: [] for name in params}
    for name, piece, z in directions.walk(seed, params):
        assert piece.shape == z.shape
        assert piece.dtype == z.dtype
        parts[name].append(z.reshape(-1))
    return {n: torch.cat(p).view(params[n].shape) for n, p in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 5, 16, 31, 48, 49, 100, 1000])
def test_sequential_is_the_official_stream_however_it_is_cut(monkeypatch, dtype, numel):
    monkeypatch.setattr(module, "_PIECE", 32)
    params = tensors((numel,), (3, 7), dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        official = [torch.normal(mean=0, std=1, size=p.shape, dtype=dtype) for p in params.values()]
    got = whole(Directions("sequential"), 11, params)
    assert all(torch.equal(g, o) for g, o in zip(got.values(), official, strict=True))


@pytest.mark.parametrize("scheme", ["sequential", "keyed"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
def test_access_in_any_order_equals_the_walk(scheme, distribution):
    params = tensors((40, 3), (7,), (2, 2, 5))
    directions = Directions(scheme, distribution)
    walked = whole(directions, 5, params)
    noise = directions.access(5, params)
    for name in ("t2", "t0", "t1", "t0"):
        assert torch.equal(noise(name), walked[name])


def test_keyed_noise_of_a_tensor_depends_on_its_name_alone():
    params = tensors((6,), (6,))
    keyed = whole(Directions("keyed"), 1, params)
    alone = whole(Directions("keyed"), 1, {"t1": params["t1"]})
    assert torch.equal(keyed["t1"], alone["t1"])
    assert not torch.equal(keyed["t0"], keyed["t1"])
    assert not torch.equal(keyed["t0"], whole(Directions("keyed"), 2, params)["t0"])


def test_non_contiguous_tensors_are_walked_whole():
    params = {"t": torch.zeros(4, 6).T}
    ((_, piece, z),) = Directions().walk(0, params)
    assert piece is params["t"]
    assert z.shape == (6, 4)


def test_distributions():
    params = tensors((200, 50), (300,))
    bits = whole(Directions("keyed", "rademacher"), 3, params)["t0"]
    assert set(bits.unique().tolist()) == {-1.0, 1.0}
    assert abs(bits.mean().item()) < 0.05
    normal = whole(Directions("keyed", "gaussian"), 3, params)["t0"]
    assert normal.std().item() == pytest.approx(1.0, abs=0.03)
    sphere = Directions("keyed", "sphere")
    factor = sphere.radius_factor(3, params)
    squares = sum(float((factor * z).double().square().sum()) for z in whole(sphere, 3, params).values())
    assert math.sqrt(squares) == pytest.approx(math.sqrt(10_300), rel=1e-6)
    assert Directions().radius_factor(3, params) == 1.0


def test_the_hosts_random_state_does_not_move():
    before = torch.get_rng_state()
    whole(Directions("sequential"), 1, tensors((5,)))
    whole(Directions("keyed"), 1, tensors((5,)))
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000))
def test_pieces_cover_everything_and_never_end_in_a_crumb(numel):
    module_piece = module._PIECE
    try:
        module._PIECE = 64
        cuts = list(module._pieces(numel))
    finally:
        module._PIECE = module_piece
    assert cuts[0][0] == 0
    assert cuts[-1][1] == numel
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    assert all(start % 16 == 0 for start, _ in cuts)
    assert len(cuts) == 1 or cuts[-1][1] - cuts[-1][0] >= 16


def test_refusals():
    with pytest.raises(ValueError, match="no tensor"):
        check_directions({})
    with pytest.raises(ValueError, match="int8"):
        check_directions({"w": torch.zeros(2, dtype=torch.int8)})
