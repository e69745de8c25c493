# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls, as text: a case a line, in groups. `tests.conformance.run` says what the words mean and makes the calls.

A case is `set-up: calls`. The calls stand between semicolons; each has an answer. The set-up's calls stand between
commas, must succeed, and have none. Each case begins with a device that was just opened and is in RUNNING.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from proto_v3.vfio.uapi import State

ALL = 1 << 30
"""Bytes of a read(): more than a small device has."""
NUMBERS = [*range(21), 0xFFFF]
"""Indices of features: all that Linux 7.3 knows, and some that nobody knows."""
OPS = ["none", "GET", "SET", "GET|SET", "PROBE", "PROBE|GET", "PROBE|SET", "PROBE|GET|SET", "GET|1<<19", "PROBE|1<<31"]
ARGSZ = [0, 7, 8, 12, 15, 16, 64]
"""The header has 8 bytes, a state 16 with it, and the buffer 64."""
STATES = [state.name for state in State if state is not State.ERROR]
TARGETS = [*(state.name for state in State), "8", "0xffffffff"]
"""What SET_STATE can be asked for: the states, ERROR, and two numbers that are no state."""


def features() -> Iterator[str]:
    """VFIO_DEVICE_FEATURE: each index with each operation and argsz; the data is zeroes."""
    for number in NUMBERS:
        for op in OPS:
            for argsz in ARGSZ:
                yield f": feature {number} {op} {argsz}"
    for op in OPS:
        for argsz in ARGSZ:
            yield f"optin: feature 12 {op} {argsz}"
    for state in STATES:
        for call in (
            "feature 1 GET 16",
            "feature 2 GET 16",
            "feature 9 GET 16",
            "feature 12 SET 8",
            "feature 12 PROBE 8",
        ):
            yield f"{state}: {call}"


def cells() -> Iterator[str]:
    """SET_STATE from each state to each target, and the state afterwards; from RESUMING also with the state loaded."""
    for start in STATES:
        for target in TARGETS:
            yield f"{start}: {target}; state"
    for target in TARGETS:
        yield f"save, RESUMING, write whole {ALL}: {target}; state"


def walks() -> Iterator[str]:
    """Two moves one after the other, from each state."""
    for start in STATES:
        for first in STATES:
            for second in STATES:
                yield f"{start}: {first}; {second}; state"


SESSIONS = [
    *("PRE_COPY", "PRE_COPY, PRE_COPY_P2P", "PRE_COPY, PRE_COPY_P2P, PRE_COPY", "PRE_COPY, STOP_COPY", "PRE_COPY_P2P"),
    *("STOP_COPY", "PRE_COPY, RUNNING", "PRE_COPY, RUNNING, PRE_COPY", "STOP_COPY, STOP", "RESUMING"),
    *("PRE_COPY, RUNNING_P2P", "PRE_COPY_P2P, RUNNING_P2P", "PRE_COPY_P2P, RUNNING", "PRE_COPY, reset"),
    *("PRE_COPY, reset, PRE_COPY", "PRE_COPY, RUNNING, RESUMING", "PRE_COPY, RUNNING, STOP_COPY"),
]
"""Ways to get a session whose first data fd is then asked."""


def infos() -> Iterator[str]:
    """VFIO_MIG_GET_PRECOPY_INFO on the first data fd, in each state, with and without the opt-in to REINIT."""
    for before in ("", "optin, "):
        for session in SESSIONS:
            for argsz, flags in ((24, 0), (24, 0xDEAD), (24, 1), (23, 0), (0, 0), (32, 0)):
                yield f"{before}{session}: info {argsz} {flags:#x} @0"
    yield "PRE_COPY, optin: info 24 0xdead"
    yield "PRE_COPY: info_and_read"
    yield "PRE_COPY, read 1: info_and_read"
    yield "PRE_COPY, drain: info 24 0x0; read 1"
    yield "save, RESUMING, write whole 7: info 24 0x0; info 0 0x0"


def reads() -> Iterator[str]:
    """read(): sizes, both ends, stale fds, fds of the wrong direction."""
    for size in (0, 1, 7, ALL):
        for session in ("PRE_COPY", "PRE_COPY, PRE_COPY_P2P", "PRE_COPY, STOP_COPY", "STOP_COPY"):
            yield f"{session}: read {size}; read {size}"
            yield f"{session}, drain: read {size}; read {size}"
        for session in SESSIONS:
            yield f"{session}: read {size} @0"
    yield "PRE_COPY, drain, PRE_COPY_P2P: read 1"
    yield "PRE_COPY, drain, STOP_COPY: drain; read 1"
    yield "PRE_COPY, read 1, STOP_COPY: drain; read 1"
    yield "STOP_COPY: drain; info 24 0x0; read 1"


