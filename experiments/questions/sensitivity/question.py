# SPDX-License-Identifier: GPL-2.0-or-later
"""What the runs of sensitivity say: the effect at each base, at each end of a parameter, in each square of a map."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from experiments.questions.reconfiguration import ACKED_MULTIFD
from experiments.questions.sensitivity.grid import CONCLUSIONS, ENGINES_COLUMN, IDLE, MAPS, NIC, V3, Conclusion, Map
from experiments.runs.frame import COMPLETED, path_shares
from experiments.study.claims import WORTH, Finding, judge
from experiments.study.effects import NOT_BOTH, effect_row, sentence, table
from experiments.study.experiment import Answer
from experiments.study.statistics import Effect, effect
from proto_v3.timeline import Resource

FEWEST = 3
"""Seeds that both completed, for a ratio at an end of a parameter."""
MULTIFD = CONCLUSIONS[1]
"""The strongest v2 for idle devices."""
NULL_SWING = 0.01
"""A ratio that moves by less over the whole range of a parameter does not depend on it."""
TOP = 3
ONE_ENGINE, ONE_LOCK = "firmware engines", "driver's lock"
"""The parameters of claim C3, at the low and at the high end."""


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RangeEnd:
    """An end of a parameter's range: its value, the effect there, and the runs that were not completed."""

    at: str
    found: Effect | None
    not_completed: str
    """`v2 10 DID_NOT_CONVERGE`; empty if all were completed."""

    @property
    def text(self) -> str:
        """`0.912 (0.905 to 0.918) at 195`."""
        if self.found is None:
            return f"no ratio at {self.at} ({self.not_completed or NOT_BOTH})"
        pairs = f", {self.found.pairs} pairs" if self.found.lost else ""
        return f"{ratio_text(self.found)} at {self.at}{pairs}"


@dataclass(frozen=True, slots=True)
class Bar:
    """How far a conclusion's ratio moves with a parameter."""

    parameter: str
    base: Effect | None
    low: RangeEnd
    high: RangeEnd

    @property
    def swing(self) -> float:
        """From the least to the greatest ratio, of the base and the two ends that have one."""
        means = [each.ratio.mean for each in (self.base, self.low.found, self.high.found) if each]
        return max(means) - min(means) if means else 0.0


def ratio_text(found: Effect) -> str:
    """`0.912 (0.905 to 0.918)`."""
    return found.ratio.brief(digits=3)


def is_under(found: Effect | None) -> bool:
    """True if it is shown that the gain is less than WORTH."""
    return found is not None and found.ratio.low > 1 - WORTH


def _effect(runs: pl.DataFrame, against: str) -> Effect | None:
    """None if too few seeds were completed by both for a ratio."""
    found = effect(runs, "downtime_ns", against, V3)
    return found if found is not None and found.pairs >= min(FEWEST, runs["seed"].n_unique()) else None


def base(frame: pl.DataFrame, conclusion: Conclusion) -> Effect | None:
    """With no parameter moved."""
    return effect(frame.filter(part="base", base=conclusion.base), "downtime_ns", conclusion.against, V3)


def bars(frame: pl.DataFrame, conclusion: Conclusion) -> list[Bar]:
    """Each parameter that was moved, the greatest swing first."""
    runs = frame.filter(part="tornado", base=conclusion.base)
    at_base, found = base(frame, conclusion), []
    for (parameter,), of_parameter in runs.group_by("parameter", maintain_order=True):
        low, high = (_end(of_parameter.filter(side=side), conclusion.against) for side in ("low", "high"))
        found.append(Bar(str(parameter), at_base, low, high))
    return sorted(found, key=lambda bar: bar.swing, reverse=True)


def _end(runs: pl.DataFrame, against: str) -> RangeEnd:
    others = runs.filter(~COMPLETED, pl.col("protocol").is_in([against, V3]))
    counts = others.group_by("protocol", "outcome", maintain_order=True).len("runs")
    text = ", ".join(f"{protocol} {count} {kind}" for protocol, kind, count in counts.iter_rows())
    return RangeEnd(str(runs["at"].first()) if runs.height else "", _effect(runs, against), text)


def square(frame: pl.DataFrame, of: Map, engines: float, value: float, against: str) -> Effect | None:
    """A place of a map."""
    return _effect(frame.filter(part="map", base=of.base, **{ENGINES_COLUMN: engines, of.column: value}), against)


def maps_run(frame: pl.DataFrame) -> list[tuple[Map, str]]:
    """The maps that were run, with each protocol that v3 is compared with there."""
    return [(of, against) for of in MAPS if of.column in frame.columns for against in of.protocols if against != V3]


def sides(frame: pl.DataFrame, of: Map) -> tuple[list[float], list[float]]:
    """The engines and the values of the other parameter that were run."""
    runs = frame.filter(part="map", base=of.base)
    return sorted(runs[ENGINES_COLUMN].unique()), sorted(runs[of.column].unique())


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """What each conclusion depends on, and where v3 brings less than WORTH."""
    at_base, found = base(frame, MULTIFD), bars(frame, MULTIFD)
    return Answer(
        f"{V3}'s downtime is {ratio_text(at_base) if at_base else 'no known part'} (95 % interval) of v2-multifd's on "
        f"{IDLE}, and that depends most on {_depends(found)}. {_do_not_build(found)}",
        "Two bases, one parameter at a time (two in the maps): what several do together is not "
        "shown, nor N, which is 4 throughout; ranges are judgements, and a wider one makes a longer bar.",
        [*_regions(frame), *_details(frame)],
        [_c3(frame, found)],
        table(_rows(frame)),
    )


