# SPDX-License-Identifier: GPL-2.0-or-later
"""The grid of read_scaling: its places, the rates of each by theory, and the measures of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import polars as pl

from experiments.draw import style
from experiments.runs.frame import COMPLETED, number
from experiments.study.effects import places
from experiments.study.experiment import Point
from experiments.study.statistics import Usl, usl
from sim.scenario.file import load
from sim.scenario.scenario import Scenario
from sim.scenario.units import GIB, MIB, NS_PER_S
from sim.theory.rates import stopped_gib_per_s

BASE = "stop-only"
STREAMS = (1, 2, 4, 8, 16, 32)
QUICK_STREAMS = (1, 4, 16)
FEW_STREAMS = (1, 4, 16)
"""Where something beside lock and engines changes."""
ENGINES = (1.0, 2.5, 4.0, 8.0, 16.0)
"""2.5 is what mlx5's published figures were fitted with; the others are assumed."""
QUICK_ENGINES = (1.0, 16.0)
GLOBAL_ENGINES = (1.0, 2.5, 4.0, 16.0)
COPY_GIB_PER_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""From below what one engine saves (0.75 GiB/s) to several times that."""
QUICK_COPY_GIB_PER_S = (0.5,)
LINK_GBIT_PER_S = (10.0, 25.0, 50.0, 100.0)
READ_MIB = (0.5, 4.0)
MOST_A_CONNECTION_GBIT_PER_S = 100.0
LEAST_N = 4
"""The least number of different N for a fit of the law."""
V2 = ("v2", "v2-multifd")

PARTS = {
    "read": "copy and lock",
    "SAVE": "firmware at the source",
    "link": "the network",
    "LOAD": "firmware at the target",
}
"""The parts of the critical path that may bind while the state moves."""
LOOKS = {
    "none": style.Style("#999999", "", "no lock", "o", ":"),
    "per_fd": style.Style("#332288", "", "a lock a fd", "s", "-"),
    "device": style.Style("#E69F00", "", "a lock a device", "^", "--"),
    "global": style.Style("#000000", "", "one lock for all", "D", "-"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """What a run is made with, beside N. The defaults are the base point."""

    lock: str = "per_fd"
    engines: float = 16.0
    copy_gib_per_s: float = 8.0
    link_gbit_per_s: float = 400.0
    read_mib: float = 1.0

    @property
    def settings(self) -> tuple[str, ...]:
        """KEY=VALUE."""
        return (
            f"driver.lock={self.lock}",
            f"firmware.engines={self.engines:g}",
            f"host.copy_gib_per_s={self.copy_gib_per_s:g}",
            f"link.gbit_per_s={self.link_gbit_per_s:g}",
            f"link.per_connection_gbit_per_s={min(self.link_gbit_per_s, MOST_A_CONNECTION_GBIT_PER_S):g}",
            f"vmm.read_mib={self.read_mib:g}",
        )

    def point(self, kind: str, streams: int = 1) -> Point:
        """A run of it."""
        protocol = kind if kind in V2 else f"{kind}-n{streams}"
        return Point(BASE, protocol, self.settings, {"kind": kind, "streams": streams, **asdict(self)})

    def of(self, frame: pl.DataFrame, kind: str = "v3", **where: int) -> pl.DataFrame:
        """Its runs."""
        return frame.filter(kind=kind, **asdict(self), **where)

    @property
    def text(self) -> str:
        """In words."""
        return (
            f"{LOOKS[self.lock].label}, {engines(self.engines)}, copy {self.copy_gib_per_s:g} GiB/s, "
            f"link {self.link_gbit_per_s:g} Gbit/s, reads of {self.read_mib:g} MiB"
        )

    def bounds_gib_per_s(self, streams: int) -> dict[str, float]:
        """The rates of firmware, read() and link with this number of streams, by theory."""
        return stopped_gib_per_s(scenario(self), streams)

    def bound(self, streams: int) -> str:
        """The part that binds, by these rates."""
        bounds = self.bounds_gib_per_s(streams)
        return min(bounds, key=bounds.__getitem__)


PLACE = tuple(field.name for field in fields(Place))


def engines(count: float) -> str:
    """In words."""
    return f"{count:g} engine{'' if count == 1 else 's'}"


@lru_cache
def scenario(place: Place | None = None) -> Scenario:
    """The base, or a place's."""
    return load(BASE, place.settings if place else ())


