# SPDX-License-Identifier: GPL-2.0-or-later
"""The statistics of repeated runs against answers that are known otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pytest
from scipy import stats

from experiments.study.claims import kept_out
from experiments.study.effects import outcome_counts
from experiments.study.statistics import RESAMPLES, Interval, Usl, difference, effect, interval, percentile, share, usl

SAMPLES = 300
OF_EACH = 30
FEW = 5
"""Values: Student's interval."""
SPREAD = (0.90, 0.98)
"""Of the share of 95 % intervals that hold the mean: binomial spread over 300 samples, and what BCa misses with 30
values of a skew distribution."""

Draw = Callable[[np.random.Generator], np.ndarray]


def runs(
    rows: Sequence[tuple[str, int, float | None]], outcome: str = "COMPLETED", column: str = "downtime_ns"
) -> pl.DataFrame:
    """Of protocol, seed and value; None is a run that failed."""
    return pl.DataFrame(
        {
            "protocol": [protocol for protocol, _, _ in rows],
            "seed": [seed for _, seed, _ in rows],
            "outcome": ["FAILED" if value is None else outcome for _, _, value in rows],
            column: [value for _, _, value in rows],
        },
        schema_overrides={column: pl.Float64},
    )


def both(before: Sequence[float | None], after: Sequence[float | None]) -> pl.DataFrame:
    v2 = [("v2", seed, value) for seed, value in enumerate(before, 1)]
    return runs([*v2, *(("v3", seed, value) for seed, value in enumerate(after, 1))])


# --- intervals of a mean ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda rng: rng.normal(50.0, 10.0, OF_EACH), 50.0),
        (lambda rng: rng.exponential(10.0, OF_EACH), 10.0),
        (lambda rng: rng.normal(50.0, 10.0, FEW), 50.0),
    ],
    ids=["normal", "exponential", "few"],
)
def test_an_interval_holds_the_mean_about_as_often_as_it_says(draw: Draw, mean: float) -> None:
    rng = np.random.default_rng(20)
    held = np.mean([mean in interval(draw(rng)) for _ in range(SAMPLES)])
    assert SPREAD[0] <= held <= SPREAD[1]


def test_an_interval_is_about_that_of_students_t_for_normal_values() -> None:
    values = np.random.default_rng(1).normal(100.0, 5.0, 100)
    told = interval(values)
    low, high = stats.t.interval(0.95, 99, values.mean(), stats.sem(values))
    assert told.mean == pytest.approx(values.mean())
    assert told.low == pytest.approx(low, abs=0.2)
    assert told.high == pytest.approx(high, abs=0.2)


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(2).exponential(1.0, 30)
    assert interval(values) == interval(list(values))


def test_an_interval_scales_with_the_unit() -> None:
    values = np.random.default_rng(3).exponential(1.0, 30)
    one, million = interval(values), interval(values * 1e6)
    assert [million.low, million.high] == pytest.approx([one.low * 1e6, one.high * 1e6])


@pytest.mark.parametrize("values", [[7.0], [7.0] * 30, [0.1 + 0.2] * 3, [1e9] * 5, [-3.0] * 4, [0.0, 0.0]])
def test_equal_values_and_a_single_one_give_a_point(values: list[float]) -> None:
    told = interval(values)
    assert told.low == told.high == told.mean == pytest.approx(values[0])
    assert told.count == len(values)


def test_values_that_differ_by_little_give_an_interval_around_their_mean() -> None:
    told = interval([1e9, 1e9 + 1000, 1e9 + 2000, 1e9 + 500])
    assert told.low < told.mean < told.high


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.0] * 29 + [1.0], [0.0, 1.0] * 15])
def test_few_and_strange_values_give_a_finite_interval(values: list[float]) -> None:
    told = interval(values)
    assert math.isfinite(told.low)
    assert math.isfinite(told.high)
    assert told.low <= told.mean <= told.high


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no mean"):
        interval([])


