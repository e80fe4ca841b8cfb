"""The smallest weights through the sparse tuner: any tensor, one threshold, a second stage, resuming, the rank loss."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from engine.helpers import stage
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.objectives.terms import TERM, matrix_of
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.indexsets import intersect
from pegbox.parts.penalties import nuclear_norm
from pegbox.select import SELECT
from pegbox.testing import tiny_llama
from pegbox.tuners import TUNER
from pegbox.tuners.sparse import MaskRefresh, SparseConfig, sparse_layers
from pegbox.tuners.sparse.refresh import read_index, refresh

IDS = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(0))


def smallest(**options):
    return SELECT.validate({"kind": "smallest", **({"density": 0.1} | options)})


def chosen(selector, model):
    return selector.select(Anatomy.of(model), dict(model.named_parameters()), None, torch.Generator())


def attached(model=None, selector=None, coordinates="absolute"):
    model = model or tiny_llama()
    allocation = chosen(selector or smallest(), model)
    return TUNER.validate({"kind": "sparse", "coordinates": coordinates}).attach(model, allocation, Context(model))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_one_threshold_over_all_tensors():
    model = tiny_llama()
    named = dict(model.named_parameters())
    shared = {n for n in named if "embed" in n and model.config.tie_word_embeddings}
    for selector in (smallest(theta=0.004, density=None), smallest(density=0.1)):
        found = chosen(selector, model)
        sizes = torch.cat([named[n].detach().abs().flatten()[c.index.long()] for n, c in found.items()])
        rest = [p.detach().abs().flatten() for n, p in named.items() if n not in shared]
        assert sizes.numel() == int((torch.cat(rest) <= sizes.max()).sum())
    assert chosen(smallest(theta=2.0, density=None), model)["model.norm.weight"].index.numel() == 32  # norms too


def test_a_weight_that_two_modules_share_is_left_out():
    model = tiny_llama(tie_word_embeddings=True)
    assert not any("embed" in n or "head" in n for n in chosen(smallest(), model))
    assert any("embed" in n for n in chosen(smallest(), tiny_llama(tie_word_embeddings=False)))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Linear(27, 2)
        self.embed = nn.Embedding(5, 25)

    def forward(self, ids):
        x = self.embed(ids).view(-1, 1, 5, 5)
        return self.out(torch.tanh(self.norm(self.conv(x))).flatten(1))


def test_any_tensor_trains_in_the_tuner():
    """Convolution, norm, embedding, bias: the first forward is the base's; entries outside never move (1)."""
    base, ids = Conv(), torch.arange(5)
    want, before = base(ids), {n: p.detach().clone() for n, p in base.named_parameters()}
    select = smallest(density=0.4)
    found = select.select(None, before, None, torch.Generator())
    model = get_peft_model(base, SparseConfig(coordinates="absolute").with_allocation(found))
    assert torch.equal(model(ids), want)
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    for _ in range(3):
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in sparse_layers(model).items():
        for tensor in ("weight", "bias"):
            key = f"{name}.{tensor}"
            if key not in found:
                continue
            outside = torch.ones(before[key].numel(), dtype=torch.bool)
            outside[found[key].index.long()] = False
            after = layer.tuned(tensor).flatten()
            assert torch.equal(after[outside], before[key].flatten()[outside])
            assert (after != before[key].flatten()).any()


