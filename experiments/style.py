"""How things look, the same in every figure: a colour and a hatch for each protocol and each resource.

Colours are of the Okabe-Ito and Tol palettes (told apart with any colour vision); their lightness and the hatches tell
them apart in greyscale too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from proto_v3.timeline import Resource


@dataclass(frozen=True, slots=True)
class Look:
    """A fill colour, a hatch, and a label; a marker and a line where it is a curve."""

    colour: str
    hatch: str
    label: str
    marker: str = "o"
    line: Any = "-"
    """What matplotlib takes: a name, or lengths of dashes."""


RESOURCES: dict[Resource, Look] = {
    Resource.FIRMWARE: Look("#E69F00", "", "firmware SAVE"),
    Resource.LOCK: Look("#000000", "", "lock wait"),
    Resource.COPY: Look("#CC79A7", "xx", "copy (read, write)"),
    Resource.LINK: Look("#56B4E9", "..", "link"),
    Resource.LOAD: Look("#D55E00", "//", "firmware LOAD"),
    Resource.SETUP: Look("#F0E442", "\\\\", "critical set-up"),
    Resource.RAM: Look("#009E73", "--", "guest RAM"),
    Resource.FIXED: Look("#BBBBBB", "", "fixed (stop, RAM sync, config, resume)"),
}


UNEXPLAINED = Look("#FFFFFF", "///", "unexplained: scheduler, interpreter")
"""What a live run's critical path does not cover; in virtual time there is none."""

V3_SHADES = {1: "#A6CBE3", 2: "#6BAED6", 4: "#2171B5", 8: "#084594", 16: "#042A5C"}
BLOCKS_SHADES = {1: "#B5DDC0", 2: "#7FC596", 4: "#2E8B57", 8: "#1B6B3A", 16: "#0B3D20"}
V3_HATCHES = {"-invalidate": "oo", "-pool": "xx", "-one": "..", "-retry": "--"}
V3_MARKERS = {1: "s", 2: "^", 4: "D", 8: "v", 16: "P"}
V3_LINES = {"-invalidate": (0, (1, 1)), "-pool": "--", "-one": ":", "-retry": "-."}
V2_LINES = {"-multifd": "--", "-reinit-flush": "-.", "-reinit-invalidate": ":"}
V2_MARKERS = {"-ack-reusable": "*", "-ack": "X", "-multifd": "h"}
V2_COLOURS = {"-ack-reusable": "#E8B4C8", "-ack": "#CC6677"}
V2_HATCHES = {"-multifd": "xx", "-reinit-flush": "..", "-reinit-invalidate": "oo", "-polls": "--"}


def protocol(name: str) -> Look:
    """The look of a protocol. v2 is wine red, lighter with a switchover-ack; v3 is blue, with addressable blocks green,
    darker with the number of its dirty streams. Hatch and line tell what else their names say, markers N or the ack."""
    if not name.startswith("v3"):
        colour = next((colour for suffix, colour in V2_COLOURS.items() if suffix in name), "#882255")
        hatch = "".join(hatch for suffix, hatch in V2_HATCHES.items() if suffix in name)
        return Look(colour, hatch or "//", name, _first(V2_MARKERS, name, "o"), _first(V2_LINES, name, "-"))
    numbers = [int(number) for number in re.findall(r"-n(\d+)", name)] or [4]
    shades = BLOCKS_SHADES if "-blocks" in name else V3_SHADES
    hatch = "".join(hatch for suffix, hatch in V3_HATCHES.items() if suffix in name)
    known = max(known for known in shades if known <= numbers[0])
    return Look(shades[known], hatch, name, V3_MARKERS[known], _first(V3_LINES, name, "-"))


def _first(looks: dict[str, Any], name: str, otherwise: str) -> Any:
    return next((look for suffix, look in looks.items() if suffix in name), otherwise)
