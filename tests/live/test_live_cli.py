# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 live`, `live-target` and `agree` as a user meets them, and what they say."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from experiments.commands import live
from experiments.commands.agree import FIGURES, compare, verdicts, within_aim
from experiments.commands.live import DEFAULT_PORT, address
from experiments.commands.options import live_settings
from experiments.draw.agree import agreement
from experiments.draw.live_progress import Progress, rates_mib_per_s
from experiments.runs.pool import Cell
from proto_v3.errors import UserError
from proto_v3.timeline import PHASES, Resource
from sim.live.limits import delays_ns, too_short
from sim.live.processes.report import GuestNote, ProgressNote
from sim.live.processes.settings import Settings, Tls
from sim.live.result import LiveResult, not_run
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.build.cli import CLI, proto_v3
from tests.build.live import live_scenario

CERTIFICATES = Path(__file__).parents[1] / "data" / "tls"
QUICK = ["device.0.count=1", "device.0.state_mib=4", "device.0.stop_only_mib=2", "firmware.load_finish_ms=2"]
LIVE_COLUMNS = {"clock", "io", "loop", "delays", "late_median_ns", "late_p99_ns", "late_max_ns", "clock_uncertainty_ns"}


def quick(*more: str) -> list[str]:
    """A live scenario that is over soon, as options."""
    return [word for change in (*QUICK, *more) for word in ("--set", change)]


def tls(side: str) -> list[str]:
    files = {"cert": f"{side}.pem", "key": f"{side}.key", "ca": "ca.pem"}
    return [word for what, file in files.items() for word in (f"--tls-{what}", str(CERTIFICATES / file))]


