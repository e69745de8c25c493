# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fit of two logs of QEMU's must give, where the sample driver's parameters are known."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.logs.machine import FittedMachine
from experiments.logs.quantity import Certainty, LogQuantity
from tests.real.qemu.pairs import LogPair

US_PER_MS, KIB_PER_MIB = 1000, 1024
TICK_MS = 10.0
"""Of User-Mode Linux: a process that waits for the driver may run that much later."""
LEAST_MS = 0.5
"""An emulated time is the least that an arc takes, up to the clocks' rounding."""
BUSY_MS = 100.0
"""An arc may take that much longer where the machine had other work: a device in a pair of which the other is not."""
END_BYTES = 1024
"""Headers and the END beside a device's state."""
RATE = 0.15


class Truth:
    """What is known of one pair."""

    def __init__(self, pair: LogPair, late_ms: float = TICK_MS, rate: float = RATE) -> None:
        """`late_ms`: how much longer an arc may take, for each time in it. `rate`: how far off a rate may be."""
        self._pair, self._known = pair, pair.known
        self._late_ms, self._rate = late_ms, rate
        self._precopy = pair.us("precopy") == 1
        self._multifd = "multifd" in self._known["capabilities"]
        self._size_mib = pair.us("size_kib") / KIB_PER_MIB

    def _ms(self, *parameters: str) -> float:
        return sum(self._pair.us(each) for each in parameters) / US_PER_MS

    def _quantities(self, machine: FittedMachine, key: str) -> list[LogQuantity]:
        """Of each device."""
        named = {each.key: each for each in machine.quantities}
        return [named[f"device.{at}.{key}"] for at in range(self._known["devices"])]

    def check_times(self, machine: FittedMachine) -> None:
        """The arcs: each at least as long as the driver takes for it; one device is within a tick."""
        stop = ("suspend_us",) if self._precopy else ("stop_us",)
        for key, parameters in (
            ("suspend_ms", ("quiesce_us",)),
            ("quiesce_ms", stop),
            ("resume_ms", ("load_finish_us", "resume_us", "run_us")),
        ):
            due = self._ms(*parameters)
            found = self._quantities(machine, key)
            assert {each.kind for each in found} == {Certainty.MEASURED}
            values = [each.value for each in found]
            assert min(values) >= due - LEAST_MS, key
            assert min(values) <= due + len(parameters) * self._late_ms, key
            assert max(values) <= due + max(BUSY_MS, 3 * self._late_ms), key
        for each in self._quantities(machine, "config_load_ms"):
            assert each.kind is Certainty.MEASURED
            assert 0 < each.value < max(BUSY_MS, self._late_ms)

    def check_sizes(self, machine: FittedMachine) -> None:
        """Bytes: exactly, but for the heads of records; or the truth is between the bounds."""
        for each in self._quantities(machine, "state_mib"):
            check(each, self._size_mib, rel=END_BYTES / (1 << 20))
        features = {"STOP_COPY", "P2P"} | ({"PRE_COPY"} if self._precopy else set())
        for each in self._quantities(machine, "features"):
            assert set(each.value) == features

    def check_rates(self, machine: FittedMachine) -> None:
        """Rates: within 15 %, or between the bounds, or said not to be told."""
        named = {each.key: each for each in machine.quantities}
        if rate := self._pair.us("load_mib_s"):
            check(named["firmware.load_mib_per_s"], rate, rel=self._rate)
        if rate := self._pair.us("save_mib_s"):
            check(named["firmware.save_mib_per_s"], rate, rel=self._rate)
        for each in self._quantities(machine, "writes.mib_per_s"):
            check(each, self._pair.us("dirty_kib_s") / KIB_PER_MIB, rel=self._rate)

    def check_settings(self, machine: FittedMachine) -> None:
        """What QEMU was told."""
        named = {each.key: each.value for each in machine.quantities}
        capabilities, parameters = self._known["capabilities"], self._known["parameters"]
        assert named["vmm.downtime_limit_ms"] == parameters.get("downtime-limit", 300)
        assert named["vmm.multifd"] is self._multifd
        old = self._known["qemu"].startswith("10.")
        if "switchover-ack" in capabilities:
            assert named["vmm.switchover_ack"] == ("one_shot" if old else "reusable")
        if self._precopy:
            assert named.get("vmm.reinit", False) is not old
        reinit = [each for each in machine.quantities if each.key.endswith("reconfigurations.at_s")]
        assert bool(reinit) == bool(self._pair.us("reinit_at"))


def check(found: LogQuantity, truth: Any, rel: float) -> None:
    """The quantity is the truth, or its bounds have the truth in them, or it says that it cannot be told."""
    if found.kind is Certainty.MEASURED:
        assert found.value == pytest.approx(truth, rel=rel), found
    elif found.kind is Certainty.BOUNDED:
        assert found.low is None or found.low <= truth * (1 + rel), found
        assert found.high is None or found.high >= truth * (1 - rel), found
