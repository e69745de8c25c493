# SPDX-License-Identifier: GPL-2.0-or-later
"""The grid of channels, and what its runs say of the pool: how close it is to dedicated connections, and where not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from experiments.runs.frame import COMPLETED, number
from experiments.study.claims import Finding, judge
from experiments.study.effects import Measure, Place, effect_row, effect_text, incomplete, places, table
from experiments.study.experiment import Answer, Factor, Point, under
from experiments.study.statistics import Effect, effect

LINK_GBIT_PER_S = 10.0
STATE_MIB = 256
WIRE_BOUND = (
    *under("device.0", state_mib=STATE_MIB, stop_only_mib=STATE_MIB, block_kib=256, max_dirty_streams=32),
    "driver.lock=per_fd",
    "firmware.engines=32",
    *under("ram", size_gib=1, nonzero_gib=0.001),
)
"""favours-v2 without its one lock and its one engine: only the link and the connections are left as limits."""
LAG_DEVICE = (
    *under("ram", size_gib=0.5, nonzero_gib=0.0625, dirty_mib_per_s=5, working_set_mib=16),
    *under("device.0", state_mib=256, block_kib=256),
    *under("vmm", give_up_s=6, setup_ms=0),
)
"""nic-reconfig with little RAM and half the state: more runs in the same time. No critical data can move while the VMM
is set up, and that would be most of the lag of the shortest migrations: so setup_ms is 0."""
QUICK_SETUP = {"setup_us": 50.0, "reconfigurations_per_s": 20.0, "objects": 64}
"""Set-up that costs the target next to nothing (1.6 ms a reconfiguration): the wire's part of the lag can be seen."""
SHIPPED_SETUP = {"setup_us": 2000.0, "reconfigurations_per_s": 5.0, "objects": 512}
"""nic-reconfig's own: 64 ms of set-up a reconfiguration."""
SHARES = (1 / 16, 1 / 4, 1.0)
"""The part of the link's rate that one connection carries."""
NARROW_GBIT_PER_S = LINK_GBIT_PER_S * SHARES[0]
STREAMS = (1, 4, 16, 30)
"""Dirty streams: 3, 6, 18 and 32 connections in all, dedicated or in a pool."""
MANY = 4
"""The N of all sweeps that do not sweep N."""
POOLS = (1, 2, 3, 5, 8, 16, 31)
BUSY_STREAMS = (1, 2, 4)
"""Streams that have something to send. Blocks go to streams by their number modulo N, so that even the writes of a
hotspot come out even; a state of fewer blocks than streams does not."""
BUFFER_MIB = 10.0
BUFFERS_MIB = (BUFFER_MIB, 2.0)
CREDIT_MIB = 64.0
AMPLE_CREDIT_MIB = 512.0
"""More than 32 sockets of 10 MiB hold."""
FACTORS = (
    "part",
    "streams",
    "per_connection_gbit_per_s",
    "pool_connections",
    "socket_buffer_mib",
    "dirty_credit_mib",
    "busy_streams",
    "setup_us",
)
PLACE = (*FACTORS[:-2], "setup_us", "busy_streams")
"""The same, in the order of the table of effects."""

MOST_DOWNTIME = 1.05
"""A pool is close if its downtime's ratio to the dedicated one, at the upper end of its interval, is no more."""
MOST_LAG = 1.10
"""The same for the mean critical lag, which is a few tens of ms: a tenth of it is lost beside set-up."""
MEANS = (
    Measure("connections", "connections", 1.0),
    Measure("messages", "messages", 1.0),
    Measure("wakeups", "wakeups", 1.0),
    Measure("peak_reorder_mib", "peak_reorder_bytes", float(1 << 20)),
    Measure("send_blocked_ms", "send_blocked_ns"),
)
Effects = Sequence[tuple[Place, Effect]]
FILLED = pl.col("per_connection_gbit_per_s") == LINK_GBIT_PER_S
NARROW = pl.col("per_connection_gbit_per_s") == NARROW_GBIT_PER_S
QUICK = pl.col("setup_us") == QUICK_SETUP["setup_us"]


