"""How often does critical data come too late, after the order to stop the guest, and what does that cost?

Between the moment when a VMM last knew what a device has and the moment when the vCPUs stand still, the guest may
reconfigure the device once more. What the target has to set up then falls into the downtime
(`late_reconfigured_objects`), unless the VMM looks again, and gives the migration up (QEMU 11.1's reusable ack) or
takes the stop back (v3's `retry`). Reconfigurations at random, at several rates, say how often; one for sure, 10 ms
after the order to stop, of several sizes, says what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
from matplotlib.figure import Figure

from experiments.questions.switchover_hazard import figures as figures_switchover_hazard
from experiments.questions.switchover_hazard.grid import (
    ACK_MODES,
    AT_RANDOM,
    BLIND,
    FOR_SURE,
    GAVE_UP,
    LATE,
    NO_ACK,
    ONE_SHOT_REINIT,
    PAID,
    POLICIES,
    POLLS,
    PROCEED,
    PROCEED_INVALIDATE,
    RATE,
    RETRY,
    RETRY_INVALIDATE,
    REUSABLE,
    REUSABLE_INVALIDATE,
    STOOD_STILL,
    TOO_LATE,
    TOOK_BACK,
    at_random,
    expected,
    for_sure,
    points,
    window_ms,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import Answer, Experiment, Finding, effect_row, places
from experiments.study.statistics import Effect, Interval, effect, interval, share

V2_LOOKING = (REUSABLE, REUSABLE + POLLS, REUSABLE_INVALIDATE, REUSABLE_INVALIDATE + POLLS)
"""Who looks once more when the vCPUs stand still, as v3 does; and so knows what came too late."""
MOST_PAID = 0.02
"""Of the runs of who takes a last look: if more have late data in their downtime, the look is of no use."""
NO_RUN = "no run"
NONE_COMPLETED = "no run completed"


def answer(frame: pl.DataFrame) -> Answer:
    """How often, under whom, and at what price."""
    random, sure = at_random(frame), for_sure(frame)
    at, chance, busy = "an unknown rate of reconfigurations", "", random
    if random.height:
        rate = number(random[RATE].max())
        at = f"{rate:g} reconfigurations a second"
        chance = f" (chance of one in the {window_ms():g} ms of the vCPUs' stop: {100 * float(expected(rate)):.0f} %)"
        busy = random.filter(pl.col(RATE) == rate)
    told = "; ".join(
        f"{name} {_percent(busy, name, column)} {what}"
        for name, column, what in (
            (NO_ACK, PAID, "(paid in the downtime)"),
            (ONE_SHOT_REINIT, PAID, "(paid in the downtime)"),
            (REUSABLE, GAVE_UP, "(the migration FAILED)"),
            (PROCEED, PAID, "(paid in the downtime)"),
            (RETRY, TOOK_BACK, "(stopped again later)"),
        )
    )
    return Answer(
        f"At {at} critical data comes too late in this share of runs: {told}{chance}.",
        "One device, whose vCPUs take one fixed time to stop and whose reconfigurations come at random: a guest that "
        "reconfigures because it is being migrated, or never in its last seconds, has other chances; that QEMU 11.1 "
        "looks at just this point is inferred (docs/model.md).",
        [
            *_how_often(random),
            *_users(random),
            *_prices(sure),
            *_unseen(random),
            *_blind(random),
            *_other_ends(frame),
        ],
        [_c1(random)],
        table(random, sure),
    )


# --- how often --------------------------------------------------------------------------------------------------------


def _share(runs: pl.DataFrame, name: str, column: str) -> Interval | None:
    of = runs.filter(pl.col("protocol") == name)[column]
    return share(int(of.sum()), len(of)) if len(of) else None


def _percent(runs: pl.DataFrame, name: str, column: str) -> str:
    told = _share(runs, name, column)
    if told is None:
        return NO_RUN
    return f"{100 * told.mean:.0f} % (95 % interval {100 * told.low:.0f} to {100 * told.high:.0f})"


def _how_often(random: pl.DataFrame) -> list[str]:
    """Those who look, all together, against what the length of the window lets expect."""
    lines = []
    for what, names in (("v2 with the reusable ack", V2_LOOKING), ("v3", (PROCEED, PROCEED_INVALIDATE))):
        runs = random.filter(pl.col("protocol").is_in(names))
        if runs.is_empty():
            continue
        # Runs of one rate and seed have the same guest under all of these: they count as one.
        of_guests = runs.group_by(RATE, "seed", maintain_order=True).agg(pl.col(TOO_LATE).cast(pl.Float64).mean())
        found = interval(100 * of_guests[TOO_LATE].to_numpy())
        chance = 100 * float(expected(runs[RATE].to_numpy().astype(float)).mean())
        fits = "as expected" if chance in found else "NOT as expected"
        lines.append(
            f"{what} ({', '.join(names)}), all rates: too late in {found.told('%')} of {runs.height} runs with "
            f"{of_guests.height} guests; that a reconfiguration falls into the vCPUs' stop has a chance of "
            f"{chance:.1f} %: {fits}."
        )
    return lines


def _pooled(random: pl.DataFrame) -> pl.DataFrame:
    """All rates as one place of pairs, every run counted, whichever way it ended."""
    return random.with_columns(
        pl.format("{}/{}", RATE, "seed").alias("seed"),
        pl.lit("COMPLETED").alias("outcome"),
        (pl.col(TOO_LATE).cast(pl.Float64) * 100).alias("too_late_percent"),
    )


def user_effects(random: pl.DataFrame) -> dict[str, Effect | None]:
    """By ack mode: what a user that polls does to the share of runs in which it is too late, in per cent."""
    pooled = _pooled(random)
    return {mode: effect(pooled, "too_late_percent", mode, mode + POLLS) for mode in ACK_MODES}


def _users(random: pl.DataFrame) -> list[str]:
    told = [
        f"{mode} {of.difference.mean:+.1f} ({of.difference.low:+.1f} to {of.difference.high:+.1f})"
        for mode, of in user_effects(random).items()
        if of
    ]
    return (
        [f"What polling in every round changes, in points of that share, all rates: {', '.join(told)}."] if told else []
    )


def _unseen(random: pl.DataFrame) -> list[str]:
    """A retry can only take back what its look finds; what was loaded by then is late all the same."""
    told = []
    for name in (RETRY, RETRY_INVALIDATE):
        runs = random.filter(pl.col("protocol") == name)
        if runs.height:
            told.append(f"{name} {int(runs[PAID].sum())} of {runs.height}, {int(runs[TOOK_BACK].sum())} taken back")
    why = "loaded between the order to stop and the last look, or after the last retry"
    return [f"Late data in the downtime in spite of retry ({why}): {'; '.join(told)}."] if told else []


def _blind(random: pl.DataFrame) -> list[str]:
    """Whether who takes no last look always has set-up in the downtime."""
    told = []
    for name in BLIND:
        runs = random.filter(COMPLETED & (pl.col("protocol") == name))
        if runs.height:
            any_late = runs.filter(pl.col("late_critical_objects").cast(pl.Int64) > 0).height
            told.append(f"{name} {any_late} of {runs.height}")
    return [
        f"Runs with any critical object, initial or new, loaded after the order to stop: {', '.join(told)}."
    ] * bool(told)


def _other_ends(frame: pl.DataFrame) -> list[str]:
    """Runs that did not complete: those that failed for late data, and the others, whatever they are."""
    both = pl.concat([at_random(frame), for_sure(frame)])
    lines = []
    for reason, gave_up in both.filter(pl.col(GAVE_UP)).group_by("reason", maintain_order=True):
        names = ", ".join(gave_up["protocol"].unique(maintain_order=True))
        lines.append(f"FAILED for late data: {gave_up.height} of {both.height} runs ({names}): {reason[0]!r}.")
    left = both.filter(~COMPLETED & ~pl.col(GAVE_UP))
    kinds = left.group_by("protocol", "outcome", maintain_order=True).len("runs")
    return lines + [
        f"{row['protocol']}: {row['runs']} {row['outcome']}, not for late data." for row in kinds.to_dicts()
    ]


# --- what it costs ----------------------------------------------------------------------------------------------------

PAIRS = (
    (ONE_SHOT_REINIT, PROCEED),
    (RETRY, PROCEED),
    (RETRY_INVALIDATE, PROCEED_INVALIDATE),
    (PROCEED, PROCEED_INVALIDATE),
)
"""Base and other, of the runs with one for sure."""


def _prices(sure: pl.DataFrame) -> list[str]:
    """By size: how much of the set-up lengthens the downtime, and whether a retry is worth its pause."""
    lines = []
    for at, runs in places(sure, [LATE]):
        told = []
        for retry, proceed in PAIRS[1:3]:
            down, still = (effect(runs, column, retry, proceed) for column in ("downtime_ns", STOOD_STILL))
            if down and still:
                told.append(
                    f"{proceed} has {_mean_ms(runs, proceed, 'setup_in_downtime_ns')} of set-up in its downtime, which "
                    f"against that of {retry} is {_ms(down)}; the retry's pause included, {_ms(still)}: "
                    f"{_better(still, retry, proceed)}"
                )
        if told:
            lines.append(f"One reconfiguration of {at[LATE]} objects during the stop: {'; '.join(told)}.")
    return lines


def _better(still: Effect, retry: str, proceed: str) -> str:
    if not still.shown:
        return "neither is shown to be better"
    return f"{retry if still.difference.mean > 0 else proceed} has the guest stand still for less"


def _ms(of: Effect) -> str:
    told = of.difference
    return f"{told.mean / 1e6:+.0f} ms (95 % interval {told.low / 1e6:+.0f} to {told.high / 1e6:+.0f})"


def _mean_ms(runs: pl.DataFrame, name: str, column: str) -> str:
    values = runs.filter(COMPLETED & (pl.col("protocol") == name))[column].drop_nulls()
    return f"{interval(values.to_numpy() / 1e6).mean:.0f} ms" if len(values) else NONE_COMPLETED


def _c1(random: pl.DataFrame) -> Finding:
    """v3 keeps late set-up out of the downtime, and v2 cannot tell that there is some."""
    retry = random.filter(pl.col("protocol") == RETRY)
    looked = random.filter(pl.col("protocol").is_in(V2_LOOKING))
    blind = random.filter(pl.col("protocol").is_in(BLIND))
    policies = {name: random.filter(pl.col("protocol") == name) for name in POLICIES}
    if retry.is_empty() or looked.is_empty():
        return Finding("C1", "under conditions", "it could not be tried: v3 with retry, or v2 that looks, has no run.")
    completed, paid = retry.filter(COMPLETED).height, {name: int(runs[PAID].sum()) for name, runs in policies.items()}
    unseen, seen = int(looked[PAID].sum()), int(looked[GAVE_UP].sum())
    why = (
        f"late data in the downtime have, of v3's policies, "
        f"{', '.join(f'{name} {paid[name]} of {runs.height}' for name, runs in policies.items())}; with retry v3 "
        f"completed {completed} of {retry.height}; v2 without a last look has some in "
        f"{int(blind[PAID].sum())} of {blind.height}, but with the reusable ack v2 can tell: of {looked.height} runs "
        f"{seen} FAILED over it, and {unseen} paid without having seen it."
    )
    few = {name: paid[name] <= MOST_PAID * runs.height for name, runs in policies.items()}
    if not few[RETRY]:  # the policy that is made for it
        return Finding("C1", "refuted", why)
    v2_cannot_tell = unseen > MOST_PAID * looked.height
    fine = completed == retry.height and all(few.values())
    return Finding("C1", "supported" if fine and v2_cannot_tell else "under conditions", why)


# --- the table --------------------------------------------------------------------------------------------------------

WAYS = ((TOO_LATE, "too late"), (PAID, "paid in the downtime"), (GAVE_UP, "gave up"), (TOOK_BACK, "stop taken back"))
COSTS = (
    ("downtime_ns", 1e6, "downtime_ms"),
    ("setup_in_downtime_ns", 1e6, "setup_in_downtime_ms"),
    ("late_critical_objects", 1.0, "late_critical_objects"),
    ("late_reconfigured_objects", 1.0, "late_reconfigured_objects"),
    ("retries", 1.0, "retries"),
    ("retries_stopped_ns", 1e6, "retries_stopped_ms"),
)


def table(random: pl.DataFrame, sure: pl.DataFrame) -> pl.DataFrame:
    """Shares with Wilson's intervals, mean costs of completed runs with bootstrap intervals, paired effects."""
    rows = []
    for frame, names in ((random, AT_RANDOM), (sure, FOR_SURE)):
        for at, runs in places(frame, [RATE, LATE]):
            for name in names:
                rows += [at | row for row in _rows(runs.filter(pl.col("protocol") == name), name)]
    for at, runs in places(sure, [RATE, LATE]):
        for base, other in PAIRS:
            for column, what in (("downtime_ns", "downtime"), (STOOD_STILL, "downtime and pauses of retries")):
                told = effect(runs, column, base, other)
                rows.append(at | {"what": f"effect on {what}"} | effect_row(told, base, other, 1e6, "ms"))
    for mode, told in user_effects(random).items():
        row = effect_row(told, mode, mode + POLLS, 1.0, "points")
        rows.append({"what": "effect of polling on the share too late, all rates"} | row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _rows(runs: pl.DataFrame, name: str) -> list[dict[str, object]]:
    """Of one protocol at one place."""
    rows: list[dict[str, object]] = []
    for column, what in WAYS:
        if (told := _share(runs, name, column)) is not None:
            rows.append(_row(name, f"share of runs: {what}", told, "share", runs.height))
    done = runs.filter(COMPLETED)
    for column, scale, what in COSTS:
        values = done[column].drop_nulls()
        if len(values):
            rows.append(_row(name, what, interval(values.to_numpy() / scale), "mean", runs.height))
    return rows


def _row(name: str, what: str, told: Interval, kind: str, runs: int) -> dict[str, object]:
    return {
        "other": name,
        "what": what,
        f"{kind}": told.mean,
        f"{kind}_low": told.low,
        f"{kind}_high": told.high,
        "runs": runs,
        "counted": told.count,
    }


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """How often, against the rate; and what one costs, by policy."""
    return figures_switchover_hazard.figures(at_random(frame), for_sure(frame), command)


EXPERIMENT = Experiment(
    name="switchover_hazard",
    question="How often does critical data come too late for the stop, by user, ack and policy, and what does it cost?",
    claims=("C1",),
    points=points,
    answer=answer,
    figures=figures,
    repeats=60,
)
"""60 repeats: at 8 reconfigurations a second 15 % of migrations are expected to meet one while the vCPUs stop."""
