"""How long is the downtime, and how much set-up is in it, against the rate at which the guest reconfigures its device?

The list's first complaint: critical data that appears late, of a reconfiguration, queues behind dirty data and makes a
mess of the decision when to stop. Every variant, on one device, from a guest that leaves it alone to one that makes
more critical data new than the target can set up: set-up takes `1 / outrun_per_s()` a reconfiguration.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.draw import panels as charts
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import (
    NOT_BOTH,
    Answer,
    Experiment,
    Finding,
    Point,
    effect_row,
    gave_up,
    kept_out,
    kinds_told,
    places,
)
from experiments.study.statistics import Interval, effect, interval
from sim.scenario.file import load

BASE = "nic-reconfig"
SMALL_RAM = ("ram.size_gib=2", "ram.nonzero_gib=0.5", "ram.dirty_mib_per_s=20", "ram.working_set_mib=64")
"""RAM is not the question; less of it makes more runs."""
GIVE_UP = ("vmm.give_up_s=20",)
RATES_PER_S = (0.0, 0.5, 1.0, 2.0, 5.0, 8.0, 12.0, 20.0, 40.0)
QUICK_RATES_PER_S = (0.0, 5.0, 20.0)
PROTOCOLS = (
    "v2",
    "v2-ack",
    "v2-reinit-flush",
    "v2-reinit-flush-ack",
    "v2-reinit-flush-ack-reusable",
    "v2-reinit-invalidate-ack-reusable",
    "v2-multifd-reinit-flush-ack-reusable",
    "v3-n1",
    "v3-n4",
    "v3-n4-invalidate",
    "v3-n4-retry",
    "v3-n4-pool",
    "v3-n4-one",
    "v3-blocks",
)
ACKED = "v2-reinit-flush-ack-reusable"
ACKED_MULTIFD = "v2-multifd-reinit-flush-ack-reusable"
FACTOR = "reconfigurations_per_s"
MOST = 0.9
"""Of the set-up that v3-n4 takes out of v2's downtime."""
PANELS = (
    ("downtime", "downtime_ns", 1e6, "ms"),
    ("set-up in the downtime", "setup_in_downtime_ns", 1e6, "ms"),
    ("longest critical lag", "critical_lag_max_ns", 1e9, "s"),
)


@lru_cache
def outrun_per_s() -> float:
    """Reconfigurations that the target can set up, object after object."""
    device = load(BASE).device[0]
    assert device.reconfigurations is not None
    return 1e6 / (device.reconfigurations.objects_each * device.critical.setup_us)


def points(quick: bool) -> list[Point]:
    """Every variant at every rate."""
    rates = QUICK_RATES_PER_S if quick else RATES_PER_S
    return [
        Point(
            BASE,
            protocol,
            (*SMALL_RAM, *GIVE_UP, f"device.0.reconfigurations.poisson_per_s={rate:g}"),
            {FACTOR: rate},
        )
        for rate in rates
        for protocol in PROTOCOLS
    ]


def answer(frame: pl.DataFrame) -> Answer:
    """Where does v2 break, where does v3?"""
    rate = number(frame.filter(pl.col(FACTOR) < outrun_per_s())[FACTOR].max())
    busy = frame.filter(pl.col(FACTOR) == rate)
    v2, v3 = _told_ms(_setup_ms(busy, "v2")), _told_ms(_setup_ms(busy, "v3-n4"))
    gain, acked, multifd = (_gain(busy, base) for base in ("v2", ACKED, ACKED_MULTIFD))
    return Answer(
        f"At {rate:g} reconfigurations a second, of the {outrun_per_s():.1f} that the target can set up, {v3} of "
        f"set-up is in v3's downtime and {v2} in v2's; downtime of v3-n4 against v2: {gain}.",
        f"One device ({BASE}), whose target sets up one object after the other: what comes faster than "
        f"{outrun_per_s():.1f} times a second it cannot keep up with, under any protocol.",
        [
            f"v3-n4 against {ACKED}, whose user waits for the target too: {acked}; against {ACKED_MULTIFD}, whose RAM "
            f"and devices move beside each other as v3's do: {multifd}.",
            *_where_they_break(frame),
        ],
        [_c1(frame), _c4(busy)],
        effects(frame),
    )


def _gain(runs: pl.DataFrame, base: str) -> str:
    told = effect(runs, "downtime_ns", base, "v3-n4")
    return told.told("ms", 1e6) if told else NOT_BOTH


def _told_ms(of: Interval | None) -> str:
    return of.told("ms") if of else "an unknown time (no run completed)"


def _setup_ms(runs: pl.DataFrame, protocol: str) -> Interval | None:
    """Set-up in the downtime of the completed runs."""
    values = runs.filter(COMPLETED & (pl.col("protocol") == protocol))["setup_in_downtime_ns"].to_numpy() / 1e6
    return interval(values) if len(values) else None


def _where_they_break(frame: pl.DataFrame) -> list[str]:
    """The first rate at which not all runs complete, for each protocol that has one."""
    told = []
    for protocol in PROTOCOLS:
        of_protocol = frame.filter(pl.col("protocol") == protocol).sort(FACTOR)
        for at, runs in places(of_protocol, [FACTOR]):
            left = runs.filter(~COMPLETED)
            if left.height:
                ends = f"{kinds_told(left)} of {runs.height}"
                told.append(f"{protocol}: from {at[FACTOR]:g} a second on not all complete: {ends}.")
                break
    return told


