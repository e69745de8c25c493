"""Which parameters do the conclusions hang on, and for which device does v3 bring next to nothing?

Each parameter is moved from low to high, the others stay; so a tornado for each conclusion. Two maps, over the
parameters that decide most, show where the gain is less than `WORTH`: for such a device nobody should build v3.
The parameters with their ranges are in experiments/questions/sensitivity/grid.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from experiments.questions.sensitivity.bars import (
    FEWEST,
    MULTIFD,
    Bar,
    bars,
    base,
    gain_told,
    is_under,
    maps_run,
    ratio_of,
    ratio_told,
    sides,
    square,
)
from experiments.questions.sensitivity.figures import figures
from experiments.questions.sensitivity.grid import ACKED_MULTIFD, CONCLUSIONS, IDLE, NIC, V3, Conclusion, points
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import NOT_BOTH, WORTH, Answer, Experiment, Finding, effect_row
from experiments.study.statistics import Effect

NULL_SWING = 0.01
"""A ratio that moves by less over the whole range of a parameter does not hang on it."""
TOP = 3
ONE_ENGINE, ONE_LOCK = "firmware engines", "driver's lock"
"""The parameters that claim C3 is about, at the low and at the high end."""


def answer(frame: pl.DataFrame) -> Answer:
    """What each conclusion hangs on, and where v3 brings less than WORTH."""
    at_base = base(frame, MULTIFD)
    told = bars(frame, MULTIFD)
    ratio = ratio_told(at_base.ratio) if at_base else "no known part"
    return Answer(
        f"{V3}'s downtime is {ratio} (95 % interval) of v2-multifd's on {IDLE}, and that hangs most on "
        f"{_hangs(told)}. {_do_not_build(told)}",
        "Two bases, one parameter at a time (two in the maps): what several do together is not "
        "shown, nor N, which is 4 throughout; ranges are judgements, and a wider one makes a longer bar.",
        [*_regions(frame), *_details(frame)],
        [_c3(frame, told)],
        effects(frame),
    )


def _hangs(told: Sequence[Bar]) -> str:
    """The parameters with the greatest swing, and the ratios at their ends."""
    return "; ".join(f"{bar.parameter}: {bar.low.words}, {bar.high.words}" for bar in told[:TOP]) or "nothing"


def _do_not_build(told: Sequence[Bar]) -> str:
    ends = [
        (end.ratio, f"{bar.parameter} = {end.at}: {gain_told(end.ratio)}")
        for bar in told
        for end in (bar.low, bar.high)
        if end.ratio is not None and is_under(end.ratio)
    ]
    ends.sort(key=lambda end: end[0].mean, reverse=True)
    if not ends:
        least = max((end.ratio.mean for bar in told for end in (bar.low, bar.high) if end.ratio), default=None)
        closest = "" if least is None else f"; the least gain is {100 * (1 - least):.1f} %"
        return f"No single parameter is shown to bring the gain under {100 * WORTH:.0f} %{closest}."
    return (
        f"It brings less than {100 * WORTH:.0f} %, so do not build it for such a device, with any one of "
        f"{'; '.join(words for _, words in ends)}."
    )


def _details(frame: pl.DataFrame) -> list[str]:
    told = []
    for conclusion in CONCLUSIONS:
        at_base, of_it = base(frame, conclusion), bars(frame, conclusion)
        if conclusion is not MULTIFD:
            ratio = ratio_told(at_base.ratio) if at_base else NOT_BOTH
            told.append(f"{conclusion.told}: {ratio}; it hangs most on {_hangs(of_it)}. {_do_not_build(of_it)}")
        null = [bar for bar in of_it if bar.swing < NULL_SWING]
        told.append(
            f"{conclusion.told}: {len(null)} of {len(of_it)} parameters move the ratio by less than {NULL_SWING:g}."
        )
        gone = [
            f"{bar.parameter} = {end.at} ({end.left})" for bar in of_it for end in (bar.low, bar.high) if not end.told
        ]
        if gone:
            told.append(
                f"{conclusion.told}: no ratio, for less than {FEWEST} seeds are completed by both, at "
                f"{'; '.join(gone)}."
            )
    strongest = base(frame, Conclusion("", NIC, ACKED_MULTIFD))
    told.append(f"{V3} against {ACKED_MULTIFD}, {NIC}: {ratio_told(strongest.ratio) if strongest else NOT_BOTH}.")
    return told


def _regions(frame: pl.DataFrame) -> list[str]:
    """For each map and base: the squares in which less than WORTH is shown, engines by engines."""
    told = []
    for of, against in maps_run(frame):
        engines, values = sides(frame, of)
        lines = []
        for each in engines:
            found = [value for value in values if is_under(ratio_of(square(frame, of, each, value, against)))]
            where = "nowhere" if not found else "everywhere" if found == values else "at " + _listed(found)
            lines.append(f"{each:g} engine(s): {where}")
        told.append(
            f"{V3} is shown to bring less than {100 * WORTH:.0f} % over {against}, {of.base}, of {of.words} "
            f"{_listed(values)}: {'; '.join(lines)}."
        )
    return told


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _c3(frame: pl.DataFrame, told: Sequence[Bar]) -> Finding:
    """Under one big lock, or with one engine, N buys nothing: here, less than WORTH over v2-multifd."""
    by_name = {bar.parameter: bar for bar in told}
    engine = by_name[ONE_ENGINE].low if ONE_ENGINE in by_name else None
    lock = by_name[ONE_LOCK].high if ONE_LOCK in by_name else None
    if engine is None or lock is None or engine.ratio is None or lock.ratio is None:
        return Finding("C3", "under conditions", "one of the two was not completed under both protocols here.")
    both = [is_under(engine.ratio), is_under(lock.ratio)]
    why = (
        f"{V3} gains {gain_told(engine.ratio)} over v2-multifd with {engine.at} engine, and {gain_told(lock.ratio)} "
        f"under a {lock.at} lock, on {IDLE}, where copies and waits for the lock are {_locked_percent(frame):.1f} % of "
        f"{V3}'s critical path."
    )
    return Finding("C3", "supported" if all(both) else "under conditions" if any(both) else "refuted", why)


def _locked_percent(frame: pl.DataFrame) -> float:
    """Of v3's downtime under the global lock: what that lock can hold up."""
    there = (pl.col("base") == IDLE) & (pl.col("parameter") == ONE_LOCK) & (pl.col("side") == "high")
    runs = frame.filter(COMPLETED & there & (pl.col("protocol") == V3))
    locked = number(runs["path_lock_ns"].sum()) + number(runs["path_copy_ns"].sum())
    return 100 * locked / number(runs["downtime_ns"].sum())


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """Each conclusion's effect at its base, at each end, and in each square of the maps."""
    rows: list[dict[str, Any]] = []

    def add(told: Effect | None, conclusion: Conclusion, **where: Any) -> None:
        rows.append(
            {"scenario": conclusion.base}
            | {"part": "base", "parameter": "", "side": "", "at": "", "not_completed": ""}
            | where
            | effect_row(told, conclusion.against, V3, 1e6, "ms")
        )

    for conclusion in CONCLUSIONS:
        add(base(frame, conclusion), conclusion)
        for bar in bars(frame, conclusion):
            for side, end in (("low", bar.low), ("high", bar.high)):
                where = {"parameter": bar.parameter, "side": side, "at": end.at, "not_completed": end.left}
                add(end.told, conclusion, part="tornado", **where)
    for of, against in maps_run(frame):
        engines, values = sides(frame, of)
        for each in engines:
            for value in values:
                at = f"{each:g} engines, {of.words} {value:g}"
                told = square(frame, of, each, value, against)
                add(told, Conclusion("", of.base, against), part="map", at=at)
    return pl.DataFrame(rows, infer_schema_length=None)


EXPERIMENT = Experiment(
    name="sensitivity",
    question="Which parameters do the conclusions hang on, and for which device does v3 bring less than 5 %?",
    claims=("C3",),
    points=points,
    answer=answer,
    figures=figures,
)
