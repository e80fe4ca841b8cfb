"""Drop and grow on the sparse layer: values, moments, ages, watched gradients, memory, 4-bit bases, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from engine.helpers import stage
from pegbox.errors import BadInput, Unsupported, WrongBase
from pegbox.optim.aged_adamw import AgedAdamW, update
from pegbox.optim.base import OPTIM
from pegbox.optim.sparse_sm3 import SparseSM3
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.context import Context
from pegbox.parts.deltas import apply
from pegbox.parts.indexsets import locate
from pegbox.parts.parameterinfo import info_of
from pegbox.parts.watching import Watch, paused
from pegbox.select import SELECT
from pegbox.testing import tiny_llama
from pegbox.tuners.sparse import MaskRefresh, SparseConfig, callbacks_for, export_delta, merge_modules, sparse_layers
from pegbox.tuners.sparse.refresh import read_index, refresh, start_watching, stop_watching

IDS = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(0))
EXECUTIONS = ["in_place", "scatter", "bypass"]
TOTAL = 12
SELECT_BLOCK = {"kind": "regrow", "budget": {"density": 0.05}, "schedule": {"every": 4, "accumulate": 2, "rate": 0.5}}


def spiel(model=None, execution="auto", **select):
    config = SparseConfig(select={**SELECT_BLOCK, **select}, execution=execution, task_type="CAUSAL_LM")
    model = get_peft_model(model or tiny_llama(), config)
    return model, MaskRefresh(SELECT.validate(config.select), seed=1, total=lambda: TOTAL, model=model)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, work, optimizer, first, last, micro=1):
    for step in range(first, last):
        if step == first:
            work.begin(step, model)
        for rows in IDS.chunk(micro):
            (model(input_ids=rows, labels=rows).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        work.after_step(step + 1, model)
        work.refresh(step + 1, model, optimizer)


def tuned(model):
    return {n: layer.tuned("weight").clone() for n, layer in sparse_layers(model).items()}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_zero_it_is_the_base_bit_for_bit(execution, dtype):
    """1. phi = 0 leaves the output as it is."""
    want = tiny_llama().to(dtype)(input_ids=IDS).logits
    model, _ = spiel(tiny_llama().to(dtype), execution)
    assert torch.equal(model(input_ids=IDS).logits, want)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_equal_the_dense_ones(execution):
    """2. dphi is the dense weight's gradient at the indices, dx that of W + S(phi); float64, 1e-12."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    index = torch.tensor([0, 3, 11, 17, 29], dtype=torch.int32)
    config = SparseConfig(execution=execution).with_allocation(Allocation({"0.weight": Entries(index)}))
    model = get_peft_model(copy.deepcopy(net), config)
    with torch.no_grad():
        trained(model)[0].copy_(torch.randn(5))
        net[0].weight.view(-1)[index.long()] += trained(model)[0]
    x = torch.randn(7, 6, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for module, given in zip((net, model), inputs):
        module(given).square().sum().backward()
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(trained(model)[0].grad, net[0].weight.grad.flatten()[index.long()], **close)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)


def test_executions_agree_and_merging_is_exact_both_ways():
    """3. All back ends to 1e-5; merged = unmerged to 1e-5; unmerging restores W bit for bit."""
    outputs = []
    for execution in EXECUTIONS:
        model, work = spiel(execution=execution)
        train(model, work, AgedAdamW(trained(model), lr=1e-2), 0, 8)
        base = {n: layer.pretrained("weight").clone() for n, layer in _reverted(model).items()}
        outputs.append(model(input_ids=IDS).logits.detach())
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, outputs[-1], rtol=0, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(layer.pretrained("weight"), base[n]) for n, layer in _reverted(model).items())
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-5)


def _reverted(model):
    layers = sparse_layers(model)
    for layer in layers.values():
        layer.revert()
    return layers


