"""What a model is made of, worked out from its modules: blocks, attention, MLP, norms, embeddings, head, ties.

`Anatomy.of(model)` looks at module containers, parameter shapes and the names of projections; `anatomy_registry` holds
what can't be seen. It works on bare, PEFT-wrapped and compiled models and on the meta device, and all names in it are
those of the bare base (`canonical` and `actual` translate). Selection words ("attention", "mlp & blocks 0-5") are
resolved in `anatomy_words`.

What this file does not know: any method, any adapter, any weight's value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, did_you_mean
from pegbox.parts import anatomy_find as find
from pegbox.parts import anatomy_words as words_

__all__ = ["Anatomy", "Attention", "Block", "Piece"]

Kind = Literal["linear", "norm", "embedding", "conv", "loose"]


@dataclass(frozen=True)
class Piece:
    """One module that owns parameters (a matrix with its bias, a norm, an embedding), or one loose parameter.

    Args:
        module: dotted name in the bare model.
        kind: linear | norm | embedding | conv | loose (a parameter held by a module of no such kind).
        category: attention | mlp | mixer | router | norm | embedding | head | other.
        role: q | k | v | o | qkv | kv | gate | up | down | gate_up | router | norm | final_norm | embedding | head | ""
            (not known).
        parameters: names of its parameters, the weight first.
        shape: (out, in) of a linear, whatever the storage; otherwise the weight's own shape.
        transposed: the weight is stored (in, out), as in GPT-2's Conv1D.
        block: (stack, index), or None outside the blocks.
        group: the attention or MLP inside the block that it belongs to ("model.layers.3.self_attn").
        slices: of a fused matrix, the output ranges of each part, e.g. {"q": ((0, 64),), "k": ((64, 96),), ...}.
    """

    module: str
    kind: Kind
    category: str
    role: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    block: tuple[str, int] | None = None
    group: str = ""
    slices: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    @property
    def weight(self) -> str:
        return self.parameters[0]

    @property
    def is_matrix(self) -> bool:
        """A linear's weight, or the stacked weights of fused experts."""
        return self.kind == "linear" or (self.kind == "loose" and len(self.shape) == 3)

    @property
    def out_axis(self) -> int:
        """The weight's axis that runs over outputs."""
        return 1 if self.transposed else 0

    def rows(self, part: str) -> Tensor:
        """Output positions of one part of a fused matrix, sorted, int64."""
        if part not in self.slices:
            raise BadInput(f"{self.module} has no part '{part}'.{did_you_mean(part, self.slices)}")
        return torch.cat([torch.arange(start, stop) for start, stop in self.slices[part]])


@dataclass(frozen=True)
class Attention:
    """One attention of a block: its matrices by role, and its heads (None where they can't be known)."""

    name: str
    matrices: Mapping[str, str]  # role -> module
    heads: int | None
    kv_heads: int | None
    head_size: int | None
    cross: bool = False


@dataclass(frozen=True)
class Block:
    """One block: its attentions, MLP matrices and norms, as module names."""

    stack: str
    index: int
    name: str
    attentions: tuple[Attention, ...]
    mlp: tuple[Piece, ...]
    norms: tuple[Piece, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Anatomy:
    """The whole model. Build it with `Anatomy.of`.

    Args:
        pieces: everything that owns parameters, in the model's order; each parameter name belongs to one piece.
        stacks: block list -> number of blocks, e.g. {"model.layers": 30}.
        blocks: all blocks, stack by stack.
        ties: second name of a tied parameter -> the name `named_parameters` gives it.
        embedding, head: the input embedding's and the output head's module, if there are.
        width: D, the size of the residual stream at the input embedding or first norm.
    """

    pieces: tuple[Piece, ...]
    stacks: Mapping[str, int]
    blocks: tuple[Block, ...]
    ties: Mapping[str, str]
    embedding: str | None
    head: str | None
    width: int
    prefix: str = ""  # what a wrapper puts before every name
    wrapped: Mapping[str, str] = field(default_factory=dict)  # canonical -> actual name, where they differ

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Look at a model. Cheap (no weights are read); safe on the meta device."""
        return find.anatomy(model)

    # ---- names

    def canonical(self, name: str) -> str:
        """A module's or parameter's name in the bare base, from its name in a wrapped model."""
        return find.canonical(name, self.prefix)

    def actual(self, name: str) -> str:
        """The inverse of `canonical` in the model that was looked at."""
        if name in self.wrapped:
            return self.wrapped[name]
        return self.prefix + name

    @cached_property
    def _by_name(self) -> dict[str, Piece]:
        index = {piece.module: piece for piece in self.pieces if piece.kind != "loose"}
        index.update({parameter: piece for piece in self.pieces for parameter in piece.parameters})
        return index

    def piece(self, name: str) -> Piece:
        """The piece that a module or parameter belongs to. Raises `BadInput` with the nearest name."""
        found = self._by_name.get(self.canonical(name))
        if found is None:
            near = did_you_mean(
                name, [n for n in self._by_name if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:20]
            )
            raise BadInput(f"The model has no module or parameter '{name}'.{near}")
        return found

    def category(self, name: str) -> str:
        """attention | mlp | mixer | router | norm | embedding | head | other, of a module or parameter."""
        return self.piece(name).category

    def block_of(self, name: str) -> tuple[str, int] | None:
        """(stack, index) of the block that a module or parameter lies in; None outside the blocks."""
        name = self.canonical(name)
        for stack, size in self.stacks.items():
            head, _, _ = name.removeprefix(stack + ".").partition(".")
            if name.startswith(stack + ".") and head.isdigit() and int(head) < size:
                return stack, int(head)
        return None

    # ---- selections

    def resolve(self, words: str | Iterable[str]) -> list[str]:
        """Module names that the words mean, in the model's order. Raises `BadInput` where one matches nothing.

        Words are united: categories ("attention", "mlp", "norm", "embedding", "head"), roles ("q", "down"),
        "all-linear", "all", "block 3", "blocks 0-5", "blocks 1,4,-1", module names or their last parts ("q_proj"),
        globs ("*.layers.3.*"), regular expressions ("re:..."). "a & b" keeps what both mean, "not a" takes away.
        """
        return words_.resolve(self, words)

    def explain(self, words: str | Iterable[str]) -> str:
        """What the words matched, one line per word: for the user to see before training."""
        return words_.explain(self, words)

    def weights(self, words: str | Iterable[str] = "all-linear") -> list[str]:
        """Names of the weight parameters of the modules that the words mean; a tied weight once."""
        return self._parameters(words, biases=False)

    def parameters(self, words: str | Iterable[str] = "all") -> list[str]:
        """As `weights`, with each module's bias."""
        return self._parameters(words, biases=True)

    def _parameters(self, words: str | Iterable[str], biases: bool) -> list[str]:
        wanted = set(self.resolve(words))
        names: dict[str, None] = {}
        for piece in self.pieces:
            if piece.module in wanted:
                chosen = piece.parameters if biases else piece.parameters[:1]
                names.update(dict.fromkeys(self.ties.get(name, name) for name in chosen))
        return list(names)

    def linears(self, in_blocks: bool = True) -> Iterator[Piece]:
        """The matrices (without embeddings and head); also those outside the blocks if not `in_blocks`."""
        for piece in self.pieces:
            if piece.kind == "linear" and piece.category != "head" and (piece.block or not in_blocks):
                yield piece
