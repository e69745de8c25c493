# SPDX-License-Identifier: GPL-2.0-or-later
"""Multifd: packets over a pool of channels and back in order, who carries what, who loads when."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.errors import PeerProtocolError
from proto_v3.timeline import Timeline
from proto_v3.vmm.migration import OutcomeKind, Side, Target
from proto_v3.vmm.multifd import Multifd, Receivers, Senders
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload
from sim.clock import virtual as clock
from sim.clock.port import now_ns, sleep_ns
from sim.outcome import Outcome
from sim.run import VirtualRun, simulate
from sim.scenario.protocol import Protocol
from sim.scenario.units import MIB, ns
from tests.build.runs import kept_run
from tests.build.scenario import small_scenario, virtual


def multifd(channels: int, **changes: Any) -> Multifd:
    keys = {"device_state": True, "dedicated": 0, "coupled": False, "load_threads": 0}
    return Multifd(channels=channels, **keys | changes)


# --- the target's half, packet by packet -----------------------------------------------------------------------------


class Fd:
    """A device that takes its time to write, and keeps what was written and in what pieces."""

    name = "a"

    def __init__(self, write_ns: int = 0) -> None:
        self.written: list[bytes] = []
        self.write_ns = write_ns

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        assert len(payload) <= piece_bytes, "one write() a packet"
        await sleep_ns(self.write_ns)
        assert isinstance(payload, memoryview)
        self.written.append(bytes(payload))


COPY_MS = 10


class Machine:
    """Config takes 5 ms a device, under one lock; to copy a packet takes COPY_MS, if it has any data."""

    running = False

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.configs: list[tuple[int, int, int]] = []
        self.ram_bytes = 0

    @property
    def ram(self) -> Machine:
        return self

    async def copy_packet(self, size_bytes: int) -> None:
        await sleep_ns(ns(COPY_MS) * (size_bytes > 0))

    async def wake_up(self) -> None: ...

    async def load(self, payload: Payload) -> None:
        self.ram_bytes += len(payload)

    async def load_config(self, device: int) -> None:
        async with self.lock:
            start = now_ns()
            await sleep_ns(ns(5))
            self.configs.append((device, start, now_ns()))


class Bare(Target):
    """A VMM that does nothing but have devices."""

    async def receive(self) -> bool:
        return True


class Rig:
    """The target's half of multifd, its channels and its devices' fds."""

    def __init__(self, setup: Multifd, fds: Sequence[Fd]) -> None:
        self.channels: list[asyncio.Queue[Frame]] = [asyncio.Queue() for _ in range(setup.channels)]
        for channel in self.channels:
            channel.recv = channel.get  # type: ignore[attr-defined]
        self.machine = Machine()
        self.fds = fds
        side = Side(self.machine, fds, None, Timeline(now_ns))  # type: ignore[arg-type]
        self.target = Bare(side, [])
        self.receivers = Receivers(setup, self.channels, self.target)  # type: ignore[arg-type]

    @asynccontextmanager
    async def running(self, *, loading: bool = True) -> AsyncIterator[None]:
        """All its threads; an error of one of them ends the block."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work, _ in self.receivers.work()]
            if loading:
                self.receivers.switchover(self.fds)  # type: ignore[arg-type]
            yield
            for task in tasks:
                task.cancel()


def packet(device: int, number: int) -> Frame:
    return Frame(Kind.PACKET, device, value=number, payload=memoryview(f"{device}:{number}".encode()))


def stream(device: int, packets: int) -> list[Frame]:
    """All packets of a device, the config last."""
    return [*(packet(device, number) for number in range(packets)), Frame(Kind.CONFIG, device, value=packets)]


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[int], list[tuple[Frame, int]]]:
    """Packets of each device, and all of them in some order, each with the channel that it takes."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    frames = [frame for device, length in enumerate(lengths) for frame in stream(device, length)]
    return lengths, [(frame, draw(st.integers(0, 3))) for frame in draw(st.permutations(frames))]


@pytest.mark.rule("v2.vmm.10")
@given(deliveries(), st.sampled_from([0, 700, 5000]), st.sampled_from([{}, {"load_threads": 1}, {"coupled": True}]))
def test_packets_are_put_back_in_order_whatever_way_they_came(
    delivered: tuple[list[int], list[tuple[Frame, int]]], write_ns: int, how: dict[str, Any]
) -> None:
    """One packet a microsecond; the device writes in no time, in less, or in more than that."""
    lengths, frames = delivered

    async def main() -> None:
        rig = Rig(multifd(4, **how), [Fd(write_ns) for _ in lengths])
        async with rig.running():
            for frame, channel in frames:
                rig.channels[channel].put_nowait(frame)
                await sleep_ns(1000)
            await rig.receivers.loaded()
        for device, length in enumerate(lengths):
            assert rig.fds[device].written == [f"{device}:{number}".encode() for number in range(length)]
        assert sorted(device for device, _, _ in rig.machine.configs) == list(range(len(lengths)))
        assert 0 <= rig.target.counters.peak_reorder_bytes <= sum(len(frame.payload) for frame, _ in frames)

    clock.run(main(), limit_ns=ns(1000))


@virtual
async def test_what_is_early_waits_and_is_counted() -> None:
    rig = Rig(multifd(2), [Fd()])
    async with rig.running():
        for number in (3, 1, 2):
            rig.channels[number % 2].put_nowait(packet(0, number))
        await sleep_ns(1000)
        assert rig.fds[0].written == []
        assert rig.target.counters.peak_reorder_bytes == 3 * len("0:1")
        rig.channels[0].put_nowait(packet(0, 0))
        await sleep_ns(1000)
        assert rig.fds[0].written == [b"0:0", b"0:1", b"0:2", b"0:3"]


@virtual
async def test_nothing_is_written_before_the_switchover_begins() -> None:
    rig = Rig(multifd(1), [Fd()])
    async with rig.running(loading=False):
        rig.channels[0].put_nowait(packet(0, 0))
        await sleep_ns(ns(1))
        assert rig.fds[0].written == []
        rig.receivers.switchover(rig.fds)  # type: ignore[arg-type]
        await sleep_ns(1)
        assert rig.fds[0].written == [b"0:0"]


@pytest.mark.rule("v2.vmm.10")
@virtual
async def test_config_comes_after_a_devices_data_and_one_device_at_a_time() -> None:
    rig = Rig(multifd(3), [Fd(ns(1)), Fd(ns(2)), Fd(ns(3))])
    async with rig.running():
        for device, channel in enumerate(rig.channels):
            for frame in stream(device, 2):
                channel.put_nowait(frame)
        await rig.receivers.loaded()
    assert rig.machine.configs == [(0, ns(2), ns(7)), (1, ns(7), ns(12)), (2, ns(12), ns(17))]


@virtual
async def test_all_is_loaded_when_the_last_config_is() -> None:
    rig = Rig(multifd(1), [Fd(), Fd()])
    async with rig.running():
        for device in (1, 0):
            for frame in stream(device, 1):
                rig.channels[0].put_nowait(frame)
        await rig.receivers.loaded()
        assert now_ns() == ns(10)


@virtual
async def test_one_load_thread_takes_the_devices_in_turn() -> None:
    """The second device's packets wait, though all of them are there."""
    rig = Rig(multifd(1, load_threads=1), [Fd(ns(1)), Fd(ns(1))])
    async with rig.running():
        for frame in [*stream(1, 2), packet(0, 0)]:
            rig.channels[0].put_nowait(frame)
        await sleep_ns(ns(20))
        assert rig.fds[1].written == []
        rig.channels[0].put_nowait(Frame(Kind.CONFIG, 0, value=1))
        await rig.receivers.loaded()
    assert now_ns() == ns(20 + 5 + 2 + 5)


