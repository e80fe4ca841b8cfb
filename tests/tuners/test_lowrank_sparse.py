"""DSEE's tuner: plain LoRA and plain sparse tuning at its ends, gradients of the dense formula, exact counts."""

from __future__ import annotations

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.carried import Update, carry, read_updates
from pegbox.parts.context import Context
from pegbox.select import SELECT
from pegbox.testing import tiny_llama
from pegbox.tuners import TUNER
from pegbox.tuners.lowrank_sparse import export_lora
from pegbox.tuners.sparse.model import sparse_layers

IDS = torch.arange(24).view(2, 12)
Q = "model.layers.0.self_attn.q_proj"


def chosen(model, count=16, **options):
    block = {"kind": "decomposed", "budget": {"count": count}, "target_modules": ("q", "v"), "rank_cap": 6}
    weights = dict(model.named_parameters())
    selector = SELECT.validate({**block, **options})
    return selector.select(Anatomy.of(model), weights, None, torch.Generator().manual_seed(0))


def tuner(**options):
    return TUNER.validate({"kind": "lowrank_sparse", "r": 4, "alpha": 8, **options})


def attached(model, count=16, **options):
    allocation = chosen(model, count) if count else None
    return tuner(**options).attach(model, allocation, Context(model))


def fit(model, steps=4, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("execution", ["auto", "scatter", "bypass"])
def test_at_the_start_it_is_the_base(execution):
    """B = 0 and S2 = 0: the same output, bit for bit."""
    assert torch.equal(logits(attached(tiny_llama(), execution=execution)), logits(tiny_llama()))


def test_without_entries_it_is_lora():
    """N = 0 equals PEFT's LoRA with the same A and B."""
    from peft import LoraConfig, get_peft_model

    ours = fit(attached(tiny_llama(), count=0))
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    named = dict(theirs.named_modules())
    with torch.no_grad():
        for module, layer in sparse_layers(ours).items():
            (site,) = layer.sites_of("default")
            named[f"base_model.model.{module}"].lora_A["default"].weight.copy_(site.A)
            named[f"base_model.model.{module}"].lora_B["default"].weight.copy_(site.B)
    assert not torch.equal(logits(ours), logits(tiny_llama()))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


def test_the_low_rank_part_is_an_ordinary_lora_adapter(tmp_path):
    from peft import PeftModel

    ours = fit(attached(tiny_llama(), count=0))
    export_lora(ours, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
    shapes = {n: tuple(p.shape) for n, p in tiny_llama().named_parameters()}
    update = read_updates(tmp_path, shapes)[Q]
    assert update.scale == 2.0
    (site,) = sparse_layers(ours)[Q].sites_of("default")
    torch.testing.assert_close(update.dense(), (2 * site.B @ site.A).detach())


def test_without_rank_it_is_sparse_tuning():
    ours = fit(attached(tiny_llama(), r=0, alpha=1.0))
    plain = TUNER.validate({"kind": "sparse"}).attach(base := tiny_llama(), chosen(base), Context(base))
    assert torch.equal(logits(ours), logits(fit(plain)))


@pytest.mark.parametrize("execution", ["in_place", "scatter", "bypass"])
def test_gradients_are_those_of_the_dense_formula(execution):
    """A, B and S2 against autograd of y = W x + s (B A + S2) x, in float64."""
    model = attached(tiny_llama().double(), execution=execution)
    layer = sparse_layers(model)[Q]
    (site,), index = layer.sites_of("default"), layer.slot("default", "weight").index.long()
    values, generator = layer.sparse_values("weight", "default"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        site.B.copy_(torch.randn(site.B.shape, generator=generator, dtype=torch.float64))
        values.copy_(torch.randn(values.shape, generator=generator, dtype=torch.float64))
    from pegbox.parts.parameterinfo import touch

    touch([values])
    x = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    weight = layer.pretrained("weight").view(layer.shape_of("weight")).clone()
    out = layer(x)
    out.square().sum().backward()
    a, b, v = (t.detach().clone().requires_grad_() for t in (site.A, site.B, values))
    s2 = torch.zeros(weight.numel(), dtype=torch.float64).index_put((index,), v).view(weight.shape)
    dense = x @ (weight + 2.0 * (b @ a + s2)).T
    dense.square().sum().backward()
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)
    for ours, theirs in ((site.A, a), (site.B, b), (values, v)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_exactly_n_entries_move_and_the_base_none():
    """|Omega| = N per matrix, S2 is 0 elsewhere after training with decay, W is bit-identical throughout."""
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = fit(attached(model))
    for module, layer in sparse_layers(tuned).items():
        index = layer.slot("default", "weight").index
        assert index.numel() == index.unique().numel() == 16
        layer.revert()
        assert torch.equal(layer.base.weight, before[f"{module}.weight"])
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), logits(tiny_llama()))


def test_merged_is_unmerged(tmp_path):
    tuned = fit(attached(tiny_llama()))
    before = logits(tuned)
    tuner().save(tuned, tmp_path)
    updates = read_updates(tmp_path, {n: tuple(p.shape) for n, p in tiny_llama().named_parameters()})
    base = tiny_llama()
    with torch.no_grad():
        for module, update in updates.items():
            base.get_submodule(module).weight += update.dense()
    torch.testing.assert_close(logits(base), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(tuner().load(tiny_llama(), tmp_path)), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), before, rtol=0, atol=1e-5)


