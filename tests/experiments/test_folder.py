# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders of results: no result is lost, and a file is written whole, or not at all, and nowhere else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments.runs import interrupt
from experiments.runs.files import check_file, replacing
from experiments.runs.folder import STAGE, ResultFolder, damaged, digest, read_manifest, text_of, without_formulas
from experiments.runs.lock import locked
from experiments.runs.plan import Plan
from experiments.study.seeds import SeedRule
from proto_v3.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
COMMAND = ["proto-v3", "compare", "small"]
PLAN = Plan(COMMAND, ["small"], 4, writes=("runs", "compare"))


def changed(**changes: Any) -> Plan:
    return Plan(**{name: getattr(PLAN, name) for name in Plan.__dataclass_fields__} | changes)


@contextmanager
def written(
    where: Path,
    plan: Plan = PLAN,
    *,
    text: str = "new",
    runs: int | None = None,
    outcome: str = "COMPLETED",
    **how: Any,
) -> Iterator[ResultFolder]:
    """A result, staged: a table and a manifest."""
    made = plan.runs if runs is None else runs
    manifest = {
        **{"schema_version": 1, "command": plan.line, "made": "today", "scenario_file": "small"},
        **{"runs": made, "runs_planned": plan.runs, "complete": made == plan.runs, "quick": plan.quick},
        "outcomes": {"v2": {outcome: made}},
    }
    with ResultFolder(where, plan, **how) as folder:
        folder.write_table(pl.DataFrame({"text": [text]}), "runs", "csv")
        folder.write_manifest(manifest)
        yield folder


def write(where: Path, plan: Plan = PLAN, **how: Any) -> ResultFolder:
    with written(where, plan, **how) as folder:
        folder.commit()
    return folder


def text(where: Path) -> str:
    return pl.read_csv(where / "runs.csv")["text"].item()


def names(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


# --- what may be replaced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        changed(command=["proto-v3", "live", "small"]),
        changed(of=["other"]),
        changed(of=["elsewhere/small"]),
        changed(runs=3),
        changed(quick=True),
    ],
    ids=["command", "scenario", "file", "runs", "quick"],
)
def test_what_another_command_or_a_larger_run_has_made_is_not_replaced(tmp_path: Path, plan: Plan) -> None:
    write(tmp_path, text="old")
    with pytest.raises(UserError) as error, written(tmp_path, plan):
        pytest.fail("it is refused before the work")
    assert "holds 4 runs of `proto-v3 compare small`, made today" in str(error.value)
    assert "--force replaces it, --out names another folder" in str(error.value)
    assert (text(tmp_path), names(tmp_path)) == ("old", ["manifest.json", "runs.csv"])
    write(tmp_path, plan, force=True)
    assert text(tmp_path) == "new"


@pytest.mark.parametrize(
    "plan",
    [changed(of=["./small"]), changed(runs=16), changed(command=[*COMMAND, "--set", "link.gbit_per_s=1"])],
)
def test_a_result_is_replaced_by_one_of_the_same_command_with_as_many_runs(tmp_path: Path, plan: Plan) -> None:
    write(tmp_path, text="old")
    assert write(tmp_path, plan).why_there == ""
    assert text(tmp_path) == "new"


@pytest.mark.parametrize(
    ("old", "new", "replaced"),
    [
        (None, 1, False),  # of a version that made all seeds
        (None, 0, True),
        (0, 1, False),
        (0.1, 1, False),
        (1, 1, True),
        (60, 1, True),
        *((each, each, True) for each in (0, 0.07, 0.29, 0.57, 1.1, 2.3)),
    ],
)
def test_a_sweep_of_narrower_intervals_is_not_replaced(old: float | None, new: float, replaced: bool) -> None:
    manifest = {"command": "proto-v3 run small", "experiment": "small", "runs": 4}
    if old is not None:
        manifest |= SeedRule([], old / 100).told(4)
    plan = changed(command=["proto-v3", "run", "small"], half_width=new / 100)
    assert plan.replaces(Plan.of_manifest(manifest)) == replaced


