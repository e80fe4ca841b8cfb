"""Pruning by a learnt update: rules of the counts, heads and neurons against zeroed ones, records, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.coupled import structures
from pegbox.parts.decompose import decompose_low_rank_sparse, largest_rest
from pegbox.parts.indexsets import top_entries
from pegbox.parts.metering import measuring_flops
from pegbox.parts.pruning import global_masks, n_of_m_mask, pack_mask, unpack_mask, update_score
from pegbox.parts.removal import kept_units, remove_units
from pegbox.prepare import PREPARE
from pegbox.testing import tiny_llama
from pegbox.tuners import TUNER

IDS = torch.arange(24).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def prune(**options):
    return PREPARE.validate({"kind": "prune", **options})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An adapter folder with an update that is not zero."""
    folder = tmp_path_factory.mktemp("tuned")
    model = tiny_llama()
    tuner = TUNER.validate({"kind": "lowrank_sparse", "r": 4, "alpha": 8})
    wrapped = tuner.attach(model, None, Context(model))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if name.endswith(".B"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    tuner.save(wrapped, folder)
    return folder


def pruned(folder=None, model=None, **options):
    model = model or tiny_llama()
    ctx = Context(model, seed=1, folder_of=None if folder is None else lambda stage: folder)
    preparation = prune(**({"of": "tune"} if folder else {"mode": "W"}), **options)
    return model, preparation, preparation.apply(model, tuple, ctx)


# ---- masks


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    ratio=st.floats(0, 0.99),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_many_go_as_torchs_global_pruning_takes(sizes, ratio, coarse, seed):
    """The number of zeros is round(p * pool size), ties or not; the lowest go."""
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    if coarse:
        scores = {k: (v * 3).round() for k, v in scores.items()}
    masks = global_masks(scores, ratio)
    kept, gone = (torch.cat([scores[k][m if keep else ~m] for k, m in masks.items()]) for keep in (True, False))
    assert len(gone) == round(ratio * sum(sizes))
    assert not len(gone) or not len(kept) or gone.max() <= kept.min()


def test_torchs_own_pruning_gives_the_same_masks():
    from torch.nn.utils import prune as reference

    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 9))
    scores = {str(i): layer.weight.detach().abs() for i, layer in enumerate(model)}
    masks = global_masks(scores, 0.37)
    reference.global_unstructured([(m, "weight") for m in model], reference.L1Unstructured, amount=0.37)
    assert all(torch.equal(layer.weight_mask.bool(), masks[str(i)]) for i, layer in enumerate(model))


def test_two_of_four():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
    assert n_of_m_mask(score, 2, 4).tolist() == [[True, False, True, False, True, True, False, False]]
    with pytest.raises(BadInput, match="groups of 3"):
        n_of_m_mask(score, 2, 3)


@given(st.integers(1, 40))
def test_masks_survive_as_bits(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.5
    bits = pack_mask(mask)
    assert bits.numel() == (count + 7) // 8
    assert torch.equal(unpack_mask(bits, (count,)), mask)
    with pytest.raises(Corrupt):
        unpack_mask(bits, (count + 8,))


def test_modes_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    w, low, sparse = (torch.randn(3, 4, generator=generator) for _ in range(3))
    expected = {
        "ABS": (low + sparse).abs(), "AB": low.abs(), "W": w.abs(), "WABS": (w + low + sparse).abs(),
        "WAB": (w + low).abs(), "NABS": -(low + sparse).abs(), "NAB": -low.abs(),
    }  # fmt: skip
    for mode, score in expected.items():
        torch.testing.assert_close(update_score(mode, w, low, sparse), score)
    assert update_score("random", w, generator=generator).shape == w.shape
    with pytest.raises(BadInput, match="Did you mean 'ABS'"):
        update_score("ABBS", w, low)
    with pytest.raises(BadInput, match="tune first"):
        update_score("ABS", w, torch.zeros_like(w))


def test_pools_are_independent_and_kept_weights_are_the_base_s(tuned):
    """q and v by the update, the others by |W|; where kept, W * S1 is W."""
    model, _, record = pruned(tuned, ratio=0.3, update_ratio=0.5)
    base, masks = dict(tiny_llama().named_parameters()), record["masks"]
    adapted = [n for n in masks if "q_proj" in n or "v_proj" in n]
    for names, ratio in ((adapted, 0.5), ([n for n in masks if n not in adapted], 0.3)):
        total = sum(masks[n].numel() for n in names)
        assert sum(int((~masks[n]).sum()) for n in names) == round(ratio * total)
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, base[name] * mask)
    from pegbox.parts.carried import carried

    scores = {n: carried(model)[n.removesuffix(".weight")].dense().abs() for n in adapted}
    assert all(torch.equal(m, masks[n]) for n, m in global_masks(scores, 0.5).items())


