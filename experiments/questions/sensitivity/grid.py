# SPDX-License-Identifier: GPL-2.0-or-later
"""The grid of sensitivity: each parameter with its range and the reason for it, the two bases, the two maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.questions.reconfiguration import ACKED, ACKED_MULTIFD, SMALL_RAM
from experiments.study.experiment import Factor, Point, under
from sim.scenario.file import load
from sim.scenario.scenario import Scenario, parameters

V3 = "v3-n4"
IDLE, NIC = "mlx5-2vf", "nic-reconfig"
BASES = {
    # RAM is small, for the question is not about it; 0.35 GiB leave as much at the stop as mlx5-2vf has with 200 GiB.
    IDLE: (
        *under("ram", size_gib=2, nonzero_gib=0.35, frame_mib=4),
        "device.0.block_kib=1024",
        *under("vmm", setup_ms=80, give_up_s=10),
    ),
    # 300 MiB of state are what was reported, and cheaper than 512.
    NIC: (*SMALL_RAM, *under("device.0", block_kib=256, state_mib=300), "vmm.give_up_s=15"),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A key of the scenario that is moved from low to high."""

    name: str
    """In words, with its unit."""
    key: str
    low: float | str
    high: float | str
    why: str
    """The reason for this range."""
    times: bool = True
    """Low and high are multiples of the base's value; if False, values."""
    bases: tuple[str, ...] = (IDLE, NIC)
    also: str = ""
    """A key that moves with it."""

    def at(self, scenario: Scenario, side: str) -> str:
        """The value at this end, as `--set` takes it."""
        end = self.low if side == "low" else self.high
        value = float(end) * float(parameters(scenario)[self.key]) if self.times else end
        return value if isinstance(value, str) else f"{value:.6g}"


def _p(name: str, key: str, why: str, low: float = 1 / 4, high: float = 4, **more: Any) -> Parameter:
    return Parameter(name, key, low, high, why, **more)


def _v(name: str, key: str, low: float | str, high: float | str, why: str, **more: Any) -> Parameter:
    return Parameter(name, key, low, high, why, times=False, **more)


def _n(name: str, key: str, why: str, low: float = 1 / 4, high: float = 4) -> Parameter:
    return Parameter(name, key, low, high, why, bases=(NIC,))


ALL_WHEN_STOPPED: Any = {"bases": (IDLE,), "also": "device.0.stop_only_mib"}
PARAMETERS = (
    _v("firmware engines", "firmware.engines", 1, 8, "one command at a time; more than any report shows"),
    _p("SAVE rate, MiB/s", "firmware.save_mib_per_s", "fitted to one rig"),
    _p("LOAD rate, MiB/s", "firmware.load_mib_per_s", "fitted to one rig"),
    _p("end of the LOAD, ms", "firmware.load_finish_ms", "fitted; it depends on what the device sets up"),
    _v("driver's lock", "driver.lock", "none", "global", "the two ends of what drivers do"),
    _p("chunk, MiB", "driver.chunk_mib", "a constant of mlx5"),
    _v("chunks ahead", "driver.chunks", 1, 8, "a constant of mlx5 (2)"),
    _p("call, us", "driver.call_us", "assumed"),
    _p("copy of a thread, GiB/s", "host.copy_gib_per_s", "slow cores; copies that are avoided"),
    _p("link, Gbit/s", "link.gbit_per_s", "25 to 400 Gbit/s are in use"),
    _p("one connection, Gbit/s", "link.per_connection_gbit_per_s", "TLS in software; large frames, zero copy"),
    _p("round trip, us", "link.round_trip_us", "within a rack; between sites", 1 / 5, 20),
    _p("socket buffers, MiB", "link.socket_buffer_mib", "limits that an administrator sets"),
    _p("read(), MiB", "vmm.read_mib", "a constant of QEMU", 1 / 2, 4),
    _p("write(), KiB", "vmm.write_kib", "a constant of QEMU"),
    _p("downtime limit, ms", "vmm.downtime_limit_ms", "the user's choice (300); below a half v2 rarely fits", 1 / 2, 4),
    _p("stop of the vCPUs, ms", "vmm.vcpu_stop_ms", "guests of few vCPUs and of many"),
    _p("start of the vCPUs, ms", "vmm.vcpu_start_ms", "guests of few vCPUs and of many"),
    _p("load of other devices, ms", "vmm.other_load_ms", "a guest without a VGA card; one with many devices"),
    _p("one channel's buffers, GiB/s", "vmm.device_buffer_gib_per_s", "fitted to a small device"),
    _p("RAM between reads, ms", "vmm.ram_budget_ms", "a constant of QEMU", 1 / 2, 4),
    _p("a device's stop, ms (twice)", "device.0.suspend_ms", "fitted to one rig", also="device.0.quiesce_ms"),
    _p("a device's config, ms", "device.0.config_load_ms", "70 and 112 ms were published"),
    _v("devices", "device.0.count", 1, 4, "the published rigs", bases=(IDLE,)),
    _p("a device's state, MiB", "device.0.state_mib", "4 to 100 MiB were published", 1 / 4, 3 / 2, **ALL_WHEN_STOPPED),
    _n("a device's state, MiB", "device.0.state_mib", "from few queues to many", 1 / 4, 2),
    _n("only when stopped, MiB", "device.0.stop_only_mib", "assumed; 3 x is near the limit", 1 / 4, 3),
    _n("set-up of an object, us", "device.0.critical.setup_us", "2 x is near what can be outrun", 1 / 4, 2),
    _n("critical objects", "device.0.critical.objects", "from few queues to thousands"),
    _n("writes, MiB/s", "device.0.writes.mib_per_s", "assumed; 3 x is near the SAVE rate", 1 / 4, 3),
    _n("reconfigurations a second", "device.0.reconfigurations.poisson_per_s", "2 x can be outrun still", 1 / 4, 2),
    _v("spread of the firmware's times", "firmware.service_cv", 0, 0.25, "0.027 was derived"),
)
QUICK_PARAMETERS = ("firmware engines", "SAVE rate, MiB/s", "driver's lock")


