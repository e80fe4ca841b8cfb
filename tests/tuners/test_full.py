"""The full tuner: what moves, what stays bit-exact under any optimizer, and that loading gives the same bits."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase
from pegbox.parts.allocation import Allocation, Entries, Frozen, PerTensor, Units, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.select import SELECT
from pegbox.testing import tiny_llama
from pegbox.tuners import TUNER
from pegbox.tuners.full import Full, full_state

UP, DOWN, Q = (f"model.layers.0.{n}.weight" for n in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
IDS = torch.arange(24).view(2, 12)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def some_entries() -> Allocation:
    index = torch.tensor([0, 3, 17, 2047], dtype=torch.int32)
    return Allocation({UP: Entries(index), DOWN: Units(1, torch.tensor([2, 5])), Q: Whole()})


def train(model, steps=3, optimizer="adamw", clip=1.0):
    parameters = [p for p in model.parameters() if p.requires_grad]
    stepper = OPTIMIZERS[optimizer](parameters)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        stepper.step()
        stepper.zero_grad()
    return stepper


def moved(model, base) -> dict[str, torch.Tensor]:
    before = dict(base.named_parameters())
    return {name: p != before[name] for name, p in model.named_parameters() if (p != before[name]).any()}


def test_everything_trains_without_a_selection(llama):
    Full().attach(llama, None, Context(llama))
    assert all(p.requires_grad for p in llama.parameters())


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_only_what_was_selected_moves(llama, optimizer):
    Full().attach(llama, some_entries(), Context(llama))
    train(llama, optimizer=optimizer)
    changed = moved(llama, tiny_llama())
    assert set(changed) == {UP, DOWN, Q}
    assert changed[UP].flatten().nonzero().flatten().tolist() == [0, 3, 17, 2047]
    assert changed[DOWN].any(dim=0).nonzero().flatten().tolist() == [2, 5]
    assert changed[DOWN][:, [2, 5]].all()


def test_gradient_at_selected_entries_is_full_tunings(llama):
    model = llama.double()
    Full().attach(model, None, Context(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    full = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    Full().attach(model, some_entries(), Context(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {UP, DOWN, Q}
    assert torch.equal(grads[Q], full[Q])
    assert torch.equal(grads[UP].flatten()[[3, 17]], full[UP].flatten()[[3, 17]])
    assert grads[UP].count_nonzero() <= 4
    assert torch.equal(grads[DOWN][:, 5], full[DOWN][:, 5])


def test_a_nan_in_a_held_entry_goes_nowhere(llama):
    Full().attach(llama, some_entries(), Context(llama))
    parameter = llama.get_parameter(UP)
    poison = torch.zeros_like(parameter)
    poison.view(-1)[1] = float("nan")
    (parameter * poison).sum().backward()
    assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("allocation", [None, some_entries()], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load_are_bit_exact(tmp_path, allocation, dtype):
    model = tiny_llama().to(dtype)
    Full().attach(model, allocation, Context(model))
    train(model, optimizer="sgd_momentum")
    entry = Full().save(model, tmp_path)
    fresh = Full().load(tiny_llama().to(dtype), tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name
    assert entry["tensors"] == (len(list(model.parameters())) if allocation is None else 3)
    if allocation is not None:
        assert entry["entries"] == 4 + 2 * 32 + 32 * 32


def test_loading_for_training_goes_on_with_the_same_selection(tmp_path, llama):
    Full().attach(llama, some_entries(), Context(llama))
    train(llama)
    Full().save(llama, tmp_path)
    again = Full().load(tiny_llama(), tmp_path, trainable=True)
    shapes = {name: tuple(p.shape) for name, p in llama.named_parameters()}
    assert full_state(again).allocation.trained(shapes) == full_state(llama).allocation.trained(shapes)
    train(again)
    assert set(moved(again, tiny_llama())) == {UP, DOWN, Q}


def test_another_selection_adds_to_what_is_saved(tmp_path, llama):
    first = Allocation({UP: Entries(torch.tensor([1, 4])), Q: Whole()})
    second = Allocation({UP: Entries(torch.tensor([4, 9])), DOWN: Units(0, torch.tensor([1]))})
    Full().attach(llama, first, Context(llama))
    train(llama)
    at_switch = llama.get_parameter(UP).detach().clone()
    Full().attach(llama, second, Context(llama))
    assert not llama.get_parameter(Q).requires_grad
    train(llama)
    changed_since = (llama.get_parameter(UP) != at_switch).flatten().nonzero().flatten().tolist()
    assert changed_since == [4, 9]
    touched = full_state(llama).touched
    assert touched[UP].index.tolist() == [1, 4, 9]
    Full().save(llama, tmp_path)
    fresh = Full().load(tiny_llama(), tmp_path)
    assert all(torch.equal(p, fresh.get_parameter(n)) for n, p in llama.named_parameters())


def test_tied_weights_are_one_tensor(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    Full().attach(model, Allocation({"lm_head.weight": Whole()}), Context(model))
    assert list(full_state(model).allocation) == ["model.embed_tokens.weight"]
    train(model)
    Full().save(model, tmp_path)
    fresh = Full().load(tiny_llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 2047), min_size=1, max_size=200))
def test_any_index_set_holds_the_rest(tmp_path_factory, positions):
    model = tiny_llama(num_hidden_layers=1)
    index = torch.tensor(sorted(positions))
    Full().attach(model, Allocation({UP: Entries(index)}), Context(model))
    train(model, steps=1, optimizer="sgd_momentum")
    before = tiny_llama(num_hidden_layers=1).get_parameter(UP).flatten()
    keep = torch.ones(2048, dtype=torch.bool)
    keep[index] = False
    after = model.get_parameter(UP).flatten()
    assert torch.equal(after[keep], before[keep])


def test_optimizer_state_covers_the_updated_tensors_only(llama):
    allocation = Allocation({UP: Whole(), Q: Whole()})
    Full().attach(llama, allocation, Context(llama))
    stepper = train(llama)
    updated = 64 * 32 + 32 * 32
    held = sum(s.numel() * s.element_size() for st_ in stepper.state.values() for s in st_.values() if s.ndim)
    assert held == 2 * 4 * updated
    assert sum(p.grad is not None or p.requires_grad for p in llama.parameters()) == 2


@pytest.mark.parametrize(
    ("allocation", "error", "says"),
    [
        (Allocation({"model.layers.0.mlp.up.weight": Whole()}), BadInput, "which this model has not"),
        (Allocation({UP: Frozen()}), BadInput, "selection is empty"),
        (Allocation({UP: Entries(torch.tensor([], dtype=torch.int32))}), BadInput, "selection is empty"),
        (Allocation({UP: Entries(torch.tensor([5, 2]))}), BadInput, "sorted, unique"),
        (Allocation({UP: Entries(torch.tensor([99999]))}), BadInput, "within a tensor of 2048"),
        (Allocation({UP: Units(2, torch.tensor([0]))}), BadInput, "axis 2"),
        (Allocation({UP: PerTensor("codec", {})}), BadInput, "takes whole tensors"),
    ],
)
def test_selections_that_cannot_be_held_are_refused(llama, allocation, error, says):
    with pytest.raises(error, match=says):
        Full().attach(llama, allocation, Context(llama))


def test_packed_weights_are_refused(llama):
    module = llama.model.layers[0].mlp.up_proj
    module.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(Unsupported, match="packed weights"):
        Full().attach(llama, Allocation({UP: Whole()}), Context(llama))


def test_there_is_no_reference_view(llama):
    assert not Full.reference_view
    with pytest.raises(Unsupported, match="frozen copy"):
        Full().reference(llama)


def test_wrong_bases_and_broken_files_are_refused(tmp_path, llama):
    with pytest.raises(BadInput, match="nothing to save"):
        Full().save(llama, tmp_path)
    Full().attach(llama, some_entries(), Context(llama))
    Full().save(llama, tmp_path)
    other = tiny_llama(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(WrongBase, match=r"shape .* in this base and .* in the update"):
        Full().load(other, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    with pytest.raises(WrongBase, match="which this base has not"):
        Full().load(torch.nn.Linear(2, 2), tmp_path)
    path = tmp_path / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Corrupt, match="not a readable difference"):
        Full().load(tiny_llama(), tmp_path)


def test_it_is_on_the_axis_and_validates():
    assert isinstance(TUNER.validate("full"), Full)
    with pytest.raises(BadInput, match="Unknown key"):
        TUNER.validate({"kind": "full", "rank": 3})
    assert json.loads(Full().model_dump_json()) == {"kind": "full"}


def redrawing(model, every=2):
    selector = SELECT.validate({"kind": "half", "always_on": ["head"], "schedule": {"every": every}})
    ctx = Context(model, seed=5)
    first = selector.select(Anatomy.of(model), dict(model.named_parameters()), None, ctx.generator("select", 0))
    Full().attach(model, first, ctx)
    (schedule,) = Full().schedules(selector, ctx)
    stepper = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return schedule, stepper


def steps(model, schedule, stepper, numbers):
    model.train()
    for step in numbers:
        if step and step % schedule.every == 0:
            schedule.refresh(step, model, stepper)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == schedule.active
        stepper.step()
        stepper.zero_grad()
        assert set(moved_since(model, before)) == schedule.active
        assert all(p.requires_grad for p in model.parameters())


def moved_since(model, before):
    return [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]


def test_drawing_again_while_training(tmp_path, llama):
    schedule, stepper = redrawing(llama)
    first = set(schedule.active)
    steps(llama, schedule, stepper, range(4))
    assert schedule.active != first
    assert {id(p) for p in stepper.state} == {id(llama.get_parameter(n)) for n in schedule.active}
    Full().save(llama, tmp_path)
    fresh = Full().load(tiny_llama(), tmp_path)
    assert all(torch.equal(p, fresh.get_parameter(n)) for n, p in llama.named_parameters())


def test_drawing_again_resumes_exactly(llama):
    schedule, stepper = redrawing(llama)
    steps(llama, schedule, stepper, range(7))
    stopped = tiny_llama()
    schedule_a, stepper_a = redrawing(stopped)
    steps(stopped, schedule_a, stepper_a, range(5))
    resumed = tiny_llama()
    schedule_b, stepper_b = redrawing(resumed)
    resumed.load_state_dict(stopped.state_dict())
    stepper_b.load_state_dict(stepper_a.state_dict())
    schedule_b.load_state_dict(json.loads(json.dumps(schedule_a.state_dict())))
    assert schedule_b.active == schedule_a.active
    assert full_state(resumed).touched.digest() == full_state(stopped).touched.digest()
    steps(resumed, schedule_b, stepper_b, range(5, 7))
    assert all(torch.equal(p, resumed.get_parameter(n)) for n, p in llama.named_parameters())


def test_only_seeded_selections_can_be_drawn_again(llama):
    from pegbox.select.base import Schedule

    class Weighing:
        kind, needs_weights, schedule = "weighing", True, Schedule(every=2)

    Full().attach(llama, None, Context(llama))
    with pytest.raises(Unsupported, match="looks at weights"):
        Full().schedules(Weighing(), Context(llama))
    assert Full().schedules(SELECT.validate("half"), Context(llama)) == []


def test_what_a_preparation_took_out_is_not_forgotten(llama):
    from pegbox.parts.initial import set_initial

    set_initial(llama, {"model.layers.0.mlp.up_proj": (torch.zeros(2, 32), torch.zeros(64, 2))})
    with pytest.raises(Unsupported, match="use tuner 'lora'"):
        Full().attach(llama, None, Context(llama))


def adam_steps(model, count, make=torch.optim.Adam):
    stepper = make([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        stepper.step()
        stepper.zero_grad()


def test_all_entries_are_full_tuning_bit_for_bit():
    every, whole = tiny_llama(), tiny_llama()
    chosen = {n: Entries(torch.arange(p.numel(), dtype=torch.int32)) for n, p in every.named_parameters()}
    Full().attach(every, Allocation(chosen), Context(every))
    Full().attach(whole, None, Context(whole))
    for model in (every, whole):
        adam_steps(model, 3, lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1))
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in every.named_parameters())


def test_masked_weights_and_a_vector_of_values_go_the_same_way():
    """The two ways to train a fixed mask: inside the dense tensor, and as k numbers beside a frozen base."""
    generator = torch.Generator().manual_seed(0)
    names = [UP, DOWN, Q]
    masked, vector = tiny_llama().double(), tiny_llama().double()
    chosen = Allocation(
        {
            n: Entries(torch.randperm(masked.get_parameter(n).numel(), generator=generator)[:50].sort().values.int())
            for n in names
        }
    )
    Full().attach(masked, chosen, Context(masked))
    sparse = TUNER.validate({"kind": "sparse", "coordinates": "delta"})
    wrapped = sparse.attach(vector, chosen, Context(vector))
    adam_steps(masked, 20)
    adam_steps(wrapped, 20)
    settled = wrapped.merge_and_unload()
    for n in names:
        difference = (settled.get_parameter(n) - masked.get_parameter(n)).abs().max()
        assert difference < 1e-6, n
        assert (masked.get_parameter(n) != tiny_llama().double().get_parameter(n)).sum() == 50
