# SPDX-License-Identifier: GPL-2.0-or-later
"""What the runs of read_scaling say: what binds, how the time falls with N, and of the claims C2 and C3."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from experiments.questions.read_scaling import grid
from experiments.questions.read_scaling.grid import LOOKS, PARTS, V2, Place, fitted, largest, shares, v3_places
from experiments.runs.frame import COMPLETED, ms, number
from experiments.study.claims import Finding, judge
from experiments.study.effects import compared_text, effect_table, places
from experiments.study.experiment import Answer
from experiments.study.statistics import Interval, effect, interval

TOLERANCE = 0.1
"""C2: a speed-up is as claimed if it is short of min(N, F) by at most this part: a stream's first SAVE and its last
copy overlap with nothing."""
NOTHING = 0.02
"""C3: N buys nothing if the best N takes off less than this part."""


class Gain(NamedTuple):
    """What the best N beyond the first takes off the first one's stop-copy time."""

    place: Place
    part: float
    best_n: int


def answer(frame: pl.DataFrame) -> Answer:
    """Is read() the bottleneck, and when?"""
    frame, base = grid.with_parts(frame), grid.scenario()
    four = Place(engines=4.0) if not Place(engines=4.0).of(frame).is_empty() else Place()
    return Answer(
        f"{_where_read_binds(frame)} At mlx5's rates, {Place().text}, {_share_at(frame, 1)}; {_share_at(frame, 16)}. "
        f"Four streams on {four.engines:g} engines, a lock a fd, against one: "
        f"{_compared(four.of(frame), 'v3-n1', 'v3-n4')}.",
        f"One simulated device of {base.device[0].state_mib:g} MiB that is idle; that a PF saves one VF by several "
        f"commands at once is assumed, and so are more than {base.firmware.engines:g} engines; copy in "
        "the critical path is read() at the source, write() at the target and v2's buffers together; the lock model is "
        "the source's, at the target v3's streams share no lock.",
        [*_against_v2(frame), *_laws(frame), *_locks_alike(frame), *_expected(frame), *_blocks(frame), *_rest(frame)],
        [_c2(frame), _c3(frame)],
        _effects(frame),
    )


def _compared(runs: pl.DataFrame, base: str, other: str) -> str:
    return compared_text(runs, base, other, "stop_copy_ns")


# --- what binds -------------------------------------------------------------------------------------------------------


def _where_read_binds(frame: pl.DataFrame) -> str:
    seen = [(place, n, largest(parts)) for place, n, runs in v3_places(frame) if (parts := shares(runs))]
    bound = [(place, n) for place, n, most in seen if most == "read"]
    if not seen:
        return "No run was completed."
    if not bound:
        return f"read() (copy and lock) is nowhere the largest part of what moves the state, in {len(seen)} places."
    foretold = sum(place.bound(n) == "read" for place, n in bound)
    silent = sum(place.bound(n) == "read" for place, n, most in seen if most != "read")
    base = Place().copy_gib_per_s
    at_base: defaultdict[str, set[int]] = defaultdict(set)
    for place, n in bound:
        if place.copy_gib_per_s == base:
            at_base[f"{LOOKS[place.lock].label} and {grid.engines(place.engines)}"].add(n)
    listed = "; ".join(f"{where}, N = {', '.join(map(str, sorted(ns)))}" for where, ns in at_base.items()) or "nowhere"
    return (
        f"read() (copy and lock) is the largest part of what moves the state in {len(bound)} of {len(seen)} places; in "
        f"{foretold} of them, and in {silent} where it is not, threads can copy less under their locks than firmware "
        f"saves and the link carries, by the rates alone. With a copy of {base:g} GiB/s a thread: {listed}."
    )


def _share_at(frame: pl.DataFrame, n: int) -> str:
    """At the base point."""
    done = Place().of(frame, streams=n).filter(COMPLETED)
    if done.is_empty():
        return f"with N = {n} nothing was completed"
    share = done.select(100 * pl.col("read_ns") / pl.sum_horizontal(f"{name}_ns" for name in PARTS)).to_series()
    return f"with N = {n} it has {interval(share.to_numpy()).text('%')}, and {PARTS[largest(shares(done))]} most"


# --- details ----------------------------------------------------------------------------------------------------------


def _against_v2(frame: pl.DataFrame) -> list[str]:
    """What one dirty stream has over v2, and what N has."""
    return [
        f"stop-copy time, {other} against {base}: "
        f"{_compared(pl.concat([Place().of(frame, base), Place().of(frame)]), base, other)}."
        for base in V2
        for other in ("v3-n1", "v3-n4")
    ]


