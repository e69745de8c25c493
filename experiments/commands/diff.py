# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 diff`: two folders of results, whichever command made them: what was run, how it ended, what it took.

As of diff(1), the exit status is 0 if the results are the same, and 1 if they differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.report.tables import Heading, Output, Section
from experiments.runs.kept import SUMMARIES, Kept, read_folder
from experiments.study.differences import DOWNTIME, MEASURES, SAME, Change, Compared, side_by_side
from proto_v3.errors import UserError
from proto_v3.text import clean

FEW_PLACES = 16
"""All measures of at most this number of places are compared; of more, as of a sweep, the downtime only."""
MOST_ROWS = 40
"""Rows of a table on a terminal; JSON has all."""
LEFT_OUT = {"made", "outcomes", "files", "runs_planned", "sources", "published", "description"} | {
    "delays_of_the_first_run",
    "sockets",
}
"""Keys of a manifest that say nothing of what was run, or whose content the tables have."""

NOT_THERE = "-"
Row = Mapping[str, Any]


def run_diff(a: str, b: str, *, as_json: bool = False, quiet: bool = False) -> int:
    """Compare and print; returns the exit status. UserError if one is no folder of results, or is damaged."""
    both = _Both(read_folder(Path(a)), read_folder(Path(b)))
    Output(as_json, quiet).results(
        {"command": "diff", "a": clean(a), "b": clean(b), "same": both.same},
        f"A: {clean(a)}, {_how_made(both.a)}\nB: {clean(b)}, {_how_made(both.b)}",
        [clean(sentence, most=1000) for sentence in both.conclusion()],
        list(both.sections()),
    )
    return 0 if both.same else 1


def _how_made(kept: Kept) -> str:
    made = {key: clean(str(kept.manifest.get(key, "?"))) for key in ("command", "made")}
    return f"made by `{made['command']}` at {made['made']}"


class _Both:
    """What there is to say of two folders."""

    def __init__(self, a: Kept, b: Kept) -> None:
        self.a, self.b = a, b
        self.manifests = list(manifest_differences(a.manifest, b.manifest))
        factors = [] if a.runs is None else a.runs.columns
        self.summaries = {
            name: side_by_side(table, b.summaries[name], factors)
            for name, table in a.summaries.items()
            if name in b.summaries and a.manifest.get("experiment") == b.manifest.get("experiment")
        }
        self.runs = None if a.runs is None or b.runs is None else Compared.of(a.runs, b.runs)
        if self.runs is None and not self.summaries:
            raise UserError(f"{a.folder}, {b.folder}: have no table in common: they were made by different commands")

    @cached_property
    def same(self) -> bool:
        """Whether the results are the same; how they were made may differ."""
        return not any(self.summaries.values()) and (self.runs is None or self.runs.same)

    @cached_property
    def changes(self) -> list[Change]:
        """Of all measures, or of the downtime if there are many places."""
        if self.runs is None:
            return []
        return list(self.runs.changes(MEASURES if self.runs.places <= FEW_PLACES else [DOWNTIME]))

    # --- the conclusion ------------------------------------------------------------------------------------------

    def conclusion(self) -> Iterator[str]:
        """In sentences."""
        yield "The results are the same." if self.same else "The results differ."
        yield from self._of_runs(self.runs) if self.runs else ["Runs are not kept in both folders: no intervals."]
        for name, rows in self.summaries.items():
            yield f"{name}.parquet, {SUMMARIES[name]}: {f'{len(rows)} numbers differ' if rows else 'the same'}."
        if self.manifests:
            yield f"How they were made differs in {len(self.manifests)} keys of the manifests."

    def _of_runs(self, runs: Compared) -> Iterator[str]:
        only_a, only_b = runs.only
        yield f"Runs: {runs.in_both} in both, {runs.same_runs} of them the same; {only_a} only in A, {only_b} in B."
        if not runs.same_scenario:
            yield "The scenarios have different names: protocols are compared, and not seed by seed."
        if runs.clocks[0] != runs.clocks[1]:
            yield f"The clocks are different: {runs.clocks[0]} in A, {runs.clocks[1]} in B."
        downtimes = [change for change in self.changes if change.measure is DOWNTIME]
        if len(downtimes) <= FEW_PLACES:
            yield from map(_sentence, downtimes)
        else:
            words = ", ".join(
                f"{count} {word}" for word, count in Counter(each.word for each in downtimes).most_common()
            )
            yield f"Downtime of {len(downtimes)} places: {words}."
        kinds = Counter(f"{row['a']} in A, {row['b']} in B" for row in runs.outcomes).most_common()
        yield from (f"{count} run(s) {kind}." for kind, count in kinds)

    # --- the tables ----------------------------------------------------------------------------------------------

    def sections(self) -> Iterator[Section]:
        """Only what differs."""
        for unit in ("ms", "MiB"):
            if changes := [each for each in self.changes if each.measure.unit == unit and each.word != SAME]:
                yield _changes(unit, changes)
        if self.runs and self.runs.outcomes:
            headings = {
                "place": "what",
                "seed": "seed",
                "a": "A",
                "b": "B",
                "a_reason": "reason A",
                "b_reason": "reason B",
            }
            yield _section("outcomes", "Runs that ended otherwise", "of those in both", headings, self.runs.outcomes)
        for name, rows in self.summaries.items():
            ends = {"": "", "_low": " low", "_high": " high"}
            numbers = {f"{side}{end}": f"{side.upper()}{text}" for side in "ab" for end, text in ends.items()}
            title = f"{name}.parquet: numbers that differ"
            legend = "low, high: the 95 % interval, or the band, where there is one"
            if rows:
                yield _section(name, title, legend, {"place": "what", "value": "value", **numbers}, rows, ".6g")
        if self.manifests:
            title = "How they were made: keys of the manifests that differ"
            yield _section("manifests", title, "-: not there", {"key": "key", "a": "A", "b": "B"}, self.manifests)


