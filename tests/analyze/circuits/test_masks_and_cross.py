"""Masks over components, activations from another model, attention cut off."""

import copy

import pytest
import torch

from analyze.circuits.casts import family, llama, prompts, same, snapshot
from parts.pair_models import adapted
from pegbox.analyze.circuits import (
    Head,
    HeadView,
    Part,
    Patch,
    Triples,
    accuracy,
    capture,
    cross_accuracy,
    cross_logits,
    gap_closed,
    head_parts,
    knockout,
    learn_mask,
    lora_rank_sites,
    mlp_sites,
    patched_accuracy,
)  # fmt: skip
from pegbox.analyze.circuits.activations import last_logits, taken
from pegbox.analyze.circuits.cutting import knocked_logits
from pegbox.analyze.circuits.heads import check_alike
from pegbox.analyze.circuits.masks import mask_loss, masked_logits
from pegbox.errors import BadInput
from pegbox.parts.pairs import ModelPair

MEMBERS = [("last", Head(1, 2)), ("mid", Head(0, 1)), ("early", Head(2, 0)), ("mid", Head(1, 3))]


def triples(rows=4):
    return Triples(prompts(rows, lengths=None), prompts(rows, seed=1))


def tuned_of(base, scale=0.1):
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in tuned.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return tuned


# ---- masks


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("resume", [True, False])
def test_the_mask_is_the_mix(name, resume):
    """Logits and the mask's gradient equal autograd through the explicit mix, and finite differences."""
    view, both = HeadView(family(name)), triples()
    parts = head_parts(view, MEMBERS)
    mask = torch.tensor([0.3, 0.9, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    logits = masked_logits(view, parts, both, mask, resume=resume)
    loss = mask_loss(logits, both.base.right(), mask, 0.02)
    (grad,) = torch.autograd.grad(loss, [mask])

    source = capture(view, both.source)
    explicit = mask.detach().clone().requires_grad_()

    def mix(i, position, head):
        site, at = view.site("o", *head), both.base.at(position)
        theirs = taken(source["o", head.layer][torch.arange(4), both.source.at(position)], site)

        def act(x):
            own = taken(x[torch.arange(4), at], site)
            return Patch(site, explicit[i] * own + (1 - explicit[i]) * theirs, at)(x)

        return site, act

    wanted = last_logits(view, both.base, [mix(i, p, h) for i, (p, h) in enumerate(MEMBERS)])
    whole = -wanted.gather(-1, both.base.right()[:, None]).mean() + 0.02 * (1 - explicit).sum()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(whole, [explicit])[0], rtol=0, atol=1e-5)
    step = 1e-3
    for i in range(4):
        up, down = (mask.detach().clone() for _ in range(2))
        up[i], down[i] = min(up[i] + step, 1), max(down[i] - step, 0)
        width = float(up[i] - down[i])
        values = [
            mask_loss(masked_logits(view, parts, both, m, resume=resume), both.base.right(), m, 0.02)
            for m in (up, down)
        ]
        assert float(values[0] - values[1]) / width == pytest.approx(float(grad[i]), abs=5e-3)


@torch.no_grad()
def test_the_ends_of_a_mask():
    """m = 1 is the base's run, m = 0 the full patch."""
    view, both = HeadView(llama()), triples()
    parts = head_parts(view, MEMBERS)
    for resume in (True, False):
        ones = masked_logits(view, parts, both, torch.ones(4), resume=resume)
        torch.testing.assert_close(ones, last_logits(view, both.base), rtol=0, atol=1e-5)
        source = capture(view, both.source)
        patches = []
        for position, head in MEMBERS:
            site = view.site("o", *head)
            value = taken(source["o", head.layer][torch.arange(4), both.source.at(position)], site)
            patches.append(Patch(site, value, both.base.at(position)))
        zeros = masked_logits(view, parts, both, torch.zeros(4), resume=resume)
        torch.testing.assert_close(zeros, last_logits(view, both.base, patches), rtol=0, atol=1e-5)


def test_any_component_can_be_masked():
    """MLP outputs and LoRA ranks as components; with all ranks from another prompt the logits move."""
    base = llama(dtype=torch.float32)
    view, both = HeadView(adapted(base, 3.0)), triples()
    sites = [*mlp_sites(view), *lora_rank_sites(view)[:6]]
    parts = [Part(site, "mid") for site in sites]
    mask = torch.full((len(parts),), 0.5, requires_grad=True)
    found = [masked_logits(view, parts, both, mask, resume=r) for r in (True, False)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-4)
    (grad,) = torch.autograd.grad(found[0].sum(), [mask])
    assert (grad != 0).tolist() == [i != 2 for i in range(9)]  # the last MLP at "mid" is seen by nothing


def test_a_mask_finds_the_component_that_carries_the_target():
    """The target is what the source makes of one head at the last token: that head is chosen, and others are not."""
    view = HeadView(llama(num_hidden_layers=2))
    both = Triples(prompts(64), prompts(64, seed=1))
    carrier = ("last", Head(1, 2))
    with torch.no_grad():
        patched = masked_logits(view, head_parts(view, [carrier]), both, torch.zeros(1))
    both = Triples(both.base.asking(patched.argmax(-1)), both.source)
    parts = head_parts(view, [("last", Head(1, h)) for h in range(4)])
    before = snapshot(view.model)
    found = learn_mask(
        view, parts, both, lam=0.2, lr=0.2, epochs=8, batch=8, generator=torch.Generator().manual_seed(0)
    )
    assert found.chosen == [2]
    assert found.test == 1.0
    assert same(before, snapshot(view.model))
    again = learn_mask(
        view, parts, both, lam=0.2, lr=0.2, epochs=8, batch=8, generator=torch.Generator().manual_seed(0)
    )
    assert again.history == found.history
    assert patched_accuracy(view, parts, both, found.mask) == 1.0
    assert patched_accuracy(view, parts, both, torch.ones(4)) == accuracy(view, both.base)


def test_bad_masks():
    """lambda below 0, masks of other sizes and values, no components, too few triples."""
    view, both = HeadView(llama()), triples()
    parts, generator = head_parts(view, MEMBERS), torch.Generator().manual_seed(0)
    with pytest.raises(BadInput, match="not negative, got -1"):
        learn_mask(view, parts, both, lam=-1, generator=generator)
    with pytest.raises(BadInput, match="not negative"):
        mask_loss(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), torch.ones(1), -0.1)
    with pytest.raises(BadInput, match=r"each of the 4 components"):
        masked_logits(view, parts, both, torch.ones(3))
    with pytest.raises(BadInput, match=r"value in \[0, 1\]"):
        masked_logits(view, parts, both, torch.full((4,), 2.0))
    with pytest.raises(BadInput, match="no components"):
        learn_mask(view, [], both, generator=generator)
    with pytest.raises(BadInput, match="2 triples do not fill"):
        learn_mask(view, parts, triples(2), generator=generator)
    with pytest.raises(BadInput, match="4 base and 3 source"):
        Triples(prompts(4), prompts(3))


