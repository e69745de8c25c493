# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/protocol-v3.md against the code: its diagrams are what runs do, its tables are what the contract says."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from proto_v3.vfio.device import DataFd, MigrationDevice
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import OutcomeKind
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from sim.clock import virtual
from sim.device.driver import SimDriver
from sim.device.load import LoadStream
from sim.device.load_v3 import V3LoadStream
from sim.device.save import SaveStream
from sim.device.save_v3 import CriticalStream, V3Stream
from sim.host.link import ConnectionEnd
from sim.outcome import Outcome
from sim.report import Counters
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.build.runs import prepared
from tests.build.scenario import small_scenario

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "protocol-v3.md"
TEXT = DOC.read_text(encoding="utf-8")
HEADER = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("vfio_v3.h", "vfio_v3_stream.h"))
DEVICE = (ROOT / "proto_v3" / "vfio" / "device.py").read_text(encoding="utf-8")

PLAIN, LATE, LOST = DIAGRAMS = re.findall(r"```mermaid\nsequenceDiagram\n(.*?)```", TEXT, re.DOTALL)

CALLS: dict[str, tuple[Callable[..., Awaitable[Any]], str]] = {
    "SET_STATE": (MigrationDevice.set_state, "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET"),
    "MIG_STREAMS SET": (MigrationDevice.set_streams, "VFIO_DEVICE_FEATURE_MIG_STREAMS, SET"),
    "VFIO_DEVICE_RESET": (MigrationDevice.reset, "VFIO_DEVICE_RESET"),
    "MIG_GET_STREAM": (DataFd.get_stream, "VFIO_MIG_GET_STREAM"),
    "MIG_GET_STREAM_INFO": (DataFd.stream_info, "VFIO_MIG_GET_STREAM_INFO"),
    "read()": (DataFd.read, ""),
    "write()": (DataFd.write, ""),
    "poll()": (DataFd.poll, ""),
    "close()": (DataFd.close, ""),
}
"""As the diagrams name them: the port's method, and what its docstring calls the call."""


@dataclass(frozen=True, slots=True)
class Step:
    """A message of a diagram, or of a run: `S` and `T` are the VMMs, `SD` and `TD` their drivers."""

    way: str
    """As `S->>T`."""
    name: str
    stream: int | None = None
    """None: the diagram does not say."""
    value: str | None = None

    def is_met_by(self, other: Step) -> bool:
        """Whether what a run did is this."""
        return (self.way, self.name) == (other.way, other.name) and all(
            mine is None or mine == its for mine, its in ((self.stream, other.stream), (self.value, other.value))
        )


def messages(diagram: str) -> Iterator[tuple[str | None, str, str]]:
    """The branch that each message is in (None: all), its way, and its words."""
    branch = None
    for line in map(str.strip, diagram.splitlines()):
        if line.startswith(("alt ", "else ")):
            branch = line.split(" ", 1)[1]
        elif line == "end":
            branch = None
        elif found := re.fullmatch(r"(\w+-?->>\w+): (.+)", line):
            yield branch, found[1], found[2]
        else:
            assert line.startswith(("participant ", "Note over ")), line


def steps(diagram: str, branch: str | None = None) -> list[Step]:
    """What is sent and called, without the answers, along one branch."""
    return [
        step_of(way, words) for where, way, words in messages(diagram) if "-->>" not in way and where in (None, branch)
    ]


def step_of(way: str, words: str) -> Step:
    names = "|".join(re.escape(name) for name in sorted(CALLS, key=len, reverse=True))
    found = re.fullmatch(rf"({names}|[A-Z_]+)(?: stream (\d+))?(?: (\w+))?", words)
    assert found, f"{way}: {words}"
    return Step(way, found[1], None if found[2] is None else int(found[2]), found[3])


# --- what a run does --------------------------------------------------------------------------------------------------

Cut = tuple[Kind, str]
"""The first connection is cut `before` the first frame of this kind is sent, when it was `sent`, or is `there`."""