@pytest.mark.parametrize("name", ["runs.csv", "runs.parquet", "compare.png", "manifest.json"])
def test_somebodys_own_files_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="no manifest"), written(tmp_path):
        pytest.fail("it is refused before the work")
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "{}"
    write(tmp_path, force=True)
    assert text(tmp_path) == "new"


def test_a_file_whose_name_was_not_known_before_the_work_is_not_replaced_either(tmp_path: Path) -> None:
    (tmp_path / "figure.json").write_text("mine")
    with written(tmp_path) as folder:
        folder.write_json(1, "figure")
        folder.commit()
    assert (tmp_path / "figure.json").read_text() == "mine"
    assert folder.folder == tmp_path / "new"
    assert "has figure.json already" in folder.why_there
    assert names(folder.folder) == ["figure.json", "manifest.json", "runs.csv"]


def test_a_special_file_whose_name_was_not_known_before_the_work_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "figure.json")
    with written(tmp_path, force=True) as folder:
        folder.write_json(1, "figure")
        folder.commit()
    assert (tmp_path / "figure.json").is_fifo()
    assert text(tmp_path / "new") == "new"


def test_files_that_the_new_result_has_not_are_removed_and_others_are_not(tmp_path: Path) -> None:
    with written(tmp_path) as folder:
        for name in ("compare", "edited"):
            folder.write_json(1, name)
        folder.commit()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "edited.json").write_text("mine")
    write(tmp_path)
    assert names(tmp_path) == ["edited.json", "manifest.json", "notes.txt", "runs.csv"]


def test_a_manifest_of_somebody_else_removes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious.json").write_text("mine")
    write(tmp_path / "a")
    file = tmp_path / "a/manifest.json"
    kept = {name: digest(tmp_path / "precious.json") for name in ("../precious.json", "..", "/etc/hosts")}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"files": kept}))
    write(tmp_path / "a", force=True)
    assert (tmp_path / "precious.json").exists()


def test_what_a_folder_holds_is_told_without_escapes(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"command": "proto-v3 \x1b[2J live", "runs": "\x07"}))
    with pytest.raises(UserError) as error, written(tmp_path):
        pytest.fail("it is refused")
    assert str(error.value).isprintable()


# --- what replaces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "name", "why"),
    [
        ({"runs": 3}, "interrupted", "that one has more runs"),
        ({"outcome": "FAILED"}, "failed", "more of the new runs FAILED"),
    ],
)
def test_a_whole_result_stays_where_the_new_one_is_worth_less(
    tmp_path: Path, new: dict[str, Any], name: str, why: str
) -> None:
    write(tmp_path, text="old")
    for place in (name, f"{name}-2"):
        folder = write(tmp_path, **new, force=True)
        assert text(tmp_path) == "old"
        assert folder.folder == tmp_path / place
        assert text(folder.folder) == "new"
        assert why in folder.why_there
        assert "4 runs of `proto-v3 compare small`" in folder.why_there
    assert damaged(tmp_path, read_manifest(tmp_path / "manifest.json")) == []


@pytest.mark.parametrize(("live", "stays"), [(True, True), (False, False)], ids=["measured", "simulated"])
def test_one_run_that_failed_spoils_a_measurement_and_is_a_result_of_a_simulation(
    tmp_path: Path, live: bool, stays: bool
) -> None:
    for outcomes in ({"COMPLETED": 4}, {"COMPLETED": 3, "FAILED": 1}):
        with written(tmp_path, text=str(len(outcomes))) as folder:
            told = {"live": {}} if live else {}
            how = {"schema_version": 1, "command": PLAN.line, "complete": True, "outcomes": {"v2": outcomes}}
            folder.write_manifest(how | told)
            folder.commit()
    assert pl.read_csv(tmp_path / "runs.csv")["text"].item() == (1 if stays else 2)


def test_an_interrupted_result_is_replaced_by_one_of_as_many_runs(tmp_path: Path) -> None:
    write(tmp_path, runs=2, text="old")
    write(tmp_path, runs=1)
    assert (text(tmp_path), text(tmp_path / "interrupted")) == ("old", "new")
    write(tmp_path, runs=3)
    assert text(tmp_path) == "new"


