# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether what is left may be sent with the guest stopped: the one rule of v2 and of v3.

`whole`: all that is left fits the downtime limit (QEMU). `parts`: each part that moves beside the others must fit by
itself, too, and the target must have loaded the first pass over each device. v2 asks for the first, v3 for the second,
unless the settings say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from proto_v3.vmm.first_pass import FirstPass
from proto_v3.vmm.switchover import Backlog, RamBacklog, StreamBacklog, Switchover, SwitchoverSettings


class DevicePart(Protocol):
    """What moves of a device beside the rest: all that v2 reads, a dirty stream of v3, or the readers of its blocks."""

    device: int
    sent_bytes: int  # total since the start
    first_pass: FirstPass

    @property
    def what(self) -> str:
        """In words; empty for all of the device."""

    @property
    def unread_bytes(self) -> int:
        """Left before the stop, as far as is known without asking."""


class StopRule:
    """The rule of one migration, kept up to date from what was sent so far."""

    def __init__(self, settings: SwitchoverSettings, now_ns: int, *, by_parts: bool) -> None:
        """`by_parts`: as the protocol does it; the settings may say otherwise."""
        self._settings = settings
        self.by_parts = by_parts if settings.by_parts is None else settings.by_parts
        self.whole = Switchover(settings, now_ns)
        self.ram = RamBacklog(settings, now_ns)
        self.parts: list[tuple[DevicePart, StreamBacklog]] = []

    def add(self, part: DevicePart, now_ns: int) -> None:
        """A device's part begins."""
        self.parts.append((part, StreamBacklog(self._settings, now_ns)))

    def sample(self, now_ns: int, bytes_sent: int, ram_bytes_sent: int, ram_bytes: int) -> None:
        """Record all bytes sent since the start, those of RAM among them, and what is left of RAM."""
        self.whole.sample(now_ns, bytes_sent)
        if self.by_parts:
            self.ram.sample(now_ns, ram_bytes_sent, ram_bytes)
            for part, backlog in self.parts:
                backlog.sample(now_ns, part.sent_bytes, part.unread_bytes)

    def fits(self, ram_bytes: int, device_bytes: int) -> bool:
        """Whether RAM and `device_bytes` fit the downtime limit together and, if that is asked for, each part by
        itself.

        The first pass over each device must then be loaded. A part first sends what it has saved, at its own rate. What
        the devices save after that must fit the rest of the limit, at the bandwidth of the whole.
        """
        if not (self.ram_fits(ram_bytes) and self.whole.fits(ram_bytes + device_bytes)):
            return False
        return not self.by_parts or (
            all(part.first_pass.loaded for part, _ in self.parts)
            and all(backlog.fits(part.unread_bytes) for part, backlog in self.parts)
            and self.whole.fits_after(self._unread_ns, max(0, device_bytes - self._unread_bytes))
        )

    def ram_fits(self, ram_bytes: int) -> bool:
        """Whether RAM alone would fit."""
        return self.whole.fits(ram_bytes) and (not self.by_parts or self.ram.fits(ram_bytes))

    @property
    def _unread_bytes(self) -> int:
        return sum(part.unread_bytes for part, _ in self.parts)

    @property
    def _unread_ns(self) -> float:
        """How long the slowest part takes for what it has to give."""
        return max((backlog.time_ns(part.unread_bytes) for part, backlog in self.parts), default=0.0)

    def held_up(self, names: Sequence[str], ram_bytes: int, device_bytes: int) -> list[str]:
        """What of the parts holds the stop up, in words. `names`: of the devices."""
        if not self.by_parts:
            return []
        lines = [
            f"the first pass of {_name(names, part)} was not loaded at the target"
            for part, _ in self.parts
            if not part.first_pass.loaded
        ][:1]
        parts: list[tuple[str, Backlog, int]] = [("RAM", self.ram, ram_bytes)]
        parts += [(_name(names, part), backlog, part.unread_bytes) for part, backlog in self.parts]
        if short := [each for each in parts if not each[1].fits(each[2])]:
            what, backlog, unread_bytes = max(short, key=lambda each: each[1].time_ns(each[2]))
            others = f" (and {len(short) - 1} more do not fit by themselves)" if len(short) > 1 else ""
            lines.append(f"{what} has {backlog.falls_short(unread_bytes)}{others}")
        elif self.whole.fits(ram_bytes + device_bytes):
            lines += self.whole.falls_short(self._unread_ns, max(0, device_bytes - self._unread_bytes))
        return lines


def _name(names: Sequence[str], part: DevicePart) -> str:
    return f"{names[part.device]} {part.what}".rstrip()