def _point(
    part: str,
    protocol: str,
    share: float,
    *,
    streams: int = MANY,
    pool: int | None = None,
    buffer_mib: float = BUFFER_MIB,
    credit_mib: float = CREDIT_MIB,
    busy: int = 0,
    setup: Mapping[str, float] | None = None,
) -> Point:
    """`pool` connections beside the first one; by default as many as dedicated streams would have."""
    pool = streams + 1 if pool is None else pool
    gbit = LINK_GBIT_PER_S * share
    settings = [
        *under("link", gbit_per_s=LINK_GBIT_PER_S, per_connection_gbit_per_s=gbit, socket_buffer_mib=buffer_mib),
        *under("v3", dirty_credit_mib=credit_mib, pool_connections=pool),
        f"vmm.multifd_channels={max(2, pool)}",
        *(LAG_DEVICE if setup else WIRE_BOUND),
    ]
    if busy:
        settings += [f"device.0.block_kib={STATE_MIB // busy * 1024}", f"driver.chunk_mib={STATE_MIB}"]
    if setup:
        settings += [
            *under("device.0.critical", setup_us=setup["setup_us"], objects=setup["objects"]),
            f"device.0.reconfigurations.poisson_per_s={setup['reconfigurations_per_s']:g}",
        ]
    setup_us = setup["setup_us"] if setup else 0.0
    place: tuple[Factor, ...] = (part, streams, gbit, pool, buffer_mib, credit_mib, busy or streams, setup_us)
    factors = dict(zip(FACTORS, place, strict=True))
    return Point("nic-reconfig" if setup else "favours-v2", protocol, tuple(settings), factors)


def dedicated(streams: int) -> str:
    """The protocol with a connection a stream."""
    return f"v3-n{streams}"


def pooled(streams: int) -> str:
    """The protocol with a pool of connections."""
    return f"v3-n{streams}-pool"


def points(quick: bool) -> list[Point]:
    """Numbers of connections and the rate of one; credits; sizes of the pool; uneven streams; the critical lag."""
    shares = (SHARES[0], SHARES[-1]) if quick else SHARES
    streams = (MANY, STREAMS[-2]) if quick else STREAMS
    busy = BUSY_STREAMS[:1] if quick else BUSY_STREAMS
    return [
        *_width(shares, streams),
        *_pools(streams, (2, 5, 16) if quick else POOLS),
        *(_point("uneven", name, SHARES[0], busy=few) for few in busy for name in (dedicated(MANY), pooled(MANY))),
        *_lag(shares, BUFFERS_MIB[:1] if quick else BUFFERS_MIB),
    ]


def _width(shares: Sequence[float], streams: Sequence[int]) -> Iterator[Point]:
    for share in shares:
        for n in streams:
            names = [dedicated(n), pooled(n), "v2-multifd", *([f"{dedicated(n)}-one", "v2"] if n == MANY else [])]
            yield from (_point("width", name, share, streams=n) for name in names)


def _pools(streams: Sequence[int], sizes: Sequence[int]) -> Iterator[Point]:
    """Where a connection carries least: credit that covers all sockets; smaller sockets; pools of any size."""
    narrow = SHARES[0]
    crowded = [n for n in streams if (n + 1) * BUFFER_MIB > CREDIT_MIB]
    for n in crowded:
        yield _point("credit", pooled(n), narrow, streams=n, credit_mib=AMPLE_CREDIT_MIB)
    for n in crowded:
        for protocol in (dedicated(n), pooled(n)):
            yield _point("buffer", protocol, narrow, streams=n, buffer_mib=BUFFERS_MIB[1])
    for size in sizes:
        yield _point("pool", pooled(MANY), narrow, pool=size)
    for size in sizes:
        if size * BUFFER_MIB > CREDIT_MIB:
            yield _point("pool", pooled(MANY), narrow, pool=size, credit_mib=AMPLE_CREDIT_MIB)


def _lag(shares: Sequence[float], buffers_mib: Sequence[float]) -> Iterator[Point]:
    names = (dedicated(MANY), pooled(MANY), f"{dedicated(MANY)}-one", "v2")
    for share in shares:
        for setup, buffers in ((QUICK_SETUP, buffers_mib), (SHIPPED_SETUP, buffers_mib[:1])):
            for buffer_mib in buffers:
                yield from (_point("lag", name, share, buffer_mib=buffer_mib, setup=setup) for name in names)


# --- the answer -------------------------------------------------------------------------------------------------------


def compared(frame: pl.DataFrame, *parts: str) -> Iterator[tuple[Place, pl.DataFrame]]:
    """Each place of these parts, with its runs, those of dedicated connections among them."""
    for at, runs in places(frame.filter(pl.col("part").is_in(parts)), PLACE):
        if at["part"] in ("credit", "pool"):
            same = pl.col("per_connection_gbit_per_s") == at["per_connection_gbit_per_s"]
            runs = pl.concat([frame.filter(same, part="width", protocol=dedicated(at["streams"])), runs])
        yield at, runs


