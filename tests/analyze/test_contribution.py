"""The decomposition of a forward pass into base and tuning: exact, bounded, blind to padding and form of update."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parts.pair_models import adapted, batch_of, eager, moved, two_models
from pegbox.analyze.contribution import bound, last_positions, share, tuning_contribution
from pegbox.errors import BadInput
from pegbox.parts.pairs import ModelPair


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_parts_sum_to_the_stream(dtype, tolerance):
    """x_0 + PTC + FTC = x_L at the last token, within 1e-5 relative in float32 and 1e-12 in float64."""
    base = eager().to(dtype)
    found = tuning_contribution(ModelPair(moved(base), base), batch_of(9, 6, 2))
    error = (found.start + found.base_sum + found.tuned_sum - found.end).norm() / found.end.norm()
    assert float(error) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_so_they_do_at_every_token(dtype, tolerance):
    base = eager().to(dtype)
    pair, batch = ModelPair(moved(base), base), batch_of(8, 8)
    with torch.no_grad():
        walk = pair.begin(batch)
        start, below_sum, above_sum = walk.hidden.clone(), 0.0, 0.0
        for _ in range(len(pair)):
            x, below, above = pair.step(walk)
            below_sum, above_sum = below_sum + (below - x), above_sum + (above - below)
    assert float((start + below_sum + above_sum - walk.hidden).norm() / walk.hidden.norm()) <= tolerance
    found = tuning_contribution(pair, batch, tokens=True)
    expected = share(below_sum, above_sum)
    assert torch.allclose(found.per_token, expected, atol=1e-6)
    assert torch.allclose(found.all_tokens[:, -1], share(below_sum.flatten(1), above_sum.flatten(1)), atol=1e-6)
    assert torch.allclose(found.per_token[:, -1], found.tuco, atol=1e-6)


def test_equal_models_give_exactly_zero():
    """Base = tuned: TuCo exactly 0, PreCo 1."""
    base = eager()
    found = tuning_contribution(ModelPair(moved(base, 0.0), base), batch_of(7, 3), tokens=True, output=True)
    assert found.tuco.tolist() == [0.0, 0.0]
    assert found.preco.tolist() == [1.0, 1.0]
    assert found.output.tolist() == [0.0, 0.0]
    assert float(found.beta.max()) == 0.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3))
def test_swapped_roles_give_the_other_share(a, b):
    """The formula with roles swapped is PreCo; both sum to 1 exactly."""
    base, tuned = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    tuco = share(base, tuned)
    assert 0 <= float(tuco) <= 1
    assert float(tuco + (1 - tuco)) == 1.0
    if float(base.abs().sum() + tuned.abs().sum()) > 0:
        assert float(share(tuned, base)) == pytest.approx(1 - float(tuco), abs=1e-12)


def test_preco_and_tuco_sum_to_one():
    found = tuning_contribution(two_models(), batch_of(9, 5, 3))
    assert torch.equal(found.tuco + found.preco, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side):
    """A padded batch equals its rows one at a time, within 1e-5; the last token is the last that is no padding."""
    pair, batch = two_models(), batch_of(9, 4, 6, side=side)
    together = tuning_contribution(pair, batch, tokens=True, output=True)
    for i in range(3):
        ids = batch["input_ids"][i][batch["attention_mask"][i] == 1][None]
        alone = tuning_contribution(pair, {"input_ids": ids}, tokens=True, output=True)
        for name in ("tuco", "curve", "base_sum", "end", "output", "all_tokens"):
            assert torch.allclose(getattr(together, name)[i], getattr(alone, name)[0], atol=1e-5), name
        inside = together.per_token[i][batch["attention_mask"][i] == 1]
        assert torch.allclose(inside, alone.per_token[0], atol=1e-5)
        assert int(together.per_token[i].isnan().sum()) == int((batch["attention_mask"][i] == 0).sum())


def test_an_adapter_gives_what_two_models_give():
    """The route with adapters off equals the route with two models, within 1e-6; merged or not, within 1e-5."""
    base, batch = eager(), batch_of(8, 5)
    shared = tuning_contribution(ModelPair(adapted(base)), batch, output=True)
    two = tuning_contribution(ModelPair(adapted(base), base), batch, output=True)
    merged = tuning_contribution(ModelPair(adapted(base).merge_and_unload(), base), batch, output=True)
    for name in ("tuco", "curve", "output"):
        assert torch.allclose(getattr(shared, name), getattr(two, name), atol=1e-6), name
        assert torch.allclose(getattr(shared, name), getattr(merged, name), atol=1e-5), name
    assert float(shared.tuco.min()) > 0.01


def test_every_position_counts():
    """Taking the base's attention to earlier tokens away changes TuCo at the last token."""
    pair, batch = two_models(), batch_of(9)
    before = float(tuning_contribution(pair, batch).tuco)
    with torch.no_grad():
        for layer in pair.base.model.layers:
            layer.self_attn.forward = _only_self(layer.self_attn)
    after = float(tuning_contribution(pair, batch).tuco)
    assert abs(after - before) > 1e-4


