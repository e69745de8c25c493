# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's events, read line by line from a log: trace events in both forms that they have had, or QMP events.

QEMU 10: `pid@seconds.microseconds:event arguments`. QEMU 11: an ISO 8601 time, a blank, the event. Both have times only
with -msg timestamp=on. QMP events are JSON, one a line, as QMP prints them; or the lines of `virsh qemu-monitor-event`,
also with --timestamp or --pretty.
Other lines, such as warnings, are left out; so is what a system's log puts in front of each line.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from proto_v3.errors import UserError

PREFIX = r"(?:.*[\s:])?"
"""What syslog, journald or a console server put in front of a line."""
OLD = re.compile(PREFIX + r"\d+@(?P<time>\d+\.\d{6}):(?P<name>[a-z]\w+)(?: (?P<args>.*))?")
NEW = re.compile(PREFIX + r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{6})?)Z (?P<name>[a-z]\w+)(?: (?P<args>.*))?")
"""A time without its fraction is of a whole second: g_date_time_format_iso8601() leaves out what is 0."""
VIRSH = re.compile(r"event (?P<name>[A-Z_]+) at (?P<s>\d+)\.(?P<us>\d{6}) for domain [^{]*(?P<data>\{.*\})?")
STAMPED = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\+0000): event (?P<name>[A-Z_]+) for domain [^{]*(?P<data>\{.*\})?"
)
"""With --timestamp: when virsh printed it, in milliseconds."""
PRETTY = re.compile(rb"(?:[-\d]+ [:.\d]+\+0000: )?event [A-Z_]+ .*\{\r?\n")
"""With --pretty: the data goes on in the next lines, until one is a bracket alone."""
MOST_PRETTY_LINES = 100
NO_TIME = re.compile(r"(?:vfio_|migrat|vmstate_|savevm_|qemu_savevm_|loadvm_|vm_state_notify)\w* ")
QMP = "QMP:"
"""Begins the name of an event that came by QMP."""
DEVICE = re.compile(r"\s*\(([^)]*)\)")
MOST_LINE_BYTES = 1 << 16
"""A longer line is no event."""
MOST_COARSE = 3
"""As many events may be at a whole second by chance. Ours."""
GZIP = b"\x1f\x8b"
OTHER_PACKERS = (b"\xfd7zXZ", b"(\xb5/\xfd", b"BZh")
"""How files of xz, zstd and bzip2 begin."""
SIMPLE_TRACE = bytes.fromhex("b429a40acb77b1f2")
"""How a file of QEMU's simple trace backend begins (scripts/simpletrace.py, header_magic, little-endian)."""


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One event."""

    time_us: int
    name: str
    args: str

    def value(self, key: str) -> int | None:
        """A number in the arguments: `exact=1` or `exact 1`. None if it is not there."""
        found = re.search(rf"\b{re.escape(key)}[= ](-?\d+)", self.args)
        return int(found[1]) if found else None

    @property
    def device(self) -> str:
        """The device's name, which stands first, in brackets; empty if there is none."""
        found = DEVICE.match(self.args)
        return found[1] if found else ""


def event_of(line: str) -> TraceEvent | None:
    """The event in a line; None if there is none."""
    line = line.rstrip().removeprefix("\ufeff")
    if found := OLD.fullmatch(line):
        seconds, _, micros = found["time"].partition(".")
        return TraceEvent(int(seconds) * 1_000_000 + int(micros), found["name"], (found["args"] or "").strip())
    if found := NEW.fullmatch(line):
        try:
            at = datetime.datetime.fromisoformat(found["time"]).replace(tzinfo=datetime.UTC)
        except ValueError:  # the 45th of some month
            return None
        return TraceEvent(
            int(at.timestamp()) * 1_000_000 + at.microsecond, found["name"], (found["args"] or "").strip()
        )
    if line.startswith("{"):
        return _of_qmp(line)
    if found := VIRSH.match(line):
        return _event(found["name"], int(found["s"]), int(found["us"]), _json(found["data"] or "{}"))
    if found := STAMPED.match(line):
        with contextlib.suppress(ValueError):  # the 45th of some month
            at = datetime.datetime.strptime(found["time"], "%Y-%m-%d %H:%M:%S.%f%z")
            return _event(found["name"], int(at.timestamp()), at.microsecond, _json(found["data"] or "{}"))
    return None


def parse(lines: Iterable[str]) -> list[TraceEvent]:
    """The events in these lines."""
    return [event for line in lines if (event := event_of(line)) is not None]