def _depends(found: Sequence[Bar]) -> str:
    """The parameters with the greatest swing, and the ratios at their ends."""
    return "; ".join(f"{bar.parameter}: {bar.low.text}, {bar.high.text}" for bar in found[:TOP]) or "nothing"


def _do_not_build(found: Sequence[Bar]) -> str:
    """The ends at which v3 is shown to bring less than WORTH, the least gain first."""
    ends = [(end.found, f"{bar.parameter} = {end.at}") for bar in found for end in (bar.low, bar.high)]
    known = sorted(((each, name) for each, name in ends if each), key=lambda end: -end[0].ratio.mean)
    under = [f"{name}: {each.gain.brief('%')}" for each, name in known if is_under(each)]
    if not under:
        closest = f"; the least gain is {known[0][0].gain.mean:.1f} %" if known else ""
        return f"No single parameter is shown to bring the gain under {100 * WORTH:.0f} %{closest}."
    return (
        f"It brings less than {100 * WORTH:.0f} %, so do not build it for such a device, with any one of "
        f"{'; '.join(under)}."
    )


def _details(frame: pl.DataFrame) -> Iterator[str]:
    for conclusion in CONCLUSIONS:
        at_base, found, name = base(frame, conclusion), bars(frame, conclusion), conclusion.text
        if conclusion is not MULTIFD:
            ratio = ratio_text(at_base) if at_base else NOT_BOTH
            yield f"{name}: {ratio}; it depends most on {_depends(found)}. {_do_not_build(found)}"
        null = [bar for bar in found if bar.swing < NULL_SWING]
        yield f"{name}: {len(null)} of {len(found)} parameters move the ratio by less than {NULL_SWING:g}."
        ends = [(bar.parameter, end) for bar in found for end in (bar.low, bar.high)]
        gone = [f"{parameter} = {end.at} ({end.not_completed})" for parameter, end in ends if not end.found]
        yield from sentence(f"{name}: no ratio, for fewer than {FEWEST} seeds are completed by both, at ", gone)
    strongest = base(frame, Conclusion("", NIC, ACKED_MULTIFD))
    yield f"{V3} against {ACKED_MULTIFD}, {NIC}: {ratio_text(strongest) if strongest else NOT_BOTH}."


def _regions(frame: pl.DataFrame) -> Iterator[str]:
    """For each map and base: the squares in which less than WORTH is shown, engines by engines."""
    for of, against in maps_run(frame):
        engines, values = sides(frame, of)
        lines = []
        for each in engines:
            found = [value for value in values if is_under(square(frame, of, each, value, against))]
            where = "nowhere" if not found else "everywhere" if found == values else f"at {_listed(found)}"
            lines.append(f"{each:g} engine(s): {where}")
        yield (
            f"{V3} is shown to bring less than {100 * WORTH:.0f} % over {against}, {of.base}, of {of.label} "
            f"{_listed(values)}: {'; '.join(lines)}."
        )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _c3(frame: pl.DataFrame, found: Sequence[Bar]) -> Finding:
    """Under one big lock, or with one engine, N buys nothing: here, less than WORTH over v2-multifd."""
    engine = next((bar.low for bar in found if bar.parameter == ONE_ENGINE), None)
    lock = next((bar.high for bar in found if bar.parameter == ONE_LOCK), None)
    if engine is None or lock is None or engine.found is None or lock.found is None:
        return Finding("C3", "under conditions", "one of the two was not completed under both protocols here.")
    path = path_shares(frame.filter(COMPLETED, base=IDLE, parameter=ONE_LOCK, side="high"), V3)
    locked = 100 * (path[Resource.LOCK] + path[Resource.COPY])
    under = [is_under(engine.found), is_under(lock.found)]
    return Finding(
        "C3",
        judge(supported=all(under), refuted=not any(under)),
        f"{V3} gains {engine.found.gain.brief('%')} over v2-multifd with {engine.at} engine, and "
        f"{lock.found.gain.brief('%')} under a {lock.at} lock, on {IDLE}, where copies and waits for the lock are "
        f"{locked:.1f} % of {V3}'s critical path.",
    )


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Each conclusion's effect at its base, at each end, and in each square of the maps."""

    def row(scenario: str, part: str, found: Effect | None, against: str, **place: str) -> dict[str, Any]:
        at = {"parameter": "", "side": "", "at": "", "not_completed": ""} | place
        return {"scenario": scenario, "part": part, **at, **effect_row(found, against, V3)}

    for conclusion in CONCLUSIONS:
        scenario, against = conclusion.base, conclusion.against
        yield row(scenario, "base", base(frame, conclusion), against)
        for bar in bars(frame, conclusion):
            for side, end in (("low", bar.low), ("high", bar.high)):
                at = {"parameter": bar.parameter, "side": side, "at": end.at, "not_completed": end.not_completed}
                yield row(scenario, "tornado", end.found, against, **at)
    for of, against in maps_run(frame):
        for engines, value in itertools.product(*sides(frame, of)):
            found = square(frame, of, engines, value, against)
            yield row(of.base, "map", found, against, at=f"{engines:g} engines, {of.label} {value:g}")
