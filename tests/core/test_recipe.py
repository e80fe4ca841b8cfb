"""Recipes: YAML, overrides, merging, and errors that name the nearest valid key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.recipe import Recipe, catalogue, dump_yaml, load_recipe, merge, override, parse_override, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1e-4", 1e-4),
        ("a=no", "no"),
        ("a=010", 10),
        ("a=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("a=null", None),
        ("a=", None),
        ("a={kind: x}", {"kind": "x"}),
    ],
)
def test_values_follow_yaml_1_2(text, value):
    assert parse_override(text) == ("a", value)


def test_an_override_without_equals_is_refused():
    with pytest.raises(BadInput, match=r"dotted\.key=value"):
        parse_override("optim.lr")


def test_a_changed_kind_resets_its_block():
    block = {"tuner": {"kind": "lora", "r": 4}}
    override(block, "tuner.kind", "full")
    assert block == {"tuner": {"kind": "full"}}


def test_the_short_form_of_a_block_is_extended():
    block = {"tuner": "lora"}
    override(block, "tuner.r", 4)
    assert block == {"tuner": {"kind": "lora", "r": 4}}


def test_list_items_by_number():
    block = {"data": [{"kind": "corruption", "rate": 0.1}]}
    override(block, "data.0.rate", 0.2)
    assert block["data"][0]["rate"] == 0.2
    with pytest.raises(BadInput, match="not a position"):
        override(block, "data.1.rate", 0.2)


def test_merge_lays_blocks_over_blocks():
    base = {"tuner": {"kind": "lora", "r": 4}, "data": [1]}
    assert merge(base, {"tuner": {"r": 8}}) == {"tuner": {"kind": "lora", "r": 8}, "data": [1]}
    assert merge(base, {"tuner": {"kind": "full"}, "data": []}) == {"tuner": {"kind": "full"}, "data": []}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("abc"), plain))
def test_yaml_round_trip(value):
    assert parse_yaml(dump_yaml(value), "test") == value


def test_every_recipe_of_the_catalogue_is_valid_and_round_trips():
    assert catalogue()
    for name in catalogue():
        recipe = load_recipe(name)
        assert recipe.title, name
        again = Recipe.of(recipe.plain())
        assert again.digest() == recipe.digest(), name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.learning_rate=1"], ["optim.learning_rate", "lr"]),
        (["objctive={kind: tokens}"], ["objctive", "objective"]),
        (["tuner.kind=lorra"], ["lorra", "lora"]),
        (["optim.lr=-1"], ["optim.lr", "greater than 0"]),
        (["tuner.rank=4"], ["tuner.rank", "r"]),
    ],
)
def test_faults_name_the_key_and_the_nearest_valid_one(overrides, words):
    with pytest.raises(BadInput) as caught:
        load_recipe("lora", overrides)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(BadInput, match="Did you mean 'lora'"):
        load_recipe("loraa")


def test_broken_yaml_says_where(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("tuner: {kind: lora\noptim: 3")
    with pytest.raises(BadInput, match=r"r\.yaml is not valid YAML(.|\n)*line"):
        load_recipe(path)


def test_the_title_does_not_enter_the_digest():
    assert load_recipe("lora").digest() == load_recipe("lora", ["title=x"]).digest()
    assert load_recipe("lora").digest() != load_recipe("lora", ["tuner.r=4"]).digest()