def points(quick: bool) -> list[Point]:
    """Lock x engines x N; around the base point: copy rate, link, read size, blocks; and v2."""
    streams, few = (QUICK_STREAMS, QUICK_STREAMS) if quick else (STREAMS, FEW_STREAMS)
    many = QUICK_ENGINES if quick else ENGINES
    copies = QUICK_COPY_GIB_PER_S if quick else COPY_GIB_PER_S
    locks, ends = ("per_fd", "global"), (ENGINES[0], ENGINES[-1])
    grid = [(Place(lock="per_fd", engines=each), n) for each in many for n in streams]
    grid += [(Place(lock="global", engines=each), n) for each in many if each in GLOBAL_ENGINES for n in streams]
    grid += [(Place(lock=lock), n) for lock in ("none", "device") for n in streams]
    grid += [(Place(lock, each, copy), n) for copy in copies for lock in locks for each in ends for n in few]
    grid += [(Place(link_gbit_per_s=link), n) for link in LINK_GBIT_PER_S[: 1 if quick else None] for n in few]
    if not quick:
        grid += [(Place(lock, read_mib=size), n) for size in READ_MIB for lock in locks for n in (1, 16)]
    return [
        *(place.point("v3", n) for place, n in grid),
        *(Place(lock=lock).point("v3-blocks", n) for lock in ("none", "per_fd") for n in streams),
        *(Place(engines=each).point(name) for each in ends for name in V2),
    ]


# --- what the runs of the grid are ------------------------------------------------------------------------------------


def v3_places(frame: pl.DataFrame) -> Iterator[tuple[Place, int, pl.DataFrame]]:
    """All places with dirty streams: the place, N, and their runs."""
    for at, runs in places(frame.filter(kind="v3"), [*PLACE, "streams"]):
        yield Place(**{name: at[name] for name in PLACE}), at["streams"], runs


def with_parts(frame: pl.DataFrame) -> pl.DataFrame:
    """With `stop_copy_ns`; `gib_per_s`, the state over that time; and each part of the critical path, as `read_ns`.

    Fixed costs are left out, and so is what finishing the load takes, which is the same however the state came.
    """
    finish_ns = round(scenario().firmware.load_finish_ms * 1e6)
    gib = scenario().device[0].state_mib * MIB / GIB
    return frame.with_columns(
        stop_copy_ns=pl.col("phase_drain_ns") + pl.col("phase_transfer_ns"),
        read_ns=pl.col("path_copy_ns") + pl.col("path_lock_ns"),
        SAVE_ns=pl.col("path_firmware_ns"),
        link_ns=pl.col("path_link_ns"),
        LOAD_ns=(pl.col("path_load_ns") - finish_ns).clip(lower_bound=0),
    ).with_columns(gib_per_s=gib * NS_PER_S / pl.col("stop_copy_ns"))


def shares(runs: pl.DataFrame) -> dict[str, float]:
    """Each part's share of their sum, over the completed runs."""
    done = runs.filter(COMPLETED)
    parts = {name: number(done[f"{name}_ns"].sum()) for name in PARTS} if done.height else {}
    whole = sum(parts.values())
    return {name: part / whole for name, part in parts.items()} if whole else {}


def largest(parts: Mapping[str, float]) -> str:
    """The name of the largest part."""
    return max(parts, key=parts.__getitem__)


def fitted(runs: pl.DataFrame) -> Usl | None:
    """The scaling law over all completed runs of a place; None for too few N: it has three parameters."""
    done = runs.filter(COMPLETED)
    if done["streams"].n_unique() < LEAST_N:
        return None
    return usl(done["streams"].to_numpy(), done["gib_per_s"].to_numpy())
