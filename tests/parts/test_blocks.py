"""The walk: pre, blocks, post give what the model gives, on several architectures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pegbox.errors import BadInput
from pegbox.parts.blocks import BlockWalk
from pegbox.testing import tiny_llama

IDS = torch.arange(22).view(2, 11) + 1
MASK = torch.ones(2, 11, dtype=torch.long)
MASK[1, 7:] = 0


def others():
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    d = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    gemma = {**d, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4, "pad_token_id": 0}
    made = {
        "gpt2": AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
        "gemma3": AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **gemma)),
        "bert": AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **d)),
        "one_block": tiny_llama(num_hidden_layers=1),
        "llama": tiny_llama(),
    }
    return {name: model.eval() for name, model in made.items()}


@pytest.mark.parametrize("name", ["llama", "one_block", "gpt2", "gemma3", "bert"])
def test_the_walk_is_the_forward(name):
    model = others()[name]
    batch = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        expected = model(**batch).logits
        walker = BlockWalk(model)
        walk = walker.begin(batch)
        for _ in range(len(walker)):
            walker.step(walk)
        torch.testing.assert_close(walker.finish(walk).logits, expected, rtol=0, atol=0)
    assert all("forward" not in block.__dict__ for block in walker.blocks)


def test_each_list_of_an_encoder_decoder():
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    batch = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5]}
    with torch.no_grad():
        expected = model(**batch).logits
        for stack in ("encoder.block", "decoder.block"):
            walker = BlockWalk(model, stack)
            walk = walker.begin(batch)
            while walk.at < len(walker):
                walker.step(walk)
            torch.testing.assert_close(walker.finish(walk).logits, expected, rtol=0, atol=0)


def test_gradients_flow_through_a_walk(llama):
    walker = BlockWalk(llama)
    walk = walker.begin({"input_ids": IDS})
    for _ in range(2):
        walker.step(walk)
    walker.finish(walk).logits.sum().backward()
    walked = llama.model.layers[1].mlp.up_proj.weight.grad.clone()
    llama.zero_grad()
    llama(input_ids=IDS).logits.sum().backward()
    torch.testing.assert_close(walked, llama.model.layers[1].mlp.up_proj.weight.grad)


def test_run_yields_hidden_states(llama):
    expected = llama(input_ids=IDS, output_hidden_states=True).hidden_states
    hidden = dict(BlockWalk(llama).run({"input_ids": IDS}))
    torch.testing.assert_close(hidden[0], expected[1])


def test_refusals(llama):
    with pytest.raises(BadInput, match="needs one list of blocks"):
        BlockWalk(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="no blocks 'layers'"):
        BlockWalk(llama, "layers")
