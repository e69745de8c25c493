"""Does N buy anything? The time to move a stopped device's state against the number of its dirty streams.

One device, all of whose state moves after the stop (`stop-only`): no pre-copy blurs what is measured. Around a base
point (mlx5's rates, 16 engines, a lock a fd, a link to spare) lock, engines, copy rate, link, read size and the kind
of fd change. *Stop-copy time* is from the device stopped to its last byte at the target (drain and transfer): where
the link binds, N sockets of 10 MiB take in what is only read, and the drain alone would show a gain that is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from experiments.questions.read_scaling.figures import figures
from experiments.questions.read_scaling.grid import (
    LOOKS,
    PARTS,
    PLACE,
    V2,
    Place,
    engines,
    fitted,
    largest,
    part_column,
    points,
    scenario,
    shares,
    throughput,
    v3_places,
    with_parts,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import NOT_BOTH, Answer, Experiment, Finding, Verdict, effect_row, places
from experiments.study.statistics import Effect, Interval, effect, interval

TOLERANCE = 0.1
"""C2: a speed-up is as claimed if it is at most so much short of min(N, F): a stream's first SAVE and its last copy
overlap with nothing."""
NOTHING = 0.02
"""C3: N buys nothing if the best N takes off less than this."""


def answer(frame: pl.DataFrame) -> Answer:
    """Is read() the bottleneck, and when?"""
    frame = with_parts(frame)
    four = Place(engines=4.0) if not Place(engines=4.0).of(frame).is_empty() else Place()
    told = effect(four.of(frame), "stop_copy_ns", "v3-n1", "v3-n4")
    return Answer(
        f"{_where_read_binds(frame)} At mlx5's rates, {Place().named}, {_share_at(frame, 1)}; "
        f"{_share_at(frame, 16)}. Four streams on {four.engines:g} engines, a lock a fd, against one: "
        f"{told.told('ms', 1e6) if told else NOT_BOTH}.",
        f"One simulated device of {scenario().device[0].state_mib:g} MiB that is idle; that a PF saves one VF by "
        f"several commands at once is assumed, and so are more than {scenario().firmware.engines:g} engines; copy in "
        "the critical path is read() at the source, write() at the target and v2's buffers together; the lock model is "
        "the source's, at the target v3's streams share no lock.",
        [*_against_v2(frame), *_laws(frame), *_locks_alike(frame), *_expected(frame), *_blocks(frame), *_rest(frame)],
        [_c2(frame), _c3(frame)],
        effects(frame),
    )


# --- what binds -------------------------------------------------------------------------------------------------------


def _where_read_binds(frame: pl.DataFrame) -> str:
    seen, bound, foretold, silent = 0, [], 0, 0
    for place, n, runs in v3_places(frame):
        if parts := shares(runs):
            seen += 1
            if largest(parts) == "read":
                bound.append((place, n))
                foretold += place.bound(n) == "read"
            else:
                silent += place.bound(n) == "read"
    if not seen:
        return "No run was completed."
    if not bound:
        return f"read() (copy and lock) is nowhere the largest part of what moves the state, in {seen} places."
    base = Place().copy_gib_per_s
    at_base: dict[str, set[int]] = {}
    for place, n in bound:
        if place.copy_gib_per_s == base:
            at_base.setdefault(f"{LOOKS[place.lock].label} and {engines(place.engines)}", set()).add(n)
    listed = "; ".join(f"{what}, N = {', '.join(map(str, sorted(ns)))}" for what, ns in at_base.items()) or "nowhere"
    return (
        f"read() (copy and lock) is the largest part of what moves the state in {len(bound)} of {seen} places; in "
        f"{foretold} of them, and in {silent} where it is not, threads can copy less under their locks than firmware "
        f"saves and the link carries, by the rates alone. With a copy of {base:g} GiB/s a thread: {listed}."
    )


def _share_at(frame: pl.DataFrame, n: int) -> str:
    """At the base point."""
    done = Place().of(frame).filter(COMPLETED & (pl.col("streams") == n))
    if done.is_empty():
        return f"with N = {n} nothing was completed"
    whole = pl.sum_horizontal(part_column(name) for name in PARTS)
    share = done.select(100 * pl.col(part_column("read")) / whole).to_series()
    told = interval(share.to_numpy()).told("%")
    return f"with N = {n} it has {told}, and {PARTS[largest(shares(done))]} most"


# --- details ----------------------------------------------------------------------------------------------------------


def _told(told: Effect | None) -> str:
    return told.told("ms", 1e6) if told else NOT_BOTH


def _against_v2(frame: pl.DataFrame) -> list[str]:
    """What one dirty stream has over v2, and what N has."""
    v3 = Place().of(frame)
    return [
        f"stop-copy time, {other} against {base}: "
        f"{_told(effect(pl.concat([Place().of(frame, base), v3]), 'stop_copy_ns', base, other))}."
        for base in V2
        for other in ("v3-n1", "v3-n4")
    ]


def _laws(frame: pl.DataFrame) -> list[str]:
    """The scaling law for each lock at the base point, its contention seed by seed."""
    told = []
    for kind, lock in (("v3", "per_fd"), ("v3", "global"), ("v3-blocks", "none"), ("v3-blocks", "per_fd")):
        runs = Place(lock=lock).of(frame, kind)
        law = fitted(runs)
        if law is None:
            told.append(f"{kind}, {LOOKS[lock].label}: too few N were completed for a scaling law.")
            continue
        by_seed = [one for _, some in places(runs, ["seed"]) if (one := fitted(some)) is not None]
        contention = interval([100 * one.contention for one in by_seed]).told("%") if by_seed else "unknown"
        most = number(runs["streams"].max())
        best = f"{law.best_n:.0f}" if law.best_n <= most else f"beyond {most:.0f}"
        told.append(
            f"{kind}, {LOOKS[lock].label}, scaling law: contention {contention}, coherency {100 * law.coherency:.2f} "
            f"%, best N {best}, R2 {law.r_squared:.3f}."
        )
    return [*told, "The law has no engines, and takes it for coherency if N goes beyond them: read it as a summary."]


def _locks_alike(frame: pl.DataFrame) -> list[str]:
    """Which lock models are the same for one device."""
    told = []
    for one, other in (("none", "per_fd"), ("device", "global")):
        both = [_means(Place(lock=lock).of(frame)) for lock in (one, other)]
        ns = sorted(both[0].keys() & both[1].keys())
        if ns:
            most = max(abs(both[0][n] - both[1][n]) for n in ns)
            told.append(f"{LOOKS[one].label} and {LOOKS[other].label} differ by at most {most:.2f} ms over N, streams.")
    return told


def _means(runs: pl.DataFrame) -> dict[int, float]:
    """Stop-copy time by N, ms."""
    done = runs.filter(COMPLETED).group_by("streams").agg(pl.col("stop_copy_ns").mean() / 1e6)
    return dict(done.iter_rows())


def _expected(frame: pl.DataFrame) -> list[str]:
    """How far the least of three rates tells the throughput."""
    off = {}
    for place, n, runs in v3_places(frame):
        done = throughput(runs).filter(COMPLETED)
        if done.height:
            off[place, n] = number(done["gib_per_s"].mean()) / min(place.bounds_gib_per_s(n).values()) - 1
    if not off:
        return []
    near = sum(abs(each) <= TOLERANCE for each in off.values())
    (place, n), least = min(off.items(), key=lambda item: item[1])
    return [
        f"Throughput is within {100 * TOLERANCE:.0f} % of the least of SAVE, read and link rate in {near} of "
        f"{len(off)} places; the furthest off is {100 * least:+.0f} % ({place.named}, N = {n})."
    ]


def _blocks(frame: pl.DataFrame) -> list[str]:
    """Readers of one fd of blocks, against as many dirty streams."""
    told = []
    for lock in ("none", "per_fd"):
        both = pl.concat([Place(lock=lock).of(frame, kind) for kind in ("v3", "v3-blocks")])
        for n in (1, 16):
            found = effect(both, "stop_copy_ns", f"v3-n{n}", f"v3-blocks-n{n}")
            of = "one reader of blocks against one stream" if n == 1 else f"{n} readers of blocks against {n} streams"
            told.append(f"{of}, {LOOKS[lock].label}: {_told(found)}.")
    return told


def _rest(frame: pl.DataFrame) -> list[str]:
    """Of the downtime, what N cannot change, at the base point's largest N."""
    runs = Place().of(frame).filter(COMPLETED)
    if runs.is_empty():
        return []
    last = runs.filter(pl.col("streams") == runs["streams"].max())
    fixed, load_ns, whole = (
        number(last[f"{name}_ns"].mean()) / 1e6 for name in ("path_fixed", "path_load", "downtime")
    )
    return [
        f"At N = {number(runs['streams'].max()):.0f} {fixed:.0f} ms of fixed costs and {load_ns:.0f} ms of "
        f"LOAD are left in a downtime of {whole:.0f} ms: most of it is nothing that streams could share."
    ]


