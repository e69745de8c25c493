"""What does each step from v2 to v3 bring?

v3 is several things at once: somebody waits for the target's set-up, critical data has a stream of its own, devices and
RAM move beside each other, a device is read by N. Each can be had without what comes after it, and some without v3. So
the steps are taken one at a time, on cases that stress different things, and each against the one before, seed by seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import polars as pl
from matplotlib.figure import Figure

from experiments.questions.ablation import figures as figures_ablation
from experiments.questions.ablation.grid import (
    ACKED,
    BUSY,
    CASE,
    CASES,
    FAIR,
    IDLE,
    MULTIFD,
    N_FDS,
    N_FDS_ONE_CONNECTION,
    ONE_SHOT,
    POLLS,
    RECONFIGURED,
    STEPS,
    TWO_FDS,
    TWO_FDS_ONE_CONNECTION,
    V2,
    points,
)
from experiments.runs.frame import COMPLETED
from experiments.study.experiment import NOT_BOTH, SETUP_LEFT, Answer, Experiment, Finding, effect_row, kept_out, places
from experiments.study.statistics import Effect, Interval, effect, interval, paired

MEASURES = (
    ("downtime", "downtime_ns", 1e6, "ms"),
    ("set-up in the downtime", "setup_in_downtime_ns", 1e6, "ms"),
    ("longest critical lag", "critical_lag_max_ns", 1e6, "ms"),
    ("drain", "phase_drain_ns", 1e6, "ms"),
    ("whole migration", "total_ns", 1e6, "ms"),
)
BESIDE = (
    (V2, MULTIFD),
    (V2, FAIR),
    (V2, TWO_FDS),
    (V2, N_FDS),
    (ACKED, TWO_FDS),
    (ACKED, POLLS),
    (ACKED, ONE_SHOT),
    (MULTIFD, TWO_FDS),
    (MULTIFD, N_FDS),
    (FAIR, N_FDS),
    (TWO_FDS_ONE_CONNECTION, N_FDS_ONE_CONNECTION),
)
"""Comparisons beside those of a step with the one before, where both were run."""
LITTLE = 0.01
"""Of the downtime before it: a step that brings less is told as next to nothing, though its interval leaves 0 out."""
MOST = 0.9
"""Of the set-up that v3-n4 takes out of v2's downtime."""
INTERACTION = 0.1
"""Of what N gains: if its gain with reconfigurations and without differ by less, they are independent."""


def answer(frame: pl.DataFrame) -> Answer:
    """Case by case: which step brings the most, and which bring nothing."""
    told = [f"{name}: {_most(runs)}" for name, runs in _cases(frame)]
    return Answer(
        f"The step that shortens the downtime most is, in {'; '.join(told)}.",
        "Each step is measured behind those before it, and what it brings hangs on that order: v3 without waiting for "
        "the target, or N streams without a critical one, exist in no protocol here, so the second fd cannot be told "
        "from v3's other rules (epochs, readiness, poll()).",
        [
            *_nothing(frame),
            *_fair(frame),
            *_parts(frame),
            *_polls(frame),
            *_crossed(frame),
            *_not_completed(frame),
        ],
        [_c1(frame), _c4(frame)],
        effects(frame),
    )


