# SPDX-License-Identifier: GPL-2.0-or-later
"""Every rule of docs/v2.md and docs/protocol-v3.md has a test, and the documents name the tests that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rules import DOCS, names_by_rule, rules, with_tests


def test_every_rule_has_a_number_of_its_own() -> None:
    assert len(rules()) == len(set(rules()))
    assert len(rules()) > 100


def test_every_rule_has_a_test() -> None:
    assert [rule for rule in rules() if rule not in names_by_rule()] == []


def test_no_test_is_marked_with_a_rule_that_there_is_not() -> None:
    assert set(names_by_rule()) - set(rules()) == set()


@pytest.mark.quick
@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_the_column_of_tests_is_that_of_the_marks(doc: Path) -> None:
    """If not: `make docs`."""
    text = doc.read_text(encoding="utf-8")
    assert with_tests(text, names_by_rule()) == text