def writes() -> Iterator[str]:
    """write(): wrong direction, stale fds, and what is no state of the device; then what the device is in."""
    for session in SESSIONS:
        yield f"save, {session}: write whole {ALL} @0; state"
    for form in ("whole", "cut", "altered", "more", "twice", "empty"):
        for piece in (ALL, 100):
            load = f"save, RESUMING: write {form} {piece}"
            yield f"{load}; RUNNING; state; reset; state"
            yield f"{load}; STOP_COPY; state; reset; state"
            yield f"{load}; STOP; write {form} {piece} @0; state"
            yield f"{load}; reset; write {form} {piece} @0; state"
    yield "save, RESUMING: RUNNING; state; RUNNING; state; reset; state"
    yield f"save, RESUMING: write altered {ALL}; write whole {ALL}; RUNNING; state"
    yield f"save, RESUMING, write whole {ALL}, RUNNING: read 1 @0; info 24 0x0 @0; state"


POLLED = [
    *(("PRE_COPY", 10_000), ("STOP_COPY", 10_000), ("PRE_COPY, drain", 0), ("STOP_COPY, drain", 10_000)),
    *(("PRE_COPY, RUNNING", 10_000), ("STOP_COPY, STOP", 10_000), ("PRE_COPY, reset", 10_000)),
    *(("RESUMING", 0), ("RESUMING, reset", 0), ("PRE_COPY, PRE_COPY_P2P, drain", 0)),
]
"""Ways to a session, and milliseconds."""


def polls() -> Iterator[str]:
    """epoll on a data fd; 0 ms where nothing may be ready, long where something is."""
    for session, ms in POLLED:
        yield f"{session}: poll {ms} @0"