def _sentence(change: Change) -> str:
    if change.word == SAME:
        return f"{change.place}: downtime {change.means[0]:.1f} ms in both."
    (a, b), (runs_a, runs_b), mean = change.means, change.counts, change.difference.mean
    how = f"paired, {change.difference.count} seed(s)" if change.paired else f"not paired, {runs_a} and {runs_b} runs"
    interval = f", 95 % interval {change.difference.low:+z.1f} to {change.difference.high:+z.1f}"
    what = f"downtime {a:.1f} ms in A, {b:.1f} in B, {mean:+z.1f} ms{interval if change.has_interval else ''} ({how})"
    return f"{change.place}: {what}: {change.word}."


def _changes(unit: str, changes: Sequence[Change]) -> Section:
    """A row a place and measure."""
    end = f"_{unit.lower()}"
    headings = {"place": "what", "measure": "measure", "paired": "paired", "a_runs": "runs A", "b_runs": "B"}
    numbers = {f"{side}_{kind}{end}": f"{kind} {side.upper()}" for kind in ("mean", "median") for side in "ab"}
    parts = {f"difference_{part}{end}": text for part, text in (("mean", "B - A"), ("low", "low"), ("high", "high"))}
    rows = []
    for change in sorted(changes, key=lambda change: (change.is_tiny, not change.is_shown)):
        ends = (change.difference.low, change.difference.high) if change.has_interval else (None, None)
        texts = (change.place, change.measure.label, "yes" if change.paired else "no", *change.counts)
        values = (*texts, *change.means, *change.medians, change.difference.mean, *ends)
        rows.append(dict(zip([*headings, *numbers, *parts], values, strict=True)))
    legend = "B - A: of the means; low, high: its 95 % interval, first those without 0 in it; paired: by seed"
    section = _section(
        f"changes{end}", f"Means and medians that differ, {unit}", legend, headings | numbers, rows, ".1f"
    )
    columns = [*section.columns, *(Heading(name, text, "+z.1f") for name, text in parts.items())]
    printed = sum(not change.is_tiny for change in changes)
    return replace(section, columns=columns, most_rows=min(printed, MOST_ROWS))


def _section(
    key: str, title: str, legend: str, headings: Mapping[str, str], rows: Sequence[Row], how: str = ""
) -> Section:
    """A section whose texts are somebody else's. `how` is the format of floats."""
    cleaned = [{name: clean(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]
    floats = {name for name in headings if any(isinstance(row[name], float) for row in rows)}
    columns = [Heading(name, text, how if name in floats else "") for name, text in headings.items()]
    more = f"; the first {MOST_ROWS} of {len(rows)} rows, --json has all" if len(rows) > MOST_ROWS else ""
    return Section(key, title, legend + more, columns, cleaned, MOST_ROWS)


# --- manifests -------------------------------------------------------------------------------------------------------


def manifest_differences(a: object, b: object, key: str = "") -> Iterator[Row]:
    """Each key that differs, as `scenario.link.gbit_per_s`, with both values as text."""
    in_a, in_b = _children(a), _children(b)
    if in_a is None or in_b is None:
        if a != b:
            yield {"key": key, "a": _text(a), "b": _text(b)}
        return
    for name in dict.fromkeys([*in_a, *in_b]):
        if name not in LEFT_OUT:
            whole = f"{key}.{name}" if key else name
            yield from manifest_differences(in_a.get(name, NOT_THERE), in_b.get(name, NOT_THERE), whole)


def _children(value: object) -> dict[str, object] | None:
    """The values in a table, or in a list of tables; None if it is neither."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and any(isinstance(child, dict) for child in value):
        return {str(at): child for at, child in enumerate(value)}
    return None


def _text(value: object) -> str:
    if (children := _children(value)) is not None:
        return f"({len(children)} keys)"
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
