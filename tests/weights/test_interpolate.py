"""Points between base and tuned model: ends bit for bit, per block and group, Fisher weights, streaming, refusals."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.algebra import StateReader, write_state
from pegbox.parts.anatomy import Anatomy
from pegbox.testing import tiny_llama
from pegbox.weights import WEIGHTS
from pegbox.weights.interpolate import empirical_fisher, fisher_mix, interpolated
from pegbox.weights.sparsify import largest_per_row, rank_part, smallest, sparsify_update


@cache
def pair(dtype=torch.float32, tied=False):
    base = tiny_llama(tie_word_embeddings=tied)
    states = [
        {n: p.detach().to(dtype) for n, p in tiny_llama(s, tie_word_embeddings=tied).named_parameters()} for s in (0, 1)
    ]
    for i, state in enumerate(states):
        state["position_ids"] = torch.tensor([i])
    return Anatomy.of(base), *states


def apply(block, base, tuned, anatomy=None):
    return dict(WEIGHTS.validate({"kind": "interpolate", **block}).apply(base, [tuned], anatomy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ends_are_exact(dtype):
    """a = 0 and a = 1 return the ends bit for bit; integers are the tuned model's in between."""
    _, base, tuned = pair(dtype)
    for amount, expected in ((0.0, base), (1.0, tuned)):
        found = apply({"amount": amount}, base, tuned)
        assert all(torch.equal(found[n], expected[n]) for n in expected if expected[n].is_floating_point())
    assert int(apply({"amount": 0.5}, base, tuned)["position_ids"]) == 1


@settings(max_examples=10)
@given(st.floats(0, 1))
def test_one_amount_everywhere_is_the_global_one(amount):
    """Per-layer constant = global; Fisher equal = linear (1e-12)."""
    anatomy, base, tuned = pair(torch.float64)
    whole = apply({"amount": amount}, base, tuned, anatomy)
    layered = apply({"amount": amount, "blocks": [amount] * 2, "groups": {"head": amount}}, base, tuned, anatomy)
    fisher = {n: torch.full_like(t, 0.3) for n, t in base.items() if t.is_floating_point()}
    equal = dict(interpolated(base, tuned, amount, fisher=(fisher, fisher)))
    for name, value in whole.items():
        assert torch.equal(value, layered[name])
        if value.is_floating_point():
            torch.testing.assert_close(value, equal[name], rtol=0, atol=1e-12)


def test_blocks_and_groups_have_their_own_amounts():
    anatomy, base, tuned = pair()
    found = apply({"amount": 1.0, "blocks": [0.0, 1.0], "groups": {"attention & block 1": 0.0}}, base, tuned, anatomy)
    for name, value in found.items():
        expected = base if ".layers.0." in name or (".layers.1." in name and "self_attn" in name) else tuned
        assert torch.equal(value, expected[name]), name
    by_name = apply({"amount": 1.0, "groups": {"model.layers.0": 0.0}}, base, tuned)
    assert torch.equal(by_name["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_fisher_takes_the_side_that_is_sure():
    base, tuned = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    sure, unsure = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    found = fisher_mix(base, tuned, 0.5, sure, unsure)
    assert found.tolist() == pytest.approx([1e-8, 1.0], abs=2e-8)


def test_fisher_from_files(tmp_path):
    anatomy, base, tuned = pair(torch.float64)
    name = "lm_head.weight"
    for side, level in (("base", 3.0), ("tuned", 1.0)):
        state = {name: torch.full_like(base[name], level)}
        write_state(state.items(), tmp_path / side, state)
    files = {side: str(tmp_path / side / "model.safetensors") for side in ("base", "tuned")}
    found = apply({"amount": 0.5, "fisher": files}, base, tuned, anatomy)
    torch.testing.assert_close(found[name], 0.75 * base[name] + 0.25 * tuned[name])
    other = "model.norm.weight"
    torch.testing.assert_close(found[other], torch.lerp(base[other], tuned[other], 0.5))


def test_empirical_fisher_is_the_mean_of_squares_per_sample():
    net = torch.nn.Linear(2, 1, bias=False).double()
    samples = [torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, -1.0]).double()]
    found = empirical_fisher(net, lambda m, x: m(x).sum(), samples)
    assert found["weight"].tolist() == [[5.0, 2.5]]
    with pytest.raises(BadInput, match="at least one sample"):
        empirical_fisher(net, lambda m, x: m(x).sum(), [])


