# SPDX-License-Identifier: GPL-2.0-or-later
"""How do downtime, set-up in the downtime and critical lag grow with the rate of the guest's reconfigurations?

The list's first complaint: critical data that appears late, after a reconfiguration, queues behind dirty data and
spoils the decision when to stop. The grid is every variant on one device, at rates from none to more than the target
can set up, which is `outrun_per_s()`.

C1 is decided by the set-up that v3-n4 leaves in the downtime at the worst rate below that, and by whether v2 with
REINIT and a reusable ack leaves as little, or sees what comes too late. C4 is decided by the part of v3-n4's gain in
set-up that v3-n1 has already.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import lru_cache

import polars as pl

from experiments.draw import panels
from experiments.draw.canvas import Figure, NullLocator
from experiments.runs.frame import COMPLETED, completed_text, number
from experiments.study.claims import MOST_OF_SETUP, Finding, gave_up, judge, kept_out
from experiments.study.effects import Measure, compared_text, effect_table, incomplete, mean, places
from experiments.study.experiment import Answer, Experiment, Point, under
from experiments.study.statistics import Interval
from sim.scenario.file import load

BASE = "nic-reconfig"
SMALL_RAM = under("ram", size_gib=2, nonzero_gib=0.5, dirty_mib_per_s=20, working_set_mib=64, frame_mib=4)
"""The question is not about RAM; with less of it, in larger frames, a run is cheaper. The frames change no downtime by
0.05 %."""
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
SETUP = "setup_in_downtime_ns"
PANELS = (
    Measure("downtime", "downtime_ns"),
    Measure("set-up in the downtime", SETUP),
    Measure("longest critical lag", "critical_lag_max_ns", 1e9, "s"),
)


@lru_cache
def outrun_per_s() -> float:
    """The rate of reconfigurations that the target can set up, object after object."""
    device = load(BASE).device[0]
    assert device.reconfigurations is not None
    return 1e6 / (device.reconfigurations.objects_each * device.critical.setup_us)


def points(quick: bool) -> list[Point]:
    """Every variant at every rate."""
    settings = (*SMALL_RAM, *GIVE_UP)
    return [
        Point(
            *(BASE, name, (*settings, f"device.0.reconfigurations.poisson_per_s={rate:g}"), {FACTOR: rate}),
            every_seed=rate > 0,  # C1 counts runs that give up
        )
        for rate in (QUICK_RATES_PER_S if quick else RATES_PER_S)
        for name in PROTOCOLS
    ]


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """Set-up and downtime at the highest rate that the target keeps up with, and where each variant breaks."""
    rate = number(frame.filter(pl.col(FACTOR) < outrun_per_s())[FACTOR].max())
    busy = frame.filter(pl.col(FACTOR) == rate)
    setups = [mean(busy, SETUP, protocol=name) for name in ("v2", "v3-n4")]
    v2, v3 = (setup.text("ms") if setup else "an unknown time (no run completed)" for setup in setups)
    gain, acked, multifd = (compared_text(busy, base, "v3-n4") for base in ("v2", ACKED, ACKED_MULTIFD))
    return Answer(
        f"At {rate:g} reconfigurations a second, of the {outrun_per_s():.1f} that the target can set up, {v3} of "
        f"set-up is in v3's downtime and {v2} in v2's; downtime of v3-n4 against v2: {gain}.",
        f"One device ({BASE}), whose target sets up one object after the other: more than {outrun_per_s():.1f} "
        "reconfigurations a second are too many for it under any protocol.",
        [
            f"v3-n4 against {ACKED}, whose user waits for the target too: {acked}; against {ACKED_MULTIFD}, whose RAM "
            f"and devices move at the same time, as v3's do: {multifd}.",
            *_where_they_break(frame),
        ],
        [_c1(frame), _c4(busy)],
        effect_table(frame, [FACTOR], [("v2", name) for name in PROTOCOLS[1:]]),
    )


def _where_they_break(frame: pl.DataFrame) -> Iterator[str]:
    """The lowest rate at which not all runs complete, for each protocol that has one."""
    for name in PROTOCOLS:
        for at, ends in itertools.islice(incomplete(frame.filter(protocol=name).sort(FACTOR), [FACTOR]), 1):
            yield f"{name}: from {at[FACTOR]:g} a second on, not all runs complete: {ends}."


def _c1(frame: pl.DataFrame) -> Finding:
    """Has v3 next to no set-up in the downtime at each rate that the target keeps up with? Can v2 tell, and which?"""
    outrun = frame.filter(pl.col(FACTOR) < outrun_per_s())
    v3, of_v2 = (outrun.filter(protocol=name) for name in ("v3-n4", ACKED))
    most, acked, plain = (_worst_ms(outrun, name) for name in ("v3-n4", ACKED, "v2"))
    if v3.is_empty() or of_v2.is_empty() or plain is None:
        return Finding("C1", "under conditions", "it could not be tried: v2, v3 or v2 with an ack has no run.")
    keeps_out = kept_out(most, plain.mean) if v3.filter(~COMPLETED).is_empty() else False
    seen = of_v2.filter(gave_up()).height
    unseen = of_v2.filter(outcome="FAILED").height - seen
    v2_can = not unseen and (acked is None or kept_out(acked, plain.mean) is True)
    worst = of_v2.filter(pl.col(FACTOR) == number(of_v2[FACTOR].max()))
    return Finding(
        "C1",
        judge(supported=bool(keeps_out) and not v2_can, refuted=keeps_out is False),
        f"v3-n4 completes {completed_text(v3)} runs at rates that the target keeps up with; at the worst of them "
        f"the mean set-up in its downtime is {_mean_text(most)}, and in v2's {_mean_text(plain)}. "
        f"v2 with REINIT and a reusable ack ({ACKED}) has {_mean_text(acked)}; it completes {completed_text(of_v2)} "
        f"runs ({completed_text(worst)} at the highest rate) and gives up {seen} because it saw critical data come too "
        "late: " + ("it can tell, too." if v2_can else "it cannot always tell."),
    )


def _worst_ms(frame: pl.DataFrame, protocol: str) -> Interval | None:
    """Mean set-up in the downtime at the rate where it is largest."""
    found = [setup for _, runs in places(frame, [FACTOR]) if (setup := mean(runs, SETUP, protocol=protocol))]
    return max(found, key=lambda setup: setup.mean, default=None)


def _mean_text(setup: Interval | None) -> str:
    return "no completed run" if setup is None else f"{setup.mean:.1f} ms"


def _c4(busy: pl.DataFrame) -> Finding:
    """The part of the set-up that v3-n4 takes out of v2's downtime which v3 with one dirty stream takes out, too."""
    v2, one, four = (mean(busy, SETUP, protocol=name) for name in ("v2", "v3-n1", "v3-n4"))
    if v2 is None or one is None or four is None:
        return Finding("C4", "under conditions", "it could not be tried: one of v2, v3-n1 and v3-n4 completed no run.")
    if v2.mean <= four.mean:
        return Finding("C4", "refuted", "v3-n4 does not take set-up out of v2's downtime here.")
    part = (v2.mean - one.mean) / (v2.mean - four.mean)
    return Finding(
        "C4",
        "supported" if part > MOST_OF_SETUP else "refuted",
        f"two fds (v3-n1) take {100 * part:.0f} % of the set-up out of the downtime that v3-n4 takes out; the rest of "
        "the claim is in read_scaling and ablation.",
    )


# --- the figure -------------------------------------------------------------------------------------------------------


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Downtime, set-up in it, critical lag, and the runs that complete, against the rate."""
    title = "What does the guest's reconfiguring cost, and where does it break a protocol?"
    note = (
        f"{BASE}, {panels.seeds(frame)} seeds, means with 95 % intervals; hollow: not all runs of that place "
        f"completed, none: no point. Dotted: {outrun_per_s():.1f} a second, all that the target can set up"
    )
    figure, axes = panels.sheet(title, note, command, (2, 2), (11, 8.5))
    for axis, measure in zip(axes, PANELS, strict=False):
        panels.panel(axis, panels.by_protocol(frame, PROTOCOLS), measure, FACTOR, "reconfigurations a second")
    panels.completed(axes[3], frame, FACTOR, PROTOCOLS)
    panels.dress(axes[3], "runs that complete", "reconfigurations a second", "%")
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
    panels.legend(figure, PROTOCOLS)
    return {"reconfiguration": figure}


EXPERIMENT = Experiment(
    name="reconfiguration",
    question="How do downtime, critical lag and set-up in the downtime grow with the rate of reconfigurations?",
    points=points,
    answer=answer,
    figures=figures,
)
