from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PEGBOX_CACHE", str(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path, llama, tokenizer):
    """A tiny model's folder, float32, in one file."""
    folder = tmp_path / "base"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
