# SPDX-License-Identifier: GPL-2.0-or-later
"""Published figures against the small scenario's runs: errors, bands, exit statuses, what is written and told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result
from matplotlib.collections import LineCollection

from experiments.cli import main
from experiments.commands import validate
from experiments.commands.validate import Row, run_validate, tidy
from experiments.draw.validate import published_against_simulated
from experiments.report import comparison, tables
from experiments.runs import frame as results
from experiments.runs import pool as made_runs
from experiments.runs.pool import run_cell
from experiments.study.published import Band, PublishedFigure, held_against
from proto_v3.errors import UserError
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.file import load, shipped
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.tables import Published
from tests.build.scenario import small_scenario, small_tables, to_toml

SEEDS = (1, 2, 3)
VARIED = {"firmware.service_cv": 0.2}
NEVER = {"device.0.stop_only_mib": 8.0, "vmm.bandwidth_gbit_per_s": 0.1, "vmm.give_up_s": 0.05}
"""Does not converge."""


@cache
def runs(protocol: str = "v2") -> pl.DataFrame:
    scenario = small_scenario(VARIED)
    return results.table([simulate(scenario, Protocol.parse(protocol, scenario), seed) for seed in SEEDS])


def mean_ms(column: str, protocol: str = "v2") -> float:
    values = runs(protocol)[column].to_list()
    return float(sum(values) / len(values) / 1e6)


def off_by(error: float, column: str = "downtime_ns", protocol: str = "v2") -> float:
    """The published figure that the simulation is off by so much."""
    return mean_ms(column, protocol) / (1 + error)


def published(**figures: Any) -> dict[str, Any]:
    return {"citation": "somebody, somewhere", **figures}


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the small scenario with published figures, and with changes, as NAME.toml."""

    def write(name: str, entries: Sequence[Mapping[str, Any]], changes: Mapping[str, Any] | None = None) -> str:
        tables = small_tables({"name": name, "published": list(entries), **VARIED, **(changes or {})})
        path = tmp_path / f"{name}.toml"
        path.write_text(to_toml(tables), encoding="utf-8")
        return str(path)

    return write


def validated(folder: Path, *names: str) -> int:
    return run_validate(names, SEEDS, str(folder), 1, ["proto-v3", "validate", *names])


# --- figures held against runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "column"),
    [
        ("downtime_ms", "downtime_ns"),
        ("total_ms", "total_ns"),
        ("setup_ms", "stage_setup_0_ns"),
        ("ram_load_ms", "stage_ram_load_0_ns"),
        ("device_save_ms.1", "stage_device_save_1_ns"),
        ("load_total_ms.0", "stage_load_total_0_ns"),
        ("load_waiting_ms.1", "stage_load_waiting_1_ns"),
        ("load_writing_ms.1", "stage_load_writing_1_ns"),
        ("announce_and_start_ms", "phase_resume_ns"),
        ("src_saved_to_dst_loaded_ms", "stage_saved_to_loaded_0_ns"),
    ],
)
def test_a_figure_is_held_against_the_mean_of_its_column(figure: str, column: str) -> None:
    name, _, index = figure.partition(".")
    figures = Published.model_validate(published(**{name: [1.0, 2.0] if index else 2.0}))
    frame = pl.DataFrame({"protocol": 3 * ["v2"], "outcome": 3 * ["COMPLETED"], column: [1e6, 3e6, 8e6]})
    (held,) = (held for held in held_against(figures, frame) if held.figure == figure)
    assert held.simulated_ms == 4.0


def test_the_mean_of_the_waiting_is_over_devices_and_runs() -> None:
    frame = pl.DataFrame(
        {
            "protocol": 2 * ["v2"],
            "outcome": 2 * ["COMPLETED"],
            "stage_load_waiting_0_ns": [1e6, 3e6],
            "stage_load_waiting_1_ns": [6e6, 8e6],
            "stage_load_writing_0_ns": [90e6, 90e6],
        }
    )
    figures = Published.model_validate(published(load_waiting_mean_ms=4.0))
    (held,) = held_against(figures, frame)
    assert held.simulated_ms == 4.5