def test_the_first_result_stays_in_the_folder_whatever_it_is_and_a_whole_one_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, runs=3, outcome="FAILED", text="old")
    assert text(tmp_path) == "old"
    write(tmp_path)
    assert (text(tmp_path), names(tmp_path)) == ("new", ["manifest.json", "runs.csv"])


def test_an_error_after_the_runs_keeps_them_and_the_last_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, text="old")
    with pytest.raises(ZeroDivisionError), written(tmp_path):
        raise ZeroDivisionError("a figure")
    assert text(tmp_path) == "old"
    assert text(tmp_path / "unfinished") == "new"
    assert f"The table of runs is in {tmp_path / 'unfinished'}." in capsys.readouterr().err


def test_a_command_that_ends_before_its_runs_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ResultFolder(tmp_path / "a/b", PLAN):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    write(tmp_path / "a", text="old")
    with pytest.raises(KeyboardInterrupt), ResultFolder(tmp_path / "a", PLAN):
        raise KeyboardInterrupt
    assert names(tmp_path / "a") == ["manifest.json", "runs.csv"]


def test_a_full_disk_is_one_line_and_the_last_result_stays(tmp_path: Path) -> None:
    class Full:
        def savefig(self, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

    write(tmp_path, text="old")
    full: Any = Full()
    with pytest.raises(UserError, match=r"compare\.png: cannot be written: No space left"), written(tmp_path) as folder:
        folder.write_figure(full, "compare")
    assert text(tmp_path) == "old"


@pytest.mark.parametrize("change", ["cut", "gone", "other"])
def test_a_file_that_is_not_as_it_was_written_is_found(tmp_path: Path, change: str) -> None:
    write(tmp_path)
    file = tmp_path / "runs.csv"
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + (b"" if change == "cut" else b"?"))
    (told,) = damaged(tmp_path, read_manifest(tmp_path / "manifest.json"))
    assert told == f"runs.csv is {'missing' if change == 'gone' else 'not as it was written'}"


def test_a_text_of_a_table_is_no_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a=1", "", None]
    frame = without_formulas(pl.DataFrame({"text": texts, "number": [-1] * len(texts)}))
    assert frame["text"].to_list() == [f"'{each}" for each in texts[:6] if each] + texts[6:]
    assert frame["number"].to_list() == [-1] * len(texts)


# --- one command at a time -------------------------------------------------------------------------------------------


def test_a_second_command_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with written(tmp_path), pytest.raises(UserError) as error, written(tmp_path, force=True):
        pytest.fail("it is refused before the work")
    assert f"`proto-v3 compare small` (process {os.getpid()}, since 20" in str(error.value)
    write(tmp_path, force=True)


HOLDER = """
import os, sys
from pathlib import Path
from experiments.runs.folder import ResultFolder
from experiments.runs.plan import Plan
with ResultFolder(Path(sys.argv[1]), Plan(["proto-v3", "run", "x"], ["x"], 1)):
    if os.fork() == 0:
        print("held", flush=True)
    sys.stdin.read()  # the worker lives on
    os._exit(0)
"""


def test_the_lock_of_a_command_that_was_killed_is_free_though_its_workers_live(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"`proto-v3 run x` \\(process {holder.pid}, "), written(tmp_path):
            pytest.fail("it is refused")
        os.kill(holder.pid, signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / STAGE).exists()
        write(tmp_path)
    assert names(tmp_path) == ["manifest.json", "runs.csv"]


def test_a_file_system_without_locks_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path) as free:
        assert free