def _only_self(attention):
    """Attention in which each position sees itself alone."""
    original = type(attention).forward

    def forward(hidden_states, *args, attention_mask=None, **kwargs):
        n = hidden_states.shape[1]
        mask = torch.full((n, n), torch.finfo(hidden_states.dtype).min).fill_diagonal_(0)[None, None]
        return original(attention, hidden_states, *args, attention_mask=mask, **kwargs)

    return forward


def test_a_vanishing_adapter_has_a_vanishing_share():
    """B scaled towards 0: TuCo goes to 0, monotonically."""
    values = [
        float(tuning_contribution(ModelPair(adapted(eager(), c)), batch_of(7)).tuco) for c in (1, 0.3, 0.1, 0.01, 0)
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0
    assert 0 < values[-2] < 0.05


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 0.6))
def test_the_groenwall_bound_holds(seed, scale):
    """On linear blocks, whose Lipschitz constants and suprema are exact."""
    generator = torch.Generator().manual_seed(seed)
    blocks, width = 3, 4
    base = [0.2 * torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(blocks)]
    tuned = [b + scale * 0.2 * torch.randn(width, width, generator=generator, dtype=torch.float64) for b in base]
    x = plain = torch.randn(width, generator=generator, dtype=torch.float64)
    lipschitz = max(float(b.abs().sum(0).max()) for b in base)
    largest, betas = 0.0, []
    base_sum, tuned_sum = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for b, t in zip(base, tuned):
        largest = max(largest, float((b @ x).abs().sum()))
        base_sum, tuned_sum = base_sum + b @ x, tuned_sum + (t - b) @ x
        betas.append(float(share(base_sum, tuned_sum)))
        x, plain = x + t @ x, plain + b @ plain
    assert float((x - plain).abs().sum()) <= bound(blocks, largest, lipschitz, max(betas)) * (1 + 1e-12)


def test_the_bound_at_its_ends():
    assert bound(3, 1.0, 0.5, 0.0) == 0.0
    assert bound(3, 1.0, 0.5, 1.0) == math.inf
    with pytest.raises(BadInput, match="share"):
        bound(3, 1.0, 0.5, 1.5)


def test_empty_prompts_are_refused():
    """An empty prompt, a row of padding alone, and a norm that is none."""
    pair = two_models()
    with pytest.raises(BadInput, match="empty prompt"):
        tuning_contribution(pair, {"input_ids": torch.zeros(1, 0, dtype=torch.long)})
    batch = batch_of(4, 3)
    batch["attention_mask"][1] = 0
    with pytest.raises(BadInput, match="Row 1"):
        tuning_contribution(pair, batch)
    with pytest.raises(BadInput, match="norm"):
        tuning_contribution(pair, batch_of(4), norm=0.5)
    assert last_positions(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])).tolist() == [2, 0]


def test_the_cost_is_two_passes():
    """One more block than two passes, and no head; three passes with the plain base's final state."""
    calls = {"base": 0, "tuned": 0, "head": 0}

    def counting(name):
        def hook(*_):
            calls[name] += 1

        return hook

    pair = two_models()
    for name, model in (("base", pair.base), ("tuned", pair.tuned)):
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(counting(name))
        model.lm_head.register_forward_hook(counting("head"))
    tuning_contribution(pair, batch_of(6))
    assert calls == {"base": 3, "tuned": 4, "head": 0}
    tuning_contribution(pair, batch_of(6), output=True)
    assert calls == {"base": 3 + 3 + 4, "tuned": 8, "head": 0}


def test_no_states_of_the_layers_are_kept():
    """Memory in use after a block does not grow with the number of blocks (one stream and two vectors a row)."""
    import gc
    import weakref

    pair, alive = two_models(num_hidden_layers=6), []
    seen = []

    def watch(module, args, output):
        alive[:] = [ref for ref in alive if ref() is not None]
        seen.append(len({id(ref()) for ref in alive}))  # handed-through states are one tensor
        alive.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    for layer in [*pair.tuned.model.layers, *pair.base.model.layers]:
        layer.register_forward_hook(watch)
    gc.disable()
    try:
        tuning_contribution(pair, batch_of(8, 8))
    finally:
        gc.enable()
    assert max(seen) <= 4
