"""The Bayesian data scheduler in a step and in a run: weights, signs, streams, resume, transfer, what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from engine.helpers import COLLATE, examples, stage, weights
from objectives.steps import close, padded, samples, step
from pegbox.data.base import DATA
from pegbox.data.bayesian_scheduler import joined, mean_losses
from pegbox.data.collate import PackingCollator
from pegbox.data.poisoned import ATTACKS, forbidden_rate, poisoned, refusal_rate, trusted
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.parts.rowsource import RowSource
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama

MEAN = {"kind": "task_balanced", "mode": "case2"}


def policy(**options):
    return DATA.validate({"kind": "bayesian_scheduler", "safe": "safe.jsonl", **options})


def safe_rows(count=6):
    return [{**e, "sample_id": 900 + i} for i, e in enumerate(examples(count, seed=5))]


def context(model=None, train=None, safe=None, collate=COLLATE, **options):
    streams = {"train": RowSource(train or examples(8), collate), "safe": RowSource(safe or safe_rows(), collate)}
    return Context(model or tiny_llama(), seed=1, total_steps=10, streams=streams, **options)


def user_batch(ctx, rows=(0, 3, 5)):
    return ctx.streams["train"].batch(list(rows))


def theta(model, batch):
    """(loss, gradients) of the mean over samples on a batch."""
    return step(OBJECTIVE.validate(MEAN), model, [batch], ctx=Context(model, tasks=("a",)))


# ---- the step on the model


def test_a_rows_loss_is_its_mean_computed_alone():
    """Per-sample loss equals the mean computed one by one, whatever the padding."""
    model, items = tiny_llama(), samples()
    batch = padded(items, extra=4)
    found = mean_losses(CausalView(model).logits(batch), batch)
    losses = theta(model, batch)[0]["_sample_ce"]
    for i, item in enumerate(items):
        alone = padded([item])
        plain = OBJECTIVE.validate({})
        value = float(plain.value(None, CausalView(model), alone, plain.count(alone)))
        assert float(found[i]) == pytest.approx(value, abs=1e-6)
        assert float(losses[i]) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_objective_sees_safe_plus_weighted(ratio):
    """theta minimises mean_safe l + mean_b w_b l_b; w carries no gradient, and theta's losses give none to it."""
    ctx = context()
    made = policy(ratio=ratio)
    state = made.setup(ctx)
    with torch.no_grad():
        state.scheduler.logits.copy_(torch.linspace(-1, 1, 8))
    batch = user_batch(ctx)
    whole = made.on_batch(state, batch, ctx)
    assert whole["sample_ids"].tolist() == [*batch["sample_ids"].tolist(), *whole["sample_ids"][3:].tolist()]
    assert bool((whole["sample_ids"][3:] < 0).all())
    assert not whole["sample_weight"].requires_grad
    view = CausalView(ctx.model)
    losses = mean_losses(view.logits(whole), whole)
    expected = (state.scheduler.all_weights()[[0, 3, 5]] * losses[:3]).mean() + losses[3:].mean()
    assert len(losses) == 3 + 3 * ratio
    found, grads = theta(ctx.model, whole)
    assert float(found["tokens"]) == pytest.approx(float(expected), abs=1e-5)
    ctx.model.zero_grad()
    expected.backward()
    assert close(grads, {n: p.grad for n, p in ctx.model.named_parameters()})
    assert state.scheduler.logits.grad is None


def test_uniform_frozen_weights_are_the_unweighted_mode():
    """Bit for bit."""
    found = []
    for mode in ("plain", "anchored"):
        ctx = context()
        made = policy(mode=mode, start=0.0)
        found.append(theta(ctx.model, made.on_batch(made.setup(ctx), user_batch(ctx), ctx)))
    assert found[0][0]["tokens"] == found[1][0]["tokens"]
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


def test_modes():
    ctx = context()
    for mode, rows in (("sft", 3), ("weighted", 3), ("anchored", 6), ("mixed", 6)):
        made = policy(mode=mode)
        out = made.on_batch(made.setup(ctx), user_batch(ctx), ctx)
        assert len(out["sample_weight"]) == rows
        if mode == "mixed":  # lam = 0.9 at the first step
            assert out["sample_weight"][3:].tolist() == pytest.approx([1.8] * 3)
            assert out["sample_weight"][:3].tolist() == pytest.approx([0.2] * 3, rel=1e-5)
    ctx.step = lambda: 5
    made = policy(mode="mixed")
    assert made._shares(ctx) == pytest.approx((0.6, 0.4))


