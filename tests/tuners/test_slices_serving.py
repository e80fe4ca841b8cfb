"""Fusing, switching and serving slices adapters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from pegbox.errors import BadInput, Unsupported, WrongBase
from pegbox.parts.slices import Slice, SliceSet, fuse, to_sparse_delta
from pegbox.testing import tiny_llama
from pegbox.tuners.slices import (
    ParallelAdapters,
    SlicesConfig,
    Switcher,
    export_slices,
    gathered_product,
    scattered_product,
    to_full_weights,
)

IDS = torch.arange(24).view(2, 12)


def adapter(seed, ratios=None, base=None, **select):
    """An adapter with random values, and the tuned weights it makes."""
    ratios = ratios or {"v": 0.5, "o": 0.25, "u": 0.2, "d": 0.3}
    config = SlicesConfig(select={"kind": "units", "ratios": ratios, **select}, seed=seed)
    model = get_peft_model(base or tiny_llama(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.2, generator=generator)
    model.save = model.save_pretrained
    return export_slices(model), to_full_weights(model), model


def merged(slices):
    model = tiny_llama()
    Switcher(model).to(slices)
    return model


# ---- fusing


def test_fused_disjoint_adapters_keep_their_own_weights(tmp_path):
    """Each unit's weights equal those of the adapter that owns it, bit for bit."""
    a, full_a, model = adapter(1)
    model.save_pretrained(tmp_path)
    b, full_b, _ = adapter(2, exclude=[str(tmp_path)])
    fused = merged(fuse([a, b])).state_dict()
    base = tiny_llama().state_dict()
    for name in {*a, *b}:
        owned = {}
        for one, full in ((a, full_a), (b, full_b)):
            if name in one:
                for i in one[name].index.tolist():
                    assert i not in owned
                    owned[i] = full[name].select(one[name].axis, i)
        axis = (a.get(name) or b[name]).axis
        for i in range(fused[name].shape[axis]):
            assert torch.equal(fused[name].select(axis, i), owned.get(i, base[name].select(axis, i)))


def test_overlapping_adapters_add_up_and_take_weights():
    a, b = adapter(1)[0], adapter(2)[0]
    assert any(set(a[n].index.tolist()) & set(b[n].index.tolist()) for n in set(a) & set(b))
    fused, base = merged(fuse([a, b], [0.5, 2.0])).state_dict(), tiny_llama().state_dict()
    for name in {*a, *b}:
        change = torch.zeros_like(base[name])
        for one, factor in ((a, 0.5), (b, 2.0)):
            if name in one:
                change.index_add_(one[name].axis, one[name].index, one[name].values, alpha=factor)
        torch.testing.assert_close(fused[name], base[name] + change)


@given(
    st.integers(0, 1),
    st.lists(st.integers(0, 7), unique=True, min_size=1),
    st.lists(st.integers(0, 7), unique=True, min_size=1),
)
def test_fusing_is_adding(axis, one, two):
    def slices(index, seed):
        shape = (len(index), 5) if axis == 0 else (5, len(index))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return SliceSet({"w": Slice(axis, 8, torch.tensor(index), values)})

    def dense(s):
        return torch.zeros(s["w"].shape).index_add(axis, s["w"].index, s["w"].values)

    a, b = slices(one, 0), slices(two, 1)
    torch.testing.assert_close(dense(fuse([a, b])), dense(a) + dense(b))
    piece = to_sparse_delta(a)["w"]
    assert torch.equal(
        torch.zeros(piece.values.numel() * 0 + 40).index_add(0, piece.index.long(), piece.values), dense(a).flatten()
    )


def test_adapters_of_different_bases_are_not_fused():
    """Fusing adapters of different base models."""
    a, b = adapter(1)[0], adapter(2, base=tiny_llama(7))[0]
    assert a.base != b.base
    with pytest.raises(WrongBase, match="different bases"):
        fuse([a, b])
    wide = adapter(2, base=tiny_llama(intermediate_size=80))[0]
    wide.base = a.base
    with pytest.raises(WrongBase, match="slices along axis"):
        fuse([a, wide])
    for adapters, weights in (([], None), ([a], [1.0, 2.0])):
        with pytest.raises(BadInput, match="can't be fused"):
            fuse(adapters, weights)


def test_values_in_absolute_coordinates_fuse_only_apart():
    one = SliceSet({"w": Slice(0, 4, torch.tensor([1]), torch.ones(1, 3), "set")})
    two = SliceSet({"w": Slice(0, 4, torch.tensor([2]), torch.ones(1, 3), "set")})
    assert fuse([one, two])["w"].index.tolist() == [1, 2]
    with pytest.raises(Unsupported, match="both adapters change"):
        fuse([one, one])
    with pytest.raises(Unsupported, match="can't be weighted"):
        fuse([one], [0.5])


