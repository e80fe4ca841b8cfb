"""NEFTune: noise on the input embeddings while training (arXiv:2310.05914), for a single forward.

    emb += U(-1, 1) alpha / sqrt(T D)        T: positions of the padded batch, D: width

The hook is transformers' own. Its Trainer puts it on for a whole run (`train.neftune_noise_alpha`); here it is on for
as long as a context lasts, so that an objective decides which of its forwards are noisy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pegbox.errors import BadInput

__all__ = ["embedding_noise"]


@contextmanager
def embedding_noise(model: nn.Module, alpha: float) -> Iterator[None]:
    """Noise of strength `alpha` in forwards of a model in training mode; nothing in evaluation mode, or for 0."""
    if not alpha or not model.training:
        yield
        return
    from transformers.integrations.neftune import neftune_post_forward_hook

    table: Any = _inner(model).get_input_embeddings()  # type: ignore[operator]
    if hasattr(table, "neftune_noise_alpha"):
        raise BadInput("Noise on the embeddings is asked for twice: leave train.neftune_noise_alpha out.")
    table.neftune_noise_alpha = alpha
    handle = table.register_forward_hook(neftune_post_forward_hook)
    try:
        yield
    finally:
        handle.remove()
        del table.neftune_noise_alpha


def _inner(model: nn.Module) -> nn.Module:
    while not hasattr(model, "get_input_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model
