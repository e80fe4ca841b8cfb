from __future__ import annotations

import pytest

from pegbox.models import resolve


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PEGBOX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def source(tmp_path, llama, tokenizer):
    """A tiny base on disk."""
    llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return resolve(tmp_path / "base")
