# SPDX-License-Identifier: GPL-2.0-or-later
"""What benchmarks/real_read.py runs in the guest: it makes devices, and lets read_streams stop and read them.

    python benchmarks/real_read_guest.py JOB.json READER

JOB.json has `rounds`, and `settings`: for each the driver's `parameters`, the number of `devices`, whether all is
saved before the first read() (`saved_before`), and `reads`: how they are read, a list of {streams, read_bytes, case}.
Each line of the output is a JSON object: {"row": ...} for a measured case, {"progress": ...}.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proto_v3.vfio.device import NO_STREAM_FLAGS
from proto_v3.vfio.uapi import Feature, FeatureMigState, FeatureMigStreams, State
from sim.real.ioctl import set_feature
from sim.real.sysfs import find
from sim.real.vfio import OpenDevices
from tests.real.mdev import SampleMdev, create_sample

OF_A_READER = ("errno", "bytes", "reads", "end_ns", "voluntary", "involuntary", "user_ns", "system_ns")
"""The columns of what read_streams prints, a line a thread."""
COUNTED = ("commands", "command_ns", "copy_ns", "lock_wait_ns")
"""Of the driver's counters, which are kept."""
LOCK_STAT = Path("/proc/lock_stat")
"""With CONFIG_LOCK_STAT: what waits for each class of locks took (Linux, Documentation/locking/lockstat.rst)."""
LOCKS = re.compile(r"\s*(?:&stream->own_lock|&dev->device_lock|sample_global_lock)\S*:\s+(?P<numbers>[\d. ]+)")
"""The line of one of the driver's locks that read() takes: kernel/driver/session.c."""
QUIET_S = 0.05
"""How long no command may have been run, for all to be saved."""


def main(job_file: str, reader: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    tell(kernel=kernel())
    for number in range(job["rounds"]):
        for at, setting in enumerate(job["settings"]):
            with devices(setting["parameters"], setting["devices"]) as made:
                for how in setting["reads"]:
                    row = measure(made, how, reader, saved_before=setting["saved_before"])
                    tell(row={**how["case"], "round": number, **row})
            tell(progress=(number * len(job["settings"]) + at + 1) / (job["rounds"] * len(job["settings"])))
    return 0


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def kernel() -> dict[str, Any]:
    """What the manifest says of this kernel."""
    return {"release": platform.release(), "machine": platform.machine(), "cpus": os.cpu_count(), "kernel": version()}


def version() -> str:
    return Path("/proc/version").read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def devices(parameters: Mapping[str, int | str], count: int) -> Iterator[list[tuple[SampleMdev, int]]]:
    """Devices of the sample driver, each with its device fd."""
    made: list[SampleMdev] = []
    try:
        for _ in range(count):
            made.append(create_sample(**parameters))
        with OpenDevices([find(each.uuid) for each in made]) as opened:
            yield [(mdev, device.fd) for mdev, device in zip(made, opened.devices, strict=True)]
    finally:
        for each in made:
            each.remove()


def measure(
    made: Sequence[tuple[SampleMdev, int]], how: Mapping[str, Any], reader: str, *, saved_before: bool
) -> dict[str, int | None]:
    """Stop the devices, read all their data fds at once, and let them run again. What was counted, summed up."""
    for mdev, device in made:
        (mdev.debugfs / "counters").write_text("0")
        (mdev.debugfs / "commands_at_once").write_text("0")
        set_feature(device, Feature.MIG_STREAMS, FeatureMigStreams(how["streams"], NO_STREAM_FLAGS))
    if LOCK_STAT.exists():
        LOCK_STAT.write_text("0")
    begin_ns, readers = stopped_and_read(made, how, reader, saved_before=saved_before)
    lock_stat_ns = waited_ns(LOCK_STAT.read_text()) if LOCK_STAT.exists() else None
    counters = [each for mdev, _ in made for each in parsed(mdev.counters())]
    for _, device in made:
        set_feature(device, Feature.MIG_DEVICE_STATE, FeatureMigState(State.RUNNING))
    return {
        "elapsed_ns": max(each["end_ns"] for each in readers) - begin_ns,
        "bytes": sum(each["bytes"] for each in readers),
        "reads": sum(each["reads"] for each in readers),
        "voluntary_switches": sum(each["voluntary"] for each in readers),
        "involuntary_switches": sum(each["involuntary"] for each in readers),
        "cpu_ns": sum(each["user_ns"] + each["system_ns"] for each in readers),
        **{name: sum(each[name] for each in counters) for name in COUNTED},
        "lock_stat_ns": lock_stat_ns,
        "commands_at_once": sum(int((mdev.debugfs / "commands_at_once").read_text()) for mdev, _ in made),
    }


def stopped_and_read(
    made: Sequence[tuple[SampleMdev, int]], how: Mapping[str, Any], reader: str, *, saved_before: bool
) -> tuple[int, list[dict[str, int]]]:
    """Run read_streams; when it began, ns, and what each of its threads counted."""
    fds = [device for _, device in made]
    command = [reader, str(how["read_bytes"]), str(how["streams"]), str(int(saved_before)), *map(str, fds)]
    with subprocess.Popen(command, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if saved_before:
            process.stdout.readline()  # "stopped"
            wait_until_saved([mdev for mdev, _ in made])
            process.stdin.write("read\n")
            process.stdin.flush()
        begin, *lines = process.stdout.read().splitlines()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    readers = [dict(zip(OF_A_READER, map(int, line.split()), strict=True)) for line in lines]
    for each in readers:
        if each["errno"]:
            raise OSError(each["errno"], f"read(): {os.strerror(each['errno'])}")
    return int(begin), readers


def wait_until_saved(made: Sequence[SampleMdev]) -> None:
    """Until the firmware has nothing to do any more: all is saved, or no chunk is free."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET_S:
        commands = sum(each["commands"] for mdev in made for each in parsed(mdev.counters()))
        if commands != seen:
            seen, since = commands, time.monotonic()
        time.sleep(QUIET_S / 10)


def waited_ns(lock_stat: str) -> int:
    """What all waits for the driver's locks took: the column waittime-total, the fifth, in microseconds."""
    found = (match["numbers"].split() for line in lock_stat.splitlines() if (match := LOCKS.match(line)))
    return round(sum(float(numbers[4]) for numbers in found) * 1000)


def parsed(counters: str) -> list[dict[str, int]]:
    """The driver's file of counters: a line for each fd."""
    return [
        {name: int(value) for name, value in (each.split("=") for each in line.split())}
        for line in counters.splitlines()
    ]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
