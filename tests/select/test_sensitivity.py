"""SPT's allocation on models: what takes part, thresholds, budgets, what trains, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pegbox
from pegbox.capabilities import Facts, refusals
from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase
from pegbox.parts.allocation import Allocation, Entries, PerTensor, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.recipe import load_recipe
from pegbox.select import SELECT
from pegbox.testing import tiny_batch, tiny_llama
from pegbox.tuners.sparse import SparseConfig, export_delta, sparse_layers

UP = "model.layers.0.mlp.up_proj.weight"
IDS = torch.arange(3, 40).view(1, -1)


def selector(**options):
    block = {"kind": "sensitivity", "rank": 2, "tolerance": 0.5, **options}
    if "tau" in options:
        block["budget"] = None
    return SELECT.validate(block)


def own_loss(model, batch):
    return model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss


@pytest.fixture(scope="module")
def scores():
    batches = [tiny_batch(seed=s) for s in range(3)]
    return pegbox.collect(tiny_llama(), selector().statistics(), batches, loss=own_loss)


def chosen(stats, model=None, **options):
    model = tiny_llama() if model is None else model
    weights = dict(model.named_parameters())
    return selector(**options).select(Anatomy.of(model), weights, stats, torch.Generator().manual_seed(0))


def attach(allocation, model=None, **options):
    config = SparseConfig(task_type="CAUSAL_LM", **options).with_allocation(allocation)
    torch.manual_seed(0)
    return get_peft_model(tiny_llama() if model is None else model, config)


def shapes_of(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def mixed(stats, **options):
    """An allocation with a module, a whole vector and single weights."""
    held = {name: score * 1e-3 for name, score in stats["sensitivity"].items()}
    held["model.layers.0.input_layernorm.weight"] = torch.full((32,), 1e6)
    held[UP] = held[UP] + 1e3 * torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    held["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    held["model.layers.1.self_attn.q_proj.weight"][3, :5] = 1e4
    found = chosen({"sensitivity": held}, tau=300, **{"dropout": 0.0, "drop_path": 0.0, **options})
    assert {type(c) for c in found.values()} == {Entries, PerTensor, Whole}
    return found


def single_norms(stats, **options):
    held = {name: score * (1e6 if "norm" in name else 1) for name, score in stats["sensitivity"].items()}
    return chosen({"sensitivity": held}, tau=600, beta=1e-9, **options)


# ---- stage 1 in the selector


def test_only_candidates_are_measured(scores):
    """Embeddings, head and ties take no part; norms do."""
    names = set(scores["sensitivity"])
    assert names == {n for n, p in tiny_llama().named_parameters() if "layers" in n or n == "model.norm.weight"}


def test_brute_force(scores):
    """s is the brute-force sum of squares of autograd's gradients."""
    model = tiny_llama()
    wanted = {name: torch.zeros_like(model.get_parameter(name)) for name in scores["sensitivity"]}
    for seed in range(3):
        model.zero_grad()
        own_loss(model, tiny_batch(seed=seed)).backward()
        for name, total in wanted.items():
            total += model.get_parameter(name).grad ** 2
    for name, total in wanted.items():
        torch.testing.assert_close(scores["sensitivity"][name], total, rtol=1e-5, atol=1e-12)


# ---- stage 2 on a model


def test_the_count_reported_is_the_count_trained(scores):
    """The total equals the number of values that require a gradient, exactly."""
    for structured in ("lora", "adapter"):
        for tau in (50, 600, 3000):
            found = chosen(scores, tau=tau, structured=structured)
            model = attach(found)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert trained == sum(found.trained(shapes_of(tiny_llama())).values())


def test_large_alpha_gives_every_touched_matrix_a_module_and_small_alpha_none(scores):
    """alpha -> infinity: every matrix with a selected weight; alpha tiny: none; beta alike."""
    every = chosen(scores, tau=400, alpha=1e12, beta=1e12)
    assert {type(c) for c in every.values()} <= {PerTensor, Whole}
    none = chosen(scores, tau=400, alpha=1e-9, beta=1e-9)
    assert {type(c) for c in none.values()} == {Entries}
    assert every.keys() == none.keys()
    assert sum(none.trained(shapes_of(tiny_llama())).values()) == 400


def test_a_budget_is_met_as_nearly_as_a_level_can(scores):
    found = chosen(scores, budget={"count": 900})
    total = sum(found.trained(shapes_of(tiny_llama())).values())
    others = [sum(chosen(scores, tau=t).trained(shapes_of(tiny_llama())).values()) for t in range(1, 900, 37)]
    assert abs(total - 900) <= min(abs(t - 900) for t in others)


