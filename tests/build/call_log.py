# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls that the project's VMMs make on simulated devices, in the form of the sample driver's log."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

from typing_extensions import override

from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import PrecopyInfo, State
from proto_v3.vmm.migration import OutcomeKind, Side
from proto_v3.wire.channel import Channel
from sim.clock import virtual
from sim.clock.port import now_ns
from sim.outcome import Outcome
from sim.run import VirtualRun
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.real.qemu.calls import LoggedCall

NAMES = {
    "set_state": "set_state",
    "reset": "reset",
    "stop_copy_bytes": "mig_data_size",
    "set_precopy_info_v2": "info_v2",
    "read": "read",
    "write": "write",
    "precopy_info": "precopy_info",
    "close": "release",
}
"""The driver's name of each call of the port that it logs."""


class CallLog:
    """The calls of all devices, in the order in which they returned."""

    def __init__(self) -> None:
        self.calls: list[LoggedCall] = []

    def add(self, device: str, name: str, args: str = "", result: int = 0) -> None:
        """Note a call that returned."""
        self.calls.append(LoggedCall(device, name, args, result, now_ns(), 0, len(self.calls)))


class _Logged:
    """A device, or a data fd of it, whose calls are noted."""

    def __init__(self, log: CallLog, name: str, inner: Any) -> None:
        self._log, self._name, self._inner = log, name, inner
        self._state = State.RUNNING

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return functools.partial(self._call, name, value) if name in NAMES else value

    async def _call(self, name: str, method: Any, *arguments: Any) -> Any:
        try:
            result = await method(*arguments)
        except OSError as error:
            self._note(name, arguments, None, -(error.errno or 0))
            raise
        self._note(name, arguments, result, 0)
        return _Logged(self._log, self._name, result) if name == "set_state" and result is not None else result

    def _note(self, name: str, arguments: tuple[Any, ...], answer: Any, code: int) -> None:
        args, result = "", code
        match name:
            case "set_state":
                args = f"{self._state.name}->{arguments[0].name} fd={int(answer is not None)}"
                self._state = arguments[0] if not code else self._state
            case "stop_copy_bytes":
                args = f"stop_copy_length={answer or 0}"
            case "precopy_info" if isinstance(answer, PrecopyInfo):
                args = f"initial={answer.initial_bytes} dirty={answer.dirty_bytes} flags={int(answer.reinit)}"
            case "read":
                args = f"fd=0 size={arguments[0]}"
                result = code or len(answer)
            case "write" if not code:
                for size in pieces(len(arguments[0]), arguments[1]):
                    self._log.add(self._name, "write", f"fd=0 size={size}", size)
                return
        self._log.add(self._name, NAMES[name], args, result)


def pieces(size: int, most: int) -> list[int]:
    """The sizes of the write() calls that write `size` bytes."""
    return [min(most, size - at) for at in range(0, size, most)]


def logged(log: CallLog, side: str, devices: Sequence[MigrationDevice]) -> list[MigrationDevice]:
    """The same devices, with their calls noted: as a0, a1 of side a."""
    return [cast(MigrationDevice, _Logged(log, f"{side}{index}", device)) for index, device in enumerate(devices)]


class LoggedRun(VirtualRun):
    """A run in virtual time whose devices' calls are noted."""

    def __init__(self, scenario: Scenario, protocol: str, seed: int = 1) -> None:
        super().__init__(Protocol.parse(protocol, scenario).applied(scenario), seed)
        self.log = CallLog()

    def run(self) -> Outcome:
        """To its end."""
        return virtual.run(self.outcome())

    @override
    async def _run_source(self, side: Side, channels: Sequence[Channel]) -> OutcomeKind:
        return await super()._run_source(
            dataclasses.replace(side, devices=logged(self.log, "a", side.devices)), channels
        )

    @override
    async def _run_target(self, side: Side, channels: Sequence[Channel]) -> bool:
        return await super()._run_target(
            dataclasses.replace(side, devices=logged(self.log, "b", side.devices)), channels
        )
