"""GGUF files: unpacked to float32 once, then kept as safetensors in the cache, so that later loads take about a second.

The kept copy is named by the file's fingerprint and by the version of transformers that unpacked it (configurations
and tokenizers are worked out anew by each version). It holds float32 whatever dtype is asked for later.
"""

from __future__ import annotations

from pathlib import Path

from pegbox.errors import Corrupt
from pegbox.models.cache import cached_folder
from pegbox.models.fingerprint import fingerprint_gguf

__all__ = ["unpacked"]


def unpacked(file: Path) -> Path:
    """The folder with the unpacked model and its tokenizer. Raises `Corrupt` if the file can't be read."""
    import transformers

    fingerprint = fingerprint_gguf(file)
    return cached_folder("gguf", f"{fingerprint}-{transformers.__version__}", lambda into: _unpack(file, into))


def _unpack(file: Path, into: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **place)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise Corrupt(f"{file} can't be unpacked by transformers ({error}).") from error
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # the tensors are float32 by now; the label would forbid saving them as such
        quantizer.remove_quantization_config(model)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