@pytest.mark.parametrize("growth", ["accumulated_gradient", "gradient", "momentum", "random"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_kept_slots_are_untouched_and_new_ones_start_at_zero(growth, execution):
    """4. k, distinct indices, kept value and state bit for bit; the function changes by the dropped values only."""
    model, work = spiel(execution=execution, growth=growth)
    optimizer = (SparseSM3 if growth == "momentum" else AgedAdamW)(trained(model), lr=1e-2)
    train(model, work, optimizer, 0, 5)
    for rows in IDS.chunk(1):  # update 6, whose event is the second one
        model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    work.after_step(6, model)
    before, index = tuned(model), read_index(model)
    values = {info_of(p).name: p for p in trained(model)}
    state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in values.items()}
    held = {n: p.detach().clone() for n, p in values.items()}
    work.refresh(6, model, optimizer)
    base, moved = dict(tiny_llama().named_parameters()), 0
    for name, p in values.items():
        now = read_index(model)[name]
        assert now.numel() == index[name].numel() == now.unique().numel()
        place = locate(now, index[name])
        new = place < 0
        moved += int(new.sum())
        assert torch.equal(p[~new].detach(), held[name][place[~new]])
        assert (p[new] == 0).all()
        for key, tensor in optimizer.state[p].items():
            if key in ("row", "column"):
                assert torch.equal(tensor, state[name][key])
            else:
                assert torch.equal(tensor[~new], state[name][key][place[~new]])
        gone = index[name][locate(index[name], now) < 0].long()
        expected = before[name.removesuffix(".weight")].flatten().clone()
        expected[gone] = base[name].flatten()[gone]
        assert torch.equal(sparse_layers(model)[name.removesuffix(".weight")].tuned("weight").flatten(), expected)
    assert moved
    share = 1 - work.done[-1].kept / work.done[-1].trained
    assert 0 < share <= 0.5 * (1 - 6 / TOTAL)


def test_everything_may_move_the_first_time_and_seeds_carry_their_samples():
    """5, 6. Rate 1 at t = a; ages of new entries are the updates that were watched."""
    model, work = spiel(growth="accumulated_gradient")
    optimizer = AgedAdamW(trained(model), lr=1e-2)
    index = read_index(model)
    train(model, work, optimizer, 0, 2)
    new = [locate(now, index[n]) < 0 for n, now in read_index(model).items()]
    assert sum(int(n.sum()) for n in new) > 0.5 * sum(n.numel() for n in new)
    for p, fresh in zip(trained(model), new):
        assert (optimizer.state[p]["age"][fresh] == 2).all()
        assert (optimizer.state[p]["age"][~fresh] == 3).all()


def test_a_move_needs_no_state_at_all():
    model, work = spiel(growth="random")
    refresh(model, work.selector, None, step=2, total=TOTAL)
    assert read_index(model)


# ---- watching


def dense_gradients(rows_of_updates):
    """The full gradients of a plain model's linear weights, per update."""
    found = []
    for rows in rows_of_updates:
        net = tiny_llama()
        net(input_ids=rows, labels=rows).loss.backward()
        found.append({n: p.grad.flatten() for n, p in net.named_parameters()})
    return found


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_is_watched_are_means_of_the_dense_gradient_at_the_candidates(execution, micro):
    """Micro-batches of an update are summed before anything is squared."""
    model, _ = spiel(execution=execution)
    start_watching(model)
    updates = [IDS[:2], IDS[2:]]
    for rows in updates:
        for part in rows.chunk(micro):
            (model(input_ids=part, labels=part).loss / micro).backward()
        for layer in sparse_layers(model).values():
            layer.watches[("default", "weight")].close()
    want = dense_gradients(updates)
    for name, layer in sparse_layers(model).items():
        watch = layer.watches[("default", "weight")]
        k = layer.slot("default", "weight").index.numel()
        full = [update[f"{name}.weight"] for update in want]
        at = watch.index.long()
        assert watch.samples == 2
        torch.testing.assert_close(watch.total, sum(full)[at], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(watch.square, sum(g**2 for g in full)[at], rtol=1e-4, atol=1e-8)
        if micro == 1:
            assert full[0].abs()[at].min() >= full[0].abs().topk(k).values[-1] * (1 - 1e-4)


def test_a_checkpointed_model_is_seen_once():
    seen = []
    for reentrant in (None, False, True):
        model, _ = spiel()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        start_watching(model)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
        watches = [layer.watches[("default", "weight")] for layer in sparse_layers(model).values()]
        for watch in watches:
            watch.close()
        assert {w.samples for w in watches} == {1}  # two backward passes of one update
        seen.append(torch.cat([w.total for w in watches]))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=1e-5, atol=1e-7)


def test_passes_that_leave_no_trace_are_not_seen():
    model, _ = spiel()
    start_watching(model)
    with paused():
        model(input_ids=IDS, labels=IDS).loss.backward()
    for layer in sparse_layers(model).values():
        watch = layer.watches[("default", "weight")]
        watch.close()
        assert (watch.index, watch.samples) == (None, 0)
    stop_watching(model)
    assert not any(layer.watches for layer in sparse_layers(model).values())


def test_a_layer_that_no_batch_reached_keeps_its_entries():
    watch = Watch(3)
    watch.close()
    select = SELECT.validate(SELECT_BLOCK)
    model, work = spiel()
    train(model, work, AgedAdamW(trained(model)), 0, 1)
    layer = sparse_layers(model)["model.layers.0.mlp.up_proj"]
    layer.watches[("default", "weight")] = watch
    index = read_index(model)["model.layers.0.mlp.up_proj.weight"]
    refresh(model, select, None, step=2, total=TOTAL)
    assert torch.equal(read_index(model)["model.layers.0.mlp.up_proj.weight"], index)


def test_what_can_not_be_watched_says_so():
    net = nn.Sequential(nn.Conv2d(2, 3, 3))
    model = get_peft_model(net, SparseConfig(target_modules=["0"], execution="bypass"))
    with pytest.raises(Unsupported, match="scatter"):
        start_watching(model)
    with pytest.raises(BadInput, match="no sparse adapter"):
        start_watching(tiny_llama())


# ---- memory


class Saved:
    """Storages that autograd keeps for backward, by address, without the module's own tensors."""

    def __init__(self, model):
        own = [*model.parameters(), *model.buffers()]
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.kept = {}

    def pack(self, tensor):
        parts = [tensor] if tensor.layout == torch.strided else [tensor.values(), tensor.col_indices()]
        for part in parts:
            if part.untyped_storage().data_ptr() not in self.own:
                self.kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("watching", [False, True])
def test_a_layer_saves_its_input_and_no_dense_tensor(execution, watching):
    """9. x + O(k) bytes per layer, and nothing of size out * in besides W."""
    net = nn.Sequential(nn.Linear(64, 48, bias=False))
    k = 30
    given = Allocation({"0.weight": Entries(torch.arange(0, 3000, 100, dtype=torch.int32))})
    model = get_peft_model(net, SparseConfig(execution=execution).with_allocation(given))
    if watching:
        start_watching(model)
    x = torch.randn(5, 64)
    meter = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda t: t):
        y = model(x)
    assert sum(meter.kept.values()) <= x.nbytes + 16 * k
    y.sum().backward()


