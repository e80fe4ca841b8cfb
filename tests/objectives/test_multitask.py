"""`task_balanced`: what the modes are, blindness to cutting and packing, balances in a step, what is refused."""

import pytest
import torch

from objectives.steps import close, packed, padded, samples
from pegbox.errors import BadInput
from pegbox.objectives.balances import Observed
from pegbox.objectives.base import OBJECTIVE, StepView
from pegbox.parts.context import Context
from pegbox.parts.rowsource import RowSource
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama

NAMES = ("a", "b", "c")


def objective(**options):
    return OBJECTIVE.validate({"kind": "task_balanced", **options})


def with_tasks(batch, tasks):
    return {**batch, "task_ids": torch.tensor(tasks)}


def run(made, model, batches, names=NAMES, ctx=None, around=True, state=None):
    """One step as the engine does it: (losses, gradients, state)."""
    ctx = ctx or Context(model, tasks=names)
    state = state or made.setup(ctx)
    view, totals, losses = CausalView(model), {}, {}
    for b in batches:
        for name, n in made.count(b).items():
            totals[name] = totals.get(name, 0) + n
    step = StepView(view, batches, totals)
    if around:
        with torch.no_grad():
            made.before_step(state, step)
    model.zero_grad()
    for b in batches:
        with torch.no_grad():
            ref = made.reference(state, view, b)
        parts = list(made.losses(state, view, b, totals, ref))
        sum(v for n, v in parts if not n.startswith("_")).backward()
        for name, v in parts:
            losses[name] = losses.get(name, 0) + v.detach() / (len(batches) if name.startswith("_") else 1)
    return losses, {n: p.grad.clone() for n, p in model.named_parameters()}, (state, step)


CASES = ["case1", "case2", "case3", "case4"]


def test_with_one_task_task_means_are_plain_means():
    """One task, equal weights: case3 is case1 and case4 is case2."""
    model, batch = tiny_llama(), padded(samples())
    found = {m: float(run(objective(mode=m), model, [batch], ("only",))[0]["tokens"]) for m in CASES}
    assert found["case3"] == pytest.approx(found["case1"], abs=1e-7)
    assert found["case4"] == pytest.approx(found["case2"], abs=1e-7)
    plain = OBJECTIVE.validate({})
    assert found["case1"] == pytest.approx(
        float(plain.value(None, CausalView(model), batch, plain.count(batch))), abs=1e-6
    )


def test_samples_of_one_length_and_balanced_tasks_make_all_modes_equal():
    """All samples equally long and as many of each task: the four are one."""
    model, batch = tiny_llama(), with_tasks(padded(samples((8, 8, 8, 8))), [0, 1, 0, 1])
    found = [float(run(objective(mode=m), model, [batch], ("a", "b"))[0]["tokens"]) for m in CASES]
    assert found == pytest.approx([found[0]] * 4, abs=1e-6)


def test_doubling_a_tasks_samples_changes_token_means_only():
    """case3 is invariant to duplicating a task's samples in the batch, case1 is not."""
    model, items, tasks = tiny_llama(), samples(), [0, 1, 2, 0]
    once, twice = with_tasks(padded(items), tasks), with_tasks(padded([*items, items[1]]), [*tasks, 1])
    for mode, same in (("case3", True), ("case4", True), ("case1", False), ("case2", False)):
        a, b = (run(objective(mode=mode), model, [batch]) for batch in (once, twice))
        assert (float(a[0]["tokens"]) == pytest.approx(float(b[0]["tokens"]), abs=1e-6)) is same
        assert close(a[1], b[1]) is same


def test_an_absent_tasks_weight_is_not_used():
    """A task that the batch lacks changes nothing, whatever its weight."""
    model, batch = tiny_llama(), with_tasks(padded(samples()), [0, 2, 0, 2])
    found = []
    for weight in (0.1, 1e6):
        made = objective(balance={"kind": "static", "weights": [0.3, weight, 0.7]})
        losses, grads, _ = run(made, model, [batch])
        assert all(torch.isfinite(g).all() for g in grads.values())
        assert "_loss/b" not in losses
        found.append(float(losses["tokens"]))
    assert found[0] == pytest.approx(found[1], abs=1e-7)


