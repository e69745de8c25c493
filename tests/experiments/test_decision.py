# SPDX-License-Identifier: GPL-2.0-or-later
"""The decision: gains and probabilities against counts, indices against known ones, sentences against their limits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import qmc

from experiments.decision import deciding
from experiments.decision.bands import Brought, SampleBand, brought, gains_percent, less
from experiments.decision.deciding import Index, bounded, indices, turn
from experiments.decision.decision import decide, rows_table, study
from experiments.decision.ladder import AS_IT_IS, LADDER, Rung, protocol_of, rungs
from experiments.decision.machines import near
from experiments.decision.measure import how_to_measure, what_it_is
from experiments.decision.verdict import IDEAS, MOST_CHARS, making_worse, verdicts, worth_making
from experiments.report.decision import conclusion
from experiments.runs.frame import table
from experiments.runs.pool import run_cells
from proto_v3.errors import UserError
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.sample import Sample, draw
from sim.scenario.scenario import Scenario
from sim.scenario.shipped import shipped
from sim.scenario.suffixes import SUFFIXES
from tests.build.scenario import small_scenario

INF = float("inf")
IDLE = {"device.0.stop_only_mib": 8.0, "vmm.downtime_limit_ms": 40.0}  # twice what 8 MiB take
ENGINES = {"firmware.engines": {"low": 1.0, "high": 8.0, "why": "x"}}
V3_ROWS = ["v3-n1", "v3-n4"]


def runs_of(downtimes_ms: Mapping[str, Sequence[float | None]]) -> pl.DataFrame:
    """A table of runs by protocol; None: it failed."""
    rows = [
        {
            "protocol": protocol,
            "seed": seed,
            "outcome": "FAILED" if each is None else "COMPLETED",
            "reason": "",
            "downtime_ns": None if each is None else round(each * 1e6),
            "phase_stop_ns": None if each is None else 1_000_000,
            "critical_lag_max_ns": None if each is None else seed * 10**9,
            "total_ns": 10**9,
            "device_bytes_resent": 1 << 20,
            "pinned_chunks_bytes": 1 << 20,
            "pinned_images_bytes": 0,
            "pinned_target_bytes": 0,
        }
        for protocol, every in downtimes_ms.items()
        for seed, each in enumerate(every, 1)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def rows_of(*protocols: str) -> list[Rung]:
    return [Rung(AS_IT_IS, protocols[0]), *(Rung(each, each, LADDER[0]) for each in protocols[1:])]


# --- the ladder -------------------------------------------------------------------------------------------------------


def test_every_suffix_of_the_ladder_is_one() -> None:
    for change in LADDER:
        assert set(change.v2) <= set(SUFFIXES["v2"])
        assert {*change.v3, *(change.streams.split("-") if change.streams else [])} <= set(SUFFIXES["v3"])
    assert len({change.name for change in LADDER}) == len(LADDER)
    assert set(IDEAS) <= {change.name for change in LADDER}


@pytest.mark.parametrize("name", shipped())
def test_every_row_is_on_top_of_those_above_it(name: str) -> None:
    """A row that is run adds something to the row above it; v3's rows come last, and keep what goes with v3."""
    scenario = load(name)
    made = [row for row in rungs(scenario) if not row.nothing]
    assert made[0] == Rung(AS_IT_IS, "v2")
    assert len({row.protocol for row in made}) == len(made)
    assert [row.protocol[:2] for row in made] == sorted(row.protocol[:2] for row in made)
    for above, row in itertools.pairwise(made):
        own, before = (Protocol.parse(each.protocol, scenario).applied(scenario) for each in (row, above))
        assert own.scenario != before.scenario or own.protocol.version != before.protocol.version
        if row.protocol.startswith("v2") and row.name != "priority":
            assert row.protocol.startswith(above.protocol)


def test_priority_takes_the_place_of_flush() -> None:
    rows = {row.name: row.protocol for row in rungs(load("nic-reconfig"), ["reinit-ack", "priority"])}
    assert rows["reinit-ack"] == "v2-reinit-flush-ack-reusable"
    assert rows["priority"] == "v2-ack-reusable-priority"


def test_what_means_nothing_is_told_and_not_run() -> None:
    still = {row.name: row.nothing for row in rungs(load("mlx5-2vf"))}
    assert still["reinit-ack"] == "nothing reconfigures the devices"
    assert still["multifd"] == ""
    busy = {row.name: row.nothing for row in rungs(load("nic-reconfig"))}
    assert busy["reinit-ack"] == ""
    has = load("mlx5-2vf", ["vmm.multifd_device_state=true"])
    assert {row.name: row.nothing for row in rungs(has)}["multifd"] == "the scenario has it"
    limited = load("mlx5-2vf", ["vmm.max_bandwidth_mib_per_s=1024"])
    assert "max_bandwidth" in {row.name: row.nothing for row in rungs(limited)}["v3-n4"]


