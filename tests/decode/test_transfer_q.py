"""Value-guided decoding: exact on tables, its limits in alpha and k, rollouts that leave the reference alone."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from decode.casts import answers, cast, prompts, quiet, tokenizer
from pegbox.decode.base import DECODE, DecodeContext
from pegbox.decode.rewards import ClassifierReward, IdReward, Reward, TextReward
from pegbox.decode.values import divergence, estimate, policy, standardised
from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.testing import tiny_llama

ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0)


@pytest.fixture(scope="module")
def models():
    found = cast()
    return {"reference": found["anchor"], "baseline": found["reference"]}


def mean_of(seed=0, offset=0.0, scale=1.0):
    """The mean over the answer of a number per token id: a reward that needs the whole text."""
    table = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    return IdReward(lambda ps, rows: [scale * float(table[row].mean()) + offset for row in rows])


def guided(models, reward=None, tokenizer=None, other=None, **block):
    block = {"kind": "transfer_q", "k": 5, "horizon": 4, "alpha": 0.1, **block}
    options = {"reward": reward or mean_of(), "baseline_reward": other}
    return DECODE.validate(block).bind(DecodeContext(models["reference"], tokenizer, models, options=options))


# ---- tables ---------------------------------------------------------------------------------------------------------

V, HORIZON = 5, 3


class TableModel(nn.Module):
    """A language model over 5 tokens and 3 steps whose conditional probabilities are a table, in float64."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = {
            prefix: torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(-1)
            for n in range(HORIZON)
            for prefix in itertools.product(range(V), repeat=n)
        }
        self.config = type("Config", (), {"is_encoder_decoder": False, "max_position_embeddings": 64})()
        self.head = nn.Linear(1, V)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        rows = [self.table[tuple(row[1:])] for row in input_ids.tolist()]  # the first token is the prompt
        return type("Out", (), {"logits": torch.stack(rows)[:, None]})()

    def sequences(self):
        """{sequence: log-probability}."""
        return {
            s: sum(float(self.table[s[:i]][s[i]]) for i in range(HORIZON))
            for s in itertools.product(range(V), repeat=HORIZON)
        }


class Tables:
    """A table model, a reward per sequence, and exact values under the tilted distribution."""

    def __init__(self, seed, beta=0.5):
        self.model, self.beta = TableModel(seed), beta
        generator = torch.Generator().manual_seed(seed + 1)
        self.reward, self.other = (
            {s: float(torch.randn((), generator=generator, dtype=torch.float64)) for s in self.model.sequences()}
            for _ in range(2)
        )

    def tilted(self, reward):
        weights = {s: math.exp(lp + reward[s] / self.beta) for s, lp in self.model.sequences().items()}
        total = sum(weights.values())
        return {s: w / total for s, w in weights.items()}

    def q(self, prefix, rho):
        found = []
        for z in range(V):
            inside = [s for s in rho if s[: len(prefix) + 1] == (*prefix, z)]
            mass = sum(rho[s] for s in inside)
            found.append(sum(rho[s] * self.reward[s] for s in inside) / mass)
        return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_exact_values_give_the_closed_form(alpha):
    """With exact values on tables the class draws from the closed form, to 1e-10."""
    tables = Tables(3)
    rho = tables.tilted(tables.reward)

    def source(asked, said, candidates):
        assert asked == [[0]] * len(said)
        return torch.stack([tables.q(tuple(s), rho)[c] for s, c in zip(said, candidates)])

    block = {"kind": "transfer_q", "value": "custom", "source": "tables:exact", "k": V, "alpha": alpha}
    decoding = DECODE.validate(block).bind(DecodeContext(tables.model, options={"source": source}))
    for prefix in [(), (2,), (4, 1)]:
        ids = torch.zeros(1, 1, dtype=torch.long)
        session = decoding.begin(ids, torch.ones_like(ids), cached=False)
        got = session.scores(torch.tensor([prefix], dtype=torch.long)).softmax(-1)[0]
        wanted = (tables.model.table[prefix].exp() * (tables.q(prefix, rho) / alpha).exp()).double()
        assert (got - wanted / wanted.sum()).abs().max() <= 1e-10


