# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 diff`: folders of results side by side, whichever command made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments.commands.diff import manifest_differences, run_diff
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.kept import read_folder
from experiments.study.differences import Compared, side_by_side
from experiments.study.statistics import difference
from proto_v3.errors import UserError
from sim.run import simulate
from sim.scenario.protocol import Protocol
from tests.build.scenario import small_scenario

SCENARIO = small_scenario({"firmware.service_cv": 0.2})
SLOWER = small_scenario({"firmware.service_cv": 0.2, "firmware.load_finish_ms": 6.0})

Document = dict[str, Any]


@cache
def runs(slower: bool = False, seeds: Sequence[int] = (1, 2, 3)) -> pl.DataFrame:
    scenario = SLOWER if slower else SCENARIO
    names = ("v2", "v3-n1")
    return results.table([simulate(scenario, Protocol.parse(n, scenario), seed) for seed in seeds for n in names])


def folder(path: Path, frame: pl.DataFrame, slower: bool = False, **more: Any) -> str:
    """A folder as `compare` writes it; `more` are other keys of its manifest."""
    path.mkdir()
    frame.write_parquet(path / "runs.parquet")
    told = manifest.of_scenario(
        SLOWER if slower else SCENARIO, "small.toml", ["proto-v3", path.name], frame, frame.height
    )
    (path / "manifest.json").write_text(json.dumps(told | more))
    return str(path)


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], tuple[int, Document]]:
    def compared(a: str, b: str) -> tuple[int, Document]:
        status = run_diff(a, b, as_json=True)
        return status, json.loads(capsys.readouterr().out)

    return compared


Diff = Callable[[str, str], tuple[int, Document]]


def rows(document: Document, table: str) -> list[Document]:
    return document["tables"][table]["rows"]


def test_the_same_runs_are_the_same_whatever_made_them(tmp_path: Path, diff: Diff) -> None:
    status, document = diff(folder(tmp_path / "a", runs()), folder(tmp_path / "b", runs(), git_revision="another"))
    assert (status, document["same"]) == (0, True)
    assert {row["key"] for row in rows(document, "manifests")} == {"command", "git_revision"}


def test_differences_are_paired_by_seed_and_say_which_key_made_them(tmp_path: Path, diff: Diff) -> None:
    status, document = diff(folder(tmp_path / "a", runs()), folder(tmp_path / "b", runs(slower=True), slower=True))
    assert (status, document["same"]) == (1, False)
    (key,) = (row for row in rows(document, "manifests") if row["key"].startswith("scenario."))
    assert key == {"key": "scenario.firmware.load_finish_ms", "a": "5.0", "b": "6.0"}
    downtimes = [row for row in rows(document, "changes_ms") if row["measure"] == "downtime"]
    assert [(row["place"], row["paired"], row["a_runs"]) for row in downtimes] == [
        ("v2", "yes", 3),
        ("v3-n1", "yes", 3),
    ]
    for row in downtimes:
        of_a, of_b = (frame.filter(protocol=row["place"])["downtime_ns"] for frame in (runs(), runs(slower=True)))
        assert row["difference_mean_ms"] == pytest.approx((of_b - of_a).mean() / 1e6)
        assert row["difference_low_ms"] <= row["difference_mean_ms"] <= row["difference_high_ms"]
        assert row["b_median_ms"] == pytest.approx(of_b.median() / 1e6)
    assert {"phase load", "path load", "total"} <= {row["measure"] for row in rows(document, "changes_ms")}


def test_runs_that_ended_otherwise_and_runs_of_one_side_are_listed(tmp_path: Path, diff: Diff) -> None:
    failed = (pl.col("seed") == 2) & (pl.col("protocol") == "v2")
    gone = (pl.col("seed") == 3) & (pl.col("protocol") == "v3-n1")
    other = (
        runs()
        .filter(~gone)
        .with_columns(
            outcome=pl.when(failed).then(pl.lit("FAILED")).otherwise("outcome"),
            reason=pl.when(failed).then(pl.lit("\x1b[2Jlost")).otherwise("reason"),
        )
    )
    status, document = diff(folder(tmp_path / "a", runs()), folder(tmp_path / "b", other))
    assert status == 1
    (row,) = rows(document, "outcomes")
    assert (row["place"], row["seed"], row["a"], row["b"]) == ("v2", 2, "COMPLETED", "FAILED")
    assert row["b_reason"] == "\\x1b[2Jlost"
    assert any("1 only in A, 0 in B" in sentence for sentence in document["conclusion"])