def _cases(frame: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """In the order of the grid."""
    for case in CASES:
        runs = frame.filter(pl.col(CASE) == case.name)
        if runs.height:
            yield case.name, runs


def steps(runs: pl.DataFrame, column: str) -> list[tuple[str, Effect | None]]:
    """What each step does to a column, against the one before."""
    return [
        (step.label, effect(runs, column, before.protocol, step.protocol)) for before, step in itertools.pairwise(STEPS)
    ]


def _most(runs: pl.DataFrame) -> str:
    """The step that takes off most."""
    known = [(label, told) for label, told in steps(runs, "downtime_ns") if told]
    if not known:
        return "unknown (no step was completed on both sides)"
    label, told = min(known, key=lambda each: each[1].difference.mean)
    percent = 100 * (told.ratio.mean - 1)
    if told.difference.high >= 0 or percent > -100 * LITTLE:
        return f"none (the best, '{label}': {_ms(told.difference)})"
    lost = f", {told.lost} seed(s) not completed under both" if told.lost else ""
    return f"'{label}' {_ms(told.difference)}, {percent:+.0f} %{lost}"


def _ms(of: Interval) -> str:
    mean, low, high = (round(value / 1e6, 1) + 0.0 for value in (of.mean, of.low, of.high))
    return f"{mean:+.1f} ms (95 % interval {low:+.1f} to {high:+.1f})"


def _nothing(frame: pl.DataFrame) -> list[str]:
    """Steps that bring nothing, next to nothing, or cost."""
    lines = []
    for name, runs in _cases(frame):
        said: dict[str, list[str]] = {}
        for label, told in steps(runs, "downtime_ns"):
            kind = _kind(told)
            if kind:
                number = f" {_ms(told.difference)}" if told else ""
                said.setdefault(kind, []).append(f"'{label}'{number}")
        parts = [f"{kind}: {', '.join(labels)}" for kind, labels in said.items()]
        lines.append(f"{name}, downtime: {'; '.join(parts) or 'every step takes off 1 % or more'}.")
    return lines


def _kind(told: Effect | None) -> str:
    """What a step is, in words, that does not shorten the downtime to speak of."""
    if told is None:
        return NOT_BOTH
    if not told.shown:
        return "bring nothing (interval holds 0)"
    if abs(told.ratio.mean - 1) < LITTLE:
        return f"next to nothing (below {100 * LITTLE:g} %)"
    return "cost" if told.difference.mean > 0 else ""


def _fair(frame: pl.DataFrame) -> list[str]:
    """v3 against all that v2 can have."""
    lines = []
    for name, runs in _cases(frame):
        down, total = (effect(runs, column, FAIR, N_FDS) for column in ("downtime_ns", "total_ns"))
        if down and total:
            lines.append(
                f"{name}, {N_FDS} against {FAIR}: downtime {_ms(down.difference)}, whole migration "
                f"{total.difference.mean / 1e6:+.0f} ms; against {V2}: {_told(effect(runs, 'downtime_ns', V2, N_FDS))}."
            )
    return lines


def _parts(frame: pl.DataFrame) -> list[str]:
    """How much of v3's gain in downtime is there with less than v3."""
    lines = []
    for name, runs in _cases(frame):
        whole = effect(runs, "downtime_ns", V2, N_FDS)
        if whole is None or whole.difference.high >= 0 or whole.ratio.mean > 1 - LITTLE:
            continue
        known = {other: effect(runs, "downtime_ns", V2, other) for other in (ACKED, FAIR, TWO_FDS)}
        told = [
            f"{other} {round(100 * of.difference.mean / whole.difference.mean)} %" for other, of in known.items() if of
        ]
        lines.append(f"{name}, of what {N_FDS} takes off v2's downtime: {', '.join(told)}.")
    return lines


def _told(of: Effect | None) -> str:
    return _ms(of.difference) if of else NOT_BOTH


def _polls(frame: pl.DataFrame) -> list[str]:
    """poll() is no setting of v3: what a user of v2 that polls changes, and how often all of them are woken."""
    runs = frame.filter(pl.col(CASE) == RECONFIGURED)
    down, lag = (effect(runs, column, ACKED, POLLS) for column in ("downtime_ns", "critical_lag_max_ns"))
    counts = []
    for name in (ACKED, POLLS, TWO_FDS, N_FDS):
        done = runs.filter(COMPLETED & (pl.col("protocol") == name))
        if done.height:
            wakeups, reads, total = (interval(done[c].to_numpy()).mean for c in ("wakeups", "reads", "total_ns"))
            counts.append(f"{name} {wakeups:.0f} wake-ups and {reads:.0f} reads in {total / 1e9:.1f} s")
    if not counts:
        return []
    return [
        "poll() is no step: no setting of v3 does without it, and calls of the info ioctl are not counted. "
        f"{RECONFIGURED}: {'; '.join(counts)}; a user of v2 that asks in every round against one that deduces: "
        f"downtime {_told(down)}, longest lag {_told(lag)}."
    ]


# --- whether they are independent -------------------------------------------------------------------------------------


def differences(runs: pl.DataFrame, column: str, base: str, other: str) -> pl.DataFrame:
    """Seed by seed, other minus base, of what was completed under both: `seed`, `difference`."""
    told = pl.col(other).cast(pl.Float64) - pl.col(base).cast(pl.Float64)
    return paired(runs, column, base, other).select("seed", difference=told)


def interaction(
    here: tuple[pl.DataFrame, str, str], there: tuple[pl.DataFrame, str, str], column: str
) -> tuple[Interval, Interval, Interval] | None:
    """Of (runs, base, other): what the step does here, what it does there, and here less there, seed by seed.

    None if no seed was completed in all four.
    """
    both = differences(here[0], column, *here[1:]).join(
        differences(there[0], column, *there[1:]), on="seed", how="inner", suffix="_there"
    )
    if both.is_empty():
        return None
    a, b = both["difference"].to_numpy(), both["difference_there"].to_numpy()
    return interval(a), interval(b), interval(a - b)


def by_reconfiguring(frame: pl.DataFrame, column: str) -> tuple[Interval, Interval, Interval] | None:
    """What N does where critical data keeps coming, where it does not, and the difference."""
    busy, idle = (frame.filter(pl.col(CASE) == name) for name in (BUSY, IDLE))
    return interaction((busy, TWO_FDS, N_FDS), (idle, TWO_FDS, N_FDS), column)


def by_wire(frame: pl.DataFrame, column: str) -> tuple[Interval, Interval, Interval] | None:
    """What N does with a connection a stream, with one for all, and the difference."""
    busy = frame.filter(pl.col(CASE) == BUSY)
    return interaction((busy, TWO_FDS, N_FDS), (busy, TWO_FDS_ONE_CONNECTION, N_FDS_ONE_CONNECTION), column)


def _crossed(frame: pl.DataFrame) -> list[str]:
    lines = []
    for what, told in (
        ("where critical data keeps coming, and where it never does", by_reconfiguring(frame, "downtime_ns")),
        ("with a connection a stream, and with one for all", by_wire(frame, "downtime_ns")),
    ):
        if told:
            here, there, between = told
            lines.append(
                f"{BUSY}, from N = 1 to 4, {what}: downtime {_ms(here)} and {_ms(there)}, which differ by "
                f"{_ms(between)}."
            )
    return [
        *lines,
        "Not crossed: one stream with N (v2 has one fd; N without a critical stream is in no protocol here).",
    ]


def _not_completed(frame: pl.DataFrame) -> list[str]:
    lost = frame.filter(~COMPLETED).group_by(CASE, "protocol", "outcome", "reason", maintain_order=True).len("runs")
    return [
        f"{row[CASE]}, {row['protocol']}: {row['runs']} {row['outcome']}{': ' * bool(row['reason'])}{row['reason']}."
        for row in lost.to_dicts()
    ]


# --- the claims -------------------------------------------------------------------------------------------------------


def _setup_ms(runs: pl.DataFrame, protocol: str) -> Interval | None:
    """Set-up in the downtime of the completed runs."""
    values = runs.filter(COMPLETED & (pl.col("protocol") == protocol))["setup_in_downtime_ns"].drop_nulls()
    return interval(values.to_numpy() / 1e6) if len(values) else None


def setup_parts(frame: pl.DataFrame) -> dict[str, dict[str, float]]:
    """By case in which v2 has set-up in its downtime: that, and what each protocol leaves of it, ms."""
    told = {}
    for name, runs in _cases(frame):
        before = _setup_ms(runs, V2)
        left = {protocol: _setup_ms(runs, protocol) for protocol in (ACKED, TWO_FDS, N_FDS)}
        if before is None or not before.mean or None in left.values():
            continue
        known = {protocol: of.mean for protocol, of in left.items() if of is not None}
        told[name] = {"before_ms": before.mean, **known}
    return told


def _c1(frame: pl.DataFrame) -> Finding:
    """v3 has next to no set-up in the downtime; but who waits for the target with v2 has none, either."""
    told = setup_parts(frame)
    if frame.filter(COMPLETED & (pl.col("protocol").is_in([V2, ACKED, TWO_FDS, N_FDS]))).is_empty():
        return Finding("C1", "under conditions", "it could not be tried: no run was completed.")
    if not told:
        return Finding("C1", "refuted", "nowhere does v2 have set-up in its downtime that v3 could take out.")
    before = [of["before_ms"] for of in told.values()]
    kept = {
        name: [kept_out(_setup_ms(runs, name), told[case]["before_ms"]) for case, runs in _cases(frame) if case in told]
        for name in (N_FDS, ACKED)
    }
    left = {name: max(of[name] for of in told.values()) for name in (N_FDS, ACKED)}
    why = (
        f"of v2's {min(before):.0f} to {max(before):.0f} ms of set-up in the downtime ({', '.join(told)}) {N_FDS} "
        f"leaves {left[N_FDS]:.1f} ms at most, and completes {_done(frame, told, N_FDS)}; one fd with REINIT and the "
        f"reusable ack leaves {left[ACKED]:.1f} ms, and completes {_done(frame, told, ACKED)}."
    )
    if False in kept[N_FDS]:
        return Finding("C1", "refuted", why)
    return Finding("C1", "supported" if all(kept[N_FDS]) and not all(kept[ACKED]) else "under conditions", why)


def _done(frame: pl.DataFrame, cases: Iterable[str], protocol: str) -> str:
    runs = frame.filter(pl.col(CASE).is_in(list(cases)) & (pl.col("protocol") == protocol))
    return f"{runs.filter(COMPLETED).height} of {runs.height} runs"


def _within(of: Interval, most: float) -> bool | None:
    """Whether all of an interval is nearer to 0 than this; None if neither that is shown nor the contrary."""
    if of.count > 1 and max(abs(of.low), abs(of.high)) < most:
        return True
    return False if of.low > most or of.high < -most else None


def _c4(frame: pl.DataFrame) -> Finding:
    """Two fds give most of C1, N shortens what is saved when stopped, and neither changes the other's gain."""
    told, crossed = setup_parts(frame), by_reconfiguring(frame, "downtime_ns")
    setup = by_reconfiguring(frame, "setup_in_downtime_ns")
    if BUSY not in told or crossed is None or setup is None:
        return Finding("C4", "under conditions", "not all of it could be tried: too few runs were completed.")
    parts = {
        name: min(_part(of, name_of) for of in told.values()) for name, name_of in (("two", TWO_FDS), ("one", ACKED))
    }
    gain, _, between = crossed
    apart = _within(between, INTERACTION * abs(gain.mean))
    no_setup = _within(setup[0], SETUP_LEFT * told[BUSY]["before_ms"] * 1e6)
    why = (
        f"of the set-up that {N_FDS} takes out of v2's downtime two fds take {100 * parts['two']:.0f} % and one fd "
        f"with REINIT and the reusable ack {100 * parts['one']:.0f} %; in {BUSY} N = 4 changes the downtime of N = 1 "
        f"by {_ms(gain)}, set-up in it by {_ms(setup[0])}; what it changes differs from {IDLE} by {_ms(between)}: "
        f"that they are independent is {'shown' if apart and no_setup else 'not shown'}."
    )
    if parts["two"] <= MOST or gain.high >= 0 or apart is False or no_setup is False:
        return Finding("C4", "refuted", why)
    everything = apart and no_setup and parts["one"] <= MOST
    return Finding("C4", "supported" if everything else "under conditions", why)


def _part(of: Mapping[str, float], protocol: str) -> float:
    """Which part of what N = 4 takes out."""
    whole = of["before_ms"] - of[N_FDS]
    return (of["before_ms"] - of[protocol]) / whole if whole > 0 else 0.0


# --- the table and the figures ----------------------------------------------------------------------------------------


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """Each step against the one before, and the comparisons beside them: all measures, with intervals."""
    rows = []
    pairs = [(before.protocol, step.protocol, step.label) for before, step in itertools.pairwise(STEPS)]
    for at, runs in places(frame, [CASE]):
        there = set(runs["protocol"])
        beside = [(base, other, "") for base, other in BESIDE if {base, other} <= there]
        for base, other, label in (*pairs, *beside):
            for measure, column, scale, unit in MEASURES:
                told = effect(runs, column, base, other)
                rows.append(at | {"step": label, "measure": measure} | effect_row(told, base, other, scale, unit))
    return pl.DataFrame(rows, infer_schema_length=None)


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Step by step: downtime; set-up and lag; and whether N and the second fd add up."""
    cases = {
        name: (runs, {column: steps(runs, column) for _, column, _, _ in MEASURES[:3]}) for name, runs in _cases(frame)
    }
    return figures_ablation.figures(frame, cases, command)


EXPERIMENT = Experiment(
    name="ablation",
    question="What does each step from v2 to v3 bring: REINIT, ack, multifd, a second fd, N fds, a pool?",
    claims=("C1", "C4"),
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