def test_norm_singles_may_stay_frozen_as_in_the_official_code(scores):
    kept = single_norms(scores)
    dropped = single_norms(scores, drop_norm_singles=True)
    assert any("norm" in name for name in kept)
    assert not any("norm" in name for name in dropped)
    assert kept.keys() - dropped.keys() == {name for name in kept if "norm" in name}


def test_parts_of_a_fused_matrix_are_allocated_separately():
    """A module on a fused qkv acts on one row block only; the other blocks keep single weights."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=48))
    fused = "transformer.h.0.attn.c_attn.weight"
    stats = {"sensitivity": {n: torch.rand(p.shape) * 1e-6 for n, p in model.named_parameters()}}
    stats["sensitivity"][fused][:, 16:32] += 1  # k of the first block; Conv1D stores (in, out)
    stats["sensitivity"][fused][0, 2] += 1
    found = chosen(stats, model, tau=257)
    choice = found[fused]
    assert isinstance(choice, PerTensor)
    assert [site["rows"] for site in choice.options["sites"]] == [[[16, 32]]]
    assert choice.index.tolist() == [2]
    tuned = attach(found, copy.deepcopy(model))
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert trained == sum(found.trained(shapes_of(model)).values())
    before = logits(model)
    assert torch.equal(logits(tuned), before)
    train(tuned)
    layer = sparse_layers(tuned)[fused.removesuffix(".weight")]
    x = torch.randn(2, 3, 16)
    with tuned.disable_adapter():
        plain = layer(x)
    moved = (layer(x) - plain).abs().amax((0, 1)) > 0
    assert set(moved.nonzero().flatten().tolist()) <= {2, *range(16, 32)}
    wanted = logits(tuned)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), wanted, rtol=0, atol=1e-5)


# ---- stage 3


@pytest.mark.parametrize("structured", ["lora", "adapter"])
def test_untrained_it_is_the_base_bit_for_bit(scores, structured):
    """At init the logits are the base model's, in eval mode, bit for bit."""
    assert torch.equal(logits(attach(mixed(scores, structured=structured))), logits(tiny_llama()))


def test_merged_equals_unmerged_and_the_base_comes_back(scores):
    """After training merged equals unmerged within 1e-5 (LoRA and singles); unmerging restores the base."""
    model = train(attach(mixed(scores)))
    tuned = logits(model)
    assert not torch.allclose(tuned, logits(tiny_llama()), atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), tuned, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), tuned)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    torch.testing.assert_close(logits(model.merge_and_unload()), tuned, rtol=0, atol=1e-5)


def test_only_allocated_entries_change(scores):
    """(W_after - W_before) is nonzero inside the indices only (a matrix with a module: inside its rows)."""
    found = mixed(scores)
    tuned = dict(train(attach(found)).merge_and_unload().named_parameters())
    for name, before in tiny_llama().named_parameters():
        moved = (tuned[name] != before).flatten().nonzero().flatten()
        choice = found.get(name)
        if choice is None:
            assert moved.numel() == 0
        elif isinstance(choice, Entries):
            assert set(moved.tolist()) <= set(choice.index.tolist())


@pytest.mark.parametrize("structured", ["lora", "adapter"])
def test_saved_and_loaded(scores, structured, tmp_path):
    model = train(attach(mixed(scores, structured=structured)))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    other = tiny_llama(intermediate_size=48)
    with pytest.raises((Corrupt, WrongBase)):
        PeftModel.from_pretrained(other, str(tmp_path))


def test_what_is_not_linear_does_not_merge(scores):
    model = train(attach(mixed(scores, structured="adapter")))
    with pytest.raises(Unsupported, match="not linear"):
        model.merge_adapter()


def test_drop_path_acts_on_samples_while_training(scores):
    model = attach(mixed(scores, dropout=0.5, drop_path=0.5))
    site = next(s for layer in sparse_layers(model).values() for s in layer.sites_of("default"))
    with torch.no_grad():
        site.B.normal_()
    x, y = torch.randn(64, 3, site.A.shape[1]), torch.zeros(64, 3, site.B.shape[0])
    site.train()
    kept = (site(x, y).abs().amax((1, 2)) > 0).float().mean()
    assert 0.2 < float(kept) < 0.8
    site.eval()
    assert torch.equal(site(x, y), site(x, y))