def test_bert_base_trains_as_many_as_published():
    """591,360 beside the classifier, for r = 16 and N = 64."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    names = [n for n, _ in model.named_parameters() if n.endswith(("self.query.weight", "self.value.weight"))]
    entries = Allocation({n: Entries(torch.arange(64, dtype=torch.int32, device="meta")) for n in names})
    tuned = TUNER.validate({"kind": "lowrank_sparse"}).attach(model, entries, Context(model))
    trained = {n: p.numel() for n, p in tuned.named_parameters() if p.requires_grad}
    classifier = sum(k for n, k in trained.items() if "classifier" in n)
    assert sum(trained.values()) - classifier == 591_360
    assert classifier == 2 * 768 + 2


def test_a_fused_matrix_is_cut_by_role():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0))
    before = logits(model)
    tuned = tuner(r=2).attach(model, None, Context(model))
    assert torch.equal(logits(tuned), before)
    sites = sparse_layers(tuned)["transformer.h.0.attn.c_attn"].sites_of("default")
    assert [site.rows.tolist() for site in sites] == [list(range(16)), list(range(32, 48))]
    assert not torch.equal(logits(fit(tuned)), before)


def test_a_carried_update_is_taken_up_whatever_the_scale():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
    update = Update((32, 32), 0.5, a, b, torch.tensor([3, 40], dtype=torch.int32), torch.tensor([0.1, -0.2]))
    base, model = tiny_llama(), tiny_llama()
    with torch.no_grad():
        base.get_submodule(Q).weight += update.dense()
    carry(model, {Q: update})
    tuned = tuner(target_modules=(Q,)).attach(model, None, Context(model))
    torch.testing.assert_close(logits(tuned), logits(base), rtol=0, atol=1e-5)
    for wrong in ({"r": 2}, {"target_modules": ("model.layers.1.self_attn.q_proj",)}):
        again = tiny_llama()
        carry(again, {Q: update})
        with pytest.raises(BadInput):
            tuner(**wrong).attach(again, None, Context(again))


def test_an_update_is_cut_by_rows_and_columns():
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([0, 7, 13, 19], dtype=torch.int32)
    update = Update((4, 5), 2.0, torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator), index,
                    torch.randn(4, generator=generator))  # fmt: skip
    for axis, gone in ((0, [1]), (1, [0, 3])):
        keep = [i for i in range(update.shape[axis]) if i not in gone]
        cut = update.without(axis, torch.tensor(gone))
        torch.testing.assert_close(cut.dense(), update.dense().index_select(axis, torch.tensor(keep)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": -1}, "r"),
        ({"alpha": 0}, "alpha"),
        ({"std": 0}, "std"),
        ({"rank": 3}, "rank"),
        ({"dropout": 1}, "dropout"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        tuner(**options)


def test_what_can_not_be_attached():
    model = tiny_llama()
    with pytest.raises(BadInput, match="neither a rank nor entries"):
        tuner(r=0).attach(model, None, Context(model))
    with pytest.raises(BadInput, match="leave it out"):
        tuner(target_modules=("q",)).attach(model, chosen(model), Context(model))
    with pytest.raises(BadInput, match="is no linear layer"):
        tuner(target_modules=("norm",)).attach(model, None, Context(model))
    with pytest.raises(BadInput, match="o_prj"):
        tuner(target_modules=("o_prj",)).attach(model, None, Context(model))
    with pytest.raises(BadInput, match="within a tensor of 1024"):
        tuner().attach(model, Allocation({f"{Q}.weight": Entries(torch.tensor([5, 2000]))}), Context(model))
    with pytest.raises(BadInput, match="greater than or equal to 1"):
        SELECT.validate({"kind": "decomposed", "budget": {"count": -3}})