def pool_effects(frame: pl.DataFrame, column: str, *parts: str) -> Effects:
    """How the pool changes a column against dedicated connections, where a seed was completed by both."""
    return [
        (at, found)
        for at, runs in compared(frame, *parts)
        if (found := effect(runs, column, dedicated(at["streams"]), pooled(at["streams"])))
    ]


def answer(frame: pl.DataFrame) -> Answer:
    """Is the pool close, and where is it not?"""
    downtime = pool_effects(frame, "downtime_ns", "width")
    lag = pool_effects(frame, "critical_lag_mean_ns", "lag")
    return Answer(
        f"At equal numbers of connections the pool's downtime is {_range(downtime)}; its mean critical lag is "
        f"{_range(lag)}.",
        "A connection is a rate and a buffer, first in, first out, on a link that is served in order of arrival: no "
        "losses, no congestion control, no contention for CPU between threads.",
        [
            *_credit(frame, downtime),
            *_sockets(frame),
            *_where_dedicated_lose(frame),
            *_multifd(frame),
            *_costs(frame),
            *_one_lag(frame),
            *(
                f"{at['protocol']} at {at['per_connection_gbit_per_s']:g} Gbit/s a connection ({at['part']}): {ends}."
                for at, ends in incomplete(frame, ["part", "per_connection_gbit_per_s", "protocol"])
            ),
        ],
        [
            _finding("downtime", downtime, len(list(compared(frame, "width"))), MOST_DOWNTIME),
            _finding("mean critical lag", lag, len(list(compared(frame, "lag"))), MOST_LAG),
        ],
        table(_rows(frame)),
    )


def _ratio(of: Effect) -> str:
    return of.ratio.text(digits=2)


def _range(effects: Effects) -> str:
    """The best and the worst place."""
    if not effects:
        return "unknown: no seed was completed under both"
    best, worst = (pick(effects, key=lambda each: each[1].ratio.mean) for pick in (min, max))
    return (
        f"between {_ratio(best[1])} times that of dedicated connections, {_where(best[0])}, and {_ratio(worst[1])} "
        f"times, {_where(worst[0])}"
    )


def _where(at: Place) -> str:
    setup = f", set-up of {at['setup_us']:g} us an object" if at["setup_us"] else ""
    return (
        f"with N = {at['streams']}, {at['pool_connections'] + 1} connections of {at['per_connection_gbit_per_s']:g} "
        f"Gbit/s and sockets of {at['socket_buffer_mib']:g} MiB{setup}"
    )


def _finding(what: str, effects: Effects, tried: int, most: float) -> Finding:
    """Of `tried` places. Supported if the upper end of the ratio's interval is within the tolerance everywhere, refuted
    if nowhere."""
    far = [(at, each) for at, each in effects if each.ratio.high > most]
    close, missing = len(effects) - len(far), tried - len(effects)
    why = f"the pool's {what} is within {100 * (most - 1):.0f} % at {close} of {tried} places"
    if missing:
        why += f"; {missing} places have no seed that both completed"
    if far:
        at, worst = max(far, key=lambda each: each[1].ratio.high)
        why += f"; it is not at {len(far)}, at most {_ratio(worst)} times, {_where(at)}"
    judged = judge(supported=not far and not missing, refuted=bool(effects) and not close)
    return Finding("C5", judged, f"{why}.")


def _credit(frame: pl.DataFrame, downtime: Effects) -> list[str]:
    """An explanation, tried: credit that does not cover the sockets."""
    with_less = {(at["streams"], at["per_connection_gbit_per_s"]): less for at, less in downtime}
    return [
        f"{at['pool_connections']} pooled connections of {at['per_connection_gbit_per_s']:g} Gbit/s, sockets "
        f"of {BUFFER_MIB:g} MiB: downtime is {_ratio(less)} times the dedicated one with {CREDIT_MIB:g} MiB of "
        f"credit, which fills {CREDIT_MIB / BUFFER_MIB:.1f} sockets, and {_ratio(ample)} times with "
        f"{AMPLE_CREDIT_MIB:g} MiB."
        for at, ample in pool_effects(frame, "downtime_ns", "credit")
        if (less := with_less.get((at["streams"], at["per_connection_gbit_per_s"]))) and less.ratio.high > MOST_DOWNTIME
    ]


