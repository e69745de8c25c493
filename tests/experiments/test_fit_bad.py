# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs that cannot be fitted, or not wholly: each gets one clear answer, and no made-up number."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.logs.events import SIMPLE_TRACE, parse
from experiments.logs.machine import machine_of
from experiments.logs.pair import read_pair
from experiments.logs.quantity import Certainty
from proto_v3.errors import UserError
from sim.scenario.sample import draw
from tests.build.fit_cases import known_logs
from tests.build.qemu_log import NEW, OLD
from tests.real.qemu.pairs import FOLDER as PAIRS

LOGS = "proto-v3 fit --how"


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source, target, _ = known_logs(tmp_path_factory.mktemp("logs"))
    return Path(source), Path(target)


def changed(log: Path, folder: Path, change: Callable[[list[str]], list[str]], name: str = "") -> str:
    file = folder / (name or log.name)
    file.write_text("".join(change(log.read_text().splitlines(True))))
    return str(file)


def _lines(folder: Path, side: str) -> list[str]:
    return gzip.decompress((folder / f"{side}.log.gz").read_bytes()).decode().splitlines(True)


def refused(source: Path | str, target: Path | str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        machine_of(str(source), str(target))


def at(lines: list[str], words: str) -> int:
    return next(index for index, line in enumerate(lines) if words in line)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty; `proto-v3 fit --how`"),
        (b"\0\1\2" * 100, "is no text"),
        (SIMPLE_TRACE + bytes(64), "simple trace backend"),
        (b"\xfd7zXZ\0" + bytes(64), "compressed, and not by gzip"),
        (gzip.compress(b"2026-11-30 nothing\n" * 1000, mtime=0)[:40], "compressed, and damaged or cut"),
        (b"hello\nworld\n", "has no event of QEMU in its 2 lines"),
        (b"vfio_save_block  (a0) data_size 24\n" * 3, r"3 lines that look like events .* -msg timestamp=on"),
        (b"2026-11-30T18:36:53.561754Z vfio_pci_reset  (a0)\n", "has 1 events, but none of a migration"),
        (b"x" * (1 << 20), "has no event of QEMU in its 16 lines"),
        (b"2026-11-30T18:36:53Z vfio_save_iterate  (a0)\n" * 9, "its times are whole seconds; must have microseconds"),
    ],
    ids=[
        *("empty", "binary", "simple trace", "xz", "cut gzip", "other text", "no times", "no migration", "no lines"),
        "whole seconds",
    ],
)
def test_a_log_that_is_none(content: bytes, words: str, tmp_path: Path, logs: tuple[Path, Path]) -> None:
    bad = tmp_path / "bad.log"
    bad.write_bytes(content)
    refused(bad, logs[1], rf"bad\.log: .*{words}")
    refused(logs[0], bad, rf"bad\.log: .*{words}")


