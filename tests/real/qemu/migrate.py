# SPDX-License-Identifier: GPL-2.0-or-later
"""One migration between two QEMUs in the guest kernel, and what was seen of it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.real import mdev
from tests.real.qemu import trace
from tests.real.qemu.calls import LoggedCall, merged, parse, without_idle_rounds
from tests.real.qemu.cases import Act, Case, End
from tests.real.qemu.qmp import GoneError, QemuError, Qmp

Devices = dict[str, mdev.SampleMdev]
"""By the names that the logs have for them: a0 and a1 of the source, b0 and b1 of the target."""
SIDES = ("source", "target")
ENDED = ("completed", "failed", "cancelled")


class Qemu(Protocol):
    """A QEMU: one of kernel.qemu_packages, or of kernel.qemu_build."""

    @property
    def version(self) -> str:
        """For example 10.0.13."""

    @property
    def command(self) -> list[str]:
        """What its command line begins with."""


LOG_LINES = 65536
"""More calls than a migration makes: while it waits for an ack, QEMU asks a device 3,000 times a second."""


@dataclass(frozen=True)
class Limits:
    """How long is waited for what."""

    monitor_s: float = 20.0
    boot_s: float = 1.0
    """For the guest's firmware, before the migration starts."""
    migration_s: float = 60.0
    settle_s: float = 10.0
    """For both ends, after the migration, until each runs or does not."""
    ram_mib: int = 64


