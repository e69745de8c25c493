# SPDX-License-Identifier: GPL-2.0-or-later
"""What is assumed, fitted or derived and has no range moves no conclusion: each such number is moved by a quarter, and
the downtimes of v2 and v3, and what they are to one another, stay within 2 %.

`python -m tests.sim.test_range_coverage [SCENARIO ...]` does it for all scenarios, which takes half an hour.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from itertools import combinations
from statistics import mean
from typing import Any

import pydantic
import pytest

from proto_v3.vmm.migration import OutcomeKind
from sim.run import simulate
from sim.scenario.file import load, moved_to
from sim.scenario.protocol import Protocol
from sim.scenario.ranges import without_range
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.shipped import shipped

PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4")
MOVED, SEEN = 0.25, 0.02
SEEDS = range(1, 7)
MADE = [name for name in shipped() if name.startswith("live-")]
"""Made for a live run of a second on two cores: they say nothing of a machine, and no conclusion is drawn from them."""
ALONE = {
    "device.0.critical.objects": "they are set up one by one, so that the range of setup_us is that of the product",
    "vmm.give_up_s": "when a user loses patience",
}
"""Keys that say nothing by themselves."""
Downtimes = dict[str, float | None]


@functools.cache
def _as_it_is(name: str, seeds: int) -> Downtimes:
    return _downtimes(load(name), seeds)


def _downtimes(scenario: Scenario, seeds: int) -> Downtimes:
    """By protocol, the mean in ns; None if a run was not completed."""
    found: Downtimes = {}
    for protocol in PROTOCOLS:
        outcomes = [simulate(scenario, Protocol.parse(protocol, scenario), seed) for seed in SEEDS[:seeds]]
        all_of_them = all(each.kind is OutcomeKind.COMPLETED for each in outcomes)
        found[protocol] = mean(each.downtime_ns or 0 for each in outcomes) if all_of_them else None
    return found


def _differ(one: Downtimes, other: Downtimes) -> dict[str, float]:
    """What of them, and of their ratios, differs by more than SEEN; 1 if only one of them completes."""
    changes = {}
    for protocol in PROTOCOLS:
        was, is_ = one[protocol], other[protocol]
        if was is None or is_ is None:
            changes[protocol] = 1.0 if was is not is_ else 0.0
        else:
            changes[protocol] = is_ / was - 1
    for a, b in combinations(PROTOCOLS, 2):
        changes[f"{b} / {a}"] = (1 + changes[b]) / (1 + changes[a]) - 1
    return {what: change for what, change in changes.items() if abs(change) > SEEN}


def _quarters(scenario: Scenario, key: str) -> Iterator[Scenario]:
    """With a number a quarter less and a quarter more; a whole one at least by 1. What is not possible is left out."""
    value: Any = parameters(scenario)[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
        return
    for sign in (-1, 1):
        step = max(1, round(MOVED * value)) if isinstance(value, int) else MOVED * value
        try:
            yield moved_to(scenario, {key: value + sign * step})
        except pydantic.ValidationError:
            continue


def movers(scenario: Scenario) -> dict[str, dict[str, float]]:
    """The keys without a range that move a conclusion, each with what it moves: by one seed, and by the mean of all."""
    found = {}
    for key in without_range(scenario.ranges, scenario.sources, parameters(scenario)):
        for there in _quarters(scenario, key) if key not in ALONE else ():
            for seeds in (1, len(SEEDS)):
                moved = _differ(_as_it_is(scenario.name, seeds), _downtimes(there, seeds))
                if not moved:
                    break
            else:
                found[key] = moved
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mlx5-2vf", "ufimtseva-small", "szmigiero-1vf", "horon-switchover-ack", "liu-4vf", "virtio-context"]
)
def test_what_has_no_range_moves_no_conclusion(name: str) -> None:
    assert movers(load(name)) == {}


@pytest.mark.slow
def test_a_key_that_does_is_found() -> None:
    scenario = load("szmigiero-1vf")
    without = {key: each for key, each in scenario.ranges.items() if key != "vmm.config_load_us_per_vector"}
    (found,) = movers(scenario.model_copy(update={"ranges": without})).items()
    assert found[0] == "vmm.config_load_us_per_vector"
    assert found[1].keys() >= set(PROTOCOLS)


if __name__ == "__main__":
    for each in sys.argv[1:] or [name for name in shipped() if name not in MADE]:
        for key, moved in movers(load(each)).items():
            print(each, key, {what: f"{100 * change:+.1f} %" for what, change in moved.items()}, flush=True)
        print(each, "done", flush=True)