def test_only_the_changes_that_are_named_are_made() -> None:
    assert [row.name for row in rungs(load("mlx5-2vf"), ["v3-n4", "multifd"])] == [AS_IT_IS, "multifd", "v3-n4"]
    with pytest.raises(UserError, match=r"'multfd': must be one of multifd, .* did you mean multifd"):
        rungs(load("mlx5-2vf"), ["multfd"])


def test_v3_keeps_one_suffix_for_its_streams() -> None:
    streams = [change for change in LADDER if change.streams]
    assert protocol_of(streams[:1]) == "v3-n1"
    assert protocol_of(streams[:2]) == "v3-n4"
    assert protocol_of(streams) == "v3-blocks-n4"


# --- gains ------------------------------------------------------------------------------------------------------------


def test_a_gain_is_taken_in_each_sample() -> None:
    """Medians of two rows may be alike where each machine gains."""
    rows = brought(rows_of("a", "b", "c"), runs_of({"a": [100, 200, 400], "b": [90, 100, 390], "c": [90, 100, 390]}))
    assert rows[1].brings["downtime_ms"] == SampleBand(10, 10, 100)
    assert rows[1].brings_percent == SampleBand(10, 2.5, 50)
    assert rows[1].probability == pytest.approx(2 / 3)
    assert rows[2].probability == 0
    assert rows[2].brings_percent == SampleBand(0, 0, 0)
    assert rows[2].in_all_percent == rows[1].brings_percent
    assert rows[0].probability is None


def test_a_gain_of_just_five_percent_is_not_more_than_that() -> None:
    rows = brought(rows_of("a", "b"), runs_of({"a": [100, 100], "b": [95, 94.9]}))
    assert rows[1].probability == 0.5


def test_a_run_that_does_not_complete_is_longer_than_any_other() -> None:
    """And stays in the medians: of five machines two fail, so that the band's upper end fails, and the median is the
    third."""
    rows = brought(
        rows_of("a", "b", "c"),
        runs_of(
            {"a": [100, 110, 120, 130, 140], "b": [50, None, 70, None, 90], "c": [50, None, 70, 80, None]},
        ),
    )
    first, second, third = rows
    assert second.levels["downtime_ms"] == SampleBand(90, 50, INF)
    assert second.failed == 2
    assert second.fewer_failures == -2
    assert second.probability == 3 / 5
    assert second.brings_percent is not None
    assert second.brings_percent.low == -INF
    assert list(third.gains_percent) == [0, 0, 0, INF, -INF]
    assert third.probability == 1 / 5
    assert (third.failed, third.fewer_failures) == (2, 0)
    assert list(bounded(third.gains_percent)) == [0, 0, 0, 100, -100]
    assert first.brings == {}
    assert second.brings["critical_lag_s"] == SampleBand(0, 0, 0), "of the pairs that both completed"
    told = rows_table_of(rows)
    assert told["downtime_ms_high"].to_list() == [140, None, None]
    assert told["failed"].to_list() == [0, 2, 2]


def rows_table_of(rows: Sequence[Brought]) -> pl.DataFrame:
    from experiments.decision.decision import Decision

    return rows_table(Decision(small_scenario(), 5, rows, {}, []))


def test_v3_is_held_against_the_best_v2_of_each_machine() -> None:
    """The change of `b` helps where it completes, and that of `c` never does."""
    runs = {"v2": [300, 300, 300, None], "v2-b": [100, 110, None, None], "v2-c": [120, 130, None, None]}
    rows = brought(rows_of(*runs, "v3-n1", "v3-n4"), runs_of({**runs, "v3-n1": [90] * 4, "v3-n4": [45] * 4}))
    assert list(rows[3].gains_percent) == pytest.approx([10, 100 * 20 / 110, 70, INF])
    assert rows[3].fewer_failures == 1
    assert rows[3].in_all_percent == SampleBand(70, 70, INF)
    assert list(rows[4].gains_percent) == [50] * 4
    same = runs_of({"v2": [100, 100], "v2-b": [100, 100], "v3-n1": [50, None]}).with_columns(
        critical_lag_max_ns=pl.when(protocol=pl.lit("v2")).then(9 * 10**9).otherwise("critical_lag_max_ns")
    )
    (*_, last) = brought(rows_of("v2", "v2-b", "v3-n1"), same)
    assert last.brings["critical_lag_s"] == SampleBand(0, 0, 0), "of equal rows it is the last"
    assert list(last.gains_percent) == [50, -INF]


def test_gains_of_nothing_are_nothing() -> None:
    assert list(gains_percent(np.array([0.0, 10.0, INF, INF]), np.array([0.0, 0.0, INF, 1.0]))) == [0, 100, 0, INF]
    assert list(less(np.array([INF, 3.0]), np.array([INF, INF]))) == [0, -INF]
    assert SampleBand.of([float("nan")]) is None


def test_a_protocol_that_is_not_supported_is_no_row_to_stand_on() -> None:
    runs = runs_of({"a": [100, 100], "b": [50, 50], "c": [40, 40]}).with_columns(
        outcome=pl.when(protocol=pl.lit("b")).then(pl.lit("UNSUPPORTED")).otherwise("outcome"),
        reason=pl.lit("no such streams"),
    )
    rows = brought(rows_of("a", "b", "c"), runs)
    assert rows[1].rung.nothing == "not supported: no such streams"
    assert not rows[1].made
    assert rows[2].brings_percent == SampleBand(60, 60, 60)


# --- which key decides ------------------------------------------------------------------------------------------------


def sobol(dimensions: int, count: int, seed: int = 1) -> Any:
    return qmc.Sobol(dimensions, scramble=True, seed=np.random.default_rng(seed)).random(count)


def test_indices_of_ishigamis_function_are_the_known_ones() -> None:
    """Sobol's indices of sin x + 7 sin^2 y + 0.1 z^4 sin x over -pi to pi: 0.314, 0.442, 0."""
    points = sobol(3, 1024)
    x, y, z = (2 * points.T - 1) * np.pi
    found = indices(dict(zip("xyz", points.T, strict=True)), np.sin(x) + 7 * np.sin(y) ** 2 + 0.1 * z**4 * np.sin(x))
    by_key = {each.key: each for each in found}
    assert [each.key for each in found] == ["y", "x", "z"]
    assert by_key["x"].first_order == pytest.approx(0.3139, abs=0.03)
    assert by_key["y"].first_order == pytest.approx(0.4424, abs=0.03)
    assert by_key["z"].first_order == pytest.approx(0, abs=0.03)
    assert by_key["y"].told
    assert not by_key["z"].told


@pytest.mark.parametrize("count", [256, 1024])
@pytest.mark.parametrize("seed", range(3))
def test_indices_of_a_sum_are_the_shares_of_its_variance(count: int, seed: int) -> None:
    """4 a + 2 b, and 28 keys that do nothing: 0.8 and 0.2."""
    points = sobol(30, count, seed)
    found = indices({f"k{at}": points[:, at] for at in range(30)}, 4 * points[:, 0] + 2 * points[:, 1])
    assert [each.key for each in found[:2]] == ["k0", "k1"]
    assert found[0].first_order == pytest.approx(0.8, abs=0.01)
    assert found[1].first_order == pytest.approx(0.2, abs=0.01)
    assert all(abs(each.first_order) < 0.01 for each in found[2:])


@pytest.mark.parametrize("seed", range(3))
def test_a_key_that_does_nothing_is_not_told(seed: int) -> None:
    """Of a step in one key and another step that hangs on both: 9/11 and 1/11, and 1/11 together."""
    points = sobol(30, 256, seed)
    a, b = points[:, 0] > 0.5, points[:, 1] > 0.5
    found = indices({f"k{at}": points[:, at] for at in range(30)}, a + 1.0 * (a & b))
    assert [each.key for each in found if each.told] == ["k0"]
    assert found[0].first_order == pytest.approx(9 / 11, abs=0.06)


def test_a_switch_has_an_index_too() -> None:
    points = sobol(2, 256)
    found = indices({"a": points[:, 0], "b": points[:, 1]}, (points[:, 0] > 0.5).astype(float))
    assert found[0].key == "a"
    assert found[0].first_order == pytest.approx(1, abs=0.08)


def test_nothing_decides_where_nothing_varies_or_little_is_known() -> None:
    assert indices({"a": np.linspace(0, 1, 256)}, np.ones(256)) == []
    assert indices({"a": np.linspace(0, 1, 8)}, np.arange(8.0)) == []
    assert indices({}, np.arange(256.0)) == []


