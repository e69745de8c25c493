# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor (QMP): a line of JSON each way."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class QemuError(Exception):
    """QEMU, or its monitor, does not do what it was asked for. One line says what."""


class HungError(QemuError):
    """QEMU's monitor does not answer."""


class GoneError(QemuError):
    """QEMU closed the monitor: it ended."""


class Qmp:
    """One connection. Events are kept in `events`."""

    def __init__(self, path: Path, lives: Callable[[], bool], wait_s: float) -> None:
        """Connect, within `wait_s` and as long as the process `lives`."""
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        until = time.monotonic() + wait_s
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError as error:
                if not lives():
                    raise GoneError("QEMU ended before its monitor was there") from error
                if time.monotonic() > until:
                    raise QemuError(f"QEMU's monitor was not there after {wait_s:g} s") from error
                time.sleep(0.05)
        self._socket.settimeout(wait_s)
        self._file = self._socket.makefile("r", encoding="utf-8")
        self._line()
        self("qmp_capabilities")

    def _line(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except TimeoutError as error:
            raise HungError("QEMU's monitor does not answer") from error
        except OSError as error:
            raise GoneError("QEMU ended") from error
        if not line:
            raise GoneError("QEMU ended")
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise QemuError(f"QEMU's monitor said {line!r}") from error
        return message

    def __call__(self, command: str, **arguments: Any) -> Any:
        """What the command returned. Raises QemuError with QEMU's words if it failed, GoneError if QEMU ended."""
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise GoneError("QEMU ended") from error
        while True:
            message = self._line()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QemuError(f"{command}: {message['error']['desc']}")
            else:
                return message.get("return")
