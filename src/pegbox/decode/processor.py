"""Emulated fine-tuning as a logits processor: the model that generates is the anchor, the others step beside it.

For callers that give no place to a generation loop of ours (pipelines, TRL's completions). A processor sees token ids
and scores only, so the prompts' mask is given when it is made, and rows can't be told apart when beams move them:
`num_beams` must be 1. Where the sequence it is shown does not continue what it saw last, the side caches are rebuilt.

What this file does not do: draft blocks, or prompts of another form; that takes `Decoding.generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from pegbox.decode.emulated import EmulatedDecoding
from pegbox.decode.pairs import Track
from pegbox.errors import BadInput

__all__ = ["EmulatedLogits"]


class EmulatedLogits(LogitsProcessor):
    """Adds the deltas of `decoding` to the scores of the model that generates, which must be its anchor.

    Args:
        prompt_mask: (B, P) attention mask of the prompts, left-padded.
        rows_per_prompt: `num_return_sequences` of the call.

    Raises `BadInput` where a call has other rows: `num_beams > 1`, or prompts other than those of the mask.
    """

    def __init__(self, decoding: EmulatedDecoding, prompt_mask: Tensor, rows_per_prompt: int = 1):
        if decoding.forms != [None] * len(decoding.forms):
            raise BadInput("Prompts of another form need Decoding.generate; leave decode.prompts out.")
        if decoding.decoder.block_size is not None:
            raise BadInput("Blocks need Decoding.generate; leave decode.block_size out.")
        if bool((prompt_mask[:, -1] == 0).any()):
            raise BadInput("Prompts must be padded on the left; the last position of a row is padding.")
        self.decoding, self.mask = decoding, prompt_mask.repeat_interleave(rows_per_prompt, 0)
        self._tracks: dict[int, Track] = {}
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows, width = self.mask.shape
        if len(input_ids) != rows or input_ids.shape[1] < width:
            raise BadInput(
                f"The processor was made for {rows} rows of {width} tokens and is shown {tuple(input_ids.shape)}. "
                "num_beams must be 1; give rows_per_prompt for several answers to each prompt."
            )
        if not any(self.decoding.decoder.weights):
            return scores
        if not self._continues(input_ids):
            self._begin(input_ids[:, :width])
        self._seen = input_ids
        answer = input_ids[:, width:]
        logits: list[Tensor] = []
        for i in range(len(self.decoding.members)):
            own = scores if i == self.decoding.anchor else self._tracks[i].logits(answer)[:, -1]
            logits.append(own[:, : self.decoding.vocabulary])
        found = self.decoding.combined(logits).to(scores.dtype)
        missing = scores.shape[-1] - found.shape[-1]  # ids that no tokenizer uses
        return torch.nn.functional.pad(found, (0, missing), value=-torch.inf) if missing else found

    def _continues(self, ids: Tensor) -> bool:
        """Whether `ids` is what was seen last and more."""
        seen = self._seen
        return seen is not None and ids.shape[1] > seen.shape[1] and torch.equal(ids[:, : seen.shape[1]], seen)

    def _begin(self, prompt: Tensor) -> None:
        self._tracks = {
            i: member.begin(prompt, self.mask)
            for i, member in enumerate(self.decoding.members)
            if i != self.decoding.anchor
        }
