"""AdamW with both moments in 8 bits a number, blockwise scaled, over bitsandbytes.

The update is AdamW's (see `adamw.py`); the state is a quarter of float32's. Tensors below `min_8bit_size` numbers keep
float32 moments, since they cost nothing and quantize worst. Dettmers et al., arXiv:2110.02861. Needs the extra `quant`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from pegbox.errors import MissingExtra
from pegbox.optim.adamw import Betas, Epsilon
from pegbox.optim.base import OPTIM, Step
from pegbox.optim.groups import split_decay

__all__ = ["AdamW8bit"]


@OPTIM.register
class AdamW8bit(Step):
    """AdamW with quantized moments.

    Args:
        betas, eps: as in AdamW.
        min_8bit_size: smaller tensors keep float32 moments.
        paged: let the state move to the host when a GPU's memory runs out (CUDA only; plain elsewhere).
    """

    reproduces: ClassVar[str] = "arXiv:2110.02861"

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    min_8bit_size: Annotated[int, Field(ge=256)] = 4096
    paged: bool = False

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        try:
            from bitsandbytes import optim
        except ImportError:
            raise MissingExtra("bitsandbytes", "quant", "optim.kind=adamw_8bit") from None
        make = optim.PagedAdamW8bit if self.paged else optim.AdamW8bit
        split = _unnamed(split_decay(groups, self.weight_decay))
        return make(split, lr=self.lr, betas=self.betas, eps=self.eps, min_8bit_size=self.min_8bit_size)


def _unnamed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """bitsandbytes reads (name, tensor) pairs as tensors; names are dropped for it."""
    return [{**g, "params": [p[1] if isinstance(p, tuple) else p for p in g["params"]]} for g in groups]
