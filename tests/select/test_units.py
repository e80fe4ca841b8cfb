"""S2FT's selector: exact counts, every strategy against its formula, exclusion, grouped queries, refusals."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.allocation import Units
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.statistics import collect
from pegbox.select import SELECT
from pegbox.testing import tiny_batch, tiny_llama

ALL = {"v": 0.5, "o": 0.25, "u": 0.1, "d": 0.2}
DOWN = "model.layers.{}.mlp.down_proj.weight"
INPUTS = {k: v for k, v in tiny_batch().items() if k in ("input_ids", "attention_mask", "labels")}


def select(model, draw=0, stats=None, **options):
    selector = SELECT.validate({"kind": "units", **options})
    if selector.statistics() is not None and stats is None:
        stats = collect(model, selector.statistics(), [INPUTS])
    weights = dict(model.named_parameters())
    return selector.select(Anatomy.of(model), weights, stats, torch.Generator().manual_seed(draw))


def chosen(allocation, pattern=DOWN, blocks=2):
    return [
        allocation[pattern.format(b)].index.tolist() if pattern.format(b) in allocation else [] for b in range(blocks)
    ]


@functools.cache
def one_llama():
    return tiny_llama()


@given(ratio=st.floats(0.008, 1), seed=st.integers(0, 99), scope=st.sampled_from(["global", "per_block"]))
def test_the_count_is_the_floor_of_ratio_times_total(ratio, seed, scope):
    """Number of selected units = floor(ratio * total) exactly; the same seed, the same selection."""
    model = one_llama()
    if scope == "per_block" and ratio * 64 < 1:
        return
    allocation = select(model, seed, ratios={"d": ratio}, scope=scope)
    per_block = [len(units) for units in chosen(allocation)]
    if scope == "global":
        assert sum(per_block) == math.floor(ratio * 128 + 1e-9)
    else:
        assert per_block == [math.floor(ratio * 64 + 1e-9)] * 2
    assert allocation.digest() == select(model, seed, ratios={"d": ratio}, scope=scope).digest()


def test_decimal_ratios_are_not_a_victim_of_binary_fractions():
    model = tiny_llama(intermediate_size=50)
    assert sum(map(len, chosen(select(model, ratios={"d": 0.29})))) == 29


def test_seeds_differ_and_an_own_seed_wins(llama):
    assert select(llama, 1, ratios=ALL).digest() != select(llama, 2, ratios=ALL).digest()
    assert select(llama, 1, ratios=ALL, seed=7).digest() == select(llama, 2, ratios=ALL, seed=7).digest()


def test_rows_and_columns_of_whole_heads(llama):
    allocation = select(llama, ratios={"v": 0.5, "o": 0.5, "u": 0.1, "d": 0.1})
    assert {n.rsplit(".", 2)[1]: c.axis for n, c in allocation.items()} == {
        "v_proj": 0, "o_proj": 1, "up_proj": 0, "down_proj": 1,
    }  # fmt: skip
    for name, choice in allocation.items():
        if "self_attn" in name:  # heads of 8
            heads = sorted({i // 8 for i in choice.index.tolist()})
            assert choice.index.tolist() == [h * 8 + i for h in heads for i in range(8)]
    v = sum(len(c.index) // 8 for n, c in allocation.items() if "v_proj" in n)
    o = sum(len(c.index) // 8 for n, c in allocation.items() if "o_proj" in n)
    assert (v, o) == (2, 4)  # half of 2 x 2 key-value heads, half of 2 x 4 query heads


def test_fused_and_transposed_matrices():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    allocation = select(gpt, ratios={"v": 1, "d": 1})
    values = allocation["transformer.h.0.attn.c_attn.weight"]
    assert isinstance(values, Units)
    assert (values.axis, values.index.tolist()) == (1, list(range(32, 48)))
    assert allocation["transformer.h.0.mlp.c_proj.weight"].axis == 0


def _down(model):
    return [block.mlp.down_proj.weight.detach().double() for block in model.model.layers]


def _hidden(model):
    """Mean |h| per channel and block over the tokens that count."""
    seen = []
    hooks = [
        b.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach())) for b in model.model.layers
    ]
    with torch.no_grad():
        model.eval()(**{k: v for k, v in INPUTS.items() if k != "labels"})
    for hook in hooks:
        hook.remove()
    mask = INPUTS["attention_mask"].bool()
    return [h[mask].double().abs().mean(0) for h in seen]


def _slope(model):
    model.eval()(**INPUTS).loss.backward()
    found = [block.mlp.down_proj.weight.grad.double().norm(dim=0) for block in model.model.layers]
    model.zero_grad()
    return found


SCORES = {
    "weight": lambda m: [w.norm(dim=0) for w in _down(m)],
    "activation": _hidden,
    "product": lambda m: [w.norm(dim=0) * h for w, h in zip(_down(m), _hidden(m))],
    "gradient": _slope,
}


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("strategy", list(SCORES))
def test_strategies_against_their_formulas(llama, strategy, order):
    score = torch.cat(SCORES[strategy](llama))
    wanted = score.argsort(descending=order == "largest")[:25].sort().values.tolist()
    found = chosen(select(llama, ratios={"d": 0.2}, strategy=strategy, order=order))
    assert found[0] + [64 + u for u in found[1]] == wanted


def test_a_key_value_heads_score_is_that_of_its_query_heads(llama):
    allocation = select(llama, ratios={"v": 0.25}, strategy="weight")
    scores = [b.self_attn.o_proj.weight.detach().view(32, 2, 16).square().sum((0, 2)) for b in llama.model.layers]
    best = int(torch.cat(scores).argmax())
    name = f"model.layers.{best // 2}.self_attn.v_proj.weight"
    assert list(allocation) == [name]
    assert allocation[name].index.tolist() == list(range(best % 2 * 8, best % 2 * 8 + 8))


def test_scopes_and_targets(llama):
    inside = select(llama, ratios={"d": 0.5}, target_modules="blocks 1")
    assert chosen(inside)[0] == []
    assert len(chosen(inside)[1]) == 32
    with pytest.raises(BadInput, match="There are 2 outside"):
        select(llama, ratios={"d": 0.5}, target_modules="attention")


def test_exclusion_is_respected(llama, tmp_path):
    """Units of other adapters are never chosen again; asking for more than is left is refused."""
    from peft import get_peft_model

    from pegbox.tuners.slices import SlicesConfig

    first = select(llama, 1, ratios={"d": 0.6, "o": 0.5})
    get_peft_model(tiny_llama(), SlicesConfig().with_allocation(first)).save_pretrained(tmp_path)
    other = select(llama, 2, ratios={"d": 0.4, "o": 0.5}, exclude=[str(tmp_path)])
    for name in set(first) & set(other):
        assert not set(first[name].index.tolist()) & set(other[name].index.tolist())
    with pytest.raises(BadInput, match=r"asks for 64 units, and only 52 of 128 are left"):
        select(llama, 2, ratios={"d": 0.5}, exclude=[str(tmp_path)])
    with pytest.raises(BadInput, match="holds no adapter"):
        select(llama, ratios={"d": 0.5}, exclude=[str(tmp_path / "nothing")])


def test_the_meta_device_counts():
    with torch.device("meta"):
        model = tiny_llama()
    for strategy in ("random", "weight"):
        selector = SELECT.validate({"kind": "units", "ratios": ALL, "strategy": strategy})
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        counted = sum(selector.count(Anatomy.of(model), shapes).values())
        assert counted == sum(select(tiny_llama(), ratios=ALL).trained(shapes).values())
        assert selector.needs_weights == (strategy == "weight")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratios": {"d": 1.5}}, "ratios.d"),
        ({"ratios": {"d": -0.1}}, "ratios.d"),
        ({"ratios": {"d": 0.0}}, "all zero"),
        ({"ratios": {"x": 0.5}}, "ratios.x"),
        ({"ratios": {"d": 0.005}}, "there are 128 channels in all. Use 0.0079"),
        ({"ratios": {"o": 0.1}}, "there are 8 query heads in all. Use 0.125"),
        ({"ratios": {"v": 0.2}}, "there are 4 key-value heads in all"),
        ({"ratios": {"d": 0.01}, "scope": "per_block"}, "a block has 64 channels"),
        ({"strategy": "best"}, "strategy"),
        ({"target_modules": "attentoin"}, "attention"),
    ],
)
def test_bad_options_are_refused(llama, options, says):
    """Ratios outside [0, 1], all zero, or too small for one unit (with how many exist), and misspelt words."""
    with pytest.raises(BadInput, match=says):
        select(llama, **options)


@pytest.mark.parametrize("strategy", ["activation", "product", "gradient"])
def test_scores_on_data_need_data(llama, strategy):
    """A, S and G without calibration data."""
    selector = SELECT.validate({"kind": "units", "ratios": {"d": 0.5}, "strategy": strategy})
    with pytest.raises(BadInput, match="calibration data"):
        selector.select(Anatomy.of(llama), dict(llama.named_parameters()), None, torch.Generator())


def test_a_model_without_the_structure_is_refused():
    """An architecture without a coupled structure, and heads that don't divide."""
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(BadInput, match="no coupled structure"):
        select(mamba, ratios={"d": 0.5})
    uneven = tiny_llama(num_attention_heads=4, num_key_value_heads=3, head_dim=8)
    with pytest.raises(BadInput, match="can't be divided"):
        select(uneven, ratios={"o": 0.5})
    assert select(uneven, ratios={"d": 0.5})