# --- claims -----------------------------------------------------------------------------------------------------------


def _speed_up(runs: pl.DataFrame, n: int) -> Interval | None:
    """Of N streams over one."""
    told = effect(runs, "stop_copy_ns", "v3-n1", f"v3-n{n}")
    if told is None or told.ratio.low <= 0:
        return None
    ratio = told.ratio
    return Interval(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low, ratio.count)


def _c2(frame: pl.DataFrame) -> Finding:
    """The speed-up against min(N, F), a lock a fd, wherever by the rates neither copy nor link binds."""
    fine: list[tuple[float, Place, int, Interval]] = []
    short: list[tuple[float, Place, int, Interval]] = []
    elsewhere, lost = [], 0
    for place, n, _ in v3_places(frame.filter(pl.col("lock") == "per_fd")):
        if n == 1 or place.engines == 1:
            continue
        told = _speed_up(place.of(frame), n)
        if told is None:
            lost += 1
            continue
        part = told.mean / min(n, place.engines)
        if {place.bound(1), place.bound(n)} == {"SAVE"}:
            (fine if abs(part - 1) <= TOLERANCE else short).append((part, place, n, told))
        else:
            elsewhere.append(part)
    firmware = len(fine) + len(short)
    if not firmware:
        return Finding("C2", "under conditions", "In no place that was completed by the rates does firmware bind.")
    part, place, n, told = min([*fine, *short], key=lambda each: each[0])
    copying = [100 * shares(at.of(frame).filter(pl.col("streams") == n)).get("read", 0.0) for _, at, n, _ in short]
    last = (
        f" (in the others copy and lock have {min(copying):.0f} to {max(copying):.0f} % of the path: a stream's last "
        "chunk is copied when all is saved)"
        if short
        else ""
    )
    why = (
        f"Where firmware binds, the speed-up of N streams over one is within {100 * TOLERANCE:.0f} % of min(N, F) in "
        f"{len(fine)} of {firmware} places{last}; furthest off: {told.told()} of {min(n, place.engines):g} "
        f"({place.named}, N = {n}). Where copy or link bind it is {_range(elsewhere)} of min(N, F)"
        f"{f'; {lost} place(s) were not completed' if lost else ''}."
    )
    some: Verdict = "under conditions" if len(fine) > len(short) else "refuted"
    return Finding("C2", some if short or lost else "supported", why)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "not looked at"


