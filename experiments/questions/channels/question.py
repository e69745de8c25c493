"""Does a pool of shared connections do as well as a connection for each stream?

The list objected to channels that are reserved for a purpose. v3 has three ways over the wire: a connection a stream
("dedicated"), one pool for all streams, critical frames first, or one connection for everything. They are held against
each other where the wire decides: all of the device's state moves after the stop, firmware and locks are no limit. The
critical lag is measured on another device, which the guest reconfigures while its dirty streams are busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from experiments.questions.channels.figures import figures
from experiments.questions.channels.grid import (
    AMPLE_CREDIT_MIB,
    BUFFER_MIB,
    CREDIT_MIB,
    LAG_PLACE,
    LINK_GBIT_PER_S,
    MANY,
    QUICK_SETUP,
    SHARES,
    dedicated,
    points,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import Answer, Experiment, Finding, Verdict, effect_row, kinds_told, places
from experiments.study.statistics import Effect, effect

MOST_DOWNTIME = 1.05
"""A pool is close if its downtime's ratio to the dedicated one, at the upper end of its interval, is no more."""
MOST_LAG = 1.10
"""The same for the mean critical lag, which is a few tens of ms: a tenth of it is lost beside set-up."""
MEANS = {
    "connections": 1.0,
    "messages": 1.0,
    "wakeups": 1.0,
    "peak_reorder_bytes": float(1 << 20),
    "send_blocked_ns": 1e6,
}
MEAN_NAMES = {"peak_reorder_bytes": "peak_reorder_mib", "send_blocked_ns": "send_blocked_ms"}


def compared(frame: pl.DataFrame, *parts: str) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    """Each place of these parts, with its runs, those of dedicated connections among them."""
    for at, runs in places(frame.filter(pl.col("part").is_in(parts)), LAG_PLACE):
        base = dedicated(at["streams"])
        if at["part"] in ("credit", "pool"):
            of_width = (pl.col("part") == "width") & (pl.col("protocol") == base)
            same = pl.col("per_connection_gbit_per_s") == at["per_connection_gbit_per_s"]
            runs = pl.concat([frame.filter(of_width & same), runs])
        yield at, runs


def pool_effects(frame: pl.DataFrame, column: str, *parts: str) -> list[tuple[dict[str, Any], Effect | None]]:
    """What the pool does to a column against dedicated connections, place by place."""
    return [
        (at, effect(runs, column, dedicated(at["streams"]), f"{dedicated(at['streams'])}-pool"))
        for at, runs in compared(frame, *parts)
    ]


def answer(frame: pl.DataFrame) -> Answer:
    """Is the pool close, and where not?"""
    downtime = pool_effects(frame, "downtime_ns", "width")
    lag = pool_effects(frame, "critical_lag_mean_ns", "lag")
    return Answer(
        f"At equal numbers of connections the pool's downtime is {_range(downtime)}; its mean critical lag is "
        f"{_range(lag)}.",
        "A connection is a rate and a buffer, first in, first out, on a link that is served in order of arrival: no "
        "losses, no congestion control, no contention for CPU between threads.",
        [
            *_why(frame, downtime),
            *_where_dedicated_lose(frame),
            *_multifd(frame),
            *_costs(frame),
            *_one_lag(frame),
            *_outcomes(frame),
        ],
        [
            _finding("downtime", downtime, MOST_DOWNTIME),
            _finding("mean critical lag", lag, MOST_LAG),
        ],
        effects(frame),
    )


def narrow() -> pl.Expr:
    """The runs in which a connection carries least."""
    return pl.col("per_connection_gbit_per_s") == LINK_GBIT_PER_S * SHARES[0]


def _ratio(of: Effect) -> str:
    return f"{of.ratio.mean:.2f} (95 % interval {of.ratio.low:.2f} to {of.ratio.high:.2f})"


def _range(found: Sequence[tuple[dict[str, Any], Effect | None]]) -> str:
    """The best and the worst place."""
    known = [(at, told) for at, told in found if told is not None]
    if not known:
        return "unknown: no seed was completed under both"
    best, worst = (pick(known, key=lambda each: each[1].ratio.mean) for pick in (min, max))
    return (
        f"between {_ratio(best[1])} times that of dedicated connections, {_where(best[0])}, and {_ratio(worst[1])} "
        f"times, {_where(worst[0])}"
    )