def test_state_bytes():
    """10. AG: k * (4 + 4 + 12), and 16 bytes per candidate while gradients are watched."""
    model, work = spiel()
    optimizer = AgedAdamW(trained(model))
    train(model, work, optimizer, 0, 1)
    k = sum(p.numel() for p in trained(model))
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    layers = sparse_layers(model).values()
    held = sum(layer.slot("default", "weight").index.nbytes for layer in layers) + sum(p.nbytes for p in trained(model))
    assert state == 12 * k
    assert held == 8 * k
    assert sum(layer.watches[("default", "weight")].nbytes() for layer in layers) == 16 * k


# ---- going on exactly


class Break:
    """A schedule that breaks the run off before the update after `at` finished ones."""

    every = 1

    def __init__(self, at):
        self.at = at

    def refresh(self, step, model, optimizer):
        if step == self.at:
            raise InterruptedError


def engine_run(out, growth, breaks=(), **options):
    """Trained by the engine; returns tuned weights, index sets and what moved."""
    model, _ = spiel(growth=growth)
    ctx = Context(model=model, seed=3)
    schedule = MaskRefresh(
        SELECT.validate({**SELECT_BLOCK, "growth": growth}), seed=3, total=lambda: ctx.total_steps, model=model
    )
    optim = "sm3" if growth == "momentum" else "aged_adamw"
    step = OPTIM.validate({"kind": optim, "lr": 1e-2, "schedule": "constant", "warmup": 0.0})
    options = {"steps": 8, "micro_batch": 2, **options}
    stage(out, net=model, ctx=ctx, step=step, callbacks=[schedule, *breaks], **options)
    return tuned(model), read_index(model), schedule.done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing breaks off, by growth rule."""
    return {g: engine_run(tmp_path_factory.mktemp(g), g) for g in ("accumulated_gradient", "momentum")}


@pytest.mark.parametrize(("growth", "at"), [("accumulated_gradient", 1), ("accumulated_gradient", 5), ("momentum", 4)])
def test_resumed_in_the_middle_of_a_phase_it_ends_in_the_same_weights(growth, at, whole, tmp_path):
    """11. Values, index sets, optimizer state and half-gathered gradients go through the engine's checkpoint."""
    want, index, done = whole[growth]
    with pytest.raises(InterruptedError):
        engine_run(tmp_path / "broken", growth, [Break(at)], save_every=at)
    got, again, _ = engine_run(tmp_path / "broken", growth, resume=True, save_every=at)
    assert len(done) == 2
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert all(torch.equal(again[n], index[n]) for n in index)


