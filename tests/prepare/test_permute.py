"""Re-ordering units as a preparation: the order, the function, the record, refusals."""

from __future__ import annotations

import pytest
import torch

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.context import Context
from pegbox.prepare.base import PREPARE
from pegbox.testing import tiny_llama

IDS = torch.arange(24).view(2, 12)


def prepared(model, **options):
    part = PREPARE.validate({"kind": "permute", **options})
    return part, part.apply(model, tuple, Context(model, seed=3))


@pytest.mark.parametrize("order", ["weight", "random"])
@pytest.mark.parametrize("units", [["heads"], ["channels"], ["heads", "channels"]])
def test_the_function_is_unchanged_and_the_record_replays(llama, tmp_path, order, units):
    wanted = llama(input_ids=IDS).logits
    part, record = prepared(llama, order=order, units=units)
    torch.testing.assert_close(llama(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)
    part.save(record, tmp_path)
    again = tiny_llama()
    part.replay(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(llama.state_dict().values(), again.state_dict().values()))
    moved = [n for n, t in tiny_llama().state_dict().items() if not torch.equal(t, llama.state_dict()[n])]
    assert any("self_attn" in n for n in moved) == ("heads" in units)
    assert any("mlp" in n for n in moved) == ("channels" in units)


def test_by_weight_the_largest_stand_first(llama):
    prepared(llama)
    norms = llama.model.layers[0].mlp.down_proj.weight.norm(dim=0)
    assert torch.equal(norms, norms.sort(descending=True).values)
    heads = llama.model.layers[0].self_attn.o_proj.weight.view(32, 4, 8).square().sum((0, 2))
    groups = heads.view(2, 2).sum(1)
    assert groups[0] >= groups[1]
    assert all(pair[0] >= pair[1] for pair in heads.view(2, 2))


def test_the_first_channels_are_a_range_for_the_slices_tuner(llama):
    """Ordered by weight, the channels chosen by weight in each block are the first ones."""
    from peft import get_peft_model

    from pegbox.tuners.slices import SlicesConfig, slice_layers

    prepared(llama, units=["channels"])
    select = {"kind": "units", "ratios": {"d": 0.25}, "strategy": "weight", "scope": "per_block"}
    model = get_peft_model(llama, SlicesConfig(select=select))
    assert {layer.block("default").start for layer in slice_layers(model).values()} == {0}


def test_refusals(llama, tmp_path):
    part, record = prepared(llama)
    with pytest.raises(BadInput, match="permuted twice"):
        prepared(llama)
    part.save(record, tmp_path)
    with pytest.raises(WrongBase, match="this model's has 48"):
        part.replay(tiny_llama(intermediate_size=48), tmp_path)
    (tmp_path / "orders.safetensors").write_bytes(b"no")
    with pytest.raises(Corrupt, match="no readable record"):
        part.replay(tiny_llama(), tmp_path)
    for options, says in (({"order": "size"}, "order"), ({"units": []}, "units"), ({"units": ["rows"]}, "units")):
        with pytest.raises(BadInput, match=says):
            prepared(tiny_llama(), **options)


def test_a_model_without_units_and_a_packed_one(llama):
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(BadInput, match="no coupled structure"):
        prepared(mamba)
    down = llama.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(BadInput, match="Permute before quantizing"):
        prepared(llama)