def test_an_interval_in_words() -> None:
    assert Interval(12.34, 11.0, 13.96, 30).text("ms") == "12.3 ms (95 % interval 11.0 to 14.0)"
    assert Interval(0.5, 0.25, 0.75, 4).text(digits=2) == "0.50 (95 % interval 0.25 to 0.75)"


def differs(rng: np.random.Generator) -> Interval:
    return difference(rng.normal(50, 10, FEW), rng.normal(53, 1, FEW), paired=False)


def of_pairs(rng: np.random.Generator) -> Interval:
    before = rng.normal(50, 5, FEW)
    told = effect(both(before, 0.8 * before + rng.normal(0, 1, FEW)), "downtime_ns", "v2", "v3")
    assert told is not None
    return told.ratio


@pytest.mark.parametrize(("found", "truth"), [(differs, 3.0), (of_pairs, 0.8)], ids=["difference", "ratio"])
def test_an_interval_of_few_values_holds_what_is_true_about_as_often_as_it_says(
    found: Callable[[np.random.Generator], Interval], truth: float
) -> None:
    rng = np.random.default_rng(21)
    held = np.mean([truth in found(rng) for _ in range(SAMPLES)])
    assert SPREAD[0] <= held <= SPREAD[1] + 0.01


# --- effects, paired by seed -----------------------------------------------------------------------------------------


def test_an_effect_is_of_the_pairs_and_not_of_the_protocols_spread() -> None:
    """Seeds differ by 1000, protocols by 5: unpaired, nothing would be seen."""
    rng = np.random.default_rng(4)
    before = rng.uniform(1000, 2000, 30)
    told = effect(both(before, before + 5 + rng.normal(0, 0.5, 30)), "downtime_ns", "v2", "v3")
    assert told is not None
    assert told.shown
    assert told.pairs == 30
    assert told.lost == 0
    assert 4.5 < told.difference.low < 5 < told.difference.high < 5.5


def test_the_order_of_the_rows_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    before = rng.exponential(100, 20)
    frame = both(before, before * rng.uniform(0.7, 1.0, 20))
    told = effect(frame, "downtime_ns", "v2", "v3")
    for seed in range(3):
        assert effect(frame.sample(fraction=1, shuffle=True, seed=seed), "downtime_ns", "v2", "v3") == told


def test_an_effect_the_other_way_round_is_its_opposite() -> None:
    before = np.random.default_rng(6).exponential(100, 20)
    frame = both(before, before * 0.5)
    there, back = effect(frame, "downtime_ns", "v2", "v3"), effect(frame, "downtime_ns", "v3", "v2")
    assert there is not None
    assert back is not None
    assert there.difference.mean == pytest.approx(-back.difference.mean)
    assert there.ratio.mean == pytest.approx(1 / back.ratio.mean)


def test_seeds_that_one_of_them_did_not_complete_are_counted_and_left_out() -> None:
    told = effect(both([100, None, 300, 400], [90, 190, None, 390]), "downtime_ns", "v2", "v3")
    assert told is not None
    assert (told.pairs, told.lost) == (2, 2)
    assert told.difference == Interval(-10, -10, -10, 2)
    assert "2 seed(s) not completed under both" in told.text("ns")


def test_seeds_that_only_one_of_them_was_given_are_not_lost() -> None:
    told = effect(both([100, 200, 300, 400], [90, None]), "downtime_ns", "v2", "v3")
    assert told is not None
    assert (told.pairs, told.lost) == (1, 1)


def test_other_protocols_of_the_place_change_nothing() -> None:
    frame = both([100, 200], [90, 190])
    more = pl.concat([frame, runs([("v3-n8", seed, 1.0) for seed in range(1, 9)])])
    assert effect(more, "downtime_ns", "v2", "v3") == effect(frame, "downtime_ns", "v2", "v3")