def test_counting_and_probing_passes_are_not_watched(whole, tmp_path):
    plain, _, _ = whole["accumulated_gradient"]
    counted, _, _ = engine_run(tmp_path / "counted", "accumulated_gradient", probe=True)
    assert all(torch.equal(plain[n], counted[n]) for n in plain)


def test_moves_without_a_model_can_not_go_on_from_a_checkpoint():
    work = MaskRefresh(SELECT.validate(SELECT_BLOCK))
    with pytest.raises(BadInput, match="given the model"):
        work.load_state_dict({"watched": {}})


def test_a_foreign_trainer_drops_and_grows_by_the_callback(tmp_path):
    from transformers import Trainer, TrainingArguments

    config = SparseConfig(select=SELECT_BLOCK, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    seen = []

    class Watching(Trainer):
        def training_step(self, *args, **kwargs):
            seen.append(read_index(self.model))
            return super().training_step(*args, **kwargs)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=1, report_to=[], save_strategy="no", learning_rate=1e-2
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    optimizers = (AgedAdamW(trained(model), lr=1e-2), None)
    Watching(
        model=model, args=arguments, train_dataset=rows, callbacks=callbacks_for(config), optimizers=optimizers
    ).train()
    changed = [i for i in range(1, 8) if any(not torch.equal(seen[i][n], seen[i - 1][n]) for n in seen[i])]
    assert changed == [2, 6]  # after updates 2 and 6


def test_all_entries_and_no_moves_give_the_dense_trajectory():
    """12. k = out * in with rate 0: dense Adam of the same formula."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False, dtype=torch.float64))
    select = {"kind": "regrow", "budget": {"count": 12}, "schedule": {"every": 4, "accumulate": 1, "rate": 0}}
    select["schedule"]["policy"] = "cosine"
    model = get_peft_model(copy.deepcopy(net), SparseConfig(select=select, gradient="dense"))
    work = MaskRefresh(SELECT.validate(select), total=lambda: 9, model=model)
    optimizer = AgedAdamW(trained(model), lr=1e-2, weight_decay=0.1)
    phi, m, v = (torch.zeros(3, 4, dtype=torch.float64) for _ in range(3))
    age, w0 = torch.ones(3, 4), net[0].weight.detach().clone()
    x = torch.randn(6, 4, dtype=torch.float64)
    for step in range(9):
        w = (w0 + phi).requires_grad_()
        (x @ w.T).sin().sum().backward()
        update(phi, w.grad, m, v, age, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
        model(x).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        work.refresh(step + 1, model, optimizer)
        torch.testing.assert_close(trained(model)[0].detach().view(3, 4), phi, rtol=0, atol=1e-12)
    assert len(work.done) == 2


# ---- over a 4-bit base


def quantized(bnb, inner=64, outer=32):
    torch.manual_seed(0)
    made = [nn.Linear(inner, outer), nn.Linear(outer, inner)]
    for i, linear in enumerate(made):
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        packed.bias = linear.bias
        made[i] = packed.to("cpu")
    return nn.Sequential(*made)


def packed_spiel(bnb):
    select = {**SELECT_BLOCK, "density_of": "targets"}
    model = get_peft_model(quantized(bnb), SparseConfig(select=select, target_modules=["0", "1"]))
    return model, MaskRefresh(SELECT.validate(select), total=lambda: TOTAL, model=model)


def test_it_drops_and_grows_over_a_4_bit_base():
    bnb = pytest.importorskip("bitsandbytes")
    model, work = packed_spiel(bnb)
    x = torch.randn(8, 64)
    want = quantized(bnb)(x)
    assert torch.equal(model(x), want)  # 1.
    optimizer, first = AgedAdamW(trained(model), lr=1e-2), read_index(model)
    losses = []
    for step in range(8):
        work.begin(step, model)
        loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        work.refresh(step + 1, model, optimizer)
    assert losses[-1] < losses[0]
    assert len(work.done) == 2
    assert any(not torch.equal(first[n], now) for n, now in read_index(model).items())
    assert all(torch.isfinite(p).all() for p in trained(model))


def test_merging_into_4_bits_is_refused_unless_asked_for():
    bnb = pytest.importorskip("bitsandbytes")
    model, _ = packed_spiel(bnb)
    x = torch.randn(8, 64)
    base = model(x).detach()
    with torch.no_grad():
        for p in trained(model):
            p.fill_(0.5)
    tuned_output = model(x).detach()
    with pytest.raises(Unsupported, match="requantize=True"):
        model.merge_adapter()
    with pytest.raises(Unsupported, match="requantize=True"):
        merge_modules(model)
    assert merge_modules(model, requantize=True) == ["0", "1"]
    near = model(x)
    assert (near - tuned_output).norm() < 0.5 * (base - tuned_output).norm()  # lossy
    model.unmerge_adapter()
    assert torch.equal(model(x), tuned_output)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


def test_merging_some_modules_only():
    model, work = spiel()
    train(model, work, AgedAdamW(trained(model), lr=1e-2), 0, 3)
    want = model(input_ids=IDS).logits.detach()
    names = merge_modules(model, r".*\.mlp\..*")
    assert names
    assert all(".mlp." in n for n in names)
    layers = sparse_layers(model)
    assert {n for n, layer in layers.items() if layer.merged} == set(names)
    torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=IDS).logits, want)
    with pytest.raises(BadInput, match="nowhere"):
        merge_modules(model, "nowhere")


# ---- what is left


def test_the_difference_file_is_the_tuned_model_and_fits_no_other_shape(tmp_path):
    """Saved differences whose shape is not the layer's are refused."""
    model, work = spiel()
    train(model, work, AgedAdamW(trained(model), lr=1e-2), 0, 8)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    delta = export_delta(model)
    fresh = tiny_llama()
    apply(delta, dict(fresh.named_parameters()))
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, want)
    k = sum(p.numel() for p in trained(model))
    assert delta.entries() == k  # what left went back to the base, so nothing of it is kept
    other = tiny_llama(hidden_size=48, intermediate_size=96)
    with pytest.raises(WrongBase):
        apply(delta, dict(other.named_parameters()))
