# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's calls held against another VMM's on the same kind of device, phase by phase: the rules, and what differs.

A rule names an aspect of a phase and says whether it must be the same. Where it need not be, it says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.real.qemu.calls import LoggedCall
from tests.real.qemu.cases import Case
from tests.real.qemu.phases import Phase, Phased, bytes_of, collapsed, tokens

Calls = Sequence[LoggedCall]


@dataclass(frozen=True)
class Conditions:
    """What of a migration decides which rules hold."""

    ack: bool = False
    """With switchover-ack, all initial data is read before the stop; without, as much as came before it fits."""
    multifd: bool = False
    """A thread a device reads and loads the stop-copy data: between devices there is no order."""
    unsteady: bool = False
    """What a read() finds depends on when it comes: the device saves at a rate, or new data is not waited for."""
    cut: bool = False
    """It was cancelled, or the target was killed: when, differs."""
    one_read: bool = False
    """One read() has room for all that the device gives."""
    same_driver: bool = True
    """The other VMM's calls are of the same driver in a kernel, not of the simulated device, whose records differ."""


@dataclass(frozen=True)
class Rule:
    """What is compared of a phase."""

    phase: Phase
    aspect: str
    value: Callable[[Calls], Any]
    holds: Callable[[Conditions], bool]
    """Of which migrations."""
    within: float = 0.0
    """Numbers may differ by this part of QEMU's, or by SLACK."""
    differs_because: str = ""
    """It may differ. Empty: it must be the same."""


def order(calls: Calls) -> str:
    """All calls, in order."""
    return collapsed(tokens(calls))


def order_by_device(calls: Calls) -> dict[str, str]:
    """The same of each device."""
    devices = sorted({call.device for call in calls})
    return {device: order([call for call in calls if call.device == device]) for device in devices}


def ends_by_device(calls: Calls) -> dict[str, tuple[str, str]]:
    """Each device's first and last call."""
    words = {device: [word for word in tokens(calls) if word.startswith(device)] for device in order_by_device(calls)}
    return {device: (each[0].replace("full", "part"), each[-1]) for device, each in words.items()}


def states(calls: Calls) -> str:
    """The changes of state, in order."""
    return order([call for call in calls if call.name == "set_state"])


def closed(calls: Calls) -> str:
    """The devices whose data fd was closed, in order."""
    return order([call for call in calls if call.name == "release"])


def opt_ins(calls: Calls) -> str:
    """The devices that were opted in to PRECOPY_INFOv2, in any order."""
    return collapsed(sorted(call.device for call in calls if call.name == "info_v2"))


def data_reads(calls: Calls) -> str:
    """read()s that gave data, in order."""
    return order([call for call in calls if call.name == "read" and call.result > 0])


def empty_reads(calls: Calls) -> int:
    """read()s that found nothing."""
    return sum(call.name == "read" and call.result <= 0 for call in calls)


def read_bytes(calls: Calls) -> dict[str, int]:
    """Bytes read, by device."""
    return bytes_of(calls, "read")


def query_forms(calls: Calls) -> list[str]:
    """The different forms of an exact query: what it asks of each device, in order."""
    return sorted({collapsed(word.replace(" REINIT", "") for word in tokens(query)) for query in queries(calls)})


def queries(calls: Calls) -> list[list[LoggedCall]]:
    """The exact queries, each as its calls: one begins where the first device is asked for its size again."""
    found: list[list[LoggedCall]] = []
    for call in calls:
        if not found or (call.name == "mig_data_size" and call.device == found[0][0].device):
            found.append([])
        found[-1].append(call)
    return found


def query_count(calls: Calls) -> int:
    """How many exact queries there were."""
    return len(queries(calls))


def reinits(calls: Calls) -> int:
    """PRECOPY_INFOs that reported REINIT."""
    return sum(call.name == "precopy_info" and bool(call.value("flags")) for call in calls)


def written_bytes(calls: Calls) -> dict[str, int]:
    """Bytes written, by device."""
    return bytes_of(calls, "write")


def largest_write(calls: Calls) -> int:
    """The largest write(), in bytes."""
    return max((call.result for call in calls if call.name == "write"), default=0)


def write_count(calls: Calls) -> int:
    """How many write()s."""
    return sum(call.name == "write" for call in calls)


SLACK = 4
"""Numbers as small as this say nothing."""


def always(conditions: Conditions) -> bool:
    """Of each migration."""
    return True


def whole(conditions: Conditions) -> bool:
    """Of one that nobody cut short."""
    return not conditions.cut


