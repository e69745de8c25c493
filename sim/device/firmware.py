# SPDX-License-Identifier: GPL-2.0-or-later
"""A PF's firmware: command slots that run SAVE and LOAD for all of its VFs.

A command takes a fixed time and its bytes at the engine's rate, times a factor with mean 1: service times vary. The
factors are gamma-distributed (positive, with any coefficient of variation), drawn from the seed before the run.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from proto_v3.timeline import Resource, Timeline
from sim.clock.port import now_ns, sleep_ns
from sim.resource import CommandSlots, duration_ns
from sim.scenario.tables import Firmware

FACTORS = 4096
"""Drawn for a run; later commands use them again from the start."""


def service_factors(cv: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Factors with mean 1 and coefficient of variation `cv`; shape (FACTORS,)."""
    if cv == 0:
        return np.ones(FACTORS)
    return rng.gamma(1 / cv**2, cv**2, FACTORS)


class FirmwareModel:
    """One PF's firmware at one host. Its VFs run their commands by VfFirmware.

    A host is the source or the target of its guests here, so SAVEs and LOADs are not at work at the same time, and each
    kind has slots of its own.
    """

    def __init__(self, settings: Firmware, rng: np.random.Generator, timeline: Timeline) -> None:
        self.settings = settings
        self.saves = CommandSlots(settings.engines_for_saves, settings.engines_of_a_vf)
        self.loads = CommandSlots(settings.engines_for_loads, settings.engines_of_a_vf)
        self.state_commands: AbstractAsyncContextManager[None] = nullcontext()
        """Held over a command that changes the state of a VF."""
        if settings.state_commands == "serial":
            self.state_commands = asyncio.Lock()
        self._factors = service_factors(settings.service_cv, rng)
        self._commands = 0
        self._timeline = timeline

    async def run(self, slots: CommandSlots, resource: Resource, what: str, mean_ns: int, vf: int) -> None:
        """Run a command of a VF that takes `mean_ns` in the mean, at full speed."""
        factor = float(self._factors[self._commands % FACTORS])
        self._commands += 1
        start = now_ns()
        await slots.run(round(mean_ns * factor), vf)
        self._timeline.work(resource, what, start)


class VfFirmware:
    """A PF's firmware as one of its VFs uses it."""

    def __init__(self, pf: FirmwareModel, vf: int, load_finish_ns: int) -> None:
        """`vf` tells it from the others of the PF. `load_finish_ns`: of this VF."""
        self._pf = pf
        self._vf = vf
        self._load_finish_ns = load_finish_ns

    async def save(self, size_bytes: int) -> None:
        """Run a SAVE command; it takes longer while others of the PF run."""
        pf, settings = self._pf, self._pf.settings
        mean_ns = settings.save_command_ns + duration_ns(size_bytes, settings.save_bytes_per_s)
        await pf.run(pf.saves, Resource.FIRMWARE, "SAVE", mean_ns, self._vf)

    async def load(self, size_bytes: int) -> None:
        """Run a LOAD command."""
        pf, settings = self._pf, self._pf.settings
        mean_ns = settings.load_command_ns + duration_ns(size_bytes, settings.load_bytes_per_s)
        await pf.run(pf.loads, Resource.LOAD, "LOAD", mean_ns, self._vf)

    async def change_state(self, takes_ns: int) -> None:
        """Run the commands that suspend, quiesce or resume the device; it may have to wait for another VF's."""
        async with self._pf.state_commands:
            await sleep_ns(takes_ns)

    async def finish_load(self, takes_ns: int | None = None) -> None:
        """Run the command that ends the device's load, after its last record. `takes_ns`: if not as usual."""
        mean_ns = self._load_finish_ns if takes_ns is None else takes_ns
        await self._pf.run(self._pf.loads, Resource.LOAD, "LOAD finish", mean_ns, self._vf)
