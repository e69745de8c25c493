# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU was told: its arguments, or the JSON of query-migrate-parameters, -capabilities and query-migrate.

Only the numbers that a scenario has are taken; nothing else of them is kept.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proto_v3.errors import UserError

SIZES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MOST_BYTES = 1 << 20
PATH = re.compile(r"[^\s{\[-]\S*")
"""What may be the name of a file."""
LEAST_RAM_BYTES = 1 << 20
"""No guest has less."""
ON = ("on", "true", "yes", True)


@dataclass(slots=True)
class QemuSettings:
    """What is known; None: it was not said."""

    ram_bytes: int | None = None
    machine: str | None = None
    """As `pc-q35-11.1`."""
    downtime_limit_ms: int | None = None
    max_bandwidth_bytes_per_s: int | None = None
    given_bandwidth_bytes_per_s: int | None = None
    multifd: bool | None = None
    channels: int | None = None
    multifd_transfer: bool | None = None
    """x-migration-multifd-transfer."""
    max_queued_bytes: int | None = None
    switchover_ack: bool | None = None
    normal_bytes: int | None = None
    """Of RAM, sent in full (query-migrate)."""
    vfio_bytes: int | None = None
    """Of all VFIO devices, transferred (query-migrate)."""
    precopy_tracking: bool = True
    """False: x-pre-copy-dirty-page-tracking=off."""

    @property
    def new_machine(self) -> bool:
        """Whether the machine type is one of QEMU 11.1 or newer, with which the ack is re-usable."""
        found = re.search(r"-(\d+)\.(\d+)$", self.machine or "")
        return found is not None and (int(found[1]), int(found[2])) >= (11, 1)


def read_settings(texts: Sequence[str]) -> QemuSettings:
    """Of each text: what QEMU was told, or the name of a file with it. UserError if there is nothing in one."""
    settings = QemuSettings()
    for text in texts:
        before, content = repr(settings), _content(text)
        found = list(_documents(content))
        if found:
            for document in found:
                _take_json(settings, document)
        else:
            _take_arguments(settings, _split(content))
        if repr(settings) == before:
            gone = (
                "there is no such file, and as text it" if PATH.fullmatch(text) and not os.path.exists(text) else "it"
            )
            raise UserError(
                f"--cmdline {' '.join(text[:60].split())}: {gone} has nothing that is known: must be QEMU's arguments "
                "(-m, -machine, -device vfio-pci,...), or what query-migrate-parameters, query-migrate-capabilities or "
                "query-migrate returned"
            )
    return settings


def _content(text: str) -> str:
    if len(text) > 4096 or not os.path.exists(text):
        return text
    try:
        with Path(text).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"--cmdline {text}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_BYTES or (b"\0" in content and not content.endswith(b"\0")):
        raise UserError(f"--cmdline {text}: is no command line, and no JSON")
    return content.replace(b"\0", b"\n").decode("utf-8", errors="replace")  # /proc/PID/cmdline


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError:  # a quotation mark without its other one
        return text.split()


def _documents(text: str) -> Iterator[Any]:
    """JSON: one document, or one a line."""
    try:
        yield json.loads(text)
    except (ValueError, RecursionError):
        for line in text.splitlines():
            if line.startswith(("{", "[")):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    continue


def _take_json(settings: QemuSettings, document: Any) -> None:
    if isinstance(document, list):
        for each in document:
            if isinstance(each, Mapping) and "capability" in each:
                _take_capability(settings, str(each["capability"]), bool(each.get("state")))
            else:
                _take_json(settings, each)
    elif isinstance(document, Mapping):
        for key in ("return", "arguments", "query-migrate", "query_migrate", "parameters", "capabilities"):
            _take_json(settings, document.get(key))
        ram = document.get("ram")
        if isinstance(ram, Mapping) and type(ram.get("normal-bytes")) is int and ram["normal-bytes"] >= 0:
            settings.normal_bytes = ram["normal-bytes"]
        vfio = document.get("vfio")
        if isinstance(vfio, Mapping) and type(vfio.get("transferred")) is int:
            settings.vfio_bytes = vfio["transferred"]
        for key, value in document.items():
            if isinstance(value, str | int):
                _take_parameter(settings, str(key), str(value))


def _take_capability(settings: QemuSettings, name: str, on: bool) -> None:
    match name:
        case "multifd":
            settings.multifd = on
        case "switchover-ack":
            settings.switchover_ack = on


def _take_parameter(settings: QemuSettings, name: str, value: str) -> None:
    number = _size(value)
    if number is None or number < 0:
        return
    match name:
        case "downtime-limit":
            settings.downtime_limit_ms = number
        case "max-bandwidth" if number:
            settings.max_bandwidth_bytes_per_s = number
        case "avail-switchover-bandwidth" if number:
            settings.given_bandwidth_bytes_per_s = number
        case "multifd-channels" | "channels" if number:
            settings.channels = number


def _take_arguments(settings: QemuSettings, words: Sequence[str]) -> None:
    for option, value in zip(words, [*words[1:], ""], strict=False):
        match option.lstrip("-"):
            case "m":
                settings.ram_bytes = _ram(value) or settings.ram_bytes
            case "M" | "machine":
                name = _options(value).get("type") or value.partition(",")[0]
                settings.machine = name if re.fullmatch(r"[a-z0-9.-]+", name) else settings.machine
            case "device":
                _take_device(settings, _options(value))
            case "global":
                key, _, given = value.partition("=")
                if key.startswith("migration."):
                    name = key.removeprefix("migration.").removeprefix("x-")
                    _take_parameter(settings, name, given)
                    _take_capability(settings, name.removeprefix("capability-"), given in ON)


def _take_device(settings: QemuSettings, options: Mapping[str, Any]) -> None:
    if not {"vfio-pci", "vfio-pci-nohotplug"} & {str(options.get("driver")), *options}:
        return
    if "x-migration-multifd-transfer" in options:
        settings.multifd_transfer = options["x-migration-multifd-transfer"] in ON
    if (most := _size(str(options.get("x-migration-max-queued-buffers-size", "")))) is not None:
        settings.max_queued_bytes = most
    settings.precopy_tracking &= options.get("x-pre-copy-dirty-page-tracking") not in ("off", False)


def _options(value: str) -> dict[str, Any]:
    """`a,b=c` or the JSON of an option."""
    if value.startswith("{"):
        try:
            options = json.loads(value)
        except (ValueError, RecursionError):
            options = None
        return options if isinstance(options, dict) else {}
    return dict(part.partition("=")[::2] for part in value.split(","))


def _ram(value: str) -> int | None:
    """Of `-m`: MiB, if no unit is named."""
    text = _options(value).get("size") or value.partition(",")[0]
    size = _size(f"{text}M" if text.isdigit() else text)
    return size if size is not None and size >= LEAST_RAM_BYTES else None


def _size(text: str) -> int | None:
    found = re.fullmatch(r"(\d{1,18})([bkmgt]?)(?:i?b)?", text.lower())
    return int(found[1]) * SIZES[found[2]] if found else None
