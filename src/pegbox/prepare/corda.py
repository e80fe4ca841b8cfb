"""CorDA: LoRA that starts from a decomposition of the weights oriented by what the layers see.

    W = U S V^^T (oriented by C = mean X^T X);   A, B <- r components;   W <- W - B A, frozen

"CorDA: Context-Oriented Decomposition Adaptation of Large Language Models" (arXiv:2406.05223). ipm trains the
directions that the task at hand uses most (calibrate on the task's rows); kpm those that knowledge to be kept uses
least (calibrate on text that stands for it). The adapter is PEFT's own LoRA and only means something on the rewritten
base; `corda_export.to_plain_lora` turns it into one over the original base. The mathematics is in `oriented`.

The factors are unbalanced by the covariance's scale (||B|| far above ||A||), so rates above 2e-4 can diverge under
Adam; `balance: balanced` splits them evenly.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.anatomy import Anatomy, Piece
from pegbox.parts.context import Context
from pegbox.parts.files import write_json, write_tensors
from pegbox.parts.initial import pending, set_initial
from pegbox.parts.statistics import StatSpec, fingerprint
from pegbox.parts.view import Batch
from pegbox.prepare.base import PREPARE, Preparation
from pegbox.prepare.calibration import block_covariances, row_batches, text_batches
from pegbox.prepare.oriented import Oriented, balanced, decompose, factors_of
from pegbox.prepare.weights import dense_weight, is_packed, write_weight

__all__ = ["Corda", "Factors", "take_out"]

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> A (r, n), B (m, r), of scale 1
_SMALL = 2048  # widths up to which float64 is affordable


@PREPARE.register
class Corda(Preparation):
    """Take r data-oriented components out of each target matrix and hand them to LoRA.

    Args:
        mode: "ipm" (learn the task: the largest components) or "kpm" (keep knowledge: the smallest).
        rank: r; the tuner's `r` must be the same number.
        targets: words for modules; the tuner's `target_modules` must name the same.
        calibration: a text file of what is to be kept or learnt, or "rows": the run's training rows. Default: rows for
            ipm; kpm has none, since rows of the new task say nothing of what to keep.
        samples, length: calibration sequences, and the most tokens of each.
        power: of the covariance; 0.5 minimises the expected output error.
        balance: "official" factors, or "balanced" (free of the covariance's scale).
        normalize: of each sequence: divided by its largest absolute entry, by |largest entry| (official), or not.
        damping, threshold: see `oriented.damped`.
        precision: of the decomposition; auto: float64 up to a width of 2048.
        dequantize_for_init: allow a packed base; the rest is packed again, at the cost of its rounding.
    """

    kind: Literal["corda"] = "corda"
    mode: Literal["kpm", "ipm"] = "ipm"
    rank: Annotated[int, Field(ge=1)] = 128
    targets: tuple[str, ...] = ("all-linear",)
    calibration: str | None = None
    samples: Annotated[int, Field(ge=1)] = 256
    length: Annotated[int, Field(ge=1)] = 2048
    power: Annotated[float, Field(gt=0, le=1)] = 1.0
    balance: Literal["official", "balanced"] = "official"
    normalize: Literal["abs_max", "signed_max", "none"] = "abs_max"
    damping: Annotated[float, Field(gt=0)] = 0.01
    threshold: Annotated[float, Field(gt=0)] = 0.05
    precision: Literal["auto", "float32", "float64"] = "auto"
    dequantize_for_init: bool = False

    needs_batches: ClassVar[bool] = True
    leaves_factors: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2406.05223"

    @property
    def needs_floating_base(self) -> bool:  # type: ignore[override]
        return not self.dequantize_for_init

    def model_post_init(self, context: Any, /) -> None:
        if self.mode == "kpm" and self.calibration is None:
            raise BadInput(
                "prepare.corda: mode 'kpm' keeps what its calibration text stands for; name it with calibration: FILE "
                "(plain text), or say calibration: rows if the training rows are meant."
            )

    def apply(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], ctx: Context) -> dict[str, Any]:
        anatomy = Anatomy.of(model)
        pieces = self._targets(model, anatomy)
        mark = fingerprint(model, anatomy, [piece.module for piece in pieces])
        factors: Factors = {}
        for group, covariances in block_covariances(
            model, anatomy, pieces, self._spec(pieces), self._rows(batches, ctx)
        ):
            for piece in group:
                factors[piece.module] = self._decompose(model, anatomy, piece, covariances)
        take_out(model, anatomy, factors)
        set_initial(model, factors)
        return {"factors": factors, "base": mark, "after": fingerprint(model, anatomy, factors)}

    def save(self, record: dict[str, Any], folder: Path) -> None:
        tensors = {f"{n}.{k}": t for n, pair in record["factors"].items() for k, t in zip("AB", pair)}
        write_tensors(folder / "factors.safetensors", tensors)
        write_json(folder / "corda.json", {"version": 1, "base": record["base"], "rank": self.rank, "mode": self.mode})

    def replay(self, model: nn.Module, folder: Path) -> None:
        factors, base = read_factors(folder)
        anatomy = Anatomy.of(model)
        for name, (a, b) in factors.items():
            if name not in {p.module for p in anatomy.pieces} or anatomy.piece(name).shape != (b.shape[0], a.shape[1]):
                raise WrongBase(
                    f"The prepared matrix '{name}' of shape {(b.shape[0], a.shape[1])} isn't in this model."
                )
        mark = fingerprint(model, anatomy, factors)
        if mark != base and not _rounded_copy(model):
            raise WrongBase(f"The base was decomposed with fingerprint {base}; this one's matrices have {mark}.")
        take_out(model, anatomy, factors)
        set_initial(model, factors)

    # ---- steps

    def _targets(self, model: nn.Module, anatomy: Anatomy) -> list[Piece]:
        names = set(anatomy.resolve(self.targets))
        pieces = [piece for piece in anatomy.pieces if piece.module in names]
        for piece in pieces:
            if piece.kind != "linear" or piece.category == "head":
                raise BadInput(
                    f"prepare.corda: '{piece.module}' is no matrix inside the model; leave it out of targets."
                )
            if piece.module in pending(model):
                raise BadInput(f"'{piece.module}' was decomposed already; the same model can't be prepared twice.")
            if self.rank > min(piece.shape):
                raise BadInput(f"prepare.corda.rank {self.rank} is above the {min(piece.shape)} of '{piece.module}'.")
            if is_packed(model.get_submodule(anatomy.actual(piece.module))) and not self.dequantize_for_init:
                raise BadInput(
                    f"'{piece.module}' is packed. Decompose before quantizing, or set dequantize_for_init: true."
                )
        return pieces

    def _spec(self, pieces: list[Piece]) -> StatSpec:
        small = max(piece.shape[1] for piece in pieces) <= _SMALL
        wide = self.precision == "float64" or (self.precision == "auto" and small)
        return StatSpec(
            ("input_covariance",),
            targets=tuple(piece.module for piece in pieces),
            weigh="sequence",
            normalize=self.normalize,
            dtype="float64" if wide else "float32",
        )

    def _rows(self, batches: Callable[[], Iterable[Batch]], ctx: Context) -> list[Mapping[str, Any]]:
        if self.calibration in (None, "rows"):
            return row_batches(batches(), self.samples, self.length)
        generator = ctx.generator("corda", "calibration")
        return text_batches(Path(str(self.calibration)), ctx.tokenizer, self.samples, self.length, generator)

    def _decompose(
        self, model: nn.Module, anatomy: Anatomy, piece: Piece, covariances: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        covariance = covariances.get(piece.module)
        if covariance is None and ".experts." not in piece.group:
            raise BadInput(f"'{piece.module}' was never run on the calibration rows, so it has no covariance.")
        if covariance is None:
            warnings.warn(f"expert '{piece.module}' was never chosen; it is decomposed without data", stacklevel=2)
        weight = dense_weight(model.get_submodule(anatomy.actual(piece.module)), piece)
        parts: Oriented = decompose(
            weight.to(covariance) if covariance is not None else weight,
            covariance,
            power=self.power,
            damping=self.damping,
            threshold=self.threshold,
        )
        a, b = factors_of(parts, self.rank, self.mode)
        if self.balance == "balanced":
            a, b = balanced(a, b)
        return a.float().cpu().contiguous(), b.float().cpu().contiguous()


@torch.no_grad()
def take_out(model: nn.Module, anatomy: Anatomy, factors: Factors) -> None:
    """W <- W - B A in float32, then the weight's own dtype: the same bits from the same factors."""
    for name, (a, b) in factors.items():
        piece, module = anatomy.piece(name), model.get_submodule(anatomy.actual(name))
        weight = dense_weight(module, piece)
        write_weight(module, piece, weight - (b.to(weight) @ a.to(weight)))


def read_factors(folder: Path) -> tuple[Factors, str]:
    """What `Corda.save` wrote: factors by module, and the base's fingerprint. Raises `Corrupt`."""
    from safetensors.torch import load_file

    try:
        facts = json.loads((folder / "corda.json").read_text(encoding="utf-8"))
        held = load_file(str(folder / "factors.safetensors"))
        names = list(dict.fromkeys(key.removesuffix(".A").removesuffix(".B") for key in held))
        return {name: (held[name + ".A"], held[name + ".B"]) for name in names}, str(facts["base"])
    except Exception as error:
        raise Corrupt(f"{folder} is no readable record of a decomposition ({error}).") from error


def _rounded_copy(model: nn.Module) -> bool:
    """Whether the model is held in fewer bits than float32, so that its sampled entries may differ by rounding."""
    return next(model.parameters()).dtype not in (torch.float32, torch.float64)