def test_tied_tensors_come_once():
    anatomy, base, tuned = pair(tied=True)
    assert "lm_head.weight" not in apply({"amount": 0.5}, base, tuned, anatomy)


def test_streaming_equals_in_memory(tmp_path):
    _, base, tuned = pair()
    for name, state in (("base", base), ("tuned", tuned)):
        write_state(state.items(), tmp_path / name, state, max_shard_bytes=20_000)
    readers = [StateReader(tmp_path / name) for name in ("base", "tuned")]
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    streamed, whole = apply({"amount": 0.3}, *readers), apply({"amount": 0.3}, base, tuned)
    assert all(torch.equal(streamed[n], whole[n]) for n in whole)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"amount": 1.5}, "extrapolate"),
        ({"amount": float("nan")}, "finite"),
        ({"blocks": [0.5, -0.1]}, "extrapolate"),
        ({"groups": {"head": 2.0}}, "extrapolate"),
        ({"fisher": {"base": "x"}}, "give both files"),
        ({"floor": 0.0}, "greater than 0"),
    ],
)
def test_bad_amounts(block, words):
    """a outside [0, 1] unless extrapolate; what is not finite."""
    with pytest.raises(BadInput, match=words):
        WEIGHTS.validate({"kind": "interpolate", **block})


def test_extrapolation_can_be_allowed():
    _, base, tuned = pair(torch.float64)
    found = apply({"amount": 1.5, "extrapolate": True}, base, tuned)["model.norm.weight"]
    torch.testing.assert_close(found, torch.lerp(base["model.norm.weight"], tuned["model.norm.weight"], 1.5))


def test_bad_states_layers_and_fisher():
    """Key or shape mismatch (keys named), layers that match nothing, Fisher negative or with other keys."""
    anatomy, base, tuned = pair()
    with pytest.raises(BadInput, match=r"'lm_head\.weight' is not in"):
        apply({}, base, {n: t for n, t in tuned.items() if n != "lm_head.weight"})
    with pytest.raises(BadInput, match=r"'lm_head\.weight' is \(288, 32\)"):
        apply({}, base, {**tuned, "lm_head.weight": tuned["lm_head.weight"][:4]})
    with pytest.raises(BadInput, match="3 amounts for 2 blocks"):
        apply({"blocks": [0.1, 0.2, 0.3]}, base, tuned, anatomy)
    with pytest.raises(BadInput, match="nothing"):
        apply({"groups": {"nothing": 0.5}}, base, tuned, anatomy)
    with pytest.raises(BadInput, match="No amount is given"):
        dict(interpolated(base, tuned, {"lm_head.weight": 0.5}))
    with pytest.raises(BadInput, match="no floating tensor"):
        dict(interpolated(base, tuned, {"position_ids": 0.5}))
    good = {"lm_head.weight": torch.ones_like(base["lm_head.weight"])}
    for bad, words in (
        ({"lm_head.weight": -good["lm_head.weight"]}, "negative"),
        ({"other": torch.ones(1)}, "is not in"),
        ({"lm_head.weight": torch.ones(2)}, "is"),
    ):
        with pytest.raises(BadInput, match=words):
            dict(interpolated(base, tuned, 0.5, fisher=(good, bad)))
    with pytest.raises(BadInput, match="no tensor of these models"):
        dict(interpolated(base, tuned, 0.5, fisher=({"x": torch.ones(1)}, {"x": torch.ones(1)})))