class Watched:
    """A run, all of whose frames, and calls of devices and their fds, are written down."""

    def __init__(self, name: str, changes: dict[str, Any] | None = None, cut: Cut | None = None) -> None:
        scenario = small_scenario(changes)
        self.run = prepared(scenario, name)
        self.steps: list[Step] = []
        self._cut = cut
        self._round_trip_s = scenario.link.round_trip_us / 1e6
        with pytest.MonkeyPatch.context() as patch:
            self._watch_frames(patch)
            self._watch_calls(patch)
            self.outcome: Outcome = virtual.run(self.run.outcome())

    def _watch_frames(self, patch: pytest.MonkeyPatch) -> None:
        send = Channel.send

        async def sending(channel: Channel, frame: Frame) -> None:
            way = "S->>T" if channel in self.run.channels else "T->>S"
            self.steps.append(Step(way, frame.kind.name, frame.stream, str(frame.value)))
            when = self._cut[1] if self._cut and frame.kind is self._cut[0] else ""
            if when == "before":
                self._cut_first()
            await send(channel, frame)
            if when == "sent":
                self._cut_first()
            if when == "there":
                asyncio.get_running_loop().call_later(self._round_trip_s, self._cut_first)

        patch.setattr(Channel, "send", sending)

    def _cut_first(self) -> None:
        end = self.run.channels[0]._transport
        assert isinstance(end, ConnectionEnd)
        end.cut()

    def _watch_calls(self, patch: pytest.MonkeyPatch) -> None:
        def watch(owner: type, method: str, name: str, told: Callable[..., tuple[int | None, str | None]]) -> None:
            original = getattr(owner, method)

            async def watching(it: Any, *args: Any, **kwargs: Any) -> Any:
                stream, value = told(it, *args)
                self.steps.append(Step(self._way(it), name, stream, value))
                return await original(it, *args, **kwargs)

            patch.setattr(owner, method, watching)

        watch(SimDriver, "set_state", "SET_STATE", lambda it, state: (None, state.name))
        watch(SimDriver, "set_streams", "MIG_STREAMS SET", lambda it, n, *_: (None, str(n)))
        watch(SimDriver, "reset", "VFIO_DEVICE_RESET", lambda it: (None, None))
        for stream in (CriticalStream, V3LoadStream):
            watch(stream, "get_stream", "MIG_GET_STREAM", lambda it, index: (None, str(index)))
        watch(V3Stream, "stream_info", "MIG_GET_STREAM_INFO", lambda it: (it._index, None))
        watch(SaveStream, "read", "read()", lambda it, *_: (it._index, None))
        watch(SaveStream, "poll", "poll()", lambda it, *_: (it._index, None))
        watch(LoadStream, "write", "write()", lambda it, *_: (it._index, None))
        watch(V3LoadStream, "close", "close()", lambda it: (it._index, None))

    def _way(self, called: Any) -> str:
        at_target = isinstance(called, LoadStream) or called in self.run.drivers_at_target
        return "T->>TD" if at_target else "S->>SD"

    def check_does(self, expected: Sequence[Step]) -> None:
        """All of these happened: the frames in this order, and so what each of the two VMMs did.

        What else happened in between is not looked at, nor what one side called before the other did.
        """
        for by in (r"[ST]->>[ST]", r"S->>\w+", r"T->>\w+"):
            done = (step for step in self.steps if re.fullmatch(by, step.way))
            before = "the beginning"
            for step in expected:
                if re.fullmatch(by, step.way):
                    if not any(step.is_met_by(each) for each in done):
                        pytest.fail(f"{step} did not come after {before}")
                    before = str(step)


EPOCH_2: dict[str, Any] = {
    "device.0.reconfigurations": {"poisson_per_s": 0.0, "during_stop_ms": [0.5], "objects_each": 2},
    "device.0.critical.setup_us": 1500.0,  # more than stopping the vCPUs and the device takes
}


