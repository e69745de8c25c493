"""The least time of each step of a migration, in ns, from the scenario's figures."""

from __future__ import annotations

from sim.scenario.device import Device
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_S
from sim.theory.work import Part, Route

ROUNDED_NS = 2
"""Subtracted from each command and each read: the clock rounds their times to the nanosecond, perhaps down."""


class Costs:
    """The time of each step for a scenario and a route. All methods return ns."""

    def __init__(self, scenario: Scenario, route: Route) -> None:
        self._scenario = scenario
        self._route = route
        self._write_bytes = scenario.switchover_settings().write_bytes
        self._call_ns = scenario.driver.call_ns
        self.latency_ns = scenario.link.latency_ns
        """Half a round trip."""
        self.finish_ns = scenario.firmware.load_finish_ns
        """The command that ends a device's load."""

    # --- data ---------------------------------------------------------------------------------------------------------

    def save_ns(self, part: Part) -> float:
        """SAVE commands, one after the other."""
        firmware = self._scenario.firmware
        return _commands_ns(part, firmware.save_command_ns, firmware.save_bytes_per_s)

    def load_ns(self, part: Part) -> float:
        """LOAD commands, one after the other."""
        firmware = self._scenario.firmware
        return _commands_ns(part, firmware.load_command_ns, firmware.load_bytes_per_s)

    def moved_ns(self, part: Part, bytes_per_s: float, call_ns: int = 0) -> float:
        """The bytes at a rate, read by read, with `call_ns` for each read."""
        rounded_ns = (part.reads + part.commands) * ROUNDED_NS
        return max(0.0, part.reads * call_ns + part.size_bytes * NS_PER_S / bytes_per_s - rounded_ns)

    def read_ns(self, part: Part) -> float:
        """read() on one thread; with the single channel also the copy through its buffers."""
        copy_ns = self.moved_ns(part, self._scenario.host.copy_bytes_per_s, self._call_ns)
        return copy_ns + self._buffer_ns(part)

    def write_ns(self, part: Part) -> float:
        """write() on one thread, without the LOAD in it; with the single channel also the copy through its buffers."""
        calls = -(-part.size_bytes // self._write_bytes) if self._route.single else part.reads
        copy_ns = self.moved_ns(part, self._scenario.host.copy_bytes_per_s)
        return calls * self._call_ns + copy_ns + self._buffer_ns(part)

    def _buffer_ns(self, part: Part) -> float:
        rate = self._scenario.vmm.device_buffer_bytes_per_s
        return self.moved_ns(part, rate) if self._route.single and rate is not None else 0.0

    # --- what follows, to the end of the downtime ---------------------------------------------------------------------

    def resume_ns(self) -> int:
        """After the last config: devices and vCPUs start. v3 asks the source first, which takes a round trip."""
        resume_ns = sum(device.resume_ns for device in self._scenario.devices)
        return resume_ns + self._scenario.vmm.vcpu_start_ns + (2 * self.latency_ns if self._route.v3 else 0)

    def after_load_ns(self, device: Device) -> int:
        """After the end of a device's load. With the single channel all configs follow, else perhaps only its own."""
        vmm = self._scenario.vmm
        if self._route.single:
            configs_ns = vmm.other_load_ns + sum(each.config_load_ns for each in self._scenario.devices)
        else:
            configs_ns = device.config_load_ns
        return configs_ns + self.resume_ns()

    def after_read_ns(self, device: Device) -> float:
        """After a device's last byte is read: its way, its LOAD, the end of the load, and after_load_ns()."""
        return self.latency_ns + self.last_load_ns(device) + self.finish_ns + self.after_load_ns(device)

    def last_load_ns(self, device: Device) -> float:
        """LOAD of the last record, which has at least one block."""
        return self.load_ns(Part(device.block_bytes, 1))


def _commands_ns(part: Part, command_ns: int, bytes_per_s: float) -> float:
    return max(0.0, part.commands * (command_ns - ROUNDED_NS) + part.size_bytes * NS_PER_S / bytes_per_s)