@dataclass(frozen=True, slots=True)
class Conclusion:
    """v3 against another protocol, on a base."""

    mark: str
    base: str
    against: str

    @property
    def text(self) -> str:
        """`v3-n4 against v2, mlx5-2vf`."""
        return f"{V3} against {self.against}, {self.base}"


CONCLUSIONS = (
    Conclusion("a", IDLE, "v2"),
    Conclusion("b", IDLE, "v2-multifd"),
    Conclusion("a", NIC, "v2"),
    Conclusion("c", NIC, ACKED),
)


@dataclass(frozen=True, slots=True)
class Map:
    """Two parameters that are moved at once, on a base: the engines, and another one."""

    base: str
    column: str
    """The other parameter's column in the table."""
    label: str
    keys: tuple[str, ...]
    values: tuple[float, ...]
    protocols: tuple[str, ...]


ENGINES = (1.0, 1.5, 2.5, 4.0)
ENGINES_COLUMN = "map_engines"
MAPS = (
    Map(
        IDLE,
        "map_state_mib",
        "state of each device, MiB",
        ("device.0.state_mib", "device.0.stop_only_mib"),
        (12.0, 25.0, 50.0, 100.0, 150.0),
        ("v2", "v2-multifd", V3),
    ),
    Map(
        NIC,
        "map_load_finish_ms",
        "end of the LOAD, ms",
        ("firmware.load_finish_ms",),
        (30.0, 122.0, 244.0, 488.0),
        (ACKED, V3),
    ),
)
QUICK_STEP = 2
"""Along each side of a map, in a quick run."""


def points(quick: bool) -> list[Point]:
    """The bases, each parameter at its two ends, the maps."""
    return [*_bases(), *_tornados(quick), *_maps(quick)]


def _against(base: str) -> list[str]:
    return [*(each.against for each in CONCLUSIONS if each.base == base), V3]


def _bases() -> Iterator[Point]:
    for base, settings in BASES.items():
        for protocol in [*_against(base), *(["v2-multifd", ACKED_MULTIFD] if base == NIC else [])]:
            yield Point(base, protocol, settings, _factors("base", "", "base", ""))


def _tornados(quick: bool) -> Iterator[Point]:
    for base, settings in BASES.items():
        scenario = load(base, settings)
        for parameter in PARAMETERS:
            if base not in parameter.bases or (quick and parameter.name not in QUICK_PARAMETERS):
                continue
            for side in ("low", "high"):
                at = parameter.at(scenario, side)
                moved = (*settings, f"{parameter.key}={at}", *([f"{parameter.also}={at}"] if parameter.also else []))
                factors = _factors("tornado", parameter.name, side, at)
                yield from (Point(base, protocol, moved, factors) for protocol in _against(base))


def _maps(quick: bool) -> Iterator[Point]:
    step = QUICK_STEP if quick else 1
    for each in MAPS:
        for engines in ENGINES[::step]:
            for value in each.values[::step]:
                moved = (f"firmware.engines={engines}", *(f"{key}={value}" for key in each.keys))
                factors = _factors("map", "", "", "") | {ENGINES_COLUMN: engines, each.column: value}
                settings = (*BASES[each.base], *moved)
                yield from (Point(each.base, protocol, settings, factors) for protocol in each.protocols)


def _factors(part: str, parameter: str, side: str, at: str) -> dict[str, Factor]:
    return {"part": part, "parameter": parameter, "side": side, "at": at}