def test_a_log_that_is_not_there_or_no_file(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    refused(tmp_path / "none.log", logs[1], "none.log: cannot be read: No such file")
    refused(tmp_path, logs[1], "is a folder; a log is a file")
    refused(logs[0], logs[0], "is both the source's and the target's log")


def test_source_and_target_swapped(logs: tuple[Path, Path]) -> None:
    refused(logs[1], logs[0], "target.log: is the log of a target; the source's log comes first")


def test_logs_of_two_migrations_by_their_bytes(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    source, _, _ = known_logs(tmp_path, {"device.0.state_mib": 20.0, "device.0.stop_only_mib": 20.0})
    refused(source, logs[1], r"device 0: \d+ bytes were saved, \d+ were loaded: these are two different migrations")


def test_logs_of_two_migrations_by_their_number_of_devices(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    one = changed(logs[1], tmp_path, lambda lines: [line for line in lines if "(b1)" not in line])
    refused(logs[0], one, "has 2 VFIO devices that migrate, .* has 1: these are two different migrations")


def test_logs_of_two_migrations_of_the_same_machine_by_their_clocks(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    """Bytes and devices fit; but what the target sent back came before it was sent, by any offset of its clock."""
    _, slow, _ = known_logs(tmp_path, {"firmware.load_finish_ms": 300.0})
    refused(logs[0], slow, "two different migrations: by the .* the target's clock is at most")


@pytest.mark.parametrize("side", [0, 1])
def test_a_log_that_begins_late_is_read_as_far_as_it_goes(side: int, tmp_path: Path, logs: tuple[Path, Path]) -> None:
    begin = "src-downtime-start" if side == 0 else "SWITCHOVER_START"
    cut = changed(logs[side], tmp_path, lambda lines: lines[at(lines, begin) :])
    machine = machine_of(*([cut, str(logs[1])] if side == 0 else [str(logs[0]), cut]))
    assert any("begins after the migration did" in note for note in machine.notes)
    assert machine.waterfall.downtime_ms is not None
    found = {each.key: each for each in machine.quantities}
    assert found["device.1.config_load_ms"].value == pytest.approx(41, abs=0.01)
    if side == 0:
        assert found["device.1.quiesce_ms"].value == pytest.approx(31, abs=0.01)
        assert "vmm.setup_ms" not in found
        assert found["ram.size_gib"].kind is Certainty.UNKNOWN


def test_a_source_log_that_ends_before_the_switchover(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    cut = changed(logs[0], tmp_path, lambda lines: lines[: at(lines, "src-downtime-start")])
    refused(cut, logs[1], "the guest was not stopped in it .* cut before the switchover")


def test_a_target_log_that_ends_while_it_loads(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    cut = changed(logs[1], tmp_path, lambda lines: lines[: at(lines, "vfio_load_device_config_state_start")])
    machine = machine_of(str(logs[0]), cut)
    assert machine.waterfall.downtime_ms is None
    assert any("The end of the downtime is not in the target's log" in note for note in machine.notes)
    unknown = {each.key for each in machine.quantities if each.kind is Certainty.UNKNOWN}
    assert {"device.0.config_load_ms", "device.0.resume_ms", "vmm.vcpu_start_ms", "vmm.other_load_ms"} <= unknown


def test_a_clock_that_was_set_back(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    def earlier(lines: list[str]) -> list[str]:
        stop = at(lines, "src-vm-stopped")
        return [*lines[:stop], *(line.replace("2026-11-30T", "2026-11-29T") for line in lines[stop:])]

    refused(changed(logs[0], tmp_path, earlier), logs[1], r"its times go back by \d+\.\d+ ms: the clock was set")


def test_a_log_that_lacks_its_middle(tmp_path: Path, logs: tuple[Path, Path]) -> None:
    def hole(lines: list[str]) -> list[str]:
        half = at(lines, "src-vm-stopped") + 8
        return lines[:half] + lines[half + 20 :]

    refused(changed(logs[0], tmp_path, hole), logs[1], "or lines are missing")


@pytest.mark.parametrize("end", range(0, 400, 23))
def test_wherever_a_log_is_cut_the_answer_is_no_traceback(end: int, tmp_path: Path, logs: tuple[Path, Path]) -> None:
    for side in (0, 1):
        text = logs[side].read_text()
        file = tmp_path / logs[side].name
        file.write_text(text[: len(text) * end // 400])
        names = [str(file), str(logs[1])] if side == 0 else [str(logs[0]), str(file)]
        notes, told = list[str](), ""
        try:
            notes = read_pair(names[0], names[1]).notes
        except UserError as error:
            told = str(error)
        assert notes or ".log: " in told


NAMES = sorted({event.name for name in ("source", "target") for event in parse(_lines(PAIRS / "pair-11.1", name))})


@pytest.mark.parametrize("event", NAMES)
def test_an_event_that_was_not_traced_costs_what_it_tells_and_nothing_else(event: str, tmp_path: Path) -> None:
    for side in ("source", "target"):
        lines = _lines(PAIRS / "pair-11.1", side)
        (tmp_path / f"{side}.log").write_text("".join(line for line in lines if f"Z {event} " not in line))
    try:
        machine = machine_of(str(tmp_path / "source.log"), str(tmp_path / "target.log"))
        assert machine.scenario.devices
        assert all(each.how for each in machine.quantities)
        told = ".log: "
    except UserError as error:
        told = str(error)
    assert ".log: " in told
    assert "what the logs" not in told


@pytest.mark.parametrize("name", ["cancelled-10.0", "cancelled-11.1", "killed-11.1", "late-reinit-11.1"])
def test_a_migration_that_did_not_complete(name: str) -> None:
    folder = PAIRS / name
    how = "was cancelled" if "cancelled" in name else "failed"
    refused(folder / "source.log.gz", folder / "target.log.gz", f"this migration {how} (before|after)")


def test_logs_of_two_migrations_of_as_many_bytes() -> None:
    """Of the same devices, without a return path: only the pieces that the bytes came in differ."""
    refused(PAIRS / "pair-11.1/source.log.gz", PAIRS / "pair-10.0/target.log.gz", "loaded in other pieces than")


def test_of_several_migrations_the_last_that_completed_or_the_one_that_is_named(
    tmp_path: Path, logs: tuple[Path, Path]
) -> None:
    (tmp_path / "other").mkdir()
    other = known_logs(tmp_path / "other", {"vmm.vcpu_stop_ms": 3.0})
    both = [tmp_path / "source.log", tmp_path / "target.log"]
    for file, first, second in zip(both, other, logs, strict=False):
        later = [each.replace("2026-11-30T", "2026-12-01T") for each in second.read_text().splitlines(True)]
        file.write_text("".join([Path(first).read_text(), *later]))
    days = {line[:10] for line in both[0].read_text().splitlines()}
    assert len(days) == 2, days
    for number, stop_ms in ((1, 3.0), (2, 7.0), (None, 7.0)):
        machine = machine_of(str(both[0]), str(both[1]), migration=number)
        (found,) = (each.value for each in machine.quantities if each.key == "vmm.vcpu_stop_ms")
        assert found == pytest.approx(stop_ms, abs=0.01)
        assert any("has 2 migrations; number 2 is taken" in note for note in machine.notes) is (number is None)
    with pytest.raises(UserError, match=r"--migration 3: .* has 2"):
        machine_of(str(both[0]), str(both[1]), migration=3)


def test_a_target_that_failed_and_a_new_one_in_the_same_log(tmp_path: Path) -> None:
    """The first QEMU left its device in RESUMING; the second one's devices come in its own order."""
    for side in ("source", "target"):
        failed = "".join(_lines(PAIRS / "cancelled-11.1", side)).replace("2026-11-30T", "2026-11-29T")
        (tmp_path / f"{side}.log").write_text(failed + "".join(_lines(PAIRS / "events-11.1", side)))
    both = machine_of(str(tmp_path / "source.log"), str(tmp_path / "target.log"))
    alone = machine_of(*(str(PAIRS / f"events-11.1/{side}.log.gz") for side in ("source", "target")))
    assert both.quantities == alone.quantities
    assert both.waterfall == alone.waterfall


def test_the_features_of_a_device_that_only_a_later_process_has(tmp_path: Path) -> None:
    """One log, a QEMU after the other: each says at its start what its devices can do."""
    lines = _lines(PAIRS / "one-11.1", "source")
    first = "".join(lines).replace("2026-11-30T", "2026-11-29T").replace("(a0)", "(gone)")
    (tmp_path / "source.log").write_text(first + "".join(lines))
    facts = read_pair(str(tmp_path / "source.log"), str(PAIRS / "one-11.1/target.log.gz")).source
    alone = read_pair(*(str(PAIRS / f"one-11.1/{side}.log.gz") for side in ("source", "target"))).source
    assert (facts.devices["a0"].flags, facts.devices["a0"].info_v2) == (7, True)
    assert alone.devices["a0"].flags == 7


def test_names_that_do_not_fit_the_devices(logs: tuple[Path, Path]) -> None:
    for rename in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(UserError, match=r"--rename .*: must be 2 different names"):
            machine_of(str(logs[0]), str(logs[1]), rename=rename)
    for name in ("no/name", "a b", "ü", ""):
        with pytest.raises(UserError, match=f"--rename {name}: must be letters"):
            machine_of(str(logs[0]), str(logs[1]), rename=[name, "b"])


def test_what_is_extended_has_too_many_devices(logs: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text("extends = 'mlx5'\n" + "[[device]]\n" * 3)
    with pytest.raises(UserError, match="base"):
        machine_of(str(logs[0]), str(logs[1]), extends=str(base))


@pytest.mark.parametrize("extends", ["late-reconfig", "nic-reconfig"])
def test_what_is_critical_is_as_the_device_says_and_not_as_in_what_is_extended(extends: str) -> None:
    """These have 8 MiB of critical objects; the device announced 64 KiB of 8 MiB."""
    files = [str(PAIRS / f"one-11.1/{side}.log.gz") for side in ("source", "target")]
    (device,) = machine_of(*files, extends=extends).scenario.devices
    assert device.critical.objects * device.critical.object_kib * 1024 == pytest.approx(65568, rel=0.01)
    assert device.state_mib == pytest.approx(8, rel=0.001)


def test_a_device_of_which_all_was_left_at_the_stop_has_nothing_to_dirty(tmp_path: Path) -> None:
    begins = {"source": "src-downtime-start", "target": "SWITCHOVER_START"}
    for side, begin in begins.items():
        lines = _lines(PAIRS / "pair-11.1", side)
        stop = at(lines, begin)
        data = (" vfio_save_block ", "ef100004", "vfio_load_state_device_data")
        kept = [line for line in lines[:stop] if not any(each in line for each in data)]
        (tmp_path / f"{side}.log").write_text("".join([*kept, *lines[stop:]]))
    names = [str(tmp_path / f"{side}.log") for side in begins]
    for device in machine_of(*names, extends="nic-reconfig").scenario.devices:
        assert device.writes is None or not device.writes.mib_per_s


@pytest.mark.parametrize("first", [28, 60, 92])
def test_the_samples_of_bounds_that_touch_go_together(first: int, tmp_path: Path) -> None:
    """The beginning is cut off: of state and stop-only part the bounds are left, and the guest writes."""
    (tmp_path / "source.log").write_text("".join(_lines(PAIRS / "multifd-precopy-11.1", "source")[first:]))
    machine = machine_of(str(tmp_path / "source.log"), str(PAIRS / "multifd-precopy-11.1/target.log.gz"))
    assert len(draw(machine.scenario, 64)) == 64


def test_equal_clocks_stay_equal_where_a_whole_load_is_between_the_messages(tmp_path: Path) -> None:
    """Without the return path and the order to switch over, only the stop and the start of a device are left."""
    target = "".join(line for line in _lines(PAIRS / "pair-11.1", "target") if "loadvm_process" not in line)
    (tmp_path / "target.log").write_text(target)
    source = str(PAIRS / "pair-11.1/source.log.gz")
    whole, less = (
        machine_of(source, each) for each in (str(PAIRS / "pair-11.1/target.log.gz"), str(tmp_path / "target.log"))
    )
    assert less.clocks.offset_us == whole.clocks.offset_us == 0
    assert less.waterfall.downtime_ms == whole.waterfall.downtime_ms


@pytest.mark.parametrize("version", [OLD, NEW])
def test_lines_that_are_damaged_are_left_out(version: str, tmp_path: Path) -> None:
    source, target, run = known_logs(tmp_path, None, "v2", version)
    for file in (Path(source), Path(target)):
        lines = file.read_text().splitlines(True)
        mixed = [
            line for each in lines for line in (each, "qemu: warning\n", "\xff x\n", each[: len(each) // 3] + "\n")
        ]
        file.write_text("".join(line for line in mixed if line in lines or not parse([line])), encoding="utf-8")
    pair = read_pair(source, target)
    assert len(pair.devices) == len(run.scenario.devices)


def test_nothing_of_the_host_is_kept(logs: tuple[Path, Path], tmp_path: Path) -> None:
    names = {"(a0)": "(0000:08:00.2)", "(a1)": "(0000:08:00.3)", "(b0)": "(0000:af:01.1)", "(b1)": "(0000:af:01.2)"}

    def renamed(lines: list[str]) -> list[str]:
        text = "".join(["secret-host qemu[77]: -name guest=secret\n", *lines])
        for old, new in names.items():
            text = text.replace(old, new)
        return text.splitlines(True)

    source, target = (changed(log, tmp_path, renamed) for log in logs)
    line = "/usr/bin/qemu -name guest=secret -m 4096 -machine pc-q35-9.2 -device vfio-pci,host=0000:08:00.2"
    machine = machine_of(source, target, cmdline=[line])
    assert [device.name for device in machine.scenario.devices] == ["vf0", "vf1"]
    assert machine.scenario.ram.size_gib == 4
    assert not re.search(r"secret|0000:|/usr|q35", machine.text)
    assert [each.name for each in machine_of(source, target, rename=["x", "y"]).scenario.devices] == ["x", "y"]
