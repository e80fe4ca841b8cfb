"""Rollouts: what a model would say after each candidate token, from one cache of the text so far.

The text so far is computed once and its cache copied for the candidates: k n rows of H tokens each, no prompt twice. A
candidate that ends the answer gets no rollout; rows that have ended are dropped; equal rows are rolled once when the
rollout is greedy. Rows go in chunks under a budget of cached positions, and the copies are gone when a step is over.

What this file does not do: score rollouts (`pegbox.decode.rewards`) or choose (`pegbox.decode.transfer_q`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pegbox.decode.base import draw
from pegbox.decode.pairs import Track

__all__ = ["Rollouts"]

Tails = list[list[list[list[int]]]]


@dataclass(frozen=True)
class Rollouts:
    """How rollouts are made.

    Args:
        horizon: H, tokens after the candidate. samples: n per candidate. temperature: 0 is greedy.
        budget: cached positions per chunk (rows times length).
    """

    horizon: int
    samples: int = 1
    temperature: float = 0.0
    budget: int = 65_536

    def roll(self, track: Track, answer: Tensor, candidates: Tensor, live: list[bool], ends: frozenset[int]) -> Tails:
        """[B][k][n] token lists: each candidate and what follows it, its end token included.

        Args:
            track: the rolling model's, holding the prompt and `answer` (B, G) or fewer of it; left there.
            candidates: (B, k). live: rows that have not ended; the others get their candidates alone.
        """
        tokens = candidates.tolist()
        tails: Tails = [[[[z] for _ in range(self.samples)] for z in row] for row in tokens]
        places = [
            (b, j, n)
            for b, row in enumerate(tokens)
            for j, z in enumerate(row)
            for n in range(self.samples)
            if live[b] and z not in ends
        ]
        if not self.horizon or not places:
            return tails
        if track.length < track.prompt.shape[1] + answer.shape[1]:
            track.logits(answer)
        groups = self._groups(track, answer, tokens, places)
        size = max(1, self.budget // (track.prompt.shape[1] + answer.shape[1] + 1 + self.horizon))
        for start in range(0, len(groups), size):
            chunk = groups[start : start + size]
            first = [members[0] for members in chunk]
            rolled = self._chunk(track, answer, [p[0] for p in first], [tokens[b][j] for b, j, _ in first], ends)
            for members, tail in zip(chunk, rolled):
                for b, j, n in members:
                    tails[b][j][n] = tail
        return tails

    def _groups(
        self, track: Track, answer: Tensor, tokens: list[list[int]], places: list[tuple[int, int, int]]
    ) -> list[list[tuple[int, int, int]]]:
        """Places that share a rollout: each its own, but equal texts together where the rollout is greedy."""
        if self.temperature > 0:
            return [[place] for place in places]
        texts = [tuple(p[m.bool()].tolist()) + tuple(a.tolist()) for p, m, a in zip(track.prompt, track.mask, answer)]
        found: dict[tuple[tuple[int, ...], int], list[tuple[int, int, int]]] = {}
        for b, j, n in places:
            found.setdefault((texts[b], tokens[b][j]), []).append((b, j, n))
        return list(found.values())

    def _chunk(
        self, track: Track, answer: Tensor, rows: list[int], first: list[int], ends: frozenset[int]
    ) -> list[list[int]]:
        """Roll rows of `track` after the `first` tokens: the tails, in order."""
        device = answer.device
        fork = track.fork(torch.tensor(rows, device=device))
        ids = torch.cat([answer[rows], torch.tensor(first, device=device)[:, None]], -1)
        begin, where, tails = answer.shape[1], list(range(len(rows))), [[z] for z in first]
        over = torch.zeros(len(rows), dtype=torch.bool, device=device)
        stops = torch.tensor(sorted(ends), device=device, dtype=torch.long)
        for step in range(self.horizon):
            logits = fork.logits(ids)[:, -1]
            chosen = draw(logits / self.temperature if self.temperature else logits, self.temperature > 0)
            ids = torch.cat([ids, chosen[:, None]], -1)
            over = over | torch.isin(chosen, stops)
            if step + 1 < self.horizon and bool(over.all()):
                break
            if step + 1 < self.horizon and int(over.sum()) * 2 >= len(over):
                for i in over.nonzero().flatten().tolist():
                    tails[where[i]] = _ended(ids[i, begin:].tolist(), ends)
                rest = (~over).nonzero().flatten()
                where, ids, over = [where[i] for i in rest.tolist()], ids[rest], over[rest]
                fork = fork.fork(rest)
        for i, place in enumerate(where):
            tails[place] = _ended(ids[i, begin:].tolist(), ends)
        return tails


def _ended(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Up to and with the first end token."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