def test_a_pattern_everywhere(tuned):
    model, _, record = pruned(tuned, pattern=(2, 4))
    for name in record["masks"]:
        assert int(dict(model.named_parameters())[name].view(-1, 4).count_nonzero(dim=1).max()) <= 2


# ---- units


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_without_a_head_is_with_that_head_at_zero(kind):
    """Biases of all four matrices included; FLOPs of the attention projections fall by h / H exactly."""
    whole, smaller = (model_of(kind) for _ in range(2))
    structure = structures(Anatomy.of(whole), ("heads",))[0]
    units = list(range(structure.per_group, 2 * structure.per_group))
    share = structure.share("o")
    with torch.no_grad():
        weight = whole.get_parameter(share.parameter)
        weight.index_fill_(share.axis, share.of(units), 0)
    before = flops_of(smaller)
    remove_units(smaller, {structure.name: units})
    torch.testing.assert_close(logits(smaller), logits(whole), rtol=0, atol=1e-5)
    assert kept_units(smaller)[structure.name] == [u for u in range(structure.units) if u not in units]
    projections = 2 * sum(p.numel() for p in _projections(structure, model_of(kind))) * IDS.numel()
    products = before - flops_of(smaller)
    heads = len(units) / structure.units
    assert products >= projections * heads
    assert products - projections * heads == _attention_flops(structure) * heads


def _projections(structure, model):
    named = {s.parameter for s in structure.shares if not s.bias and s.role in "qkvo"}
    return [model.get_parameter(n) for n in named]


def _attention_flops(structure):
    size = structure.share("q").positions.shape[1]
    return 2 * 2 * 2 * structure.units * 12 * 12 * size  # B = 2, both products over 12 x 12 pairs


def model_of(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return tiny_llama(attn_implementation="eager")
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    if kind == "bert":
        config = BertConfig(
            vocab_size=64, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=32,
            attn_implementation="eager",
        )  # fmt: skip
        model = BertForMaskedLM(config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0,
                       attn_implementation="eager")
        )  # fmt: skip
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model


def flops_of(model):
    with measuring_flops() as flops, torch.no_grad():
        model.eval()(input_ids=IDS)
    return flops.total


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_without_neurons_is_with_their_activations_at_zero(kind):
    whole, smaller = (model_of(kind) for _ in range(2))
    structure = structures(Anatomy.of(whole), ("channels",))[1]
    share = structure.share("down")
    with torch.no_grad():
        whole.get_parameter(share.parameter).index_fill_(share.axis, torch.tensor([0, 5, 9]), 0)
    remove_units(smaller, {structure.name: [0, 5, 9]})
    torch.testing.assert_close(logits(smaller), logits(whole), rtol=0, atol=1e-5)


def test_units_go_by_their_first_numbers():
    model = model_of("bert")
    name = structures(Anatomy.of(model), ("channels",))[0].name
    remove_units(model, {name: [3]})
    with pytest.raises(BadInput, match="taken out before"):
        remove_units(model, {name: [3]})
    remove_units(model, {name: [4]})
    assert kept_units(model)[name][:5] == [0, 1, 2, 5, 6]
    for units, says in ((range(200), "don't exist"), (kept_units(model)[name], "leave at least one")):
        with pytest.raises(BadInput, match=says):
            remove_units(model, {name: units})
    with pytest.raises(BadInput, match="no coupled structure"):
        remove_units(model, {"attention": [0]})
    llama = tiny_llama()
    with pytest.raises(BadInput, match="they leave together"):
        remove_units(llama, {"model.layers.0.self_attn": [0]})


def test_a_smaller_dense_model_and_what_it_costs(tuned):
    model, _, record = pruned(tuned, heads=2, neurons=0.25, ratio=0.2, update_ratio=0.2)
    facts = record["facts"]["flops_per_token"]
    assert facts["unmerged_nonzero"] < facts["structured"] < facts["dense"]
    assert model.get_submodule("model.layers.0.self_attn.q_proj").out_features == 16
    assert model.get_submodule("model.layers.0.mlp.down_proj").in_features == 48
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters()}
    from pegbox.parts.carried import carried

    assert all(wanted[f"{m}.weight"] == u.shape for m, u in carried(model).items())
    whole, _, everywhere = pruned(tuned, neurons=32, neuron_scope="global")
    assert sum(map(len, everywhere["removed"].values())) == 64
    assert len({len(units) for units in everywhere["removed"].values()}) >= 1
    assert logits(whole).isfinite().all()