@pytest.mark.parametrize(
    "frame",
    [
        both([None, None], [1.0, 2.0]),
        both([1.0, None], [None, 2.0]),
        both([None], [None]),
        runs([("v2", 1, 1.0)]),
        runs([("v2", 1, 1.0)]).clear(),
    ],
    ids=["none of one", "no pair", "none of both", "one is missing", "nothing"],
)
def test_without_a_pair_there_is_no_effect(frame: pl.DataFrame) -> None:
    assert effect(frame, "downtime_ns", "v2", "v3") is None


def test_an_effect_whose_interval_holds_zero_is_not_shown() -> None:
    rng = np.random.default_rng(7)
    told = effect(both(rng.normal(100, 5, 30), rng.normal(100, 5, 30)), "downtime_ns", "v2", "v3")
    assert told is not None
    assert not told.shown
    assert "no difference is shown" in told.text("ms")


def test_a_difference_that_is_the_same_for_all_seeds_is_a_point() -> None:
    told = effect(both([100, 200, 300], [110, 210, 310]), "downtime_ns", "v2", "v3")
    assert told is not None
    assert told.difference == Interval(10, 10, 10, 3)
    assert told.text("ns").startswith("+10.0 ns (95 % interval +10.0 to +10.0), +5.0 % (")


def test_a_ratio_that_is_the_same_for_all_seeds_is_a_point() -> None:
    before = np.random.default_rng(8).uniform(1e8, 2e8, 30)
    told = effect(both(before, before * 0.5), "downtime_ns", "v2", "v3")
    assert told is not None
    assert [told.ratio.low, told.ratio.high] == pytest.approx([0.5, 0.5], rel=1e-9)


@pytest.mark.slow
def test_a_ratio_is_of_the_means_and_its_interval_holds_it_as_often_as_it_says() -> None:
    """Of the means: not the mean of the ratios, which is greater here."""
    rng, true, held = np.random.default_rng(9), 0.8, []
    for _ in range(SAMPLES // 2):
        before = rng.normal(100, 20, OF_EACH)
        after = true * before + rng.normal(0, 10, OF_EACH)
        told = effect(both(before, after), "downtime_ns", "v2", "v3")
        assert told is not None
        assert told.ratio.mean == pytest.approx(after.mean() / before.mean())
        held.append(true in told.ratio)
    assert SPREAD[0] <= np.mean(held) <= 0.99


def test_a_base_of_zeros_has_a_difference_and_no_ratio() -> None:
    told = effect(both([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]), "downtime_ns", "v2", "v3")
    assert told is not None
    assert told.difference.mean == 2
    assert math.isnan(told.ratio.mean)


# --- shares and counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "count"), [(0, 30), (3, 30), (15, 30), (30, 30), (1, 1), (0, 1), (11, 120)])
def test_a_share_has_wilsons_interval(successes: int, count: int) -> None:
    z, p = stats.norm.ppf(0.975), successes / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    told = share(successes, count)
    assert told.mean == p
    assert (told.low, told.high) == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_no_runs_have_no_share() -> None:
    with pytest.raises(ValueError, match="no share"):
        share(0, 0)


def test_one_pair_has_no_interval_and_shows_nothing() -> None:
    frame = pl.DataFrame(
        {"protocol": ["v2", "v3-n1"], "seed": [1, 1], "outcome": ["COMPLETED"] * 2, "downtime_ns": [10e6, 8e6]}
    )
    told = effect(frame, "downtime_ns", "v2", "v3-n1")
    assert told is not None
    assert not told.shown
    assert told.text("ms", 1e6) == "-2.0 ms, -20.0 %, one pair: no interval"


def test_kinds_of_outcome_are_all_told_the_most_frequent_first() -> None:
    kinds = ["COMPLETED"] * 3 + ["FAILED"] * 5 + ["DID_NOT_CONVERGE"]
    assert outcome_counts(pl.DataFrame({"outcome": kinds})) == "5 FAILED, 3 COMPLETED, 1 DID_NOT_CONVERGE"


@pytest.mark.parametrize(
    ("low", "mean", "high", "expected"),
    [(0.0, 1.0, 30.0, True), (2.1, 5.0, 9.0, False), (0.5, 5.0, 9.0, None), (2.0, 2.0, 2.0, True)],
)
def test_set_up_is_kept_out_of_the_downtime_or_not_or_that_is_not_shown(
    low: float, mean: float, high: float, expected: bool | None
) -> None:
    assert kept_out(Interval(mean, low, high, 30), 100.0) is expected
    assert kept_out(None, 100.0) is None


# --- the scaling law -------------------------------------------------------------------------------------------------

AT = (1, 2, 4, 8, 16)


def law(n: np.ndarray, rate: float, contention: float, coherency: float) -> np.ndarray:
    return rate * n / (1 + contention * (n - 1) + coherency * n * (n - 1))


@pytest.mark.parametrize(
    ("rate", "contention", "coherency"),
    [(780.0, 0.05, 0.002), (1.2e9, 0.3, 0.0), (3.0, 0.0, 0.01), (100.0, 1.0, 0.0), (50.0, 0.0, 0.0)],
)
def test_the_law_is_found_again_from_exact_points(rate: float, contention: float, coherency: float) -> None:
    n = np.array(AT, float)
    found = usl(n, law(n, rate, contention, coherency))
    assert found.rate == pytest.approx(rate, rel=1e-3)
    assert found.contention == pytest.approx(contention, abs=2e-3)
    assert found.coherency == pytest.approx(coherency, abs=2e-4)
    assert found.at(n) == pytest.approx(law(n, rate, contention, coherency), rel=1e-3)
    assert found.r_squared == pytest.approx(1.0, abs=1e-4) or contention == 1.0  # there it is flat: nothing to explain


def test_the_law_is_found_again_from_noisy_repeats() -> None:
    n = np.repeat(np.array(AT, float), 30)
    noise = np.random.default_rng(11).normal(1, 0.02, len(n))
    found = usl(n, law(n, 780.0, 0.05, 0.004) * noise)
    assert found.rate == pytest.approx(780, rel=0.03)
    assert found.contention == pytest.approx(0.05, abs=0.02)
    assert found.coherency == pytest.approx(0.004, abs=0.001)
    assert found.r_squared > 0.98


def test_the_best_n_is_where_the_throughput_is_greatest() -> None:
    found = Usl(100.0, 0.1, 0.01, 1.0)
    assert found.best_n == pytest.approx(math.sqrt(0.9 / 0.01))
    near = found.at(np.array([found.best_n - 0.5, found.best_n, found.best_n + 0.5]))
    assert near[1] > near[0]
    assert near[1] > near[2]
    assert Usl(100.0, 0.1, 0.0, 1.0).best_n == math.inf
    assert Usl(100.0, 1.0, 0.01, 1.0).best_n == 0.0


def test_the_law_needs_three_places() -> None:
    with pytest.raises(ValueError, match="at least three N; there are 2"):
        usl([1, 1, 2, 2], [1.0, 1.0, 2.0, 2.0])


def test_enough_is_drawn_for_the_ends_of_an_interval_to_be_stable() -> None:
    """2.5 % of the draws lie beyond each end."""
    assert RESAMPLES * 0.025 >= 50


@pytest.mark.parametrize(("percent", "enough"), [(95, 20), (99, 100), (50, 2)])
def test_a_percentile_is_a_value_that_enough_others_exceed(percent: int, enough: int) -> None:
    values = np.random.default_rng(1).permutation(np.arange(1.0, 1001.0))
    assert percentile(values, percent) == 10 * percent, "the rank of 1000 values"
    assert percentile(np.arange(float(enough)), percent) == enough - 2, "all but the greatest"
    assert percentile(np.arange(enough - 1.0), percent) is None
    assert percentile([], percent) is None