@virtual
async def test_a_coupled_channel_takes_nothing_more_until_what_it_brought_is_written() -> None:
    for coupled in (False, True):
        rig = Rig(multifd(1, coupled=coupled), [Fd(ns(1))])
        async with rig.running():
            for number in range(4):
                rig.channels[0].put_nowait(packet(0, number))
            await sleep_ns(ns(1.5))
            assert rig.channels[0].qsize() == (2 if coupled else 0)


@pytest.mark.parametrize("how", [{}, {"coupled": True}])
@virtual
async def test_a_coupled_channel_does_not_wait_for_what_others_have_to_bring(how: dict[str, Any]) -> None:
    """Packet 1 came on a channel whose next packet is 0: waiting for it there would be for ever."""
    rig = Rig(multifd(1, **how), [Fd()])
    async with rig.running():
        for number in (1, 0):
            rig.channels[0].put_nowait(packet(0, number))
        await sleep_ns(1)
        assert rig.fds[0].written == [b"0:0", b"0:1"]


@pytest.mark.rule("v2.best.5")
@given(st.permutations(range(7)), st.sampled_from([0, 700, 5000]))
def test_what_stands_behind_a_devices_data_is_answered_when_that_is_written(order: list[int], write_ns: int) -> None:
    """Packets 2 and 5 have no data and ask for an answer: INIT_DATA_SENT of request 1, and of 3."""

    async def main() -> None:
        rig = Rig(multifd(3, precopy=True), [Fd(write_ns)])
        answered: list[tuple[int, int]] = []

        async def answer(frame: Frame) -> None:
            answered.append((frame.stream, len(rig.fds[0].written)))

        rig.receivers = Receivers(rig.receivers._settings, rig.channels, rig.target, answer)  # type: ignore[arg-type]
        frames = [packet(0, number) for number in range(7)]
        frames[2], frames[5] = (Frame(Kind.INIT_DATA_SENT, 0, request, at) for request, at in ((1, 2), (3, 5)))
        async with rig.running(loading=False):
            rig.receivers.start_loading(rig.fds)  # type: ignore[arg-type]
            for at in order:
                rig.channels[at % 3].put_nowait(frames[at])
                await sleep_ns(1000)
            await sleep_ns(ns(1))
        assert answered == [(1, 2), (3, 4)]
        assert len(rig.fds[0].written) == 5

    clock.run(main(), limit_ns=ns(1000))


@pytest.mark.rule("v2.best.5")
@virtual
async def test_no_config_is_loaded_before_the_switchover_whoever_sent_it() -> None:
    rig = Rig(multifd(1, precopy=True), [Fd()])
    async with rig.running(loading=False):
        rig.receivers.start_loading(rig.fds)  # type: ignore[arg-type]
        for frame in stream(0, 2):
            rig.channels[0].put_nowait(frame)
        await sleep_ns(ns(20))
        assert (len(rig.fds[0].written), rig.machine.configs) == (2, [])
        rig.receivers.switchover(rig.fds)  # type: ignore[arg-type]
        await rig.receivers.loaded()
    assert rig.machine.configs == [(0, ns(20), ns(25))]


# --- what the target refuses -----------------------------------------------------------------------------------------


async def refused(rig: Rig, *frames: Frame) -> str:
    """Why the frames, on one channel, are not taken."""

    async def deliver() -> None:
        async with rig.running():
            for frame in frames:
                rig.channels[0].put_nowait(frame)
                await sleep_ns(1)
            await sleep_ns(ns(1000))

    with pytest.raises(ExceptionGroup) as raised:
        await deliver()
    (error,) = raised.value.exceptions
    assert isinstance(error, PeerProtocolError)
    return str(error)


@virtual
async def test_a_number_that_waits_already_is_refused() -> None:
    assert await refused(Rig(multifd(1), [Fd()]), packet(0, 2), packet(0, 2)) == "device 0: packet 2 came twice"