# ---- another model's activations


@torch.no_grad()
@pytest.mark.parametrize("mode", ["output", "q", "k", "v", "kv"])
def test_from_a_model_into_itself(mode):
    """Patching from a model into itself is the identity, bit for bit."""
    view, given = HeadView(llama()), prompts(lengths=[10, 8, 9])
    donor = capture(view, given, ("o", "q", "k", "v"))
    assert torch.equal(cross_logits(view, given, donor, MEMBERS, mode), last_logits(view, given))


@torch.no_grad()
def test_everything_from_the_tuned_model_is_the_tuned_model():
    """All heads at all tokens, with MLPs, norms, embeddings, o_proj and head copied: the tuned model's logits."""
    base, given = llama(), prompts()
    tuned = tuned_of(base)
    state = {n: p for n, p in tuned.state_dict().items() if not any(x in n for x in ("q_proj", "k_proj", "v_proj"))}
    half = copy.deepcopy(base)
    half.load_state_dict(state, strict=False)
    donor = capture(HeadView(tuned), given)
    view = HeadView(half)
    patched = last_logits(view, given, [Patch(view.site("o", n), donor["o", n]) for n in range(3)])
    torch.testing.assert_close(patched, donor.logits, rtol=0, atol=1e-10)
    assert not torch.allclose(last_logits(view, given), donor.logits, atol=1e-2)


@torch.no_grad()
def test_input_modes_change_the_read_out_alone():
    """q, k, v of a head from the tuned model, all earlier tokens' heads held: the last token's head output is what the
    tuned model's q, k, v over the base's others give, and nothing before it moves."""
    base, given = llama(), prompts()
    tuned, view = HeadView(tuned_of(base)), HeadView(base)
    donor, own = capture(tuned, given, ("q", "k", "v")), capture(view, given, ("o", "q", "k", "v"))
    head = Head(1, 2)
    from pegbox.analyze.circuits.cross import _at, _before

    for kind, make in (("q", _at), ("v", _before)):
        patch = make(view, given, donor, kind, ("last", head))
        site = view.site(kind, *head)
        seen = patch(own[kind, 1])
        at = slice(-1, None) if kind == "q" else slice(0, -1)
        assert torch.equal(taken(seen[:, at], site), taken(donor[kind, 1][:, at], site))
        other = torch.ones_like(seen, dtype=torch.bool)
        other[:, at, site.columns] = False
        assert torch.equal(seen[other], own[kind, 1][other])
    assert not torch.equal(cross_logits(view, given, donor, [("last", head)], "v"), own.logits)


