"""The one place that extends PEFT's enum: fails loudly when PEFT's or enum's insides change."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from pegbox.tuners.registration import add_peft_type, register
from pegbox.tuners.sparse import SparseConfig, SparseModel

SPARSE = add_peft_type("PEGBOX_SPARSE")


def test_the_member_is_a_member_in_every_way_peft_asks():
    assert PeftType["PEGBOX_SPARSE"] is SPARSE is PeftType("PEGBOX_SPARSE") is PeftType.PEGBOX_SPARSE
    assert SPARSE in list(PeftType)
    assert isinstance(SPARSE, PeftType)
    assert "PEGBOX_SPARSE" in list(PeftType)  # how PEFT's own register_peft_method asks
    assert SPARSE == "PEGBOX_SPARSE"
    assert SPARSE.value == SPARSE.name == "PEGBOX_SPARSE"
    assert json.dumps({"t": SPARSE}) == '{"t": "PEGBOX_SPARSE"}'
    assert copy.deepcopy(SPARSE) is SPARSE
    assert pickle.loads(pickle.dumps(SPARSE)) is SPARSE
    assert len({*PeftType}) == len(list(PeftType))
    assert hash(SPARSE) == hash(PeftType("PEGBOX_SPARSE"))


def test_no_other_member_was_disturbed():
    for member in PeftType:
        assert PeftType(member.value) is member
        assert getattr(PeftType, member.name) is member


def test_peft_knows_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[SPARSE] is SparseConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[SPARSE] is SparseModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[SPARSE] == "sparse_"


def test_registering_again_is_no_error_and_another_class_is():
    register("pegbox_sparse", SparseConfig, SparseModel, "sparse_")
    with pytest.raises(RuntimeError, match="is taken by"):
        register("pegbox_sparse", PeftConfig, SparseModel, "sparse_")


def test_a_saved_config_comes_back_as_our_class(tmp_path):
    SparseConfig(coordinates="absolute").save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, SparseConfig)
    assert loaded.coordinates == "absolute"
    assert loaded.allocation == "stored"
    assert isinstance(get_peft_config({"peft_type": "PEGBOX_SPARSE"}), SparseConfig)