def test_every_published_figure_that_v2_or_v3_records_is_found() -> None:
    """A figure whose column is misspelt would be told as not simulated, and nobody would know why."""
    known = {"stop_ms", "ram_save_ms", "device_save_ms", "ram_load_ms", "device_load_ms", "config_load_ms",
             "announce_and_start_ms", "downtime_ms", "total_ms", "setup_ms"}  # fmt: skip
    lists = {name for name, field in Published.model_fields.items() if field.default == [] and name != "fitted"}
    figures = Published.model_validate(published(**{name: [1.0] if name in lists else 1.0 for name in known}))
    held = held_against(figures, runs())
    assert len(held) == len(known)
    assert all(one.simulated_ms is not None for one in held)


def test_figures_are_held_against_their_own_protocol_only() -> None:
    figures = Published.model_validate(published(protocol="v3-n2", downtime_ms=1.0))
    both = pl.concat([runs(), runs("v3-n2")], how="diagonal")
    (held,) = held_against(figures, both)
    assert held.simulated_ms == pytest.approx(mean_ms("downtime_ns", "v3-n2"))
    assert held.simulated_ms != pytest.approx(mean_ms("downtime_ns"))
    (missing,) = held_against(figures, runs())
    assert missing.simulated_ms is None
    assert missing.error is None


def test_compare_shows_a_table_for_every_entry_whose_protocol_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        published(downtime_ms=off_by(0.1)),
        published(protocol="v3-n2", downtime_ms=off_by(-0.2, protocol="v3-n2"), load_total_ms=[1.0]),
        published(protocol="v3-n8", downtime_ms=1.0),
    ]
    scenario = small_scenario(VARIED | {"published": entries})
    for section in comparison.sections(scenario, pl.concat([runs(), runs("v3-n2")], how="diagonal")):
        section.print(tables.console())
    text = capsys.readouterr().out
    assert text.count("Published against simulated (") == 2
    of_v2, of_v3 = text.partition("Published against simulated (v3-n2), ms")[::2]
    assert "+10.0" in of_v2
    assert "-20.0" in of_v3
    assert ["load", "total", "0", "1.0", "-", "-", "predicted"] in [line.split() for line in of_v3.splitlines()]


# --- bands and exit statuses -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "outside", "status"),
    [
        (0.0999, "-", 0),
        (-0.0999, "-", 0),
        (0.1001, "10", 0),
        (-0.1499, "10", 0),
        (0.1501, "15", 1),
        (-0.1501, "15", 1),
    ],
)
def test_an_error_is_marked_by_its_band_and_the_widest_one_decides(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: float, outside: str, status: int
) -> None:
    case = write("case", [published(downtime_ms=off_by(error), total_ms=off_by(0, "total_ns"))])
    assert validated(tmp_path / "out", case) == status
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("downtime  ")]
    assert lines[0][-4:] == [f"{100 * error:+.1f}", outside, "-", "predicted"]


@pytest.mark.slow
def test_one_bad_figure_among_good_ones_is_enough(write: Write, tmp_path: Path) -> None:
    good = write("good", [published(downtime_ms=off_by(0.01))])
    bad = write("bad", [published(downtime_ms=off_by(0.01), total_ms=off_by(0.3, "total_ns"))])
    assert validated(tmp_path / "out", good) == 0
    assert validated(tmp_path / "out", good, bad) == 1


def test_a_figure_that_was_used_to_fit_must_be_right_too(write: Write, tmp_path: Path) -> None:
    case = write("case", [published(downtime_ms=off_by(0.3), fitted=["downtime_ms"])])
    assert validated(tmp_path / "out", case) == 1


