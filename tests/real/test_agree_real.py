# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 agree --real`: the same scenario in virtual time, live, and by devices of the sample driver."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from sim.real import sample_devices
from sim.real.sample import SampleFiles
from sim.real.sample_parameters import module_parameters
from sim.scenario.file import load
from tests.build.cli import proto_v3
from tests.real import mdev

SMALL = ("--set", "device.0.state_mib=4", "--set", "device.0.stop_only_mib=4", "--set", "device.0.writes.mib_per_s=0")


def test_devices_are_what_the_scenario_says_and_are_gone_at_the_end() -> None:
    before = {each.name: each.read_text() for each in mdev.SAMPLE_PARAMETERS.iterdir()}
    parameters = module_parameters(load("live-sample"))
    with sample_devices.made(parameters, 2) as entries:
        for entry in entries:
            files = SampleFiles.of(entry)
            assert files is not None
            has = files.parameters()
            assert {name: has[name] for name in parameters} == {name: str(value) for name, value in parameters.items()}
            assert entry.cdev is not None
    assert not [entry for entry in entries if (mdev.SYSFS_DEVICES / entry.name).exists()]
    assert {each.name: each.read_text() for each in mdev.SAMPLE_PARAMETERS.iterdir()} == before


def test_a_scenario_is_run_in_all_three_ways(tmp_path: Path) -> None:
    """How near they are is a matter of an idle machine: results/real."""
    command = ("agree", "live-sample", "--real", "--protocols", "v2,v3-n2", "--seeds", "1", *SMALL, "--out", "out")
    done = proto_v3(tmp_path, *command)
    assert done.returncode in (0, 1), done.stderr
    runs = pl.read_parquet(tmp_path / "out" / "runs.parquet")
    assert runs["clock"].to_list() == ["virtual"] * 2 + ["live"] * 2 + ["real"] * 2
    assert set(runs["outcome"]) == {"COMPLETED"}, runs["reason"].to_list()
    compared = pl.read_parquet(tmp_path / "out" / "agree.parquet")
    assert compared.filter(figure="downtime")["real_ratio"].is_not_null().all()
