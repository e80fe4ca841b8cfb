"""`add_token`: one more token with the mean of all others as its embedding, in and out.

    E_new = mean_v E_v   (input and output rows; one row where they are tied)

For policies that put a special token into inputs, such as Masked Thought's `<mask>` (arXiv:2403.02178, which leaves the
last rows out of the mean; here all old rows count). The row works untrained: with frozen embeddings nothing else has to
be copied or trained. Where the embedding matrix is longer than the vocabulary, an unused row is taken, nothing grows.

Labels never contain the token and generation is kept from it. `remove_at_save` drops the row again after training: what
is saved then has the base's own vocabulary, and loading adds nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.context import Context
from pegbox.parts.view import Batch
from pegbox.prepare.base import PREPARE, Preparation

__all__ = ["AddToken", "remove_rows"]


@PREPARE.register
class AddToken(Preparation):
    """Adds one special token.

    Args:
        token: its text.
        remove_at_save: take it out again when training is over.
    """

    kind: Literal["add_token"] = "add_token"
    token: str = Field(default="<mask>", min_length=1)
    remove_at_save: bool = False

    def apply(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], ctx: Context) -> dict[str, Any]:
        if ctx.tokenizer is None:
            raise BadInput(f"prepare.add_token: there is no tokenizer to add '{self.token}' to.")
        known = len(ctx.tokenizer)
        if self.token in ctx.tokenizer.get_vocab():
            raise BadInput(
                f"prepare.add_token: the tokenizer has '{self.token}' already. Use it as it is (form: existing), or "
                "choose another text."
            )
        ctx.tokenizer.add_tokens([self.token], special_tokens=True)
        new = ctx.tokenizer.convert_tokens_to_ids(self.token)
        rows = _matrix(model).shape[0]
        means = [t[: min(known, rows)].double().mean(0).to(t.dtype) for t in _tensors(model)]
        _insert(model, new, means)
        return {"id": new, "token": self.token, "rows": rows, "means": means, "removed": self.remove_at_save}

    def save(self, record: dict[str, Any], folder: Path) -> None:
        plain = {k: v for k, v in record.items() if k != "means"}
        (folder / "add_token.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
        save_file(
            {f"mean.{i}": t.cpu().contiguous() for i, t in enumerate(record["means"])}, folder / "rows.safetensors"
        )

    def replay(self, model: nn.Module, folder: Path) -> None:
        try:
            record = json.loads((folder / "add_token.json").read_text(encoding="utf-8"))
            held = load_file(folder / "rows.safetensors")
            means = [held[f"mean.{i}"] for i in range(len(held))]
            rows, new, removed = record["rows"], record["id"], record["removed"]
        except Exception as error:
            raise Corrupt(f"{folder} is no readable record of an added token ({error}).") from error
        if _matrix(model).shape[0] != rows:
            raise WrongBase(
                f"The token was added to a base of {rows} embeddings; this one has {_matrix(model).shape[0]}."
            )
        if not removed:
            _insert(model, new, [m.to(t) for m, t in zip(means, _tensors(model), strict=True)])

    def finish(self, model: nn.Module, record: dict[str, Any]) -> None:
        """Called after training, before anything is saved: drops the row, if asked for."""
        if record["removed"]:
            remove_rows(model, record["rows"])
            _allow(model, record["id"])


def _matrix(model: nn.Module) -> Tensor:
    return model.get_input_embeddings().weight  # type: ignore[operator]


def _tensors(model: nn.Module) -> list[Tensor]:
    """Tensors with a row per token: input embedding, output embedding if it is another one, its bias."""
    inputs, outputs = _matrix(model), model.get_output_embeddings()  # type: ignore[operator]
    found = [inputs]
    if outputs is not None and outputs.weight is not inputs:
        found.append(outputs.weight)
    if outputs is not None and getattr(outputs, "bias", None) is not None:
        found.append(outputs.bias)
    return [t.detach() for t in found]


def _insert(model: nn.Module, new: int, means: list[Tensor]) -> None:
    if new >= _matrix(model).shape[0]:
        model.resize_token_embeddings(new + 1, mean_resizing=False)  # type: ignore[operator]
    with torch.no_grad():
        for tensor, mean in zip(_tensors(model), means, strict=True):
            tensor[new] = mean
    _forbid(model, new)


def _forbid(model: nn.Module, token: int) -> None:
    """Keep generation from the token."""
    config: Any = getattr(model, "generation_config", None)
    if config is not None:
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), token})


def _allow(model: nn.Module, token: int) -> None:
    config: Any = getattr(model, "generation_config", None)
    if config is not None and config.suppress_tokens:
        config.suppress_tokens = [t for t in config.suppress_tokens if t != token] or None


def remove_rows(model: nn.Module, rows: int) -> None:
    """Shrink the embeddings (and the head) to their first `rows` rows."""
    if _matrix(model).shape[0] > rows:
        model.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