@pytest.mark.parametrize("coordinates", ["absolute", "delta"])
@pytest.mark.parametrize("by", ["theta", "density"])
@pytest.mark.parametrize("reset", [False, True])
def test_the_second_stage(by, coordinates, reset):
    """6. M2 is a subset, frozen entries keep their learnt value, moments are sliced (or start anew)."""
    schedule = {"at": 3, "reset_state": reset}
    given = {"theta": 0.004, "density": None} if by == "theta" else {"density": 0.1}
    selector = smallest(**given, schedule=schedule)
    model = attached(selector=selector, coordinates=coordinates)
    work = MaskRefresh(selector, total=lambda: 6, model=model)
    optimizer = torch.optim.AdamW(trained(model), 3e-3)
    index = read_index(model)
    for step in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < 2:
            work.refresh(step + 1, model, optimizer)
    before = {n: layer.tuned("weight").clone() for n, layer in sparse_layers(model).items()}
    moments = {
        n: optimizer.state[layer.sparse_values("weight", "default")]["exp_avg"].clone()
        for n, layer in sparse_layers(model).items()
    }
    work.refresh(3, model, optimizer)
    assert len(work.done) == 1
    assert 0 < work.done[0].trained < sum(i.numel() for i in index.values())
    for name, layer in sparse_layers(model).items():
        now, old = layer.slot("default", "weight").index, index[f"{name}.weight"]
        assert intersect(now, old).numel() == now.numel()
        assert torch.equal(layer.tuned("weight"), before[name])
        inside = torch.isin(old, now)
        values = layer.sparse_values("weight", "default")
        if reset:
            assert not optimizer.state.get(values)
        else:
            assert torch.equal(optimizer.state[values]["exp_avg"], moments[name][inside])
        if by == "theta":
            size = before[name].flatten().abs()[old.long()]
            assert torch.equal(inside, size < 0.004)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, layer in sparse_layers(model).items():
        gone = index[f"{name}.weight"][~torch.isin(index[f"{name}.weight"], layer.slot("default", "weight").index)]
        assert torch.equal(layer.tuned("weight").flatten()[gone.long()], before[name].flatten()[gone.long()])


def test_everything_chosen_by_density_one_counts_as_below():
    selector = smallest(density=1.0, schedule={"at": 1})
    model = attached(selector=selector)
    refresh(model, selector, None, step=1, total=5)
    assert sum(i.numel() for i in read_index(model).values()) == sum(
        layer.base_layer.weight.numel() for layer in sparse_layers(model).values()
    )


class Break:
    every = 1

    def __init__(self, at):
        self.at = at

    def refresh(self, step, model, optimizer):
        if step == self.at:
            raise InterruptedError


def engine_run(out, breaks=(), **options):
    selector = smallest()
    model = attached(selector=selector)
    ctx = Context(model=model, seed=3)
    work = MaskRefresh(selector, seed=3, total=lambda: ctx.total_steps, model=model)
    term = {"kind": "nuclear_norm", "weight": 1e-3, "min_side": 8}
    objective = OBJECTIVE.validate({"kind": "tokens", "token": {"kind": "sft"}, "terms": [term]})
    stage(out, net=model, ctx=ctx, objective=objective, callbacks=[work, *breaks], steps=4, **options)
    return {n: layer.tuned("weight").clone() for n, layer in sparse_layers(model).items()}, read_index(model)


@pytest.mark.parametrize("at", [1, 3])
def test_resumed_before_or_after_the_stage_it_ends_in_the_same_weights(at, tmp_path):
    want, index = engine_run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        engine_run(tmp_path / "broken", [Break(at)], save_every=at)
    got, again = engine_run(tmp_path / "broken", resume=True, save_every=at)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert all(torch.equal(index[n], again[n]) for n in index)


# ---- the term


def penalty(term, model, step=0):
    ctx = Context(model=model, seed=1, step=lambda: step)
    term = TERM.validate({"kind": "nuclear_norm", "min_side": 8, **term})
    return term.penalty(term.setup(ctx), model)


@pytest.mark.parametrize("coordinates", ["absolute", "delta"])
@pytest.mark.parametrize("of", ["weights", "change"])
def test_the_rank_term_acts_on_the_trained_entries(coordinates, of):
    model = attached(coordinates=coordinates)
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    value = penalty({"of": of, "matrices": "all", "weight": 0.5}, model)
    value.backward()
    want, base = 0.0, dict(tiny_llama().named_parameters())
    for name, layer in sparse_layers(model).items():
        shape = tuple(layer.base_layer.weight.shape)
        if len(shape) != 2:
            continue
        index, values = layer.slot("default", "weight").index.long(), layer.sparse_values("weight", "default")
        start = base[f"{name}.weight"].detach().flatten()[index]
        tuned = layer.tuned("weight").flatten()[index]
        flat = torch.zeros(shape[0] * shape[1])
        flat[index] = tuned if of == "weights" else tuned - start
        norm, slope = nuclear_norm(flat.view(shape))
        torch.testing.assert_close(matrix_of(values, of), flat.view(shape), rtol=0, atol=1e-6)
        torch.testing.assert_close(values.grad, 0.5 * slope.flatten()[index], rtol=1e-3, atol=1e-4)
        want += float(norm)
    assert float(value) == pytest.approx(0.5 * want, rel=1e-4)