def _c1(frame: pl.DataFrame) -> Finding:
    """v3 has next to no set-up in the downtime at each rate that the target keeps up with; can v2 tell, and which?"""
    outrun = frame.filter(pl.col(FACTOR) < outrun_per_s())
    v3, of_v2 = (outrun.filter(pl.col("protocol") == name) for name in ("v3-n4", ACKED))
    most, acked, plain = (_worst_ms(outrun, name) for name in ("v3-n4", ACKED, "v2"))
    if v3.is_empty() or of_v2.is_empty() or plain is None:
        return Finding("C1", "under conditions", "it could not be tried: v2, v3 or v2 with an ack has no run.")
    completed = v3.filter(COMPLETED)
    keeps_out = kept_out(most, plain.mean) if completed.height == v3.height else False
    seen = of_v2.filter(gave_up()).height
    unseen = of_v2.filter(pl.col("outcome") == "FAILED").height - seen
    v2_can = not unseen and (acked is None or kept_out(acked, plain.mean) is True)
    worst = of_v2.filter(pl.col(FACTOR) == number(of_v2[FACTOR].max()))
    return Finding(
        "C1",
        "refuted" if keeps_out is False else "supported" if keeps_out and not v2_can else "under conditions",
        f"v3-n4 completes {completed.height} of {v3.height} runs at rates that the target keeps up with, with "
        f"{_or_none(most)} of set-up in the downtime in the mean at the worst of them; v2 has {_or_none(plain)}. "
        f"v2 with REINIT and a reusable ack ({ACKED}) has {_or_none(acked)}, of {of_v2.height} runs it completes "
        f"{of_v2.filter(COMPLETED).height} ({worst.filter(COMPLETED).height} of {worst.height} at the highest rate) "
        f"and gives {seen} up over critical data that it saw come too late: "
        + ("it can tell, too." if v2_can else "it cannot always tell."),
    )


def _worst_ms(frame: pl.DataFrame, protocol: str) -> Interval | None:
    """Set-up in the downtime of the completed runs, at the rate where it is largest in the mean."""
    found = [told for _, runs in places(frame, [FACTOR]) if (told := _setup_ms(runs, protocol))]
    return max(found, key=lambda told: told.mean, default=None)


def _or_none(told: Interval | None) -> str:
    return "no completed run" if told is None else f"{told.mean:.1f} ms"


def _c4(busy: pl.DataFrame) -> Finding:
    """What of v3-n4's gain over v2, in set-up that leaves the downtime, v3 with one dirty stream has already."""
    v2, one, four = (_setup_ms(busy, name) for name in ("v2", "v3-n1", "v3-n4"))
    if v2 is None or one is None or four is None:
        return Finding("C4", "under conditions", "it could not be tried: one of v2, v3-n1 and v3-n4 completed no run.")
    if v2.mean <= four.mean:
        return Finding("C4", "refuted", "v3-n4 does not take set-up out of v2's downtime here.")
    part = (v2.mean - one.mean) / (v2.mean - four.mean)
    return Finding(
        "C4",
        "supported" if part > MOST else "refuted",
        f"two fds (v3-n1) take {100 * part:.0f} % of the set-up out of the downtime that v3-n4 takes out; the rest of "
        "the claim is in read_scaling and ablation.",
    )


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """Each variant against v2, rate by rate: downtime, with its interval, and set-up in it."""
    rows = []
    for at, runs in places(frame, [FACTOR]):
        for protocol in PROTOCOLS[1:]:
            told = effect(runs, "downtime_ns", "v2", protocol)
            rows.append(at | effect_row(told, "v2", protocol, 1e6, "ms"))
    return pl.DataFrame(rows, infer_schema_length=None)


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Downtime, set-up in it, critical lag, and what completes, against the rate."""
    seeds = frame["seed"].n_unique()
    figure, axes = charts.sheet(
        "What does the guest's reconfiguring cost, and where does it break a protocol?",
        f"{BASE}, {seeds} seeds, means with 95 % intervals; hollow: not all runs of that place completed, none: no "
        f"point. Dotted: {outrun_per_s():.1f} a second, all that the target can set up",
        command,
        (2, 2),
        (11, 8.5),
    )
    for axis, (title, column, scale, unit) in zip(axes, PANELS, strict=False):
        charts.curves(axis, frame, FACTOR, column, scale=scale, protocols=PROTOCOLS)
        charts.dress(axis, title, "reconfigurations a second", unit)
    charts.completed(axes[3], frame, FACTOR, PROTOCOLS)
    charts.dress(axes[3], "runs that complete", "reconfigurations a second", "%")
    for axis in axes:
        axis.axvline(outrun_per_s(), color="black", linestyle=":", linewidth=1)
        axis.set_xscale("symlog", linthresh=0.5)
        ticks = [0, 0.5, 1, 2, 5, 10, 20, 40]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xlim(0, 45)
        axis.set_ylim(bottom=0)
    axes[0].set_yscale("log")
    heights = [200, 300, 500, 1000, 2000, 4000]
    axes[0].set_yticks(heights, [str(height) for height in heights])
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylim(heights[0], 1.1 * heights[-1])
    charts.legend(figure, PROTOCOLS)
    return {"reconfiguration": figure}


EXPERIMENT = Experiment(
    name="reconfiguration",
    question="How do downtime, critical lag and set-up in the downtime grow with the rate of reconfigurations?",
    claims=("C1", "C4"),
    points=points,
    answer=answer,
    figures=figures,
)