def test_of_a_convolution_a_module_is_two_convolutions():
    """Conv2d weights [out, in, kh, kw] count as matrices with in * kh * kw inputs."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.Flatten(1))
    stats = {"sensitivity": {n: torch.ones(p.shape) for n, p in net.named_parameters()}}
    found = chosen(stats, net, tau=300, rules={r"\\.weight$": "matrix"}, dropout=0.0, drop_path=0.0)
    tuned = get_peft_model(copy.deepcopy(net), SparseConfig().with_allocation(found))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(tuned(x), net(x))
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
        y = tuned(x)
    assert any(isinstance(c, PerTensor) for c in found.values())
    torch.testing.assert_close(tuned.merge_and_unload()(x), y, rtol=0, atol=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"budget": {"count": 0}}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"beta": -1}, "greater than 0"),
        ({"budget": None}, "either a budget or tau"),
        ({"rules": {"(": "skip"}}, "regular expression"),
        ({"structured": "prefix"}, "lora"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, word):
    """budget <= 0; alpha or beta <= 0."""
    with pytest.raises(BadInput, match=word):
        selector(**options)


def test_budgets_that_can_not_be_met_are_refused(scores):
    """Larger than the candidates; unreachable (the nearest total is named)."""
    with pytest.raises(BadInput, match="candidates"):
        chosen(scores, budget={"count": 10**9})
    with pytest.raises(BadInput, match="nearest total is"):
        chosen(scores, budget={"count": 30}, alpha=1e12, beta=1e12, tolerance=0.01)


def test_a_rank_that_is_not_low_is_refused(scores):
    """r >= min(in, out) for LoRA."""
    with pytest.raises(BadInput, match="rank below both"):
        chosen(scores, rank=16)


def test_scores_that_do_not_fit_are_refused(scores):
    """No scores, all zero, not finite, of another model."""
    held = scores["sensitivity"]
    with pytest.raises(BadInput, match="gradients on the task"):
        chosen(None)
    with pytest.raises(BadInput, match="are 0"):
        chosen({"sensitivity": {n: torch.zeros_like(s) for n, s in held.items()}})
    with pytest.raises(BadInput, match="not finite"):
        chosen({"sensitivity": {**held, UP: held[UP] * torch.nan}})
    with pytest.raises(BadInput, match="another model"):
        chosen({"sensitivity": {**held, UP: held[UP][:3]}})
    with pytest.raises(BadInput, match="no sensitivity was given"):
        chosen({"sensitivity": {n: s for n, s in held.items() if n != UP}})


def test_a_parameter_that_nothing_is_known_of_is_refused():
    """Name rules that leave a tensor unclassified."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            return self.a(x) * self.gamma

    with pytest.raises(BadInput, match="nothing is known of the parameter 'gamma'"):
        sensitivity_names(Odd())
    assert sensitivity_names(Odd(), rules={"gamma$": "skip"}) == ["a.weight", "a.bias"]


def sensitivity_names(model, **options):
    return selector(**options).statistics().names(Anatomy.of(model))


def test_a_quantized_base_is_refused_with_the_remedy():
    """Quantized weights have no gradient: load in floats, or pass scores."""
    reasons = refusals(load_recipe("spt"), Facts(quantized=True))
    assert any("gradients of the weights" in reason for reason in reasons)


def test_a_tuner_that_holds_no_modules_is_refused():
    """Structured type mismatch: a tuner that can't give a matrix its own module, or a module that is not known."""
    for tuner in ("full", "lora"):
        assert any("tuner of their own" in r for r in refusals(load_recipe("spt", [f"tuner.kind={tuner}"])))
    wrong = Allocation({UP: PerTensor("tuner", {"sites": [{"kind": "lokr", "r": 2}]})})
    with pytest.raises(BadInput, match="can't get a 'lokr'"):
        attach(wrong)
    with pytest.raises(BadInput, match="unknown option 'ranks'"):
        attach(Allocation({UP: PerTensor("tuner", {"sites": [{"kind": "lora", "r": 2, "ranks": 1}]})}))
    with pytest.raises(Unsupported, match="codec"):
        attach(Allocation({UP: PerTensor("codec", {})}))


def test_an_allocation_for_another_shape_is_refused(scores):
    """An allocation whose shapes differ from the model's."""
    with pytest.raises((WrongBase, BadInput)):
        attach(mixed(scores), tiny_llama(intermediate_size=40))


def test_modules_are_no_difference_in_single_entries(scores):
    with pytest.raises(BadInput, match="module of its own"):
        export_delta(attach(mixed(scores)))


def test_all_of_it_in_an_allocation_file(scores, tmp_path):
    found = mixed(scores)
    found.save(tmp_path / "a.safetensors")
    assert Allocation.load(tmp_path / "a.safetensors").digest() == found.digest()