def _laws(frame: pl.DataFrame) -> Iterator[str]:
    """The scaling law for each lock at the base point, its contention seed by seed."""
    for kind, lock in (("v3", "per_fd"), ("v3", "global"), ("v3-blocks", "none"), ("v3-blocks", "per_fd")):
        runs = Place(lock=lock).of(frame, kind)
        law = fitted(runs)
        if law is None:
            yield f"{kind}, {LOOKS[lock].label}: too few N were completed for a scaling law."
            continue
        by_seed = [one for _, some in places(runs, ["seed"]) if (one := fitted(some)) is not None]
        contention = interval([100 * one.contention for one in by_seed]).text("%") if by_seed else "unknown"
        most = number(runs["streams"].max())
        best = f"{law.best_n:.0f}" if law.best_n <= most else f"beyond {most:.0f}"
        yield (
            f"{kind}, {LOOKS[lock].label}, scaling law: contention {contention}, coherency {100 * law.coherency:.2f} "
            f"%, best N {best}, R2 {law.r_squared:.3f}."
        )
    yield "The law has no engines. If N goes beyond them, it takes that for coherency: read it as a summary."


def _locks_alike(frame: pl.DataFrame) -> Iterator[str]:
    """The lock models that are the same for one device."""
    for one, other in (("none", "per_fd"), ("device", "global")):
        a, b = (_means(Place(lock=lock).of(frame)) for lock in (one, other))
        if ns := a.keys() & b.keys():
            most = max(abs(a[n] - b[n]) for n in ns)
            yield f"{LOOKS[one].label} and {LOOKS[other].label} differ by at most {most:.2f} ms over N, streams."


def _means(runs: pl.DataFrame) -> dict[int, float]:
    """Stop-copy time by N, ms."""
    done = runs.filter(COMPLETED).group_by("streams").agg(pl.col("stop_copy_ns").mean() / 1e6)
    return dict(done.iter_rows())


def _expected(frame: pl.DataFrame) -> Iterator[str]:
    """How close the throughput is to the least of three rates."""
    off = {}
    for place, n, runs in v3_places(frame):
        done = runs.filter(COMPLETED)
        if done.height:
            off[place, n] = number(done["gib_per_s"].mean()) / min(place.bounds_gib_per_s(n).values()) - 1
    if off:
        near = sum(abs(each) <= TOLERANCE for each in off.values())
        (place, n), least = min(off.items(), key=lambda item: item[1])
        yield (
            f"Throughput is within {100 * TOLERANCE:.0f} % of the least of SAVE, read and link rate in {near} of "
            f"{len(off)} places; the furthest off is {100 * least:+.0f} % ({place.text}, N = {n})."
        )


def _blocks(frame: pl.DataFrame) -> Iterator[str]:
    """Readers of one fd of blocks, against as many dirty streams."""
    for lock in ("none", "per_fd"):
        both = pl.concat([Place(lock=lock).of(frame, kind) for kind in ("v3", "v3-blocks")])
        for n in (1, 16):
            of = "one reader of blocks against one stream" if n == 1 else f"{n} readers of blocks against {n} streams"
            yield f"{of}, {LOOKS[lock].label}: {_compared(both, f'v3-n{n}', f'v3-blocks-n{n}')}."


def _rest(frame: pl.DataFrame) -> Iterator[str]:
    """What N cannot change of the downtime, at the base point's largest N."""
    runs = Place().of(frame).filter(COMPLETED)
    if not runs.is_empty():
        most = max(runs["streams"])
        last = runs.filter(streams=most)
        fixed, load, whole = (ms(last[f"{name}_ns"].mean()) for name in ("path_fixed", "path_load", "downtime"))
        yield (
            f"At N = {most}, {fixed:.0f} ms of fixed costs and {load:.0f} ms of LOAD are "
            f"left in a downtime of {whole:.0f} ms: streams cannot share most of it."
        )


# --- claims -----------------------------------------------------------------------------------------------------------


def _speed_up(runs: pl.DataFrame, n: int) -> Interval | None:
    """Of N streams over one."""
    found = effect(runs, "stop_copy_ns", "v3-n1", f"v3-n{n}")
    if found is None or found.ratio.low <= 0:
        return None
    ratio = found.ratio
    return Interval(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low, ratio.count)


def _c2(frame: pl.DataFrame) -> Finding:
    """The speed-up against min(N, F), a lock a fd, wherever by the rates neither copy nor link binds."""
    firmware: list[tuple[float, Place, int, Interval]] = []
    elsewhere, lost = [], 0
    for place, n, _ in v3_places(frame.filter(lock="per_fd")):
        if n == 1 or place.engines == 1:
            continue
        speed_up = _speed_up(place.of(frame), n)
        if speed_up is None:
            lost += 1
            continue
        part = speed_up.mean / min(n, place.engines)
        if {place.bound(1), place.bound(n)} == {"SAVE"}:
            firmware.append((part, place, n, speed_up))
        else:
            elsewhere.append(part)
    if not firmware:
        return Finding("C2", "under conditions", "In no place that was completed by the rates does firmware bind.")
    short = [each for each in firmware if abs(each[0] - 1) > TOLERANCE]
    fine = len(firmware) - len(short)
    _, place, n, speed_up = min(firmware, key=lambda each: each[0])
    copying = [100 * shares(at.of(frame, streams=many)).get("read", 0.0) for _, at, many, _ in short]
    last = ""
    if short:
        path = f"{min(copying):.0f} to {max(copying):.0f} % of the path"
        last = f" (in the others copy and lock have {path}: a stream's last chunk is copied when all is saved)"
    beyond = f"{min(elsewhere):.2f} to {max(elsewhere):.2f}" if elsewhere else "not looked at"
    return Finding(
        "C2",
        judge(supported=not short and not lost, refuted=bool(short or lost) and fine <= len(short)),
        f"Where firmware binds, the speed-up of N streams over one is within {100 * TOLERANCE:.0f} % of min(N, F) in "
        f"{fine} of {len(firmware)} places{last}; furthest off: {speed_up.text()} of {min(n, place.engines):g} "
        f"({place.text}, N = {n}). Where copy or link bind it is {beyond} of min(N, F)"
        f"{f'; {lost} place(s) were not completed' if lost else ''}.",
    )


