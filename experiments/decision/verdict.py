# SPDX-License-Identifier: GPL-2.0-or-later
"""The verdict on v3's three ideas, a sentence each, from the numbers of the table; and what would settle it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.decision.bands import LAG, Brought
from experiments.decision.deciding import Index, Turn, turn
from experiments.decision.measure import how_to_measure, what_it_is
from experiments.study.claims import WORTH
from sim.scenario.sample import Sample
from sim.scenario.scenario import Scenario

IDEAS = {"v3-n1": "A critical fd", "v3-n4": "N dirty fds", "v3-blocks": "Addressable blocks"}
"""By the change that adds each."""
OVER = {"v3-n1": "one dirty fd", "v3-n4": "N dirty fds"}
"""What the row above is in a sentence; every other one is the best v2."""
CLEAR = 0.95
"""The answer is yes if it is worth making in this part of the samples, no if it is not in this part. Ours."""
MOST_CHARS = 240
"""Of a sentence."""
LAG_TOLD_S = 0.05
"""A smaller change of the longest critical lag is not told."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one idea."""

    change: str
    word: str
    """`yes`, `no`, `open`, or `not here`."""
    sentence: str
    index: Index | None = None
    """Of the key that decides most; None if the answer is clear, or none is seen to decide."""
    turns: Turn | None = None
    """Where in its range the answer turns."""

    def settled_by(self, scenario: Scenario) -> str:
        """The one measurement that would settle it, with the key's range; empty if nothing is open or known."""
        if self.index is None:
            return ""
        key = self.index.key
        return f"{key} ({scenario.ranges[key].words}){_turns(self.turns)}: {how_to_measure(key)}"


def verdicts(
    rows: Sequence[Brought], deciding: Mapping[str, Sequence[Index]], samples: Sequence[Sample]
) -> Iterator[Verdict]:
    """On each of IDEAS. `deciding` has the indices of each row's gain, by the change's name."""
    above = rows[0]
    for row in rows:
        if row.rung.name in IDEAS:
            yield _verdict(row, above, deciding.get(row.rung.name, ()), samples)
        if row.made:
            above = row


def worth_making(rows: Sequence[Brought]) -> list[str]:
    """The changes that are worth making in more than half of the samples, in the order of the table."""
    return [row.rung.name for row in rows if row.probability is not None and row.probability > 0.5]


def making_worse(rows: Sequence[Brought]) -> list[str]:
    """The changes with which the downtime is longer by as much, or fails, in more than half of the samples."""
    return [row.rung.name for row in rows if row.made and np.sum(row.gains_percent < -100 * WORTH) > row.samples / 2]


def _verdict(row: Brought, above: Brought, found: Sequence[Index], samples: Sequence[Sample]) -> Verdict:
    name, idea = row.rung.name, IDEAS[row.rung.name]
    if not row.made or row.probability is None or row.brings_percent is None:
        why = row.rung.nothing or "it was not run"
        return Verdict(name, "not here", _cut(f"{idea}: nothing can be said here: {why}."))
    probability = row.probability
    word = "yes" if probability >= CLEAR else "no" if probability <= 1 - CLEAR else "open"
    over = OVER.get(above.rung.name, "the best v2")
    told = (
        f"{idea}: {word}. More than {100 * WORTH:.0f} % off the downtime of {over} in {100 * probability:.0f} % of the "
        f"plausible devices{_besides(row)}."
    )
    if word != "open":
        return Verdict(
            name,
            word,
            _cut(f"{told} {'None' if probability in (0, 1) else 'Few'} of those tried say otherwise."),
        )
    index = next((each for each in found if each.told), None)
    if index is None:
        return Verdict(name, word, _cut(f"{told} No single key decides." if found else told))
    turns = turn([sample.values[index.key] for sample in samples], list(row.gains_percent > 100 * WORTH))
    return Verdict(name, word, _cut(f"{told} To settle it, measure {what_it_is(index.key)}."), index, turns)


def _besides(row: Brought) -> str:
    """The third number: fewer failures, else the longest critical lag, else the median."""
    lag, gain = row.brings.get(LAG), row.brings_percent
    if row.fewer_failures:
        less = "fewer" if row.fewer_failures > 0 else "more"
        return f"; {100 * abs(row.fewer_failures) / row.samples:.0f} % {less} fail"
    if lag is not None and abs(lag.median) >= LAG_TOLD_S:
        return f"; the longest critical lag is {abs(lag.median):.1f} s {'shorter' if lag.median > 0 else 'longer'}"
    assert gain is not None
    if abs(gain.median) < 0.05:
        return ", in the median nothing"
    return f", in the median {abs(gain.median):.1f} % {'less' if gain.median > 0 else 'more'}"


def _turns(turns: Turn | None) -> str:
    if turns is None:
        return ", which alone does not turn the answer"
    if isinstance(turns.value, list):
        return f", where {' or '.join(turns.value)} is yes"
    return f", which is yes {'above' if turns.above else 'below'} {turns.value:.3g}"


def _cut(sentence: str) -> str:
    return sentence if len(sentence) <= MOST_CHARS else f"{sentence[: MOST_CHARS - 3].rstrip()}..."
