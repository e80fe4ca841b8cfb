"""Shared fixtures: tiny models, few threads (xdist runs several workers), where golden vectors and real data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GOLDEN = Path(os.environ.get("PEGBOX_GOLDEN", Path(__file__).parent / "golden" / "data"))
DATA = Path(os.environ.get("PEGBOX_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


def golden_cases(slug: str, pattern: str) -> list[Path]:
    """Every case file of a system whose name matches `pattern`; none is a skip that says where it looked."""
    return sorted((GOLDEN / slug).glob(pattern))


@pytest.fixture
def llama():
    from pegbox.testing import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer():
    from pegbox.testing import tiny_tokenizer

    return tiny_tokenizer()
