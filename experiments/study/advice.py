# SPDX-License-Identifier: GPL-2.0-or-later
"""What to do for a device, in sentences: computed from the effects of protocols on its downtime."""

from __future__ import annotations

import polars as pl

from experiments.runs.frame import COMPLETED, protocols
from experiments.study.claims import WORTH
from experiments.study.statistics import effect
from experiments.study.summaries import far_over_limit
from experiments.study.verdicts import verdict
from proto_v3.errors import UserError

ENOUGH_SEEDS = 30
"""To publish a number. Fewer are enough to look."""


def advice(runs: pl.DataFrame, *, today: str, best: str, one: str, many: str, worth: float = WORTH) -> list[str]:
    """What to do for a device, in sentences, from the effects of protocols on its downtime.

    `today` is the protocol as it is used, `best` the best that exists, `one` and `many` are v3 with one dirty stream
    and with several. `worth` is the least relative change that matters. UserError if one of them was not run.
    """
    pairs = {"exists": (today, best), "v3": (best, many), "streams": (one, many)}
    if missing := {name for pair in pairs.values() for name in pair} - set(protocols(runs)):
        raise UserError(f"{', '.join(sorted(missing))}: not among the runs, which are {', '.join(protocols(runs))}")
    words, lines = {}, []
    for topic, pair in pairs.items():
        words[topic], sentence = _judged(runs, *pair, worth)
        lines.append(sentence)
    for topic, word in words.items():
        if topic != "streams" or words["v3"] in ("shorter", "only other completes"):
            unknown = f"{pairs[topic][1]} against {pairs[topic][0]}: take more seeds."
            lines.append(_ADVICE[topic].get(word, unknown).format(today=today, best=best, one=one, many=many))
    for name in dict.fromkeys((today, best, one, many)):
        made = runs.filter(pl.col("protocol") == name)
        if lost := made.filter(~COMPLETED).height:
            lines.append(
                f"But {name} does not complete {lost} of {made.height} runs, and a downtime says nothing of these. The "
                f"first of them: {made.filter(~COMPLETED)['reason'][0]}."
            )
        if far := far_over_limit(runs, name):
            lines.append(f"Of {name}, {far}.")
    if (seeds := runs["seed"].n_unique()) < ENOUGH_SEEDS:
        lines.append(f"{seeds} seeds are enough to look, not to publish: take {ENOUGH_SEEDS}.")
    return lines


def _judged(runs: pl.DataFrame, base: str, other: str, worth: float) -> tuple[str, str]:
    """The verdict, and the sentence that states it."""
    change = effect(runs, "downtime_ns", base, other)
    done = [runs.filter(COMPLETED & (pl.col("protocol") == name)).height for name in (base, other)]
    word = verdict(change, done[0], done[1], worth)
    numbers = change.text("ms", 1e6) if change else f"completed are {done[0]} and {done[1]} runs"
    return word, f"{other} against {base}: {numbers}: {word}."


_ADVICE = {
    "exists": {
        "shorter": "Take {best} before anything else: it exists, and it is shorter than {today}.",
        "longer": "Stay with {today}: {best} is longer here.",
        "next to nothing": "{best} brings next to nothing over {today}.",
        "only other completes": "Take {best}: {today} does not complete.",
        "only base completes": "Stay with {today}: {best} does not complete.",
        "neither completes": "Neither {today} nor {best} completes: too much is written, or the limit is too low.",
    },
    "v3": {
        "shorter": "v3 is worth a look for this device: {many} is shorter than {best}.",
        "longer": "Do not build v3 for this device: {many} is longer than {best}.",
        "next to nothing": "Do not build v3 for this device: {many} brings next to nothing over {best}.",
        "only other completes": "v3 is worth a look for this device: {best} does not complete.",
        "only base completes": "Do not build v3 for this device: {many} does not complete.",
        "neither completes": "Neither {best} nor {many} completes: nothing can be said.",
    },
    "streams": {
        "shorter": "Several dirty streams are part of that: {many} is shorter than {one}.",
        "longer": "One dirty stream is enough: {many} is longer than {one}.",
        "next to nothing": "One dirty stream is enough: {many} brings next to nothing over {one}.",
        "only other completes": "Several dirty streams are needed: {one} does not complete.",
        "only base completes": "One dirty stream is enough: {many} does not complete.",
    },
}
"""By topic and verdict."""