def test_one_matrix_per_step_the_same_for_its_micro_batches():
    model = attached()
    ctx = Context(model=model, seed=1)
    term = TERM.validate({"kind": "nuclear_norm", "min_side": 8})
    state, hit = term.setup(ctx), []
    for step in range(6):
        ctx.step = lambda step=step: step
        for _ in range(2):
            term.penalty(state, model).backward()
            hit.append([n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())])
            model.zero_grad()
    assert all(len(h) == 1 for h in hit)
    assert hit[::2] == hit[1::2]
    assert len({h[0] for h in hit}) > 1


def test_the_rank_term_with_dense_and_low_rank_tuners():
    from peft import LoraConfig

    dense = nn.Linear(20, 16)
    ctx = Context(model=dense)
    term = TERM.validate({"kind": "nuclear_norm", "min_side": 8, "weight": 2.0})
    value = term.penalty(term.setup(ctx), dense)
    value.backward()
    norm, slope = nuclear_norm(dense.weight)
    assert float(value) == pytest.approx(2 * float(norm), rel=1e-5)
    torch.testing.assert_close(dense.weight.grad, 2 * slope)
    lora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    assert float(penalty({"min_side": 3}, lora)) >= 0
    with pytest.raises(BadInput, match="min_side"):
        penalty({"min_side": 64}, lora)
    with pytest.raises(BadInput, match="needs differences"):
        penalty({"of": "change"}, dense)


def test_convolutions_as_matrices_and_only_every_nth_step():
    conv = nn.Conv2d(9, 10, 3)
    with pytest.raises(BadInput, match="flatten"):
        penalty({}, conv)
    assert float(penalty({"conv": "flatten"}, conv)) > 0
    assert float(penalty({"conv": "flatten", "every": 3}, conv, step=1)) == 0
    assert float(penalty({"conv": "flatten", "every": 3}, conv, step=3)) > 0


# ---- bad input


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"theta": 0.1}, "exactly one way"),
        ({"density": None}, "exactly one way"),
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": None, "theta": 0}, "theta"),
        ({"density": None, "theta": float("inf")}, "theta"),
        ({"schedule": {"at": 0}}, "at"),
        ({"schedule": {"share": 1}}, "share"),
        ({"target_modules": ""}, "target_modules"),
    ],
)
def test_options_that_can_not_be(options, word):
    with pytest.raises(BadInput, match=word):
        smallest(**options)


def test_nothing_selected_and_counts():
    model = tiny_llama()
    named = {n: p + 1.0 for n, p in model.named_parameters()}
    with pytest.raises(BadInput, match="nothing would train"):
        smallest(density=None, theta=1e-6).select(None, named, None, torch.Generator())
    with pytest.raises(BadInput, match="from the weights"):
        smallest(density=None, theta=1e-3).count(None, {"a": (2, 2)})
    with pytest.raises(BadInput, match="int8"):
        smallest().select(None, {"a": torch.ones(4, dtype=torch.int8)}, None, torch.Generator())
    with pytest.raises(BadInput, match="covers none"):
        smallest(target_modules="embed_tokens").count(
            Anatomy.of(tiny_llama(tie_word_embeddings=True)), {"model.embed_tokens.weight": (4, 4)}
        )


def test_a_second_stage_that_never_begins_warns():
    with pytest.warns(UserWarning, match="never begins"):
        smallest(schedule={"at": 5}).begin(5)
    smallest(schedule={"share": None}).begin(5)
    assert not smallest(schedule={"share": None}).schedule.moves


def test_a_negative_weight_of_the_rank_loss():
    with pytest.raises(BadInput, match="weight"):
        TERM.validate({"kind": "nuclear_norm", "weight": -1})


def test_the_tuner_names_what_it_can_not_hold():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    given = Allocation({"0.scale": Entries(torch.tensor([0], dtype=torch.int32))})
    with pytest.raises(Unsupported, match="weights and biases"):
        get_peft_model(nn.Sequential(Scaled()), SparseConfig().with_allocation(given))