def test_batches_join_padded_and_packed():
    for collate in (COLLATE, PackingCollator(258, 40)):
        user, safe = collate(examples(3)), collate(safe_rows(2))
        whole = joined(user, safe)
        ids = [*user["sample_ids"].tolist(), *safe["sample_ids"].tolist()]
        assert whole["sample_ids"].tolist() == ids
        model = tiny_llama()
        losses = theta(model, whole)[0]["_sample_ce"]
        alone = [theta(model, b)[0]["_sample_ce"] for b in (user, safe)]
        assert torch.allclose(losses, torch.cat(alone), atol=1e-5)
    with pytest.raises(Unsupported, match="another form"):
        joined(COLLATE(examples(3)), PackingCollator(258, 40)(safe_rows(2)))


# ---- the step on the scheduler


def observed(made, state, ctx, losses, rows=(0, 3, 5)):
    made.on_batch(state, user_batch(ctx, rows), ctx)
    ids = torch.tensor([*rows, -901, -902])
    made.observe(state, ids, {"sample_ce": torch.tensor([*losses, 50.0, 60.0])})


def test_a_high_loss_loses_weight_and_trusted_rows_are_not_weighed():
    ctx = context()
    made = policy()
    state = made.setup(ctx)
    before = state.scheduler.all_weights().clone()
    observed(made, state, ctx, [0.1, 5.0, 3.0])
    after = state.scheduler.all_weights()
    assert after[0] > before[0]
    assert after[3] < before[3]
    assert bool((after[[1, 2, 4, 6, 7]] > before[[1, 2, 4, 6, 7]]).all())  # every row outside the batch rises
    assert float(after.mean()) == pytest.approx(1, abs=1e-6)
    assert state.losses[[0, 3, 5]].tolist() == pytest.approx([0.1, 5.0, 3.0])
    assert math.isnan(float(state.losses[1]))


def test_baselines_take_the_level_out():
    train = [{**e, "task_id": i % 2} for i, e in enumerate(examples(8))]
    ctx = context(train=train)
    made = policy(baseline="group", optimizer="sgld", temperature=0.0, lr=2.0)
    state = made.setup(ctx)
    observed(made, state, ctx, [9.0, 1.0, 9.0], rows=(0, 1, 2))  # a hard task beside an easy one
    assert torch.allclose(state.scheduler.logits, torch.full((8,), 0.1), atol=1e-6)
    made = policy(baseline="base")
    state = made.setup(ctx)
    plain = mean_losses(CausalView(ctx.model).logits(user_batch(ctx)), user_batch(ctx))
    assert torch.allclose(state.reference[[0, 3, 5]], plain.detach(), atol=1e-5)


def test_losses_can_be_measured_again_after_the_step():
    ctx = context()
    made = policy(recompute=True)
    state = made.setup(ctx)
    batch = user_batch(ctx)
    made.on_batch(state, batch, ctx)
    with torch.no_grad():
        ctx.model.lm_head.weight.mul_(0.5)
    made.observe(state, batch["sample_ids"], {"sample_ce": torch.zeros(3)})
    expected = mean_losses(CausalView(ctx.model).logits(batch), batch)
    assert torch.allclose(state.losses[[0, 3, 5]], expected.detach(), atol=1e-5)


def test_priors_pull_as_they_say():
    for options, still in (({"entropy": 50.0}, False), ({"gaussian": 5.0, "mu": 3.0}, False), ({}, True)):
        ctx = context()
        made = policy(optimizer="sgld", temperature=0.0, lr=0.02, **options)
        state = made.setup(ctx)
        with torch.no_grad():
            state.scheduler.logits.copy_(torch.linspace(-1, 1, 8))
        for _ in range(50):
            observed(made, state, ctx, [0.0, 0.0, 0.0])
        logits = state.scheduler.logits.detach()
        if still:
            assert torch.equal(logits, torch.linspace(-1, 1, 8))
        elif "entropy" in options:
            assert logits.std() < 0.5  # towards uniform
        else:
            assert float(logits.mean()) > 1.5  # towards mu
    ctx = context()
    made = policy(activation="sigmoid", benign_share=0.25, count_sigma=2.0, optimizer="sgld", temperature=0.0, lr=0.5)
    state = made.setup(ctx)
    for _ in range(200):
        observed(made, state, ctx, [0.0, 0.0, 0.0])
    assert float(state.scheduler.all_weights().sum()) == pytest.approx(2, abs=0.05)  # floor(8 * 0.25)