def test_indirect_values_converge_to_the_exact_ones():
    """Self-normalised: within 3 standard errors at n = 4000; unnormalised: biased by far more."""
    tables = Tables(7)
    rho_target, rho_baseline = tables.tilted(tables.reward), tables.tilted(tables.other)
    prefix, z, n = (1,), 2, 4000
    inside = [s for s in rho_baseline if s[:2] == (*prefix, z)]
    mass = torch.tensor([rho_baseline[s] for s in inside], dtype=torch.float64)
    drawn = torch.multinomial(mass, n, replacement=True, generator=torch.Generator().manual_seed(0))
    r, other = (torch.tensor([t[s] for s in inside], dtype=torch.float64)[drawn] for t in (tables.reward, tables.other))
    exact = float(tables.q(prefix, rho_target)[z])
    got = float(estimate(r, other, tables.beta, "self"))
    weights = ((r - other) / tables.beta).exp()
    error = float(((weights / weights.mean()) * (r - got)).std() / math.sqrt(n))
    assert abs(got - exact) <= 3 * error
    biased = float(estimate(r, other, tables.beta, "none"))
    spread = float((weights * r).std() / math.sqrt(n))
    assert abs(biased - exact) > 3 * spread


def test_indirect_with_the_same_reward_is_direct():
    rewards = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for how in ("self", "none"):
        torch.testing.assert_close(estimate(rewards, rewards, 0.7, how), estimate(rewards), atol=1e-14, rtol=0)


@given(seed=st.integers(0, 10_000), shift=st.floats(-5, 5), factor=st.floats(0.1, 10))
def test_constants_and_scales(seed, shift, factor):
    """A constant on the reward moves no choice, direct or self-normalised; nor do reward and alpha scaled together.

    Unnormalised indirect values are no such thing: there a constant acts through the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    r, other = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    log_probs = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)

    def chosen(values, alpha=0.5):
        return policy(log_probs, values, alpha).log_softmax(-1)

    torch.testing.assert_close(chosen(estimate(r + shift)), chosen(estimate(r)), atol=1e-10, rtol=0)
    torch.testing.assert_close(
        chosen(estimate(r + shift, other, 0.7)), chosen(estimate(r, other, 0.7)), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(chosen(estimate(factor * r), 0.5 * factor), chosen(estimate(r)), atol=1e-10, rtol=0)


def test_a_constant_moves_unnormalised_values():
    r = torch.tensor([[[1.0], [2.0]]])
    before, after = (estimate(r + c, r * 0.5, 1.0, "none") for c in (0.0, 1.0))
    assert not torch.allclose((after - before)[0, 0], (after - before)[0, 1])


@given(seed=st.integers(0, 10_000))
def test_the_divergence_is_bounded_and_falls_with_alpha(seed):
    """KL <= (max Q - min Q) / alpha; KL and E[Q] fall as alpha grows."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(4, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    values = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    width = values.max(-1).values - values.min(-1).values
    kls, expected = [], []
    for alpha in ALPHAS:
        scores = policy(log_probs, values, alpha)
        kls.append(divergence(scores, log_probs))
        expected.append((scores.softmax(-1) * values).sum(-1))
        assert (kls[-1] <= width / alpha + 1e-12).all()
    for list_ in (kls, expected):
        assert all((a >= b - 1e-12).all() for a, b in itertools.pairwise(list_))


