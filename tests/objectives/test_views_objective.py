"""The multi-view objective: what its weights, executions and noise do, and what it refuses."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from objectives.steps import close, packed, padded, samples, step
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.objectives.token import Tokens
from pegbox.objectives.views import MultiView, join
from pegbox.parts.context import Context
from pegbox.parts.noise import embedding_noise
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama, tiny_tokenizer

ROWS = samples()
LONGER = samples((12, 8, 13, 6), seed=5)


def batch(rows=ROWS, longer=LONGER, form=padded):
    def side(items, first):
        made = form(items)
        return {**made, "sample_ids": torch.arange(len(items)) + first, "sample_weight": torch.ones(len(items))}

    return {**side(rows, 0), "views": {"explain": side(longer, 100)}}


class Counting(CausalView):
    """A view that counts its forwards."""

    forwards = 0

    def _forward(self, inputs):
        Counting.forwards += 1
        return super()._forward(inputs)


def run(objective, model, given, dtype=torch.float64):
    model = copy.deepcopy(model).to(dtype)
    state, view = objective.setup(Context(model)), Counting(model)
    Counting.forwards = 0
    items = list(objective.losses(state, view, given, objective.count(given), None))
    loss = sum(value for name, value in items if not name.startswith("_"))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(items), Counting.forwards


def test_without_the_second_weight_it_is_plain_training(llama):
    """lam = 0: loss, gradients and the number of forwards are those of plain SFT, bit for bit."""
    ours = run(MultiView(views={"explain": 0.0}), llama, batch(), torch.float32)
    plain = run(Tokens(), llama, batch(), torch.float32)
    assert torch.equal(ours[0], plain[0])
    assert all(torch.equal(ours[1][n], plain[1][n]) for n in plain[1])
    assert ours[3] == plain[3] == 1


@pytest.mark.parametrize("lam", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("execution", ["sequential", "joined"])
def test_the_loss_is_the_weighted_mean_and_its_gradient_too(llama, lam, execution):
    """(L1 + lam L2) / (1 + lam) to 1e-7, and the gradient is linear in the two, in both executions."""
    given = batch()
    first, grads_1, *_ = run(Tokens(), llama, given)
    second, grads_2, *_ = run(Tokens(), llama, given["views"]["explain"])
    loss, grads, readings, forwards = run(MultiView(views={"explain": lam}, execution=execution), llama, given)
    assert float(loss) == pytest.approx(float(first + lam * second) / (1 + lam), abs=1e-7)
    wanted = {n: (grads_1[n] + lam * grads_2[n]) / (1 + lam) for n in grads_1}
    assert close(grads, wanted, 1e-7)
    assert forwards == {"sequential": 2, "joined": 1}[execution]
    assert float(readings["_explain/tokens"]) == pytest.approx(float(second), abs=1e-6)
    assert float(readings["_first/tokens"]) == pytest.approx(float(first), abs=1e-6)


@pytest.mark.parametrize("form", [padded, packed])
def test_both_executions_give_the_same_gradient(llama, form):
    """Sequential and joined agree to 1e-6 on padded and on packed rows."""
    given = batch(form=form)
    one, two = (run(MultiView(views={"explain": 0.7}, execution=e), llama, given) for e in ("sequential", "joined"))
    assert float(one[0]) == pytest.approx(float(two[0]), abs=1e-7)
    assert close(one[1], two[1], 1e-6)


def test_without_normalisation_weights_are_factors(llama):
    """The published notebook's form: L1 + lam L2, not divided."""
    given = batch()
    mean, plain = (run(MultiView(views={"explain": 2.0}, normalise=n), llama, given)[0] for n in ("weights", "none"))
    assert float(plain) == pytest.approx(3 * float(mean), abs=1e-7)


@pytest.mark.parametrize("execution", ["sequential", "joined"])
def test_micro_batches_add_up_per_view(llama, execution):
    """Each view is divided by its own tokens over the whole step, also where a micro-batch lacks a view."""
    objective = MultiView(views={"explain": 2.0}, execution=execution)
    whole = batch(longer=LONGER[:2])
    halves = [batch(ROWS[:2], LONGER[:2]), {**batch(ROWS[2:], LONGER[2:]), "views": {}}]
    model = llama.double()
    one, two = step(objective, model, [whole]), step(objective, model, halves)
    total = [sum(v for n, v in losses.items() if not n.startswith("_")) for losses, _ in (one, two)]
    assert float(total[0]) == pytest.approx(float(total[1]), abs=1e-9)
    assert close(one[1], two[1], 1e-8)


def test_a_micro_batch_without_any_counted_view_gives_zero(llama):
    objective = MultiView(weight=0.0)
    losses, _grads = step(objective, llama, [batch(), {**batch(), "views": {}}])
    assert float(losses["tokens"]) == 0
    assert "explain/tokens" in losses


def test_asft_and_terms_go_inside(llama):
    """Any per-token objective is weighed alike; a reference is asked per view."""
    inner = OBJECTIVE.validate({"kind": "asft", "mode": "asft", "lam": 0.2})
    given = batch()
    single = [step(inner, llama, [b]) for b in (given, given["views"]["explain"])]
    values = [float(s[0]["tokens"]) for s in single]
    for execution in ("sequential", "joined"):
        losses, _ = step(MultiView(inner=inner, views={"explain": 3.0}, execution=execution), llama, [given])
        total = sum(float(v) for n, v in losses.items() if not n.startswith("_"))
        assert total == pytest.approx((values[0] + 3 * values[1]) / 4, abs=1e-5)


# ---- noise


