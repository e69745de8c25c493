# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU does, held against the rules of docs/v2.md: each fact looks at a record and raises AssertionError if it is
not so. `tests.rules` writes into the document which facts stand for a rule, and where they were seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.logs.events import TraceEvent, named, parse
from tests.real.qemu.calls import LoggedCall
from tests.real.qemu.cases import BY_NAME, End
from tests.real.qemu.compare import query_forms, states, written_bytes
from tests.real.qemu.migrate import Record
from tests.real.qemu.phases import Phase, Phased, collapsed, phased, tokens

MIB = 1 << 20
QEMU_FILE_BYTES = 32 << 10
FIRST_REUSABLE = (11, 1)


class Seen:
    """A record, taken apart."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.case = BY_NAME[record.case]
        self.phases: Phased = phased(record.calls)
        self.source: list[TraceEvent] = parse(record.source_trace)
        self.target: list[TraceEvent] = parse(record.target_trace)
        self.version = tuple(int(part) for part in record.source_qemu.split("."))

    @property
    def reusable(self) -> bool:
        """Whether the ack is the re-usable one: with a machine type of QEMU 11.1 or newer."""
        return self.case.ack and self.version[:2] >= FIRST_REUSABLE and self.case.machine == "pc"

    def source_calls(self, *names: str) -> list[LoggedCall]:
        """The source's calls of these names."""
        return [call for call in self.record.calls if call.of_source and call.name in names]

    @property
    def stopped(self) -> int:
        """Where in the source's trace the vCPUs were stopped for the switchover."""
        return next(
            index for index in self.at("vm_state_notify", "running 0") if "finish-migrate" in self.source[index].args
        )

    def exact_queries(self) -> list[TraceEvent]:
        """QEMU 11.1's exact queries in pre-copy, by its trace."""
        events = named(self.source, "qemu_savevm_query_pending")
        return [event for event in events if event.value("exact") == 1 and event.value("final") == 0]

    def at(self, name: str, args: str = "") -> list[int]:
        """Where in the source's trace these events are."""
        return [index for index, event in enumerate(self.source) if event.name == name and event.args.startswith(args)]


@dataclass(frozen=True)
class Fact:
    """One thing that QEMU does."""

    rules: tuple[str, ...]
    check: Callable[[Seen], None]
    cases: tuple[str, ...]
    when: Callable[[Seen], bool] = lambda seen: True
    """Of which records of these cases."""

    @property
    def name(self) -> str:
        """Of its function."""
        return self.check.__name__


FACTS: list[Fact] = []


def fact(
    *rules: str, cases: Sequence[str], when: Callable[[Seen], bool] = lambda seen: True
) -> Callable[[Callable[[Seen], None]], Callable[[Seen], None]]:
    """A decorator: the function is a fact that stands for these rules, in records of these cases."""

    def note(check: Callable[[Seen], None]) -> Callable[[Seen], None]:
        FACTS.append(Fact(rules, check, tuple(cases), when))
        return check

    return note


def shown_by(seen: Seen) -> list[Fact]:
    """The facts that a record shows."""
    return [each for each in FACTS if seen.case.name in each.cases and each.when(seen)]


def one_shot(seen: Seen) -> bool:
    """The ack is the one-shot one."""
    return not seen.reusable


def reusable(seen: Seen) -> bool:
    """The ack is the re-usable one."""
    return seen.reusable


ONE_CHANNEL = ("pair", "ack", "reinit-late")
COMPLETED = ("pair", "ack", "ack-old-machine", "reinit-early", "reinit", "multifd", "multifd-ack", "no-precopy", "rate")


