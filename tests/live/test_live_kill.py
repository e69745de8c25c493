# SPDX-License-Identifier: GPL-2.0-or-later
"""Live mode when processes die: nobody hangs, nothing is left over, two guests never run, and the reason is said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proto_v3.vmm.migration import OutcomeKind
from sim.live.processes.children import Child
from sim.live.processes.settings import Settings
from sim.live.result import LiveResult
from tests.build import live
from tests.build.live import (
    HANG_S,
    PROCESSES,
    PROTOCOLS,
    Act,
    Seen,
    children_of,
    fork_server,
    hit,
    live_run,
    open_fds,
    stat,
    two_hosts,
)

ROOT = Path(__file__).parents[2]

MOMENTS = {
    "set-up": (None, 0.0, 0.15),
    "pre-copy": (("source", True), 0.0, 0.1),  # it begins 50 ms after the guest was said to run
    "stop": (("source", False), 0.0, 0.025),  # drain, load, hand-over
    "resume": (("target", True), 0.0, 0.01),
    "after": (("target", True), 0.005, 0.06),
}
"""When a process is killed: what has just happened then, and the least and most seconds after that."""
LOST = "the target may run the guest, but did not say so"
ENDS = {
    "source VMM": ["the guest is gone with the source VMM", "the guest runs at the target"],
    "source device": [
        "the guest runs on at the source, without its devices",
        "the guest is stopped at the source",
        "the guest runs at the target",
    ],
    "target VMM": [
        "the guest runs on at the source",
        "the guest is stopped at the source",
        "the guest ran at the target, and is gone with its VMM",
        "the guest ran at the target, which was not heard of since",
    ],
    "target device": [
        "the guest runs on at the source",
        "the guest is stopped at the source",
        "the guest runs at the target, without its devices",
    ],
}
"""What can have become of the guest when this process was killed."""
WHERE = {
    **dict.fromkeys((each for ends in ENDS.values() for each in ends), ""),
    "the guest runs on at the source": "source",
    "the guest runs at the target": "target",
}
"""Where it runs then, with its devices."""
MUCH = {"device.0.state_mib": 128.0, "firmware.save_mib_per_s": 4096.0, "firmware.load_mib_per_s": 400.0}
"""More than all buffers on the way hold, and faster saved than loaded."""
SILENT_S = max(2.0, os.getloadavg()[0])
"""Not too soon: a healthy process that gets no time for so long is taken for one that hangs, on a busy machine too."""
SOON = Settings(silent_s=SILENT_S, handshake_s=2.5 * SILENT_S)


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """The fork server and the resource tracker are there from the first run on, and stay."""
    asyncio.run(live_run("v2"))


def nothing_left(seen: Seen, before: dict[int, str]) -> None:
    """No process, zombies included, and no descriptor of the run is there any more."""
    assert open_fds() == before
    assert len(seen.children) == 4
    left = children_of(fork_server())
    assert not left
    for child in seen.children.values():
        assert child.ended.done()


def never_two(result: LiveResult, seen: Seen) -> None:
    """At no time two guests ran."""
    assert result.outcome.guest_runs_at in ("", "source", "target")
    ran = seen.intervals_ns(result)
    for source_began, source_ended in ran["source"]:
        for target_began, target_ended in ran["target"]:
            assert source_ended < target_began or target_ended < source_began, ran


async def clean_run(protocol: str) -> None:
    """A run works, after whatever came before."""
    before = open_fds()
    result, seen = await live_run(protocol)
    assert result.outcome.kind is OutcomeKind.COMPLETED, result.outcome.reason
    assert result.outcome.guest_runs_at == "target"
    assert not result.deaths
    nothing_left(seen, before)
    never_two(result, seen)


def said(victim: str, how: str, result: LiveResult) -> None:
    """The outcome says who died, and what became of the guest; or all was done by then."""
    outcome = result.outcome
    if outcome.kind is OutcomeKind.COMPLETED:
        return
    assert outcome.kind is OutcomeKind.FAILED
    assert how in outcome.reason
    assert outcome.reason.endswith(tuple(ENDS[victim])), outcome.reason
    if victim.startswith("target") and outcome.reason.endswith("the guest is stopped at the source"):
        assert LOST in outcome.reason
    assert outcome.guest_runs_at == WHERE[outcome.reason.rpartition("; ")[2]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("victim", PROCESSES)
def test_a_process_is_killed(victim: str, protocol: str) -> None:
    """At every other moment: at each of them each process is killed, under every other protocol."""
    draw = random.Random(f"{victim} {protocol}")
    first = (list(PROCESSES).index(victim) + list(PROTOCOLS).index(protocol)) % 2
    killed = 0

    async def killed_at(moment: str) -> None:
        nonlocal killed
        hits: list[bool] = []
        before = open_fds()
        act = at(moment, draw, lambda seen: hits.append(hit(seen.children[victim])))
        result, seen = await live_run(protocol, act, seed=draw.randrange(1000))
        nothing_left(seen, before)
        never_two(result, seen)
        if not any(hits):
            assert result.outcome.kind is OutcomeKind.COMPLETED, result.outcome.reason
        else:
            killed += 1
            said(victim, f"the {victim} (process {seen.children[victim].pid}) was killed by SIGKILL", result)

    async def all_moments() -> None:
        for moment in list(MOMENTS)[first::2]:
            await killed_at(moment)
        await clean_run(protocol)

    asyncio.run(all_moments())
    assert killed >= 1  # in the end it may be too late


def at(moment: str, draw: random.Random, act: Callable[[Seen], object]) -> Act:
    """Do something at a moment that is drawn."""
    after, least_s, most_s = MOMENTS[moment]
    delay_s = draw.uniform(least_s, most_s)

    async def acts(seen: Seen) -> None:
        if after is not None:
            await seen.until(*after)
        await asyncio.sleep(delay_s)
        act(seen)

    return acts


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [*PROTOCOLS, "v3-n2-one"])
def test_a_target_fails_that_the_source_has_more_for(protocol: str) -> None:
    """Its device hangs until all connections are full, and is killed then: the source still gets rid of its CANCEL."""

    async def fill_and_kill(seen: Seen) -> None:
        await seen.until("source", True)
        await asyncio.sleep(0.1)
        assert hit(seen.children["target device"], signal.SIGSTOP)
        await asyncio.sleep(1.0)
        assert hit(seen.children["target device"])

    async def run() -> LiveResult:
        before = open_fds()
        result, seen = await live_run(protocol, fill_and_kill, changes=MUCH)
        nothing_left(seen, before)
        return result

    outcome = asyncio.run(run()).outcome
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason.endswith("was killed by SIGKILL; the guest runs on at the source")


def test_a_target_hangs_before_the_source_has_reached_it() -> None:
    """The source gives up first: that the target hung is still told."""

    async def hang(seen: Seen) -> None:
        assert hit(seen.children["target VMM"], signal.SIGSTOP)

    async def run() -> None:
        result, seen = await live_run("v2", hang, settings=replace(SOON, handshake_s=0.5))
        never_two(result, seen)
        pid = seen.children["target VMM"].pid
        said("target VMM", f"the target VMM (process {pid}) did not answer, and was killed", result)

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["set-up", "pre-copy", "stop", "resume"])
def test_a_process_hangs(moment: str) -> None:
    """One that is stopped is not dead: nothing is closed, and no process ends. The others find out in their ways."""
    draw = random.Random(moment)

    async def hangs(victim: str) -> None:
        hits: list[bool] = []
        act = at(moment, draw, lambda seen: hits.append(hit(seen.children[victim], signal.SIGSTOP)))
        result, seen = await live_run(draw.choice(PROTOCOLS), act, settings=SOON)
        never_two(result, seen)
        if any(hits):
            said(victim, f"the {victim} (process {seen.children[victim].pid}) did not answer, and was killed", result)
        ended.update(seen.children)

    async def all_hang() -> None:
        before = open_fds()
        await asyncio.gather(*(hangs(victim) for victim in PROCESSES))
        assert open_fds() == before
        assert not children_of(fork_server())
        await clean_run("v3-n2")

    ended: dict[str, Child] = {}
    asyncio.run(all_hang())
    assert len(ended) == 4


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["pre-copy", "stop", "resume"])
def test_a_process_hangs_for_a_while(moment: str) -> None:
    """One that is given up, and then goes on: it must not run a guest that runs elsewhere by now."""
    draw = random.Random(moment)

    async def hangs(victim: str) -> None:
        def stop(seen: Seen) -> None:
            child = seen.children[victim]
            if hit(child, signal.SIGSTOP):
                asyncio.get_running_loop().call_later(1.5 * SOON.silent_s, hit, child, signal.SIGCONT)

        # On a busy machine it hangs for longer than a migration may take, which would be the first to end this one.
        patient = {"vmm.give_up_s": 20.0 + 3 * SOON.silent_s}
        result, seen = await live_run(draw.choice(PROTOCOLS), at(moment, draw, stop), settings=SOON, changes=patient)
        never_two(result, seen)
        guest = result.outcome.reason.rpartition("; ")[2]
        if result.outcome.kind is not OutcomeKind.COMPLETED:
            assert result.outcome.guest_runs_at == WHERE[guest]

    async def all_hang() -> None:
        before = open_fds()
        await asyncio.gather(*(hangs(victim) for victim in PROCESSES))
        assert open_fds() == before
        assert not children_of(fork_server())

    asyncio.run(all_hang())


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["target VMM", "target device"])
def test_a_process_of_the_other_host_is_killed(victim: str) -> None:
    """The source's supervisor sees nothing of it; its own processes find out."""
    draw = random.Random(victim)

    def kill(seen: Seen) -> None:
        for pid, told in children_of(fork_server()).items():
            if told[0] == victim.replace(" ", "-"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def killed_at(moment: str) -> None:
        before = open_fds()
        result, end = await two_hosts(draw.choice(PROTOCOLS), at(moment, draw, kill))
        assert open_fds() == before
        assert not children_of(fork_server())
        assert not result.deaths
        outcome, guest = result.outcome, result.outcome.reason.rpartition("; ")[2]
        if outcome.kind is OutcomeKind.COMPLETED:  # it had told all by then
            return
        assert outcome.kind is OutcomeKind.FAILED
        assert any(f"the {victim} (process " in death for death in end.deaths)
        assert guest in ENDS[victim]
        assert guest != "the guest is stopped at the source" or LOST in outcome.reason
        assert outcome.guest_runs_at == WHERE[guest]

    async def all_moments() -> None:
        for moment in ("pre-copy", "stop", "stop", "stop"):
            await killed_at(moment)

    asyncio.run(all_moments())


@pytest.mark.slow
@pytest.mark.parametrize("cancels", [1, 2])
def test_a_run_that_is_cancelled_leaves_nothing(cancels: int) -> None:
    """Once, as by Ctrl-C; or again, while it sees to the end of its processes."""
    draw = random.Random(cancels)

    async def cancelled_at(moment: str) -> None:
        before = open_fds()
        task: asyncio.Task[object] | None = None
        there: list[Seen] = []

        def cancel(seen: Seen) -> None:
            there.append(seen)
            assert task is not None
            task.cancel()
            if cancels > 1:
                asyncio.get_running_loop().call_soon(task.cancel)

        task = asyncio.create_task(live_run(draw.choice(PROTOCOLS), at(moment, draw, cancel)))
        await asyncio.wait([task])
        assert task.cancelled() or not there
        for seen in there:
            nothing_left(seen, before)

    async def all_moments() -> None:
        for moment in MOMENTS:
            await cancelled_at(moment)
        await clean_run("v2-multifd")

    asyncio.run(all_moments())


# --- the supervisor ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def supervisor() -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """A process that supervises runs, one after the other; and those below it, by name."""
    command = [sys.executable, "-u", "-m", live.__name__]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def all_end(below: dict[str, int]) -> bool:
    """Whether all of them end. One that nobody waits for, for its parent is dead, may be a zombie for as long as the
    host's first process likes."""
    until = time.monotonic() + HANG_S
    while left := [told for pid in below.values() if (told := stat(pid)) is not None and told[1] != "Z"]:
        if time.monotonic() > until:
            print(left)
            return False
        time.sleep(0.01)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_supervisor_is_killed(seed: int) -> None:
    with supervisor() as (process, below):
        assert len(below) == 6
        time.sleep(random.Random(seed).uniform(0.0, 0.3))
        process.kill()
        process.wait()
        assert all_end(below)


@pytest.mark.slow
def test_the_supervisor_is_killed_while_its_processes_hang() -> None:
    with supervisor() as (process, below):
        for name in PROCESSES:
            while (told := stat(below[name])) is not None and told[0] == "python":
                time.sleep(0.001)  # it is not ready for that before it has its name
            with contextlib.suppress(ProcessLookupError):
                os.kill(below[name], signal.SIGSTOP)
        process.kill()
        process.wait()
        assert all_end(below)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_ctrl_c_ends_all_without_a_word(delay_s: float) -> None:
    """It goes to all processes of a terminal."""
    with supervisor() as (process, below):
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
        assert all_end(below)
        assert process.returncode == 130
        assert errors == ""