def _gain(runs: pl.DataFrame, first: int = 1) -> tuple[float, int] | None:
    """What the best N beyond the first takes off the first one's stop-copy time, and that N."""
    means = _means(runs)
    others = {n: mean for n, mean in means.items() if n > first}
    if first not in means or not others:
        return None
    best = min(others, key=lambda n: others[n])
    return 1 - others[best] / means[first], best


def _after_the_lock(frame: pl.DataFrame, one_lock: Sequence[tuple[Place, float]]) -> list[tuple[Place, float]]:
    """What more streams take off where so many that one lock binds are there already."""
    told = []
    for place, _ in one_lock:
        runs = place.of(frame)
        first = min((n for n in runs["streams"].unique() if place.bound(n) == "read"), default=0)
        gain = _gain(runs, first)
        if gain is not None:
            told.append((place, gain[0]))
    return told


def _c3(frame: pl.DataFrame) -> Finding:
    """What the best N takes off: under one lock for all with several engines; and with one engine, under any lock."""
    one_lock: list[tuple[Place, float]] = []
    one_engine: list[tuple[Place, float]] = []
    for place in dict.fromkeys(place for place, _, _ in v3_places(frame)):
        told = _gain(place.of(frame))
        if told is not None and place.engines == 1:
            one_engine.append((place, told[0]))
        elif told is not None and place.lock in ("device", "global"):
            one_lock.append((place, told[0]))
    every = one_lock + one_engine
    if not every:
        return Finding("C3", "under conditions", "No place with one lock or one engine was completed.")
    slow, fast = ([each for each in one_lock if (each[0].bound(1) == "read") is binds] for binds in (True, False))
    held, free = ([each for each in one_engine if (each[0].bound(1) == "SAVE") is binds] for binds in (True, False))
    why = (
        f"N takes off: under one lock, where a copy is slower than an engine, {_gains(slow)}, and where it is faster, "
        f"{_gains(fast)}; with one engine, where it is slower than a copy, {_gains(held)}, and where the copy is the "
        f"slower, {_gains(free)}; less than {100 * NOTHING:.0f} % counts as nothing. "
        f"From the N at which one lock binds, by the rates, more N take off {_gains(_after_the_lock(frame, one_lock))}."
        f"{_why_not_nothing(frame, slow)}"
    )
    nothing = [told < NOTHING for _, told in every]
    verdict: Verdict = "supported" if all(nothing) else "under conditions" if any(nothing) else "refuted"
    return Finding("C3", verdict, why)