@fact("v2.vmm.1", cases=ONE_CHANNEL)
def one_read_of_at_most_a_mebibyte_on_each_device_in_turn(seen: Seen) -> None:
    reads = [call for call in seen.phases[Phase.PRECOPY] if call.name == "read"]
    state = min(call.value("stop_copy_length") for call in seen.phases[Phase.SETUP] if call.name == "mig_data_size")
    assert {call.value("size") for call in reads} == {min(MIB, state)}
    devices = [call.device for call in reads]
    assert devices == ["a0", "a1"] * (len(reads) // 2) + ["a0"] * (len(reads) % 2)


@fact("v2.vmm.17", cases=("pair", "ack", "multifd-ack", "no-precopy"))
def set_up_asks_and_opens_one_device_after_the_other(seen: Seen) -> None:
    order = seen.case.devices * [0]
    words = (
        ["mig_data_size", "-> PRE_COPY", "precopy_info"] if seen.case.driver.get("precopy", 1) else ["mig_data_size"]
    )
    expected = [f"a{device} {word}" for device in range(len(order)) for word in words]
    assert list(tokens(seen.phases[Phase.SETUP])) == expected


@fact("v2.vmm.17", cases=("pair", "ack"), when=lambda seen: seen.version[:2] >= FIRST_REUSABLE)
def the_opt_in_comes_when_a_device_is_realized_at_both_ends(seen: Seen) -> None:
    for phase, names in ((Phase.START, ["a0", "a1"]), (Phase.TARGET_START, ["b0", "b1"])):
        assert [call.device for call in seen.phases[phase] if call.name == "info_v2"] == names
    told = seen.at("vfio_migration_init")
    assert [seen.source[index].value("precopy_info_v2_used") for index in told] == [1, 1]
    assert max(told) < min(seen.at("migrate_set_state", "new state setup"))


@fact("v2.vmm.17", cases=("pair", "ack"), when=lambda seen: seen.version[:2] < FIRST_REUSABLE)
def a_qemu_before_11_1_does_not_opt_in(seen: Seen) -> None:
    assert [call for call in seen.record.calls if call.name == "info_v2"] == []


@fact("v2.vmm.2", cases=("ack", "pair"))
def a_device_with_nothing_to_give_is_still_read_once_a_round(seen: Seen) -> None:
    empty = [call for call in seen.phases[Phase.PRECOPY] if call.name == "read" and call.result <= 0]
    assert {call.result for call in empty} <= {-42}  # ENOMSG


@fact("v2.vmm.3", cases=("ack", "pair", "reinit"))
def the_exact_figure_counts_the_stop_copy_size_alone(seen: Seen) -> None:
    """Also before 11.1: initial and dirty bytes are not added to it once more."""
    sizes = [call.value("stop_copy_length") for call in seen.phases[Phase.EXACT] if call.name == "mig_data_size"]
    if seen.version[:2] >= FIRST_REUSABLE:
        told = [event for event in named(seen.source, "vfio_state_pending") if event.value("exact") == 1]
        told = [event for event in told if not event.value("final")]
        assert [event.value("stopcopy size") for event in told][-seen.case.devices :] == sizes[-seen.case.devices :]
        assert {event.value("stopcopy size") for event in told} == set(sizes)
        return
    devices, before = seen.case.devices, 0
    told = named(seen.source, "vfio_state_pending_exact")
    assert {event.value("stopcopy size") for event in told} == set(sizes)
    for index, event in enumerate(told):
        precopy = event.value("precopy") or 0
        if index % devices:
            assert precopy - before == event.value("stopcopy size")
        before = precopy


@fact("v2.vmm.3", cases=("ack", "reinit", "multifd-ack", "no-precopy"))
def an_exact_query_asks_one_device_after_the_other(seen: Seen) -> None:
    words = ["mig_data_size", "precopy_info"] if seen.case.driver.get("precopy", 1) else ["mig_data_size"]
    whole = [f"a{device} {word}" for device in range(seen.case.devices) for word in words]
    assert query_forms(seen.phases[Phase.EXACT]) == [collapsed(whole)]


@fact("v2.vmm.4", cases=COMPLETED)
def nothing_is_decided_before_the_first_window_is_over(seen: Seen) -> None:
    first = min(seen.at("migrate_transferred"))
    exact = seen.at("vfio_state_pending_exact") + [
        index for index in seen.at("qemu_savevm_query_pending") if seen.source[index].value("exact") == 1
    ]
    assert exact
    assert min(exact) > first


@fact("v2.vmm.5", cases=("ack", "ack-old-machine"), when=one_shot)
def a_one_shot_ack_is_one_message_for_all_devices(seen: Seen) -> None:
    acks = seen.at("source_return_path_thread_switchover_acked")
    assert len(acks) == 1
    assert acks[0] < seen.stopped
    assert len(seen.at("vfio_send_init_data_flag")) == seen.case.devices or seen.version[:2] < FIRST_REUSABLE


@fact("v2.vmm.5", cases=("ack-old-machine",))
def an_older_machine_type_runs_the_one_shot_ack_and_does_not_act_on_a_reinit(seen: Seen) -> None:
    assert any(call.value("flags") for call in seen.source_calls("precopy_info"))
    assert len(seen.at("source_return_path_thread_switchover_acked")) == 1
    assert seen.record.status == End.COMPLETED


@fact("v2.vmm.6", cases=("ack", "reinit", "multifd-ack"), when=reusable)
def a_reusable_ack_is_one_message_a_device_and_request(seen: Seen) -> None:
    reinits = sum(bool(call.value("flags")) for call in seen.source_calls("precopy_info"))
    acks = seen.at("source_return_path_thread_switchover_acked")
    assert len(acks) == len(seen.at("vfio_send_init_data_flag")) == seen.case.devices + reinits
    assert seen.source[max(acks)].value("switchover_ack_pending_num") == 0
    assert seen.exact_queries()[-1].value("total switchover ack pending") == 0


@fact("v2.vmm.6", cases=("reinit-early",))
def a_reinit_before_the_first_ack_was_asked_for_asks_for_no_second_one(seen: Seen) -> None:
    assert sum(bool(call.value("flags")) for call in seen.source_calls("precopy_info")) == 1
    assert len(seen.at("vfio_send_init_data_flag")) == 1
    assert len(seen.at("source_return_path_thread_switchover_acked")) == 1


@fact("v2.vmm.6", cases=("reinit-late",))
def an_ack_needed_after_the_decision_fails_it_when_all_devices_are_stopped(seen: Seen) -> None:
    assert "Switchover ACK was requested by 2 devices during switchover" in seen.record.error
    stop = tokens(seen.phases[Phase.STOP])
    assert stop[-2:] == ("a1 -> STOP_COPY", "a0 -> STOP_COPY")
    assert seen.phases[Phase.DRAIN] == []


@fact("v2.vmm.7", cases=("pair", "ack", "ack-old-machine"), when=one_shot)
def without_a_reusable_ack_there_is_no_final_check(seen: Seen) -> None:
    assert [call for call in seen.phases[Phase.STOP] if call.name == "precopy_info"] == []


@fact("v2.vmm.7", cases=("one-no-p2p",), when=reusable)
def a_device_without_p2p_has_no_final_check(seen: Seen) -> None:
    assert tokens(seen.phases[Phase.STOP]) == ("a0 -> STOP_COPY",)


@fact("v2.vmm.7", cases=("ack", "reinit", "reinit-late", "multifd-ack"), when=reusable)
def the_final_check_is_behind_the_vcpus_stop_and_before_each_devices_p2p(seen: Seen) -> None:
    checks = [index for index in seen.at("vfio_query_precopy_size") if index > seen.stopped]
    assert len(checks) == seen.case.devices
    for device in range(seen.case.devices):
        words = [word for word in tokens(seen.phases[Phase.STOP]) if word.startswith(f"a{device}")]
        assert words[0].startswith(f"a{device} precopy_info")
        assert words[1] == f"a{device} -> PRE_COPY_P2P"


@fact("v2.vmm.8", cases=("pair", "ack", "multifd-ack", "reinit-late"))
def devices_stop_in_two_passes_the_last_device_first(seen: Seen) -> None:
    expected = "a1 -> PRE_COPY_P2P, a0 -> PRE_COPY_P2P, a1 -> STOP_COPY, a0 -> STOP_COPY"
    assert states(seen.phases[Phase.STOP]) == expected


@fact("v2.vmm.8", cases=("no-precopy", "multifd"))
def devices_without_pre_copy_go_to_stop_and_to_stop_copy_in_their_turn(seen: Seen) -> None:
    expected = "a1 -> RUNNING_P2P, a0 -> RUNNING_P2P, a1 -> STOP, a0 -> STOP"
    assert states(seen.phases[Phase.STOP]) == expected
    for device in ("a0", "a1"):
        words = [word for word in tokens(seen.phases[Phase.DRAIN]) if word.startswith(device)]
        assert words[0] == f"{device} -> STOP_COPY"
        assert words[-1] == f"{device} read 0"


@fact("v2.vmm.18", cases=("no-p2p",))
def several_devices_without_p2p_are_refused_at_the_start(seen: Seen) -> None:
    assert seen.record.status == End.REFUSED
    assert seen.case.error in seen.record.error
    assert seen.source_calls("set_state", "read") == []


@fact("v2.vmm.9", cases=("pair", "ack", "no-precopy"))
def on_one_channel_the_devices_are_drained_in_turn(seen: Seen) -> None:
    devices = [call.device for call in seen.phases[Phase.DRAIN]]
    assert devices == sorted(devices)
    assert set(devices) == {"a0", "a1"}


@fact("v2.vmm.9", cases=("pair", "ack", "no-precopy", "reinit"))
def on_one_channel_writes_are_of_at_most_32_kib(seen: Seen) -> None:
    assert max(call.result for call in seen.phases[Phase.LOAD] if call.name == "write") == QEMU_FILE_BYTES


@fact("v2.vmm.9", cases=("pair", "ack", "no-precopy"))
def config_is_loaded_behind_all_devices_data(seen: Seen) -> None:
    data = [index for index, event in enumerate(seen.target) if event.name == "vfio_load_state_device_data"]
    config = [index for index, event in enumerate(seen.target) if event.name == "vfio_load_device_config_state_start"]
    assert len(config) == 2
    assert min(config) > max(data)


@fact("v2.vmm.10", cases=("multifd",))
def with_multifd_a_thread_a_device_saves_and_loads(seen: Seen) -> None:
    main = {call.thread for phase in (Phase.STOP, Phase.TARGET_SETUP) for call in seen.phases[phase]}
    own = {call.thread for phase in (Phase.DRAIN, Phase.LOAD) for call in seen.phases[phase]}
    assert not main & own
    assert max(call.result for call in seen.phases[Phase.LOAD] if call.name == "write") == MIB
    started = [event for event in seen.source if event.name == "vfio_save_complete_precopy_thread_start"]
    assert len(started) == 2
    assert seen.at("savevm_send_switchover_start")


@fact("v2.vmm.10", cases=("multifd",))
def with_multifd_config_is_loaded_behind_the_devices_own_data_one_device_at_a_time(seen: Seen) -> None:
    names = ("vfio_load_device_config_state_start", "vfio_load_device_config_state_end")
    events = [(event.name, event.args) for event in named(seen.target, *names)]
    assert [name for name, _ in events] == [*names, *names]
    for device in ("b0", "b1"):
        order = [event.name for event in seen.target if f"({device})" in event.args]
        last = max(index for index, name in enumerate(order) if name == "vfio_load_state_device_buffer_load_end")
        assert order.index(names[0]) > last


@fact("v2.vmm.16", cases=("pair", "ack", "multifd", "multifd-ack", "no-precopy"))
def the_target_leaves_resuming_in_two_passes(seen: Seen) -> None:
    expected = "b0 -> RUNNING_P2P, b1 -> RUNNING_P2P, b0 -> RUNNING, b1 -> RUNNING"
    assert states(seen.phases[Phase.RESUME]) == expected


@fact("v2.vmm.11", cases=("pair", "ack", "multifd", "no-precopy"))
def stop_copy_is_left_behind_the_hand_over(seen: Seen) -> None:
    assert states(seen.phases[Phase.END]) == "a0 -> STOP, a1 -> STOP"
    (completed,) = seen.at("migrate_set_state", "new state completed")
    assert max(seen.at("vfio_migration_set_state", "(a0) new state STOP,")) > completed


@fact("v2.vmm.12", cases=("reinit-late",))
def a_failure_behind_the_stop_resumes_the_devices_and_once_more_as_the_guest_starts(seen: Seen) -> None:
    expected = "a1 -> RUNNING, a0 -> RUNNING, a0 -> RUNNING_P2P, a1 -> RUNNING_P2P, a0 -> RUNNING, a1 -> RUNNING"
    assert states(seen.phases[Phase.FAILURE]) == expected
    assert seen.record.source_runs


@fact("v2.vmm.12", cases=("kill",))
def a_target_that_is_lost_in_pre_copy_leaves_the_guest_at_the_source(seen: Seen) -> None:
    assert states(seen.phases[Phase.FAILURE]) == "a0 -> RUNNING"
    assert seen.record.status == End.FAILED
    assert seen.record.source_runs


@fact("v2.vmm.13", cases=("cancel",))
def a_cancel_in_pre_copy_takes_the_devices_to_running(seen: Seen) -> None:
    assert states(seen.phases[Phase.FAILURE]) == "a0 -> RUNNING"
    assert seen.phases[Phase.STOP] == []
    assert seen.record.status == End.CANCELLED
    assert seen.record.source_runs


@fact("v2.vmm.14", cases=("kill-device",))
def qemus_source_runs_again_when_the_target_is_lost_while_it_loads(seen: Seen) -> None:
    """The project's stays stopped: it cannot know."""
    assert seen.phases[Phase.DRAIN]
    assert seen.record.status == End.FAILED
    assert seen.record.source_runs


@fact("v2.vmm.14", cases=("cancel-device",))
def qemus_guest_runs_at_both_ends_when_it_is_cancelled_while_the_target_loads(seen: Seen) -> None:
    """The project has no cancel behind the decision to stop."""
    assert seen.phases[Phase.DRAIN]
    assert seen.record.source_runs
    assert seen.record.target_runs


@fact("v2.vmm.15", cases=("pair", "ack", "multifd", "no-precopy"))
def the_target_has_all_bytes_and_config_before_the_guest_runs_and_its_state_is_the_sources(seen: Seen) -> None:
    read = dict.fromkeys(("a0", "a1"), 0)
    for call in seen.source_calls("read"):
        read[call.device] += max(0, call.result)
    written = written_bytes(seen.phases[Phase.LOAD])
    assert [written["b0"], written["b1"]] == [read["a0"], read["a1"]]
    digests = seen.record.digests
    assert [digests["b0"], digests["b1"]] == [digests["a0"], digests["a1"]]


V3_CALLS = ("streams", "get_stream", "stream_info", "dirty_blocks", "pread")


@fact(cases=("pair", "ack", "multifd", "multifd-ack", "no-precopy"))
def a_v2_user_sees_v2_on_a_device_that_knows_v3(seen: Seen) -> None:
    """docs/protocol-v3.md, who meets whom: the driver has several streams, and QEMU knows nothing of it."""
    assert int(seen.record.parameters["streams"]) > 1
    assert [call for call in seen.record.calls if call.name in V3_CALLS] == []
    assert {call.value("fd") for call in seen.record.calls if call.name in ("read", "write")} == {0}


@fact("v2.vmm.19", cases=("rate",))
def ram_that_uses_up_a_windows_quota_leaves_the_device_no_turn(seen: Seen) -> None:
    quota_bytes = seen.case.parameters["max-bandwidth"] / 10  # of a window of 100 ms
    ends = seen.at("migrate_transferred")
    turns = set(seen.at("vfio_save_iterate"))
    windows = [
        (seen.source[end].value("transferred") or 0, range(begin, end)) for begin, end in itertools.pairwise(ends)
    ]
    assert [moved for moved, events in windows if moved >= quota_bytes and not turns.intersection(events)]
    assert max(moved for moved, _ in windows) < 1.1 * quota_bytes
