"""Fakes and batteries for pegbox's own tests and for those of third-party parts. No downloads."""

from pegbox.testing.fakes import tiny_llama, tiny_tokenizer

__all__ = ["tiny_llama", "tiny_tokenizer"]