def _gains(of: Sequence[tuple[Place, float]]) -> str:
    if not of:
        return "(not looked at)"
    gains = [100 * gain for _, gain in of]
    nothing = sum(gain < 100 * NOTHING for gain in gains)
    return f"{min(gains):.1f} to {max(gains):.1f} % (nothing in {nothing} of {len(of)} places)"


def _why_not_nothing(frame: pl.DataFrame, slow: Sequence[tuple[Place, float]]) -> str:
    """Where the lock binds with one stream already and N still gains: what left the critical path."""
    gaining = [(place, gain) for place, gain in slow if gain >= NOTHING]
    if not gaining:
        return ""
    place, _ = max(gaining, key=lambda each: each[1])
    runs = place.of(frame).filter(COMPLETED)
    told = _gain(runs)
    best = told[1] if told else 1
    one, many = (runs.filter(pl.col("streams") == n) for n in (1, best))
    off = {name: _mean_ms(one, part_column(name)) - _mean_ms(many, part_column(name)) for name in PARTS}
    most = largest(off)
    return (
        f" What N = {best} takes off under one lock at a copy of {place.copy_gib_per_s:g} GiB/s is "
        f"{PARTS[most]}: {off[most]:.0f} ms of it leave the critical path."
    )


def _mean_ms(runs: pl.DataFrame, column: str) -> float:
    return number(runs[column].mean()) / 1e6


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """N against one stream, place by place; blocks too; and dirty streams against v2."""
    rows = []
    for at, runs in places(frame.filter(~pl.col("kind").is_in(V2)), ["kind", *PLACE]):
        for n in sorted(runs["streams"].unique()):
            if n > 1:
                one, many = (f"{at['kind']}-n{each}" for each in (1, n))
                rows.append(at | effect_row(effect(runs, "stop_copy_ns", one, many), one, many, 1e6, "ms"))
    for base in V2:
        runs = pl.concat([Place().of(frame, base), Place().of(frame)])
        for n in sorted(Place().of(frame)["streams"].unique()):
            at = {"kind": base} | {name: getattr(Place(), name) for name in PLACE}
            other = f"v3-n{n}"
            rows.append(at | effect_row(effect(runs, "stop_copy_ns", base, other), base, other, 1e6, "ms"))
    return pl.DataFrame(rows, infer_schema_length=None)


EXPERIMENT = Experiment(
    name="read_scaling",
    question="Is read() the bottleneck, and when? How does the time to move a stopped device fall with N?",
    claims=("C2", "C3"),
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