def named(events: Sequence[TraceEvent], *names: str) -> list[TraceEvent]:
    """The events of these names."""
    return [event for event in events if event.name in names]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_qmp(line: str) -> TraceEvent | None:
    match _json(line):
        case {"event": str(name), "timestamp": {"seconds": int(seconds), "microseconds": int(micros)}, **more}:
            return _event(name, seconds, micros, more.get("data"))
    return None


def _event(name: str, seconds: int, micros: int, data: Any) -> TraceEvent:
    """A QMP event: of what is in it, the device and a state or status stay."""
    told = data if isinstance(data, dict) else {}
    # A path of QOM names a device that has no id of its own.
    device = told.get("device-id") or str(told.get("qom-path", "")).rpartition("/")[2]
    words = [f"({device})" if name == "VFIO_MIGRATION" else ""]
    words += [str(told[key]) for key in ("device-state", "status", "reason") if key in told]
    return TraceEvent(seconds * 1_000_000 + micros, f"{QMP}{name}", " ".join(filter(None, words)))


class LogFile:
    """A log, read once from its beginning to its end; what it was like is known then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines = 0
        self.events = 0
        self._coarse = 0
        """Events at a whole second."""
        self.untimed = 0
        """Lines that look like events of QEMU, without a time."""
        self.cut = False
        """The last line has no end."""
        self.qmp = False
        """There are QMP events in it."""
        self.traced = False
        """There are trace events in it."""

    def read(self) -> Iterator[TraceEvent]:
        """The events, one by one. UserError if the file cannot be read, is no text, or has no event."""
        try:
            with Path("/dev/stdin" if self.name == "-" else self.name).open("rb") as file:
                packed = file.peek(1 << 12).startswith(GZIP)
                with gzip.open(file) if packed else contextlib.nullcontext(file) as lines:
                    self._check_text(lines.peek(1 << 12))
                    while line := lines.readline(MOST_LINE_BYTES):
                        if PRETTY.fullmatch(line):
                            line = b" ".join([line.strip(), *self._rest(lines)]) + b"\n"
                        if (event := self._taken(line)) is not None:
                            yield event
        except IsADirectoryError:
            raise UserError(f"{self.name}: is a folder; a log is a file") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.name}: is compressed, and damaged or cut: {error}") from error
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror}") from error
        if not self.events:
            raise UserError(f"{self.name}: {self._why_nothing()}; `proto-v3 fit --how` says what to log")
        if self.events == self._coarse > MOST_COARSE:
            raise UserError(f"{self.name}: its times are whole seconds; must have microseconds, as QEMU writes them")

    def _rest(self, lines: gzip.GzipFile | BufferedReader) -> Iterator[bytes]:
        """The lines of an event's data, as --pretty prints it, behind the first one."""
        for _ in range(MOST_PRETTY_LINES):
            line = lines.readline(MOST_LINE_BYTES)
            self.lines += bool(line)
            yield line.strip()
            if not line or line.startswith(b"}"):
                return

    def _taken(self, line: bytes) -> TraceEvent | None:
        """Count a line; returns its event."""
        self.lines += 1
        self.cut = not line.endswith(b"\n")
        event = event_of(line.decode("utf-8", errors="replace"))
        if event is None:
            self.untimed += bool(NO_TIME.match(line[:64].decode("ascii", errors="replace")))
            return None
        self.events += 1
        self._coarse += event.time_us % 1_000_000 == 0
        self.qmp |= event.name.startswith(QMP)
        self.traced |= not event.name.startswith(QMP)
        return event

    def _check_text(self, begin: bytes) -> None:
        if begin.startswith(SIMPLE_TRACE):
            raise UserError(
                f"{self.name}: is of QEMU's simple trace backend, which is binary; QEMU must log events "
                "as text (-trace with the log backend, -D FILE)"
            )
        if begin.startswith(OTHER_PACKERS):
            raise UserError(f"{self.name}: is compressed, and not by gzip; unpack it first")
        if b"\0" in begin:
            raise UserError(f"{self.name}: is no text, so no log of QEMU")

    def _why_nothing(self) -> str:
        if not self.lines:
            return "is empty"
        if self.untimed:
            return (
                f"has {self.untimed} lines that look like events of QEMU, but no times; start QEMU with "
                "-msg timestamp=on"
            )
        return f"has no event of QEMU in its {self.lines} lines"