def test_the_value_where_the_answer_turns() -> None:
    values = [1.0, 4.0, 2.0, 3.0]
    up, down = turn(values, [False, True, False, True]), turn(values, [True, False, True, False])
    assert up is not None
    assert down is not None
    assert (up.value, up.above) == (2.5, True)
    assert (down.value, down.above) == (2.5, False)
    assert turn(values, [True] * 4) is None
    assert turn([1.0] * 4, [True, False, True, False]) is None
    assert turn(values, [True, True, False, False]) is None, "1 and 4 against 2 and 3"
    words = turn(["full", "left", "full", "left"], [True, False, True, False])
    assert words is not None
    assert words.value == ["full"]


# --- the verdict ------------------------------------------------------------------------------------------------------


def row(name: str, gains: Sequence[float], **more: Any) -> Brought:
    change = next(each for each in LADDER if each.name == name)
    array = np.array(gains)
    return Brought(
        Rung(name, name, change),
        len(array),
        brings_percent=SampleBand.of(array),
        probability=float(np.mean(array > 5)),
        gains_percent=array,
        **more,
    )


FIRST = Brought(Rung(AS_IT_IS, "v2"), 4)


def samples_of(key: str, values: Sequence[float]) -> list[Sample]:
    return [Sample({key: each}, small_scenario(), {key: each}) for each in values]


@pytest.mark.parametrize("name", list(IDEAS))
@pytest.mark.parametrize(
    "more", [{}, {"fewer_failures": 4}, {"brings": {"critical_lag_s": SampleBand(-12.34, -13, 1)}}]
)
def test_a_verdict_is_one_short_sentence_with_three_numbers_at_most(name: str, more: Any) -> None:
    keys = {key for each in shipped() for key in load(each).ranges} | {"x.strange_key"}
    every = ([0.0, 1.0, -INF, 0.0], [10.0, 20.0, 30.0, INF], [0.0, -12.345, 10.0, 56.789])
    for gains, key in itertools.product(every, keys):
        found = {name: [Index(key, 0.5, 0.1)]}
        (verdict,) = verdicts([FIRST, row(name, gains, **more)], found, samples_of(key, [1.0, 2.0, 3.0, 4.0]))
        assert len(verdict.sentence) <= MOST_CHARS
        assert not verdict.sentence.endswith("...")
        assert len(re.findall(r"(?<!v)\d+(?:\.\d+)?", verdict.sentence)) <= 3, verdict.sentence


def test_the_verdict_follows_the_numbers() -> None:
    index = {"v3-n4": [Index("firmware.engines", 0.7, 0.1)]}
    samples = samples_of("firmware.engines", [1.0, 2.0, 3.0, 4.0])

    def word(*gains: float, found: Mapping[str, Sequence[Index]] = index) -> Any:
        (verdict,) = verdicts([FIRST, row("v3-n4", gains)], found, samples)
        return verdict

    assert word(0, 0, 0, 0).word == "no"
    assert word(6, 6, 6, 6).word == "yes"
    assert word(INF, INF, INF, INF).word == "yes"
    assert word(-INF, -INF, -INF, -INF).word == "no"
    some = word(0, 0, 6, 6)
    assert some.word == "open"
    assert some.turns is not None
    assert (some.turns.value, some.turns.above) == (2.5, True)
    ranged = small_scenario({"ranges": ENGINES})
    assert some.settled_by(ranged).startswith("firmware.engines (1 to 8), which is yes above 2.5: save 1, 2 and 4 VFs")
    assert word(0, 0, 6, 6, found={}).settled_by(ranged) == ""
    assert "No single key" not in word(0, 0, 6, 6, found={}).sentence
    assert "No single key decides" in word(0, 0, 6, 6, found={"v3-n4": [Index("a", 0.05, 0.1)]}).sentence
    assert word(0, 0, 0, 0).settled_by(ranged) == ""


def test_what_is_worth_making_and_what_makes_it_worse() -> None:
    rows = [FIRST, row("multifd", [10, 10, 0, 6]), row("chunks4", [10, 0, 10, 0]), row("early", [-6, -INF, -9, 50])]
    assert worth_making(rows) == ["multifd"], "in more than half"
    assert making_worse(rows) == ["early"]


def test_an_idea_that_cannot_be_had_is_said_to() -> None:
    change = next(each for each in LADDER if each.name == "v3-blocks")
    (verdict,) = verdicts([FIRST, Brought(Rung("v3-blocks", "v3-blocks-n4", change, "no blocks"))], {}, [])
    assert (verdict.word, verdict.sentence) == ("not here", "Addressable blocks: nothing can be said here: no blocks.")


def test_every_range_of_a_shipped_scenario_has_a_way_to_be_measured() -> None:
    keys = {key for name in shipped() for key in load(name).ranges}
    fallback = how_to_measure("x.y")
    assert {key for key in keys if how_to_measure(key) == fallback} == set()
    assert what_it_is("device.0.strange_us") == "strange_us"


