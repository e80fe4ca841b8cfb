"""GGUF files: unpacked to float32 once, then kept as safetensors in the cache, so that later loads take about a second.

The kept copy is named by the file's fingerprint and by the version of transformers that unpacked it (configurations
and tokenizers are worked out anew by each version). It holds float32 whatever dtype is asked for later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pegbox.errors import Corrupt
from pegbox.models.cache import cached_folder
from pegbox.models.fingerprint import fingerprint_gguf

__all__ = ["unpacked", "unpacked_model"]


def unpacked(file: Path) -> Path:
    """The folder with the unpacked model and its tokenizer. Raises `Corrupt` if the file can't be read."""
    import transformers

    fingerprint = fingerprint_gguf(file)
    return cached_folder("gguf", f"{fingerprint}-{transformers.__version__}", lambda into: _unpack(file, into))


def unpacked_model(file: Path) -> Any:
    """The model in a GGUF file as float32, not kept in the cache. Raises `Corrupt`."""
    import torch
    from transformers import AutoModelForCausalLM

    with _explained(file):
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, gguf_file=file.name)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # the tensors are float32 by now; the label would forbid saving them as such
        quantizer.remove_quantization_config(model)
    return model.eval()


def _unpack(file: Path, into: Path) -> None:
    from transformers import AutoTokenizer

    unpacked_model(file).save_pretrained(into)
    with _explained(file):
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(into)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise Corrupt(f"{file} can't be unpacked by transformers ({error}).") from error
