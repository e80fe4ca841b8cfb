"""Measures of decoded answers, on cases that decide them."""

import math

import numpy as np
import pytest

from pegbox.decode.measures import average_reward, coherence, cut_at_turn, diversity, pairwise
from pegbox.errors import BadInput


def test_diversity_where_all_are_distinct():
    """prod over n of distinct / (distinct + 1); an empty or one-word text has none."""
    assert diversity("a b c d e f") == pytest.approx(math.prod(m / (m + 1) for m in (5, 4, 3)))
    assert diversity("") == diversity("one") == 0.0


def test_coherence_is_the_mean_cosine():
    table = {"p": [1.0, 0.0], "q": [0.0, 2.0], "a": [1.0, 1.0], "b": [0.0, 5.0], "": [0.0, 0.0]}
    embed = lambda texts: np.array([table[t] for t in texts])  # noqa: E731
    assert coherence(["p", "q"], ["a", "b"], embed) == pytest.approx((1 / math.sqrt(2) + 1) / 2)
    assert coherence(["p"], [""], embed) == 0.0
    with pytest.raises(BadInput, match="one answer per prompt"):
        coherence(["p"], [], embed)


def test_average_reward_cuts_turns_and_counts_long_rows():
    assert cut_at_turn("yes. Human: and you?") == "yes. "
    asked, said = ["q ", "q ", "q "], ["one HUMAN: x", "two three", "four five six seven"]
    seen = []
    found = average_reward(
        asked, said, lambda ts: [seen.append(t) or len(t) for t in ts], length=lambda t: len(t.split()), longest=5
    )
    assert seen == ["q one ", "q two three"]
    assert (found.scored, found.skipped) == (2, 1)
    assert found.value == pytest.approx((6 + 11) / 2)
    with pytest.raises(BadInput, match="No row"):
        average_reward(["a b"], ["c"], lambda ts: [0.0], length=lambda t: 9, longest=5)
    with pytest.raises(BadInput, match="finite"):
        average_reward(["a"], ["c"], lambda ts: [float("nan")])


def test_pairwise_is_blind_to_the_order():
    """A judge that prefers the longer answer gives the same verdicts whatever the order; malformed replies count."""

    def longer(prompt, first, second):
        return f"{min(len(first), 10)} {min(len(second), 10)}\nbecause"

    for seed in range(6):
        found = pairwise(["p"] * 3, ["aaa", "a", "aa"], ["a", "aaa", "bb"], longer, seed=seed)
        assert (found.wins, found.losses, found.ties, found.malformed) == (1, 1, 1, 0)
        assert found.win_tie == pytest.approx(2 / 3)
    odd = pairwise(["p"] * 3, ["x"] * 3, ["y"] * 3, iter_judge(["", "eleven", "11 3"]))
    assert odd.malformed == 3
    assert odd.win_tie == 0.0
    favours_first = [pairwise(["p"], ["x"], ["y"], lambda *a: "9 1", seed=s).wins for s in range(20)]
    assert 0 < sum(favours_first) < 20


def iter_judge(replies):
    rest = iter(replies)
    return lambda *args: next(rest)
