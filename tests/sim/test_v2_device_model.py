# SPDX-License-Identifier: GPL-2.0-or-later
"""Any calls in any order, against a model of the device that was written from the header's rules alone.

The model knows states, sessions and which fd belongs to which; not how a driver saves. It says of each call whether it
works, and with which errno it fails. What the header leaves open (how much data there is, when it is there) is taken
from the driver's answers, which must not contradict each other.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import State
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import run
from sim.device.driver import SimDriver
from sim.device.record import HEADER_BYTES, Extent, RecordSlice
from sim.scenario.units import KIB
from tests.build.hosts import ALL, KINDS, MS, STATE_BYTES, WHOLE, Hosts, read_all, saved
from tests.build.hosts import session as begin

PATHS = json.loads((Path(__file__).parents[1] / "data" / "fsm_paths.json").read_text())["paths"]
NEW_SAVE_FD = {"RUNNING PRE_COPY", "RUNNING_P2P PRE_COPY_P2P", "STOP STOP_COPY"}
NEW_LOAD_FD = {"STOP RESUMING"}
LIVE = ("PRE_COPY", "PRE_COPY_P2P")
SAVING = (*LIVE, "STOP_COPY")
STOPPED = ("STOP", "STOP_COPY", "RESUMING")
DRIVERS: dict[str, dict[str, Any]] = {
    "mlx5": WHOLE,
    "invalidates": {**WHOLE, "driver.reinit": "invalidate"},
    "chunks": {},
    "chunks, invalidates": {"driver.reinit": "invalidate"},
    "sloppy": {**WHOLE, "driver.precopy_end": "0", "driver.reinit": "none"},
    "virtio": KINDS["virtio"],
    "hisi_acc": KINDS["hisi_acc"],
    "qat": KINDS["qat"],
}
RESTLESS = {
    "device.0.stop_only_mib": 1.0,
    "device.0.writes": {"pattern": "uniform", "mib_per_s": 100.0},
    "device.0.reconfigurations": {"poisson_per_s": 200.0},
}


@dataclass
class Session:
    """One session and its fd, as far as the rules and the driver's own answers tell."""

    saves: bool
    over: bool = False
    # saving
    drained: bool = False
    """There was nothing left, and nothing happened since that could bring more."""
    promised: bool = False
    """poll() or GET_PRECOPY_INFO said that there is something to read."""
    ended: bool = False
    """read() gave 0 in STOP_COPY."""
    read_any: bool = False
    initial: int | None = None
    events_seen: int = 0
    parts: list[RecordSlice] = field(default_factory=list)
    # loading
    offset: int = 0
    refused: bool = False


@cache
def donated(features: str, driver: str) -> Extent:
    """A whole stream of an idle device, to be loaded."""

    async def stream() -> Extent:
        hosts = Hosts({**DRIVERS[driver], "device.0.features": features.split("|")})
        return Extent((await saved(hosts))[0])

    return run(stream())


class Model:
    """The device as the header describes it, walked side by side with the driver."""

    def __init__(self, features: str, driver: str, seed: int, to_load: Extent) -> None:
        self.hosts = Hosts({**RESTLESS, **DRIVERS[driver], "device.0.features": features.split("|")}, seed=seed)
        self.device: SimDriver = self.hosts.both
        self.paths = PATHS[features]
        self.has_precopy = "PRE_COPY" in features.split("|")
        self.sloppy = self.hosts.scenario.driver.precopy_end == "0"
        self.donated = to_load
        self.state = "RUNNING"
        self.opted_in = False
        self.opted_in_from_the_start = False
        self.fds: list[tuple[DataFd, Session]] = []
        self.seen: set[str] = set()

    @property
    def open(self) -> Session | None:
        """The session that is not over."""
        return self.fds[-1][1] if self.fds and not self.fds[-1][1].over else None

    async def does(self, call: tuple[Any, ...]) -> None:
        """One call on both; they must agree, and on the state after it."""
        name, *arguments = call
        outcome = await getattr(self, name)(*arguments)
        if outcome is not None:
            self.seen.add(f"{name} {outcome}")
        self.seen.add(self.state)
        assert (await self.device.state()).name == self.state

    async def _errno(self, awaited: Any) -> tuple[int, Any]:
        try:
            return 0, await awaited
        except OSError as error:
            return error.errno or -1, None

    # --- the device fd ------------------------------------------------------------------------------------------------

    async def set_state(self, target: int) -> str:
        """The kernel's path, hop by hop: sessions end and begin on it, RESUMING is left with a whole image only."""
        name = State(target).name if target in list(State) else ""
        if name in STOPPED and self.state not in (*STOPPED, "ERROR"):
            self.hosts.state.stop(now_ns())  # a VMM stops the vCPUs before the device
        steps = "" if name == self.state != "ERROR" else self.paths[self.state].get(name, "EINVAL")
        hops = [] if steps == "EINVAL" else steps.split()
        expected = errno.EINVAL if steps == "EINVAL" else 0
        begins = None
        loaded = False
        for hop in hops:
            arc = f"{self.state} {hop}"
            session = self.open
            if self.state == "RESUMING":
                assert session is not None
                session.over = True
                loaded = session.offset == len(self.donated) and not session.refused
                if not loaded:
                    expected, self.state = errno.EIO, "ERROR"
                    break
            elif session is not None and hop not in SAVING:
                session.over = True
            if session is not None and hop == "STOP_COPY":
                session.drained = session.promised = False
            begins = Session(saves=arc in NEW_SAVE_FD) if arc in NEW_SAVE_FD | NEW_LOAD_FD else None
            self.state = hop
        code, fd = await self._errno(self.device.set_state(target))  # type: ignore[arg-type]
        assert code == expected
        assert (fd is not None) == (begins is not None and not code)
        if fd is not None and begins is not None:
            self.fds.append((fd, begins))
            begins.events_seen = self._events()
            self.opted_in_from_the_start = self.opted_in
            self.hosts.image.version[:] = -1 if not begins.saves else self.hosts.image.version
        if loaded and not code:
            assert (self.hosts.image.version == 0).all()
            assert (self.hosts.image.object_version == 0).all()
        self._guest_goes_on()
        return errno.errorcode.get(code, "ok") + (" loaded" if loaded else "")

    async def reset(self) -> None:
        """From anywhere to RUNNING, with no session."""
        if self.open is not None:
            self.open.over = True
        self.state = "RUNNING"
        await self.device.reset()
        self._guest_goes_on()

    async def opt_in(self) -> str:
        """Needs PRE_COPY."""
        code, _ = await self._errno(self.device.set_precopy_info_v2())
        assert code == (0 if self.has_precopy else errno.EINVAL)
        self.opted_in |= self.has_precopy
        return errno.errorcode.get(code, "ok")

    async def data_size(self) -> None:
        """In any state; the whole state without a session."""
        size = await self.device.stop_copy_bytes()
        session = self.open
        if session is None or not session.saves:
            assert size == STATE_BYTES + 9 * HEADER_BYTES  # one header of objects, eight of blocks
        elif session.ended:
            assert size == 0
        else:
            assert size >= 0

    async def advance(self, delay_ns: int) -> None:
        """Let the guest and the firmware work."""
        await sleep_ns(delay_ns)

    def _guest_goes_on(self) -> None:
        if self.state not in (*STOPPED, "ERROR"):
            self.hosts.state.start()

    def _events(self) -> int:
        return self.hosts.state.activity.reconfigurations_until(now_ns())

    # --- data fds -----------------------------------------------------------------------------------------------------

    def _fd(self, back: int) -> tuple[DataFd, Session]:
        """An fd that was got before, the newest first."""
        return self.fds[-1 - back % len(self.fds)]

    async def read(self, back: int, max_bytes: int) -> str | None:
        """Data, or the end, temporary or for ever."""
        if not self.fds:
            return None
        fd, session = self._fd(back)
        code, data = await self._errno(fd.read(max_bytes))
        if not session.saves or session.over:
            assert code == (errno.ENODEV if session.saves else errno.EBADF)
            return errno.errorcode[code]
        size = len(data) if data is not None else 0
        if self.state == "STOP_COPY":
            assert code == 0
            assert not (session.ended and size)
            session.ended = not size
            outcome = "data" if size else "end"
        else:
            assert code == (errno.ENOMSG if not size and not self.sloppy else 0)
            assert not (session.drained and size)
            session.drained = not size
            outcome = "data" if size else "temporary end"
        assert size <= max_bytes
        assert not (session.promised and not size and self.state != "STOP_COPY")
        session.promised = False
        session.read_any |= bool(size)
        session.parts += data.parts if size else []
        return outcome

    async def drain(self, back: int) -> None:
        """read() until there is no more."""
        while await self.read(back, ALL) == "data":
            pass

    async def poll(self, back: int) -> str | None:
        """What read() would find: data or the last end; an error to be told on a stale fd."""
        if not self.fds:
            return None
        fd, session = self._fd(back)
        asked = now_ns()
        ready = await fd.poll(0)
        assert now_ns() == asked
        if not session.saves:
            return None
        assert ready in (Ready.NOTHING, Ready.READABLE)
        if session.over or session.ended:
            assert ready
        if session.drained and not session.over:
            assert not ready
        session.promised |= bool(ready) and not session.over
        return "ready" if ready else "not ready"

    async def precopy_info(self, back: int) -> str | None:
        """In pre-copy only, which is looked at first, also on a stale fd; never on a loaded one. REINIT only after
        the opt-in, not in PRE_COPY_P2P, only for what is new."""
        if not self.fds:
            return None
        fd, session = self._fd(back)
        code, info = await self._errno(fd.precopy_info())
        if not session.saves or session.over or self.state == "STOP_COPY":
            asked_in_precopy = self.state in ("PRE_COPY", "PRE_COPY_P2P")
            assert code == (errno.ENOTTY if not session.saves else errno.ENODEV if asked_in_precopy else errno.EINVAL)
            return errno.errorcode[code]
        assert code == 0
        new_events = self._events() > session.events_seen
        if info.reinit:
            assert self.opted_in
            assert self.state == "PRE_COPY"
            assert new_events
            assert info.dirty_bytes == 0
            session.events_seen = self._events()
            session.drained = session.promised = False
        else:
            driver = self.hosts.scenario.driver
            able = driver.reinit != "none" and driver.precopy == "incremental"
            reports = able and self.opted_in_from_the_start
            assert not (reports and new_events and self.state == "PRE_COPY")
            assert session.initial is None or info.initial_bytes <= session.initial
            left = info.initial_bytes + info.dirty_bytes
            if session.drained and self.state == "PRE_COPY_P2P":
                assert left == 0
            session.drained = left == 0
            session.promised |= left > 0
        assert session.read_any or info.initial_bytes > 0
        session.initial = info.initial_bytes
        return "REINIT" if info.reinit else "ok"

    async def foreign(self, back: int) -> str | None:
        """Bytes that no driver made."""
        return await self.write(back, 0, 0, foreign=True)

    async def write(self, back: int, skipped: int, size: int, *, foreign: bool = False) -> str | None:
        """The donated stream's next bytes, or others."""
        if not self.fds:
            return None
        fd, session = self._fd(back)
        start = max(0, session.offset + skipped)
        payload: Any = memoryview(bytes(8)) if foreign else self.donated[start : start + size]
        bad = foreign or (start != session.offset and len(payload))
        code, _ = await self._errno(fd.write(payload, 32 * KIB))
        if session.saves:
            assert code == errno.EBADF
        elif session.over or session.refused:
            assert code == errno.ENODEV
        elif bad:
            assert code == errno.EINVAL
            session.refused = True
        else:
            assert code == 0
            session.offset += len(payload)
        return errno.errorcode.get(code, "ok")

    # --- the end ------------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """A session that is open still leads to an image like the source: nothing that was refused took a byte away."""
        if self.open is None or not self.open.saves:
            return
        fd, saving = self.fds[-1]
        await self.set_state(State.STOP_COPY)
        parts = [*saving.parts, *await read_all(fd)]
        self.hosts.image.version[:] = -1
        self.hosts.image.object_version[:] = -1
        (to,) = await begin(self.hosts.target, State.RESUMING)
        await to.write(Extent(parts), 32 * KIB)
        await self.hosts.target.set_state(State.RUNNING)
        assert not self.hosts.image.differences(self.hosts.state)
        self.seen.add("moved")