# ---- switching


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_there_and_back_is_exact(dtype):
    """a -> b -> a restores weights bit for bit, and leaving them restores the base."""
    a, b = adapter(1)[0], adapter(2)[0]
    model = tiny_llama().to(dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    switcher = Switcher(model)
    switcher.to(a)
    with_a = {n: t.clone() for n, t in model.state_dict().items()}
    switcher.to(b)
    assert any(not torch.equal(with_a[n], t) for n, t in model.state_dict().items())
    switcher.to(a)
    assert all(torch.equal(with_a[n], t) for n, t in model.state_dict().items())
    switcher.to(None)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_switching_by_subtraction_leaves_rounding_alone():
    a, b = adapter(1)[0], adapter(2)[0]
    model = tiny_llama()
    switcher = Switcher(model, exact=False)
    for one in (a, b, None):
        switcher.to(one)
    for n, t in tiny_llama().state_dict().items():
        torch.testing.assert_close(model.state_dict()[n], t, rtol=0, atol=1e-6)


def test_what_cannot_be_switched_is_refused_before_anything_moves():
    a = adapter(1)[0]
    model = tiny_llama(intermediate_size=80)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(WrongBase, match="has shape"):
        Switcher(model).to(a)
    with pytest.raises(WrongBase, match="not in this model"):
        Switcher(tiny_llama(num_hidden_layers=1)).to(a)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    absolute = SliceSet({"w": Slice(0, 4, torch.tensor([1]), torch.ones(1, 3), "set")})
    with pytest.raises(Unsupported, match="can't be subtracted"):
        Switcher({"w": torch.zeros(4, 3)}, exact=False).to(absolute)
    with pytest.raises(Unsupported, match="packed"):
        Switcher({"w": torch.zeros(4, 3, dtype=torch.uint8)}).to(absolute)


# ---- serving


@torch.no_grad()
def answer(model, ids):
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    "names", [["a", "b"], ["b", "a"], ["a", "a"], ["b", None], [None, None], ["a", "b", "a", None]]
)
def test_each_row_goes_through_its_own_adapter(names):
    """Row n equals row n alone with its merged adapter (1e-5)."""
    adapters = {"a": adapter(1)[0], "b": adapter(2)[0]}
    model = tiny_llama()
    served = ParallelAdapters(model, adapters)
    ids = torch.randint(0, 256, (len(names), 9), generator=torch.Generator().manual_seed(0))
    with served.rows(names):
        together = answer(model, ids)
    for n, name in enumerate(names):
        alone = merged(adapters[name]) if name else tiny_llama()
        torch.testing.assert_close(together[n], answer(alone, ids[n : n + 1])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(answer(model, ids), answer(tiny_llama(), ids))
    served.remove()
    assert not served.handles


def test_one_row_for_each_of_equal_adapters_takes_the_stacked_way():
    """Equal sizes, adapter n for row n: one batched product, the same numbers."""
    ratios = {"u": 0.2, "d": 0.2, "v": 0.5}
    adapters = {n: adapter(i, ratios, scope="per_block")[0] for i, n in enumerate("abc")}
    model, ids = tiny_llama(), torch.arange(30).view(3, 10)
    served = ParallelAdapters(model, adapters)
    with served.rows(list("abc")):
        stacked = answer(model, ids)
    with served.rows(list("cab")):
        grouped = answer(model, ids.roll(1, 0))
    torch.testing.assert_close(grouped.roll(-1, 0), stacked, rtol=0, atol=1e-5)
    for n, one in enumerate(adapters.values()):
        torch.testing.assert_close(stacked[n], answer(merged(one), ids[n : n + 1])[0], rtol=0, atol=1e-5)


def test_generation_in_a_mixed_batch():
    adapters = {"a": adapter(1)[0], "b": adapter(2)[0]}
    model, ids = tiny_llama(), torch.arange(10).view(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with ParallelAdapters(model, adapters).rows(["a", "b"]):
        together = model.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)
    for n, one in enumerate(adapters.values()):
        mine = ids[n : n + 1]
        alone = merged(one).eval().generate(mine, attention_mask=torch.ones_like(mine), **options)
        assert torch.equal(together[n], alone[0])


def test_transposed_fused_matrices_are_served():
    from transformers import GPT2Config, GPT2LMHeadModel

    def base():
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes)).eval()

    adapters = {n: adapter(i, base=base())[0] for i, n in enumerate("ab")}
    model = base()
    with ParallelAdapters(model, adapters).rows(["b", "a"]):
        together = answer(model, IDS)
    for n, name in enumerate("ba"):
        alone = base()
        Switcher(alone).to(adapters[name])
        torch.testing.assert_close(together[n], answer(alone, IDS[n : n + 1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 10), (3, 1, 10), (3, 4, 10)])
def test_the_products_against_loops(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    columns, rows = torch.randn(3, 6, 2, generator=generator), torch.randn(3, 2, 10, generator=generator)
    index = torch.tensor([[1, 3], [5, 0], [2, 4]])
    y = torch.zeros(*shape[:-1], 6)
    found, scattered = gathered_product(x, index, columns), scattered_product(y, x, index, rows)
    for n in range(3):
        torch.testing.assert_close(found[n], x[n][..., index[n]] @ columns[n].T)
        torch.testing.assert_close(scattered[n][..., index[n]], x[n] @ rows[n].T)
    assert not y.any()


def test_what_cannot_be_served_is_refused():
    a = adapter(1)[0]
    model = tiny_llama()
    served = ParallelAdapters(model, {"a": a})
    with pytest.raises(BadInput, match="No adapter 'b'"), served.rows(["b"]):
        pass
    with served.rows(["a"]):
        with pytest.raises(Unsupported, match="no_grad"):
            model(input_ids=IDS[:1])
        with pytest.raises(BadInput, match="named for 1"):
            answer(model, IDS)
    with pytest.raises(WrongBase, match="has shape"):
        ParallelAdapters(tiny_llama(intermediate_size=80), {"a": a})
    with pytest.raises(WrongBase, match="has not"):
        ParallelAdapters(tiny_llama(num_hidden_layers=1), {"a": a})
    absolute = SliceSet({n: Slice(p.axis, p.length, p.index, p.values, "set") for n, p in a.items()})
    with pytest.raises(Unsupported, match="absolute"):
        ParallelAdapters(tiny_llama(), {"a": absolute})


def test_a_re_ordered_model_is_refused():
    from pegbox.parts.coupled import reorder

    model = tiny_llama()
    reorder(model, {"model.layers.0.mlp": list(range(63, -1, -1))})
    for make in (lambda: Switcher(model), lambda: ParallelAdapters(model, {})):
        with pytest.raises(Unsupported, match="original numbers"):
            make()
