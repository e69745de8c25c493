# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings for all tests: properties are tried on the same examples each time, and none is judged by its speed.

`--quick` runs one case of each test, all cases of those that are marked `quick`, and none of those that are marked
`slow`. All that are marked begin first, so that no process is left to work alone at the end.

The tests of v2's driver run twice: on devices that know v3 and were never asked for it, and on devices that were opted
in and out. (test_v2_on_v3.py compares whole migrations on both.)
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
from typing import Any

import pytest
from hypothesis import settings

from proto_v3.timeline import NO_CAUSE, caused_by, on_track
from sim.device.driver import SimDriver

V2_SUITE = {"test_driver", "test_v2_device_model"}
FACES = ["v3 device", "opted in and out"]

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what it does not wait for
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores: live tests mostly wait."""
    return len(os.sched_getaffinity(0)) + 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each test, and none that is marked slow")


def begins_first(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in ("slow", "quick"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        chosen: dict[str, pytest.Item] = {}
        for item in items:
            if item.get_closest_marker("slow") is None:
                name = item.nodeid if item.get_closest_marker("quick") else item.nodeid.partition("[")[0]
                chosen.setdefault(name, item)
        kept = set(chosen.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen.values()
    items.sort(key=begins_first, reverse=True)
    # Each process begins with a part of the list: deal the files out, so that each has some of the slow tests.
    files = [list(each) for _, each in itertools.groupby(items, lambda item: (begins_first(item), item.path))]
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [item for first in range(processes) for file in files[first::processes] for item in file]


def pytest_collection_finish() -> None:
    """What was collected stays to the end: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_cursor() -> None:
    """No test starts where another one's timeline ended."""
    caused_by(NO_CAUSE)
    on_track("main")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in V2_SUITE:
        metafunc.fixturenames.append("device_face")
        metafunc.parametrize("device_face", FACES, indirect=True)


@pytest.fixture
def device_face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happened to each device before the test has it."""
    if request.param == "v3 device":
        return
    make = SimDriver.__init__

    def opted_in_and_out(self: SimDriver, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for streams in (min(4, self.spec.max_dirty_streams), 0):
            with contextlib.suppress(StopIteration, OSError):  # ENOTTY: a device that knows v2 only
                self.set_streams(streams).send(None)  # it never waits

    monkeypatch.setattr(SimDriver, "__init__", opted_in_and_out)
