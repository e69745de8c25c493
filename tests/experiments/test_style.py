# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks: each protocol has one of its own."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from experiments.draw import style
from experiments.study.experiment import NAMES, find

SWEPT = sorted({point.protocol for name in NAMES for point in find(name).points(False)})


def test_no_two_protocols_of_the_experiments_look_alike() -> None:
    seen: dict[tuple[str, str, str], str] = {}
    for name in SWEPT:
        if (n := re.search(r"-n(\d+)", name)) and int(n[1]) not in style.V3_SHADES:
            continue  # it looks like the nearest power of two
        look = style.protocol(name)
        of_all = name if name != "v3-blocks" else "v3-blocks-n4"  # another name for it
        assert seen.setdefault((look.colour, look.marker, str(look.line)), of_all) == of_all
        assert look.label == name
    assert len(seen) > 30


@pytest.mark.parametrize("of", ["V3_SHADES", "BLOCKS_SHADES"])
def test_more_streams_are_darker_in_greyscale_too(of: str) -> None:
    shades = getattr(style, of)
    luminance = [_luminance(shades[n]) for n in sorted(shades)]
    assert luminance == sorted(luminance, reverse=True)
    assert min(a - b for a, b in pairwise(luminance)) > 8


def test_a_wire_has_the_colour_and_line_of_its_protocol() -> None:
    for suffix, name in (("", "v3-n4"), ("-pool", "v3-n4-pool"), ("-one", "v3-n4-one"), ("-blocks", "v3-blocks-n4")):
        look, known = style.wire(suffix, "told"), style.protocol(name)
        assert (look.colour, look.line, look.label) == (known.colour, known.line, "told")


def _luminance(colour: str) -> float:
    assert re.fullmatch("#[0-9A-F]{6}", colour)
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue
