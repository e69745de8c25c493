# SPDX-License-Identifier: GPL-2.0-or-later
"""The look of protocols and resources, the same in every figure: a colour and a hatch each.

Colours are from the Okabe-Ito and Tol palettes, which differ with any colour vision; lightness and hatches make them
differ in greyscale too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from experiments.draw.canvas import Axes, Patch
from proto_v3.timeline import Resource


@dataclass(frozen=True, slots=True)
class Style:
    """A fill colour, a hatch, and a label; a marker and a line where it is a curve."""

    colour: str
    hatch: str
    label: str
    marker: str = "o"
    line: Any = "-"
    """As matplotlib takes it: a name, or lengths of dashes."""
    edge: str = "white"
    """The colour of the hatch, and of the edge if it is not white."""


RESOURCES: dict[Resource, Style] = {
    Resource.FIRMWARE: Style("#E69F00", "", "firmware SAVE"),
    Resource.LOCK: Style("#000000", "", "lock wait"),
    Resource.COPY: Style("#CC79A7", "xx", "copy (read, write)"),
    Resource.LINK: Style("#56B4E9", "..", "link"),
    Resource.LOAD: Style("#D55E00", "//", "firmware LOAD"),
    Resource.SETUP: Style("#F0E442", "\\\\", "critical set-up"),
    Resource.RAM: Style("#009E73", "--", "guest RAM"),
    Resource.FIXED: Style("#BBBBBB", "", "fixed (stop, RAM sync, config, resume)"),
}
UNEXPLAINED = Style("#FFFFFF", "///", "unexplained: scheduler, interpreter", edge="#999999")
"""The part that a live run's critical path does not cover; there is none in virtual time."""

V3_SHADES = {1: "#A6CBE3", 2: "#6BAED6", 4: "#2171B5", 8: "#084594", 16: "#042A5C", 32: "#02142C"}
BLOCKS_SHADES = {1: "#B5DDC0", 2: "#7FC596", 4: "#2E8B57", 8: "#1B6B3A", 16: "#0B3D20", 32: "#051E10"}
V3_HATCHES = {"-invalidate": "oo", "-pool": "xx", "-one": "..", "-retry": "--"}
V3_MARKERS = {1: "s", 2: "^", 4: "D", 8: "v", 16: "P", 32: "8"}
V3_LINES: dict[str, Any] = {
    "-invalidate": (0, (1, 1)),
    "-pool": "--",
    "-one": ":",
    "-retry": "-.",
    "-blocks": (0, (5, 1, 1, 1, 1, 1)),
}
V2_COLOURS = {
    "-ack-reusable": "#AA4499",
    "-reinit-flush-ack": "#8A7A00",
    "-reinit-invalidate-ack": "#8A7A00",
    "-ack": "#CC6677",
}
V2_MARKERS = {"-ack-reusable": "*", "-ack": "X", "-multifd": "h"}
V2_LINES: dict[str, Any] = {
    "-multifd": "--",
    "-reinit-flush": "-.",
    "-reinit-invalidate": (0, (1, 1)),
    "-priority": (0, (3, 1)),
}
V2_HATCHES = {"-multifd": "xx", "-reinit-flush": "..", "-reinit-invalidate": "oo", "-priority": "**", "-polls": "--"}
OTHER_MARKERS = {"-polls": "p", "-critical-first": "P", "-retry": "d"}
"""Markers for another user and another policy, which no line style is left for."""
WIRE_MARKERS = {"": "D", "-pool": "s", "-one": "v", "-blocks": "^"}
PALER = 0.4
"""The part of white in a protocol's colour if its epochs, or its REINIT, make earlier data void."""


def protocol(name: str) -> Style:
    """The look of a protocol, the same in every figure.

    v2 is wine red, or another colour with a switchover-ack. v3 is blue, or green with addressable blocks; more dirty
    streams are darker. Hatch and line show the other suffixes of the name, markers show N or the ack.
    """
    if name.startswith("v3"):
        numbers = [int(number) for number in re.findall(r"-n(\d+)", name)] or [4]
        shades = BLOCKS_SHADES if "-blocks" in name else V3_SHADES
        known = min(shades, key=lambda known: abs(known - numbers[0]))
        colour, marker, lines, hatches = shades[known], V3_MARKERS[known], V3_LINES, V3_HATCHES
    else:
        colour, marker = _first(V2_COLOURS, name, "#882255"), _first(V2_MARKERS, name, "o")
        lines, hatches = V2_LINES, V2_HATCHES
    hatch = "".join(hatch for suffix, hatch in hatches.items() if suffix in name)
    return Style(
        _paler(colour) if "-invalidate" in name else colour,
        hatch or ("" if name.startswith("v3") else "//"),
        name,
        _first(OTHER_MARKERS, name, marker),
        _first(lines, name, "-"),
    )


def wire(suffix: str, label: str) -> Style:
    """The look of v3 where N is on an axis: colour and line of N = 4; the marker shows the wire.

    `suffix` is `-pool` or `-one`, nothing for a connection a stream, or `-blocks`.
    """
    name = "v3-blocks-n4" if suffix == "-blocks" else f"v3-n4{suffix}"
    return replace(protocol(name), label=label, marker=WIRE_MARKERS[suffix])


def bar(axis: Axes, at: float, width: float, look: Style, *, left: float = 0.0, height: float = 0.7) -> None:
    """A horizontal bar at `at` of the y axis."""
    fill: dict[str, Any] = {"color": look.colour, "hatch": look.hatch, "edgecolor": look.edge}
    axis.barh(at, width, left=left, height=height, linewidth=0 if look.edge == "white" else 1, **fill)


def patch(look: Style) -> Patch:
    """A bar's entry in a legend."""
    return Patch(facecolor=look.colour, hatch=look.hatch, edgecolor=look.edge, label=look.label)


def _paler(colour: str) -> str:
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + PALER * (255 - part)):02X}" for part in parts)


def _first(looks: dict[str, Any], name: str, otherwise: str) -> Any:
    return next((look for suffix, look in looks.items() if suffix in name), otherwise)
