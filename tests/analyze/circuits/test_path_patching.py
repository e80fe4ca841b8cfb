"""Path patching: closed forms, the naive loop, how many passes it takes, and its estimate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analyze.circuits.casts import family, llama, naive_scores, prompts
from pegbox.analyze.circuits import HeadView, attribution, capture, cascade, path_patching, rank_correlation
from pegbox.analyze.circuits.activations import taken
from pegbox.analyze.circuits.discover import Stage, check_sizes
from pegbox.analyze.circuits.paths import probabilities, top_heads
from pegbox.errors import BadInput

COMMON = {"rtol": 0, "atol": 1e-6}


def attention_only():
    """One block without MLP and norms, so that the direct effect is linear up to the softmax."""
    model = llama(num_hidden_layers=1, num_key_value_heads=4)
    block = model.model.layers[0]
    model.model.norm = block.input_layernorm = block.post_attention_layernorm = nn.Identity()
    block.mlp = nn.Module()
    block.mlp.forward = lambda x: torch.zeros_like(x)
    return model


@torch.no_grad()
def test_the_direct_effect_in_closed_form():
    """One attention-only block: corrupting a head adds its o_proj slice's change, unembedded, to the logits."""
    model = attention_only()
    view, clean, corrupt = HeadView(model), prompts(), prompts(seed=1)
    found = path_patching(view, clean, corrupt)
    here, there = capture(view, clean), capture(view, corrupt)
    p = probabilities(here.logits, clean.right())
    unembed = model.lm_head.weight @ model.model.layers[0].self_attn.o_proj.weight  # (V, W)
    for head in range(4):
        site = view.site("o", 0, head)
        change = taken(there["o", 0][:, -1] - here["o", 0][:, -1], site) @ unembed[:, site.columns].T
        wanted = ((probabilities(here.logits + change, clean.right()) - p) / p).mean()
        assert abs(float(found.scores[0, head] - wanted)) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("receivers", "composition", "position"),
    [([], None, "last"), ([(2, 1), (1, 3)], "q", "last"), ([(2, 0), (2, 3)], "v", "mid"), ([(1, 2)], "k", "early")],
)
def test_it_is_the_naive_loop(name, resume, receivers, composition, position):
    """Senders side by side, from their block on, on few tokens: what one sender at a time on whole prompts gives."""
    view = HeadView(family(name))
    clean, corrupt = prompts(lengths=[10, 9, 10]), prompts(lengths=[8, 10, 10], seed=1)
    settings_ = {"receivers": receivers, "composition": composition, "position": position}
    found = path_patching(view, clean, corrupt, **settings_, resume=resume, tokens=40, batch=2)
    wanted = naive_scores(view, clean, corrupt, receivers, composition, position)
    torch.testing.assert_close(found.scores, wanted, **COMMON)
    last = max((r[0] for r in receivers), default=3)
    assert (found.scores[last:] == 0).all()
    assert found.scores[: min(last, 3)].abs().max() > 1e-4


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(8, 200), st.integers(1, 3))
def test_batches_and_budgets_change_nothing(rows, tokens, batch):
    view = HeadView(llama())
    clean, corrupt = prompts(rows), prompts(rows, seed=1)
    several = path_patching(view, clean, corrupt, receivers=[(2, 1)], composition="q", tokens=tokens, batch=batch)
    one = path_patching(view, clean, corrupt, receivers=[(2, 1)], composition="q")
    torch.testing.assert_close(several.scores, one.scores, **COMMON)


def test_few_passes():
    """All heads of a block in one pass: L instead of L H for the direct effect, twice that through receivers."""
    view = HeadView(llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8))
    clean, corrupt = prompts(), prompts(seed=1)
    direct = path_patching(view, clean, corrupt, resume=True).forwards
    through = path_patching(view, clean, corrupt, receivers=[(3, 0)], composition="q", resume=True).forwards
    assert direct == 4 + 3
    assert through == 2 * 3 + 3


def test_only_the_senders_that_are_asked_for():
    view = HeadView(llama())
    whole = path_patching(view, prompts(), prompts(seed=1))
    some = path_patching(view, prompts(), prompts(seed=1), senders=[(0, 1), (2, 3)])
    assert some.scores.isnan().sum() == 10
    for head in ((0, 1), (2, 3)):
        assert abs(float(some.scores[head] - whole.scores[head])) < 1e-9


def test_corrupting_with_itself_scores_nothing():
    view = HeadView(llama())
    found = path_patching(view, prompts(), prompts(), receivers=[(2, 0)], composition="v", position="mid")
    assert found.scores.abs().max() < 1e-6


