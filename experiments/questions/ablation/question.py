# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps from v2 to v3, the cases in which each is tried, and what each step brings."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import polars as pl

from experiments.questions.reconfiguration import ACKED, GIVE_UP, SETUP, SMALL_RAM
from experiments.questions.reconfiguration import ACKED_MULTIFD as FAIR
from experiments.runs.frame import COMPLETED, completed_text, number
from experiments.study.claims import MOST_OF_SETUP, SETUP_LEFT, Finding, judge, kept_out
from experiments.study.effects import NOT_BOTH, Measure, change_text, effect_row, mean, places, sentence, table
from experiments.study.experiment import Answer, Point
from experiments.study.statistics import Effect, Interval, effect, interval, paired

MUCH_TO_SAVE = ("device.0.stop_only_mib=256", "firmware.engines=4", "vmm.downtime_limit_ms=1000")
"""Half the state moves in the downtime, and the firmware runs as many commands at once as there are streams: so N can
gain something. The limit lets v2 stop at all."""
NO_RECONFIGURATIONS = "device.0.reconfigurations.poisson_per_s=0"

V2 = "v2"
TWO_FDS = "v3-n1"
N_FDS = "v3-n4"
STEPS = {
    V2: "v2",
    "v2-reinit-flush": "+ REINIT",
    ACKED: "+ reusable ack",
    FAIR: "+ multifd (QEMU 10)",
    TWO_FDS: "+ second fd: v3, N = 1",
    N_FDS: "+ N = 4",
    "v3-n4-pool": "+ pool",
}
"""The label of each step, by the protocol that it leads to. FAIR is all that QEMU 11.1 has. Multifd comes before v3,
for v3 moves devices and RAM at the same time as well: in the other order, that gain would count as the second fd's."""
MULTIFD = "v2-multifd"
ONE_SHOT = "v2-reinit-flush-ack"
POLLS = "v2-reinit-flush-ack-reusable-polls"
TWO_FDS_ONE_CONNECTION = "v3-n1-one"
N_FDS_ONE_CONNECTION = "v3-n4-one"
BESIDE = (
    *((V2, other) for other in (MULTIFD, FAIR, TWO_FDS, N_FDS)),
    *((ACKED, other) for other in (TWO_FDS, POLLS, ONE_SHOT)),
    *((MULTIFD, other) for other in (TWO_FDS, N_FDS)),
    (FAIR, N_FDS),
    (TWO_FDS_ONE_CONNECTION, N_FDS_ONE_CONNECTION),
)
"""Comparisons beside the steps, where both were run."""


@dataclass(frozen=True, slots=True)
class Case:
    """What the steps are tried on."""

    about: str
    """What it stresses, in a few words."""
    base: str
    settings: tuple[str, ...]
    others: tuple[str, ...] = (MULTIFD,)
    """Protocols beside the steps."""


RECONFIGURED, BUSY, IDLE, FAVOURS_V2 = "nic-reconfig", "nic-much", "nic-much-left-alone", "favours-v2"
CASES = {
    RECONFIGURED: Case(
        "critical data keeps coming", "nic-reconfig", (*SMALL_RAM, *GIVE_UP), (MULTIFD, ONE_SHOT, POLLS)
    ),
    BUSY: Case(
        "and half the state saved when stopped",
        "nic-reconfig",
        (*SMALL_RAM, *GIVE_UP, *MUCH_TO_SAVE),
        (MULTIFD, TWO_FDS_ONE_CONNECTION, N_FDS_ONE_CONNECTION),
    ),
    IDLE: Case(
        "as nic-much, never reconfigured", "nic-reconfig", (*SMALL_RAM, *GIVE_UP, *MUCH_TO_SAVE, NO_RECONFIGURATIONS)
    ),
    "mlx5-2vf": Case("two idle VFs, as published", "mlx5-2vf", ()),
    FAVOURS_V2: Case("one engine, lock, full link", "favours-v2", ()),
}
QUICK_CASES = (RECONFIGURED, BUSY, IDLE, FAVOURS_V2)
CASE = "case"
MEASURES = (
    Measure("downtime", "downtime_ns"),
    Measure("set-up in the downtime", SETUP),
    Measure("longest critical lag", "critical_lag_max_ns"),
    Measure("drain", "phase_drain_ns"),
    Measure("whole migration", "total_ns"),
)
LITTLE = 0.01
"""A step that changes the downtime by less counts as next to nothing, even if its interval does not contain 0."""
INTERACTION = 0.1
"""N and reconfigurations are independent if what N gains with them and without differs by less than this part of it."""


