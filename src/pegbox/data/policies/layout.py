"""`layout`: how examples share the rows of a batch: padded, trimmed, packed, or one stream cut into windows.

The arrangement itself is in `data/layouts.py`. Packed rows are one row of a batch each: `batch` counts them. Attention
and positions stay inside each example, in architectures that read restarting position ids (a probe of gradients finds
out); `cross_attend: true` lets a row be one text. Composes with every objective on tokens and every tuner; not with
`rows.packing`, which packs each batch by itself.

From MFTCoder (arXiv:2311.02303); where this differs from its code: decision 0161.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pegbox.data.base import DATA, DataPolicy
from pegbox.data.collate import packing_leaks
from pegbox.data.layouts import Layout, Rows, arranged
from pegbox.errors import Unsupported
from pegbox.parts.context import Context

__all__ = ["LayoutPolicy"]


@DATA.register
class LayoutPolicy(DataPolicy):
    """Rows of at most seq_length + 1 tokens.

    Args:
        mode: padding, dynamic, pack, best_fit or concat.
        seq_length: S; examples with more than S + 1 tokens are dropped and counted (concat cuts instead). What
            `max_length` cut before is no longer too long.
        cross_attend: attention and positions run on over a packed row.
    """

    reproduces: ClassVar[str] = "arXiv:2311.02303"
    keeps_views: ClassVar[bool] = False

    kind: Literal["layout"] = "layout"
    mode: Layout = "dynamic"
    seq_length: Annotated[int, Field(ge=2)] = 4096
    cross_attend: bool = False

    def prepare(self, dataset: Sequence[dict[str, Any]], ctx: Context) -> Rows:
        """The set as rows. Raises `BadInput` where nothing is left, `Unsupported` where documents would leak."""
        if self.mode in ("pack", "best_fit", "concat") and not self.cross_attend and packing_leaks(ctx.model):
            raise Unsupported(
                f"data.layout: in {type(ctx.model).__name__} an example can see the one packed before it (found by a "
                "probe of gradients). Use mode: dynamic, or cross_attend: true if that is wanted."
            )
        return arranged(dataset, self.mode, self.seq_length, cross_attend=self.cross_attend)
