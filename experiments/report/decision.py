# SPDX-License-Identifier: GPL-2.0-or-later
"""The decision table, as it is printed: the verdict, what each change brings, what decides, and a legend."""

from __future__ import annotations

import math
from collections.abc import Iterator

from experiments.decision.bands import BAND, QUANTITIES, SampleBand
from experiments.decision.deciding import LEAST_SAMPLES, MISSING, has_indices
from experiments.decision.decision import Decision, indices_table, rows_table
from experiments.decision.verdict import making_worse, worth_making
from experiments.report.tables import NO_VALUE, Heading, Section
from experiments.study.claims import WORTH

MOST_KEYS = 3
"""Of those that decide, in the table of each change."""
OTHERS = [name for name in QUANTITIES if name != "downtime_ms"]


def conclusion(decision: Decision) -> Iterator[str]:
    """The verdict in three sentences; before it what is worth making, after it why it may be less than it seems."""
    making, worse = worth_making(decision.rows), making_worse(decision.rows)
    told = f"Worth making, by the downtime: {', then '.join(making) if making else 'none of the changes'}"
    yield f"{told}; longer with {', '.join(worse)}." if worse else f"{told}."
    for each in decision.verdicts:
        yield each.sentence
    if decision.samples == 1:
        yield "The scenario has no [ranges]: this is one machine, and no band."
    elif not has_indices():
        yield f"{MISSING[0].upper()}{MISSING[1:]}."
    elif decision.samples < LEAST_SAMPLES:
        yield f"Which parameter decides is not told: that takes {LEAST_SAMPLES} samples."


def sections(decision: Decision) -> Iterator[Section]:
    """What each change brings; everything but the downtime; what would settle it; what decides; all numbers."""
    yield _main(decision)
    yield _others(decision)
    yield _settled(decision)
    yield _deciding(decision)
    yield _legend(decision)
    numbers = rows_table(decision)
    yield Section(
        "numbers", "All numbers", "", [Heading(name, name) for name in numbers.columns], numbers.to_dicts(), 0
    )
    every = indices_table(decision)
    yield Section("indices", "All indices", "", [Heading(name, name) for name in every.columns], every.to_dicts(), 0)


def _main(decision: Decision) -> Section:
    low, high = (f"{100 * part:.0f} %" for part in BAND)
    rows = []
    for row in decision.rows:
        gain = row.brings_percent
        rows.append(
            {
                "change": row.rung.name,
                "where": row.rung.change.where if row.rung.change else "",
                "downtime": _band(row.levels.get("downtime_ms"), ".0f"),
                "brings": None if gain is None else _gain(gain.median),
                "low": None if gain is None else _gain(gain.low),
                "high": None if gain is None else _gain(gain.high),
                "worth": None if row.probability is None else f"{100 * row.probability:.0f}",
                "failed": f"{row.failed}" if row.made else None,
            }
        )
    columns = [
        Heading("change", "change"),
        Heading("where", "where"),
        Heading("downtime", "downtime, ms"),
        Heading("brings", "brings %"),
        Heading("low", low),
        Heading("high", high),
        Heading("worth", f"> {100 * WORTH:.0f} %"),
        Heading("failed", "failed"),
    ]
    legend = (
        f"{decision.samples} plausible machines, medians [{low}, {high}]; brings: less downtime than the row above, "
        f"v3's first row than the best v2, in each of them; > {100 * WORTH:.0f} %: how many of 100 gain more; "
        "failed: runs that do not complete. Such a run counts as longer than any other: `fails`; where a change lets "
        "it complete: `completes`. -: not run, see the last table"
    )
    return Section("decision", f"What to change first: {decision.scenario.name}", legend, columns, rows)


def _others(decision: Decision) -> Section:
    rows = []
    for row in decision.rows:
        first = row.made and row.probability is None
        values, sign = (row.levels, "") if first else (row.brings, "+")
        told = {name: _band(values.get(name), f"{sign}.{QUANTITIES[name].digits}f") for name in OTHERS}
        rows.append({"change": row.rung.name, **told})
    columns = [Heading("change", "change"), *(Heading(name, QUANTITIES[name].label) for name in OTHERS)]
    legend = (
        "first row: what it is; below: how much less than in the row above, + is better; medians [5 %, 95 %] where "
        "both complete; stop: of the devices; lag: the longest from a reconfiguration to its critical data at the "
        "target; total: of the migration; again: bytes sent again; pinned: memory of the drivers"
    )
    return Section("others", "And beside the downtime", legend, columns, rows)


def _settled(decision: Decision) -> Section:
    rows = [
        {"change": each.change, "verdict": each.word, "measure": each.settled_by(decision.scenario) or NO_VALUE}
        for each in decision.verdicts
    ]
    columns = [
        Heading("change", "change"),
        Heading("verdict", "answer"),
        Heading("measure", "what to measure, and how"),
    ]
    return Section("settled", "What would settle it", "", columns, rows)


def _deciding(decision: Decision) -> Section:
    rows = [
        {"change": change, "parameter": each.key, "index": f"{each.first_order:.2f} ± {each.half_width:.2f}"}
        for change, found in decision.indices.items()
        for each in [each for each in found if each.told][:MOST_KEYS]
    ]
    columns = [Heading("change", "change"), Heading("parameter", "parameter"), Heading("index", "index")]
    legend = (
        "Sobol's first-order indices of the gain in percent, and the half width of their 95 % interval (RBD-FAST, "
        "SALib); only those that are larger than it, and than noise. The rest of 1: of keys together, and of the "
        "runs' own spread"
    )
    return Section("deciding", "Which parameter decides", legend, columns, rows)


def _legend(decision: Decision) -> Section:
    rows = [
        {
            "change": row.rung.name,
            "what": row.rung.change.what if row.rung.change else "v2 as the scenario sets it up",
            "note": f"no change here: {row.rung.nothing}"
            if row.rung.nothing
            else row.rung.change.needs
            if row.rung.change
            else "",
        }
        for row in decision.rows
    ]
    columns = [
        Heading("change", "change"),
        Heading("what", "what it is"),
        Heading("note", "what nobody has measured, or why it is not run"),
    ]
    return Section("changes", "The changes", "each on top of those above it", columns, rows)


def _gain(value: float) -> str:
    if math.isinf(value):
        return "completes" if value > 0 else "fails"
    return _number(value, "+.1f")


def _band(band: SampleBand | None, how: str) -> str | None:
    """`607 [580, 640]`; where all three are alike, one of them."""
    if band is None:
        return None
    median, low, high = (_number(each, how) for each in (band.median, band.low, band.high))
    return median if median == low == high else f"{median} [{low}, {high}]"


def _number(value: float, how: str) -> str:
    if math.isinf(value):
        return "fails"
    told = format(value, how)
    return told if float(told) else "0"
