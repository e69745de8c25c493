# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the driver's functions took, by what the kernel or bpftrace wrote: what SAVE and LOAD take by themselves.

Three forms are read: lines `FUNCTION THREAD BEGIN_NS END_NS`, as the bpftrace program of `proto-v3 fit --how` prints;
the function_graph tracer's; and kprobes' of trace events. A SAVE goes on after its function has returned: it ends with
mlx5vf_save_callback.

Their times are of a clock that began when the host did. A line `clock MONOTONIC_NS REAL_NS` says what the wall clock
showed: then the calls of one migration can be told from others, by its log of the same host. Each such line counts from
there on, the first one for what is before it, too.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from proto_v3.errors import UserError

SUSPEND, RESUME, LOAD, SAVE = "suspend", "resume", "load", "save"
FUNCTIONS = {
    "mlx5vf_cmd_suspend_vhca": SUSPEND,
    "mlx5vf_cmd_resume_vhca": RESUME,
    "mlx5vf_cmd_load_vhca_state": LOAD,
    "mlx5vf_cmd_save_vhca_state": SAVE,
}
"""Linux, drivers/vfio/pci/mlx5/cmd.c."""
SAVED = "mlx5vf_save_callback"
NAME = "|".join([*FUNCTIONS, SAVED])
PRINTED = re.compile(rf"({NAME})\s+(\d+)\s+(\d+)\s+(\d+)")
GRAPH = re.compile(
    r"(?:\s*(?P<at>\d+\.\d+)\s*\|)?\s*(?P<cpu>\d+)\)\s*(?:\S+-\d+\s*\|)?\s*(?:[+!#*@$]?\s*(?P<us>\d+\.?\d*)\s+us)?\s*\|"
    r"\s*(?P<text>.*)"
)
PROBE = re.compile(r".*?-(?P<thread>\d+)\s+\[\d+\].*?\s(?P<at>\d+\.\d+):\s+\S+:\s+\((?P<what>[^)]*)\)")
NS_PER_US, NS_PER_S = 1_000, 1_000_000_000
MOST_CALLS = 1_000_000
SLACK_NS = 100_000_000
"""So much may a call be outside of what a log shows: its first event is not the first thing that happened. Ours."""
CLOCK = re.compile(r"\s*clock\s+(\d+)\s+(\d+)\s*")
Calls = dict[str, list[int]]
"""By kind: how long each took, ns, in the order in which they ended."""


class DriverCall(NamedTuple):
    """One call of a function of the driver's."""

    kind: str
    ns: int
    end_ns: int | None
    """On the host's wall clock, since 1970; None if the file does not tell."""

    def within(self, span_ns: tuple[int, int]) -> bool:
        """Whether it began and ended in this time. One of which the time is not known did."""
        return self.end_ns is None or (_inside(self.end_ns - self.ns, span_ns) and _inside(self.end_ns, span_ns))


def _inside(at_ns: int, span_ns: tuple[int, int]) -> bool:
    return span_ns[0] - SLACK_NS <= at_ns <= span_ns[1] + SLACK_NS


def of_migration(calls: Iterable[DriverCall], spans_ns: Mapping[str, tuple[int, int]]) -> tuple[Calls, str]:
    """The calls that began and ended while the migration lasted, and in words how many that are. One of which
    the time is not known counts. `spans_ns`: by kind, from when to when, on the wall clock of the host that makes such
    calls."""
    found: Calls = {}
    others = untimed = 0
    for call in calls:
        untimed += call.end_ns is None
        if call.within(spans_ns[call.kind]):
            found.setdefault(call.kind, []).append(call.ns)
        else:
            others += 1
    count = sum(map(len, found.values()))
    told = f"--driver: {count} calls are of this migration, {others} others are left out"
    if untimed:
        told = f"--driver: all of {count} calls count: no line `clock` tells when they were"
        told += f", but of {count - untimed} more; {others} others are left out" if count > untimed or others else ""
    return found, told if count or others else ""


def read_calls(files: Iterable[str], saves_ns: tuple[int, int] | None = None) -> list[DriverCall]:
    """Of all files; `saves_ns` as of `parse_calls`. UserError if one cannot be read, or has none of the functions."""
    every: list[DriverCall] = []
    for name in files:
        try:
            with Path(name).open(encoding="utf-8", errors="replace") as lines:
                calls = parse_calls(lines, saves_ns)
        except OSError as error:
            raise UserError(f"--driver {name}: cannot be read: {error.strerror}") from error
        if not calls:
            raise UserError(f"--driver {name}: has no time of {', '.join(FUNCTIONS)}; `proto-v3 fit --how` says how")
        every += calls
    return every