@pytest.mark.slow
def test_a_run_that_failed_is_enough_whatever_the_others_give(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks_at_2(scenario: Scenario, protocol: Protocol, seed: int) -> Outcome:
        if seed == 2:
            raise RuntimeError("a bug")
        return simulate(scenario, protocol, seed)

    case = write("case", [published(setup_ms=1.0)])  # takes 1 ms in every run
    assert validated(tmp_path / "out", case) == 0
    monkeypatch.setattr(made_runs, "simulate", breaks_at_2)
    assert validated(tmp_path / "out", case) == 1
    text = capsys.readouterr().out
    assert "not all runs were completed" in text
    assert "a bug" in text
    table = pl.read_parquet(tmp_path / "out/validate.parquet")
    assert table["simulated_ms"].to_list() == [1.0], "of the runs that were completed"


def test_a_stage_that_the_protocol_does_not_have_is_not_simulated(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write("case", [published(protocol="v3-n1", downtime_ms=off_by(0, protocol="v3-n1"), load_total_ms=[5.0])])
    assert validated(tmp_path / "out", case) == 1
    assert "load total 0 is not within 15 %: not simulated." in capsys.readouterr().out
    table = pl.read_parquet(tmp_path / "out/validate.parquet").filter(figure="load_total_ms.0")
    assert table.select("simulated_ms", "error").rows() == [(None, None)]


def test_a_case_that_does_not_converge_gives_no_figure(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert validated(out, write("case", [published(downtime_ms=off_by(0))])) == 0
    assert (out / "validate.png").exists()
    (out / "notes.txt").write_text("mine")
    assert validated(out, write("case", [published(downtime_ms=5.0)], NEVER)) == 1
    text = capsys.readouterr().out
    assert "DID_NOT_CONVERGE" in text
    assert "nothing to draw" in text
    assert "nan" not in text.lower()
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "notes.txt",
        "runs.parquet",
        "validate.parquet",
    ]


# --- bands -----------------------------------------------------------------------------------------------------------

STOPS = {"ranges": {"device.0.suspend_ms": {"low": 0.5, "high": 10.5, "log": False, "why": "not known"}}}
"""The stop is 1 + 2 ms and this, which nothing else depends on."""


def test_a_band_is_that_of_the_ranges(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a stop whose one uncertain part is 0.5 to 10.5 ms: from 1 + 2 + 1 to 1 + 2 + 10 ms."""
    case = write("case", [published(stop_ms=4.0, setup_ms=1.0), published(protocol="v3-n2", stop_ms=14.0)], STOPS)
    bare = write("bare", [published(setup_ms=1.0)])
    command = ["proto-v3", "validate"]
    assert run_validate([case, bare], [1], str(tmp_path / "out"), 1, command, samples=256) == 1
    table = pl.read_parquet(tmp_path / "out/validate.parquet")
    stops = table.filter(figure="stop_ms")
    assert stops["simulated_ms"].to_list() == pytest.approx([4.0, 4.0], abs=0.01), "the runs have the value"
    assert stops["simulated_low_ms"].to_list() == pytest.approx([4.0, 4.0], abs=0.1)
    assert stops["simulated_high_ms"].to_list() == pytest.approx([13.0, 13.0], abs=0.1)
    assert stops["inside"].to_list() == [stops["simulated_low_ms"][0] <= 4.0, False]
    assert table["samples"].to_list() == [256, 256, 256, None]
    assert table.filter(figure="setup_ms").select("simulated_low_ms", "simulated_high_ms", "inside").rows() == [
        (1.0, 1.0, True),
        (None, None, None),
    ]
    text = " ".join(capsys.readouterr().out.split())
    assert "Without ranges, so without bands: bare." in text
    assert f"inside their band: {table['inside'].sum()} of 3" in text


def test_samples_are_paired_and_kept_with_their_values(write: Write, tmp_path: Path) -> None:
    case = write("case", [published(stop_ms=4.0), published(protocol="v3-n2", stop_ms=14.0)], STOPS)
    run_validate([case], [5, 6], str(tmp_path / "out"), 1, ["x"], samples=4)
    samples = pl.read_parquet(tmp_path / "out/samples.parquet")
    assert samples["protocol"].to_list() == 4 * ["v2", "v3-n2"]
    assert samples["sample"].to_list() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert samples["seed"].to_list() == [5, 5, 6, 6, 5, 5, 6, 6]
    drawn = [json.loads(values)["device.0.suspend_ms"] for values in samples["values"]]
    assert len(set(drawn)) == 4
    assert (samples["stage_stop_0_ns"] / 1e6).to_list() == pytest.approx([3 + value for value in drawn], abs=0.01)
    runs = pl.read_parquet(tmp_path / "out/runs.parquet")
    assert runs["seed"].to_list() == [5, 6, 5, 6]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["runs"], manifest["samples"]) == (4, 4)
    assert manifest["scenarios"]["case"]["ranges"]["device.0.suspend_ms"]["high"] == 10.5


def test_samples_that_do_not_complete_are_told(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranges = {"ranges": {"vmm.bandwidth_gbit_per_s": {"low": 0.1, "high": 20.0, "why": "x"}}}
    changes = NEVER | {"vmm.bandwidth_gbit_per_s": 20.0, "vmm.give_up_s": 0.2} | ranges
    case = write("case", [published(setup_ms=1.0)], changes)
    assert run_validate([case], [1], str(tmp_path / "out"), 1, ["x"], samples=16) == 0
    kept = pl.read_parquet(tmp_path / "out/validate.parquet")["samples"].item()
    assert 0 < kept < 16
    told = f"case, v2: {16 - kept} of 16 samples did not complete; the bands are of the others."
    assert told in " ".join(capsys.readouterr().out.split())


def test_samples_of_which_none_completes_make_no_bands(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranges = {"ranges": {"device.0.suspend_ms": {"low": 0.5, "high": 10.5, "why": "x"}}}
    case = write("case", [published(setup_ms=1.0)], NEVER | {"vmm.give_up_s": 0.2} | ranges)
    run_validate([case], [1], str(tmp_path / "out"), 1, ["x"], samples=4)
    told = " ".join(capsys.readouterr().out.split())
    assert "case, v2: none of 4 samples completed, so there are no bands." in told
    assert "the bands are of the others" not in told


# --- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_case_is_run_under_the_protocols_of_its_figures(write: Write, tmp_path: Path) -> None:
    one = write("one", [published(protocol="v3-n2", downtime_ms=5.0), published(protocol="v3-n1")])
    two = write("two", [published(downtime_ms=5.0), published(setup_ms=1.0), published(protocol="v3-n1", stop_ms=1.0)])
    validated(tmp_path / "out", one, two)
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["outcomes"]
    assert counts == {"one": {"v3-n2": {"COMPLETED": 3}}, "two": {name: {"COMPLETED": 3} for name in ("v2", "v3-n1")}}


def test_without_a_name_all_shipped_scenarios_with_figures_are_run(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write("with", [published(downtime_ms=off_by(0))]), write("without", []), write("bare", [published()])]
    monkeypatch.setattr(validate, "shipped", lambda: {path: Path(path) for path in paths})
    assert validated(tmp_path / "out") == 0
    assert pl.read_parquet(tmp_path / "out/validate.parquet")["case"].to_list() == ["with"]


def test_there_is_a_shipped_scenario_with_figures() -> None:
    assert any(published.figures() for name in shipped() for published in load(name).published)


def test_bad_cases_are_refused_before_anything_is_written(write: Write, tmp_path: Path) -> None:
    good = write("good", [published(downtime_ms=5.0)])
    bare = write("bare", [published()])
    namesake = tmp_path / "namesake.toml"
    namesake.write_text(Path(good).read_text())
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no scenario 'no-such'"):
        validated(out, "no-such")
    with pytest.raises(UserError, match=r"bare\.toml: no published figures to compare the runs with"):
        validated(out, good, bare)
    for twice in (good, str(namesake)):
        with pytest.raises(UserError, match="two cases have the same name"):
            validated(out, good, twice)
    with pytest.raises(UserError, match="must be the name of a folder"):
        run_validate([good], SEEDS, "", 1, [])
    assert not out.exists()


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_a_figure(write: Write, tmp_path: Path) -> None:
    kinds = {"fitted": ["device_save_ms.0"], "sums": ["downtime_ms"]}
    two = published(case="measured", device_save_ms=[2.0], downtime_ms=off_by(0.07), **kinds)
    mine = write("mine", [two, published(protocol="v3-n2", downtime_ms=off_by(-0.05, protocol="v3-n2"))])
    assert validated(tmp_path / "out", mine) == 1
    table = pl.read_parquet(tmp_path / "out/validate.parquet")
    assert table.columns == [
        "scenario",
        "case",
        "protocol",
        "figure",
        "published_ms",
        "simulated_ms",
        "error",
        "kind",
        "simulated_low_ms",
        "simulated_high_ms",
        "samples",
        "inside",
    ]
    assert table.select("scenario", "case", "protocol", "figure", "kind").rows() == [
        ("mine", "measured", "v2", "device_save_ms.0", "fitted"),
        ("mine", "measured", "v2", "downtime_ms", "sum"),
        ("mine", "mine", "v3-n2", "downtime_ms", "predicted"),
    ]
    assert table.select("simulated_low_ms", "simulated_high_ms", "samples", "inside").is_empty() is False
    assert set(table.select("simulated_low_ms", "simulated_high_ms", "samples", "inside").rows()) == {4 * (None,)}
    save = mean_ms("stage_device_save_0_ns")
    assert table["published_ms"].to_list() == pytest.approx([2.0, off_by(0.07), off_by(-0.05, protocol="v3-n2")])
    assert table["simulated_ms"].to_list() == pytest.approx([save, mean_ms("downtime_ns"), off_by(0, protocol="v3-n2")])
    assert table["error"].to_list() == pytest.approx([save / 2 - 1, 0.07, -0.05])


@pytest.mark.slow
def test_the_manifest_tells_how_it_was_made(write: Write, tmp_path: Path) -> None:
    case = write("case", [published(downtime_ms=off_by(0))])
    validated(tmp_path / "out", case)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["command"] == f"proto-v3 validate {case}"
    assert manifest["complete"] is True
    assert manifest["seeds"] == list(SEEDS)
    assert manifest["scenario_files"] == {"case": case}
    assert Scenario.model_validate(manifest["scenarios"]["case"]) == load(case)
    assert manifest["versions"].keys() >= {"python", "proto-v3"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", "runs.parquet", "validate.parquet", "validate.png", "validate.svg"}


def test_the_figure_tells_fitted_from_predicted_and_names_every_figure() -> None:
    rows = [
        Row("one", "one", "v2", PublishedFigure("downtime_ms", 100.0, 105.0, "predicted", Band(90.0, 110.0, 16))),
        Row("one", "one", "v2", PublishedFigure("device_save_ms.1", 10.0, 9.0, "fitted")),
        Row("two", "two", "v3-n4", PublishedFigure("downtime_ms", 100.0, 250.0, "sum", Band(120.0, 400.0, 15))),
        Row("two", "two", "v3-n4", PublishedFigure("load_total_ms.0", 100.0, None, "predicted")),
    ]
    figure = published_against_simulated(tidy(rows), (0.1, 0.15), 3, "proto-v3 validate one two")
    against, errors = figure.axes
    assert (against.get_xscale(), against.get_yscale()) == ("log", "log")
    points = [line for line in against.lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(100, 105), (10, 9), (100, 250)]
    hollow = [line.get_markerfacecolor() == "white" for line in points]
    assert hollow == [False, True, False]
    assert [line.get_fillstyle() for line in points] == ["full", "full", "left"], "a sum is half filled"
    assert points[0].get_color() != points[2].get_color(), "a case has its colour"
    bars = [bar.get_segments()[0].tolist() for bar in against.collections if isinstance(bar, LineCollection)]
    assert bars == [[[100, 90], [100, 110]], [[100, 120], [100, 400]]]
    bars = [bar.get_segments()[0].tolist() for bar in errors.collections if isinstance(bar, LineCollection)]
    assert bars == [[[pytest.approx(-10), 0], [pytest.approx(10), 0]], [[pytest.approx(20), 2], [40, 2]]]
    assert [text.get_text() for text in against.texts] == ["two: downtime"], "what is outside is named"
    (identity,) = (line for line in against.lines if len(line.get_xdata()) == 2)
    assert list(identity.get_xdata()) == list(identity.get_ydata())
    assert [label.get_text() for label in errors.get_yticklabels()] == [
        "one, v2: downtime",
        "one, v2: device save 1",
        "two, v3-n4: downtime",
        "two, v3-n4: load total 0",
    ]
    assert [text.get_text() for text in errors.texts] == ["+5.0 %", "-10.0 %", "+150.0 %", "not simulated"]
    low, high = errors.get_xlim()
    assert all(low <= line.get_xdata()[0] <= high for line in errors.lines), "what is far off is drawn at the edge"
    assert "proto-v3 validate one two" in figure.get_supxlabel()


# --- what is told ----------------------------------------------------------------------------------------------------


def row_of(text: str, begins: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [begins])
    return line.split()


@pytest.mark.slow
def test_the_summary_counts_what_is_within_the_margins_and_each_class_apart(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"downtime_ms": 0.05, "total_ms": 0.12, "setup_ms": -0.2, "ram_save_ms": 0.01, "stop_ms": 0.11}
    columns = {"setup_ms": "stage_setup_0_ns", "ram_save_ms": "stage_ram_save_0_ns", "stop_ms": "stage_stop_0_ns"}
    values = {key: off_by(error, columns.get(key, key.replace("_ms", "_ns"))) for key, error in figures.items()}
    entry = published(fitted=["ram_save_ms", "stop_ms"], sums=["total_ms"], load_total_ms=[1.0], **values)
    assert validated(tmp_path / "out", write("case", [entry])) == 1
    text = capsys.readouterr().out
    assert row_of(text, "predicted") == ["predicted", "3", "1", "1", "12.5", "20.0", "0", "0"]
    assert row_of(text, "sum") == ["sum", "1", "0", "1", "12.0", "12.0", "0", "0"]
    assert row_of(text, "fitted") == ["fitted", "2", "1", "2", "6.0", "11.0", "0", "0"]
    assert row_of(text, "all") == ["all", "6", "2", "4", "11.0", "20.0", "0", "0"]
    told = "predicted: 3, of these 1 within 10 % and 1 within 15 %; error: median 12.5 %, worst 20.0 %."
    assert f"- Published figures, {told}" in " ".join(text.split())


@pytest.mark.slow
def test_the_downtimes_of_all_cases_stand_in_one_table(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write("one", [published(downtime_ms=off_by(0.05), setup_ms=1.0)])
    two = write("two", [published(setup_ms=1.0), published(protocol="v3-n2", downtime_ms=off_by(0, protocol="v3-n2"))])
    validated(tmp_path / "out", one, two)
    _, _, table = capsys.readouterr().out.partition("The downtimes of all cases")
    lines = [line.split() for line in table.partition("\n\n")[0].splitlines()]
    assert [line[:2] for line in lines[3:]] == [["one", "v2"], ["two", "v3-n2"]]
    assert f"{mean_ms('downtime_ns'):.1f}" in lines[3]
    assert "+5.0" in lines[3]


def test_set_holds_the_published_figures_against_another_machine(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write("case", [published(setup_ms=1.0)])
    out = str(tmp_path / "out")
    assert run_validate([case], [1], out, 1, ["proto-v3"], ["vmm.setup_ms=2.0"]) == 1
    text = capsys.readouterr().out
    assert "With --set vmm.setup_ms=2.0: not the machines that were measured." in text
    assert row_of(text, "setup")[1:7] == ["v2", "1.0", "2.0", "-", "-", "+100.0"]
    two = write("two", [published(device_save_ms=[1.0])])
    with pytest.raises(UserError, match=r"published\.0\.device_save_ms = \[1\.0\]: must have one value a device, 3"):
        run_validate([two], [1], out, 1, [], ["device.0.count=3"])


@pytest.mark.slow
def test_what_had_to_differ_is_told_with_its_source(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("base", [])
    tables = {
        "extends": "base.toml",
        "name": "mine",
        "description": "Built on the small one",
        "published": [published(setup_ms=1.0)],
        "driver": {"chunks": 3},
        "firmware": {"engines": 4},
        "device": [{"state_mib": 7.0}],
        "ram": {"sync_ms": 0.3, "send_gib_per_s": 3.0},  # not a table that is held constant, but what is fitted is told
        "vmm": {"read_mib": 0.5},  # left out in the base
        "sources": {"driver.chunks": "kernel: another driver", "ram.send_gib_per_s": "fitted: by eye"},
    }
    mine = tmp_path / "mine.toml"
    mine.write_text(to_toml(tables))
    assert validated(tmp_path / "out", str(mine)) == 0
    text = capsys.readouterr().out
    assert "mine: what had to differ from base" in text
    assert row_of(text, "driver.chunks") == ["driver.chunks", "2", "3", "kernel:", "another", "driver"]
    assert row_of(text, "firmware.engines") == ["firmware.engines", "2", "4", "yours:", "mine.toml"]
    assert row_of(text, "device.0.state_mib") == ["device.0.state_mib", "8", "7", "yours:", "mine.toml"]
    assert "sync_ms" not in text
    assert row_of(text, "ram.send_gib_per_s")[-3:] == ["fitted:", "by", "eye"]
    assert row_of(text, "vmm.read_mib") == ["vmm.read_mib", "-", "0.5", "yours:", "mine.toml"]


@pytest.mark.slow
def test_a_case_that_differs_in_nothing_or_builds_on_nothing_is_told_as_that(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write("base", [published(setup_ms=1.0)])
    same = tmp_path / "same.toml"
    same.write_text(
        to_toml({"extends": "base.toml", "name": "same", "description": "x"} | {"published": [published(setup_ms=1)]})
    )
    validated(tmp_path / "out", base, str(same))
    text = capsys.readouterr().out
    assert "base extends nothing: all parameters are its own." in text
    assert "same: nothing had to differ from base." in text


def test_citations_are_told_as_they_are(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validated(tmp_path / "out", write("case", [published(citation="[bold]me[/red]", setup_ms=1.0)]))
    assert "Published (case, v2): [bold]me[/red]" in capsys.readouterr().out


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["validate", *arguments])


def test_the_command_gives_the_exit_status(write: Write, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out"), "--jobs", "1", "--seeds", "3"]
    assert invoke(write("good", [published(downtime_ms=off_by(0.14))]), *out).exit_code == 0
    assert invoke(write("bad", [published(downtime_ms=off_by(0.16))]), *out).exit_code == 2, "another case"
    assert invoke(write("bad", [published(downtime_ms=off_by(0.16))]), *out, "--force").exit_code == 1
    assert json.loads((tmp_path / "out/manifest.json").read_text())["seeds"] == [1, 2, 3]


@pytest.mark.parametrize(
    "arguments",
    [["no-such"], ["vgpu-32g"], ["mlx5-2vf", "mlx5-2vf"], ["--seeds", "0"], ["--jobs", "0"], ["--set", "a=1"]],
)
def test_bad_input_gives_2_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert arguments[0] in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [0, 2])
def test_ctrl_c_gives_130_and_leaves_what_an_earlier_run_wrote(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    def interrupted(cells: Sequence[made_runs.Cell], jobs: int | None) -> Iterator[tuple[int, Outcome]]:
        yield from ((at, run_cell(cells[at])) for at in range(before))
        raise KeyboardInterrupt

    case, out = write("case", [published(downtime_ms=off_by(0))]), tmp_path / "out"
    assert invoke(case, "--seeds", "3", "--out", str(out)).exit_code == 0
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(made_runs, "in_processes", interrupted)
    done = invoke(case, "--seeds", "5", "--out", str(out))
    assert done.exit_code == 130
    assert done.output == f"interrupted: {before} of 5 runs were done; nothing was written\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier


def test_help_names_the_options_and_the_exit_statuses() -> None:
    done = invoke("--help")
    assert done.exit_code == 0
    for word in ("CASE", "--seeds", "--jobs", "--out", "out/validate", "15 %", "130"):
        assert word in done.output