def test_sgld_gives_a_posterior_with_a_spread():
    ctx = context()
    made = policy(optimizer="sgld", lr=0.5, temperature=1e-3, burn_in=5)
    ends = []
    for _ in range(2):
        state = made.setup(ctx)
        for _ in range(40):
            observed(made, state, ctx, [0.1, 4.0, 2.0])
        ends.append(state)
    assert ends[0].posterior.samples == 35
    assert bool((ends[0].posterior.std > 0).all())
    assert torch.equal(ends[0].posterior.mean, ends[1].posterior.mean)  # the seed's
    report = ends[0].report({f"row{i:04d}": i in (3, 5) for i in range(8)})
    assert report["suspicious"][0][0] in ("row0003", "row0005")
    assert report["auroc"] >= 0.5
    assert 1 <= report["effective_samples"] <= 8


# ---- in a run


def run(out, **options):
    made = options.pop("made", None) or policy(optimizer="sgld", lr=0.05)
    return stage(
        out,
        objective=OBJECTIVE.validate(MEAN),
        policies=[made],
        streams={"safe": safe_rows()},
        steps=6,
        **options,
    )


def test_a_resumed_run_is_the_whole_one(tmp_path):
    """Logits, noise, posterior and the place in the trusted rows go on exactly."""
    import shutil

    whole, net = run(tmp_path, save_every=3, save_total_limit=None)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6", ignore_errors=True)
    for folder in (tmp_path / "checkpoints").iterdir():
        if folder.name.endswith("-6"):
            shutil.rmtree(folder)
    again, other = run(tmp_path, save_every=3, save_total_limit=None, resume=True)
    a, b = weights(net), weights(other)
    assert all(torch.equal(a[n], b[n]) for n in a)
    states = [o.states["data.0"] for o in (whole, again)]
    assert torch.equal(states[0].scheduler.logits, states[1].scheduler.logits)
    assert torch.equal(states[0].posterior.mean, states[1].posterior.mean)
    assert states[0].cursor == states[1].cursor == 6 * 4


def test_an_objective_that_tells_no_losses_is_refused(tmp_path):
    ctx = context()
    made = policy()
    state = made.setup(ctx)
    made.on_batch(state, user_batch(ctx), ctx)
    ctx.step = lambda: 1
    with pytest.raises(BadInput, match="reports none"):
        made.on_batch(state, user_batch(ctx), ctx)


def test_what_a_run_leaves(tmp_path):
    outcome, _ = run(tmp_path / "run")
    state = outcome.states["data.0"]
    folder = tmp_path / "data"
    folder.mkdir()
    made = policy()
    made.save(state, folder)
    lines = [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]
    assert [r["id"] for r in lines] == state.names
    assert (folder / "report.json").is_file()
    again = policy(initial=str(folder), frozen=True)
    train = examples()
    ctx = context(train=train)
    later = again.setup(ctx)
    assert torch.equal(later.scheduler.logits, state.scheduler.logits)
    observed(again, later, ctx, [0.0, 9.0, 9.0])
    assert torch.equal(later.scheduler.logits, state.scheduler.logits)  # frozen
    with pytest.raises(BadInput, match="holds weights of 20 rows"):
        policy(initial=str(folder)).setup(context())


# ---- neural


def neural(ctx=None, **options):
    ctx = ctx or context()
    ctx.roles = {"scheduler": tiny_llama(seed=3, num_hidden_layers=1)}
    made = policy(scheduler="neural", lr=2e-3, **options)
    return made, made.setup(ctx), ctx


def test_a_neural_scheduler_learns_and_is_carried_to_other_rows(tmp_path):
    """Frozen, it gives the same weight for the same text whatever the batch, and tells new rows apart."""

    def marked(count, seed):
        rows = examples(count, seed=seed)
        for i, row in enumerate(rows):
            if i % 2:  # a marker that goes with a high loss
                row["input_ids"] = [7, 7, 7, *row["input_ids"][3:]]
        return rows

    made, state, ctx = neural(context(train=marked(16, 0)))
    bad = torch.tensor([float(i % 2) for i in range(16)])
    start = state.scheduler.all_weights()
    assert float(start.mean()) == pytest.approx(1, abs=1e-4)
    for at in range(60):
        rows = [(at * 4 + j) % 16 for j in range(4)]
        ctx.step = lambda at=at: at
        batch = user_batch(ctx, rows)
        made.on_batch(state, batch, ctx)
        made.observe(state, batch["sample_ids"], {"sample_ce": 0.5 + 3 * bad[rows]})
    assert float(state.scheduler.all_weights()[bad == 1].max()) < float(state.scheduler.all_weights()[bad == 0].min())
    folder = tmp_path / "saved"
    folder.mkdir()
    made.save(state, folder)
    new = marked(20, 7)
    _, later, there = neural(context(train=new), initial=str(folder), frozen=True)
    found = later.scheduler.all_weights()
    harmful = torch.tensor([i % 2 for i in range(20)])
    from pegbox.parts.sampleweights import auroc

    assert auroc(found, 1 - harmful) >= 0.9
    alone = later.scheduler.weights(torch.tensor([3]), there.streams["train"].batch([3]))
    among = later.scheduler.weights(torch.tensor([2, 3, 8]), there.streams["train"].batch([2, 3, 8]))
    assert float(alone[0]) == pytest.approx(float(among[1]), rel=1e-4)
    other = context(train=new)
    other.roles = {"scheduler": tiny_llama(num_hidden_layers=2)}
    with pytest.raises(BadInput, match="another encoder"):
        policy(scheduler="neural", initial=str(folder), frozen=True).setup(other)