def _gain(runs: pl.DataFrame, place: Place, first: int = 1) -> Gain | None:
    means = _means(runs)
    best = min((n for n in means if n > first), key=means.__getitem__, default=None)
    if best is None or first not in means:
        return None
    return Gain(place, 1 - means[best] / means[first], best)


def _after_the_lock(frame: pl.DataFrame, one_lock: Sequence[Gain]) -> Iterator[Gain]:
    """What more streams take off where one lock binds already."""
    for place, *_ in one_lock:
        runs = place.of(frame)
        first = min((n for n in runs["streams"].unique() if place.bound(n) == "read"), default=0)
        if gain := _gain(runs, place, first):
            yield gain


def _c3(frame: pl.DataFrame) -> Finding:
    """What the best N takes off: under one lock for all with several engines; and with one engine, under any lock."""
    all_places = dict.fromkeys(place for place, _, _ in v3_places(frame))
    gains = [gain for place in all_places if (gain := _gain(place.of(frame), place))]
    one_engine = [gain for gain in gains if gain.place.engines == 1]
    one_lock = [gain for gain in gains if gain.place.engines != 1 and gain.place.lock in ("device", "global")]
    if not one_lock + one_engine:
        return Finding("C3", "under conditions", "No place with one lock or one engine was completed.")
    slow, fast = ([each for each in one_lock if (each.place.bound(1) == "read") is binds] for binds in (True, False))
    held, free = ([each for each in one_engine if (each.place.bound(1) == "SAVE") is binds] for binds in (True, False))
    nothing = [gain.part < NOTHING for gain in one_lock + one_engine]
    return Finding(
        "C3",
        judge(supported=all(nothing), refuted=not any(nothing)),
        f"N takes off: under one lock, where a copy is slower than an engine, {_gains_text(slow)}, and where it is "
        f"faster, {_gains_text(fast)}; with one engine, where it is slower than a copy, {_gains_text(held)}, and where "
        f"the copy is the slower, {_gains_text(free)}; less than {100 * NOTHING:.0f} % counts as nothing. From the N "
        f"at which one lock binds, by the rates, more N take off {_gains_text(list(_after_the_lock(frame, one_lock)))}."
        f"{_why_not_nothing(frame, slow)}",
    )


def _gains_text(of: Sequence[Gain]) -> str:
    if not of:
        return "(not looked at)"
    gains = [100 * gain.part for gain in of]
    nothing = sum(gain < 100 * NOTHING for gain in gains)
    return f"{min(gains):.1f} to {max(gains):.1f} % (nothing in {nothing} of {len(of)} places)"


def _why_not_nothing(frame: pl.DataFrame, slow: Sequence[Gain]) -> str:
    """Where the lock binds with one stream already and N still gains: what left the critical path."""
    place, part, best_n = max(slow, key=lambda gain: gain.part, default=(Place(), 0.0, 1))
    if part < NOTHING:
        return ""
    one, many = (place.of(frame, streams=n).filter(COMPLETED) for n in (1, best_n))
    off = {name: ms(one[f"{name}_ns"].mean()) - ms(many[f"{name}_ns"].mean()) for name in PARTS}
    most = largest(off)
    return (
        f" What N = {best_n} takes off under one lock at a copy of {place.copy_gib_per_s:g} GiB/s is "
        f"{PARTS[most]}: {off[most]:.0f} ms of it leave the critical path."
    )


def _effects(frame: pl.DataFrame) -> pl.DataFrame:
    """N against one stream, place by place; blocks too; and dirty streams against v2."""
    by, here, ns = ["kind", *grid.PLACE], Place().of(frame), frame["streams"].unique().sort()
    of_one = [(f"{kind}-n1", f"{kind}-n{n}") for kind in ("v3", "v3-blocks") for n in ns if n > 1]
    of_v2 = [pl.concat([Place().of(frame, kind), here.with_columns(kind=pl.lit(kind))]) for kind in V2]
    against_v2 = [(base, f"v3-n{n}") for base in V2 for n in ns]
    return pl.concat(
        [
            effect_table(frame.filter(~pl.col("kind").is_in(V2)), by, of_one, "stop_copy_ns"),
            effect_table(pl.concat(of_v2), by, against_v2, "stop_copy_ns"),
        ],
        how="vertical_relaxed",
    )
