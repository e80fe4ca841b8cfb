"""How decoded answers are judged: repetition and diversity, coherence, average reward, pairwise wins. Pure functions.

    rep_n = 100 (1 - distinct_n / (total_n + 1));   diversity = prod_{n=2..4} (1 - rep_n / 100)

The measures of value-guided decoding as its official code has them (arXiv:2405.20495, section 5; the + 1 included: an
empty or one-word text has diversity 0). Embeddings and judges are callables; nothing is downloaded here.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pegbox.errors import BadInput

__all__ = [
    "AverageReward",
    "Verdicts",
    "average_reward",
    "coherence",
    "cut_at_turn",
    "diversity",
    "pairwise",
    "repetition",
]

Embed = Callable[[Sequence[str]], np.ndarray]  # (N texts) -> (N, D)


def repetition(text: str, n: int, words: Callable[[str], Sequence[str]] = str.split) -> float:
    """rep_n of one text in percent; `words` cuts it into tokens."""
    tokens = list(words(text))
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 100.0 * (1.0 - len(set(grams)) / (len(grams) + 1))


def diversity(text: str, words: Callable[[str], Sequence[str]] = str.split) -> float:
    """prod over n = 2, 3, 4 of 1 - rep_n / 100."""
    return math.prod(1.0 - repetition(text, n, words) / 100.0 for n in (2, 3, 4))


def coherence(prompts: Sequence[str], answers: Sequence[str], embed: Embed) -> float:
    """Mean cosine between the embeddings of each prompt and its answer. Raises `BadInput` where none can be taken."""
    if not prompts or len(prompts) != len(answers):
        raise BadInput(f"Coherence needs one answer per prompt, got {len(prompts)} and {len(answers)}.")
    a, b = (np.asarray(embed(list(texts)), dtype=np.float64) for texts in (prompts, answers))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines = np.divide((a * b).sum(-1), norms, out=np.zeros(len(a)), where=norms > 0)
    return float(cosines.mean())


def cut_at_turn(text: str, mark: str = "human:") -> str:
    """`text` up to the next speaker's mark, whatever its case."""
    found = re.search(re.escape(mark), text, flags=re.IGNORECASE)
    return text[: found.start()] if found else text


@dataclass(frozen=True)
class AverageReward:
    """The mean over the rows that were scored, its standard error, and how many rows were too long to be."""

    value: float
    error: float
    scored: int
    skipped: int


def average_reward(
    prompts: Sequence[str],
    answers: Sequence[str],
    reward: Callable[[Sequence[str]], Sequence[float]],
    *,
    length: Callable[[str], int] | None = None,
    longest: int = 1334,
    mark: str = "human:",
) -> AverageReward:
    """Rewards of prompt + answer, answers cut at the next turn; rows of `longest` tokens or more are left out and
    counted (`length` counts a text's tokens; None: no row is too long)."""
    texts = [p + cut_at_turn(a, mark) for p, a in zip(prompts, answers, strict=True)]
    kept = [t for t in texts if length is None or length(t) < longest]
    if not kept:
        raise BadInput(f"No row is shorter than {longest} tokens, so there is no average reward.")
    values = np.asarray([float(v) for v in reward(kept)])
    if len(values) != len(kept) or not np.isfinite(values).all():
        raise BadInput("The reward must give one finite number per text.")
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return AverageReward(
        float(values.mean()), float(spread / math.sqrt(len(values))), len(kept), len(texts) - len(kept)
    )


@dataclass(frozen=True)
class Verdicts:
    """Pairwise counts from the first side's view; `malformed` replies are in none of the three."""

    wins: int
    ties: int
    losses: int
    malformed: int

    @property
    def win_tie(self) -> float:
        """The share of wins and ties among the well-formed verdicts."""
        whole = self.wins + self.ties + self.losses
        return (self.wins + self.ties) / whole if whole else 0.0


def pairwise(
    prompts: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    judge: Callable[[str, str, str], str],
    *,
    seed: int = 0,
    mark: str = "human:",
) -> Verdicts:
    """Ask `judge(prompt, first, second)` for two scores from 1 to 10 on its first line; the order is flipped at random.

    Answers are cut at the next turn first.
    """
    flip = random.Random(seed)
    counts = {"wins": 0, "ties": 0, "losses": 0, "malformed": 0}
    for prompt, own, other in zip(prompts, ours, theirs, strict=True):
        pair = [cut_at_turn(own, mark), cut_at_turn(other, mark)]
        flipped = flip.random() < 0.5
        scores = _two_scores(judge(prompt, *(reversed(pair) if flipped else pair)))
        if scores is None:
            counts["malformed"] += 1
            continue
        first, second = reversed(scores) if flipped else scores
        counts["wins" if first > second else "losses" if first < second else "ties"] += 1
    return Verdicts(**counts)


def _two_scores(reply: str) -> tuple[float, float] | None:
    """The two numbers on the first line, where both are from 1 to 10."""
    line = reply.strip().splitlines()[0] if reply.strip() else ""
    found = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", line)]
    return (found[0], found[1]) if len(found) == 2 and all(1 <= x <= 10 for x in found) else None