def test_the_estimate_is_the_scores_slope():
    """Where the corrupt activations lie close by, attribution patching is path patching."""
    view = HeadView(llama())
    clean = prompts(6)
    near = llama()
    with torch.no_grad():
        near.model.embed_tokens.weight += 1e-4 * torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    for settings_ in ({}, {"receivers": [(2, 1), (2, 0)], "composition": "q"},
                      {"receivers": [(1, 1)], "composition": "v", "position": "mid"}):  # fmt: skip
        with _other_weights(view, near):
            exact, guess = (f(view, clean, clean, **settings_) for f in (path_patching, attribution))
        exact = exact.scores
        assert exact.abs().max() > 1e-7
        torch.testing.assert_close(guess, exact, rtol=0, atol=float(0.02 * exact.abs().max()))
        assert rank_correlation(guess, exact) > 0.95


class _other_weights:
    """The corrupt prompts see slightly other embeddings, so that activations differ by little."""

    def __init__(self, view, near):
        self.view, self.near, self.calls = view, near, 0

    def __enter__(self):
        from pegbox.analyze.circuits import estimate as b
        from pegbox.analyze.circuits import paths as a

        self.kept = a.clean_outputs, b.capture
        near = HeadView(self.near)
        a.clean_outputs = lambda view, p, tokens: self._second(lambda v: self.kept[0](v, p, tokens), view, near)
        b.capture = lambda view, p, kinds=("o",), tokens=None: self.kept[1](
            near if tokens is not None else view, p, kinds, tokens
        )

    def _second(self, call, view, near):
        self.calls += 1
        return call(near if self.calls % 2 == 0 else view)

    def __exit__(self, *_):
        from pegbox.analyze.circuits import estimate as b
        from pegbox.analyze.circuits import paths as a

        a.clean_outputs, b.capture = self.kept


# ---- groups


def test_the_most_negative_heads():
    scores = torch.tensor([[0.5, -0.3], [-0.9, 0.0]])
    assert top_heads(scores, 2) == [(1, 0), (0, 1)]
    with pytest.raises(BadInput, match="between 1 and 4"):
        top_heads(scores, 5)
    with pytest.raises(BadInput, match="between 1 and 4"):
        top_heads(scores, 0)


def test_a_cascade_goes_through_its_groups():
    """Each group by path patching through the one before; a head found again stays in the later."""
    view, clean, corrupt = HeadView(llama()), prompts(), prompts(seed=1)
    stages = (Stage("a", "last", 5), Stage("b", "last", 2, "a", "q"), Stage("c", "mid", 3, "b", "v"))
    found = cascade(view, clean, corrupt, stages)
    a = path_patching(view, clean, corrupt)
    torch.testing.assert_close(found.scores["a"], a.scores, **COMMON)
    first = [h for h in a.top(5) if a.scores[h] < 0]
    b = path_patching(view, clean, corrupt, receivers=first, composition="q")
    torch.testing.assert_close(found.scores["b"], b.scores, **COMMON)
    second = [h for h in b.top(2) if b.scores[h] < 0]
    assert list(found.circuit.groups["b"].heads) == second
    assert list(found.circuit.groups["a"].heads) == [h for h in first if h not in second]
    assert found.circuit.groups["c"].position == "mid"
    with pytest.raises(BadInput, match="Unknown group 'd'"):
        check_sizes(view, stages, {"d": 2})
    with pytest.raises(BadInput, match="13 heads: the model has 12"):
        check_sizes(view, stages, {"a": 13})
    with pytest.raises(BadInput, match="no earlier group"):
        check_sizes(view, stages[::-1])


# ---- bad input


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"receivers": [(9, 0)], "composition": "q"}, "out of range"),
        ({"receivers": [(1, 0)], "composition": "o"}, "Unknown composition 'o'"),
        ({"receivers": [(1, 0)]}, "Unknown composition 'None'"),
        ({"composition": "q"}, "without receivers"),
        ({"position": "mid"}, "no direct path"),
        ({"position": "middle", "receivers": [(1, 0)], "composition": "q"}, "Did you mean 'mid'"),
        ({"senders": [(0, 7)]}, "out of range"),
    ],
)
def test_what_names_no_path(given_, words):
    with pytest.raises(BadInput, match=words):
        path_patching(HeadView(llama()), prompts(), prompts(seed=1), **given_)


def test_prompts_that_are_no_pairs():
    view = HeadView(llama())
    with pytest.raises(BadInput, match="4 clean and 3 corrupt"):
        path_patching(view, prompts(), prompts(3))
    with pytest.raises(BadInput, match="no answers"):
        path_patching(view, prompts(answers=False), prompts())


def test_an_answer_without_probability():
    """Scores are shares of the clean probability; 0 has none."""
    view = HeadView(llama())
    with torch.no_grad():
        view.model.lm_head.weight[int(prompts().right()[0])] *= 1e6
        view.model.lm_head.weight[int(prompts().right()[1])] *= 1e6
    with pytest.raises(BadInput, match="probability 0"):
        path_patching(view, prompts(), prompts(seed=1))