def with_ack(conditions: Conditions) -> bool:
    """All initial data is read before the stop, by the same read()s.

    Not so of a small simulated device: it begins with a record that MIG_DATA_SIZE does not count, as mlx5 does.
    """
    alike = conditions.same_driver or not conditions.one_read
    return conditions.ack and alike and not conditions.unsteady and not conditions.cut


def without_ack(conditions: Conditions) -> bool:
    """The stop may come earlier or later."""
    return not with_ack(conditions) and not conditions.cut


def on_one_channel(conditions: Conditions) -> bool:
    """The main channel carries everything."""
    return not conditions.multifd and not conditions.cut


WINDOWS = "as much as is read before the rest fits at the bandwidth that was measured"
CLOSES = "QEMU closes each behind its device's last change of state; here they are closed when the side has ended"
RULES = (
    Rule(Phase.START, "opted in", opt_ins, always),
    Rule(Phase.SETUP, "order", order, always),
    Rule(Phase.PRECOPY, "reads of data", data_reads, with_ack),
    Rule(Phase.PRECOPY, "reads of data", data_reads, without_ack, differs_because=WINDOWS),
    Rule(
        Phase.PRECOPY,
        "empty reads",
        empty_reads,
        whole,
        differs_because="one a round and device once all is read: as many as the rest, or the ack, takes rounds",
    ),
    Rule(Phase.EXACT, "form", query_forms, whole),
    Rule(
        Phase.EXACT,
        "number",
        query_count,
        whole,
        differs_because="one a round while the estimate fits: as many as the ack, or the rest, takes rounds",
    ),
    Rule(Phase.EXACT, "REINIT", reinits, whole),
    Rule(Phase.STOP, "order", order, whole),
    Rule(Phase.DRAIN, "order", order, lambda conditions: with_ack(conditions) and on_one_channel(conditions)),
    Rule(
        Phase.DRAIN,
        "order by device",
        order_by_device,
        lambda conditions: conditions.multifd and conditions.same_driver,
    ),
    Rule(Phase.DRAIN, "first and last by device", ends_by_device, lambda conditions: conditions.multifd),
    Rule(
        Phase.DRAIN,
        "order",
        order,
        lambda conditions: without_ack(conditions) and on_one_channel(conditions),
        differs_because=WINDOWS,
    ),
    Rule(Phase.END, "states", states, whole),
    Rule(Phase.END, "data fds closed", closed, whole, differs_because=CLOSES),
    Rule(Phase.FAILURE, "states", states, always),
    Rule(Phase.FAILURE, "data fds closed", closed, always, differs_because=CLOSES),
    Rule(Phase.TARGET_SETUP, "order", order, always),
    Rule(Phase.LOAD, "bytes", written_bytes, lambda conditions: whole(conditions) and conditions.same_driver),
    Rule(Phase.LOAD, "largest write", largest_write, on_one_channel),
    Rule(
        Phase.LOAD,
        "writes",
        write_count,
        lambda conditions: whole(conditions) and (conditions.same_driver or not conditions.one_read),
        within=0.1,
        differs_because="QEMUFile's buffer of 32 KiB begins with a section's header, and is not aligned to device data",
    ),
    Rule(Phase.RESUME, "states", states, whole),
)


@dataclass(frozen=True)
class Finding:
    """What one rule found."""

    rule: Rule
    qemu: Any
    other: Any

    @property
    def same(self) -> bool:
        """Whether both are the same, or as near as the rule wants."""
        if self.rule.within and isinstance(self.qemu, int):
            return bool(abs(self.qemu - self.other) <= max(SLACK, self.rule.within * self.qemu))
        return bool(self.qemu == self.other)

    @property
    def wrong(self) -> bool:
        """Whether it breaks the rule."""
        if self.rule.within:
            return not self.same
        return not self.same and not self.rule.differs_because

    def __str__(self) -> str:
        name = f"{self.rule.phase}, {self.rule.aspect}"
        if self.same and self.qemu == self.other:
            return f"{name}: {self.qemu}"
        why = f" ({self.rule.differs_because})" if self.rule.differs_because else ""
        return f"{name}: QEMU {self.qemu}; other {self.other}{why}"


def conditions_of(case: Case, *, same_driver: bool) -> Conditions:
    """Those of a case."""
    one_read = case.driver["size_kib"] < 1024
    unsteady = "save_mib_s" in case.driver or case.machine != "pc"
    return Conditions(case.ack, case.multifd, unsteady, case.act is not None, one_read, same_driver)


def compare(qemu: Phased, other: Phased, conditions: Conditions) -> list[Finding]:
    """What each rule that holds found."""
    return [
        Finding(rule, rule.value(qemu[rule.phase]), rule.value(other[rule.phase]))
        for rule in RULES
        if rule.holds(conditions)
    ]
