# SPDX-License-Identifier: GPL-2.0-or-later
"""Digests of whole traces, committed: a change of behaviour is seen, and owned by writing the new ones down.

After a change that is meant, put the digests that the failing test prints into data/fingerprints.json.
"""

import json
from pathlib import Path

import pytest

from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol

FINGERPRINTS = json.loads((Path(__file__).parents[1] / "data" / "fingerprints.json").read_text(encoding="utf-8"))


@pytest.mark.quick
@pytest.mark.parametrize(("scenario", "protocol"), [key.split() for key in FINGERPRINTS])
def test_the_trace_is_the_one_that_was_committed(scenario: str, protocol: str) -> None:
    loaded = load(scenario)
    outcome = simulate(loaded, Protocol.parse(protocol, loaded), seed=1)
    assert outcome.digest == FINGERPRINTS[f"{scenario} {protocol}"]