def parse_calls(lines: Iterable[str], saves_ns: tuple[int, int] | None = None) -> list[DriverCall]:
    """Of these lines, which are of one host.

    `saves_ns`: from when to when the migration lasted, on the wall clock. A SAVE ends with a callback that does not
    name it: the first one that began is the first one that ends. What ends in this time, began in it, if something did:
    a SAVE before it whose callback is not in the file does not shift those after it.
    """
    reader = _Reader()
    for line in lines:
        reader.take(line[:4096])
    return list(_timed(reader.seen, saves_ns))


def _timed(seen: Sequence[DriverCall | _Clock], saves_ns: tuple[int, int] | None) -> Iterator[DriverCall]:
    """The calls by the wall clock, the begin and the end of each SAVE together."""
    ahead_ns = next((each.ahead_ns for each in seen if isinstance(each, _Clock)), None)
    begun, others = deque[int](), deque[int]()
    """When the SAVEs in flight began, by the host's own clock: those within the time that counts, and those outside."""
    for each in seen:
        if isinstance(each, _Clock):
            ahead_ns = each.ahead_ns
            continue
        known = each.end_ns is not None and ahead_ns is not None
        call = each._replace(end_ns=(each.end_ns or 0) + (ahead_ns or 0) if known else None)
        counts = saves_ns is None or call.within(saves_ns)
        if each.kind == SAVE:
            (begun if counts else others).append(each.end_ns or 0)
        elif each.kind != SAVED:
            yield call
        elif begun or others:
            began = begun if begun and (counts or not others) else others
            if (took_ns := (each.end_ns or 0) - began.popleft()) >= 0:
                yield DriverCall(SAVE, took_ns, call.end_ns)


class _Clock(NamedTuple):
    """A line `clock`."""

    ahead_ns: int
    """So much is the wall clock ahead of the host's own."""


class _Reader:
    """Takes line by line."""

    def __init__(self) -> None:
        self.seen: list[DriverCall | _Clock] = []
        """By the host's own clock. Of a SAVE the begin and the end by themselves, of kind SAVE and SAVED."""
        self._open: dict[str, list[str]] = defaultdict(list)
        """function_graph: by CPU, the functions that have not ended."""
        self._entered: dict[tuple[str, str], int] = {}

    def take(self, line: str) -> None:
        if found := CLOCK.fullmatch(line):
            self.seen.append(_Clock(int(found[2]) - int(found[1])))
        elif found := PRINTED.match(line):
            self._ended(found[1], int(found[3]), int(found[4]))
        elif found := GRAPH.fullmatch(line.rstrip()):
            self._graph(found["cpu"], found["us"], found["text"], found["at"])
        elif found := PROBE.match(line):
            self._probe(found["thread"], round(float(found["at"]) * NS_PER_S), found["what"])

    def _ended(self, function: str, begin_ns: int, end_ns: int) -> None:
        if function == SAVED:
            self._add(SAVED, 0, end_ns)
        elif FUNCTIONS[function] == SAVE:
            self._add(SAVE, 0, begin_ns)
        else:
            self._add(FUNCTIONS[function], end_ns - begin_ns, end_ns)

    def _add(self, kind: str, ns: int, end_ns: int | None) -> None:
        if ns >= 0 and len(self.seen) < MOST_CALLS:
            self.seen.append(DriverCall(kind, ns, end_ns))

    def _graph(self, cpu: str, us: str | None, text: str, at: str | None) -> None:
        """A leaf with its time; `name() {`; or `}` with the time of what was entered last on this CPU."""
        function = next((name for name in [*FUNCTIONS, SAVED] if re.match(rf"{name}\b", text)), "")
        if text.rstrip().endswith("{"):
            self._open[cpu].append(function)
            if at is not None and function:
                self._begun(function, round(float(at) * NS_PER_S))
            return
        if text.startswith("}") and self._open[cpu]:
            function = self._open[cpu].pop()
        elif at is not None and function:
            self._begun(function, round(float(at) * NS_PER_S))
        if us is not None and FUNCTIONS.get(function, SAVE) != SAVE:
            self._add(
                FUNCTIONS[function], round(float(us) * NS_PER_US), None if at is None else round(float(at) * NS_PER_S)
            )

    def _begun(self, function: str, at_ns: int) -> None:
        """function_graph with absolute times: a SAVE, or its end."""
        if function == SAVED or FUNCTIONS[function] == SAVE:
            self._ended(function, at_ns, at_ns)

    def _probe(self, thread: str, at_ns: int, what: str) -> None:
        """`(function+0x0/0x120 [module])` at the entry; `(caller+0x4e <- function)` at the return."""
        back = "<-" in what
        function = re.split(r"[+\s]", what.rpartition("<- ")[2] if back else what, maxsplit=1)[0]
        if function not in FUNCTIONS and function != SAVED:
            return
        if function == SAVED or FUNCTIONS[function] == SAVE:
            if not back:
                self._ended(function, at_ns, at_ns)
        elif not back:
            self._entered[thread, function] = at_ns
        elif (begin_ns := self._entered.pop((thread, function), None)) is not None:
            self._ended(function, begin_ns, at_ns)