# --- any calls in any order ------------------------------------------------------------------------------------------

FDS = st.sampled_from([0, 0, 0, 0, 1, 2, 5])
"""Most often the newest one."""
SIZES = st.sampled_from([1, 17, 5_000, 100_000, ALL])
STATES = [State.RUNNING, State.PRE_COPY, State.PRE_COPY, State.STOP_COPY, State.RESUMING, *State, 8]
CALLS = st.one_of(
    st.tuples(st.just("set_state"), st.sampled_from(STATES)),
    st.tuples(st.just("set_state"), st.sampled_from(STATES)),
    st.tuples(st.just("read"), FDS, SIZES),
    st.tuples(st.just("read"), FDS, SIZES),
    st.tuples(st.just("drain"), FDS),
    st.tuples(st.just("precopy_info"), FDS),
    st.tuples(st.just("precopy_info"), FDS),
    st.tuples(st.just("poll"), FDS),
    st.tuples(st.just("write"), FDS, st.just(0), st.just(ALL)),
    st.tuples(st.just("write"), FDS, st.sampled_from([0, 0, 0, 1, -1, -5_000, 70_000]), SIZES),
    st.tuples(st.just("foreign"), FDS),
    st.tuples(st.just("advance"), st.sampled_from([1, 10_000, 1 * MS, 20 * MS])),
    st.sampled_from([("data_size",), ("opt_in",), ("reset",)]),
)

