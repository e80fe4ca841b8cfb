"""The public face: lazy names, and registration with PEFT in whatever order the two are imported."""

import subprocess
import sys

import pytest

import pegbox


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "first", ["import pegbox, peft", "import peft, pegbox", "import pegbox; from peft import LoraConfig"]
)
def test_importing_pegbox_registers_its_tuners(first):
    done = run(f"{first}\nfrom peft.utils import PeftType\nprint(PeftType['PEGBOX_SPARSE'].value)")
    assert done.stdout.strip() == "PEGBOX_SPARSE", done.stderr


def test_importing_pegbox_is_light():
    done = run(
        "import sys, pegbox\nprint([m for m in ('torch', 'peft', 'transformers', 'pydantic') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_there():
    assert set(pegbox._HOMES) <= set(pegbox.__all__)
    for name in pegbox.__all__:
        assert getattr(pegbox, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        _ = pegbox.trane
