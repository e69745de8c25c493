# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of the sample driver, made and removed by sysfs (kernel/driver/README.md)."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from proto_v3.errors import UserError
from sim.real.sample import DRIVER
from sim.real.sample_parameters import Parameters
from sim.real.sysfs import DeviceEntry, find

PARAMETERS = Path("sys/module") / DRIVER / "parameters"
CREATE = Path("sys/class/mdev_bus") / DRIVER / "mdev_supported_types" / f"{DRIVER}-1" / "create"
DEVICES = Path("sys/bus/mdev/devices")
APPEARS_WITHIN_S = 5.0
"""The kernel makes a device's file in /dev in a thread of its own. Ours."""


def check(root: Path = Path("/")) -> None:
    """UserError if no device can be made here."""
    create = root / CREATE
    if not create.exists():
        raise UserError(f"{DRIVER}: this kernel has no such driver; `make kernel` builds one that has (docs/real.md)")
    if not os.access(create, os.W_OK):
        raise UserError(f"{create}: this user may not write to it, and so make no device; be root")


@contextlib.contextmanager
def made(parameters: Parameters, count: int, root: Path = Path("/")) -> Iterator[list[DeviceEntry]]:
    """So many devices with these parameters; they are removed at the end. UserError as `check`."""
    check(root)
    names = [str(uuid.uuid4()) for _ in range(count)]
    with contextlib.ExitStack() as stack:
        with _set(parameters, root):
            for name in names:
                (root / CREATE).write_text(name, encoding="ascii")
                stack.callback(_remove, root / DEVICES / name)
        yield [_appeared(name, root) for name in names]


@contextlib.contextmanager
def _set(parameters: Parameters, root: Path) -> Iterator[None]:
    """The module's parameters are these: a device takes them when it is made. At the end they are as before."""
    folder = root / PARAMETERS
    before = {name: (folder / name).read_text(encoding="ascii") for name in parameters}
    try:
        for name, value in parameters.items():
            (folder / name).write_text(f"{value}\n", encoding="ascii")
        yield
    finally:
        for name, text in before.items():
            (folder / name).write_text(text, encoding="ascii")


def _appeared(name: str, root: Path) -> DeviceEntry:
    end = time.monotonic() + APPEARS_WITHIN_S
    while True:
        entry = find(name, root)
        if entry.cdev is not None or entry.group is not None or time.monotonic() > end:
            return entry
        time.sleep(0.001)


def _remove(device: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (device / "remove").write_text("1", encoding="ascii")
