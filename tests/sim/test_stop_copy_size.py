# SPDX-License-Identifier: GPL-2.0-or-later
"""What hangs on MIG_DATA_SIZE: the decision to stop, v2's and v3's alike. docs/model.md has the numbers, as a table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.scenario.file import load, parse
from tests.build.runs import run

MODEL = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
_ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in MODEL.partition("\n| `nic-reconfig`, `full`, 20 s |")[2].partition("\n\n")[0].splitlines()
]
PROTOCOLS, TABLE = _ROWS[0][0:], _ROWS[2:]
CELLS = [(row[0], protocol, cell) for row in TABLE for protocol, cell in zip(PROTOCOLS, row[1:], strict=True)]
NEVER = re.compile(r"never: ([\d.]+) of ([\d.]+) MiB fit")


def nic(settings: str, size: str, protocol: str) -> Outcome:
    scenario = load("nic-reconfig", [*settings.split(), f"driver.stop_copy_size={size}", "vmm.give_up_s=20"])
    return run(scenario, protocol)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "protocol", "cell"), CELLS)
def test_the_table_in_the_docs_is_what_runs_give(settings: str, protocol: str, cell: str) -> None:
    outcome = nic(settings, "full", protocol)
    if cell == "stops":
        assert outcome.kind is OutcomeKind.COMPLETED
        return
    fit, size = map(float, NEVER.findall(cell)[0])
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    (most,) = re.findall(r"\(([\d.]+) MiB would at", outcome.reason)
    assert float(most) == pytest.approx(fit, rel=0.1)
    (left,) = re.findall(r"nic ([\d.]+)\)", outcome.reason)
    assert float(left) == pytest.approx(size, abs=1)
    assert nic(settings, "left", protocol).kind is OutcomeKind.COMPLETED


SLOW_LINK = """
extends = "mlx5"

[link]
per_connection_gbit_per_s = 10.0

[ram]
nonzero_gib = 0.25

[vmm]
give_up_s = 8.0
downtime_limit_ms = {limit_ms}

[[device]]
name = "vf"
state_mib = {state_mib}
stop_only_mib = 8.0
writes = {{ mib_per_s = 20.0 }}
"""


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd", "v3-n1"])
@pytest.mark.parametrize(("state_mib", "limit_ms"), [(300.0, 100.0), (900.0, 200.0)])
def test_a_state_that_does_not_fit_at_the_links_rate_is_stopped_only_if_what_is_left_is_said(
    protocol: str, state_mib: float, limit_ms: float
) -> None:
    """Two or three connections of 10 Gbit/s: 120 to 360 MiB in 100 ms at the very most, but RAM is slower than that."""
    text = SLOW_LINK.format(limit_ms=limit_ms, state_mib=state_mib)
    full, left = (
        run(parse(text, "slow.toml", [f"driver.stop_copy_size={size}"]), protocol) for size in ("full", "left")
    )
    assert left.kind is OutcomeKind.COMPLETED
    assert full.kind is OutcomeKind.DID_NOT_CONVERGE
    (size,) = re.findall(r"vf ([\d.]+)\)", full.reason)
    assert float(size) == pytest.approx(state_mib, abs=1), "however much of it has moved"


def test_a_state_that_fits_is_stopped_whatever_is_said() -> None:
    for protocol in ("v2", "v2-multifd", "v3-n1"):
        text = SLOW_LINK.format(limit_ms=300.0, state_mib=40.0)
        for size in ("full", "left"):
            outcome = run(parse(text, "slow.toml", [f"driver.stop_copy_size={size}"]), protocol)
            assert outcome.kind is OutcomeKind.COMPLETED