def points(quick: bool) -> list[Point]:
    """Every step in every case, and the protocols beside the steps."""
    return [
        Point(case.base, protocol, case.settings, {CASE: name}, every_seed=name in (RECONFIGURED, BUSY))
        for name, case in CASES.items()
        if not quick or name in QUICK_CASES
        for protocol in (*STEPS, *case.others)
    ]


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """The step that brings the most in each case, and the steps that bring nothing."""
    most = "; ".join(_most(name, runs) for name, runs in cases(frame))
    return Answer(
        f"The step that shortens the downtime most is, in {most}.",
        "Each step is measured after those before it, and what it brings depends on that order: v3 without waiting for "
        "the target, or N streams without a critical one, exist in no protocol here, so the effect of the second fd "
        "cannot be told from that of v3's other rules (epochs, readiness, poll()).",
        [
            *(_nothing(name, runs) for name, runs in cases(frame)),
            *_fair(frame),
            *_parts(frame),
            *_polls(frame),
            *_crossed(frame),
            *_not_completed(frame),
        ],
        [_c1(frame), _c4(frame)],
        effects(frame),
    )


def cases(frame: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Each case that was run, in the order of the grid, with its runs."""
    for name in CASES:
        runs = frame.filter(case=name)
        if runs.height:
            yield name, runs


def steps(runs: pl.DataFrame, column: str) -> list[tuple[str, Effect | None]]:
    """What each step does to a column, against the one before."""
    return [(STEPS[after], effect(runs, column, before, after)) for before, after in itertools.pairwise(STEPS)]


def _most(name: str, runs: pl.DataFrame) -> str:
    """The step that takes off most."""
    known = {label: found for label, found in steps(runs, "downtime_ns") if found}
    if not known:
        return f"{name}: unknown (no step was completed on both sides)"
    label, best = min(known.items(), key=lambda each: each[1].difference.mean)
    percent = 100 * (best.ratio.mean - 1)
    if best.difference.high >= 0 or percent > -100 * LITTLE:
        return f"{name}: none (the best, '{label}': {change_text(best.difference)})"
    lost = f", {best.lost} seed(s) not completed under both" if best.lost else ""
    return f"{name}: '{label}' {change_text(best.difference)}, {percent:+.0f} %{lost}"


def _nothing(name: str, runs: pl.DataFrame) -> str:
    """The steps that bring nothing, next to nothing, or cost."""
    by_kind: defaultdict[str, list[str]] = defaultdict(list)
    for label, found in steps(runs, "downtime_ns"):
        if kind := _kind(found):
            by_kind[kind].append(f"'{label}' {change_text(found.difference)}" if found else f"'{label}'")
    parts = [f"{kind}: {', '.join(labels)}" for kind, labels in by_kind.items()]
    return f"{name}, downtime: {'; '.join(parts) or 'every step takes off 1 % or more'}."


def _kind(found: Effect | None) -> str:
    """Words for a step that does not clearly shorten the downtime."""
    if found is None:
        return NOT_BOTH
    if not found.shown:
        return "bring nothing (interval holds 0)"
    if abs(found.ratio.mean - 1) < LITTLE:
        return f"next to nothing (below {100 * LITTLE:g} %)"
    return "cost" if found.difference.mean > 0 else ""


def _difference(found: Effect | None) -> str:
    return change_text(found.difference) if found else NOT_BOTH


def _fair(frame: pl.DataFrame) -> Iterator[str]:
    """v3 against all that v2 can have."""
    for name, runs in cases(frame):
        down, total = (effect(runs, column, FAIR, N_FDS) for column in ("downtime_ns", "total_ns"))
        if down and total:
            yield (
                f"{name}, {N_FDS} against {FAIR}: downtime {change_text(down.difference)}, whole migration "
                f"{total.difference.mean / 1e6:+.0f} ms; against {V2}: "
                f"{_difference(effect(runs, 'downtime_ns', V2, N_FDS))}."
            )


def _parts(frame: pl.DataFrame) -> Iterator[str]:
    """The part of v3's gain in downtime that there is without all of v3."""
    for name, runs in cases(frame):
        whole = effect(runs, "downtime_ns", V2, N_FDS)
        if whole is None or whole.difference.high >= 0 or whole.ratio.mean > 1 - LITTLE:
            continue
        parts = [
            f"{other} {round(100 * of.difference.mean / whole.difference.mean)} %"
            for other in (ACKED, FAIR, TWO_FDS)
            if (of := effect(runs, "downtime_ns", V2, other))
        ]
        yield f"{name}, of what {N_FDS} takes off v2's downtime: {', '.join(parts)}."


def _polls(frame: pl.DataFrame) -> list[str]:
    """poll() is no setting of v3: what polling changes under v2, and how often each protocol is woken."""
    runs = frame.filter(case=RECONFIGURED)
    down, lag = (_difference(effect(runs, c, ACKED, POLLS)) for c in ("downtime_ns", "critical_lag_max_ns"))
    counts = []
    for name in (ACKED, POLLS, TWO_FDS, N_FDS):
        done = runs.filter(COMPLETED, protocol=name)
        if done.height:
            wakeups, reads, total = (number(done[column].mean()) for column in ("wakeups", "reads", "total_ns"))
            counts.append(f"{name} {wakeups:.0f} wake-ups and {reads:.0f} reads in {total / 1e9:.1f} s")
    return sentence(
        "poll() is no step: no setting of v3 does without it, and calls of the info ioctl are not counted. "
        f"{RECONFIGURED}: ",
        counts,
        f"; a user of v2 that asks in every round against one that deduces: downtime {down}, longest lag {lag}.",
    )


# --- whether they are independent -------------------------------------------------------------------------------------


def interaction(
    here: tuple[pl.DataFrame, str, str], there: tuple[pl.DataFrame, str, str], column: str
) -> tuple[Interval, Interval, Interval] | None:
    """For two of (runs, base, other): what the step does here, what it does there, and here less there, seed by seed.

    None if no seed was completed in all four.
    """
    one, two = (
        paired(runs, column, base, other)
        .cast({base: pl.Float64, other: pl.Float64})
        .select("seed", difference=pl.col(other) - pl.col(base))
        for runs, base, other in (here, there)
    )
    both = one.join(two, on="seed", suffix="_there")
    if both.is_empty():
        return None
    a, b = both["difference"].to_numpy(), both["difference_there"].to_numpy()
    return interval(a), interval(b), interval(a - b)


def by_reconfiguring(frame: pl.DataFrame, column: str) -> tuple[Interval, Interval, Interval] | None:
    """What N does where critical data keeps coming, where it does not, and the difference."""
    busy, idle = (frame.filter(case=name) for name in (BUSY, IDLE))
    return interaction((busy, TWO_FDS, N_FDS), (idle, TWO_FDS, N_FDS), column)


def _crossed(frame: pl.DataFrame) -> Iterator[str]:
    busy = frame.filter(case=BUSY)
    by_wire = interaction((busy, TWO_FDS, N_FDS), (busy, TWO_FDS_ONE_CONNECTION, N_FDS_ONE_CONNECTION), "downtime_ns")
    for where, found in (
        ("where critical data keeps coming, and where it never does", by_reconfiguring(frame, "downtime_ns")),
        ("with a connection a stream, and with one for all", by_wire),
    ):
        if found:
            here, there, between = map(change_text, found)
            yield f"{BUSY}, from N = 1 to 4, {where}: downtime {here} and {there}, which differ by {between}."
    yield "Not crossed: one stream with N (v2 has one fd; N without a critical stream is in no protocol here)."


def _not_completed(frame: pl.DataFrame) -> list[str]:
    others = frame.filter(~COMPLETED).group_by(CASE, "protocol", "outcome", "reason", maintain_order=True).len("runs")
    return [
        f"{row[CASE]}, {row['protocol']}: {row['runs']} {row['outcome']}{': ' * bool(row['reason'])}{row['reason']}."
        for row in others.to_dicts()
    ]


# --- the claims -------------------------------------------------------------------------------------------------------


def setups_ms(frame: pl.DataFrame) -> dict[str, dict[str, Interval]]:
    """Mean set-up in the downtime under v2 and three others, by case; cases in which v2 has none are left out."""
    found = {}
    for name, runs in cases(frame):
        known = {of: setup for of in (V2, ACKED, TWO_FDS, N_FDS) if (setup := mean(runs, SETUP, protocol=of))}
        if len(known) == 4 and known[V2].mean:
            found[name] = known
    return found


def _c1(frame: pl.DataFrame) -> Finding:
    """v3 has next to no set-up in the downtime; but v2 has none either, if it waits for the target."""
    setups = setups_ms(frame)
    if frame.filter(COMPLETED & pl.col("protocol").is_in([V2, ACKED, TWO_FDS, N_FDS])).is_empty():
        return Finding("C1", "under conditions", "it could not be tried: no run was completed.")
    if not setups:
        return Finding("C1", "refuted", "nowhere does v2 have set-up in its downtime that v3 could take out.")
    before = [of[V2].mean for of in setups.values()]
    kept = {name: [kept_out(of[name], of[V2].mean) for of in setups.values()] for name in (N_FDS, ACKED)}
    left = {name: max(of[name].mean for of in setups.values()) for name in (N_FDS, ACKED)}
    return Finding(
        "C1",
        judge(supported=all(kept[N_FDS]) and not all(kept[ACKED]), refuted=False in kept[N_FDS]),
        f"of v2's {min(before):.0f} to {max(before):.0f} ms of set-up in the downtime ({', '.join(setups)}) {N_FDS} "
        f"leaves {left[N_FDS]:.1f} ms at most, and completes {_done(frame, setups, N_FDS)}; one fd with REINIT and the "
        f"reusable ack leaves {left[ACKED]:.1f} ms, and completes {_done(frame, setups, ACKED)}.",
    )


def _done(frame: pl.DataFrame, names: Iterable[str], protocol: str) -> str:
    return f"{completed_text(frame.filter(pl.col(CASE).is_in(list(names)), protocol=protocol))} runs"


def _within(of: Interval, most: float) -> bool | None:
    """True if all of an interval is nearer to 0 than `most`, False if it is shown to be further away, else None."""
    if of.count > 1 and max(abs(of.low), abs(of.high)) < most:
        return True
    return False if of.low > most or of.high < -most else None


def _c4(frame: pl.DataFrame) -> Finding:
    """Two fds give most of C1, N shortens what is saved when stopped, and neither changes the other's gain."""
    setups, crossed = setups_ms(frame), by_reconfiguring(frame, "downtime_ns")
    of_setup = by_reconfiguring(frame, SETUP)
    if BUSY not in setups or crossed is None or of_setup is None:
        return Finding("C4", "under conditions", "not all of it could be tried: too few runs were completed.")
    two, one = (min(_part(of, name) for of in setups.values()) for name in (TWO_FDS, ACKED))
    gain, _, between = crossed
    apart = _within(between, INTERACTION * abs(gain.mean))
    no_setup = _within(of_setup[0], SETUP_LEFT * setups[BUSY][V2].mean * 1e6)
    return Finding(
        "C4",
        judge(
            supported=bool(apart and no_setup and one <= MOST_OF_SETUP),
            refuted=two <= MOST_OF_SETUP or gain.high >= 0 or apart is False or no_setup is False,
        ),
        f"of the set-up that {N_FDS} takes out of v2's downtime two fds take {100 * two:.0f} % and one fd with REINIT "
        f"and the reusable ack {100 * one:.0f} %; in {BUSY} N = 4 changes the downtime of N = 1 by {change_text(gain)} "
        f"and the set-up in it by {change_text(of_setup[0])}; what it changes differs from {IDLE} by "
        f"{change_text(between)}: that they are independent is {'shown' if apart and no_setup else 'not shown'}.",
    )


def _part(setups: Mapping[str, Interval], protocol: str) -> float:
    """What a protocol takes of the set-up that N = 4 takes out of v2's downtime."""
    whole = setups[V2].mean - setups[N_FDS].mean
    return (setups[V2].mean - setups[protocol].mean) / whole if whole > 0 else 0.0


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """Each step against the one before, and the comparisons beside them: all measures, with intervals."""
    pairs = [*((base, other, STEPS[other]) for base, other in itertools.pairwise(STEPS)), *((*of, "") for of in BESIDE)]
    return table(
        at
        | {"step": label, "measure": of.label}
        | effect_row(effect(runs, of.column, base, other), base, other, of.scale, of.unit)
        for at, runs in places(frame, [CASE])
        for base, other, label in pairs
        if {base, other} <= set(runs["protocol"])
        for of in MEASURES
    )