LISTS = st.lists(CALLS, min_size=15, max_size=60)

HAPPENS = {
    *("RUNNING", "STOP", "STOP_COPY", "RESUMING", "ERROR", "moved"),
    *("set_state ok", "set_state EINVAL", "set_state EIO", "set_state ok loaded"),
    *("read data", "read end", "read ENODEV", "read EBADF", "poll ready", "poll not ready"),
    *("precopy_info EINVAL", "precopy_info ENOTTY"),
    *("write ok", "write EINVAL", "write ENODEV", "write EBADF", "foreign EINVAL"),
}
WITH_PRECOPY = {
    "PRE_COPY",
    "read temporary end",
    "precopy_info ok",
    "precopy_info REINIT",
    "opt_in ok",
    "precopy_info ENODEV",
}


@pytest.mark.slow
@pytest.mark.rule("v2.contract.8", "v2.contract.9", "v2.driver.11", "v3.2.3")
@pytest.mark.parametrize("features", PATHS)
def test_any_calls_in_any_order_do_what_the_header_says(features: str) -> None:
    seen: set[str] = set()

    @settings(max_examples=120)
    @given(driver=st.sampled_from(list(DRIVERS)), seed=st.integers(0, 100), calls=LISTS)
    def try_one(driver: str, seed: int, calls: list[tuple[Any, ...]]) -> None:
        to_load = donated(features, driver)

        async def both() -> None:
            model = Model(features, driver, seed, to_load)
            try:
                for call in calls:
                    await model.does(call)
                await model.finish()
            finally:
                seen.update(model.seen)

        run(both())

    try_one()
    expected = HAPPENS | (WITH_PRECOPY if "PRE_COPY" in features.split("|") else {"opt_in EINVAL"})
    expected |= {"RUNNING_P2P"} if "P2P" in features.split("|") else set()
    assert expected - seen == set()  # or the test would show little
