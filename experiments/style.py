"""How things look, the same in every figure: a colour and a hatch for each protocol and each resource.

Colours are of the Okabe-Ito and Tol palettes (told apart with any colour vision); their lightness and the hatches tell
them apart in greyscale too.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto_v3.timeline import Resource


@dataclass(frozen=True, slots=True)
class Look:
    """A fill colour, a hatch, and a label."""

    colour: str
    hatch: str
    label: str


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


def protocol(name: str) -> Look:
    """The look of a protocol. v3 gets darker with the number of its dirty streams."""
    if name == "v2":
        return Look("#882255", "//", "v2")
    streams = int(name.removeprefix("v3-n"))
    shades = {1: "#A6CBE3", 2: "#6BAED6", 4: "#2171B5", 8: "#084594", 16: "#042A5C"}
    return Look(shades[max(known for known in shades if known <= streams)], "", name)