def _sockets(frame: pl.DataFrame) -> Iterator[str]:
    """Another explanation, tried: what waits in a socket."""
    for at, small in pool_effects(frame, "downtime_ns", "buffer"):
        yield (
            f"With sockets of {at['socket_buffer_mib']:g} MiB and {CREDIT_MIB:g} MiB of credit the pool's downtime is "
            f"{_ratio(small)} times the dedicated one, {_where(at)}."
        )
    for at, lag in pool_effects(frame.filter(QUICK, NARROW), "critical_lag_mean_ns", "lag"):
        full_ms = at["socket_buffer_mib"] * (1 << 20) * 8 / at["per_connection_gbit_per_s"] / 1e6
        yield (
            f"Mean critical lag in the pool of {at['pool_connections']}, sockets of {at['socket_buffer_mib']:g} MiB at "
            f"{at['per_connection_gbit_per_s']:g} Gbit/s (a full one takes {full_ms:.0f} ms): {effect_text(lag)}."
        )


def _where_dedicated_lose(frame: pl.DataFrame) -> list[str]:
    """Connections that have nothing to carry: the critical one after the stop, and those of streams without data."""
    few = frame.filter(NARROW & (pl.col("streams") <= MANY))
    return [
        f"N = {at['streams']} at {at['per_connection_gbit_per_s']:g} Gbit/s a connection, where the dedicated "
        f"connection of the critical stream is idle: the pool changes the downtime by {effect_text(found, 0)}."
        for at, found in pool_effects(few, "downtime_ns", "width")
    ] + [
        f"{at['busy_streams']} of {at['streams']} streams have all the data, at {at['per_connection_gbit_per_s']:g} "
        f"Gbit/s a connection: pool against dedicated {effect_text(found, 0)}."
        for at, found in pool_effects(frame, "downtime_ns", "uneven")
    ]


def _multifd(frame: pl.DataFrame) -> list[str]:
    """QEMU's own pool, which hands packets to its channels in turn, where a connection carries least."""
    return [
        f"v2-multifd's downtime, as many connections, is {_ratio(found)} times that of {dedicated(at['streams'])} at "
        f"{at['per_connection_gbit_per_s']:g} Gbit/s a connection."
        for at, runs in compared(frame.filter(NARROW), "width")
        if (found := effect(runs, "downtime_ns", dedicated(at["streams"]), "v2-multifd"))
    ]


def _costs(frame: pl.DataFrame) -> Iterator[str]:
    """Where one connection fills the link: what more connections bring and cost."""
    filled = frame.filter(FILLED, part="width")
    base, streams = f"{dedicated(MANY)}-one", max(filled["streams"], default=MANY)
    for other in (dedicated(streams), pooled(streams)):
        if more := effect(filled, "downtime_ns", base, other):
            before, after = (_means(filled, name) for name in (base, other))
            counts = ", ".join(f"{after[each]:.0f} {each} in place of {before[each]:.0f}" for each in list(after)[:3])
            yield f"On a link that one connection fills, {other} against {base}: {effect_text(more)}; {counts}."


def _one_lag(frame: pl.DataFrame) -> list[str]:
    """Where one connection fills the link: one socket stands before a critical frame there, not all of them."""
    return [
        f"Mean critical lag of one connection that fills the link, socket of {at['socket_buffer_mib']:g} MiB, against "
        f"{base}, whose sockets all stand before the same link: {effect_text(lag)}."
        for at, runs in compared(frame.filter(FILLED, QUICK), "lag")
        for base in [dedicated(at["streams"])]
        if (lag := effect(runs, "critical_lag_mean_ns", base, f"{base}-one"))
    ]


def _means(runs: pl.DataFrame, protocol: str) -> dict[str, float | None]:
    """MEANS over the completed runs."""
    done = runs.filter(COMPLETED, protocol=protocol)
    return {of.label: number(done[of.column].mean()) / of.scale if done.height else None for of in MEANS}


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, object]]:
    """Each variant against dedicated connections, place by place: downtime and lag, and what else they take."""
    for at, runs in compared(frame, "width", "credit", "buffer", "pool", "uneven", "lag"):
        base = dedicated(at["streams"])
        columns = ["downtime_ns", *(["critical_lag_mean_ns", "critical_lag_max_ns"] if at["part"] == "lag" else [])]
        for other in runs["protocol"].unique(maintain_order=True):
            for column in columns if other != base else []:
                row = at | {"measure": column.removesuffix("_ns")}
                row |= effect_row(effect(runs, column, base, other), base, other)
                for side, name in (("base", base), ("other", other)):
                    row |= {f"{mean}_{side}": value for mean, value in _means(runs, name).items()}
                yield row
