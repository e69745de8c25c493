# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration of QEMU's whose times, sizes and rates are drawn, and `proto-v3 fit` on its logs: they come out."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.logs.machine import machine_of
from tests.build.fit_truth import Truth
from tests.real import mdev
from tests.real.qemu.pairs import BY_NAME, LogPair, make_good
from tests.real.qemu.run import qemu_of

LATE_MS, RATE = 1000.0, 0.5
"""On a machine that does other things too: not a bound on how long anything takes."""
ARCS_US = ("suspend_us", "quiesce_us", "stop_us", "load_finish_us", "resume_us", "run_us")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("one", "11.1"),
        pytest.param("pair", "10.0", marks=pytest.mark.slow),
        pytest.param("multifd", "11.1", marks=pytest.mark.slow),
        pytest.param("no-precopy", "10.0", marks=pytest.mark.slow),
    ],
)
def test_drawn_parameters_come_out(name: str, version: str, tmp_path: Path) -> None:
    if not mdev.supported(mdev.SAMPLE):
        pytest.skip(f"this kernel has no module {mdev.SAMPLE_MODULE}")
    qemu = qemu_of(version)
    if qemu is None:
        pytest.skip(f"no QEMU {version} in the cache: make qemu")
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"drawn by seed {seed}")  # shown if it fails
    draw, case = random.Random(seed), BY_NAME[name]
    drawn = {each: draw.randrange(5, 150) * 1000 for each in ARCS_US}
    drawn["size_kib"] = draw.randrange(2, 12) * 1024
    if "load_mib_s" in case.driver:
        drawn |= {"save_mib_s": draw.randrange(8, 64), "load_mib_s": draw.randrange(4, 12)}
    case = replace(case, driver={**case.driver, **drawn})
    assert make_good(case, qemu, tmp_path / "pair")
    pair = LogPair(tmp_path / "pair")
    source, target = pair.unpacked(tmp_path)
    machine = machine_of(str(source), str(target), cmdline=[str(pair.folder / "cmdline.txt")])
    truth = Truth(pair, LATE_MS, RATE)
    truth.check_times(machine)
    truth.check_sizes(machine)
    truth.check_rates(machine)
    truth.check_settings(machine)