@virtual
async def test_more_of_a_device_than_may_wait_is_refused_and_of_each_device_by_itself() -> None:
    """QEMU's x-migration-max-queued-buffers-size."""
    limit = 3 * len("0:1")
    early = [packet(device, number) for device in (0, 1) for number in (1, 2, 3)]
    rig = Rig(multifd(1, max_queued_bytes=limit), [Fd(), Fd()])
    async with rig.running():
        for frame in early:
            rig.channels[0].put_nowait(frame)
        await sleep_ns(1000)
        assert rig.target.counters.peak_reorder_bytes == 2 * limit
    told = await refused(Rig(multifd(1, max_queued_bytes=limit), [Fd(), Fd()]), *early, packet(1, 4))
    assert told.startswith(f"device 1: {4 * len('1:1')} bytes of it wait")
    assert f"vmm.multifd_max_queued_mib allows {limit} bytes" in told


@pytest.mark.parametrize(("max_queued_mib", "kind"), [(None, "COMPLETED"), (64.0, "COMPLETED"), (1.0, "FAILED")])
def test_a_migration_whose_data_comes_faster_than_it_is_loaded_fails_where_there_is_a_limit(
    max_queued_mib: float | None, kind: str
) -> None:
    limit = {} if max_queued_mib is None else {"vmm.multifd_max_queued_mib": max_queued_mib}
    scenario = small_scenario(AT_ONCE | {"firmware.load_mib_per_s": 50.0} | limit)
    outcome = simulate(scenario, Protocol.parse("v2-multifd", scenario), 1)
    assert outcome.kind == kind
    assert outcome.guest_runs_at == ("target" if kind == "COMPLETED" else "source")
    assert ("multifd_max_queued_mib" in outcome.reason) == (kind == "FAILED")


@virtual
async def test_a_number_that_was_written_is_refused() -> None:
    assert await refused(Rig(multifd(1), [Fd()]), packet(0, 0), packet(0, 0)) == "device 0: packet 0 came twice"


@virtual
async def test_a_number_that_is_being_written_is_refused() -> None:
    rig = Rig(multifd(1), [Fd(ns(1))])
    assert await refused(rig, packet(0, 0), packet(0, 0)) == "device 0: packet 0 came twice"


@virtual
async def test_a_second_config_is_refused() -> None:
    config = Frame(Kind.CONFIG, 0, value=0)
    assert await refused(Rig(multifd(1), [Fd()]), config, config) == "device 0: packet 0 came twice"


@virtual
async def test_devices_are_numbered_each_for_itself() -> None:
    rig = Rig(multifd(1), [Fd(), Fd()])
    async with rig.running():
        for frame in (packet(0, 0), packet(1, 0)):
            rig.channels[0].put_nowait(frame)
        await sleep_ns(1)
        assert [fd.written for fd in rig.fds] == [[b"0:0"], [b"1:0"]]


@virtual
async def test_a_packet_for_a_device_that_does_not_exist_is_refused() -> None:
    assert await refused(Rig(multifd(1), [Fd()]), packet(1, 0)) == "frame for device 1; there are 1"


ALLOWED = {Kind.RAM, Kind.SYNC, Kind.PACKET, Kind.CONFIG}


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in ALLOWED], ids=lambda kind: kind.name)
@virtual
async def test_what_does_not_belong_on_a_multifd_channel_is_refused(kind: Kind) -> None:
    told = await refused(Rig(multifd(1), [Fd()]), Frame(kind))
    assert told == f"{kind.name} does not belong on multifd channel 0"


@pytest.mark.parametrize("kind", [Kind.PACKET, Kind.CONFIG], ids=lambda kind: kind.name)
@virtual
async def test_device_state_is_refused_where_it_was_not_agreed_on(kind: Kind) -> None:
    told = await refused(Rig(multifd(1, device_state=False), [Fd()]), Frame(kind))
    assert told == f"{kind.name} does not belong on multifd channel 0"


# --- RAM and SYNC ----------------------------------------------------------------------------------------------------


@virtual
async def test_ram_counts_as_loaded_when_every_channel_that_carries_it_said_so() -> None:
    rig = Rig(multifd(3, dedicated=1), [Fd()])
    async with rig.running():
        ended = asyncio.ensure_future(rig.receivers.ram_ended())
        for channel, ram_bytes in ((1, 5000), (2, 300)):
            assert not ended.done()
            rig.channels[channel].put_nowait(pages(ram_bytes))
            rig.channels[channel].put_nowait(Frame(Kind.SYNC, value=1))
            await sleep_ns(ns(1))
        assert ended.done(), "the dedicated channel has nothing to say"
        assert rig.machine.ram_bytes == 5300


def pages(size: int) -> Frame:
    return Frame(Kind.RAM, payload=memoryview(bytes(size)))


@pytest.mark.rule("v2.vmm.21")
@virtual
async def test_no_page_of_a_pass_is_loaded_before_all_of_the_pass_before_it_is() -> None:
    """The first channel is through with the first pass, and has pages of the second; the other one is late, and so is
    the main channel."""
    rig = Rig(multifd(2), [Fd()])
    async with rig.running():
        for frame in (pages(10), Frame(Kind.SYNC, value=1), pages(100)):
            rig.channels[0].put_nowait(frame)
        await sleep_ns(ns(1))
        assert rig.machine.ram_bytes == 10
        for frame in (pages(1), Frame(Kind.SYNC, value=1), pages(200), packet(0, 0)):
            rig.channels[1].put_nowait(frame)
        await sleep_ns(ns(1))
        assert rig.machine.ram_bytes == 11, "both are synced, and RAM_PASS_END is not there"
        await rig.receivers.pass_ended(1)
        await sleep_ns(ns(1))
        assert rig.machine.ram_bytes == 311
        assert rig.fds[0].written == [b"0:0"]