@torch.no_grad()
def test_an_adapter_is_a_pair_in_one():
    """Base and tuned as two models, and as one with its adapter off and on: the same accuracies."""
    base = llama(dtype=torch.float32)
    tuned = adapted(base, 4.0)
    merged = adapted(base, 4.0).merge_and_unload()
    given = prompts(12)
    given = given.asking(last_logits(HeadView(merged), given).argmax(-1))
    cases = {"none": [], "all": [("last", h) for h in HeadView(base).all()], "some": MEMBERS}
    for mode in ("output", "q"):
        one = cross_accuracy(ModelPair(tuned), given, cases, mode, batch=5)
        two = cross_accuracy(ModelPair(merged, base), given, cases, mode)
        assert one == two
        assert one["none"] == accuracy(HeadView(base), given)
    assert gap_closed(0.5, 1.0, 0.75) == 0.5
    assert gap_closed(0.5, 0.5, 0.7) != gap_closed(0.5, 0.5, 0.7)


def test_models_of_other_shapes():
    """Unequal depth, width, heads; an unknown mode; heads out of range."""
    view, given = HeadView(llama()), prompts()
    for sizes, words in (
        ({"num_hidden_layers": 2}, "3 blocks and the other 2"),
        ({"num_key_value_heads": 4}, "2 KV heads and the other 4"),
        ({"num_attention_heads": 2}, "4 heads and the other 2"),
        ({"hidden_size": 64}, "columns in a head"),
    ):
        with pytest.raises(BadInput, match=words):
            check_alike(view, HeadView(llama(**sizes)))
    donor = capture(view, given)
    with pytest.raises(BadInput, match="Did you mean 'output'"):
        cross_logits(view, given, donor, MEMBERS, "outputs")
    with pytest.raises(BadInput, match="out of range"):
        cross_logits(view, given, donor, [("last", Head(7, 0))])
    with pytest.raises(BadInput, match="blocks"):
        cross_accuracy(ModelPair(llama(num_hidden_layers=2), llama()), given, {"a": MEMBERS})


# ---- attention cut off


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_what_is_cut_off_is_not_seen(name):
    """Cut from no block on it is the model; cut in the last block alone or in all, the logits move."""
    view, given = HeadView(family(name)), prompts()
    last, mid = given.at("last"), given.at("mid")
    plain = last_logits(view, given)
    torch.testing.assert_close(knocked_logits(view, given, last, mid, 3), plain, rtol=0, atol=1e-5)
    assert not torch.allclose(knocked_logits(view, given, last, mid, 0), plain, atol=1e-4)
    assert not torch.allclose(knocked_logits(view, given, last, mid, 2), plain, atol=1e-4)


@torch.no_grad()
def test_one_block_forgets_the_token():
    view, given = HeadView(llama(num_hidden_layers=1)), prompts()
    other = given.ids.clone()
    other[:, -3] = (other[:, -3] + 7) % 60
    moved = type(given)(other, given.mask, {"mid": given.at("mid"), "early": given.at("early")}, given.answers)
    cut = [knocked_logits(view, p, p.at("last"), p.at("mid"), 0) for p in (given, moved)]
    torch.testing.assert_close(cut[0], cut[1], rtol=0, atol=1e-10)
    assert not torch.allclose(last_logits(view, given), last_logits(view, moved))


def test_a_curve_of_knockouts():
    view, given = HeadView(llama()), prompts(lengths=[10, 8, 9])
    given = given.asking(last_logits(view, given).detach().argmax(-1))
    before = snapshot(view.model)
    curve = knockout(view, given, "last", "mid", layers=[0, 3])
    assert set(curve) == {0, 3}
    assert curve[3] == 1.0
    drawn = [knockout(view, given, "last", None, generator=torch.Generator().manual_seed(s)) for s in (0, 0)]
    assert drawn[0] == drawn[1]
    assert same(before, snapshot(view.model))
    with pytest.raises(BadInput, match="before the query"):
        knockout(view, given, "mid", "last")
    with pytest.raises(BadInput, match="needs a generator"):
        knockout(view, given, "last", None)
    with pytest.raises(BadInput, match="out of range"):
        knockout(view, given, "last", "mid", layers=[4])
