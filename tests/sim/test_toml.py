# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables over tables: merged, compared, and a value put in; properties against each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.scenario import toml as tables

NAMES = st.sampled_from(["a", "b", "c"])
VALUES = st.one_of(st.integers(0, 3), st.booleans(), st.text("xy", max_size=2), st.lists(st.integers(0, 2), max_size=2))
TREES: st.SearchStrategy[Any] = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=3),
        st.lists(st.dictionaries(NAMES, inner, max_size=2), min_size=1, max_size=3),
    ),
    max_leaves=8,
)
FILES = st.dictionaries(NAMES, TREES, max_size=3)


@pytest.mark.parametrize(
    ("base", "own", "whole"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"t": {"a": 1, "u": {"b": 2}}}, {"t": {"u": {"c": 3}}}, {"t": {"a": 1, "u": {"b": 2, "c": 3}}}),
        ({"d": [{"a": 1}, {"a": 2}]}, {"d": [{"b": 3}]}, {"d": [{"a": 1, "b": 3}, {"a": 2}]}),
        ({"d": [{"a": 1}]}, {"d": [{}, {"a": 2}]}, {"d": [{"a": 1}, {"a": 2}]}),
        ({"d": [{"a": 1}]}, {"d": []}, {"d": []}),
        ({"l": [1, 2, 3]}, {"l": [4]}, {"l": [4]}),
        ({"t": {"a": 1}}, {"t": 2}, {"t": 2}),
        ({"t": 2}, {"t": {"a": 1}}, {"t": {"a": 1}}),
    ],
    ids=["keys", "deep", "by position", "appended", "emptied", "lists of values", "table to value", "value to table"],
)
def test_tables_are_merged(base: Any, own: Any, whole: Any) -> None:
    before = copy.deepcopy((base, own))
    assert tables.merged(base, own) == whole
    assert (base, own) == before, "neither is changed"


def test_differences_are_dotted_keys_with_both_values() -> None:
    base = {"t": {"a": 1, "b": 2}, "d": [{"n": 1}], "f": [{"x": 1}], "same": 3}
    own = {"t": {"a": 1, "b": 3}, "d": [{"n": 1}, {"n": 2}], "f": [], "same": 3.0, "new": {"k": [1]}}
    assert list(tables.differences(base, own)) == [
        ("t.b", 2, 3),
        ("d.1.n", None, 2),
        ("f.0.x", 1, None),
        ("new.k", None, [1]),
    ]


@given(FILES, FILES)
def test_what_a_file_says_holds_and_what_it_does_not_say_stays(base: Any, own: Any) -> None:
    whole = tables.merged(base, own)
    assert tables.merged(whole, own) == whole
    assert tables.merged(base, {}) == base
    assert tables.merged({}, own) == own
    for key in base.keys() - own.keys():
        assert whole[key] == base[key]


@given(FILES, FILES)
def test_there_is_no_difference_only_between_equals(one: Any, other: Any) -> None:
    assert list(tables.differences(one, one)) == []
    back = [(key, own, base) for key, base, own in tables.differences(one, other)]
    assert sorted(tables.differences(other, one), key=str) == sorted(back, key=str)


@given(FILES, st.lists(NAMES, min_size=1, max_size=3), st.integers())
def test_what_was_put_in_is_the_only_difference(tree: Any, way: list[str], value: int) -> None:
    try:
        after = tables.put(tree, way, value)
    except ValueError:
        return
    place = after
    for name in way:
        place = place[name]
    assert place == value
    dotted = ".".join(way)
    assert all(key == dotted or key.startswith(f"{dotted}.") for key, _, _ in tables.differences(tree, after))


def test_a_value_is_put_into_a_list_at_its_place_or_the_next() -> None:
    tree = {"device": [{"count": 1}]}
    assert tables.put(tree, ["device", "0", "count"], 4) == {"device": [{"count": 4}]}
    assert tables.put(tree, ["device", "1", "count"], 4) == {"device": [{"count": 1}, {"count": 4}]}
    assert tree == {"device": [{"count": 1}]}, "it is not changed"


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("device.count", "'count': must be a place in the list, 0 to 1"),
        ("device.2.count", "'2': must be a place in the list, 0 to 1"),
        ("device.00.count", "'00': must be a place in the list"),
        ("device.-1.count", "'-1': must be a place in the list"),
        ("device.9999999999.count", "'9999999999': must be a place in the list"),
        ("device.0.count.x", "'x': there is a value in front of it, not a table"),
    ],
)
def test_a_way_that_leads_nowhere_is_told(way: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tables.put({"device": [{"count": 1}]}, way.split("."), 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("4.0", 4.0),
        ("1_000", 1000),
        ("true", True),
        ("inf", float("inf")),
        ('"two words"', "two words"),
        ('["STOP_COPY", "P2P"]', ["STOP_COPY", "P2P"]),
        ('{ pattern = "uniform", mib_per_s = 3 }', {"pattern": "uniform", "mib_per_s": 3}),
        ("device", "device"),
        ("per_fd", "per_fd"),
        ("mlx5-2vf", "mlx5-2vf"),
        ("True", "True"),  # TOML's is in lower case: a word, which the scenario will refuse where it wants a boolean
    ],
)
def test_a_value_is_read_as_toml_and_a_word_as_a_string(text: str, value: Any) -> None:
    read = tables.value(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["", "two words", "[1", '"', "1 2", "4\nb = 5", "4\n[t]", ".5", "-", "a,b", 5000 * "9"]
)
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be one as in TOML, or a word"):
        tables.value(text)
