"""Settings for all tests: properties are tried on the same examples each time, and none is judged by its speed.

What tests v2 runs twice: on devices that know v3 and were never asked for it, and on such that were opted in and out.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import settings

from proto_v3.timeline import NO_CAUSE, caused_by, on_track
from sim.device.driver import SimDriver

V2_SUITE = {
    "test_v2",
    "test_v2_device_model",
    "test_precopy_info",
    "test_multifd",
    "test_driver",
    "test_save",
    "test_load",
}
FACES = ["v3 device", "opted in and out"]

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


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
        for streams in (min(4, self._spec.max_dirty_streams), 0):
            with contextlib.suppress(StopIteration, OSError):  # ENOTTY: a device that knows v2 only
                self.set_streams(streams).send(None)  # it never waits

    monkeypatch.setattr(SimDriver, "__init__", opted_in_and_out)
