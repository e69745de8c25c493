"""What the runs of channels say of the pool: how close it is to dedicated connections, where it is not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl

from experiments.questions.channels import grid
from experiments.questions.channels.grid import LINK_GBIT_PER_S, MANY, NARROW_GBIT_PER_S, PLACE, dedicated, pooled
from experiments.runs.frame import COMPLETED, number
from experiments.study.claims import Finding, judge
from experiments.study.effects import Measure, Place, effect_row, effect_text, incomplete, places, table
from experiments.study.experiment import Answer
from experiments.study.statistics import Effect, effect

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
Effects = Sequence[tuple[Place, Effect | None]]
FILLED = pl.col("per_connection_gbit_per_s") == LINK_GBIT_PER_S
NARROW = pl.col("per_connection_gbit_per_s") == NARROW_GBIT_PER_S
QUICK = pl.col("setup_us") == grid.QUICK_SETUP["setup_us"]


def compared(frame: pl.DataFrame, *parts: str) -> Iterator[tuple[Place, pl.DataFrame]]:
    """Each place of these parts, with its runs, those of dedicated connections among them."""
    for at, runs in places(frame.filter(pl.col("part").is_in(parts)), PLACE):
        if at["part"] in ("credit", "pool"):
            same = pl.col("per_connection_gbit_per_s") == at["per_connection_gbit_per_s"]
            runs = pl.concat([frame.filter(same, part="width", protocol=dedicated(at["streams"])), runs])
        yield at, runs


def pool_effects(frame: pl.DataFrame, column: str, *parts: str) -> Effects:
    """How the pool changes a column against dedicated connections, place by place."""
    return [
        (at, effect(runs, column, dedicated(at["streams"]), pooled(at["streams"])))
        for at, runs in compared(frame, *parts)
    ]


def known(effects: Effects) -> list[tuple[Place, Effect]]:
    """Without the places that have no seed that both completed."""
    return [(at, found) for at, found in effects if found is not None]


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
        [_finding("downtime", downtime, MOST_DOWNTIME), _finding("mean critical lag", lag, MOST_LAG)],
        table(_rows(frame)),
    )


def _ratio(of: Effect) -> str:
    return of.ratio.text(digits=2)


def _range(effects: Effects) -> str:
    """The best and the worst place."""
    if not known(effects):
        return "unknown: no seed was completed under both"
    best, worst = (pick(known(effects), key=lambda each: each[1].ratio.mean) for pick in (min, max))
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


def _finding(what: str, effects: Effects, most: float) -> Finding:
    """Supported if the upper end of the ratio's interval is within the tolerance everywhere, refuted if nowhere."""
    found = known(effects)
    far = [(at, each) for at, each in found if each.ratio.high > most]
    close, missing = len(found) - len(far), len(effects) - len(found)
    why = f"the pool's {what} is within {100 * (most - 1):.0f} % at {close} of {len(effects)} places"
    if missing:
        why += f"; {missing} places have no seed that both completed"
    if far:
        at, worst = max(far, key=lambda each: each[1].ratio.high)
        why += f"; it is not at {len(far)}, at most {_ratio(worst)} times, {_where(at)}"
    judged = judge(supported=not far and not missing, refuted=bool(found) and not close)
    return Finding("C5", judged, f"{why}.")


def _credit(frame: pl.DataFrame, downtime: Effects) -> list[str]:
    """An explanation, tried: credit that does not cover the sockets."""
    with_less = {(at["streams"], at["per_connection_gbit_per_s"]): less for at, less in downtime}
    lines = []
    for at, ample in known(pool_effects(frame, "downtime_ns", "credit")):
        less = with_less.get((at["streams"], at["per_connection_gbit_per_s"]))
        if less is not None and less.ratio.high > MOST_DOWNTIME:
            lines.append(
                f"{at['pool_connections']} pooled connections of {at['per_connection_gbit_per_s']:g} Gbit/s, sockets "
                f"of {grid.BUFFER_MIB:g} MiB: downtime is {_ratio(less)} times the dedicated one with "
                f"{grid.CREDIT_MIB:g} MiB of credit, which fills {grid.CREDIT_MIB / grid.BUFFER_MIB:.1f} sockets, and "
                f"{_ratio(ample)} times with {grid.AMPLE_CREDIT_MIB:g} MiB."
            )
    return lines


def _sockets(frame: pl.DataFrame) -> list[str]:
    """Another explanation, tried: what waits in a socket."""
    lines = [
        f"With sockets of {at['socket_buffer_mib']:g} MiB and {grid.CREDIT_MIB:g} MiB of credit the pool's downtime is "
        f"{_ratio(small)} times the dedicated one, {_where(at)}."
        for at, small in known(pool_effects(frame, "downtime_ns", "buffer"))
    ]
    for at, lag in known(pool_effects(frame.filter(QUICK, NARROW), "critical_lag_mean_ns", "lag")):
        full_ms = at["socket_buffer_mib"] * (1 << 20) * 8 / at["per_connection_gbit_per_s"] / 1e6
        lines.append(
            f"Mean critical lag in the pool of {at['pool_connections']}, sockets of {at['socket_buffer_mib']:g} MiB at "
            f"{at['per_connection_gbit_per_s']:g} Gbit/s (a full one takes {full_ms:.0f} ms): {effect_text(lag)}."
        )
    return lines


def _where_dedicated_lose(frame: pl.DataFrame) -> list[str]:
    """Connections that have nothing to carry: the critical one after the stop, and those of streams without data."""
    few = frame.filter(NARROW & (pl.col("streams") <= MANY))
    return [
        f"N = {at['streams']} at {at['per_connection_gbit_per_s']:g} Gbit/s a connection, where the dedicated "
        f"connection of the critical stream is idle: the pool changes the downtime by {effect_text(found, 0)}."
        for at, found in known(pool_effects(few, "downtime_ns", "width"))
    ] + [
        f"{at['busy_streams']} of {at['streams']} streams have all the data, at {at['per_connection_gbit_per_s']:g} "
        f"Gbit/s a connection: pool against dedicated {effect_text(found, 0)}."
        for at, found in known(pool_effects(frame, "downtime_ns", "uneven"))
    ]


def _multifd(frame: pl.DataFrame) -> list[str]:
    """QEMU's own pool, which hands packets to its channels in turn, where a connection carries least."""
    return [
        f"v2-multifd's downtime, as many connections, is {_ratio(found)} times that of {dedicated(at['streams'])} at "
        f"{at['per_connection_gbit_per_s']:g} Gbit/s a connection."
        for at, runs in compared(frame.filter(NARROW), "width")
        if (found := effect(runs, "downtime_ns", dedicated(at["streams"]), "v2-multifd"))
    ]


def _costs(frame: pl.DataFrame) -> list[str]:
    """Where one connection fills the link: what more connections bring and cost."""
    lines = []
    filled = frame.filter(FILLED, part="width")
    base, streams = f"{dedicated(MANY)}-one", int(filled["streams"].max() or MANY)  # type: ignore[arg-type]
    for other in (dedicated(streams), pooled(streams)):
        more = effect(filled, "downtime_ns", base, other)
        if more is None:
            continue
        before, after = (_means(filled, name) for name in (base, other))
        counts = ", ".join(f"{after[of.label]:.0f} {of.label} in place of {before[of.label]:.0f}" for of in MEANS[:3])
        lines.append(f"On a link that one connection fills, {other} against {base}: {effect_text(more)}; {counts}.")
    return lines


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