@pytest.mark.parametrize("out", ["file", "/dev/null", "link", "file/below"])
def test_a_folder_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere/at/all")
    with pytest.raises(UserError, match=f"--out {out}: cannot be written: "), written(Path(out)):
        pytest.fail("it is refused")
    assert names(tmp_path) == ["file", "link"]
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_a_special_file_in_the_folder_is_not_replaced(tmp_path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(tmp_path / "runs.parquet")
    else:
        (tmp_path / "runs.parquet").symlink_to("/etc/hosts")
    with pytest.raises(UserError, match=r"runs\.parquet: is no regular file"), written(tmp_path, force=True):
        pytest.fail("it is refused")
    assert (tmp_path / "runs.parquet").is_fifo() or (tmp_path / "runs.parquet").is_symlink()


# --- files that a user names -----------------------------------------------------------------------------------------


def put(path: Path, content: str = "new") -> None:
    with replacing(path) as new:
        new.write_text(content)


def test_a_regular_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 255)
    put(file, "old")
    file.chmod(0o640)
    opened = file.open()
    put(file)
    assert (file.read_text(), opened.read()) == ("new", "old"), "another file has its name now"
    opened.close()
    assert file.stat().st_mode & 0o777 == 0o640
    with pytest.raises(TypeError), replacing(file) as new:
        new.write_text(None)  # type: ignore[arg-type]
    assert file.read_text() == "new"
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("there", [True, False], ids=["file", "nothing"])
def test_a_symlink_stays_and_its_target_is_replaced(tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far/file").write_text("old")
    (tmp_path / "link").symlink_to("far/file")
    put(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far/file").read_text() == "new"


def test_a_fifo_gets_the_content(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()))
    reader.start()
    put(fifo)
    reader.join()
    assert got == ["new"]
    assert names(tmp_path) == ["fifo"]


def test_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "null"):
        put(path)
        assert path.is_char_device()


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_stdout_goes_on_where_it_stands(tmp_path: Path, name: str, to: str) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = (
        "import sys; from pathlib import Path; from experiments.runs.files import replacing\n"
        "print('before')\n"
        "with replacing(Path(sys.argv[1])) as new: new.write_text('content ')\n"
        "print('after')"
    )
    command = [sys.executable, "-c", code, name]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "told").open("w") as file:
        stdout = file if to == "file" else subprocess.PIPE
        done = subprocess.run(command, cwd=tmp_path, stdout=stdout, env=environment, text=True, check=True)
    told = (tmp_path / "told").read_text() if to == "file" else done.stdout
    assert told == "before\ncontent after\n"


def test_what_cannot_be_a_file_is_refused_before_the_work_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    (tmp_path / "folder").mkdir()
    for name, kind in (("socket", "a socket"), ("folder", "a folder")):
        for refused in (lambda path: check_file(path, "--trace"), put):
            with pytest.raises(UserError, match=f"must be the name of a file, and is {kind}"):
                refused(tmp_path / name)
    assert names(tmp_path) == ["folder", "socket"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_block_device_is_refused(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "disk", 0o60600, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("no devices can be made here")
    with pytest.raises(UserError, match="is a block device"):
        put(tmp_path / "disk")
    assert (tmp_path / "disk").is_block_device()


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_files_are_replaced_leaves_the_new_result_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    write(tmp_path, text="old")
    replace = os.replace

    def replace_and_signal(*paths: Path) -> None:
        os.kill(os.getpid(), which)
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_and_signal)
    with pytest.raises(KeyboardInterrupt), interrupt.raised():
        write(tmp_path)
    assert not damaged(tmp_path, read_manifest(tmp_path / "manifest.json"))
    assert "new" in (tmp_path / "runs.csv").read_text()


def test_a_fifo_or_a_device_in_the_place_of_a_result_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    (tmp_path / "runs.csv").symlink_to("/dev/zero")
    assert read_manifest(tmp_path / "manifest.json") == {}
    assert damaged(tmp_path, {"files": {"runs.csv": "0"}})
    for file in tmp_path.iterdir():
        with pytest.raises(OSError, match="is no regular file"):
            text_of(file)


def test_a_stage_that_cannot_be_listed_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with written(tmp_path) as folder, monkeypatch.context() as patch:

        def refused(path: Path) -> None:
            raise OSError(24, "Too many open files", str(path))

        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(UserError, match="cannot be written: Too many open files"):
            folder.commit()


def test_the_kept_results_are_as_they_were_written() -> None:
    manifests = sorted((PROJECT / "results").rglob("manifest.json"))
    assert len(manifests) > 15
    assert [wrong for file in manifests for wrong in damaged(file.parent, read_manifest(file))] == []