def test_a_record_makes_a_fresh_base_the_same(tuned, tmp_path):
    """Loaded again: the same logits, bit for bit; on another model refused."""
    model, preparation, record = pruned(tuned, heads=2, neurons=5, ratio=0.2, update_ratio=0.3)
    preparation.save(record, tmp_path)
    fresh = tiny_llama()
    preparation.replay(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(WrongBase, match="of another model"):
        preparation.replay(tiny_llama(hidden_size=16), tmp_path)
    (tmp_path / "prune.json").write_text("{}")
    with pytest.raises(Corrupt):
        preparation.replay(tiny_llama(), tmp_path)


def test_spikes_are_found_where_magnitude_finds_none():
    """Rank 3, noise 0.01 and 40 spikes of 0.5 in 768 x 768: at least 95 % after 2 to 5 passes, and with the cap."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(768, 3, generator=generator), torch.randn(3, 768, generator=generator)
    w = left @ right + 0.01 * torch.randn(768, 768, generator=generator)
    spikes = torch.randperm(w.numel(), generator=generator)[:40]
    w.view(-1)[spikes] += 0.5
    for options in ({"outer": 2}, {"rank_cap": 16}):
        found = largest_rest(w, decompose_low_rank_sparse(w, generator=generator, **options), 40)
        assert len(set(found.tolist()) & set(spikes.tolist())) >= 38
    assert len(set(top_entries(w.abs(), 40).tolist()) & set(spikes.tolist())) <= 4


def test_exactly_n_entries_even_where_none_stands_out():
    """All zeros in S at the published number of passes: still N positions, never all."""
    w = torch.ones(12, 10)
    found = decompose_low_rank_sparse(w, generator=torch.Generator().manual_seed(0))
    assert not found.s.any()
    assert largest_rest(w, found, 7).numel() == 7
    assert found.v.shape[0] <= 10
    for bad in (torch.ones(3), torch.full((2, 2), torch.nan)):
        with pytest.raises(BadInput, match="finite entries"):
            decompose_low_rank_sparse(bad)
    with pytest.raises(BadInput, match="at least 1"):
        decompose_low_rank_sparse(w, outer=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"update_ratio": -0.1}, "update_ratio"),
        ({"mode": "ABBS", "ratio": 0.1}, "mode"),
        ({}, "prunes nothing"),
        ({"pattern": [4, 2]}, "stands alone"),
        ({"pattern": [2, 4], "ratio": 0.1}, "stands alone"),
        ({"neurons": 2.5}, "whole number"),
        ({"heads": -1}, "heads"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        prune(**options)


def test_what_can_not_be_pruned(tuned):
    for options, says in (
        ({"heads": 4}, "leave at least one"),
        ({"heads": 1}, "Take whole groups"),
        ({"neurons": 64}, "none of 64"),
        ({"mode": "NABS", "update_ratio": 0.1, "of": None}, "that is zero"),
    ):
        model, preparation = tiny_llama(), prune(**{"of": "tune", **options})
        with pytest.raises(BadInput, match=says):
            preparation.apply(model, tuple, Context(model, folder_of=lambda stage: tuned))
    with pytest.raises(BadInput, match="no stage 'tune'"):
        prune(of="tune", ratio=0.1).apply(tiny_llama(), tuple, Context(tiny_llama()))
    with pytest.raises(BadInput, match="tune first"):
        prune(of="tune", ratio=0.1).apply(m := tiny_llama(), tuple, Context(m, folder_of=lambda s: tuned / "none"))
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(BadInput, match="no query and value"):
        prune(mode="W", ratio=0.1).apply(net, tuple, Context(net))


def test_the_update_has_to_be_taken_up():
    from pegbox.capabilities import refusals
    from pegbox.recipe import load_recipe

    block = load_recipe("dsee").plain() | {"protocol": {"kind": "single"}, "select": None, "tuner": {"kind": "lora"}}
    block["prepare"] = [{"kind": "prune", "of": "tune", "ratio": 0.1}]
    assert any("takes none up" in reason for reason in refusals(load_recipe(block)))
    block["prepare"] = [{"kind": "prune", "mode": "W", "ratio": 0.1}]
    assert refusals(load_recipe(block)) == []
