"""Token corruption: where it acts, how often, what it depends on, and what it refuses."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.steps import packed, padded, samples, step
from pegbox.data.base import DATA
from pegbox.data.policies import rates
from pegbox.data.policies.corruption import answer_tokens, keyed_uniform, ordinals
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama, tiny_tokenizer

MASK = 260


@pytest.fixture(scope="module")
def words():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<mask>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_llama().eval()


def context(model, words, at=0, seed=0, total=100):
    return Context(model, seed=seed, total_steps=total, step=lambda: at, tokenizer=words)


def policy(**options):
    return DATA.validate({"kind": "corruption", "schedule": "constant", "rate": 0.5, **options})


def corrupted(batch, ctx, **options):
    p = policy(**options)
    return p.on_batch(p.setup(ctx), batch, ctx)


# ---- where ----


def test_rate_zero_gives_the_batch_itself(model, words):
    batch = padded(samples())
    assert corrupted(batch, context(model, words), rate=0.0) is batch
    assert corrupted(batch, context(model, words), rate=0.4, schedule="ratio") is batch  # r(0) = 0


def test_nearly_rate_one_masks_every_answer_input_and_no_other(model, words):
    batch = padded(samples(), extra=3)
    out = corrupted(batch, context(model, words), rate=1 - 1e-12)
    answer = batch["labels"] != -100
    assert (out["input_ids"][answer] == MASK).all()
    assert torch.equal(out["input_ids"][~answer], batch["input_ids"][~answer])
    assert torch.equal(out["corrupted_ids"], answer)


@pytest.mark.parametrize("form", ["mask", "existing", "random", "drop", "self_sampled"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_only_answer_inputs_change(form, data, model, words):
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    seed, prompt = data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 4))
    side = data.draw(st.sampled_from(["right", "left"]))
    batch = padded(samples(lengths, seed, prompt), side, extra=data.draw(st.integers(0, 3)))
    before = {k: v.clone() for k, v in batch.items()}
    out = corrupted(batch, context(model, words, seed=seed), form=form, rate=0.7)
    assert all(torch.equal(batch[k], before[k]) for k in before)  # not in place
    touched = (out["input_ids"] != batch["input_ids"]) | out["corrupted_ids"]
    answer = batch["labels"] != -100
    answer &= batch["attention_mask"].cumsum(-1) > 1  # a row's first token is no answer to anything
    assert not (touched & ~answer).any()
    for key in set(batch) - {"input_ids", "attention_mask"}:
        assert torch.equal(out[key], batch[key])
    if form == "drop":
        assert torch.equal(out["attention_mask"], batch["attention_mask"] * ~out["corrupted_ids"])
    else:
        assert torch.equal(out["attention_mask"], batch["attention_mask"])


def test_packed_rows_are_corrupted_like_padded_ones(model, words):
    items = samples()
    one = corrupted(padded(items, extra=5), context(model, words))
    two = corrupted(packed(items), context(model, words))
    rows = [one["input_ids"][i, : len(tokens)] for i, (tokens, _) in enumerate(items)]
    assert torch.equal(torch.cat(rows), two["input_ids"][0])


def test_ordinals_restart():
    answer = torch.tensor([[0, 1, 1, 0, 1, 0, 1]]).bool()
    assert ordinals(answer)[answer].tolist() == [0, 1, 2, 3]
    assert ordinals(answer, torch.tensor([[0, 0, 0, 1, 1, 1, 2]]))[answer].tolist() == [0, 1, 0, 0]


# ---- how often, and on what it depends ----


def test_rate_independence_and_freshness(model, words):
    n = 40_000
    batch = {"input_ids": torch.arange(n).remainder(200)[None], "labels": torch.full((1, n), 5)}
    batch["sample_ids"] = torch.tensor([17])
    hits = [corrupted(batch, context(model, words, at=s), rate=0.3)["corrupted_ids"][0, 1:].double() for s in (3, 4)]
    for hit in hits:
        assert abs(hit.mean() - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
        lag = torch.corrcoef(torch.stack([hit[1:], hit[:-1]]))[0, 1]
        assert abs(lag) < 4 / n**0.5
    assert abs(torch.corrcoef(torch.stack(hits))[0, 1]) < 4 / n**0.5  # another step, another mask


def test_keyed_numbers_are_uniform_in_every_direction():
    u = keyed_uniform(123, torch.arange(200)[:, None], torch.arange(200)[None])
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 800) ** 2 / 800).sum() < 100  # chi-square, 49 degrees of freedom
    for other in (u.roll(1, 0), u.roll(1, 1), keyed_uniform(124, torch.arange(200)[:, None], torch.arange(200)[None])):
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 4 / 200
    assert len(u.unique()) == u.numel()


def test_a_mask_depends_on_seed_step_and_sample_alone(model, words):
    items = samples()
    whole = corrupted(padded(items), context(model, words, at=5))["corrupted_ids"]
    for order in ([2, 0], [3], [1, 3, 2, 0]):
        batch = padded([items[i] for i in order], "left", extra=4, ids=torch.tensor(order))
        part = corrupted(batch, context(model, words, at=5))["corrupted_ids"]
        for row, i in enumerate(order):
            width = len(items[i][0])
            assert torch.equal(part[row, -width:], whole[i, :width])
    again = corrupted(padded(items), context(model, words, at=5))["corrupted_ids"]
    assert torch.equal(again, whole)
    assert not torch.equal(corrupted(padded(items), context(model, words, at=6))["corrupted_ids"], whole)
    assert not torch.equal(corrupted(padded(items), context(model, words, at=5, seed=1))["corrupted_ids"], whole)


def test_without_sample_ids_the_tokens_are_the_key(model, words):
    items = samples()
    batch = padded(items)
    del batch["sample_ids"]
    whole = corrupted(batch, context(model, words))["corrupted_ids"]
    alone = padded(items[2:3], "left", extra=7)
    del alone["sample_ids"]
    assert torch.equal(corrupted(alone, context(model, words))["corrupted_ids"][0, -5:], whole[2, :5])
    assert not torch.equal(whole[0, :5], whole[2, :5]) or not torch.equal(whole[1, :5], whole[2, :5])


def test_no_global_randomness_is_used(model, words):
    state = torch.get_rng_state()
    for form in ("mask", "random", "self_sampled"):
        extra = {"temperature": 1.0} if form == "self_sampled" else {}
        corrupted(padded(samples()), context(model, words), form=form, **extra)
    assert torch.equal(state, torch.get_rng_state())


# ---- forms ----


def test_random_ids_come_from_the_whole_vocabulary(model, words):
    batch = {"input_ids": torch.full((1, 30_000), 5), "labels": torch.full((1, 30_000), 5)}
    batch["sample_ids"] = torch.tensor([0])
    out = corrupted(batch, context(model, words), form="random", rate=0.9)
    drawn = out["input_ids"][out["corrupted_ids"]]
    counts = torch.bincount(drawn, minlength=261).double()
    expected = drawn.numel() / 261
    assert ((counts - expected) ** 2 / expected).sum() < 380  # chi-square, 260 degrees of freedom
    mixed = corrupted(batch, context(model, words), form="random", rate=0.9, replace_rate=0.25)
    share = (mixed["input_ids"][mixed["corrupted_ids"]] == MASK).double().mean()
    assert abs(share - 0.75) < 0.02


def test_existing_takes_unk_or_what_is_named(model, words):
    batch = padded(samples())
    ctx = context(model, words)
    assert (corrupted(batch, ctx, form="existing")["input_ids"] == words.unk_token_id).any()
    out = corrupted(batch, ctx, form="existing", token=3)
    assert (out["input_ids"][out["corrupted_ids"]] == 3).all()
    named = corrupted(batch, ctx, token="<pad>")
    assert (named["input_ids"][named["corrupted_ids"]] == words.pad_token_id).all()


def test_dropped_positions_get_no_attention(words):
    model = tiny_llama(attn_implementation="eager").eval()
    model.set_attn_implementation("eager")
    batch = padded(samples())
    out = corrupted(batch, context(model, words), form="drop")
    hit = out["corrupted_ids"]
    attentions = model(**CausalView(model).inputs(out), output_attentions=True).attentions
    for weights in attentions:  # (B, H, T, T)
        seen = weights.sum(1).sum(1)  # what each position receives in all
        own = torch.diagonal(weights, dim1=-2, dim2=-1).sum(1)
        others = torch.where(hit, seen - own, 0)
        assert others.abs().max() == 0
    with pytest.raises(Unsupported, match="packed rows"):
        corrupted(packed(samples()), context(model, words), form="drop")


def test_self_sampled_tokens_are_the_models_own(model, words):
    batch = padded(samples())
    out = corrupted(batch, context(model, words), form="self_sampled")
    with torch.no_grad():
        said = CausalView(model).logits(batch).argmax(-1)
    hit = out["corrupted_ids"]
    expected = torch.where(hit[:, 1:], said[:, :-1], batch["input_ids"][:, 1:])
    assert torch.equal(out["input_ids"][:, 1:], expected)
    warm = [corrupted(batch, context(model, words), form="self_sampled", temperature=1.0) for _ in range(2)]
    assert torch.equal(warm[0]["input_ids"], warm[1]["input_ids"])
    assert not torch.equal(warm[0]["input_ids"], out["input_ids"])


def test_self_sampling_follows_the_models_distribution(words):
    model = tiny_llama().eval()
    with torch.no_grad():  # logits that don't depend on the context: a bias through one channel of the head
        for p in model.model.layers.parameters():
            p.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[[4, 9], 0] = torch.tensor([30.0, 29.0])
    batch = {"input_ids": torch.full((40, 200), 5), "labels": torch.full((40, 200), 5), "sample_ids": torch.arange(40)}
    out = corrupted(batch, context(model, words), form="self_sampled", temperature=1.0, rate=0.9)
    drawn = out["input_ids"][out["corrupted_ids"]]
    assert set(drawn.tolist()) == {4, 9}
    expected = torch.tensor(1.0).sigmoid()
    assert abs((drawn == 4).double().mean() - expected) < 4 * (0.25 / drawn.numel()) ** 0.5


def test_protected_tokens_stay(model, words):
    tokens = torch.tensor([1, 2, 65, 257, 35, 35, 66, 67, 257])
    batch = padded([(tokens, 2), (tokens, 2)])
    ctx = context(model, words)
    high = {"rate": 1 - 1e-12}
    assert (corrupted(batch, ctx, protect=["eos"], **high)["corrupted_ids"][0].tolist()) == [
        False, False, True, False, True, True, True, True, False,
    ]  # fmt: skip
    letter = words.convert_ids_to_tokens(65)
    assert corrupted(batch, ctx, protect=["special", letter], **high)["corrupted_ids"].sum() == 2 * 4
    marker = words.decode([35, 35])
    out = corrupted(batch, ctx, protect_from=marker, **high)
    assert out["corrupted_ids"][1].tolist() == [False, False, True, True, *[False] * 5]
    rows = corrupted(packed([(tokens, 2), (tokens, 2)]), ctx, protect_from=marker, **high)
    assert rows["corrupted_ids"][0].tolist() == 2 * [False, False, True, True, *[False] * 5]


# ---- what it means for a model ----


def test_positions_before_the_first_mask_see_nothing_of_it(model, words):
    batch = padded(samples())
    out = corrupted(batch, context(model, words))
    with torch.no_grad():
        clean, masked = (CausalView(model).logits(b) for b in (batch, out))
    for row, hit in enumerate(out["corrupted_ids"]):
        first = int(hit.nonzero()[0])
        assert torch.equal(clean[row, :first], masked[row, :first])
        assert not torch.equal(clean[row, first:], masked[row, first:])


def test_the_reference_sees_the_same_inputs(model, words):
    seen = []
    objective = OBJECTIVE.validate({"kind": "asft", "lam": 0.1})
    trained = tiny_llama()
    state = objective.setup(Context(trained))
    for m in (trained, state.terms[0].model):
        m.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    out = corrupted(padded(samples()), context(model, words))
    step(objective, trained, [out], state)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] == MASK).any()


def test_all_labels_count_even_those_of_hidden_inputs(model, words):
    batch = padded(samples())
    objective = OBJECTIVE.validate({})
    for form in ("mask", "drop"):
        out = corrupted(batch, context(model, words), form=form, rate=0.9)
        assert objective.count(out)["tokens"] == objective.count(batch)["tokens"]
        assert torch.equal(CausalView(model).targets(out)[1], CausalView(model).targets(batch)[1])


# ---- schedules ----


def test_ratio_starts_at_zero_rises_and_stays():
    ours = [rates.ratio_rate(0.4, s, 200, 2 / 3) for s in range(200)]
    assert ours[0] == 0
    assert ours == sorted(ours)
    assert ours[134] < 0.4 == ours[135] == ours[199]


def test_warmups_are_steps_or_shares():
    by_steps, by_share = rates.Steps(warmup=30), rates.Steps(warmup=0.3)
    assert [by_steps.rate(0.2, s, 100, 0) for s in range(100)] == [by_share.rate(0.2, s, 100, 0) for s in range(100)]
    assert rates.Steps(warmup=0).rate(0.2, 0, 100, 0) == 0.2
    late = rates.Late(warmup=0.3, after=0.1)
    assert late.rate(0.2, 8, 100, 0) == 0.0
    assert late.rate(0.2, 60, 100, 0) == 0.2


def test_uniform_rates():
    drawn = [rates.Uniform().rate(0.4, s, 0, 7) for s in range(2000)]
    assert min(drawn) >= 0
    assert max(drawn) < 0.4
    assert abs(sum(drawn) / 2000 - 0.2) < 4 * 0.4 / (12 * 2000) ** 0.5
    assert drawn == [rates.Uniform().rate(0.4, s, 0, 7) for s in range(2000)]


def test_a_ramp_longer_than_training_warns(model, words):
    with pytest.warns(UserWarning, match=r"never reaches 0\.2"):
        policy(rate=0.2, schedule={"kind": "steps", "warmup": 200}).setup(context(model, words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(rate=0.2, schedule={"kind": "steps", "warmup": 60}).setup(context(model, words))


# ---- bad input ----


def test_bad_options():
    for block, expected in (
        ({"rate": 1.0}, "less than 1"),
        ({"rate": -0.1}, "greater than or equal to 0"),
        ({"schedule": {"kind": "steps", "warmup": -3}}, "greater than or equal to 0"),
        ({"schedule": {"kind": "decreasing"}, "rate": 0.6}, "above 0.5"),
        ({"schedule": "ratoi"}, "Did you mean 'ratio'"),
        ({"form": "noise"}, "'mask', 'existing', 'random', 'drop' or 'self_sampled'"),
        ({"replace_rate": 0.5}, "belongs to form 'random'"),
        ({"temperature": 0.5}, "belongs to form 'self_sampled'"),
        ({"form": "self_sampled", "token": 3}, "no use with form 'self_sampled'"),
    ):
        with pytest.raises(BadInput, match=expected):
            policy(**block)


def test_bad_tokens(model, words):
    with pytest.raises(BadInput, match=r"no token '<mask>'.*add_token"):
        policy().setup(context(model, tiny_tokenizer()))
    with pytest.raises(BadInput, match="id 260, but the model has 260 embeddings"):
        policy().setup(context(tiny_llama(vocab_size=260), words))
    with pytest.raises(BadInput, match="neither 'eos', 'special' nor a token"):
        policy(protect=["<nope>"]).setup(context(model, words))


def test_bad_data(model, words):
    ctx = context(model, words)
    good = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert policy().prepare([good], ctx) == [good]
    with pytest.raises(BadInput, match="Example 1 has no labels"):
        policy().prepare([good, {"input_ids": [1]}], ctx)
    with pytest.raises(BadInput, match="all labels are -100"):
        policy().prepare([{"input_ids": [1], "labels": [-100]}], ctx)
    with pytest.raises(BadInput, match="Example 0 has the replacing token 3 among its answer's labels"):
        policy(form="existing", token=3).prepare([good], ctx)
    with pytest.raises(BadInput, match="no labels"):
        corrupted({"input_ids": torch.ones(1, 3).long(), "sequence_ids": torch.zeros(1, 3).long()}, ctx)


def test_it_is_for_training_only():
    assert DATA["corruption"].training_only
    assert not DATA["corruption"].changes_labels


def test_answers_are_the_labelled_tokens_that_something_predicts():
    labels = torch.tensor([[4, 5, -100, 6]])
    assert answer_tokens({"labels": labels}).tolist() == [[False, True, False, True]]
