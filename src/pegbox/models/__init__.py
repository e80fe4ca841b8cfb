"""Base models: where they come from, what identifies them, how they are loaded."""

from pegbox.models.cache import cache_dir, cached_folder
from pegbox.models.fingerprint import fingerprint_model, fingerprint_tensors
from pegbox.models.gguf import unpacked_model
from pegbox.models.loading import (
    TASK_CLASSES,
    Loaded,
    Precision,
    load,
    load_meta,
    load_tokenizer,
    pick_device,
    unpacked_folder,
)
from pegbox.models.packages import Alias, aliases
from pegbox.models.source import Source, resolve

__all__ = [
    "TASK_CLASSES",
    "Alias",
    "Loaded",
    "Precision",
    "Source",
    "aliases",
    "cache_dir",
    "cached_folder",
    "fingerprint_model",
    "fingerprint_tensors",
    "load",
    "load_meta",
    "load_tokenizer",
    "pick_device",
    "resolve",
    "unpacked_folder",
    "unpacked_model",
]