def test_batch_normaliser_needs_company():
    made, state, ctx = neural(normalise="batch")
    with pytest.raises(BadInput, match="alone in its batch"):
        made.on_batch(state, user_batch(ctx, [1]), ctx)
    out = made.on_batch(state, user_batch(ctx, [1, 2]), ctx)
    assert float(out["sample_weight"][:2].sum()) == pytest.approx(4, abs=1e-4)


# ---- what is refused


def test_options_that_can_not_be():
    for options, words in (
        ({"safe": ""}, "needs `safe`"),
        ({"benign_share": 0.5}, "always sum to"),
        ({"activation": "sigmoid", "benign_share": 1.5}, "less than or equal to 1"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"lr": 0.0}, "greater than 0"),
        ({"scheduler": "neural", "entropy": 1.0}, "one logit per row"),
        ({"frozen": True}, "name it under `initial`"),
    ):
        with pytest.raises(BadInput, match=words):
            policy(**options)


def test_sets_that_can_not_be(tmp_path):
    """Empty trusted set, ids that repeat or are unknown, one row under softmax, a file that is none."""
    made = policy()
    ctx = context()
    ctx.streams["safe"] = RowSource([], COLLATE)
    with pytest.raises(BadInput, match="holds no rows"):
        made.setup(ctx)
    twice = examples(4)
    twice[3]["sample_id"] = 0
    with pytest.raises(BadInput, match="an id of its own"):
        made.setup(context(train=twice))
    with pytest.raises(BadInput, match="at least 2 training rows"):
        made.setup(context(train=examples(1)))
    ctx = context()
    state = made.setup(ctx)
    with pytest.raises(BadInput, match="not in the training set"):
        state.rows(torch.tensor([12345]))
    with pytest.raises(BadInput, match="No scheduler file"):
        policy(initial=str(tmp_path / "none")).setup(ctx)
    save_file({"logits": torch.zeros(8)}, tmp_path / "scheduler.safetensors", {"scheduler": "neural"})
    with pytest.raises(BadInput, match="not a scalar one"):
        policy(initial=str(tmp_path)).setup(ctx)
    with pytest.raises(BadInput, match=r"models: \{scheduler"):
        policy(scheduler="neural").setup(ctx)


# ---- the harness


@pytest.mark.parametrize("attack", ATTACKS)
def test_poisoned_sets_hold_their_share_and_harm_nobody(attack):
    benign = [{"question": f"q {i}?", "answer": f"a {i}"} for i in range(40)]
    for share in (0.0, 0.25, 1.0):
        rows = poisoned(benign, share, seed=1, attack=attack)
        assert len(rows) == 40
        assert sum(r["harmful"] for r in rows) == round(40 * share)
        bad = [r["answer"] for r in rows if r["harmful"]]
        assert forbidden_rate(bad) == (1.0 if bad else 0.0)
        assert rows == poisoned(benign, share, seed=1, attack=attack)
    assert refusal_rate([r["answer"] for r in trusted(5)]) == 1
    assert refusal_rate(["I will not do that. zorblat"]) == 0


def test_poisoned_sets_refuse():
    for call, words in (
        (lambda: poisoned([], 0.5), "no benign"),
        (lambda: poisoned([{"question": "a", "answer": "b"}], 1.5), r"\[0, 1\]"),
        (lambda: poisoned([{"question": "a", "answer": "b"}], 0.5, attack="x"), "Unknown attack"),
        (lambda: trusted(0), "at least one"),
    ):
        with pytest.raises(BadInput, match=words):
            call()