def test_runs_of_other_seeds_or_scenarios_are_compared_as_two_samples(tmp_path: Path, diff: Diff) -> None:
    others = [runs(seeds=(7, 8, 9)), runs(slower=True).with_columns(scenario=pl.lit("another"))]
    a = folder(tmp_path / "a", runs())
    for name, other in zip("bc", others, strict=True):
        _, document = diff(a, folder(tmp_path / name, other))
        downtimes = [row for row in rows(document, "changes_ms") if row["measure"] == "downtime"]
        assert [row["paired"] for row in downtimes] == ["no", "no"]
        assert all(row["difference_low_ms"] < row["difference_high_ms"] for row in downtimes)
        assert sum("(not paired, 3 and 3 runs)" in sentence for sentence in document["conclusion"]) == 2


def test_seeds_that_both_have_are_paired(tmp_path: Path, diff: Diff) -> None:
    _, document = diff(folder(tmp_path / "a", runs()), folder(tmp_path / "b", runs().filter(pl.col("seed") > 1)))
    assert document["tables"].keys() == {"manifests"}, "they are the same"
    assert any("4 in both, 4 of them the same; 2 only in A, 0 in B" in each for each in document["conclusion"])


def test_clocks_are_kept_apart_and_one_clock_is_compared_with_another(tmp_path: Path, diff: Diff) -> None:
    both = pl.concat([runs().with_columns(clock=pl.lit(clock)) for clock in ("virtual", "live")])
    assert Compared.of(both, both).by == ["clock", "protocol"]
    _, document = diff(
        folder(tmp_path / "a", runs()), folder(tmp_path / "b", runs().with_columns(clock=pl.lit("live")))
    )
    assert document["same"]
    assert "The clocks are different: virtual in A, live in B." in document["conclusion"]


def test_cells_of_a_sweep_are_matched_by_what_they_are(tmp_path: Path) -> None:
    swept = runs().with_columns(cell=pl.lit("x"), base=pl.lit("small"), settings=pl.lit(["ram.size_gib=1"]))
    more = pl.concat([swept, swept.with_columns(settings=pl.lit(["ram.size_gib=2"]))])
    for name, frame in (("a", swept), ("b", more)):
        (tmp_path / name).mkdir()
        frame.write_parquet(tmp_path / name / "runs.parquet")
        (tmp_path / name / "manifest.json").write_text("{}")
    a, b = (read_folder(tmp_path / name).runs for name in "ab")
    assert a is not None
    assert b is not None
    compared = Compared.of(a, b)
    assert (compared.only, compared.in_both, compared.same_runs) == ((0, 6), 6, 6)
    a, b = (each.with_columns(part=pl.lit(part)) for each, part in ((a, "streams"), (b, "state")))
    assert Compared.of(a, b).same_runs == 6, "the same run, made for another part of the question"
    as_it_is = pl.concat(
        [b.with_columns(wire_bytes=pl.lit(0)), a.with_columns(settings=pl.lit(""))], how="diagonal_relaxed"
    )
    compared = Compared.of(as_it_is, runs())
    assert (compared.only, compared.in_both, compared.same_runs) == ((0, 0), 6, 6), "no setting changes these"


def test_tables_of_effects_are_compared_number_by_number() -> None:
    a = pl.DataFrame(
        {"streams": [1, 2], "base": ["v2", "v2"], "difference_mean_ms": [1.0, 2.0]}
        | {"difference_low_ms": [0.5, 1.5], "difference_high_ms": [1.5, 2.5], "pairs": [3, 3]}
    )
    b = a.with_columns(difference_low_ms=pl.Series([0.5, 1.0]), pairs=pl.Series([3, 30]))
    assert side_by_side(a, a, ["streams"]) == []
    first, second = side_by_side(a, b, ["streams"])
    assert first == {"place": "streams=2 v2", "value": "difference_mean_ms"} | {
        "a": 2.0,
        "a_low": 1.5,
        "a_high": 2.5,
        "b": 2.0,
        "b_low": 1.0,
        "b_high": 2.5,
    }
    assert (second["value"], second["a"], second["b"]) == ("pairs", 3, 30)
    assert [row["b"] for row in side_by_side(a, b.head(1), ["streams"])] == [None, None], "a row is in one only"


