"""Which block a tensor lies in: from names, from an anatomy, from the user; and what is refused."""

from __future__ import annotations

import pytest

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.testing import tiny_llama
from pegbox.weights.layers import blocks_in, layer_map


def block_names(prefix, blocks, suffixes=("attn.weight", "mlp.0.weight", "mlp.1.weight")):
    return [f"{prefix}.{i}.{s}" for i in range(blocks) for s in suffixes]


def test_later_numbers_do_not_count():
    names = block_names("blocks", 12)
    assert blocks_in(names)("blocks.11.mlp.0.weight") == ("blocks", 11)
    depths = layer_map([*names, "norm.weight"])
    assert depths["blocks.11.mlp.0.weight"] == 1.0
    assert depths["blocks.0.mlp.1.weight"] == 0.0
    assert depths["norm.weight"] is None


def test_towers_and_stacks_have_their_own_depth_or_one_together():
    names = [*block_names("visual.resblocks", 3), *block_names("text.resblocks", 5)]
    depths = layer_map(names)
    assert depths["visual.resblocks.1.attn.weight"] == 0.5
    assert depths["text.resblocks.1.attn.weight"] == 0.25
    together = layer_map(names, stacks="concatenated")
    assert together["visual.resblocks.2.attn.weight"] == pytest.approx(2 / 7)
    assert together["text.resblocks.0.attn.weight"] == pytest.approx(3 / 7)
    assert together["text.resblocks.4.attn.weight"] == 1.0


def test_a_single_block_has_full_depth():
    assert layer_map(block_names("layers", 1))["layers.0.attn.weight"] == 1.0


def test_a_patch_embedding_and_an_mlp_head_are_not_blocks():
    names = [*block_names("blocks", 4), "patch.0.weight", "head.0.weight", "head.1.weight"]
    depths = layer_map(names)
    assert depths["patch.0.weight"] is None
    assert depths["head.1.weight"] is None
    assert depths["blocks.3.attn.weight"] == 1.0


def test_plain_layers_in_a_row_are_blocks_when_nothing_else_is():
    depths = layer_map(["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.2.weight", "net.2.bias"])
    assert depths["net.1.bias"] == 0.5


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["fc1.weight", "fc2.weight"], "No block was found"),
        (["layers.0.a.weight", "layers.2.a.weight"], "Can't tell"),
        (["stages.0.a.x", "stages.1.b.y", "stages.2.c.z"], "Can't tell"),
        (["a.0.weight", "a.1.weight", "b.0.weight", "b.1.weight"], "Can't tell"),
    ],
)
def test_what_names_do_not_tell_is_refused(names, said):
    with pytest.raises(BadInput, match=said):
        layer_map(names)


def test_the_users_own_order():
    names = ["stem.weight", "stage_a.conv.weight", "stage_b.conv.weight", "stage_b.norm.weight", "fc.weight"]
    depths = layer_map(names, order=[["stem"], ["stage_a"], ["stage_b.*"]])
    assert [depths[n] for n in names] == [0.0, 0.5, 1.0, 1.0, None]
    with pytest.raises(BadInput, match=r"'stage_c' matches no tensor"):
        layer_map(names, order=[["stage_c"]])
    with pytest.raises(BadInput, match="in group 0 and in group 1"):
        layer_map(names, order=[["stage_a"], ["stage_*"]])


def test_names_and_anatomy_agree_on_a_llama():
    model = tiny_llama(num_hidden_layers=3)
    names = list(dict(model.named_parameters()))
    assert layer_map(names, Anatomy.of(model)) == layer_map(names)
    assert layer_map(names)["model.layers.1.mlp.up_proj.weight"] == 0.5
