# SPDX-License-Identifier: GPL-2.0-or-later
"""Text from outside is shown without what steers a terminal, and never longer than asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.text import MOST_CHARS, clean


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mlx5 VF, 300 µs, 日本", "mlx5 VF, 300 µs, 日本"),
        ("\x1b]0;pwn\x07\x1b[2Jhello", r"\x1b]0;pwn\x07\x1b[2Jhello"),
        ("\x9b2J", r"\x9b2J"),
        ("a\rb\bc\x00\x7f", r"a\x0db\x08c\x00\x7f"),
        ("exe\u202egnp.\u2066x\u200b", r"exe\u202egnp.\u2066x\u200b"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\U000e0041", r"\U000e0041"),
        ("a\nb\tc\u2028d\u00a0e", "a b c d e"),
    ],
)
def test_what_is_not_printable_is_shown(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_a_line_break_stays_where_asked() -> None:
    assert clean("a\nb\r\nc", lines=True) == "a\nb\\x0d\nc"


def test_a_long_text_is_cut() -> None:
    assert clean("x" * MOST_CHARS) == "x" * MOST_CHARS
    assert clean("x" * (MOST_CHARS + 1)) == "x" * (MOST_CHARS - 3) + "..."
    assert clean("\x00" * 9, most=10) == "\\x00\\x0..."


@given(st.text(), st.integers(0, 40), st.booleans())
def test_every_text_is_printable_bounded_and_stays_when_cleaned_again(text: str, most: int, lines: bool) -> None:
    shown = clean(text, most, lines)
    assert len(shown) <= most
    assert (shown.replace("\n", "") if lines else shown).isprintable()
    assert clean(shown, most, lines) == shown