def _where(at: Mapping[str, Any]) -> str:
    setup = f", set-up of {at['setup_us']:g} us an object" if at["setup_us"] else ""
    return (
        f"with N = {at['streams']}, {at['pool_connections'] + 1} connections of {at['per_connection_gbit_per_s']:g} "
        f"Gbit/s and sockets of {at['socket_buffer_mib']:g} MiB{setup}"
    )


def _finding(what: str, found: Sequence[tuple[dict[str, Any], Effect | None]], most: float) -> Finding:
    """Supported if the upper end of the ratio's interval is within the tolerance everywhere, refuted if nowhere."""
    known = [(at, told) for at, told in found if told is not None]
    far = [(at, told) for at, told in known if told.ratio.high > most]
    close = len(known) - len(far)
    missing = f"; {len(found) - len(known)} places have no seed that both completed" if len(known) < len(found) else ""
    why = f"the pool's {what} is within {100 * (most - 1):.0f} % at {close} of {len(found)} places{missing}"
    if far:
        at, told = max(far, key=lambda each: each[1].ratio.high)
        why += f"; it is not at {len(far)}, at most {_ratio(told)} times, {_where(at)}"
    verdict: Verdict = "under conditions" if far or missing else "supported"
    if known and not close:
        verdict = "refuted"
    return Finding("C5", verdict, f"{why}.")


def _why(frame: pl.DataFrame, downtime: Sequence[tuple[dict[str, Any], Effect | None]]) -> list[str]:
    """Two explanations, tried: credit that does not cover the sockets; what sits in a socket."""
    told = []
    with_less = {(at["streams"], at["per_connection_gbit_per_s"]): less for at, less in downtime}
    for at, ample in pool_effects(frame, "downtime_ns", "credit"):
        less = with_less.get((at["streams"], at["per_connection_gbit_per_s"]))
        if ample is not None and less is not None and less.ratio.high > MOST_DOWNTIME:
            told.append(
                f"{at['pool_connections']} pooled connections of {at['per_connection_gbit_per_s']:g} Gbit/s, sockets "
                f"of {BUFFER_MIB:g} MiB: downtime is {_ratio(less)} times the dedicated one with "
                f"{CREDIT_MIB:g} MiB of credit, which fills {CREDIT_MIB / BUFFER_MIB:.1f} sockets, and {_ratio(ample)} "
                f"times with {AMPLE_CREDIT_MIB:g} MiB."
            )
    for at, small in pool_effects(frame, "downtime_ns", "buffer"):
        if small is not None:
            told.append(
                f"With sockets of {at['socket_buffer_mib']:g} MiB and {CREDIT_MIB:g} MiB of credit the pool's "
                f"downtime is {_ratio(small)} times the dedicated one, {_where(at)}."
            )
    quick = (pl.col("setup_us") == QUICK_SETUP["setup_us"]) & narrow()
    for at, lag in pool_effects(frame.filter(quick), "critical_lag_mean_ns", "lag"):
        if lag is not None:
            full_ms = at["socket_buffer_mib"] * (1 << 20) * 8 / at["per_connection_gbit_per_s"] / 1e6
            told.append(
                f"Mean critical lag in the pool of {at['pool_connections']}, sockets of {at['socket_buffer_mib']:g} "
                f"MiB at {at['per_connection_gbit_per_s']:g} Gbit/s (a full one takes {full_ms:.0f} ms): "
                f"{lag.told('ms', 1e6)}."
            )
    return told


def _where_dedicated_lose(frame: pl.DataFrame) -> list[str]:
    """Connections that have nothing to carry: the critical one after the stop, and those of streams without data."""
    told = []
    few = frame.filter(narrow() & (pl.col("streams") <= MANY))
    for at, less in pool_effects(few, "downtime_ns", "width"):
        if less is not None:
            told.append(
                f"N = {at['streams']} at {at['per_connection_gbit_per_s']:g} Gbit/s a connection, where the dedicated "
                f"connection of the critical stream is idle: the pool's downtime {less.told('ms', 1e6, 0)}."
            )
    for at, uneven in pool_effects(frame, "downtime_ns", "uneven"):
        if uneven is not None:
            told.append(
                f"{at['busy_streams']} of {at['streams']} streams have all the data, at "
                f"{at['per_connection_gbit_per_s']:g} Gbit/s a connection: pool against dedicated "
                f"{uneven.told('ms', 1e6, 0)}."
            )
    return told