MODES = [{"mode": m} for m in (*CASES, "focal_sample", "focal_task")]
MODES += [{"balance": {"kind": "famo"}}, {"balance": {"kind": "famo"}, "mode": "case4"}, {"inner": {"kind": "asft"}}]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_global_scope_is_blind_to_cutting_padding_and_packing(options):
    """scope=global: the same loss and gradient whatever the micro-batches or the packing."""
    model, items, tasks = tiny_llama(), samples(), [0, 1, 2, 0]
    made = objective(**options)
    whole = run(made, model, [with_tasks(padded(items), tasks)])
    others = {
        "cut": [with_tasks(padded(items[:1]), tasks[:1]), with_tasks(padded(items[1:]), tasks[1:])],
        "one by one": [with_tasks(padded([i]), [t]) for i, t in zip(items, tasks)],
        "packed": [with_tasks(packed(items), tasks)],
        "packed and cut": [with_tasks(packed(items[:2]), tasks[:2]), with_tasks(packed(items[2:]), tasks[2:])],
        "left": [with_tasks(padded(items, "left", extra=2), tasks)],
    }
    for name, batches in others.items():
        got = run(made, model, batches)
        assert float(got[0]["tokens"]) == pytest.approx(float(whole[0]["tokens"]), abs=1e-6), name
        assert close(got[1], whole[1]), name
        for task in NAMES:
            assert float(got[0][f"_loss/{task}"]) == pytest.approx(float(whole[0][f"_loss/{task}"]), abs=1e-5), name


def test_micro_scope_is_the_mean_of_the_micro_batches():
    model, items, tasks = tiny_llama(), samples(), [0, 1, 2, 0]
    parts = [with_tasks(padded(items[:2]), tasks[:2]), with_tasks(padded(items[2:]), tasks[2:])]
    each = [float(run(objective(), model, [p])[0]["tokens"]) for p in parts]
    found = run(objective(scope="micro"), model, parts)[0]
    assert float(found["tokens"]) == pytest.approx(sum(each) / 2, abs=1e-6)


def test_focal_without_focus_is_the_task_mean_of_sample_means():
    """gamma = 0, alpha = 1: exactly case4."""
    model, batch = tiny_llama(), with_tasks(padded(samples()), [0, 1, 2, 0])
    plain = run(objective(mode="case4"), model, [batch])
    for mode in ("focal_sample", "focal_task"):
        found = run(objective(mode=mode, gamma=0.0), model, [batch])
        assert float(found[0]["tokens"]) == pytest.approx(float(plain[0]["tokens"]), abs=1e-6)
        assert close(found[1], plain[1])


@pytest.mark.parametrize("mode", ["focal_sample", "focal_task"])
def test_focal_over_tiles_has_autograds_gradient(mode):
    """float64, frozen and trained head, tiles of three rows, against one pass without tiles."""
    model, batch = tiny_llama().double(), with_tasks(padded(samples()), [0, 1, 2, 0])
    whole = run(objective(mode=mode), model, [batch])
    tiled = run(objective(mode=mode, inner={"chunk": 3}), model, [batch])
    assert all(torch.allclose(whole[1][n], tiled[1][n], rtol=0, atol=1e-12) for n in whole[1])
    model.lm_head.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    made = objective(mode=mode, inner={"chunk": 3})
    state = made.setup(Context(model, tasks=NAMES))
    dict(made.losses(state, CausalView(model), batch, made.count(batch), None))["tokens"].backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.allclose(whole[1][n], g, rtol=0, atol=1e-12) for n, g in grads.items())


def test_a_batch_of_one_row_is_no_special_case():
    model, items = tiny_llama(), samples()
    losses = run(objective(), model, [with_tasks(padded(items[:1]), [1])])[0]
    assert float(losses["tokens"]) == pytest.approx(float(losses["_loss/b"]), abs=1e-6)


def test_rows_weights_are_factors():
    model, batch = tiny_llama(), with_tasks(padded(samples()), [0, 0, 0, 0])
    weights = torch.tensor([2.0, 0.0, 1.0, 0.5])
    for mode in ("case3", "focal_sample"):
        made = objective(mode=mode)
        each = [float(run(made, model, [with_tasks(padded([i]), [0])], ("a",))[0]["tokens"]) for i in samples()]
        got = float(run(made, model, [{**batch, "sample_weight": weights}], ("a",))[0]["tokens"])
        counts = torch.tensor([len(i) - p for i, p in samples()], dtype=torch.float)
        shares = counts / counts.sum() if mode == "case3" else torch.full((4,), 1 / 4)
        assert got == pytest.approx(float((shares * weights * torch.tensor(each)).sum()), abs=1e-5)


# ---- balances in a step ----


def famo_run(model, batches, **options):
    return run(objective(balance={"kind": "famo", **options}), model, batches)


