# SPDX-License-Identifier: GPL-2.0-or-later
"""results/real/patched is what its manifest says, its page follows from its table, and docs/real.md tells the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import polars as pl
import pytest

from kernel import qemu_build
from kernel.build import PROJECT
from tests.real.qemu.calls import LoggedCall
from tests.real.qemu.migrate import Record
from tests.real.qemu.patched import REINIT, TRIALS
from tests.real.qemu.patched_report import DOCUMENT, Row, driver_ms, page, rewritten, standstills_ms, stop_ms, told

FOLDER = PROJECT / "results/real/patched"
S = 1_000_000_000


def manifest() -> dict[str, Any]:
    """Of the folder."""
    read: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    return read


def rows() -> list[Row]:
    """Of the folder's table."""
    return [Row(**row) for row in pl.read_parquet(FOLDER / "runs.parquet").iter_rows(named=True)]


def test_the_files_are_those_of_the_manifest() -> None:
    files = manifest()["files"]
    assert {path.name for path in FOLDER.iterdir()} == {*files, "manifest.json"}
    for name, digest in files.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest


def test_the_patches_are_those_that_were_measured() -> None:
    assert manifest()["qemu"]["built"] == qemu_build.digest()
    assert manifest()["runs"] == len(rows())


def test_page_and_document_follow_from_the_table() -> None:
    found, how = told(rows()), manifest()
    versions = sorted({row.qemu for row in rows() if row.build in qemu_build.BUILDS})
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == page(found, versions, how["kernel"])
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == rewritten(text, found)


def test_the_patches_do_what_they_are_there_for() -> None:
    found = {(each.case, each.build): each for each in told(rows())}
    for (case, build), each in found.items():
        assert each.status == ("completed" if build in TRIALS[case].completes else "failed")
        assert each.model_status == each.status
        assert each.guest_runs_at == ("target" if each.status == "completed" else "source")
    for case in {each.case for each in found.values()} - {REINIT.name}:
        for build in ("early", "parallel-stop"):
            change, model = found[case, build].change, found[case, build].model_change
            assert change is not None
            assert model is not None
            assert change < 0
            assert model < 0
        serial, at_once = found[case, qemu_build.UNPATCHED], found[case, "parallel-stop"]
        assert at_once.stop < 0.75 * serial.stop


def call(device: str, at_s: float, arc: str) -> LoggedCall:
    return LoggedCall(device, "set_state", f"{arc} fd=0", time_ns=round(at_s * S))


@pytest.fixture
def retried() -> Record:
    """Stopped at 1 s, back in PRE_COPY at 1.2 s; stopped at 2 s, running at the target at 2.5 s."""
    record = Record("c", "10.0.13", "10.0.13", "7.3.4", {})
    record.source_trace = [
        f"1@{at}:vmstate_downtime_checkpoint {name}\n"
        for at, name in (
            *(("1.000000", "src-downtime-start"), ("1.100000", "src-vm-stopped")),
            *(("2.000000", "src-downtime-start"), ("2.250000", "src-vm-stopped")),
        )
    ]
    record.target_trace = ["1@2.500000:vmstate_downtime_checkpoint dst-precopy-bh-vm-started\n"]
    record.calls = [
        call("a1", 1.05, "PRE_COPY->PRE_COPY_P2P"),
        call("a1", 1.2, "PRE_COPY_P2P->PRE_COPY"),
        call("a1", 2.1, "PRE_COPY->PRE_COPY_P2P"),
        call("a1", 2.2, "PRE_COPY_P2P->STOP_COPY"),
        call("b1", 2.45, "RUNNING_P2P->RUNNING"),
        call("a1", 2.9, "STOP_COPY->STOP"),
    ]
    return record


def test_each_order_to_stop_is_a_standstill(retried: Record) -> None:
    assert standstills_ms(retried) == pytest.approx([200.0, 500.0])
    assert driver_ms(retried) == pytest.approx(350.0)
    assert stop_ms(retried) == pytest.approx(250.0)


def test_a_failed_migration_stands_until_the_last_device_runs_again(retried: Record) -> None:
    del retried.source_trace[2:], retried.target_trace[:], retried.calls[2:]
    retried.calls += [call("a1", 1.3, "STOP_COPY->RUNNING"), call("a0", 1.4, "STOP_COPY->RUNNING")]
    assert standstills_ms(retried) == pytest.approx([400.0])
    assert driver_ms(retried) is None


def test_a_turn_without_an_unpatched_run_changes_nothing() -> None:
    one = Row("stop-2", "early", 3, "10.0.13", "completed", "target", 1.0, 1, 2.0, 3.0, 0.5, "completed", 4.0, 1.5)
    (only,) = told([one])
    assert (only.stood, only.change, only.model_change) == (2.0, None, None)