def test_standardised_values():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    got = standardised(values)
    assert got[1].tolist() == [0.0, 0.0, 0.0]
    assert float(got[0].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(got[0].std(correction=0)) == pytest.approx(1.0)


# ---- on models ------------------------------------------------------------------------------------------------------


def test_a_large_alpha_is_the_reference_over_its_candidates(models):
    """Greedy and sampled: token for token the reference's, restricted to its k likeliest tokens."""
    ids, mask, _ = prompts()
    decoding = guided(models, alpha=1e9)
    assert torch.equal(answers(decoding, ids, mask, count=5), answers(models["reference"], ids, mask, count=5))
    runs = []
    for model, options in ((decoding, {"top_k": 0}), (models["reference"], {"top_k": 5})):
        torch.manual_seed(3)
        runs.append(answers(model, ids, mask, count=5, do_sample=True, **options))
    assert torch.equal(*runs)


def test_a_small_alpha_takes_the_best_candidate(models):
    ids, mask, _ = prompts()
    decoding = guided(models, alpha=1e-6)
    session = decoding.begin(ids, mask)
    scores = session.scores(ids[:, :0])
    candidates = models["reference"](
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
    ).logits[:, -1].topk(5, -1).indices  # fmt: skip
    values = session.values(ids[:, :0], candidates, [True] * 3)
    best = candidates.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(scores.argmax(-1), best)


def test_one_candidate_is_the_reference_and_rolls_nothing(models):
    ids, mask, _ = prompts()
    decoding = guided(models, k=1)
    assert torch.equal(answers(decoding, ids, mask, count=5), answers(models["reference"], ids, mask, count=5))
    found = decoding.summary()
    assert found["rewards"] == 0
    assert found["calls"]["baseline"] == 0


def test_values_are_the_rewards_of_greedy_rollouts(models):
    """By hand: each candidate appended, the baseline's own generate, the reward of what came."""
    ids, mask, rows = prompts((6,))
    reward = mean_of(1)
    decoding = guided(models, reward=reward)
    session = decoding.begin(ids, mask)
    candidates = torch.tensor([[5, 9, 77, 100, 31]])
    got = session.values(torch.tensor([[8]]), candidates, [True])[0]
    for value, z in zip(got, candidates[0].tolist()):
        begun = torch.tensor([[*rows[0], 8, z]])
        tail = answers(models["baseline"], begun, count=4)[0].tolist()
        assert float(value) == pytest.approx(float(reward([rows[0]], [[8, z, *tail]])), abs=1e-5)


@pytest.mark.parametrize(
    ("block", "rolls"),
    [
        ({"value": "partial"}, 0),
        ({"value": "rollout_ref"}, 1),
        ({"value": "transfer"}, 1),
        (
            {"value": "transfer_indirect", "beta": 2.0, "baseline_reward": "other", "estimator": "none", "rollouts": 1},
            1,
        ),
        ({"value": "transfer_indirect", "beta": 2.0, "baseline_reward": "other", "rollouts": 3}, 3),
        ({"value": "transfer", "horizon": 0}, 0),
    ],
)
def test_a_batch_equals_its_rows_and_tokens_are_counted(models, block, rolls):
    """Baseline tokens are at most k n (H + 1) per row and step, and the prompt once."""
    ids, mask, rows = prompts()
    sampled = rolls > 1
    decoding = guided(models, other=mean_of(4), **block)
    together = answers(decoding, ids, mask, count=4)
    if not sampled:
        for row, prompt in zip(together, rows):
            alone = guided(models, other=mean_of(4), **block)
            assert torch.equal(row[None], answers(alone, torch.tensor([prompt]), count=4))
    name = "reference" if block["value"] in ("rollout_ref", "partial") else "baseline"
    tokens, horizon = decoding.summary()["tokens"], decoding.decoder.horizon
    bound = 4 * len(ids) * 5 * rolls * (horizon + 1) + ids.numel()
    if name == "reference":
        bound += 3 * len(ids)
    assert tokens[name] <= bound
    if rolls:
        assert tokens[name] >= 4 * len(ids) * 5 * rolls * horizon  # none was saved: no end token is in play


def test_rollouts_leave_the_caches_alone(models):
    """The reference's cache holds exactly the prompt and the chosen tokens, also where it rolls out itself."""
    ids, mask, _ = prompts()
    for block in ({"value": "rollout_ref"}, {"value": "transfer"}):
        decoding = guided(models, **block)
        session = decoding.begin(ids, mask)
        said = ids[:, :0]
        for step in range(3):
            said = torch.cat([said, session.scores(said).argmax(-1, keepdim=True)], -1)
            for track in session.tracks:
                assert track.cache.get_seq_length() == ids.shape[1] + step
        for track in session.tracks:
            fresh = track.member.begin(ids, mask, cached=False).logits(said)
            torch.testing.assert_close(track.logits(said), fresh, atol=1e-5, rtol=0)


def test_chunks_and_equal_rows_change_nothing(models):
    """A small budget rolls row by row; two equal prompts are rolled once."""
    ids, mask, _ = prompts()
    wanted = answers(guided(models), ids, mask, count=4)
    assert torch.equal(answers(guided(models, token_budget=1), ids, mask, count=4), wanted)
    twice, alone = guided(models), guided(models)
    both = answers(twice, ids[:1].repeat(2, 1), mask[:1].repeat(2, 1), count=4)
    one = answers(alone, ids[:1], mask[:1], count=4)
    assert torch.equal(both, one.repeat(2, 1))
    fed = [d.summary()["tokens"]["baseline"] for d in (twice, alone)]
    assert fed[0] - fed[1] == ids.shape[1] + 3  # the twin's own prompt and tokens, and no rollout
    assert twice.summary()["rewards"] == 2 * alone.summary()["rewards"]


def test_a_candidate_that_ends_the_answer_is_not_rolled_out(models):
    """Its value is the reward of the finished text; ended rows cost nothing more."""
    ids, mask, _ = prompts((5, 5))
    seen = []

    def reward(asked, said):
        seen.extend(map(tuple, said))
        return [1.0 if row[-1] == 42 else -1.0 for row in said]

    decoding = guided(models, reward=IdReward(reward), alpha=1e-6)
    decoding.ends = frozenset({42})
    session = decoding.begin(ids, mask)
    candidates = torch.tensor([[42, 3], [7, 42]])
    values = session.values(ids[:, :0], candidates, [True, True])
    assert values[0, 0] == values[1, 1] == 1.0
    assert (42,) in seen
    assert all(len(row) == 5 or row[-1] == 42 for row in seen)
    calls = decoding.summary()
    ended = session.scores(torch.tensor([[42], [42]]))
    assert decoding.summary()["rewards"] == calls["rewards"]
    assert ended.isfinite().any()


def test_rollouts_stop_at_end_tokens(models):
    """Rows that end early are dropped; their tails end with the end token, as the baseline's generate would."""
    ids, mask, _ = prompts((6, 6))
    free = guided(models, horizon=6)
    session = free.begin(ids, mask)
    tails = free.rollouts.roll(
        session.tracks[1], ids[:, :0], torch.tensor([[1, 2, 3], [4, 5, 6]]), [True, True], frozenset()
    )
    ends = frozenset({tails[0][0][0][2], tails[1][2][0][1]})
    session = free.begin(ids, mask)
    cut = free.rollouts.roll(session.tracks[1], ids[:, :0], torch.tensor([[1, 2, 3], [4, 5, 6]]), [True, True], ends)
    for b, j in itertools.product(range(2), range(3)):
        whole = tails[b][j][0]
        stop = next((i for i, t in enumerate(whole) if i and t in ends), len(whole) - 1)
        if whole[0] not in ends:
            assert cut[b][j][0] == whole[: stop + 1]


def test_memory_is_freed_after_a_step(models):
    """No tensor of a rollout outlives its step."""
    import gc

    ids, mask, _ = prompts()
    decoding = guided(models, k=8)
    session = decoding.begin(ids, mask)
    session.scores(ids[:, :0])

    def held():
        gc.collect()
        return sum(1 for o in gc.get_objects() if torch.is_tensor(o))

    before = held()
    session.scores(ids[:, :1])
    assert held() <= before + 2


def test_an_adapter_as_baseline_of_its_own_base():
    """One model in memory: the adapter off is steered, the adapter on rolls out."""
    from decode.test_emulated import adapted
    from pegbox.decode.pairs import View

    model = adapted()
    off = View(model, adapter=False)
    ids, mask, _ = prompts()
    options = {"reward": mean_of()}
    block = {"kind": "transfer_q", "k": 4, "horizon": 3, "alpha": 0.1, "reference": "off"}
    decoding = DECODE.validate(block).bind(DecodeContext(model, None, {"off": off, "baseline": model}, options=options))
    bare = quiet(tiny_llama(2))
    bare.get_output_embeddings().weight.mul_(8.0)
    apart = DECODE.validate({**block, "reference": None}).bind(
        DecodeContext(bare, None, {"baseline": copy.deepcopy(model)}, options=options)
    )
    assert torch.equal(answers(decoding, ids, mask, count=4), answers(apart, ids, mask, count=4))


def test_best_of_n(models):
    """The answer is the best of the n sampled by the reward, and more candidates score higher."""
    ids, mask, _ = prompts()

    def at(n):
        block = {"kind": "best_of", "n": n}
        return DECODE.validate(block).bind(DecodeContext(models["reference"], options={"reward": mean_of(2)}))

    scores = []
    for n in (1, 30):
        torch.manual_seed(0)
        decoding = at(n)
        out = answers(decoding, ids, mask, count=5)
        scores.append(float(mean_of(2)([[]] * 3, out.tolist()).mean()))
        assert decoding.summary()["rewards"] == 3 * n
    assert scores[1] > scores[0]
    with pytest.raises(BadInput, match="whole answers"):
        at(2).begin(ids, mask)
    with pytest.raises(Unsupported, match="no probability"):
        at(2)(input_ids=ids)


def test_the_divergence_is_counted(models):
    """Zero where nothing is steered; with k 1 it is the reference's own surprise about its first choice."""
    ids, mask, _ = prompts()
    kept, steered = guided(models, alpha=1e9, k=288), guided(models, alpha=0.05)
    for decoding in (kept, steered):
        answers(decoding, ids, mask, count=3)
    assert kept.summary()["divergence"] == pytest.approx(0.0, abs=1e-5)
    assert steered.summary()["divergence"] > 0.1
    assert steered.summary()["drawn"] == 9


# ---- rewards --------------------------------------------------------------------------------------------------------


def classifier(labels=1, pad=258):
    from transformers import LlamaForSequenceClassification

    config = tiny_llama().config
    config.num_labels, config.pad_token_id = labels, pad
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def test_a_classifier_scores_rows_as_it_would_alone():
    """Batched, right-padded, through its own tokenizer; special tokens of the policy's text are left out."""
    speaker = tokenizer()
    reward = ClassifierReward(classifier(), speaker, speaker, batch_tokens=40)
    asked = [speaker("hello").input_ids, speaker("a longer question").input_ids, speaker("x").input_ids]
    said = [[*speaker(" yes").input_ids, 257], speaker(" no, or so").input_ids, speaker("!").input_ids]
    got = reward(asked, said)
    assert got.dtype == torch.float32
    for i, (p, a) in enumerate(zip(asked, said)):
        text = speaker.decode(p) + speaker.decode(a, skip_special_tokens=True)
        alone = reward.module(input_ids=torch.tensor([speaker(text).input_ids])).logits[0, 0]
        assert float(got[i]) == pytest.approx(float(alone), abs=1e-5)
    messages = [{"role": "user", "content": "hello"}]
    own = reward.prompt_ids(messages)
    assert own == speaker.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    with_template = reward([own], [said[0]])
    wanted = reward.module(input_ids=torch.tensor([own + speaker(" yes").input_ids])).logits[0, 0]
    assert float(with_template) == pytest.approx(float(wanted), abs=1e-5)


def test_functions_of_text():
    """TRL's form by keywords, and the plain one of the whole text."""
    speaker = tokenizer()
    ids = [speaker("ab").input_ids], [[*speaker("cde").input_ids, 257]]

    def trl(prompts, completions, **kwargs):
        assert prompts == ["ab"]
        return [float(len(c)) for c in completions]

    assert TextReward(trl, speaker)(*ids).tolist() == [3.0]
    assert TextReward(lambda text: float(len(text)), speaker)(*ids).tolist() == [5.0]


def test_a_reward_from_a_file(models, tmp_path):
    """file.py:function, asked with messages: the texts are the messages' own."""
    from pegbox.parts.generation import generate

    file = tmp_path / "mine.py"
    file.write_text(
        "SEEN = []\ndef score(prompts, completions):\n    SEEN.extend(prompts)\n"
        "    return [c.count('e') for c in completions]\n"
    )
    speaker = tokenizer()
    block = {"kind": "transfer_q", "k": 3, "horizon": 2, "reward": f"{file}:score"}
    decoding = DECODE.validate(block).bind(DecodeContext(models["reference"], speaker, models))
    assert block["reward"] not in decoding.decoder.roles()
    generate(decoding, speaker, [[{"role": "user", "content": "hi there"}]], max_new_tokens=2)
    assert set(decoding.rewards[0].function.__globals__["SEEN"]) == {"hi there"}


def test_broken_rewards_name_the_row(models):
    speaker = tokenizer()
    asked, said = [[65], [66]], [[67], [68]]
    with pytest.raises(RunFailed, match="row 1 is nan"):
        IdReward(lambda p, a: [0.0, float("nan")])(asked, said)
    with pytest.raises(RunFailed, match="row 0 is inf: 'b' -> 'd'"):
        TextReward(lambda prompts, completions: [float("inf"), 0.0], speaker)(asked, said)
    with pytest.raises(RunFailed, match="1 values for 2"):
        IdReward(lambda p, a: [0.0])(asked, said)


def test_reward_models_that_are_refused():
    speaker = tokenizer()
    with pytest.raises(BadInput, match="2 labels"):
        ClassifierReward(classifier(labels=2), speaker, speaker)
    with pytest.raises(BadInput, match="padding"):
        ClassifierReward(classifier(pad=None), speaker, speaker)
    bare = tokenizer()
    bare.pad_token = None
    with pytest.raises(BadInput, match="padding"):
        ClassifierReward(classifier(), bare, speaker)
    with pytest.raises(BadInput, match="tokenizer"):
        TextReward(lambda text: 0.0, None)
    assert Reward.rows == 0


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": -1.0}, "alpha"),
        ({"k": 0}, "k"),
        ({"rollouts": 0}, "rollouts"),
        ({"horizon": -1}, "horizon"),
        ({"value": "transfer_indirect", "baseline_reward": "other"}, "beta"),
        ({"value": "transfer_indirect", "beta": 1.0}, "baseline_reward"),
        ({"value": "transfer_indirect", "beta": 1.0, "baseline_reward": "o", "rollouts": 1}, "cancels"),
        ({"beta": 1.0}, "transfer_indirect"),
        ({"estimator": "none"}, "transfer_indirect"),
        ({"rollouts": 3, "rollout_temperature": 0.0}, "greedy"),
        ({"value": "custom"}, "source"),
        ({"source": "a:b"}, "source"),
    ],
)
def test_bad_settings(block, words):
    with pytest.raises(BadInput, match=words):
        DECODE.validate({"kind": "transfer_q", **block})


