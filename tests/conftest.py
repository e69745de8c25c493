"""Settings for all tests: properties are tried on the same examples each time, and none is judged by its speed."""

from __future__ import annotations

import pytest
from hypothesis import settings

from proto_v3.timeline import NO_CAUSE, caused_by, on_track

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fresh_cursor() -> None:
    """No test starts where another one's timeline ended."""
    caused_by(NO_CAUSE)
    on_track("main")