def lives() -> Iterator[str]:
    """How long a data fd lives: close() in each session, reset from each state, the device closed and opened."""
    for state in ("PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "RESUMING"):
        for target in STATES:
            yield f"{state}: close; state; {target}; state"
        yield f"{state}: reset; state; read 1 @0; info 24 0x0 @0; close @0"
        yield f"{state}: reopen; read 1 @0; info 24 0x0 @0; close @0"
        yield f"{state}, RUNNING_P2P, reset, {state}: read 0 @0; close @0; read 0 @1; close @1; state"
    for state in STATES:
        yield f"{state}: reset; state; {state}; state"
    yield "optin, reopen: feature 12 PROBE 8"
    yield "optin, reopen, PRE_COPY: info 24 0xdead"
    yield "optin, reset, PRE_COPY: info 24 0xdead"


def sizes() -> Iterator[str]:
    """MIG_DATA_SIZE against what STOP_COPY then gives, from each state."""
    for before in (
        "",
        "PRE_COPY",
        "PRE_COPY, read 1",
        "PRE_COPY, drain",
        "PRE_COPY_P2P",
        "PRE_COPY, PRE_COPY_P2P, drain",
    ):
        yield f"{before}: size_and_read"
    for state in STATES:
        yield f"{state}: size"


def streams() -> Iterator[str]:
    """v3's calls on a device without it, or with no stream asked for: docs/vfio_v3.h."""
    for state in ("PRE_COPY", "STOP_COPY", "RESUMING", "PRE_COPY, RUNNING"):
        for argsz, flags in ((16, 0), (15, 0), (0, 0), (16, 1), (64, 0)):
            yield f"{state}: get_stream {argsz} {flags} 0"
        for argsz, flags in ((24, 0), (23, 0), (0, 0), (24, 1), (64, 0)):
            yield f"{state}: stream_info {argsz} {flags}"
            yield f"{state}: dirty_blocks {argsz} {flags}"


TWO, BLOCKS = "streams 2 0", "streams 1 1"
"""What is asked for: two dirty streams; one fd of blocks."""
BROKEN = f"{TWO}, RESUMING, !write junk 64"
"""Bytes that no source gave: the device is in ERROR."""


def v3_settings() -> Iterator[str]:
    """SET and GET of MIG_STREAMS, in each state, with right and wrong numbers."""
    for state in STATES:
        yield f"{state}: streams 2 0; streams?; state"
        yield f"{TWO}, {state}: streams 0 0; streams 2 0; streams?"
    for asked in ("0 0", "1 0", "8 0", "9 0", "65 0", "1 1", "0 1", "2 1", "1 2", "0 2"):
        yield f": streams {asked}; PRE_COPY; get_stream 16 0 0; state"
    yield f"{TWO}, reset: PRE_COPY; get_stream 16 0 0"
    yield f"{TWO}, reopen: PRE_COPY; get_stream 16 0 0"
    yield f"{TWO}, streams 0 0: PRE_COPY; get_stream 16 0 0; info 24 0x0"


V3_SESSIONS = ["PRE_COPY", "PRE_COPY_P2P", "PRE_COPY, PRE_COPY_P2P", "PRE_COPY, STOP_COPY", "STOP_COPY", "RESUMING"]
OVER = ["PRE_COPY, RUNNING", "STOP_COPY, STOP", "PRE_COPY, reset", "PRE_COPY, RUNNING, PRE_COPY", "RESUMING, reset"]


def v3_ioctls() -> Iterator[str]:
    """GET_STREAM, GET_STREAM_INFO, GET_DIRTY_BLOCKS and PRECOPY_INFO on each kind of fd, with right and wrong argsz."""
    for session in [*V3_SESSIONS, *OVER]:
        for argsz, flags, index in ((16, 0, 0), (16, 0, 1), (16, 0, 2), (15, 0, 0), (0, 0, 0), (16, 1, 0), (64, 0, 0)):
            yield f"{TWO}, {session}: get_stream {argsz} {flags} {index} @0"
        for argsz, flags in ((24, 0), (23, 0), (0, 0), (24, 1), (64, 0)):
            yield f"{TWO}, {session}: stream_info {argsz} {flags} @0"
        yield f"{TWO}, {session}: info 24 0x0 @0; info 0 0x0 @0; dirty_blocks 32 0 @0; dirty_blocks 0 0 @0"
    for session in V3_SESSIONS:
        first, _, then = session.partition(", ")
        opened = f"{first}, fds" + f", {then}" * bool(then)
        for on in ("@1", "@2"):
            wrong = f"get_stream 0 0 0 {on}; info 0 0x0 {on}; dirty_blocks 0 0 {on}"
            yield f"{TWO}, {opened}: get_stream 16 0 0 {on}; {wrong}"
            for argsz, flags in ((24, 0), (23, 0), (0, 0), (24, 1), (64, 0)):
                yield f"{TWO}, {opened}: stream_info {argsz} {flags} {on}"
        yield f"{TWO}, {opened}: get_stream 16 0 0 @0; state"
        blocks = f"{BLOCKS}, {first}, get_stream 16 0 0" + f", {then}" * bool(then)
        for argsz, flags in ((32, 0), (31, 0), (0, 0), (32, 1), (64, 0)):
            yield f"{blocks}: dirty_blocks {argsz} {flags} @1"
        yield f"{blocks}: stream_info 24 0 @1; stream_info 0 0 @1; get_stream 0 0 0 @1; info 0 0x0 @1"
        yield f"{blocks}: get_stream 16 0 1 @0; dirty_blocks 32 0 @0"


def v3_bytes() -> Iterator[str]:
    """read(), write(), poll() and close() on the fds of several streams."""
    for session in ("PRE_COPY", "STOP_COPY"):
        for on in ("@0", "@1", "@2"):
            yield f"{TWO}, {session}, fds: poll 10000 {on}; drain {on}; read 1 {on}; stream_info 24 0 {on}"
            yield f"{TWO}, {session}, fds: write junk 64 {on}; state"
            for end in ("RUNNING", "STOP", "reset"):
                yield f"{TWO}, {session}, fds, {end}: read 1 {on}; stream_info 24 0 {on}; poll 10000 {on}"
        yield f"{TWO}, {session}, fds, close @0, close @1: read 1 @2; state; RUNNING; state"
        yield f"{TWO}, {session}, fds, close @1: get_stream 16 0 0 @0; read 1 @3; state"
    load = f"{TWO}, save, RESUMING, fds"
    whole = f"write whole {ALL} s0 @0, write whole {ALL} s1 @1, write whole {ALL} s2 @2"
    yield f"{load}, {whole}: RUNNING; state; write whole {ALL} s0 @0"
    yield f"{load}, {whole}: STOP; state; RUNNING; state"
    yield f"{load}, {whole}, close @0, close @1, close @2: RUNNING; state"
    yield f"{load}: poll 0 @0; read 1 @0; read 1 @1; RUNNING; state"
    for stream in (0, 1, 2):
        others = ", ".join(f"write whole {ALL} s{other} @{other}" for other in range(3) if other != stream)
        for form in ("cut", "twice", "altered", "more", "empty", "junk"):
            before = f"{load}, {others}" if stream else load  # no dirty stream can be loaded before the critical one
            yield f"{before}: write {form} {ALL} s{stream} @{stream}; state; RUNNING; state"
        yield f"{before}: RUNNING; state"
    for wrong, right in ((0, 1), (1, 0), (1, 2), (2, 1)):
        yield f"{load}: write whole {ALL} s{wrong} @{right}; state; write whole {ALL} s{right} @{right}; RUNNING; state"
    yield f"{load}, {whole}: write whole {ALL} s1 @1; state; read 1 @0"
    yield f"{load}, write whole {ALL} s0 @0, close @1, close @2: RUNNING; state"


def v3_error() -> Iterator[str]:
    """From ERROR, which bytes lead to that no source gave."""
    for target in TARGETS:
        yield f"{BROKEN}: {target}; state"
    yield f"{BROKEN}: write junk 64 @0; reset; state; write junk 64 @0; PRE_COPY; state"
    yield f"{BROKEN}: get_stream 16 0 0 @0; feature 9 GET 16; feature 14 GET 16; streams 0 0; reset; streams 0 0"
    yield f"{BROKEN}: read 1 @0; poll 10000 @0; close @0; state"
    yield f"{BROKEN}, reopen: state; PRE_COPY; state"


GROUPS: dict[str, Iterable[str]] = {
    made.__name__: list(made())
    for made in (
        features,
        cells,
        walks,
        infos,
        reads,
        writes,
        polls,
        lives,
        sizes,
        streams,
        v3_settings,
        v3_ioctls,
        v3_bytes,
        v3_error,
    )
}
"""All cases, by group."""
