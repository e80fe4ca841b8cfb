"""Batches of one source: its difference acts from forward to backward, and the weights are exact afterwards."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.data.base import DATA
from pegbox.data.policies.multi_source import Blocks
from pegbox.errors import BadInput, Unsupported, WrongBase
from pegbox.parts import deltas
from pegbox.parts.allocation import Allocation, Entries, Whole
from pegbox.parts.context import Context
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.differences import acting, base_parameters
from pegbox.testing import tiny_batch, tiny_llama
from pegbox.tuners import TUNER

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"]
TUNERS = {
    "full": {"kind": "full"},
    "in_place": {"kind": "sparse", "execution": "in_place"},
    "scatter": {"kind": "sparse", "execution": "scatter"},
    "bypass": {"kind": "sparse", "execution": "bypass"},
    "lora": {"kind": "lora", "r": 2, "target_modules": "all-linear"},
}


def phi(seed=0, count=40, scale=0.1, names=NAMES):
    """A sparse difference over tensors of the tiny model."""
    shapes = {n: tuple(p.shape) for n, p in tiny_llama().named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    delta = Delta()
    for name in names:
        index = torch.randperm(torch.Size(shapes[name]).numel(), generator=generator)[:count].sort().values.int()
        delta[name] = Piece(shapes[name], scale * torch.randn(count, generator=generator), index)
    return delta


def attached(kind, model):
    options = TUNERS[kind]
    allocation = None
    if options["kind"] == "sparse":
        index = torch.arange(0, 1024, 7, dtype=torch.int32)
        allocation = Allocation({n: Entries(index) for n in NAMES[:2]})
    torch.manual_seed(3)
    tuned = TUNER.validate(options).attach(model, allocation, Context(model))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if p.requires_grad and options["kind"] != "full":
                p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return tuned


def gradients(model):
    model.zero_grad()
    model(**{k: v for k, v in tiny_batch().items() if k in ("input_ids", "attention_mask", "labels")}).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def composed(delta):
    model = tiny_llama()
    deltas.apply(delta, dict(model.named_parameters()))
    return model


@pytest.mark.parametrize("kind", list(TUNERS))
def test_the_gradient_is_that_of_a_model_composed_by_hand(kind):
    """A batch of source s gives the gradient of an explicit copy with s's difference in it, under every tuner."""
    delta, model = phi(), attached(kind, tiny_llama())
    bare = gradients(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with acting(model, delta):
        found = gradients(model)
    expected = gradients(attached(kind, composed(delta)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert any(not torch.equal(found[n], bare[n]) for n in found)
    gradients(model)  # the weights of after are those of before, also where a tuner writes into them
    with model.disable_adapter() if kind != "full" else torch.no_grad():
        model(input_ids=tiny_batch()["input_ids"])
        now = base_parameters(model)
        assert all(torch.equal(now[n], tiny_llama().get_parameter(n)) for n in NAMES)
    assert all(torch.equal(gradients(model)[n], bare[n]) for n in bare)
    assert before.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["full", "in_place", "scatter", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_in_turns_never_drifts(kind, dtype):
    """Thirty swaps between two overlapping differences with steps in between: what does not train is bit for bit."""
    model = attached(kind, tiny_llama().to(dtype))
    first = {n: tiny_llama().to(dtype).get_parameter(n).detach().clone() for n in NAMES}
    frozen = [] if kind == "full" else NAMES
    stepper = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    parts = [phi(0), phi(1), None]
    for turn in range(30):
        delta = parts[turn % 3]
        if delta is None:
            gradients(model)
        else:
            places = base_parameters(model)
            inside = {n: places[n].detach().clone() for n in delta}
            with acting(model, delta):
                gradients(model)
            if kind == "full":
                assert all(torch.equal(places[n], inside[n]) for n in delta)
        stepper.step()
    with model.disable_adapter() if kind != "full" else torch.no_grad():
        model(input_ids=tiny_batch()["input_ids"])
        places = base_parameters(model)
        assert all(torch.equal(places[n], first[n]) for n in frozen)


def test_an_exception_takes_the_difference_off_again():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), acting(model, phi()):
        raise RuntimeError("on purpose")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(0, 1000),
)
def test_blocks_are_of_one_source_in_proportion(sources, size, seed):
    """Every block of rows is of one source; over time each has rows times upsampling; the same for a seed."""
    starts = list(itertools.accumulate((n for n, _ in sources), initial=0))
    members = [list(range(starts[k], starts[k + 1])) for k in range(len(sources))]
    weights = [w for _, w in sources]
    total = sum(n * w for n, w in sources)
    turns = 3 * size  # whole turns deal out exactly this many rows
    order = list(itertools.islice(iter(Blocks(members, weights, size, seed)), turns * total))
    of = [next(k for k, m in enumerate(members) if row in m) for row in order]
    assert all(len(set(of[i : i + size])) == 1 for i in range(0, len(of), size))
    for k, (n, w) in enumerate(sources):
        assert of.count(k) == turns * n * w
        seen = [row for row in order if row in members[k]]
        assert max(seen.count(row) for row in members[k]) - min(seen.count(row) for row in members[k]) <= 1
    again = list(itertools.islice(iter(Blocks(members, weights, size, seed)), turns * total))
    assert again == order


def policy(tmp_path, **options):
    deltas.save(phi(0), tmp_path / "a.safetensors")
    deltas.save(phi(1), tmp_path / "b.safetensors")
    parts = {"a": str(tmp_path / "a.safetensors"), "b": str(tmp_path / "b.safetensors")}
    return DATA.validate({"kind": "multi_source", "parts": parts, **options})


def context(tasks=("a", "b"), model=None):
    return Context(tiny_llama() if model is None else model, tasks=tasks, batch=4)


def test_a_batch_is_learnt_on_its_own_source(tmp_path):
    """Task numbers choose the part; a source with null has the bare weights; mixed batches are refused."""
    ctx = context(("a", "b", "c"))
    made = policy(tmp_path, parts={**policy(tmp_path).parts, "c": None})
    state = made.setup(ctx)
    bare = gradients(ctx.model)
    for number, delta in enumerate((phi(0), phi(1), None)):
        with made.acting(state, {"task_ids": torch.tensor([number, number])}, ctx):
            found = gradients(ctx.model)
        expected = bare if delta is None else gradients(composed(delta))
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    with pytest.raises(BadInput, match="rows of 2 sources"):
        made.acting(state, {"task_ids": torch.tensor([0, 1])}, ctx)


def test_rows_of_a_source_share_batches_in_evaluation_too(tmp_path):
    rows = [{"task_id": i % 2} for i in range(7)]
    made = policy(tmp_path)
    assert made.apart(None, rows, context()) == [[0, 2, 4, 6], [1, 3, 5]]


@pytest.mark.parametrize(
    ("tasks", "options", "says"),
    [
        (("",), {}, "rows without a source"),
        ((), {}, "rows without a source"),
        (("a", "b", "d"), {}, "says nothing of source 'd'"),
        (("a",), {}, "no rows"),
        (("a", "b"), {"upsampling": {"e": 2}}, "no source 'e'"),
        (("a", "b"), {"upsampling": {"a": 0}}, "upsampling.a"),
        (("a", "b"), {"block": 0}, "block"),
        (("a", "b"), {"parts": {"a": None, "b": None}}, "gives no source a difference"),
        (("a", "b"), {"parts": {}}, "parts"),
        (("a", "b"), {"parts": {"a": "nowhere", "b": None}}, "no finished run"),
    ],
)
def test_sources_that_are_not_there_are_refused(tasks, options, says, tmp_path):
    """Rows without a tag, sources without a word, parts that don't exist."""
    with pytest.raises(BadInput, match=says):
        policy(tmp_path, **options).setup(context(tasks))


def test_a_batch_without_a_tag_is_refused(tmp_path):
    ctx = context()
    made = policy(tmp_path)
    with pytest.raises(BadInput, match="no task_ids"):
        made.acting(made.setup(ctx), {"input_ids": torch.zeros(1, 2)}, ctx)


def test_parts_of_another_model_are_refused(tmp_path):
    """Other names, other shapes (both said), values instead of differences, packed weights."""
    made = policy(tmp_path)
    with pytest.raises(WrongBase, match=r"up_proj.* \(64, 32\).*\(48, 32\)"):
        made.setup(context(model=tiny_llama(intermediate_size=48)))
    with pytest.raises(WrongBase, match=r"q_proj\.weight', which is not in this model"):
        made.setup(context(model=tiny_llama(num_hidden_layers=1)))
    values = Delta({n: Piece(p.shape, p.values, p.index, "set") for n, p in phi().items()})
    deltas.save(values, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="new values, not as a difference"):
        made.setup(context())
    model = tiny_llama()
    packed = torch.nn.Parameter(torch.zeros((64, 32), dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(Unsupported, match="packed"), acting(model, phi()):
        pass


def test_what_a_part_trained_whole_stays_out(tmp_path):
    """A head saved beside a difference is its own task's: it is not put on."""
    head = torch.zeros(tuple(tiny_llama().lm_head.weight.shape))
    deltas.save(
        Delta({**phi(0), "lm_head.weight": Piece(tuple(head.shape), head, None, "set")}), tmp_path / "h.safetensors"
    )
    made = policy(tmp_path, parts={"a": str(tmp_path / "h.safetensors"), "b": None})
    assert set(made.setup(context()).by_task[0]) == set(NAMES)


def test_full_tuning_keeps_masked_entries_under_a_swap():
    """The full tuner over single entries: what is not selected is exact after swaps and steps with decay."""
    model = tiny_llama()
    index = torch.arange(0, 512, 5, dtype=torch.int32)
    TUNER.validate("full").attach(model, Allocation({NAMES[0]: Entries(index), NAMES[1]: Whole()}), Context(model))
    stepper = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for seed in range(4):
        with acting(model, phi(seed)):
            gradients(model)
        stepper.step()
    out = torch.ones(2048, dtype=torch.bool)
    out[index.long()] = False
    one, other = model.get_parameter(NAMES[0]).flatten(), tiny_llama().get_parameter(NAMES[0]).flatten()
    assert torch.equal(one[out], other[out])
    assert not torch.equal(one[~out], other[~out])