@pytest.mark.rule("v2.vmm.21")
@pytest.mark.parametrize("number", [0, 2])
@virtual
async def test_a_sync_or_an_end_of_a_pass_that_is_not_due_is_refused(number: int) -> None:
    sync = Frame(Kind.SYNC, value=number)
    assert await refused(Rig(multifd(1), [Fd()]), sync) == "SYNC does not belong on multifd channel 0"
    with pytest.raises(PeerProtocolError, match=f"pass {number} over RAM ended, where 1 was due"):
        await Rig(multifd(1), [Fd()]).receivers.pass_ended(number)


@pytest.mark.rule("v2.vmm.21")
@pytest.mark.parametrize("late", [Frame(Kind.RAM, payload=memoryview(b"pages")), Frame(Kind.SYNC, value=2)])
@virtual
async def test_behind_the_last_pass_no_ram_comes_and_no_sync(late: Frame) -> None:
    rig = Rig(multifd(1), [Fd()])

    async def deliver() -> None:
        async with rig.running():
            rig.channels[0].put_nowait(Frame(Kind.SYNC, value=1))
            await rig.receivers.ram_ended()
            rig.channels[0].put_nowait(packet(0, 0))
            await sleep_ns(ns(1))
            rig.channels[0].put_nowait(late)
            await sleep_ns(ns(1))

    with pytest.raises(ExceptionGroup) as raised:
        await deliver()
    (error,) = raised.value.exceptions
    assert str(error) == f"{late.kind.name} does not belong on multifd channel 0 after SYNC 1"
    assert rig.fds[0].written == [b"0:0"]


@virtual
async def test_devices_that_do_not_take_this_way_are_not_waited_for() -> None:
    rig = Rig(multifd(1, device_state=False), [Fd()])
    async with rig.running():
        await asyncio.wait_for(rig.receivers.loaded(), 1)


# --- the source's half -----------------------------------------------------------------------------------------------


class Out:
    """A connection that takes so long for a frame, whatever its size."""

    def __init__(self, send_ns: int) -> None:
        self.sent: list[Frame] = []
        self._send_ns = send_ns

    async def send(self, frame: Frame) -> None:
        await sleep_ns(self._send_ns)
        self.sent.append(frame)

    async def send_control(self, kind: Kind, value: int = 0) -> None:
        await self.send(Frame(kind, value=value))


class Saved:
    """A device's fd with so many bytes in it."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.reads = 0

    async def read(self, max_bytes: int) -> Payload:
        size = min(max_bytes, self.left)
        self.left -= size
        self.reads += size > 0
        return memoryview(bytes(size))


@asynccontextmanager
async def sending(senders: Senders) -> AsyncIterator[None]:
    """All its threads, until everything was sent."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work, _ in senders.work()]
        yield
        await sleep_ns(ns(1000))
        for task in tasks:
            task.cancel()


def bare_side() -> Side:
    return Side(Machine(), [], None, Timeline(now_ns))  # type: ignore[arg-type]


class OneFd:
    """A source as far as a save thread knows it."""

    def __init__(self, fd: Saved) -> None:
        self.side = bare_side()
        self._fd = fd

    @property
    def now_ns(self) -> int:
        return now_ns()

    async def ready_to_drain(self, index: int) -> Saved:
        return self._fd


async def save(senders: Senders, device: int, fd: Saved, read_bytes: int) -> None:
    await senders.save_device(OneFd(fd), device, read_bytes)  # type: ignore[arg-type]


def pool(setup: Multifd, *channels: Out) -> Senders:
    return Senders(setup, channels)  # type: ignore[arg-type]


@pytest.mark.rule("v2.vmm.10")
@virtual
async def test_a_devices_data_goes_out_in_numbered_packets_with_its_config_behind_them() -> None:
    out = Out(1)
    async with sending(senders := pool(multifd(1), out)):
        await save(senders, 3, Saved(2500), 1000)
    told = [(frame.kind.name, frame.device, frame.value, len(frame.payload)) for frame in out.sent]
    assert told == [("PACKET", 3, 0, 1000), ("PACKET", 3, 1, 1000), ("PACKET", 3, 2, 500), ("CONFIG", 3, 3, 0)]


@pytest.mark.rule("v2.vmm.10")
@virtual
async def test_whoever_is_free_takes_the_next_packet() -> None:
    quick, slow = Out(10), Out(95)
    async with sending(senders := pool(multifd(2), slow, quick)):
        await save(senders, 0, Saved(19), 1)
    assert (len(quick.sent), len(slow.sent)) == (18, 2)


@virtual
async def test_nothing_is_read_ahead_while_all_channels_are_busy() -> None:
    fd = Saved(1000)
    async with sending(senders := pool(multifd(2), Out(ns(1)), Out(ns(1)))):
        saving = asyncio.ensure_future(save(senders, 0, fd, 1))
        await sleep_ns(ns(0.5))
        assert fd.reads == 3, "two on the wire, and one that waits for a channel"
        saving.cancel()


@virtual
async def test_save_threads_of_several_devices_share_the_channels_and_number_their_own_packets() -> None:
    outs = [Out(10), Out(10), Out(10)]
    async with sending(senders := pool(multifd(3), *outs)):
        await asyncio.gather(*(save(senders, device, Saved(60), 10) for device in range(2)))
    for device in range(2):
        numbers = sorted(frame.value for out in outs for frame in out.sent if frame.device == device)
        assert numbers == list(range(7))
    assert all({frame.device for frame in out.sent} == {0, 1} for out in outs)


