# SPDX-License-Identifier: GPL-2.0-or-later
"""Text from outside, made safe to show: what a peer, a file or a table says must not steer the reader's terminal."""

from __future__ import annotations

from unicodedata import category

MOST_CHARS = 300
CUT = "..."


def clean(text: str, most: int = MOST_CHARS, lines: bool = False) -> str:
    r"""`text` with printable characters only, at the most `most` of them.

    What is not printable is shown as \xNN, \uNNNN or \UNNNNNNNN: terminal escapes and other control characters, marks
    that turn the direction of writing, zero-width characters, lone surrogates, characters that Unicode does not
    assign. A line break, a tab and a space of any width become one space each; with `lines`, "\n" stays. A text that
    is cut ends in "...". A clean text is returned unchanged.
    """
    shown = "".join(
        char if char.isprintable() or (lines and char == "\n") else _shown(char) for char in text[: most + 1]
    )
    return shown if len(shown) <= most else shown[: max(0, most - len(CUT))] + CUT[:most]


def _shown(char: str) -> str:
    if char in "\n\t" or category(char) in ("Zs", "Zl", "Zp"):
        return " "
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
