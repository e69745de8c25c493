# SPDX-License-Identifier: GPL-2.0-or-later
"""A PF's firmware: command slots that run SAVE and LOAD for all of its VFs.

A command takes a fixed time and its bytes at the engine's rate, times a factor with mean 1: service times vary. The
factors are gamma-distributed (positive, with any coefficient of variation), drawn from the seed before the run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proto_v3.timeline import Resource, Timeline
from sim.clock.port import now_ns
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
    """One PF's firmware at one host."""

    def __init__(self, settings: Firmware, rng: np.random.Generator, timeline: Timeline) -> None:
        self._settings = settings
        self._slots = CommandSlots(settings.engines)
        self._factors = service_factors(settings.service_cv, rng)
        self._commands = 0
        self._timeline = timeline

    async def save(self, size_bytes: int) -> None:
        """Run a SAVE command; it takes longer while others of the PF run."""
        settings = self._settings
        await self._run(Resource.FIRMWARE, "SAVE", settings.save_command_ns, size_bytes, settings.save_bytes_per_s)

    async def load(self, size_bytes: int) -> None:
        """Run a LOAD command."""
        settings = self._settings
        await self._run(Resource.LOAD, "LOAD", settings.load_command_ns, size_bytes, settings.load_bytes_per_s)

    async def finish_load(self) -> None:
        """Run the command that ends a device's load, after its last record."""
        await self._run(Resource.LOAD, "LOAD finish", self._settings.load_finish_ns, 0, 1)

    async def _run(self, resource: Resource, what: str, fixed_ns: int, size_bytes: int, bytes_per_s: float) -> None:
        factor = float(self._factors[self._commands % FACTORS])
        self._commands += 1
        start = now_ns()
        await self._slots.run(round((fixed_ns + duration_ns(size_bytes, bytes_per_s)) * factor))
        self._timeline.work(resource, what, start)