@virtual
async def test_pages_and_sync_take_the_channels_that_are_not_dedicated() -> None:
    outs = [Out(10) for _ in range(3)]
    async with sending(senders := pool(multifd(3, dedicated=1), *outs)):
        for size in range(1, 6):
            await senders.ram.send(Frame(Kind.RAM, payload=memoryview(bytes(size))))
        await asyncio.gather(save(senders, 0, Saved(20), 10), senders.ram.sync(1))
    assert [frame.kind for frame in outs[0].sent] == [Kind.PACKET, Kind.PACKET, Kind.CONFIG]
    for out in outs[1:]:
        kinds = [frame.kind for frame in out.sent]
        assert kinds == [Kind.RAM] * (len(kinds) - 1) + [Kind.SYNC]
    assert sum(len(frame.payload) for out in outs[1:] for frame in out.sent) == 1 + 2 + 3 + 4 + 5


@virtual
async def test_sync_waits_for_ram_and_not_for_the_devices() -> None:
    """As multifd_ram_flush_and_sync: it goes behind what a channel has, not behind all that there will be."""
    outs = [Out(ns(1)), Out(ns(1))]
    async with sending(senders := pool(multifd(2), *outs)):
        saving = asyncio.ensure_future(save(senders, 0, Saved(100), 1))
        await senders.ram.send(Frame(Kind.RAM, payload=memoryview(b"pages")))
        await senders.ram.sync(1)
        assert now_ns() < ns(10), "the device has 50 ms of packets"
        await saving


# --- migrations ------------------------------------------------------------------------------------------------------

# Stopped at once: all device data is stop-copy data, and there is RAM to be sent beside it.
AT_ONCE = {
    "device.0.features": ["STOP_COPY", "P2P"],
    "device.0.state_mib": 16.0,
    "device.0.suspend_ms": 0.0,
    "device.0.quiesce_ms": 0.0,
    "ram.nonzero_gib": 0.01,
    "vmm.bandwidth_gbit_per_s": 1e6,
    "vmm.bandwidth_window_ms": 0.001,
}
"""The first round is enough to decide."""


def migrated(changes: dict[str, Any], name: str = "v2-multifd") -> tuple[Outcome, VirtualRun]:
    outcome, kept = kept_run(small_scenario(changes), name)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    return outcome, kept


def spans(outcome: Outcome, stage: str) -> list[tuple[int, int]]:
    """Start and end of a stage, of each device, in order of time."""
    return sorted((each.start_ns, each.end_ns) for each in outcome.stages if each.name == stage)


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> dict[Channel, Counter[Kind]]:
    """How many frames of each kind each end sent."""
    kinds: dict[Channel, Counter[Kind]] = {}
    original = Channel.send

    async def send(self: Channel, frame: Frame) -> None:
        kinds.setdefault(self, Counter())[frame.kind] += 1
        await original(self, frame)

    monkeypatch.setattr(Channel, "send", send)
    return kinds


@pytest.mark.parametrize(("devices", "channels"), [(2, 2), (4, 3), (3, 8)])
def test_all_channels_are_used_where_there_are_several_devices(
    devices: int, channels: int, carried: dict[Channel, Counter[Kind]]
) -> None:
    slow = {"link.per_connection_gbit_per_s": 1.0, "link.socket_buffer_mib": 1.0}
    _, kept = migrated(AT_ONCE | slow | {"device.0.count": devices, "vmm.multifd_channels": channels})
    main, *shared = [carried[channel] for channel in kept.channels]
    assert len(shared) == channels
    assert not main.keys() & {Kind.PACKET, Kind.RAM, Kind.DATA, Kind.CONFIG}
    assert all(of[Kind.PACKET] for of in shared)
    assert any(of[Kind.RAM] for of in shared)
    assert [of[Kind.SYNC] for of in shared] == [1] * channels
    assert sum(of[Kind.CONFIG] for of in shared) == devices


def test_dedicated_channels_carry_no_ram_and_the_others_nothing_else(carried: dict[Channel, Counter[Kind]]) -> None:
    counts = {"device.0.count": 3, "vmm.multifd_channels": 5, "vmm.multifd_dedicated": 2}
    _, kept = migrated(AT_ONCE | counts)
    _, *channels = [carried.get(channel, Counter()) for channel in kept.channels]
    assert all(of.keys() <= {Kind.PACKET, Kind.CONFIG} for of in channels[:2])
    assert all(of.keys() <= {Kind.RAM, Kind.SYNC} for of in channels[2:])
    assert sum(of[Kind.PACKET] for of in channels) >= 3 * 16
    assert sum(of[Kind.CONFIG] for of in channels) == 3


def test_without_device_state_the_channels_carry_ram_and_the_main_one_the_devices(
    carried: dict[Channel, Counter[Kind]],
) -> None:
    _, kept = migrated(AT_ONCE | {"vmm.multifd": True}, "v2-single")
    main, *channels = [carried[channel] for channel in kept.channels]
    assert all(of.keys() <= {Kind.RAM, Kind.SYNC} for of in channels)
    assert main[Kind.DATA] >= 16
    assert main[Kind.CONFIG] == 1
    assert not main[Kind.RAM]


def test_what_is_saved_in_pre_copy_takes_the_main_channel(carried: dict[Channel, Counter[Kind]]) -> None:
    """Only stop-copy data is multifd's (QEMU 10.0)."""
    limit = {"vmm.bandwidth_gbit_per_s": 8.0, "vmm.downtime_limit_ms": 1.0}
    outcome, kept = migrated({"device.0.stop_only_mib": 0.5} | limit)
    main, *channels = [carried[channel] for channel in kept.channels]
    assert main[Kind.DATA] >= 7
    assert 1 <= sum(of[Kind.PACKET] for of in channels) <= 2
    assert outcome.counters.peak_reorder_bytes < MIB