@dataclass
class Record:
    """What was seen."""

    case: str
    source_qemu: str
    target_qemu: str
    kernel: str
    parameters: dict[str, str]
    """The driver's, as the devices have them."""
    status: str = ""
    error: str = ""
    source_status: str = "gone"
    """Of query-status at the end; `gone` if the process ended."""
    target_status: str = "gone"
    digests: dict[str, str] = field(default_factory=dict)
    """Of each device's state at the end."""
    query_migrate: dict[str, Any] = field(default_factory=dict)
    calls: list[LoggedCall] = field(default_factory=list)
    source_trace: list[str] = field(default_factory=list)
    target_trace: list[str] = field(default_factory=list)

    @property
    def source_runs(self) -> bool:
        """Whether the guest runs at the source at the end."""
        return self.source_status == "running"

    @property
    def target_runs(self) -> bool:
        """Whether the guest runs at the target at the end."""
        return self.target_status == "running"

    def write(self, folder: Path) -> None:
        """Write `record.json`, `calls.txt`, `source.trace` and `target.trace`."""
        folder.mkdir(parents=True, exist_ok=True)
        table = asdict(self)
        for name in ("calls", "source_trace", "target_trace"):
            del table[name]
        (folder / "record.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        (folder / "calls.txt").write_text("".join(f"{call}\n" for call in self.calls))
        for side in SIDES:
            (folder / f"{side}.trace").write_text("".join(getattr(self, f"{side}_trace")))

    @classmethod
    def load(cls, folder: Path) -> Record:
        """What write() wrote."""
        record = cls(**json.loads((folder / "record.json").read_text()))
        record.calls = parse((folder / "calls.txt").read_text().splitlines())
        for side in SIDES:
            setattr(record, f"{side}_trace", (folder / f"{side}.trace").read_text().splitlines(True))
        return record


class QemuProcess:
    """One QEMU, with the devices of its side."""

    def __init__(
        self,
        side: str,
        qemu: Qemu,
        case: Case,
        devices: Devices,
        folder: Path,
        limits: Limits,
        patterns: Sequence[str] = trace.PATTERNS,
    ):
        self.side = side
        self.folder = folder
        self.log = folder / f"{side}.log"
        self._errors = folder / f"{side}.err"
        self._limits = limits
        monitor = folder / f"{side}.qmp"
        self.arguments = self._arguments(case, devices, monitor, folder, patterns)
        command = [*qemu.command, *self.arguments]
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        self._monitor = monitor
        self.qmp: Qmp | None = None

    def _arguments(
        self, case: Case, devices: Devices, monitor: Path, folder: Path, patterns: Sequence[str]
    ) -> list[str]:
        ram, machine = f"{self._limits.ram_mib}M", f"{case.machine},accel=tcg"
        command = ["-name", self.side, "-m", ram, "-nodefaults", "-display", "none"]
        command += ["-msg", "timestamp=on", "-D", str(self.log), "-qmp", f"unix:{monitor},server=on,wait=off"]
        for pattern in patterns:
            command += ["-trace", pattern]
        if case.random_ram and self.side == "source":
            file = folder / "ram"
            file.write_bytes(os.urandom(self._limits.ram_mib << 20))
            command += ["-object", f"memory-backend-file,id=ram,size={ram},mem-path={file},share=off"]
            machine += ",memory-backend=ram"
        elif case.random_ram:
            command += ["-object", f"memory-backend-ram,id=ram,size={ram}"]
            machine += ",memory-backend=ram"
        command += ["-machine", machine, "-object", "iommufd,id=iommufd0"]
        for name, device in devices.items():
            options = f"vfio-pci,id={name},sysfsdev={device.sysfs},iommufd=iommufd0,enable-migration=on,rombar=0"
            command += ["-device", f"{options},{case.options}" if case.options else options]
        return [*command, "-incoming", "defer"] if self.side == "target" else command

    def connect(self) -> Qmp:
        """The monitor, connected the first time."""
        if self.qmp is None:
            self.qmp = Qmp(self._monitor, lambda: self.process.poll() is None, self._limits.monitor_s)
        return self.qmp

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors.read_text(errors="replace").strip()

    def status(self) -> str:
        """Of query-status, or `gone`."""
        if self.process.poll() is not None or self.qmp is None:
            return "gone"
        try:
            return str(self.qmp("query-status")["status"])
        except GoneError:
            return "gone"

    def end(self) -> None:
        """Quit, or kill it."""
        if self.qmp is not None:
            with contextlib.suppress(QemuError):
                self.qmp("quit")
        try:
            self.process.wait(self._limits.settle_s if self.qmp is not None else 0.1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def migrate(
    case: Case,
    source: Qemu,
    target: Qemu,
    folder: Path,
    limits: Limits,
    patterns: Sequence[str] = trace.PATTERNS,
) -> Record:
    """Run the case and return what was seen. Raises QemuError.

    `folder`: for sockets, and for what was seen in QEMU's own words: `source.log`, `target.log` (of the events that
    `patterns` name, not thinned), `source.jsonl`, `target.jsonl` (QMP's events), `cmdline.txt` (of the source). The
    devices have their short names there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    devices = {
        f"{side}{index}": mdev.create_sample(log_lines=LOG_LINES, **case.driver_of(side))
        for side in "ab"
        for index in range(case.devices)
    }
    processes: list[QemuProcess] = []
    record = Record(
        case.name,
        source.version,
        target.version,
        platform.release(),
        {**mdev.sample_parameters(), **{key: str(value) for key, value in case.driver.items()}},
    )
    try:
        halves = [{name: each for name, each in devices.items() if name[0] == side} for side in "ab"]
        for side, qemu, half in zip(SIDES, (source, target), halves, strict=True):
            processes.append(QemuProcess(side, qemu, case, half, folder, limits, patterns))
        try:
            _run(case, processes[0], processes[1], limits, record)
        except GoneError:
            if End.REFUSED not in case.ends:
                raise
            record.status = End.REFUSED
        record.error = "\n".join(
            filter(None, [str(record.query_migrate.get("error-desc", "")), *(process.errors for process in processes)])
        )
        record.source_status, record.target_status = (process.status() for process in processes)
        record.digests = {name: device.digest() for name, device in devices.items()}
        record.calls = calls_of(devices)
    except QemuError as error:
        said = "; ".join(process.errors for process in processes if process.errors)
        raise type(error)(f"{case.name}: {error}" + (f" ({said})" if said else "")) from error
    finally:
        for process in processes:
            process.end()
        for device in devices.values():
            device.remove()
    for process, kept in zip(processes, (record.source_trace, record.target_trace), strict=True):
        text = process.log.read_text(errors="replace") if process.log.exists() else ""
        text = with_names(text, devices)
        process.log.write_text(text)
        kept += trace.thinned(text.splitlines(True))
        events = process.qmp.events if process.qmp else []
        lines = "".join(f"{json.dumps(event)}\n" for event in events)
        (folder / f"{process.side}.jsonl").write_text(with_names(lines, devices))
    arguments = shlex.join(["qemu-system-x86_64", *processes[0].arguments]).replace(f"{folder}/", "")
    (folder / "cmdline.txt").write_text(f"{with_names(arguments, devices)}\n")
    return record


def with_names(text: str, devices: Devices) -> str:
    """The text with the devices' short names for their UUIDs."""
    for name, device in devices.items():
        text = text.replace(device.uuid, name)
    return text


def calls_of(devices: Devices) -> list[LoggedCall]:
    """The calls of all devices, as far as they are not repeated for nothing."""
    return without_idle_rounds(merged(parse(device.log(), name) for name, device in devices.items()))


def free_port() -> int:
    """A port of TCP that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _run(case: Case, source: QemuProcess, target: QemuProcess, limits: Limits, record: Record) -> None:
    ends = [target.connect(), source.connect()]
    for qmp in ends:
        states = [{"capability": name, "state": True} for name in (*case.capabilities, "events")]
        qmp("migrate-set-capabilities", capabilities=states)
        if case.parameters:
            qmp("migrate-set-parameters", **case.parameters)
    time.sleep(limits.boot_s)
    uri = f"unix:{source.folder}/migration" if case.unix_socket else f"tcp:127.0.0.1:{free_port()}"
    ends[0]("migrate-incoming", uri=uri)
    ends[1]("migrate", uri=uri)
    acted, later = case.act is Act.KILL_STOP, case.later
    if acted:  # by a thread, for QEMU answers nothing while it stops its devices
        threading.Thread(target=_kill_at_switchover, args=(source, target), daemon=True).start()
    until = time.monotonic() + limits.migration_s
    while record.status not in ENDED:
        if time.monotonic() > until:
            raise QemuError(f"the migration did not end in {limits.migration_s:g} s: {record.query_migrate}")
        record.query_migrate = ends[1]("query-migrate")
        record.status = str(record.query_migrate.get("status", ""))
        if later and resuming(target) == case.devices:
            ends[1]("migrate-set-parameters", **later)
            later = {}
        if case.act is not None and not acted:
            acted = _act(case.act, record.status, ends[1], target)
        time.sleep(0.01)
    until = time.monotonic() + limits.settle_s
    wanted = ("running" if case.source_runs else None, "running" if case.target_runs else None)
    while time.monotonic() < until:
        seen = source.status(), target.status()
        if all(want in (None, status) for want, status in zip(wanted, seen, strict=True)):
            break
        time.sleep(0.05)
    time.sleep(0.2)  # what an end does behind its last change of status: close() of the data fds


def _act(act: Act, status: str, source: Qmp, target: QemuProcess) -> bool:
    """Do it if it is time; returns whether it was done."""
    if act in (Act.CANCEL_PRECOPY, Act.KILL_PRECOPY):
        ram = source("query-migrate").get("vfio", {}) if status == "active" else {}
        due = bool(ram.get("transferred"))
    else:
        due = status == "device" and _loaded(target)
    if due:
        if act in (Act.CANCEL_PRECOPY, Act.CANCEL_DEVICE):
            source("migrate_cancel")
        else:
            target.process.kill()
    return due


def _kill_at_switchover(source: QemuProcess, target: QemuProcess) -> None:
    while "savevm_send_switchover_start" not in source.log.read_text(errors="replace"):
        if source.process.poll() is not None:
            return
        time.sleep(0.005)
    target.process.kill()


def resuming(target: QemuProcess) -> int:
    """How many of the target's devices are in RESUMING."""
    return target.log.read_text(errors="replace").count("state RESUMING\n")


def _loaded(target: QemuProcess) -> bool:
    """Whether the target has all bytes, and is about to run its devices."""
    return "dst-precopy-loadvm-completed" in target.log.read_text(errors="replace")