def _multifd(frame: pl.DataFrame) -> list[str]:
    """QEMU's own pool, which hands packets to its channels in turn, where a connection carries least."""
    told = []
    for at, runs in compared(frame.filter(narrow()), "width"):
        base = dedicated(at["streams"])
        other = effect(runs, "downtime_ns", base, "v2-multifd")
        if other is not None:
            told.append(
                f"v2-multifd's downtime, as many connections, is {_ratio(other)} times that of {base} at "
                f"{at['per_connection_gbit_per_s']:g} Gbit/s a connection."
            )
    return told


def _costs(frame: pl.DataFrame) -> list[str]:
    """Where one connection fills the link: what more of them bring and cost."""
    told = []
    filled = frame.filter((pl.col("part") == "width") & (pl.col("per_connection_gbit_per_s") == LINK_GBIT_PER_S))
    base = f"{dedicated(MANY)}-one"
    streams = number(filled["streams"].max() or MANY)
    for other in (dedicated(int(streams)), f"{dedicated(int(streams))}-pool"):
        runs = filled.filter(pl.col("protocol").is_in([base, other]))
        more = effect(runs, "downtime_ns", base, other)
        if more is None:
            continue
        of = {name: _means(runs, name) for name in (base, other)}
        counts = ", ".join(f"{of[other][name]:.0f} {name} in place of {of[base][name]:.0f}" for name in list(MEANS)[:3])
        told.append(f"On a link that one connection fills, {other} against {base}: {more.told('ms', 1e6)}; {counts}.")
    return told


def _one_lag(frame: pl.DataFrame) -> list[str]:
    """Where one connection fills the link: what stands before a critical frame there is one socket, not all of them."""
    told = []
    filled = pl.col("per_connection_gbit_per_s") == LINK_GBIT_PER_S
    for at, runs in compared(frame.filter(filled & (pl.col("setup_us") == QUICK_SETUP["setup_us"])), "lag"):
        base = dedicated(at["streams"])
        lag = effect(runs, "critical_lag_mean_ns", base, f"{base}-one")
        if lag is not None:
            told.append(
                f"Mean critical lag of one connection that fills the link, socket of {at['socket_buffer_mib']:g} MiB, "
                f"against {base}, whose sockets all stand before the same link: {lag.told('ms', 1e6)}."
            )
    return told


def _outcomes(frame: pl.DataFrame) -> list[str]:
    """Runs that were not completed, over all places with connections of the same rate."""
    told = []
    for at, runs in places(frame, ["part", "per_connection_gbit_per_s", "protocol"]):
        left = runs.filter(~COMPLETED)
        if left.height:
            gbit = at["per_connection_gbit_per_s"]
            told.append(
                f"{at['protocol']} at {gbit:g} Gbit/s a connection ({at['part']}): {kinds_told(left)} of {runs.height}."
            )
    return told


def _means(runs: pl.DataFrame, protocol: str) -> dict[str, float | None]:
    """Of the completed runs, in the units of MEAN_NAMES."""
    done = runs.filter(COMPLETED & (pl.col("protocol") == protocol))
    return {
        MEAN_NAMES.get(name, name): number(done[name].mean()) / scale if done.height else None
        for name, scale in MEANS.items()
    }


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """Each variant against dedicated connections, place by place: downtime and lag, and what else they take."""
    rows = []
    for at, runs in compared(frame, "width", "credit", "buffer", "pool", "uneven", "lag"):
        base = dedicated(at["streams"])
        others = [name for name in runs["protocol"].unique(maintain_order=True) if name != base]
        for other in others:
            columns = ["downtime_ns"] + (["critical_lag_mean_ns", "critical_lag_max_ns"] if at["part"] == "lag" else [])
            for column in columns:
                row = at | {"measure": column.removesuffix("_ns")}
                row |= effect_row(effect(runs, column, base, other), base, other, 1e6, "ms")
                for side, name in (("base", base), ("other", other)):
                    row |= {f"{mean}_{side}": value for mean, value in _means(runs, name).items()}
                rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


EXPERIMENT = Experiment(
    name="channels",
    question="Does a pool of shared connections, critical frames first, do as well as a connection for each stream?",
    claims=("C5",),
    points=points,
    answer=answer,
    figures=figures,
)