def test_famo_in_a_step_is_a_convex_combination_and_starts_with_z_over_loss():
    """The shared gradient is sum_k (z_k / L_k) / c grad L_k."""
    model, batch = tiny_llama(), with_tasks(padded(samples()), [0, 1, 2, 0])
    losses, grads, _ = famo_run(model, [batch])
    each = {}
    for k in range(3):
        weights = [float(k == j) for j in range(3)]
        made = objective(balance={"kind": "static", "weights": weights})
        each[k] = run(made, model, [batch])[1]
    inverse = torch.tensor([1 / float(losses[f"_loss/{n}"]) for n in NAMES])
    shares = inverse / inverse.sum()
    expected = {n: sum(float(shares[k]) * each[k][n] for k in range(3)) for n in grads}
    assert close(expected, grads)
    assert sum(float(losses[f"_weight/{n}"]) for n in NAMES) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("reevaluate", [True, False])
def test_famo_moves_towards_the_task_that_improves_less(reevaluate):
    model, batch = tiny_llama(), with_tasks(padded(samples()), [0, 1, 2, 0])
    made = objective(balance={"kind": "famo", "reevaluate": reevaluate})
    ctx = Context(model, tasks=NAMES)
    state = made.setup(ctx)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen, moved = [], None
    for _ in range(3):
        losses, _, (state, step) = run(made, model, [batch], state=state, ctx=ctx)
        seen.append(torch.tensor([float(losses[f"_loss/{n}"]) for n in NAMES]))
        optimizer.step()
        with torch.no_grad():
            made.after_step(state, step)
        if not reevaluate and len(seen) == 1:
            assert not state.balance.logits.any()  # nothing to compare with yet
        if len(seen) == 2:
            first_move = moved if reevaluate else state.balance.logits.detach().clone()
            gained = seen[0].log() - seen[1].log()
            assert torch.equal(first_move.sign().float(), -(gained - gained.mean()).sign())
        moved = state.balance.logits.detach().clone()
    logits = state.balance.logits
    fresh = made.setup(ctx)
    fresh.load_state_dict(state.state_dict())
    assert torch.equal(fresh.balance.logits, logits)


def rows(tasks, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i, t in enumerate(tasks):
        ids = torch.randint(0, 256, (8,), generator=g).tolist()
        out.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "sample_id": i, "task_id": t, "task": NAMES[t]})
    return out


def validated(model, examples=None):
    from pegbox.data.collate import PaddingCollator

    source = RowSource(examples if examples is not None else rows([0, 1, 2, 0, 1]), PaddingCollator(258))
    return Context(model, tasks=NAMES, streams={"validation": source})


@pytest.mark.parametrize(
    "balance", [{"kind": "coba", "warmup": 2, "history_length": 4}, {"kind": "famo", "on": "valid"}]
)
def test_a_balance_on_validation_rows_measures_them_in_eval_mode(balance):
    model = tiny_llama()
    ctx, batch = validated(model), with_tasks(padded(samples()), [0, 1, 2, 0])
    made = objective(balance=balance)
    state = made.setup(ctx)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(4):
        _, _, (state, step) = run(made, model, [batch], state=state, ctx=ctx)
        optimizer.step()
        with torch.no_grad():
            made.after_step(state, step)
        assert model.training
    weights = state.balance.weights
    assert float(weights.sum()) == pytest.approx(1, abs=1e-9)
    assert len(set(weights.tolist())) == 3  # no longer uniform
    source = ctx.streams["validation"]
    found = made._validate(state, CausalView(model), 1, 3, 0)
    for k in range(3):
        alone = source.batch([source.by_task[k][0]])
        plain = OBJECTIVE.validate({})
        assert float(found[k]) == pytest.approx(
            float(plain.value(None, CausalView(model), alone, plain.count(alone))), abs=1e-5
        )


def test_evaluation_weighs_tasks_alike_whatever_was_learnt():
    model, batch = tiny_llama(), with_tasks(padded(samples()), [0, 1, 2, 0])
    ctx = validated(model)
    made = objective(balance={"kind": "coba", "warmup": 1, "history_length": 4})
    state = made.setup(ctx)
    state.balance.weights = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        value = made.value(state, CausalView(model), batch, made.count(batch))
        plain = objective().value(objective().setup(ctx), CausalView(model), batch, made.count(batch))
    assert float(value) == pytest.approx(float(plain), abs=1e-7)


def test_inverse_size_and_a_function(tmp_path):
    model = tiny_llama()
    ctx = validated(model)
    ctx.streams = {"train": RowSource(rows([0] * 6 + [1] * 3 + [2]), None)}
    weights = objective(balance={"kind": "inverse_size"}).setup(ctx).balance.weights
    assert (weights / weights[0]).tolist() == pytest.approx([1, 2, 6])
    file = tmp_path / "mine.py"
    file.write_text(
        "def weigh(step, losses, weights):\n    return {k: losses[k] if k == 'b' else 1.0 for k in losses}\n"
    )
    made = objective(balance={"kind": "function", "function": f"{file}:weigh", "every": 2})
    state = made.setup(ctx)
    for step in range(2):
        seen = Observed(step, torch.tensor([1.0, 3.0, float("nan")], dtype=torch.float64), None, None)
        made.balance.update(state.balance, seen)
        assert state.balance.weights.tolist() == ([1 / 3] * 3 if step == 0 else [1, 3, 1])


