"""Moving the trained entries: what LIFT must hold about values, moments, timing, growth and export."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from pegbox.errors import BadInput, Unsupported
from pegbox.optim.sparse_adam import UnscaledEpsAdamW, update
from pegbox.parts import deltas
from pegbox.parts.context import Context
from pegbox.parts.indexsets import intersect, locate
from pegbox.parts.parameterinfo import info_of, make_room, sized_buffers
from pegbox.select import SELECT
from pegbox.testing import tiny_llama
from pegbox.tuners import TUNER
from pegbox.tuners.sparse import (
    MaskRefresh,
    SparseConfig,
    callbacks_for,
    export_delta,
    sparse_layers,
)
from pegbox.tuners.sparse.refresh import read_index, refresh

IDS = torch.arange(3, 40).view(1, -1)
LIFT = {"kind": "low_rank_magnitude", "filter_rank": 4, "budget": {"density": 0.1}}


def lift(select=LIFT, model=None, **options):
    config = SparseConfig(select=select, coordinates="absolute", task_type="CAUSAL_LM", **options)
    return get_peft_model(model or tiny_llama(), config)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer, clip=None, micro=1):
    for _ in range(micro):
        model(input_ids=IDS, labels=IDS).loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(trained(model), clip)
    optimizer.step()
    optimizer.zero_grad()


def base_weights(model):
    """The tuned weights of a wrapped model, as in the bare one."""
    layers = sparse_layers(model)
    return {
        f"{name}.weight": layer.tuned("weight").clone()
        for name, layer in layers.items()
        if len(layer.adapters_on("weight"))
    }


@pytest.mark.parametrize("execution", ["in_place", "scatter"])
def test_entries_outside_the_selection_are_bit_identical_after_a_step(execution):
    model = lift(execution=execution)
    before, index = base_weights(model), read_index(model)
    optimizer = torch.optim.AdamW(trained(model), 1e-2, weight_decay=0.1)
    step(model, optimizer, clip=0.1, micro=2)
    for name, after in base_weights(model).items():
        moved = (after != before[name]).flatten().nonzero().flatten()
        assert intersect(moved.to(torch.int32), index[name]).numel() == moved.numel() > 0


def test_all_entries_give_the_dense_trajectory_bit_for_bit():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 4)).double()
    model = get_peft_model(
        copy.deepcopy(dense),
        SparseConfig(select={"kind": "random", "budget": {"density": 1}}, coordinates="absolute", gradient="dense"),
    )
    x = torch.randn(6, 5, dtype=torch.float64)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = UnscaledEpsAdamW([dense[0].weight], **options), UnscaledEpsAdamW(trained(model), **options)
    for _ in range(5):
        for net, optimizer in zip((dense, model), optimizers):
            net(x).square().sum().backward()
            optimizer.step()
            net.zero_grad()
        assert torch.equal(sparse_layers(model)["0"].tuned("weight"), dense[0].weight)


@pytest.mark.parametrize("execution", ["in_place", "scatter"])
@pytest.mark.parametrize("coordinates", ["absolute", "delta"])
def test_a_refresh_changes_no_weight_and_moves_the_moments(coordinates, execution):
    select = {**LIFT, "kind": "low_rank_magnitude"}
    config = SparseConfig(select=select, coordinates=coordinates, execution=execution)
    model = get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.AdamW(trained(model), 0.5)
    step(model, optimizer)
    step(model, optimizer)
    weights, index = base_weights(model), read_index(model)
    values = {info_of(p).name: p for p in trained(model)}
    state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in values.items()}
    result = refresh(model, SELECT.validate(select), optimizer)
    assert 0 < result.kept < result.trained < result.touched
    after, now = base_weights(model), read_index(model)
    assert {info_of(p).name: id(p) for p in trained(model)} == {n: id(p) for n, p in values.items()}
    for name, p in values.items():
        assert torch.equal(after[name], weights[name])
        assert now[name].numel() == index[name].numel()
        place = locate(now[name], index[name])
        for key in ("exp_avg", "exp_avg_sq"):
            moved = optimizer.state[p][key]
            assert torch.equal(moved[place >= 0], state[name][key][place[place >= 0]])
            assert (moved[place < 0] == 0).all()
        assert optimizer.state[p]["step"] == 2
        assert (now[name][1:] > now[name][:-1]).all()
    step(model, optimizer)


def test_entries_that_come_back_bring_their_value_along():
    net = get_peft_model(
        nn.Sequential(nn.Linear(4, 3, bias=False)),
        SparseConfig(select={"kind": "random", "budget": {"count": 4}}, coordinates="absolute"),
    )
    layer = sparse_layers(net)["0"]
    first = layer.slot("default", "weight").index.clone()
    with torch.no_grad():
        trained(net)[0].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    other = torch.tensor([i for i in range(12) if i not in first.tolist()][:4], dtype=torch.int32)
    layer.move("default", "weight", other)
    assert layer.touched("default", "weight") == 8
    layer.move("default", "weight", first)
    assert torch.equal(trained(net)[0].detach(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert layer.touched("default", "weight") == 4  # the others never moved, so nothing is kept of them


def test_optimizer_state_is_eight_bytes_per_trained_entry():
    model = lift(model=tiny_llama(hidden_size=64, intermediate_size=128), select={**LIFT, "budget": {"density": 0.05}})
    optimizer = UnscaledEpsAdamW(trained(model))
    step(model, optimizer)
    held = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.ndim)
    entries = sum(p.numel() for p in trained(model))
    index = sum(layer.slot("default", "weight").index.element_size() for layer in sparse_layers(model).values())
    assert held == 8 * entries
    assert index == 4 * len(sparse_layers(model))
    dense = 8 * sum(layer.base_layer.weight.numel() for layer in sparse_layers(model).values())
    assert held / dense <= 0.06


def test_it_happens_right_before_updates_t_2t_and_never_when_fixed():
    every = {**LIFT, "schedule": {"every": 3}}
    work = MaskRefresh(SELECT.validate(every))
    assert [s for s in range(10) if work.due(s)] == [2, 5, 8]  # before updates 3, 6, 9
    once = MaskRefresh(SELECT.validate({**LIFT, "schedule": {"every": 1}}))
    assert all(once.due(s) for s in range(4))
    fixed = MaskRefresh(SELECT.validate({**LIFT, "schedule": {"every": 3, "mode": "fixed"}}))
    assert not any(fixed.due(s) for s in range(10))
    assert not callbacks_for(SparseConfig(select=LIFT))
    assert callbacks_for(SparseConfig(select=every))
    tuner, ctx = TUNER.validate("sparse"), Context(tiny_llama(), seed=7)
    assert tuner.schedules(SELECT.validate(LIFT), ctx) == []
    assert tuner.schedules(SELECT.validate(every), ctx)[0].seed == 7
    assert not tuner.schedules(fixed.selector, ctx)[0].due(2)


def test_a_foreign_trainer_refreshes_by_the_callback(tmp_path):
    from transformers import Trainer, TrainingArguments

    config = SparseConfig(
        select={"kind": "random", "budget": {"density": 0.05}, "schedule": {"every": 3}},
        coordinates="absolute",
    )
    model = get_peft_model(tiny_llama(), config)
    seen = []

    class Watch(Trainer):
        def training_step(self, *args, **kwargs):
            seen.append(read_index(self.model)["model.layers.0.mlp.up_proj.weight"])
            return super().training_step(*args, **kwargs)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=7, per_device_train_batch_size=1, report_to=[], save_strategy="no", learning_rate=1e-2
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    Watch(model=model, args=arguments, train_dataset=rows, callbacks=callbacks_for(config)).train()
    changed = [i for i in range(1, 7) if not torch.equal(seen[i], seen[i - 1])]
    assert changed == [2, 5]  # before updates 3 and 6


def test_accumulative_sets_only_grow_up_to_the_limit():
    select = {**LIFT, "schedule": {"every": 1, "mode": "accumulative", "limit": {"density": 0.25}}}
    model = lift(select)
    optimizer = UnscaledEpsAdamW(trained(model), lr=1e-2)
    sizes, before = [], read_index(model)
    for _ in range(4):
        step(model, optimizer)
        refresh(model, SELECT.validate(select), optimizer)
        now = read_index(model)
        assert all(intersect(before[n], now[n]).numel() == before[n].numel() for n in now)
        sizes.append(now["model.layers.0.self_attn.q_proj.weight"].numel())
        before = now
    assert sizes == [204, 256, 256, 256]
    step(model, optimizer)
    for p in trained(model):
        assert optimizer.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dynamic", "accumulative"])
def test_the_exported_difference_reproduces_the_final_model_bit_for_bit(mode, dtype, tmp_path):
    limit = {"limit": {"density": 0.3}} if mode == "accumulative" else {}
    select = {**LIFT, "kind": "random", "schedule": {"every": 1, "mode": mode, **limit}}
    select.pop("filter_rank")
    model = lift(select, tiny_llama().to(dtype))
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    for turn in range(3):
        step(model, optimizer)
        refresh(model, SELECT.validate(select), optimizer, generator=torch.Generator().manual_seed(turn))
        step(model, optimizer)
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
    deltas.save(export_delta(model), tmp_path / "delta.safetensors")
    fresh = tiny_llama().to(dtype)
    deltas.apply(deltas.load(tmp_path / "delta.safetensors"), dict(fresh.named_parameters()))
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, tuned)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama().to(dtype), str(tmp_path / "adapter"), is_trainable=True)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, tuned)
    touched = sum(layer.touched("default", "weight") for layer in sparse_layers(model).values())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 8 * touched + 14 * 700  # and names; at real sizes these are nothing
    refresh(loaded, SELECT.validate(select))  # goes on from the file


def test_state_of_other_entries_is_refused_on_loading():
    model = lift()
    optimizer = UnscaledEpsAdamW(trained(model))
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    UnscaledEpsAdamW(trained(model)).load_state_dict(saved)
    refresh(model, SELECT.validate({"kind": "random", "budget": LIFT["budget"]}), optimizer)
    with pytest.raises(BadInput, match="belongs to other entries"):
        UnscaledEpsAdamW(trained(model)).load_state_dict(saved)
    with pytest.raises(BadInput, match="belongs to other entries"):
        UnscaledEpsAdamW(trained(lift({**LIFT, "budget": {"density": 0.2}}))).load_state_dict(saved)


def test_what_can_not_be_refreshed_says_so():
    model = lift()
    with pytest.raises(BadInput, match="no sparse adapter 'other'"):
        refresh(model, SELECT.validate(LIFT), adapter="other")
    with model.disable_adapter(), pytest.raises(BadInput, match="inactive or merged"):
        refresh(model, SELECT.validate(LIFT))
    optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(trained(model), min_8bit_size=1)
    try:
        step(model, optimizer)
    except Exception:
        pytest.skip("bitsandbytes has no 8-bit optimizer on this device")
    with pytest.raises(Unsupported, match="8-bit"):
        refresh(model, SELECT.validate({"kind": "random", "budget": LIFT["budget"]}), optimizer)


def test_ages_per_entry_correct_each_entry_by_its_own_count():
    model = lift()
    optimizer = UnscaledEpsAdamW(trained(model), lr=1e-2, per_entry_age=True)
    step(model, optimizer)
    step(model, optimizer)
    refresh(model, SELECT.validate({"kind": "random", "budget": LIFT["budget"]}), optimizer)
    step(model, optimizer)
    ages = torch.cat([optimizer.state[p]["age"] for p in trained(model)])
    assert set(ages.tolist()) == {1.0, 3.0}


def test_one_step_by_hand():
    w, g = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)
    m, v = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    update(w, g, m, v, 1, lr=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.2)
    want_m, want_v = 0.1 * g, 0.05 * g * g
    torch.testing.assert_close(m, want_m)
    torch.testing.assert_close(v, want_v)
    rate = 0.1 * 0.05**0.5 / 0.1
    want = torch.tensor([1.0, -2.0], dtype=torch.float64) * 0.98 - rate * want_m / (want_v.sqrt() + 1e-6)
    torch.testing.assert_close(w, want, rtol=0, atol=1e-15)


def snapshot(model):
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad} | sized_buffers(model)
    return {n: t.detach().clone() for n, t in tensors.items()}


def copy_in(model, saved):
    """As a checkpoint is restored: by name, in place."""
    make_room(model, saved)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in saved.items():
            held[name].copy_(tensor)


@pytest.mark.parametrize("mode", ["dynamic", "accumulative"])
def test_tensors_copied_in_by_name_restore_any_earlier_or_later_state(mode):
    limit = {"limit": {"density": 0.3}} if mode == "accumulative" else {}
    select = {"kind": "random", "budget": {"density": 0.1}, "schedule": {"every": 1, "mode": mode, **limit}}
    model = lift(select)
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    states, wanted = [], []
    for turn in range(3):
        step(model, optimizer)
        states.append(snapshot(model))
        wanted.append(base_weights(model))
        refresh(model, SELECT.validate(select), optimizer, generator=torch.Generator().manual_seed(turn))
    fresh = lift(select)
    for target in (model, fresh):
        for saved, want in [*zip(states, wanted), (states[0], wanted[0]), (states[2], wanted[2])]:
            copy_in(target, saved)
            got = base_weights(target)
            assert all(torch.equal(got[n], want[n]) for n in want)
            target(input_ids=IDS, labels=IDS).loss.backward()
            assert all(p.grad.shape == p.shape for p in trained(target))
            target.zero_grad()
    with fresh.disable_adapter():
        layers = sparse_layers(fresh)
        base = dict(tiny_llama().named_parameters())
        assert all(torch.equal(layer.base_layer.weight, base[f"{n}.weight"]) for n, layer in layers.items())