def test_only_a_validate_folder_is_compared_by_its_figures(tmp_path: Path, diff: Diff) -> None:
    figures = pl.DataFrame({"scenario": ["s"], "figure": ["stop_ms"], "published_ms": [8.0], "simulated_ms": [4.0]})
    for name, simulated in (("a", 4.0), ("b", 5.0)):
        (tmp_path / name).mkdir()
        figures.with_columns(simulated_ms=simulated).write_parquet(tmp_path / name / "validate.parquet")
        (tmp_path / name / "manifest.json").write_text("{}")
    status, document = diff(str(tmp_path / "a"), str(tmp_path / "b"))
    assert status == 1
    (row,) = rows(document, "validate")
    assert (row["place"], row["value"], row["a"], row["b"]) == ("s stop_ms", "simulated_ms", 4.0, 5.0)


def test_the_band_of_a_figure_stands_beside_it() -> None:
    a = pl.DataFrame({"figure": ["stop_ms"], "simulated_ms": [4.0], "inside": [True], "samples": [16]})
    a = a.with_columns(simulated_low_ms=pl.lit(3.0), simulated_high_ms=pl.lit(5.0))
    b = a.with_columns(simulated_low_ms=pl.lit(2.0), inside=pl.lit(False))
    band, inside = side_by_side(a, b, [])
    assert band["value"] == "simulated_ms"
    assert [band[key] for key in ("a", "a_low", "a_high", "b", "b_low", "b_high")] == [4.0, 3.0, 5.0, 4.0, 2.0, 5.0]
    assert (inside["value"], inside["a"], inside["b"]) == ("inside", True, False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no folder of results: it has no manifest.json"),
        ({"manifest.json": "{"}, "manifest.json: cannot be read"),
        ({"manifest.json": "[]"}, "is no manifest"),
        ({"manifest.json": "{}"}, "there is nothing to compare"),
        ({"manifest.json": "{}", "runs.csv": "protocol,seed\nv2,1\n"}, "has no column outcome"),
        ({"manifest.json": "{}", "runs.parquet": "cut"}, "runs.parquet: cannot be read as Parquet"),
        ({"x/manifest.json": "{}"}, "there are results in x inside it"),
        (None, "is no folder"),
    ],
)
def test_what_is_no_result_is_told_in_a_line(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    for name, text in (files or {}).items():
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "b" / name).write_text(text)
    if files == {}:
        (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        run_diff(folder(tmp_path / "a", runs()), str(tmp_path / "b"))
    assert "\n" not in str(raised.value)


def test_a_csv_of_another_version_is_compared_by_the_columns_that_both_have(tmp_path: Path, diff: Diff) -> None:
    a, b = (
        folder(tmp_path / "a", runs()),
        folder(tmp_path / "b", runs().drop("bound_by").with_columns(new_ns=pl.lit(1))),
    )
    frame = pl.read_parquet(tmp_path / "b" / "runs.parquet")
    (tmp_path / "b" / "runs.parquet").unlink()
    frame.write_csv(tmp_path / "b" / "runs.csv")
    status, document = diff(a, b)
    assert (status, document["same"]) == (0, True)


def test_keys_of_manifests() -> None:
    a: Document = {"device": [{"count": 1}, {"count": 1}], "seeds": [1, 2], "made": 1, "link": {"mtu": None}}
    b: Document = {"device": [{"count": 2}], "seeds": [1], "made": 2, "link": {"mtu": 9000}}
    assert [tuple(row.values()) for row in manifest_differences(a, b)] == [
        ("device.0.count", "1", "2"),
        ("device.1", "(1 keys)", "-"),
        ("seeds", "1 2", "1"),
        ("link.mtu", "none", "9000"),
    ]


def test_an_interval_of_two_samples_holds_their_difference_about_as_often_as_it_says() -> None:
    draw, held = np.random.default_rng(3), 0
    for _ in range(200):
        held += 1.0 in difference(draw.normal(0, 1, 20), draw.normal(1, 2, 30), paired=False)
    assert 0.88 < held / 200 < 0.99
    assert difference(np.array([1.0]), np.array([2.0, 3.0]), paired=False).low == 1.5, "no interval of one value"
