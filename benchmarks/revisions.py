# SPDX-License-Identifier: GPL-2.0-or-later
"""How much faster or slower runs are in one revision of the project than in another, and whether they are equal.

Each side is a process of its own, which has loaded its revision, and both make the same run in turns (A B, B A, A B,
...), so that a slow spell of the machine falls on both. What counts is the CPU time of the run. A ratio is of one turn,
before by after; told are the median of all turns, the quartiles, and the ratio of the two fastest runs, which is the
better one on a machine with other work. Both get the scenario as the first revision has
it. Their timelines must be equal to the nanosecond; if not, the table says so, and the exit status is 1.

    python benchmarks/revisions.py HEAD                  # the last commit, against the files as they are
    python benchmarks/revisions.py dec0ae2^ dec0ae2      # a commit against the one before it
    python benchmarks/revisions.py /other/clone          # a folder
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
GIB = [
    *[
        "ram.size_gib=2",
        "ram.nonzero_gib=0.25",
        "ram.working_set_mib=64",
        "device.0.count=1",
        "device.0.block_kib=1024",
    ],
    *["vmm.give_up_s=600", "vmm.downtime_limit_ms=60000", "device.0.state_mib=1024"],
]
SCENARIOS: dict[str, tuple[str, list[str]]] = {
    "nic-reconfig": ("nic-reconfig", []),
    "mlx5-2vf": ("mlx5-2vf", []),
    "1 GiB": ("mlx5-2vf", GIB),
}
PROTOCOLS = ("v2", "v3-n4")
WORKER = """
import json, sys, time
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
for line in sys.stdin:
    asked = json.loads(line)
    if "load" in asked:
        told = load(*asked["load"]).to_json()
    else:
        scenario = Scenario.model_validate_json(asked["scenario"])
        protocol = Protocol.parse(asked["protocol"], scenario)
        before = time.process_time()
        outcome = simulate(scenario, protocol, asked["seed"])
        told = [time.process_time() - before, outcome.digest]
    print(json.dumps(told), flush=True)
"""


class Revision:
    """A process that has loaded a revision."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-P", "-c", WORKER]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=environment)

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise SystemExit("a revision cannot make this run; its error is above")
        return json.loads(answer)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def folder_of(revision: str) -> Iterator[Path]:
    """A folder with that revision: itself, if it is one."""
    if (folder := Path(revision)).is_dir():
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as made:
        archive = Path(made) / "revision.tar"
        subprocess.run(["git", "-C", str(HERE), "archive", "-o", str(archive), revision, "--"], check=True)
        with tarfile.open(archive) as packed:
            packed.extractall(made, filter="data")
        yield Path(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", help="a git revision or a folder")
    parser.add_argument("after", nargs="?", default=str(HERE), help="the same; default: the files as they are")
    parser.add_argument("--turns", type=int, default=12)
    chosen = parser.parse_args()
    with folder_of(chosen.before) as before, folder_of(chosen.after) as after:
        sides = [Revision(before), Revision(after)]
        try:
            return compared(sides, chosen.turns)
        finally:
            for side in sides:
                side.end()


def compared(sides: list[Revision], turns: int) -> int:
    """Print the table; returns the exit status."""
    print(f"{turns} turns each; CPU ms of a run; before / after: above 1, after is faster")
    columns = f"{'before':>8} {'after':>8} {'ratio':>7} {'quartiles':>14} {'fastest':>8}"
    print(f"{'scenario':14} {'protocol':9} {columns}  results")
    differ = False
    for name, place in SCENARIOS.items():
        scenario = sides[0].ask(load=place)
        for protocol in PROTOCOLS:
            took_s, equal = in_turns(sides, scenario, protocol, turns)
            differ |= not equal
            ratios = [one / other for one, other in zip(*took_s, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ms = [1000 * statistics.median(each) for each in took_s]
            print(
                f"{name:14} {protocol:9} {ms[0]:8.1f} {ms[1]:8.1f} {middle:7.2f} {low:6.2f} to {high:4.2f}"
                f" {min(took_s[0]) / min(took_s[1]):8.2f}  {'equal' if equal else 'DIFFER'}"
            )
    return int(differ)


def in_turns(sides: list[Revision], scenario: str, protocol: str, turns: int) -> tuple[list[list[float]], bool]:
    """What the runs of both sides took in each turn, in seconds, and whether they were all equal."""
    took_s: list[list[float]] = [[], []]
    equal = True
    for turn in range(-1, turns):  # the first one warms both up, and does not count
        digests = {}
        for at in (0, 1) if turn % 2 else (1, 0):
            seconds, digests[at] = sides[at].ask(scenario=scenario, protocol=protocol, seed=max(turn, 0))
            if turn >= 0:
                took_s[at].append(seconds)
        equal &= digests[0] == digests[1]
    return took_s, equal


if __name__ == "__main__":
    sys.exit(main())