def test_noise_is_bounded_and_in_training_only():
    """|noise| <= alpha / sqrt(T D) elementwise in training mode, none in evaluation mode, nothing left behind."""
    model, alpha = tiny_llama(), 5.0
    ids, table = torch.randint(0, 256, (3, 11)), model.get_input_embeddings()
    weight, plain = table.weight.detach().clone(), table(ids).detach()
    bound = alpha / (11 * 32) ** 0.5
    model.train()
    with embedding_noise(model, alpha):
        one, two = (table(ids) - plain for _ in range(2))
    assert 0.9 * bound < float(one.detach().abs().max()) <= bound * 1.0001
    assert not torch.equal(one, two)
    assert torch.equal(table(ids), plain)
    model.eval()
    with embedding_noise(model, alpha):
        assert torch.equal(table(ids), plain)
    assert torch.equal(table.weight, weight)
    assert not table._forward_hooks
    assert not hasattr(table, "neftune_noise_alpha")


def test_noise_is_drawn_anew_in_each_forward(llama):
    """The two forwards of a step have independent noise."""
    caught = []
    llama.train()
    llama.model.layers[0].register_forward_pre_hook(lambda m, args: caught.append(args[0].detach().clone()))
    given = batch()
    given["views"]["explain"] = {k: v for k, v in given.items() if k != "views"}
    step(MultiView(neftune=5.0), llama, [given])
    clean = llama.get_input_embeddings()(given["input_ids"]).detach()
    assert not torch.equal(caught[0], caught[1])
    assert not torch.equal(caught[0], clean)
    assert len(caught) == 2


@pytest.mark.parametrize("quantized", [False, True])
def test_noise_reaches_an_adapter_over_a_quantized_base(llama, quantized):
    """It acts under PEFT, and where the base's weights are packed."""
    if quantized:
        from pegbox.prepare.base import PREPARE

        PREPARE.validate("nf4").apply(llama, tuple, Context(llama))
    model = get_peft_model(
        llama, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    given = batch()
    model.train()
    torch.manual_seed(0)
    noisy, _ = step(MultiView(neftune=5.0), model, [given])
    clean, _ = step(MultiView(), model, [given])
    assert float(noisy["tokens"]) != float(clean["tokens"])
    model.eval()
    assert float(step(MultiView(neftune=5.0), model, [given])[0]["tokens"]) == float(clean["tokens"])


def test_noise_asked_for_twice_is_refused(llama):
    llama.train()
    llama.get_input_embeddings().neftune_noise_alpha = 5.0
    with pytest.raises(BadInput, match="asked for twice"):
        step(MultiView(neftune=5.0), llama, [batch()])


# ---- bad input


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_a_weight_below_zero_or_not_a_number_is_refused(lam):
    """lam < 0 or NaN."""
    with pytest.raises(BadInput, match="views"):
        OBJECTIVE.validate({"kind": "multi_view", "views": {"explain": lam}})


def test_weights_that_are_all_zero_are_refused():
    """All weights 0."""
    with pytest.raises(BadInput, match="nothing is left"):
        OBJECTIVE.validate({"kind": "multi_view", "weight": 0.0, "views": {"explain": 0.0}})


@pytest.mark.parametrize(
    ("block", "word"),
    [
        ({"views": {"no name": 1.0}}, "no name for a view"),
        ({"inner": {"kind": "classification"}}, "no loss per token"),
        ({"inner": {"kind": "task_balanced"}}, "whole steps"),
        ({"execution": "joined", "inner": {"token": "sft", "normalize": "micro"}}, "whole step"),
    ],
)
def test_what_can_not_be_combined_is_refused(block, word):
    with pytest.raises(BadInput, match=word):
        OBJECTIVE.validate({"kind": "multi_view", **block})


def test_a_batch_without_views_is_refused(llama):
    with pytest.raises(BadInput, match="has no views"):
        MultiView().count({k: v for k, v in batch().items() if k != "views"})


def test_batches_of_other_keys_are_not_joined():
    one, two = batch(), {**batch(), "pixel_values": torch.zeros(1)}
    with pytest.raises(BadInput, match="only some hold"):
        join([one, two])
    with pytest.raises(BadInput, match="unknown"):
        join([two, two])


def test_a_tokenizer_without_an_end_is_refused(llama):
    """Tokenizer without EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="end-of-sequence"):
        MultiView().setup(Context(llama, tokenizer=tokenizer))


def test_views_that_nobody_makes_are_refused():
    """The rationale's view is asked for and no policy makes it: said before anything is loaded."""
    from pegbox.capabilities import check
    from pegbox.recipe import load_recipe

    recipe = load_recipe({"tuner": {"kind": "full"}, "objective": {"kind": "multi_view"}})
    with pytest.raises(Unsupported, match="no data policy makes"):
        check(recipe)
    check(load_recipe({"tuner": {"kind": "full"}, "objective": {"kind": "multi_view", "views": {"explain": 0.0}}}))
    packed_rows = [{"kind": "views"}, {"kind": "layout", "mode": "pack"}]
    recipe = load_recipe({"tuner": {"kind": "full"}, "objective": {"kind": "multi_view"}, "data": packed_rows})
    with pytest.raises(Unsupported, match="loses their views"):
        check(recipe)
    weighed = [{"kind": "views"}, {"kind": "bayesian_scheduler", "safe": "network"}]
    recipe = load_recipe({"tuner": {"kind": "full"}, "objective": {"kind": "multi_view"}, "data": weighed})
    with pytest.raises(Unsupported, match="not on views"):
        check(recipe)
    corrupted = [{"kind": "views"}, {"kind": "corruption", "form": "existing"}]
    check(load_recipe({"tuner": {"kind": "full"}, "objective": {"kind": "multi_view"}, "data": corrupted}))