# --- the diagrams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagram", DIAGRAMS, ids=["plain", "late", "lost"])
def test_what_the_diagrams_name_is_there(diagram: str) -> None:
    named = list(messages(diagram))
    assert len(named) > 5
    for _, way, words in named:
        sender, receiver = re.split("-?->>", way)
        if "-->>" in way:
            assert (sender, receiver) in (("SD", "S"), ("TD", "T"))
            assert errnos(words) <= errnos(HEADER)
            assert all(event in HEADER for event in re.findall(r"\bEPOLL\w+", words))
        elif (sender, receiver) in (("S", "T"), ("T", "S")):
            assert step_of(way, words).name in Kind.__members__
        else:
            assert (sender, receiver) in (("S", "SD"), ("T", "TD"))
            step = step_of(way, words)
            method, called = CALLS[step.name]
            assert (method.__doc__ or "").removeprefix("v3: ").startswith(called)
            assert step.name != "SET_STATE" or step.value in State.__members__


@pytest.mark.rule("v3.6.7", "v3.7.4")
def test_a_plain_migration_is_as_drawn() -> None:
    watched = Watched("v3-n1")
    assert watched.outcome.kind is OutcomeKind.COMPLETED
    watched.check_does(steps(PLAIN))


@pytest.mark.rule("v3.6.4", "v3.6.5", "v3.6.6", "v3.6.7")
@pytest.mark.parametrize(("policy", "retries"), [("retry", 1), ("proceed", 0)])
def test_an_epoch_after_the_order_to_stop_is_as_drawn(policy: str, retries: int) -> None:
    watched = Watched(f"v3-n1-{policy}", EPOCH_2)
    assert watched.outcome.kind is OutcomeKind.COMPLETED
    assert watched.outcome.counters.retries == retries
    assert bool(watched.outcome.late_critical_objects) == (policy == "proceed")
    watched.check_does(steps(LATE, policy))


@pytest.mark.rule("v3.8.2")
@pytest.mark.parametrize(
    ("branch", "cut", "runs_at"),
    [("lost before COMMIT", (Kind.LOADED, "sent"), "source"), ("COMMIT is lost", (Kind.COMMIT, "sent"), "")],
)
def test_a_lost_connection_is_as_drawn(branch: str, cut: Cut, runs_at: str) -> None:
    watched = Watched("v3-n1", cut=cut)
    assert watched.outcome.kind is OutcomeKind.FAILED
    assert watched.outcome.guest_runs_at == runs_at
    watched.check_does(steps(LOST, branch))
    committed = [step for step in watched.steps if step.name == "COMMIT"]
    assert bool(committed) == (branch != "lost before COMMIT")


@pytest.mark.rule("v3.2.4", "v3.2.5")
def test_both_sides_opt_in_to_n_before_their_sessions_and_the_target_opts_out_at_the_end() -> None:
    watched = Watched("v3-n3")
    for way, begins, ends in (("S->>SD", "PRE_COPY", []), ("T->>TD", "RESUMING", ["0"])):
        told = [(step.name, step.value) for step in watched.steps if step.way == way]
        chosen = [value for name, value in told if name == "MIG_STREAMS SET"]
        assert chosen == ["3", *ends]
        assert told.index(("MIG_STREAMS SET", "3")) < told.index(("SET_STATE", begins))


@pytest.mark.rule("v3.6.5")
@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_the_guest_is_resumed_as_often_as_is_allowed_and_then_stays_stopped(allowed: int) -> None:
    """Each order to stop brings a new epoch."""
    always = {"device.0.reconfigurations": {**EPOCH_2["device.0.reconfigurations"], "during_stops": 9}}
    watched = Watched("v3-n1-retry", EPOCH_2 | always | {"v3.max_retries": allowed})
    assert watched.outcome.kind is OutcomeKind.COMPLETED
    assert watched.outcome.counters.retries == allowed
    stops = [step for step in watched.steps if (step.name, step.value) == ("SET_STATE", "PRE_COPY_P2P")]
    assert len(stops) == allowed + 1