# --- live on one machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--io", "loop"], ["--loop", "asyncio"]], ids=["threads", "loop", "asyncio"])
def test_live_migrates_for_real_and_writes_what_compare_writes(tmp_path: Path, how: Sequence[str]) -> None:
    done = proto_v3(tmp_path, "live", "live-paced", "--protocols", "v2,v3-n2", *quick(), *how, "--out", "out")
    assert done.returncode == 0, done.stderr
    runs = pl.read_parquet(tmp_path / "out" / "runs.parquet")
    assert runs["outcome"].to_list() == ["COMPLETED", "COMPLETED"]
    assert runs["guest_runs_at"].to_list() == ["target", "target"]
    assert set(runs.columns) >= LIVE_COLUMNS
    for row in runs.iter_rows(named=True):
        assert sum(row[f"phase_{name}_ns"] for name in PHASES) == row["downtime_ns"]
        paths = [row[f"path_{each.name.lower()}_ns"] for each in Resource]
        assert sum(paths) + row["path_unexplained_ns"] == row["downtime_ns"]
        assert row["device_bytes"] > 4 << 20
        assert row["delays"] > 0
    assert (tmp_path / "out" / "live.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["complete"]
    assert told["live"]["settings"]["io"] == ("loop" if "loop" in how else "threads")
    assert told["live"]["sockets"]
    assert "source vf fd 1" in done.stdout
    assert "target device" in done.stdout


@pytest.mark.slow
def test_live_as_csv_with_several_runs(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "live", "live-paced", *quick(), "--seeds", "2", "--first-seed", "7", "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert pl.read_csv(tmp_path / "out" / "live-live-paced" / "runs.csv")["seed"].to_list() == [7, 8]


def test_a_device_that_cannot_is_unsupported(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "live", "live-paced", "--protocols", "v3-n2", *quick("device.0.max_dirty_streams=1"))
    assert done.returncode == 0, done.stderr
    assert "UNSUPPORTED" in done.stdout
    assert "1 dirty streams; 2 were asked for" in done.stdout.replace("\n", " ")


def test_what_does_not_converge_says_why(tmp_path: Path) -> None:
    never = ("vmm.downtime_limit_ms=1", "vmm.give_up_s=0.3")
    done = proto_v3(tmp_path, "live", "live-paced", "--protocols", "v3-n2", *quick(*never), "--out", "out")
    assert done.returncode == 0, done.stderr
    row = pl.read_parquet(tmp_path / "out" / "runs.parquet").row(0, named=True)
    assert (row["outcome"], row["guest_runs_at"]) == ("DID_NOT_CONVERGE", "source")
    assert re.match(r"given up after 0\.(299|3)\d* s of pre-copy: [\d.]+ MiB left \(RAM [\d.]+, vf ", row["reason"])
    assert "0.4768 MiB fit a downtime limit of 1 ms at the given 476.8 MiB/s" in row["reason"]
    assert re.search(r"vf has 2(\.\d+)? MiB that pre-copy does not give: they can never fit$", row["reason"])


def test_a_fault_of_the_scenario_fails_the_run_and_the_guest_runs_on(tmp_path: Path) -> None:
    fault = 'device.0.faults=[{side = "target", command = "LOAD"}]'
    done = proto_v3(tmp_path, "live", "live-paced", *quick(fault), "--out", "out")
    assert done.returncode == 1, done.stderr
    row = pl.read_parquet(tmp_path / "out" / "runs.parquet").row(0, named=True)
    assert (row["outcome"], row["guest_runs_at"]) == ("FAILED", "source")
    assert "Input/output error" in row["reason"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere"),
        (["live-paced", "--protocols", "v4"], "unknown protocol 'v4'"),
        (["live-paced", "--protocols", "v2,v2"], "one is named twice"),
        (["live-paced", "--set", "device.0.state_mib=8192"], "takes at most 4096 MiB"),
        (["live-paced", "--connect", "host:port"], "must be HOST:PORT"),
        (["live-paced", "--tls-cert", "a"], "--tls-key, --tls-ca: must be given too"),
        (["live-paced", *tls("source")], "give --connect"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, arguments: Sequence[str], told: str) -> None:
    done = proto_v3(tmp_path, "live", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("proto-v3: error: ")
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_long_tmpdir_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / (100 * "x")
    folder.mkdir()
    command = [*CLI, "live", "live-paced", "--protocols", "v2", *quick(), "--out", "out", "--quiet"]
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []


def test_too_few_open_files_are_told_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 64))
    many = ["--set", "device.0.max_dirty_streams=16"]
    done = proto_v3(tmp_path, "live", "live-paced", "--protocols", "v2,v3-n16", *quick(), *many)
    assert done.returncode == 2
    assert re.search(
        r"v3-n16: a process of this live run needs \d+ open files, and may have 64: .*ulimit -n", done.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sigterm_keeps_what_was_done_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [*CLI, "live", "live-paced", *quick(), "--seeds", "1000", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not any("source-VMM" in each for each in comms_below(process.pid)):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def comms_below(pid: int) -> list[str]:
    """What the descendants of a process are called."""
    parents, comms = {}, {}
    for each in filter(str.isdecimal, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{each}/stat").read_text()
        except OSError:
            continue
        comm, rest = text[text.index("(") + 1 :].rsplit(")", 1)
        parents[int(each)], comms[int(each)] = int(rest.split()[1]), comm
    below = []
    for each, comm in comms.items():
        at = each
        while at > 1 and at != pid:
            at = parents.get(at, 0)
        if at == pid and each != pid:
            below.append(comm)
    return below


# --- two hosts --------------------------------------------------------------------------------------------------------


@contextmanager
def target(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A target that takes one migration, and the address that it listens at."""
    command = [*CLI, "live-target", "--listen", "127.0.0.1:0", "--once", *options]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = re.search(r"listening on (\S+),", process.stderr.readline())
        assert found is not None
        yield process, found.group(1)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("secret", [False, True], ids=["plain", "TLS"])
def test_two_hosts(tmp_path: Path, secret: bool) -> None:
    there, here = (tls("target"), tls("source")) if secret else ([], [])
    with target(tmp_path, *there) as (process, where):
        done = proto_v3(tmp_path, "live", "live-paced", *quick(), "--connect", where, "--out", "out", *here)
        _, stderr = process.communicate(timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout
    assert process.returncode == 0
    assert "live-paced, v2" in stderr
    assert "the guest runs here" in stderr
    row = pl.read_parquet(tmp_path / "out" / "runs.parquet").row(0, named=True)
    assert (row["outcome"], row["guest_runs_at"]) == ("COMPLETED", "target")


@pytest.mark.slow
def test_a_target_takes_no_more_state_than_it_was_told(tmp_path: Path) -> None:
    with target(tmp_path, "--max-state-mib", "2") as (process, where):
        done = proto_v3(tmp_path, "live", "live-paced", *quick(), "--connect", where)
        process.communicate(timeout=60)
    assert done.returncode == 1
    assert "at most 2 MiB" in " ".join(done.stdout.split())
    assert process.returncode == 1


@pytest.mark.slow
def test_a_target_that_wants_tls_turns_others_away_and_waits_on(tmp_path: Path) -> None:
    with target(tmp_path, *tls("target")) as (process, where):
        plain = proto_v3(tmp_path, "live", "live-paced", *quick(), "--connect", where)
        stranger = proto_v3(tmp_path, "live", "live-paced", *quick(), "--connect", where, *tls("other"))
        trusted = proto_v3(tmp_path, "live", "live-paced", *quick(), "--connect", where, *tls("source"))
        process.communicate(timeout=60)
    assert plain.returncode == 1
    assert "FAILED" in plain.stdout
    assert stranger.returncode == 1
    assert trusted.returncode == 0, trusted.stdout


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        done = proto_v3(tmp_path, "live", "live-paced", *quick(), "--connect", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert "refused" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("name", "name", DEFAULT_PORT),
        ("[::1]:80", "::1", 80),
        ("::1", "::1", DEFAULT_PORT),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert address(text, "--listen") == (host, port)


@pytest.mark.parametrize("text", ["", ":80", "host:", "host:x", "host:70000", "[::1]:x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--listen .*must be HOST:PORT"):
        address(text, "--listen")


def test_tls_takes_all_three_files_or_none() -> None:
    def settings(*files: str | None) -> Settings:
        options = dict(zip(("tls_cert", "tls_key", "tls_ca"), files, strict=True))
        return live_settings({"io": "loop", "loop": "asyncio", "silent_s": 1.0} | options)

    assert settings(None, None, None).tls is None
    assert settings("a", "b", "c").tls == Tls("a", "b", "c")
    with pytest.raises(UserError, match="--tls-ca"):
        settings("a", "b", None)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_delays_that_are_shorter_than_timers_are_late() -> None:
    scenario = load("live-paced", ["firmware.save_command_us=20", "driver.call_us=1"])
    delays = delays_ns(scenario)
    assert delays["firmware.save_command_us"] == 20_000
    assert delays["vmm.vcpu_stop_ms"] == pytest.approx(20e6)
    assert "driver.call_us" not in delays  # not slept for at all
    assert "device.0.resume_ms" not in delays  # nothing
    assert set(too_short(scenario, 60_000)) == {"firmware.save_command_us"}
    assert not too_short(scenario, 10_000)


def note(at_s: float, remaining: int = 0, written: int = 0, wire: int = 0, **streams: int) -> ProgressNote:
    return ProgressNote(round(at_s * 1e9), "pre-copy", remaining, written, wire, streams)


def test_progress_tells_rates_between_two_notes() -> None:
    before = note(1.0, written=1 << 20, a=0)
    now = note(1.5, wire=8 << 20, written=2 << 20, a=4 << 20, b=1 << 20)
    rates = rates_mib_per_s(before, now)
    assert rates == {"the guest writes": 2.0, "over the wire": 16.0, "a": 8.0, "b": 2.0}
    assert rates_mib_per_s(now, now) == {}


def test_progress_on_a_terminal_says_phase_bytes_left_and_streams() -> None:
    screen = io.StringIO()
    with Progress(Console(file=screen, force_terminal=True, width=100), "mine", 3) as progress:
        progress.begin("v2")
        progress.heard(note(0.5, remaining=9 << 20))
        progress.heard(note(1.0, remaining=5 << 20, s=1024))
        progress.heard(GuestNote("source", True, 0))
    shown = screen.getvalue()
    assert "mine, v2, run 1 of 3: pre-copy, 1.0 s" in shown
    assert "5.0 MiB left" in shown
    assert "s 0.0 MiB/s" in shown


def test_progress_is_silent_where_there_is_no_terminal() -> None:
    screen = io.StringIO()
    with Progress(Console(file=screen), "mine", 1) as progress:
        progress.begin("v2")
        progress.heard(note(0.5))
    assert screen.getvalue() == ""


# --- agree ------------------------------------------------------------------------------------------------------------


def run_row(clock: str, seed: int, downtime_ms: int, **more: Any) -> dict[str, Any]:
    """A run whose downtime is all drain."""
    row: dict[str, Any] = {"protocol": "v2", "clock": clock, "seed": seed, "outcome": "COMPLETED", "reason": ""}
    row |= {"downtime_ns": downtime_ms * 1_000_000, "total_ns": 2 * downtime_ms * 1_000_000, "stage_setup_0_ns": 0}
    row |= {f"phase_{name}_ns": 0 for name in PHASES} | {"phase_drain_ns": downtime_ms * 1_000_000}
    row |= {f"path_{each.name.lower()}_ns": 0 for each in Resource} | {"path_unexplained_ns": 0}
    row |= {"path_firmware_ns": downtime_ms * 1_000_000, "setup_in_downtime_ns": 0, "critical_lag_max_ns": 0}
    row |= {"late_critical_objects": 0, "read_lock_ns": 0, "device_bytes": 100 << 20, "wire_bytes": 1, "reads": 10}
    return row | more


def frame_of(virtual: Sequence[int], live: Sequence[int], real: Sequence[int] = ()) -> pl.DataFrame:
    clocks = {"virtual": virtual, "live": live, "real": real}
    return pl.DataFrame([run_row(clock, seed, ms) for clock in clocks for seed, ms in enumerate(clocks[clock])])


def ratio(compared: pl.DataFrame, figure: str) -> float | None:
    (value,) = compared.filter(pl.col("figure") == figure)["ratio"]
    return None if value is None else float(value)


def test_medians_are_compared() -> None:
    compared = compare(frame_of([100, 100, 100], [104, 105, 900]))
    assert ratio(compared, "downtime") == pytest.approx(1.05)
    assert ratio(compared, "throughput") == pytest.approx(1 / 1.05)
    assert ratio(compared, "phase drain") == pytest.approx(1.05)
    assert ratio(compared, "phase stop") is None  # there is none
    assert list(compared["figure"]) == [figure.name for figure in FIGURES]
    assert within_aim(compared)


def test_what_is_off_is_told() -> None:
    compared = compare(frame_of([100], [112]))
    assert not within_aim(compared)
    (told,) = verdicts(compared)
    assert "downtime +12.0 % (not within 10 %)" in told
    assert "firmware differs most, by +12.0 ms" in told


def test_real_runs_are_a_third_column() -> None:
    compared = compare(frame_of([100, 100], [104, 105], [80, 90]))
    assert {"live", "real", "real_least", "real_most", "real_ratio"} <= set(compared.columns)
    (downtime,) = compared.filter(figure="downtime").iter_rows(named=True)
    assert (downtime["real"], downtime["real_least"], downtime["real_most"]) == (85, 80, 90)
    assert downtime["real_ratio"] == pytest.approx(0.85)
    of_live, of_real = verdicts(compared)
    assert "live against virtual, downtime +4.5 % (within 10 %)" in of_live
    assert "real against virtual, downtime -15.0 % (not within 10 %)" in of_real
    assert not within_aim(compared)
    assert within_aim(compare(frame_of([100], [104], [95])))


def test_without_real_runs_the_table_has_no_column_for_them() -> None:
    assert not [name for name in compare(frame_of([100], [104])).columns if "real" in name]


def test_nothing_completed_is_no_agreement() -> None:
    frame = frame_of([100], [100]).with_columns(outcome=pl.lit("FAILED"))
    compared = compare(frame)
    assert compared.is_empty()
    assert not within_aim(compared)
    assert verdicts(compared) == []


def test_the_figure_has_all_ratios_and_says_how_it_was_made() -> None:
    frame = frame_of([100, 101], [104, 205])
    figure = agreement("mine", frame, compare(frame), 0.1, "proto-v3 agree mine")
    bars, ratios = figure.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["v2, virtual", "v2, live"]
    assert "downtime" in [label.get_text() for label in ratios.get_yticklabels()]
    assert "proto-v3 agree mine" in figure.get_supxlabel()
    assert "mine, medians of 2 run(s)" in figure.get_suptitle()


def test_the_figure_has_real_runs_too() -> None:
    frame = frame_of([100], [104], [95])
    figure = agreement("mine", frame, compare(frame), 0.1, "proto-v3 agree mine --real")
    bars, ratios = figure.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["v2, virtual", "v2, live", "v2, real"]
    assert ratios.get_xlabel() == "live / virtual or real / virtual"
    assert "a live and a real run take" in figure.get_suptitle()


def test_a_scenario_that_the_driver_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "agree", "live-paced", "--real", "--out", "out")
    assert done.returncode == 2
    assert "the sample driver cannot be so: device.0.count = 2" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_agree_runs_both_and_writes_both(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "agree", "live-paced", "--protocols", "v3-n2", "--seeds", "1", *quick(), "--out", "out")
    assert done.returncode in (0, 1), done.stderr  # a busy machine may be slow
    runs = pl.read_parquet(tmp_path / "out" / "runs.parquet")
    assert runs["clock"].to_list() == ["virtual", "live"]
    assert runs["outcome"].to_list() == ["COMPLETED", "COMPLETED"]
    compared = pl.read_parquet(tmp_path / "out" / "agree.parquet")
    assert ratio(compared, "downtime") is not None
    assert (tmp_path / "out" / "agree.png").exists()
    assert (tmp_path / "out" / "agree.svg").exists()
    assert ("within 10 %)" in done.stdout) is True


def test_a_run_that_cannot_be_made_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = live_scenario()
    cells = [Cell(scenario, Protocol.parse("v2", scenario), seed) for seed in (1, 2, 3)]

    async def run_here(scenario: Scenario, protocol: Protocol, seed: int, *_: object) -> LiveResult:
        if seed == failing:
            raise OSError(24, "Too many open files")
        return not_run(scenario, protocol, seed, "a stand-in")

    monkeypatch.setattr(live, "run_here", run_here)
    failing = 2
    found, interrupted = live.run_jobs(cells, live.live_run(Settings()), live.not_made, Console(file=io.StringIO()))
    assert not interrupted
    assert [run.outcome.seed for run in found] == [1, 2, 3]
    assert "Too many open files" in found[1].outcome.reason
    failing = 1
    with pytest.raises(OSError, match="Too many open files"):
        live.run_jobs(cells, live.live_run(Settings()), live.not_made, Console(file=io.StringIO()))
