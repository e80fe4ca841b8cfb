"""`tokens` and its terms: equal to plain cross-entropy, blind to padding, packing and cutting; weights; penalties."""

import copy

import pytest
import torch
from torch.nn import functional as F

from objectives.steps import close, packed, padded, samples, step
from pegbox.errors import BadInput
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_sft_is_cross_entropy(dtype, tolerance):
    model, batch = tiny_llama().to(dtype), padded(samples())
    losses, grads = step(OBJECTIVE.validate({}), model, [batch])
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    plain = F.cross_entropy(logits.reshape(-1, 288), labels.reshape(-1), reduction="sum") / (labels != -100).sum()
    plain.backward()
    assert float(losses["tokens"]) == pytest.approx(plain.item(), abs=tolerance)
    assert close({n: p.grad for n, p in model.named_parameters()}, grads, tolerance)


def test_label_smoothing_is_torchs():
    model, batch = tiny_llama(), padded(samples())
    losses, _ = step(OBJECTIVE.validate({"token": {"kind": "sft", "label_smoothing": 0.2}}), model, [batch])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    plain = F.cross_entropy(logits.reshape(-1, 288), batch["labels"][:, 1:].reshape(-1), label_smoothing=0.2)
    assert float(losses["tokens"]) == pytest.approx(plain.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dft", "focal"])
def test_padding_packing_and_cutting_change_nothing(kind):
    objective, model, items = OBJECTIVE.validate({"token": kind}), tiny_llama(), samples()
    whole = step(objective, model, [padded(items)])
    others = {
        "more padding": [padded(items, extra=6)],
        "left padding": [padded(items, "left", extra=3)],
        "cut": [padded(items[:1]), padded(items[1:])],
        "cut again": [padded([i]) for i in items],
        "packed": [packed(items)],
        "packed and cut": [packed(items[:3]), packed(items[3:])],
    }
    for name, batches in others.items():
        got = step(objective, model, batches)
        assert float(got[0]["tokens"]) == pytest.approx(float(whole[0]["tokens"]), abs=1e-6), name
        assert close(whole[1], got[1]), name
        for reading in {"_ce", "_p", "_rare"} & set(whole[0]):
            assert float(got[0][reading]) == pytest.approx(float(whole[0][reading]), abs=1e-5), (name, reading)


def test_micro_gives_each_micro_batch_the_same_weight():
    objective, model, items = OBJECTIVE.validate({"normalize": "micro"}), tiny_llama(), samples()
    losses, _ = step(objective, model, [padded(items[:1]), padded(items[1:])])
    each = [float(step(objective, model, [padded(part)])[0]["tokens"]) for part in (items[:1], items[1:])]
    assert float(losses["tokens"]) == pytest.approx(sum(each) / 2, abs=1e-6)


@pytest.mark.parametrize("form", [padded, packed])
def test_weights_are_factors_on_a_samples_loss(form):
    objective, model, items = OBJECTIVE.validate({}), tiny_llama(), samples()
    batch = form(items)
    plain, _ = step(objective, model, [batch])
    weights = torch.tensor([2.0, 0.0, 1.0, 0.5])
    weighted, _ = step(objective, model, [{**batch, "sample_weight": weights}])
    counts = torch.tensor([len(i) - p for i, p in items], dtype=torch.float)
    expected = (plain["_sample_ce"] * counts * weights).sum() / counts.sum()
    assert float(weighted["tokens"]) == pytest.approx(float(expected), abs=1e-6)
    assert torch.equal(plain["_sample_ce"], weighted["_sample_ce"])


def test_a_batch_without_labels_that_count_is_zero_and_warns_and_reaches_every_weight():
    model, batch = tiny_llama(), padded(samples())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.warns(UserWarning, match="all are -100"):
        losses, grads = step(OBJECTIVE.validate({"token": "dft"}), model, [batch])
    assert float(losses["tokens"]) == 0
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert all(not g.any() for g in grads.values())
    with pytest.raises(BadInput, match="no `labels`"):
        OBJECTIVE.validate({}).count({"input_ids": batch["input_ids"]})


def test_an_empty_micro_batch_beside_a_full_one_does_not_warn(recwarn):
    model, full = tiny_llama(), padded(samples())
    empty = {**full, "labels": torch.full_like(full["labels"], -100)}
    losses, grads = step(OBJECTIVE.validate({}), model, [empty, full])
    assert not [w for w in recwarn if "-100" in str(w.message)]
    alone = step(OBJECTIVE.validate({}), model, [full])
    assert losses["tokens"] == alone[0]["tokens"]
    assert close(alone[1], grads)


def test_the_value_is_what_the_losses_are_the_gradient_of():
    objective, model, batch = OBJECTIVE.validate({"token": "focal"}), tiny_llama(), padded(samples())
    totals = objective.count(batch)
    with torch.no_grad():
        value = objective.value(None, CausalView(model), batch, totals)
    assert float(value) == pytest.approx(float(step(objective, model, [batch])[0]["tokens"]), abs=1e-6)


# ---- weight terms ----


def nudged(objective, model):
    state = objective.setup(Context(model))
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
        model.lm_head.weight[2, :2] -= 0.25
    return state


@pytest.mark.parametrize("cuts", [1, 2, 4])
def test_l1_gradient_is_lambda_over_n_times_sign_whatever_the_accumulation(cuts):
    model, items = tiny_llama(), samples()
    model.model.embed_tokens.requires_grad_(False)
    objective = OBJECTIVE.validate({"terms": [{"kind": "l1_to_start", "weight": 3.0}]})
    batches = [padded(items[i::cuts]) for i in range(cuts)]
    state = nudged(objective, model)
    plain = step(OBJECTIVE.validate({}), model, batches)
    losses, grads = step(objective, model, batches, state)
    n = sum(p.numel() for p in model.parameters())  # frozen ones too
    assert float(losses["l1_to_start"]) == pytest.approx(3.0 / n * (0.5 + 2 * 0.25), rel=1e-5)
    pull = {name: grads[name] - plain[1][name] for name in grads}
    assert pull["model.norm.weight"][3].item() == pytest.approx(3.0 / n, rel=1e-2)
    assert pull["lm_head.weight"][2, :2].tolist() == pytest.approx([-3.0 / n] * 2, rel=1e-2)
    pull["model.norm.weight"][3] = 0
    pull["lm_head.weight"][2, :2] = 0
    assert all(p.abs().max() < 1e-7 for p in pull.values())


def test_l1_over_trained_weights_and_exclusions():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    term = {"kind": "l1_to_start", "weight": 1.0, "over": "trained", "exclude": ["*lm_head*"]}
    objective = OBJECTIVE.validate({"terms": [term]})
    losses, _ = step(objective, model, [padded(samples())], nudged(objective, model))
    n = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lm_head" not in name)
    assert float(losses["l1_to_start"]) == pytest.approx(0.5 / n, rel=1e-5)
    with pytest.raises(BadInput, match="covers no trained weight"):
        OBJECTIVE.validate({"terms": [{**term, "exclude": ["*"]}]}).setup(Context(model))


def test_l2_to_start_and_its_state_survive_a_reload():
    model = tiny_llama()
    objective = OBJECTIVE.validate({"terms": [{"kind": "l2_to_start", "weight": 2.0}]})
    state = nudged(objective, model)
    losses, _ = step(objective, model, [padded(samples())], state)
    assert float(losses["l2_to_start"]) == pytest.approx(2.0 * (0.25 + 2 * 0.0625), rel=1e-5)
    fresh = objective.setup(Context(copy.deepcopy(model)))  # begun from the moved weights
    fresh.load_state_dict(state.state_dict())
    again, _ = step(objective, model, [padded(samples())], fresh)
    assert again["l2_to_start"] == losses["l2_to_start"]


def test_a_growing_l2_pull_keeps_weights_nearer():
    """The soft form of freezing: the solution of a quadratic moves towards the start as the factor grows."""
    from pegbox.parts.penalties import l2_distance

    distances = []
    for factor in (0.0, 0.1, 1.0, 10.0, 1000.0):
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure(w=w, factor=factor, optimizer=optimizer):
            optimizer.zero_grad()
            target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
            loss = (w - target).square().sum() + factor * l2_distance([w], [torch.zeros(3, dtype=torch.float64)])
            loss.backward()
            return loss

        optimizer.step(closure)
        distances.append(w.detach().norm().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01 < distances[0]


def test_options_are_validated():
    for block, words in (
        ({"terms": [{"kind": "kl_to_reference", "weight": -1}]}, "greater than or equal to 0"),
        ({"terms": [{"kind": "kl_to_reference", "weight": float("nan")}]}, "finite"),
        ({"terms": [{"kind": "kl_to_reference", "direction": "back"}]}, "'forward', 'reverse' or 'k3'"),
        ({"terms": [{"kind": "kl_to_reference", "cache": True}]}, "only direction 'k3'"),
        ({"token": {"kind": "dft", "label_smoothing": 0.1}}, "Unknown key 'objective.token.label_smoothing'"),
        ({"token": "dtf"}, "Did you mean 'dft'"),
        ({"normalise": "tokens"}, "Did you mean 'normalize'"),
    ):
        with pytest.raises(BadInput, match=words):
            OBJECTIVE.validate(block)


def test_blocks_round_trip():
    block = {"token": {"kind": "focal", "gamma": 1.5}, "terms": [{"kind": "kl_to_reference", "of": "teacher"}]}
    objective = OBJECTIVE.validate(block)
    assert OBJECTIVE.validate(objective.model_dump(mode="json")) == objective