# --- whole decisions --------------------------------------------------------------------------------------------------


def decided(scenario: Scenario, count: int, changes: Sequence[str]) -> Any:
    planned = study(scenario, count, changes)
    outcomes, _ = run_cells(planned.cells, 1, quiet=True)
    return decide(planned, table(outcomes))


def test_streams_bring_nothing_where_a_vf_runs_one_command_at_a_time() -> None:
    """The state is saved by one engine, whatever N is."""
    scenario = small_scenario({**IDLE, "firmware.vf_engines": 1.0, "firmware.engines": 4.0, "ranges": ENGINES})
    rows = {each.rung.name: each for each in decided(scenario, 8, V3_ROWS).rows}
    assert rows["v3-n4"].probability == 0
    assert rows["v3-n4"].brings_percent.high < 1


def test_streams_bring_what_they_must_where_firmware_is_all_of_it() -> None:
    """Four streams save in a quarter of the time by four engines and more: 64 MiB at 64 MiB/s take a second."""
    scenario = small_scenario(
        {
            "device.0.state_mib": 64.0,
            "device.0.stop_only_mib": 64.0,
            "firmware.save_mib_per_s": 64.0,
            "firmware.engines": 8.0,
            "ranges": {"firmware.engines": {"low": 4.0, "high": 8.0, "why": "x"}},
            "vmm.downtime_limit_ms": 2000.0,
        }
    )
    rows = {each.rung.name: each for each in decided(scenario, 4, V3_ROWS).rows}
    assert rows["v3-n4"].probability == 1
    assert rows["v3-n4"].brings["downtime_ms"].median == pytest.approx(750, rel=0.05)


@pytest.mark.slow
def test_the_key_that_decides_is_found() -> None:
    """What N brings hangs on the engines of a VF, and on nothing else that varies."""
    ranges = {**ENGINES, "vmm.vcpu_stop_ms": {"low": 0.5, "high": 2.0, "why": "x"}}
    decision = decided(small_scenario({**IDLE, "ranges": ranges}), 128, V3_ROWS)
    first = decision.indices["v3-n4"][0]
    assert first.key == "firmware.engines"
    assert first.first_order > 0.6
    verdict = next(each for each in decision.verdicts if each.change == "v3-n4")
    assert verdict.word == "open"
    assert "how many commands of a PF run at once" in verdict.sentence
    assert verdict.turns.above
    assert 1 < verdict.turns.value < 2
    assert "Worth making" in next(iter(conclusion(decision)))
    assert "v3-n4" in worth_making(decision.rows)


def test_without_salib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.report.decision.has_indices", lambda: False)
    monkeypatch.setattr("experiments.decision.decision.has_indices", lambda: False)
    decision = decided(small_scenario({"ranges": ENGINES}), 2, V3_ROWS)
    assert decision.indices == {}
    told = [line for line in conclusion(decision) if "SALib" in line]
    assert len(told) == 1
    assert "proto-v3[indices]" in told[0]
    assert deciding.has_indices()


def test_samples_are_those_of_the_ranges_and_shared_by_all_rows() -> None:
    scenario = small_scenario({"ranges": ENGINES})
    planned = study(scenario, 4, V3_ROWS)
    assert [each.values for each in planned.samples] == [each.values for each in draw(scenario, 4)]
    assert [(cell.seed, cell.protocol.name) for cell in planned.cells] == [
        (seed, name) for seed in (1, 2, 3, 4) for name in ("v2", "v3-n1", "v3-n4")
    ]
    for at in range(4):
        assert {id(cell.scenario) for cell in planned.cells[3 * at : 3 * at + 3]} == {id(planned.samples[at].scenario)}


@pytest.mark.parametrize(
    ("own_ms", "count", "taken"),
    [
        ([100, 110, None, 120, 90] * 4, 16, [at + 5 * turn for turn in range(4) for at in (0, 1, 4)]),
        ([100] * 20, 16, list(range(16))),
        ([200, 100, 300, None], 4, [0, 1, 2]),
        ([None, None], 4, []),
    ],
)
def test_the_machines_that_may_be_the_one_that_was_seen(
    own_ms: Sequence[float | None], count: int, taken: list[int]
) -> None:
    assert near(own_ms, 100.0, count) == taken


def test_a_scenario_without_ranges_is_one_machine() -> None:
    decision = decided(small_scenario(), 16, V3_ROWS)
    assert decision.samples == 1
    assert any("no [ranges]" in line for line in conclusion(decision))
