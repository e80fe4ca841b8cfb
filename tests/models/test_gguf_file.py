"""The layout of a GGUF file, against gguf's own writer and reader."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from pegbox.errors import Corrupt
from pegbox.models.gguf_file import packed_tensors


@pytest.fixture
def file(tmp_path):
    """Every kind of value, a float and a quantized tensor, an alignment of 64."""
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_custom_alignment(64)
    writer.add_array("words", ["a", "größer", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("nested", [[1, 2], [3, 4]])
    writer.add_bool("yes", True)
    writer.add_float64("x", 0.5)
    writer.add_uint16("y", 7)
    writer.add_tensor("one", np.arange(10, dtype=np.float32))
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = quants.quantize(values, GGMLQuantizationType.Q4_1)
    writer.add_tensor("two", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_agrees_with_ggufs_reader(file):
    raw = file.read_bytes()
    expected = GGUFReader(str(file)).tensors
    found = packed_tensors(file)
    assert [t.name for t in found] == ["one", "two"]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.type == theirs.tensor_type.name
        assert mine.shape == tuple(int(n) for n in theirs.shape)
        assert raw[mine.start : mine.stop] == theirs.data.tobytes()


@pytest.mark.parametrize("length", [0, 3, 20, 100, -1])
def test_a_truncated_or_foreign_file_is_named(file, length):
    raw = file.read_bytes()
    tensors_end = max(t.stop for t in packed_tensors(file))
    file.write_bytes(raw[: tensors_end + length] if length < 0 else raw[:length])
    with pytest.raises(Corrupt, match=r"a\.gguf"):
        packed_tensors(file)
    file.write_bytes(b"ZZZZ" + raw[4:])
    with pytest.raises(Corrupt, match="start with 'GGUF'"):
        packed_tensors(file)