@pytest.mark.rule("v3.12.6")
def test_without_p2p_the_last_look_is_taken_in_pre_copy() -> None:
    watched = Watched("v3-n1-proceed", EPOCH_2 | {"device.0.features": ["STOP_COPY", "PRE_COPY"]})
    assert watched.outcome.kind is OutcomeKind.COMPLETED
    assert watched.outcome.counters.late_final_checks == 1
    of_source = [step for step in watched.steps if step.way == "S->>SD"]
    states = [step.value for step in of_source if step.name == "SET_STATE"]
    assert states == ["PRE_COPY", "STOP_COPY", "STOP"]
    at = of_source.index(Step("S->>SD", "SET_STATE", None, "STOP_COPY"))
    assert of_source[at - 1].is_met_by(Step("S->>SD", "MIG_GET_STREAM_INFO", 0)) or of_source[at - 1].name == "poll()"


def test_a_step_that_does_not_come_or_comes_too_early_is_found() -> None:
    watched = Watched("v3-n1")
    loaded, commit = steps(PLAIN)[-5:-3]
    assert (loaded.name, commit.name) == ("LOADED", "COMMIT")
    for wrong in ([commit, loaded], [Step("S->>T", "DATA", 2)], [Step("T->>S", "COMMIT")]):
        with pytest.raises(pytest.fail.Exception):
            watched.check_does(wrong)


# --- the tables -------------------------------------------------------------------------------------------------------


