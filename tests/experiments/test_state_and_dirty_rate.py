# SPDX-License-Identifier: GPL-2.0-or-later
"""The experiment of state and dirty rate: its grid, its theory, and that what it says depends on the runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import polars as pl
import pytest

from experiments.questions import state_and_dirty_rate as experiment
from experiments.questions.state_and_dirty_rate import ENGINES, EXPERIMENT, MAP, NARROW, ONE_ENGINE
from experiments.study.experiment import Planned
from sim.theory.rates import precopy_mib_per_s
from tests.build.grids import table_of


@pytest.mark.slow
def test_every_place_of_the_grid_can_be_run() -> None:
    for quick in (True, False):
        for point in EXPERIMENT.points(quick):
            device = Planned.of(point, 1).cell.scenario.devices[0]
            assert device.state_mib == point.factors["state_mib"]
            assert device.blocks <= 65536


def test_large_states_are_repeated_less_but_where_downtimes_are_compared() -> None:
    for point in EXPERIMENT.points(False):
        of = point.factors
        compared = point.protocol in experiment.COMPARED and of["dirty_of_link"] == experiment.COMPARED_AT
        if of["machine"] != MAP:
            assert point.repeats == experiment.REPEATS_OF_MACHINES
        else:
            assert point.repeats == (None if compared else experiment.REPEATS[int(of["state_mib"])])


def test_what_is_carried_is_bound_by_what_streams_share() -> None:
    def carried(machine: str, protocol: str) -> float:
        return precopy_mib_per_s(*experiment.applied(machine, 4096, protocol))

    connection, link = experiment.connection_mib_per_s(), experiment.LINK_MIB_PER_S
    assert carried(MAP, "v2") == carried(MAP, "v2-multifd") == carried(MAP, "v3-n1") == connection
    assert carried(MAP, "v3-n4") == carried(MAP, "v3-blocks-n4") == carried(ENGINES, "v3-n4") == link
    assert carried(ONE_ENGINE, "v3-n4") == 2000.0
    assert carried(NARROW, "v3-n4") == connection


def test_a_state_that_fits_the_downtime_limit_always_converges() -> None:
    assert math.isinf(experiment.boundary_mib_per_s(MAP, 64, "v2"))
    assert experiment.boundary_mib_per_s(MAP, 65536, "v2") == pytest.approx(experiment.connection_mib_per_s(), rel=0.01)


def _rows(planned: list[Planned]) -> pl.DataFrame:
    return table_of(planned)


@pytest.mark.slow
def test_answer_and_figures_of_real_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK_STATES_MIB", (64,))
    monkeypatch.setattr(experiment, "QUICK_MACHINES", ())
    monkeypatch.setattr(experiment, "HOTSPOT_RATES", ())
    frame = _rows([each for each in EXPERIMENT.planned(True) if each.cell.seed <= 2])
    answer = EXPERIMENT.answer(frame)
    assert "95 % interval" in answer.answer
    assert answer.table.height > 0
    assert set(EXPERIMENT.figures(frame, "a command")) == {"convergence_map", "boundary"}


@lru_cache
def _planned() -> list[Planned]:
    return EXPERIMENT.planned(False)


def _frame(boundary: Callable[[str, str], float]) -> pl.DataFrame:
    """Made up: a run completes below a rate that hangs on machine and protocol."""
    rows = []
    for planned in _planned():
        of = planned.point.factors
        done = float(of["dirty_mib_per_s"]) < boundary(str(of["machine"]), planned.point.protocol)
        rows.append(
            {
                **of,
                "protocol": planned.point.protocol,
                "seed": planned.cell.seed,
                "outcome": "COMPLETED" if done else "DID_NOT_CONVERGE",
                "downtime_ns": 500_000_000 + planned.cell.seed if done else None,
                "wire_bytes": 1 << 40,
                "total_ns": 10**11,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _verdicts(frame: pl.DataFrame) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in EXPERIMENT.answer(frame).findings}


def _theory(machine: str, protocol: str) -> float:
    return 1e9 if machine == experiment.HOTSPOT else experiment.boundary_mib_per_s(machine, 4096, protocol)


@pytest.mark.slow
def test_runs_as_theory_has_them_support_both_claims() -> None:
    assert _verdicts(_frame(_theory)) == {"C2": "supported", "C3": "supported"}


def test_engines_that_move_nothing_refute() -> None:
    frame = _frame(_theory)
    same = frame.filter(pl.col("machine") == ENGINES, pl.col("protocol") == "v3-n1")
    frame = pl.concat(
        [
            frame.filter(~((pl.col("machine") == ENGINES) & (pl.col("protocol") == "v3-n4"))),
            same.with_columns(protocol=pl.lit("v3-n4")),
        ]
    )
    assert _verdicts(frame)["C2"] == "refuted"


def test_one_engine_that_moves_it_refutes() -> None:
    frame = _frame(_theory)
    of_n4 = (pl.col("machine") == ONE_ENGINE) & (pl.col("protocol") == "v3-n4")
    rate = pl.when(of_n4).then(2 * pl.col("dirty_mib_per_s")).otherwise(pl.col("dirty_mib_per_s"))
    assert _verdicts(frame.with_columns(dirty_mib_per_s=rate))["C3"] == "refuted"


@pytest.mark.slow
def test_nothing_completed_is_said() -> None:
    frame = _frame(lambda *_: -1.0)
    assert "below 0 MiB/s" in EXPERIMENT.answer(frame).answer
    assert _verdicts(frame) == {"C2": "under conditions", "C3": "under conditions"}
    assert EXPERIMENT.figures(frame, "a command")