# ---- sparsify


def layers(base):
    return {"first": [n for n in base if ".layers.0." in n]}


@pytest.mark.parametrize("target", ["delta", "weight"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
def test_a_share_of_a_layer_goes_back(target, sparsity):
    """0 is the identity, 1 puts the layer at the base (or zero); the count is exact; other layers bit-identical."""
    _, base, tuned = pair()
    found = dict(sparsify_update(base, tuned, layers(base), sparsity, target=target))
    names = layers(base)["first"]
    total = sum(base[n].numel() for n in names)
    reset = sum(int((found[n] != tuned[n]).sum()) for n in names)
    unmoved = sum(int((tuned[n] == (base[n] if target == "delta" else 0)).sum()) for n in names)
    assert round(sparsity * total) - unmoved <= reset <= round(sparsity * total)
    if sparsity == 1.0:
        for n in names:
            assert torch.equal(found[n], base[n] if target == "delta" else torch.zeros_like(base[n]))
    for n in set(base) - set(names):
        assert torch.equal(found[n], tuned[n])


def test_the_smallest_go_first_ties_by_position():
    values = torch.tensor([3.0, -1.0, 1.0, 0.5, -1.0])
    assert smallest(values, 3).tolist() == [False, True, True, True, False]
    rows = torch.tensor([[3.0, -1.0, 1.0], [0.1, -0.2, 0.1]])
    assert largest_per_row(rows, 1).tolist() == [[True, False, False], [False, True, False]]
    assert largest_per_row(rows, 9).all()


@settings(max_examples=20)
@given(st.integers(0, 100), st.integers(1, 4))
def test_rank_and_row_variants(seed, k):
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(5, 4, generator=generator, dtype=torch.float64)}
    tuned = {"w": torch.randn(5, 4, generator=generator, dtype=torch.float64)}
    low = dict(sparsify_update(base, tuned, {"l": ["w"]}, rank=k))["w"] - base["w"]
    assert int(torch.linalg.matrix_rank(low)) == min(k, 4)
    torch.testing.assert_close(rank_part(low, k), low)
    kept = dict(sparsify_update(base, tuned, {"l": ["w"]}, per_row=k))["w"]
    assert ((kept != base["w"]).sum(1) == k).all()


def test_it_is_a_recipes_operation():
    anatomy, base, tuned = pair()
    op = WEIGHTS.validate({"kind": "sparsify", "layers": ["block 0", "lm_head"], "sparsity": 1.0})
    found = dict(op.apply(base, [tuned], anatomy))
    for name, value in found.items():
        expected = base if ".layers.0." in name or name == "lm_head.weight" else tuned
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"layers": ["block 0"], "sparsity": 1.5}, "less than or equal to 1"),
        ({"layers": []}, "at least 1 item"),
        ({"layers": ["block 0"], "rank": 2, "per_row": 2}, "not both"),
        ({"layers": ["block 0"], "rank": 2, "target": "weight"}, "leave target"),
    ],
)
def test_bad_sparsity(block, words):
    """Sparsity outside [0, 1], no layers, two variants at once."""
    with pytest.raises(BadInput, match=words):
        WEIGHTS.validate({"kind": "sparsify", **block})


def test_layers_must_exist_and_not_overlap():
    anatomy, base, tuned = pair()
    for given_layers, words in ((["nothing"], "nothing"), (["block 0", "mlp"], "in two of the layers")):
        op = WEIGHTS.validate({"kind": "sparsify", "layers": given_layers})
        with pytest.raises(BadInput, match=words):
            dict(op.apply(base, [tuned], anatomy))
    with pytest.raises(BadInput, match="sparsity is a share"):
        dict(sparsify_update(base, tuned, layers(base), 1.5))
    with pytest.raises(BadInput, match="no floating tensor"):
        dict(sparsify_update(base, tuned, {"l": ["position_ids"]}))