def table(first_heading: str) -> list[list[str]]:
    """The rows of the table whose first column is headed so."""
    (body,) = re.findall(rf"^\| {re.escape(first_heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in body.splitlines()]


def errnos(text: str) -> set[str]:
    return {name for name in re.findall(r"\bE[A-Z0-9]+\b", text) if hasattr(errno, name)}


@pytest.mark.rule("v3.9.2")
def test_the_errnos_of_the_failure_table_are_those_of_the_contract() -> None:
    named = {row[0].strip("`") for row in table("errno")}
    assert len(named) > 10
    assert named <= errnos(HEADER)
    assert named <= errnos(DEVICE)
    assert named >= errnos(DataFd.write.__doc__ or ""), "each way in which a stream may be wrong"
    of_others = {"EPERM", "EOPNOTSUPP"}  # epoll's, and that of QEMU's vfio_save_prepare()
    assert errnos(TEXT) - of_others <= errnos(HEADER)


LOST_AT: list[tuple[str, Cut]] = [
    ("before SETUP", (Kind.SETUP, "before")),
    ("in pre-copy", (Kind.EPOCH_SENT, "sent")),
    ("after the stop, before LOADED is sent", (Kind.RAM_END, "sent")),
    ("after LOADED is sent, before COMMIT is", (Kind.LOADED, "sent")),
    ("after COMMIT is sent, before it is there", (Kind.COMMIT, "sent")),
    ("after COMMIT is there, before RESUMED is", (Kind.COMMIT, "there")),
    ("after RESUMED is there", (Kind.RESUMED, "there")),
]


def test_the_table_of_lost_connections_is_tried_row_by_row() -> None:
    assert [row[0] for row in table("the connection is lost")] == [row for row, _ in LOST_AT]


@pytest.mark.rule("v3.8.2", "v3.8.3")
@pytest.mark.parametrize("name", ["v3-n1", "v3-n2-pool", "v3-n2-one", "v3-blocks-n2"])
@pytest.mark.parametrize(("row", "cut"), LOST_AT)
def test_when_the_connection_is_lost_both_sides_do_as_the_table_says(row: str, cut: Cut, name: str) -> None:
    (_, source, target, runs_at) = next(each for each in table("the connection is lost") if each[0] == row)
    watched = Watched(name, cut=cut)
    assert watched.outcome.guest_runs_at == runs_at.replace("nowhere", "")
    state = virtual.run(watched.run.drivers[0].state())
    if runs_at == "source":
        assert state is State.RUNNING
    else:
        assert state is (State.STOP if source == "ends its sessions" else State.STOP_COPY)
    was_reset = Step("T->>TD", "VFIO_DEVICE_RESET") in watched.steps
    assert was_reset == (target != "runs the guest")
    completed = watched.outcome.kind is OutcomeKind.COMPLETED
    assert completed == (source == "ends its sessions")


# --- names and links --------------------------------------------------------------------------------------------------


def is_key(dotted: str) -> bool:
    """Whether a scenario may have it."""
    model: Any = Scenario
    for part in dotted.split("."):
        if part.isdecimal():
            continue
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return False
        model = model.model_fields[part].annotation
        inner = [each for each in getattr(model, "__args__", ()) if isinstance(each, type)]
        model = next((each for each in inner if issubclass(each, BaseModel)), model)
    return True


def test_scenario_keys_and_outcomes_that_the_text_names_exist() -> None:
    tables = "|".join(Scenario.model_fields)
    keys = re.findall(rf"`((?:{tables})\.[a-z0-9_.]+)`", TEXT) + re.findall(r"--set ([\w.]+)=", TEXT)
    assert {"v3.late_epoch", "driver.lock", "firmware.engines"} <= set(keys)
    assert [key for key in keys if not is_key(key)] == []
    assert not is_key("driver.locks")
    outcomes = re.findall(r"\b(?:device_bytes|peak)_\w+", TEXT)
    assert set(outcomes) <= set(Counters().columns())
    assert outcomes


def test_protocols_that_the_text_names_exist() -> None:
    names = set(re.findall(r"(?<![\w-])v[23](?:-[a-z0-9]+)+", TEXT))
    assert {"v3-n1-retry", "v3-n1-proceed", "v2-multifd"} <= names
    for name in names:
        Protocol.parse(name, small_scenario())


def test_the_commands_can_be_run() -> None:
    commands = re.findall(r"^\.venv/bin/proto-v3 compare (\S+) --protocols (\S+)", TEXT, re.MULTILINE)
    assert commands
    for scenario, protocols in commands:
        for name in protocols.split(","):
            Protocol.parse(name, load(scenario))


def test_calls_and_structures_that_the_text_names_exist() -> None:
    of_others = {"VFIO_BASE", "VFIO_EEH_PE_OP", "VFIO_DEVICE_PCI_TPH"}
    named = set(re.findall(r"\bVFIO_\w+", TEXT)) - of_others
    assert named
    assert [name for name in named if not re.search(rf"\b{name}\b", HEADER + DEVICE)] == []
    assert [name for name in re.findall(r"`struct (\w+)`", TEXT) if f"struct {name} {{" not in HEADER] == []


def test_links_lead_somewhere() -> None:
    inline = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert inline
    assert [link for link in inline if not (DOC.parent / link.partition("#")[0]).exists()] == []
    defined = re.findall(r"^\[([\w-]+)\]: https://\S+$", TEXT, re.MULTILINE)
    assert len(defined) == len(set(defined))
    assert set(re.findall(r"\]\[([\w-]+)\]", TEXT)) == set(defined)


def test_sections_that_the_text_refers_to_exist() -> None:
    sections = {int(number) for number in re.findall(r"^## (\d+)\. ", TEXT, re.MULTILINE)}
    assert sections == set(range(1, len(sections) + 1))
    assert {int(number) for number in re.findall(r"[Ss]ection (\d+)", TEXT)} <= sections


def test_a_comment_at_the_start_of_a_line_is_alone_there() -> None:
    """What follows it in the line would be HTML, and no Markdown."""
    assert [line for line in TEXT.splitlines() if re.match(r"<!--(?!.*-->$)", line)] == []