# Pre-copy goes on for 80 ms: RAM becomes dirty, and is passed over again and again; a device gives a little at a time.
PASSES = {
    "ram.dirty_mib_per_s": 100.0,
    "ram.working_set_mib": 4.0,
    "vmm.bandwidth_window_ms": 80.0,
    "device.0.writes": {"pattern": "uniform", "mib_per_s": 10.0},
}


@pytest.mark.rule("v2.vmm.21")
@pytest.mark.parametrize("protocol", ["v2-multifd", "v2-single", "v3-n2", "v3-n2-pool", "v3-blocks-n2-one"])
def test_each_pass_over_ram_ends_with_a_sync_on_each_channel(
    protocol: str, carried: dict[Channel, Counter[Kind]]
) -> None:
    """vmm.multifd says how RAM goes, in v2 and in v3; v3's streams have other connections, which come before."""
    _, kept = migrated(PASSES | {"vmm.multifd": True, "vmm.multifd_channels": 3}, protocol)
    main, *channels = [carried[channel] for channel in (kept.channels[0], *kept.channels[-3:])]
    streams = [carried[channel] for channel in kept.channels[1:-3]]
    assert main[Kind.RAM] == 0
    assert all(of[Kind.RAM] > 0 for of in channels)
    assert not any(of[Kind.RAM] or of[Kind.SYNC] for of in streams)
    passes = main[Kind.RAM_PASS_END]
    assert passes >= 10
    assert [of[Kind.SYNC] for of in channels] == [passes + 1] * 3, "and one behind the last pass, with RAM_END"
    assert kept.machines["source"].ram.passes >= passes


@pytest.mark.rule("v2.vmm.21")
@pytest.mark.parametrize("protocol", ["v2", "v3-n1"])
def test_where_one_channel_has_all_pages_there_is_no_sync(protocol: str, carried: dict[Channel, Counter[Kind]]) -> None:
    migrated(PASSES, protocol)
    assert not any(of[Kind.SYNC] or of[Kind.RAM_PASS_END] for of in carried.values())


@pytest.mark.rule("v2.vmm.21")
def test_a_pass_that_found_nothing_is_no_reason_not_to_pause(carried: dict[Channel, Counter[Kind]]) -> None:
    """An idle guest, and a window of 50 ms: a round each millisecond, with its SYNC."""
    idle = {"vmm.bandwidth_window_ms": 50.0, "ram.sync_ms": 0.0, "device.0.features": ["STOP_COPY", "P2P"]}
    _, kept = migrated(idle | {"device.0.state_mib": 0.1})
    assert 20 < carried[kept.channels[0]][Kind.RAM_PASS_END] < 60


@pytest.mark.parametrize("protocol", ["v2-multifd", "v3-n1-multifd"])
def test_channels_cost_their_close_in_the_downtime_and_devices_do_not_wait_for_their_sync(protocol: str) -> None:
    """The device takes longer than RAM with its sync, so that only the close is on the critical path."""
    scenario = AT_ONCE | {"vmm.multifd_channels": 4, "device.0.state_mib": 64.0}
    free, costs = (
        migrated(scenario | {f"vmm.multifd_{what}_us_per_channel": cost_us for what in ("close", "sync")}, protocol)[0]
        for cost_us in (0.0, 500.0)
    )
    assert (free.downtime_ns, costs.downtime_ns) == (free.downtime_ns, (free.downtime_ns or 0) + ns(4 * 0.5))


@pytest.mark.parametrize("channels", [2, 6])
def test_a_sync_costs_the_migration_thread_for_each_channel(channels: int) -> None:
    """In the downtime there is one, behind the last pass."""
    scenario = AT_ONCE | {"vmm.multifd_channels": channels, "ram.nonzero_gib": 0.001}
    took_ns = []
    for cost_us in (0.0, 2000.0):
        outcome, _ = migrated(scenario | {"vmm.multifd_sync_us_per_channel": cost_us})
        ((start_ns, end_ns),) = spans(outcome, "ram_save")
        took_ns.append(end_ns - start_ns)
    assert took_ns[1] - took_ns[0] == ns(2.0 * channels)


def test_ram_counts_as_loaded_only_when_all_of_it_came() -> None:
    """RAM takes 86 ms on two connections of 1 Gbit/s; RAM_END on the main channel would be there long before."""
    slow = {"link.per_connection_gbit_per_s": 1.0, "ram.nonzero_gib": 0.02, "ram.send_gib_per_s": 100.0}
    outcome, _ = migrated(AT_ONCE | slow | {"device.0.state_mib": 0.05, "link.socket_buffer_mib": 64.0})
    ((start_ns, end_ns),) = spans(outcome, "ram_load")
    assert end_ns - start_ns > ns(0.9 * 0.02 * 1024 * MIB * 8 / 2e9 * 1e3)


def test_ram_is_told_to_be_saved_when_it_is_and_not_when_the_devices_are() -> None:
    slow = {"link.gbit_per_s": 2.0, "link.per_connection_gbit_per_s": 1.0, "link.socket_buffer_mib": 1.0}
    outcome, _ = migrated(AT_ONCE | slow | {"ram.nonzero_gib": 0.001, "device.0.state_mib": 64.0})
    ((_, ram_ns),) = spans(outcome, "ram_save")
    ((start_ns, device_ns),) = spans(outcome, "device_save")
    assert ram_ns - start_ns < (device_ns - start_ns) / 4, "a MiB of pages beside 64 of the device"


@pytest.mark.rule("v2.vmm.20")
@pytest.mark.parametrize("devices", [1, 3])
def test_all_save_threads_copy_one_packet_at_a_time_where_a_copy_costs(devices: int) -> None:
    """A quarter of a GiB a second: 16 MiB of a device take 62.5 ms, those of three devices three times as long."""
    outcome, _ = migrated(AT_ONCE | {"device.0.count": devices, "vmm.multifd_copy_gib_per_s": 0.25})
    saves = spans(outcome, "device_save")
    copies_ns = devices * ns(62.5)
    assert copies_ns < max(end for _, end in saves) - saves[0][0] < copies_ns + ns(30)
    assert len(saves) == devices
    assert all(end > start for (_, end), (start, _) in pairwise(saves)), "they take turns packet by packet"


