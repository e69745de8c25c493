# SPDX-License-Identifier: GPL-2.0-or-later
"""Leave a device as it was found: RUNNING. Each call may block."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence

from proto_v3.errors import UserError
from proto_v3.vfio.uapi import VFIO_DEVICE_RESET, Feature, FeatureMigState, State
from sim.real.ioctl import get_feature, set_feature
from sim.real.sysfs import DeviceEntry
from sim.real.vfio import OpenDevice, OpenDevices

BY_RESET = (State.ERROR, State.RESUMING)
"""States of which only a reset leads to RUNNING without data that is not whole (vfio.h)."""


def put_back(opened: OpenDevice, was: str) -> list[str]:
    """Bring a device to RUNNING: by SET_STATE, or by a reset from where only that leads there. Returns what is not to
    be expected of that, in words. `was`: such as "was left in"."""
    name = opened.entry.name
    try:
        state = _state(opened)
        if state is State.RUNNING:
            return []
        if state not in BY_RESET:
            with contextlib.suppress(OSError):
                _to_running(opened)
                return [f"{name} {was} {state.name}, and was brought to RUNNING"] if was == "was found in" else []
        fcntl.ioctl(opened.fd, VFIO_DEVICE_RESET)
    except OSError as error:
        return [f"{name}: could not be brought back to RUNNING: {error.strerror}"]
    if state is State.RESUMING:
        return [f"{name} {was} RESUMING, of which only a reset leads to RUNNING: it was reset"]
    return [f"{name} {was} {state.name}, and was reset"]


def _state(opened: OpenDevice) -> State:
    return State(get_feature(opened.fd, Feature.MIG_DEVICE_STATE, FeatureMigState).device_state)


def _to_running(opened: OpenDevice) -> None:
    data = set_feature(opened.fd, Feature.MIG_DEVICE_STATE, FeatureMigState(State.RUNNING))
    number = FeatureMigState.unpack(data).data_fd
    if number >= 0:
        os.close(number)


def put_back_after(entries: Sequence[DeviceEntry], way: str | None) -> list[str]:
    """The same for devices that a process had open which is dead: not every driver resets a device when it is closed
    (mtty, Linux 7.3). Returns what was done, in words."""
    try:
        with OpenDevices(entries, way) as devices:
            return [text for opened in devices.devices for text in put_back(opened, "was found in")]
    except (UserError, OSError) as error:
        return [f"the devices could not be opened again to see what they are left in: {error}"]
