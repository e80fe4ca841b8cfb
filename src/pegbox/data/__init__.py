"""The data axis: rows from any source, splits, masks, encoded examples, batches; policies live in `policies/`."""

from pegbox.data.collate import ClassCollator, PackingCollator, PaddingCollator, packing_leaks, preference_records
from pegbox.data.dataset import (
    EncodedSet,
    RowSet,
    Splits,
    encode_rows,
    load_rows,
    load_splits,
    prepare_splits,
)
from pegbox.data.encode import pad_id_of
from pegbox.data.rows import Row
from pegbox.data.sources import Source
from pegbox.data.templates import ChatTemplate, resolve_template

__all__ = [
    "ChatTemplate",
    "ClassCollator",
    "EncodedSet",
    "PackingCollator",
    "PaddingCollator",
    "Row",
    "RowSet",
    "Source",
    "Splits",
    "encode_rows",
    "load_rows",
    "load_splits",
    "packing_leaks",
    "pad_id_of",
    "preference_records",
    "prepare_splits",
    "resolve_template",
]