@pytest.mark.rule("v2.vmm.20")
def test_without_a_cost_of_the_copy_save_threads_do_not_wait_for_each_other() -> None:
    """That is the default: three devices take no longer than one, on a link and with engines that are wide enough."""
    wide = {"link.gbit_per_s": 1000.0, "link.per_connection_gbit_per_s": 1000.0, "firmware.engines": 3}
    took_ns = []
    for devices in (1, 3):
        outcome, _ = migrated(AT_ONCE | wide | {"device.0.count": devices, "vmm.multifd_channels": 8})
        saves = spans(outcome, "device_save")
        took_ns.append(max(end for _, end in saves) - saves[0][0])
    assert took_ns[1] < 1.2 * took_ns[0]


@pytest.mark.rule("v2.vmm.20")
@virtual
async def test_the_targets_channels_copy_a_devices_packets_one_at_a_time_and_those_of_devices_at_once() -> None:
    rig = Rig(multifd(4, copies=True), [Fd(), Fd()])
    async with rig.running():
        for channel, frame in enumerate((packet(0, 0), packet(0, 1), packet(1, 0), packet(1, 1))):
            rig.channels[channel].put_nowait(frame)
        for copied in (0, 1, 2):
            await sleep_ns(ns(COPY_MS) + 1 - now_ns() % ns(COPY_MS) if copied else 1)
            assert [len(fd.written) for fd in rig.fds] == [copied, copied]


@pytest.mark.rule("v2.vmm.20")
def test_both_sides_copies_are_in_the_downtime() -> None:
    """16 MiB at 0.25 GiB/s are 62.5 ms at the source; the target's copies go on beside them, but for the last one."""
    fast = {"firmware.save_mib_per_s": 1e6, "firmware.load_mib_per_s": 1e6, "host.copy_gib_per_s": 16.0}
    wide = {"link.gbit_per_s": 1000.0, "link.per_connection_gbit_per_s": 1000.0, "ram.nonzero_gib": 0.001}
    plain, copied = (migrated(AT_ONCE | fast | wide | cost)[0] for cost in ({}, {"vmm.multifd_copy_gib_per_s": 0.25}))
    assert plain.downtime_ns is not None
    assert copied.downtime_ns is not None
    a_packet_ms = 1000 / 1024 / 0.25
    assert copied.downtime_ns - plain.downtime_ns == pytest.approx(ns(16 * a_packet_ms + a_packet_ms), abs=ns(1.5))


@pytest.mark.rule("v2.vmm.20")
@pytest.mark.parametrize("name", ["v2-multifd", "v2-multifd-early"])
def test_who_waits_for_the_mutex_goes_on_because_of_what_its_holder_did(name: str) -> None:
    """Of four devices, whose copies are slow beside their saves, each one's thread waits for the others'."""
    slow = {"device.0.count": 4, "vmm.multifd_copy_gib_per_s": 0.5, "vmm.multifd_channels": 4, "firmware.engines": 4}
    outcome, _ = migrated(AT_ONCE | slow | {"firmware.service_cv": 0.3}, name)
    assert outcome.critical_path_ns["copy"] > 0.8 * 4 * ns(16 * 1000 / 1024 / 0.5)
    assert outcome.critical_path_ns["unexplained"] == 0


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_shut_down_before_the_guest_starts(channels: int) -> None:
    scenario = AT_ONCE | {"vmm.multifd_channels": channels}
    plain, closed = (
        migrated(scenario | {"vmm.multifd_close_us_per_channel": cost_us})[0].downtime_ns for cost_us in (0.0, 500.0)
    )
    assert plain is not None
    assert closed is not None
    assert closed - plain == ns(0.5 * channels)


@virtual
async def test_ram_does_not_wait_for_the_mutex_of_the_save_threads() -> None:
    outs = [Out(ns(1)), Out(ns(1))]
    async with sending(senders := pool(multifd(2, copies=True), *outs)):
        saving = [asyncio.ensure_future(save(senders, device, Saved(5), 1)) for device in (0, 1)]
        for _ in range(5):
            await senders.ram.send(Frame(Kind.RAM, payload=memoryview(b"pages")))
        await senders.ram.sync(1)
        assert now_ns() < ns(7)
        assert not any(each.done() for each in saving)
        await asyncio.gather(*saving)
        assert now_ns() >= ns(10 * COPY_MS), "10 packets of two devices, one after the other"


@pytest.mark.rule("v2.vmm.10")
@pytest.mark.parametrize(("threads", "at_once"), [(1, False), (0, True), (3, True)])
def test_one_load_thread_loads_one_device_after_the_other(threads: int, at_once: bool) -> None:
    outcome, _ = migrated(AT_ONCE | {"device.0.count": 3, "vmm.multifd_load_threads": threads})
    loads = spans(outcome, "load_total")
    assert len(loads) == 3
    assert all((end > start) == at_once for (_, end), (start, _) in pairwise(loads))


def test_two_load_threads_load_two_devices_at_once_and_never_three() -> None:
    outcome, _ = migrated(AT_ONCE | {"device.0.count": 5, "vmm.multifd_load_threads": 2})
    loads = spans(outcome, "load_total")
    most = max(sum(start <= at < end for start, end in loads) for at, _ in loads)
    assert most == 2


