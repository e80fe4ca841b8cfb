"""4-bit base weights (NF4 or FP4) by bitsandbytes: the quantization of QLoRA (arXiv:2305.14314).

    W ~ c_block * q[code],   q: 16 quantiles of N(0, 1) (NF4),   one c per 64 weights, itself in 8 bits

Done while the model loads, where the source allows that; a source that doesn't (GGUF), or a base that was rewritten by
an earlier preparation (`while_loading: false`), is packed afterwards, with the same result. Embeddings, head and norms
stay floating.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pegbox.errors import BadInput, MissingExtra
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.files import write_json
from pegbox.parts.view import Batch
from pegbox.prepare.base import PREPARE, Preparation

__all__ = ["Nf4"]


@PREPARE.register
class Nf4(Preparation):
    """Quantize the blocks' linear layers to 4 bits.

    Args:
        quant_type: "nf4" or "fp4". double_quant: quantize the block scales too.
        compute: what products are computed in; auto: bf16 on a GPU that has it, else float32.
        skip: words for modules that stay floating.
        while_loading: let `from_pretrained` do it (less memory).
    """

    kind: Literal["nf4"] = "nf4"
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    skip: tuple[str, ...] = ()
    while_loading: bool = True

    packs_base: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    reproduces: ClassVar[str] = "arXiv:2305.14314"

    def model_post_init(self, context: Any, /) -> None:
        if self.while_loading and self.skip:
            raise BadInput("prepare.nf4.skip is resolved on the loaded model: set while_loading: false with it.")

    def load_kwargs(self) -> dict[str, Any]:
        if not self.while_loading:
            return {}
        _bitsandbytes()
        from transformers import BitsAndBytesConfig

        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quant_type,
                bnb_4bit_use_double_quant=self.double_quant,
                bnb_4bit_compute_dtype=self._compute(),
            )
        }

    def apply(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], ctx: Context) -> dict[str, Any]:
        if not getattr(model, "is_loaded_in_4bit", False):
            self._pack(model)
        return {}

    def save(self, record: dict[str, Any], folder: Path) -> None:
        write_json(folder / "nf4.json", {"version": 1, **self.model_dump(mode="json")})

    def replay(self, model: nn.Module, folder: Path) -> None:
        if not getattr(model, "is_loaded_in_4bit", False):
            self._pack(model)

    def _compute(self) -> torch.dtype:
        if self.compute != "auto":
            return getattr(torch, self.compute)
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if good else torch.float32

    def _pack(self, model: nn.Module) -> None:
        """Replace the blocks' linear layers. Raises `BadInput` where there is none, or one of another kind."""
        bnb = _bitsandbytes()
        anatomy = Anatomy.of(model)
        spared = set(anatomy.resolve(self.skip)) if self.skip else set()
        names = [piece.module for piece in anatomy.linears() if piece.module not in spared]
        if not names:
            raise BadInput("prepare.nf4: the model has no linear layer in its blocks to quantize.")
        for name in names:
            module = model.get_submodule(name)
            if type(module) is not nn.Linear:
                raise BadInput(f"prepare.nf4: '{name}' is a {type(module).__name__}; only nn.Linear can be packed.")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, self._packed(module, bnb))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]

    def _packed(self, module: nn.Linear, bnb: Any) -> nn.Module:
        packed = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=self._compute(),
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        packed.weight = bnb.nn.Params4bit(
            module.weight.data.cpu(),
            requires_grad=False,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        if module.bias is not None:
            packed.bias = module.bias
        return packed.to(module.weight.device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtra("bitsandbytes", "quant", "A 4-bit base") from None
    return bitsandbytes