def test_bad_arithmetic():
    with pytest.raises(BadInput, match="alpha"):
        policy(torch.zeros(2), torch.zeros(2), 0.0)
    with pytest.raises(BadInput, match="two rollouts"):
        estimate(torch.zeros(2, 1), torch.zeros(2, 1), 1.0, "self")
    with pytest.raises(BadInput, match="beta"):
        estimate(torch.zeros(2, 2), torch.zeros(2, 2), None)


def test_what_does_not_fit(models):
    ids, mask, _ = prompts()
    with pytest.raises(BadInput, match="vocabulary has 288"):
        guided(models, k=289)
    other = tokenizer()
    other.add_tokens(["<new>"])
    from pegbox.decode.pairs import View

    with pytest.raises(BadInput, match="<new>"):
        guided({**models, "baseline": View(models["baseline"], tokenizer=other)}, tokenizer=tokenizer())
    short = {**models, "baseline": quiet(tiny_llama(2, max_position_embeddings=16))}
    with pytest.raises(BadInput, match="context of 'baseline' is 16"):
        answers(guided(short), ids, mask, count=4)
    assert answers(guided(short), ids, mask, count=3).shape == (3, 3)
    with pytest.raises(Unsupported, match="num_beams"):
        answers(guided(models), ids, mask, count=3, num_beams=2)
    bad = {"kind": "transfer_q", "value": "custom", "source": "x:y", "k": 2}
    decoding = DECODE.validate(bad).bind(
        DecodeContext(models["reference"], options={"source": lambda p, s, c: torch.zeros(1, 1)})
    )
    with pytest.raises(BadInput, match="finite values of shape"):
        answers(decoding, ids, mask, count=2)
