"""LiNeS: its ends, its linearity, its routes (dense, streamed, LoRA), its refusals."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pegbox.errors import BadInput
from pegbox.parts.algebra import StateReader, write_state
from pegbox.weights import WEIGHTS
from pegbox.weights.lines import Depth, coefficients, derived_alpha, scale_adapter
from pegbox.weights.merges import average, task_arithmetic, ties
from pegbox.weights.updates import Merged, Updates

SHAPES = {"embed.weight": (6, 4), "norm.weight": (4,), "head.weight": (6, 4)}
SHAPES |= {f"layers.{i}.{part}": (4, 4) for i in range(4) for part in ("attn.q.weight", "mlp.up.weight")}


def state(seed, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    made = {n: (scale * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for n, s in SHAPES.items()}
    return {**made, "position_ids": torch.arange(8).view(1, 8)}


def lines(base, tuned, anatomy=None, **options):
    return dict(WEIGHTS.validate({"kind": "lines", **options}).apply(base, [tuned], anatomy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_ends(dtype):
    base, tuned = state(0, dtype), state(1, dtype)
    base["norm.weight"][0] = -0.0
    full = lines(base, tuned, alpha=1.0, beta=0.0)
    none = lines(base, tuned, alpha=0.0, beta=0.0)
    assert full.keys() == none.keys() == base.keys()
    for name in SHAPES:
        assert torch.equal(full[name], tuned[name])
        assert torch.equal(none[name], base[name])
        assert torch.equal(torch.signbit(none[name]), torch.signbit(base[name]))
        assert full[name].dtype == dtype


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.7, 1 / 3])
def test_the_last_block_is_kept_whole(alpha):
    base, tuned = state(0), state(1)
    edited = lines(base, tuned, alpha=alpha)
    assert torch.equal(edited["layers.3.mlp.up.weight"], tuned["layers.3.mlp.up.weight"])
    expected = base["embed.weight"] + alpha * (tuned["embed.weight"] - base["embed.weight"])
    torch.testing.assert_close(edited["embed.weight"], expected)


@settings(max_examples=40, deadline=None)
@given(alpha=st.floats(-2, 2), beta=st.floats(-2, 2), blocks=st.integers(2, 40))
def test_coefficients_are_affine_in_the_block(alpha, beta, blocks):
    lam = coefficients({str(i): i / (blocks - 1) for i in range(blocks)}, alpha, beta)
    for i in range(blocks):
        assert lam[str(i)] == pytest.approx(alpha + beta * i / (blocks - 1), abs=2e-12)


def test_scaling_commutes_with_sums():
    base, a, b = state(0), state(1, scale=0.1), state(2, scale=0.1)
    names = list(SHAPES)
    edit = lambda tau: lines(base, {**base, **{n: base[n] + tau[n] for n in names}}, alpha=0.3, beta=0.5)  # noqa: E731
    both, first, second = edit({n: a[n] + b[n] for n in names}), edit(a), edit(b)
    for n in names:
        torch.testing.assert_close(both[n] - base[n], (first[n] - base[n]) + (second[n] - base[n]), atol=1e-12, rtol=0)


def test_outside_the_blocks():
    base, tuned = state(0), state(1)
    for outside, expected in [("zero", base), ("full", tuned)]:
        edited = lines(base, tuned, alpha=0.4, outside=outside)
        assert torch.equal(edited["head.weight"], expected["head.weight"])
    edited = lines(base, tuned, alpha=0.4, outside={"head": 1.0, "embed": 0.0})
    assert torch.equal(edited["head.weight"], tuned["head.weight"])
    assert torch.equal(edited["embed.weight"], base["embed.weight"])
    torch.testing.assert_close(edited["norm.weight"], torch.lerp(base["norm.weight"], tuned["norm.weight"], 0.4))
    with pytest.raises(BadInput, match="'classifier' matches no tensor outside"):
        lines(base, tuned, outside={"classifier": 1.0})


def test_half_precision_is_rounded_once():
    base, tuned = state(0, torch.bfloat16), state(1, torch.bfloat16)
    edited = lines(base, tuned, alpha=0.37)
    name = "layers.1.attn.q.weight"
    lam = 0.37 + 0.63 / 3
    exact = torch.lerp(base[name].float(), tuned[name].float(), lam)
    assert torch.equal(edited[name], exact.bfloat16())


def test_integers_are_copied():
    base, tuned = state(0), state(1)
    assert lines(base, tuned, alpha=0.5)["position_ids"] is base["position_ids"]


def test_tied_names_are_edited_once():
    base, tuned = state(0), state(1)
    base["tied.weight"], tuned["tied.weight"] = base["embed.weight"], tuned["embed.weight"]

    class Ties:
        ties = {"tied.weight": "embed.weight"}
        stacks = {}

    del tuned["tied.weight"]  # saved once, as transformers does
    edited = lines(base, tuned, Ties(), alpha=0.5)
    assert "tied.weight" not in edited
    assert "embed.weight" in edited


def test_streaming_equals_in_memory_bit_for_bit(tmp_path):
    base, tuned = state(0, torch.float32), state(1, torch.float32)
    write_state(base.items(), tmp_path / "base", base, max_shard_bytes=200)
    write_state(tuned.items(), tmp_path / "tuned", tuned, max_shard_bytes=350)
    op = WEIGHTS.validate({"kind": "lines", "alpha": 0.3})
    readers = StateReader(tmp_path / "base"), StateReader(tmp_path / "tuned")
    write_state(op.apply(readers[0], [readers[1]], None), tmp_path / "out", readers[0], max_shard_bytes=300)
    written = StateReader(tmp_path / "out")
    for name, tensor in op.apply(base, [tuned], None):
        assert torch.equal(written[name], tensor), name


def test_lora_route_equals_the_dense_one():
    base = {n: t for n, t in state(0, torch.float32).items() if n != "position_ids"}
    g = torch.Generator().manual_seed(3)
    adapter, scaling = {}, 2.0
    dense = dict(base)
    for i in range(4):
        a, b = torch.randn(2, 4, generator=g), torch.randn(4, 2, generator=g)
        prefix = f"base_model.model.layers.{i}.attn.q"
        adapter |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        dense[f"layers.{i}.attn.q.weight"] = base[f"layers.{i}.attn.q.weight"] + scaling * b @ a
    dense["head.weight"] = adapter["base_model.model.head.weight"] = base["head.weight"] + 1
    expected = lines(base, dense, alpha=0.3, beta=0.6)
    scaled = dict(scale_adapter(adapter, Depth(beta=0.6), 0.3, base=base))
    for i in range(4):
        prefix = f"base_model.model.layers.{i}.attn.q"
        update = scaling * scaled[f"{prefix}.lora_B.weight"] @ scaled[f"{prefix}.lora_A.weight"]
        name = f"layers.{i}.attn.q.weight"
        torch.testing.assert_close(base[name] + update, expected[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled["base_model.model.head.weight"], expected["head.weight"], atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="trained whole"):
        dict(scale_adapter(adapter, Depth(), 0.3))
    with pytest.raises(BadInput, match="DoRA"):
        dict(scale_adapter({**adapter, "base_model.model.layers.0.attn.q.lora_magnitude_vector": a}, Depth(), 0.3))


def test_new_vocabulary_rows():
    base, tuned = state(0), state(1)
    tuned["embed.weight"] = torch.cat([tuned["embed.weight"], torch.full((2, 4), 9.0, dtype=torch.float64)])
    with pytest.raises(BadInput, match=r"\(6, 4\) in the base and \(8, 4\)"):
        lines(base, tuned, alpha=0.5)
    edited = lines(base, tuned, alpha=0.5, new_rows="keep")
    assert edited["embed.weight"].shape == (8, 4)
    assert (edited["embed.weight"][6:] == 9).all()
    torch.testing.assert_close(
        edited["embed.weight"][:6], torch.lerp(base["embed.weight"], tuned["embed.weight"][:6], 0.5)
    )


def test_alpha_of_task_arithmetic_is_one_over_k_and_scales_inversely():
    updates = Updates(state(0), [state(i) for i in (1, 2, 3)])
    merged = task_arithmetic(updates)
    assert derived_alpha(updates, merged) == 1 / 3
    half = Merged(lambda n: 0.5 * merged.update(n), merged.summed)
    assert derived_alpha(updates, half) == pytest.approx(2 / 3, rel=1e-12)
    assert derived_alpha(updates, average(updates)) == pytest.approx(1.0, rel=1e-12)
    assert derived_alpha(updates, ties(updates, keep=20)) > 0
    zero = Merged(lambda n: 0.0 * merged.update(n), merged.summed)
    with pytest.raises(BadInput, match="zero everywhere"):
        derived_alpha(updates, zero)


@pytest.mark.parametrize(
    "block",
    [
        {"kind": "lines", "alpha": math.nan},
        {"kind": "lines", "beta": math.inf},
        {"kind": "lines", "outside": "some"},
        {"kind": "lines", "gamma": 1.0},
        {"kind": "ties", "keep": 0},
        {"kind": "ties", "keep": 101},
        {"kind": "task_arithmetic", "scaler": {"kind": "lines", "alpha": math.nan}},
    ],
)
def test_bad_options_are_refused(block):
    with pytest.raises(BadInput):
        WEIGHTS.validate(block)


@pytest.mark.parametrize(
    "block",
    [
        {"kind": "lines", "outside": {"head": 1.0}, "layer_order": [["a"], ["b"]]},
        {"kind": "ties", "scaler": {"kind": "lines", "beta": 0.3}},
        {"kind": "consensus", "threshold": [0.2, 0.4]},
    ],
)
def test_a_resolved_block_validates_again(block):
    op = WEIGHTS.validate(block)
    assert WEIGHTS.validate(op.model_dump(mode="json")) == op


def test_bad_states_are_refused():
    base, tuned = state(0), state(1)
    with pytest.raises(BadInput, match=r"'norm.weight' is not in"):
        lines(base, {n: t for n, t in tuned.items() if n != "norm.weight"})
    with pytest.raises(BadInput, match=r"'norm.weight' is \(4,\)"):
        lines(base, {**tuned, "norm.weight": torch.ones(5)})
    with pytest.raises(BadInput, match="quantized"):
        lines({**base, "q": torch.ones(2, 2, dtype=torch.uint8)}, {**tuned, "q": torch.ones(2, 2, dtype=torch.uint8)})
    with pytest.raises(BadInput, match="one tuned model"):
        list(WEIGHTS.validate("lines").apply(base, [tuned, tuned], None))
    with pytest.raises(BadInput, match="no tuned model"):
        list(WEIGHTS.validate("task_arithmetic").apply(base, [], None))
    with pytest.raises(BadInput, match="No block"):
        lines({"w": torch.ones(2)}, {"w": torch.ones(2)})


def test_mergekit_configuration_says_the_same():
    yaml = WEIGHTS.validate({"kind": "lines", "alpha": 0.2, "beta": 0.6}).to_mergekit_yaml("base", "tuned")
    from ruamel.yaml import YAML

    read = YAML(typ="safe").load(yaml)
    assert read["merge_method"] == "task_arithmetic"
    assert read["models"][0]["parameters"]["weight"] == pytest.approx([0.2, 0.8])
    assert read["parameters"]["normalize"] is False
    with pytest.raises(BadInput, match="mergekit"):
        WEIGHTS.validate({"kind": "lines", "outside": "full"}).to_mergekit_yaml("base", "tuned")


@pytest.mark.skipif(importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed")
def test_mergekit_gives_the_same_weights(tmp_path):
    import yaml as pyyaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    from pegbox.testing import tiny_llama

    for seed, name in enumerate(("base", "tuned")):
        tiny_llama(seed, num_hidden_layers=4).save_pretrained(tmp_path / name)
    op = WEIGHTS.validate({"kind": "lines", "alpha": 0.2, "beta": 0.6})
    config = pyyaml.safe_load(op.to_mergekit_yaml(str(tmp_path / "base"), str(tmp_path / "tuned")))
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), MergeOptions(copy_tokenizer=False))
    theirs = StateReader(tmp_path / "theirs")
    readers = StateReader(tmp_path / "base"), StateReader(tmp_path / "tuned")
    for name, tensor in op.apply(readers[0], [readers[1]], None):
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=0)


def test_lines_reads_files_of_a_real_layout(tmp_path):
    from pegbox.parts.anatomy import Anatomy
    from pegbox.testing import tiny_llama

    base, tuned = tiny_llama(0), tiny_llama(1)
    base.save_pretrained(tmp_path / "base")
    save_file({n: t.contiguous() for n, t in tuned.state_dict().items()}, tmp_path / "tuned.safetensors")
    op = WEIGHTS.validate({"kind": "lines", "alpha": 0.25})
    out = dict(
        op.apply(StateReader(tmp_path / "base"), [StateReader(tmp_path / "tuned.safetensors")], Anatomy.of(base))
    )
    assert set(out) == set(base.state_dict())
    model = tiny_llama(0)
    model.load_state_dict(out)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, tuned.model.layers[1].mlp.up_proj.weight)
