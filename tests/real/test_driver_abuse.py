# SPDX-License-Identifier: GPL-2.0-or-later
"""What must not break the sample driver: noise, races, a user who is killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proto_v3.vfio.uapi import State, StreamFlags
from tests.real.mdev import SampleMdev
from tests.real.sample import MakeOpen, SampleDevice, errno_of, in_thread

S = State
LONG_S = 10.0
MakeSample = Callable[..., SampleMdev]


@pytest.mark.lockdep
@pytest.mark.parametrize("kind", ["v2", "streams", "blocks"])
def test_no_bytes_break_it(make_open: MakeOpen, kind: str) -> None:
    """Real records with bytes changed or cut, and noise. The device takes them or ends in ERROR, and a reset helps."""
    rng = random.Random(kind)
    source, target = make_open(size_kib=256, chunk_kib=64), make_open(size_kib=256, chunk_kib=64)
    streams = {"v2": 0, "streams": 2, "blocks": 1}[kind]
    flags = StreamFlags.BLOCKS if kind == "blocks" else StreamFlags(0)
    out = source.begin_all(S.PRE_COPY, streams, flags)
    data = [fd.read_all() for fd in out]
    if kind == "streams":
        source.reconfigure("invalidate 0 5")
        data = [part + fd.read_all() for part, fd in zip(data, out, strict=True)]
    if kind == "blocks":
        data[1] = out[1].read_blocks(0, 4, 16384)
    answers: set[str] = set()
    for _ in range(150):
        into = target.begin_all(S.RESUMING, streams, flags)
        for fd, whole in sorted(zip(into, data, strict=True), key=lambda _: rng.random()):
            fd.nonblocking()
            for piece in spoilt(rng, whole):
                answers.add(errno_of(fd.write, piece))
        answers.add(errno_of(target.set_state, S.STOP))
        target.reset()
        for fd in into:
            fd.close()
    refusals = "EXDEV EALREADY EILSEQ EPROTO E2BIG EBADMSG EINVAL"
    assert answers <= {"ok", "EAGAIN", "EIO", "ENODATA", *refusals.split()}
    assert len(answers) >= 3


def spoilt(rng: random.Random, data: bytes) -> list[bytes]:
    """Pieces of the data with a few errors."""
    found = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 3, 50))):
        at = rng.choice((rng.randrange(48), rng.randrange(len(found))))
        found[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, found[at] ^ 1 << rng.randrange(8)))
    match rng.randrange(5):
        case 0:
            found = found[: rng.randrange(len(found))]
        case 1:
            found[rng.randrange(len(found)) :] = rng.randbytes(100)
    pieces, at = [], 0
    while at < len(found):
        size = rng.choice((1, 7, 31, 32, 40, 4096, 1 << 20))
        pieces.append(bytes(found[at : at + size]))
        at += size
    return pieces


@pytest.mark.lockdep
def test_everything_at_once(make_open: MakeOpen) -> None:
    """Readers, a guest, changes of state, resets, fds that come and go, for a while. Then a migration still works."""
    source, target = make_open(command_us=200, dirty_kib_s=2000, lock="device"), make_open()
    stop = threading.Event()
    seen: set[str] = set()

    def play(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            call = rng.choice((
                lambda: source.set_state(rng.choice(list(S))),
                lambda: source.begin(S.PRE_COPY).read(1 << 20),
                lambda: [fd.read(70_000) for fd in source.begin_all(S.PRE_COPY, 3)],
                lambda: [fd.stream_info() for fd in source.begin_all(S.STOP_COPY, 2)],
                lambda: source.begin_all(S.PRE_COPY, 1, StreamFlags.BLOCKS)[1].read_blocks(0, 3, 16384),
                lambda: source.begin_all(S.RESUMING, 2)[rng.randrange(3)].nonblocking().write(rng.randbytes(100)),
                lambda: source.dirty(rng.randrange(64)),
                lambda: source.reconfigure(rng.choice(("keep", "invalidate 0 9"))),
                source.data_size,
                source.digest,
                source.reset,
            ))  # fmt: skip
            try:
                call()
            except OSError as error:
                seen.add(error.strerror or "")
            except AssertionError:
                pass  # somebody else has the session

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert seen
    source.reset()
    out, into = source.begin(S.STOP_COPY), target.begin(S.RESUMING)
    into.write_all(out.read_all())
    target.set_state(S.STOP)
    assert target.digest() == source.digest()


@pytest.mark.lockdep
@pytest.mark.parametrize("state", [S.PRE_COPY, S.STOP_COPY, S.RESUMING])
@pytest.mark.parametrize("streams", [0, 4])
def test_a_killed_user_leaves_nothing_behind(make_sample: MakeSample, state: State, streams: int) -> None:
    """A process with everything open, and threads in read() or write(), is killed: the device is as new."""
    mdev = make_sample(size_kib=1024, command_us=30_000_000)
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            users = SampleDevice(mdev)
            for fd in users.begin_all(state, streams):
                in_thread(fd.write, b"x" * 40) if state is S.RESUMING else in_thread(fd.read, 10)
            os.write(into, b"ready")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(into)
    assert os.read(out, 5) == b"ready"
    os.close(out)
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    with contextlib.closing(SampleDevice(mdev)) as device:
        assert device.state() is S.RUNNING
        assert "close -> 0" in [line.text for line in device.log()]
    mdev.remove()


def test_the_module_stays_while_an_fd_is_open_and_goes_then(make_sample: MakeSample) -> None:
    mdev = make_sample(size_kib=1024)
    device = SampleDevice(mdev)
    out = device.begin(S.PRE_COPY)
    device.close()
    mdev.remove()
    references = Path("/sys/module/vfio_v3_sample/refcnt")
    with_fd = int(references.read_text())
    out.close()
    assert int(references.read_text()) == with_fd - 1