@pytest.mark.rule("v2.vmm.10")
@pytest.mark.parametrize("load", ["device_threads", "channel_threads"])
def test_config_is_loaded_one_device_at_a_time(load: str) -> None:
    outcome, _ = migrated(AT_ONCE | {"device.0.count": 4, "vmm.multifd_load": load})
    ends = [end for _, end in sorted(spans(outcome, "config_load"), key=lambda span: span[1])]
    assert len(ends) == 4
    assert min(late - early for early, late in pairwise(ends)) >= ns(3)


def test_a_devices_stages_tell_of_its_load_thread() -> None:
    outcome, _ = migrated(AT_ONCE | {"device.0.count": 2})
    stages = {(stage.name, stage.index): stage.end_ns - stage.start_ns for stage in outcome.stages}
    for device in (0, 1):
        total = stages["load_total", device]
        assert stages["load_writing", device] + stages["load_waiting", device] == total
        assert 0 < stages["load_writing", device] <= total
        assert stages["config_load", device] >= ns(3)


def test_it_is_as_parallel_as_there_are_devices_however_many_channels() -> None:
    """LOAD binds, two engines: two devices take half as long as in turn; more channels add nothing."""
    bound = AT_ONCE | {"firmware.load_mib_per_s": 200.0, "firmware.load_finish_ms": 0.0, "ram.nonzero_gib": 0.0}

    def downtime_ms(name: str, devices: int, channels: int) -> float:
        counts = {"device.0.count": devices, "vmm.multifd_channels": channels}
        return (migrated(bound | counts, name)[0].downtime_ns or 0) / 1e6

    load_ms = 16 / 200 * 1e3
    assert downtime_ms("v2", 2, 2) - downtime_ms("v2", 1, 2) > 0.9 * load_ms
    assert downtime_ms("v2-multifd", 2, 2) - downtime_ms("v2-multifd", 1, 2) < 0.2 * load_ms
    assert downtime_ms("v2-multifd", 1, 8) == pytest.approx(downtime_ms("v2-multifd", 1, 1), rel=0.02)
    assert downtime_ms("v2-multifd", 2, 8) == pytest.approx(downtime_ms("v2-multifd", 2, 2), rel=0.02)


# Which part is slow: loading, the network, saving, nothing in particular.
SLOW: dict[str, dict[str, Any]] = {
    "load": {"firmware.load_mib_per_s": 200.0},
    "link": {"link.gbit_per_s": 2.0, "link.per_connection_gbit_per_s": 1.0, "link.socket_buffer_mib": 1.0},
    "save": {"firmware.save_mib_per_s": 200.0},
    "nothing": {},
}


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize(("devices", "channels"), [(1, 1), (1, 4), (2, 2), (4, 2), (3, 8)])
def test_a_thread_that_loads_and_receives_is_never_faster_than_two(devices: int, channels: int, slow: str) -> None:
    machine = AT_ONCE | SLOW[slow] | {"device.0.count": devices, "vmm.multifd_channels": channels}
    own, coupled = (
        migrated(machine | {"vmm.multifd_load": load})[0].downtime_ns for load in ("device_threads", "channel_threads")
    )
    assert own is not None
    assert coupled is not None
    # Packets of several devices interleave otherwise, and so one of them may be through a little sooner.
    assert own <= (1.0 if devices == 1 else 1.01) * coupled


def test_a_coupled_channel_costs_where_loading_is_slow() -> None:
    machine = AT_ONCE | SLOW["load"] | {"device.0.count": 4, "vmm.multifd_channels": 2, "firmware.engines": 4}
    own, coupled = (
        migrated(machine | {"vmm.multifd_load": load})[0].downtime_ns or 0
        for load in ("device_threads", "channel_threads")
    )
    assert coupled > 1.5 * own


@settings(max_examples=60)
@given(
    devices=st.integers(1, 4),
    channels=st.integers(1, 8),
    dedicated=st.integers(0, 3),
    load=st.sampled_from(
        [{"vmm.multifd_load": "channel_threads"}, *({"vmm.multifd_load_threads": n} for n in (0, 1, 2))]
    ),
    slow=st.sampled_from(sorted(SLOW)),
    pre_copy=st.booleans(),
)
def test_the_target_has_the_sources_state_however_the_packets_went(
    devices: int, channels: int, dedicated: int, load: dict[str, Any], slow: str, pre_copy: bool
) -> None:
    features = {"device.0.features": ["STOP_COPY", "P2P", "PRE_COPY"]} if pre_copy else {}
    counts = {"vmm.multifd_channels": channels, "vmm.multifd_dedicated": min(dedicated, channels - 1)}
    machine = AT_ONCE | SLOW[slow] | load | features | counts
    writes = {"device.0.writes": {"pattern": "uniform", "mib_per_s": 200.0}, "vmm.downtime_limit_ms": 0.0005}
    outcome, kept = migrated(machine | writes | {"device.0.state_mib": 5.0, "device.0.count": devices})
    for image, state in zip(kept.images, kept.states, strict=True):
        assert not image.differences(state)
    assert outcome.critical_path_ns["unexplained"] == 0
    assert sum(outcome.phases_ns.values()) == outcome.downtime_ns
    assert 0 <= outcome.counters.peak_reorder_bytes <= outcome.counters.device_bytes


def test_what_waits_at_the_target_is_more_where_nothing_holds_the_channels_up() -> None:
    """QEMU's default is no bound: where loading is slow, most of the device waits. A coupled channel waits instead."""
    machine = AT_ONCE | SLOW["load"] | {"vmm.multifd_channels": 4}
    own, coupled = (
        migrated(machine | {"vmm.multifd_load": load})[0].counters.peak_reorder_bytes
        for load in ("device_threads", "channel_threads")
    )
    assert 12 * MIB < own <= 16 * MIB + 1000
    assert MIB <= coupled < own * 3 / 4


def test_a_single_channel_needs_no_reordering() -> None:
    outcome, _ = migrated(AT_ONCE, "v2")
    assert outcome.counters.peak_reorder_bytes == 0