# ---- what is refused ----


def test_options_that_can_not_be():
    for block, words in (
        ({"mode": "case5"}, "'case1'"),
        ({"inner": {"kind": "classification"}}, "no loss per token"),
        ({"inner": {"normalize": "micro"}}, "objective.scope"),
        ({"mode": "focal_task", "inner": {"token": "dft"}}, "plain cross-entropy"),
        ({"mode": "case1", "balance": "famo"}, "no use for it"),
        ({"balance": {"kind": "coba", "warmup": 300}}, "exceeds its history_length"),
        ({"balance": {"kind": "coba", "sample_num": 0}}, "greater than or equal to 1"),
        ({"balance": {"kind": "famo", "on": "valid", "reevaluate": False}}, "leave it out"),
        ({"balance": "static!"}, "Unknown objective.balance kind"),
    ):
        with pytest.raises(BadInput, match=words):
            objective(**block)


def test_weights_and_tasks_that_do_not_fit():
    """Task id outside [0, K); weights of another number, negative or all zero; unknown names."""
    model = tiny_llama()
    ctx = Context(model, tasks=NAMES)
    for weights, words in (([1, 2], "2 weights for 3"), ([1, -1, 1], "not negative"), ([0, 0, 0], "not all 0")):
        with pytest.raises(BadInput, match=words):
            objective(balance={"kind": "static", "weights": weights}).setup(ctx)
    with pytest.raises(BadInput, match="no task 'aa'"):
        objective(balance={"kind": "static", "weights": {"aa": 1.0}}).setup(ctx)
    with pytest.raises(BadInput, match="task number 7"):
        run(objective(), model, [with_tasks(padded(samples()), [0, 7, 0, 0])])
    with pytest.raises(BadInput, match="2 factors for 3"):
        objective(mode="focal_task", alpha=(1.0, 2.0)).setup(ctx)
    made = objective(balance={"kind": "static", "weights": [0, 1, 1]})
    with pytest.raises(BadInput, match="leave one"):
        run(made, model, [with_tasks(padded(samples()), [0, 0, 0, 0])])


def test_coba_without_validation_rows_or_with_a_loss_of_zero():
    model = tiny_llama()
    made = objective(balance="coba")
    with pytest.raises(BadInput, match="measures on validation rows"):
        made.setup(Context(model, tasks=NAMES))
    with pytest.raises(BadInput, match="no validation row of the task 'c'"):
        made.setup(validated(model, rows([0, 1])))
    state = made.setup(validated(model))
    for value, words in ((0.0, "one is 0"), (float("nan"), "must be finite")):
        losses = torch.tensor([1.0, value, 2.0], dtype=torch.float64)
        with pytest.raises(BadInput, match=words):
            made.balance.begin(state.balance, Observed(0, losses, None, lambda *_, v=losses: v))


def test_coba_keeps_the_last_value_of_a_task_that_is_missing_and_warns():
    made = objective(balance={"kind": "coba", "warmup": 1, "history_length": 5})
    state = made.setup(validated(tiny_llama()))
    values = iter([[1.0, 2.0, 4.0], [0.5, float("nan"), 2.0], [0.4, 1.0, 1.0]])
    seen = Observed(0, torch.zeros(3), None, lambda *_: torch.tensor(next(values), dtype=torch.float64))
    made.balance.begin(state.balance, seen)
    with pytest.warns(UserWarning, match="task 'b' is missing"):
        made.balance.update(state.balance, seen)
    assert state.balance.last.tolist() == [0.5, 2.0, 2.0]
    made.balance.update(state.balance, seen)
    assert state.balance.balancer.history[-1] == pytest.approx([0.4, 0.5, 0.25])


def test_zeroth_order_and_famo_do_not_meet():
    from pegbox.capabilities import refusals
    from pegbox.recipe import load_recipe

    block = {"objective": {"kind": "task_balanced", "balance": "famo"}, "optim": {"kind": "mezo", "lr": 1e-5}}
    assert any("weighs its parts anew" in r for r in refusals(load_recipe(block)))
    fixed = {**block, "objective": {"kind": "task_balanced"}}
    assert not refusals(load_recipe(fixed))
