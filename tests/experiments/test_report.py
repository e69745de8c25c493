# SPDX-License-Identifier: GPL-2.0-or-later
"""The report: one page with nothing beside itself, whose answers are those of the tables."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

from experiments.cli import main
from experiments.report import answers, left_out
from experiments.study.claims import CLAIMS, Finding, Verdict
from experiments.study.experiment import Answer, Experiment, Point
from proto_v3.errors import UserError
from tests.build.grids import write_quick

SETTINGS = ("ram.size_gib=1", "ram.nonzero_gib=0.01", "ram.working_set_mib=1", "vmm.bandwidth_gbit_per_s=25")


def figure() -> Figure:
    made = Figure(figsize=(2, 1))
    made.subplots().plot([0, 1], [0, 1])
    return made


def experiment(name: str, verdict: Verdict, question: str = "What is <asked> & why?") -> Experiment:
    points = [Point("mlx5-2vf", protocol, SETTINGS, {"size": 1}) for protocol in ("v2", "v3-n2")]

    def answer(frame: pl.DataFrame) -> Answer:
        told = f"{frame.height} runs | of {name}"
        return Answer(
            told, "hardly anything.", ["a <b>detail</b>"], [Finding("C1", verdict, "so it is")], frame.head(1)
        )

    return Experiment(name, question, lambda quick: points, answer, lambda frame, command: {name: figure()}, 1, 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments with what `proto-v3 run` leaves of them."""
    folder = tmp_path_factory.mktemp("results")
    for each in (experiment("reconfiguration", "supported"), experiment("channels", "refuted")):
        write_quick(each, each.planned(True), folder / each.name)
    (folder / "README.md").write_text(f"# Before\n\n{answers.BEGIN}\nold\n{answers.END}\n\n# After\n")
    return folder


class Page(HTMLParser):
    """What a page loads, and which of its tags are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        self.sources += [told["src"] or ""] if "src" in told else []
        self.links += [told["href"] or ""] if "href" in told else []
        self.ids |= {told["id"] or ""} if "id" in told else set()
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(*arguments: str) -> Result:
    done = CliRunner().invoke(main, ["report", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done


def made(results: Path, *arguments: str) -> str:
    done = report(str(results), *arguments)
    assert done.exit_code == 1, "eight questions are missing"
    return (results / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_beside_itself(results: Path) -> None:
    text = made(results)
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not re.search(r"<(script|link)|@import|url\(", text)
    assert {link.removeprefix("#") for link in page.links} <= page.ids


def test_it_says_questions_answers_limits_and_how_they_were_made(results: Path) -> None:
    text = made(results)
    for told in ("2 runs | of reconfiguration", "hardly anything.", "proto-v3 run channels", "2 COMPLETED"):
        assert told in text
    assert "What is &lt;asked&gt; &amp; why?" in text
    assert "a &lt;b&gt;detail&lt;/b&gt;" in text
    assert "not run yet: read_scaling, kernel_read, state_and_dirty_rate" in text
    assert text.count("(quick run)") == 3, "of the claim, and of both findings"
    assert "<strong>A quick run: a coarse grid" in text
    assert "firmware.save_mib_per_s" in text  # the parameters, with their sources
    assert "fitted: to the first VF&#39;s save" in text
    assert "TCP: no losses, no slow start" in text  # the limits


def test_the_readme_gets_the_answers_and_keeps_the_rest(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = results / "README.md"
    before = readme.read_text()
    made(results)
    assert readme.read_text() == before, "it loses no answer because a question is missing"
    monkeypatch.setattr(answers, "NAMES", ("reconfiguration", "channels"))
    assert report(str(results)).exit_code == 0
    text = readme.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n# After\n")
    assert "old" not in text
    assert "![What is <asked> & why?](reconfiguration/reconfiguration.png)" in text
    assert "2 runs | of channels" in text
    assert "- **C1, under conditions (quick run):**" in text
    assert "[channels](#channels), refuted (quick run): so it is" in text
    assert text.count(f"*{answers.QUICK}*") == 2
    assert report(str(results)).exit_code == 0
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ([], "not tested"),
        (["supported", "supported"], "supported"),
        (["refuted"], "refuted"),
        (["supported", "refuted"], "under conditions"),
        (["supported", "under conditions"], "under conditions"),
    ],
)
def test_a_claim_has_the_verdict_that_all_agree_on(verdicts: list[Verdict], together: str) -> None:
    told = [
        answers.KeptAnswer("x", "", "", "", [], [Finding("C5", verdict, "")], pl.DataFrame(), {}, [])
        for verdict in verdicts
    ]
    found = {claim.name: claim for claim in answers.claims_of(told)}
    assert found.keys() == CLAIMS.keys()
    assert found["C5"].verdict == together
    assert found["C1"].verdict == "not tested"


@pytest.mark.parametrize("there", [True, False], ids=["empty", "none"])
def test_a_folder_without_answers_is_one_line(tmp_path: Path, there: bool) -> None:
    done = report(str(tmp_path if there else tmp_path / "none"))
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert (
        f"{'has no answers in it; make some' if there else 'no such folder; make results'} with: proto-v3"
        in done.output
    )
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_it_is_the_newest_run(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = report()
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert "no results in out/run and out/quick: make some with `proto-v3 run all --quick`" in done.output
    assert "`proto-v3 report results`" in done.output
    for name in ("run", "quick"):
        shutil.copytree(results, f"out/{name}")
    for newest in ("run", "quick"):
        os.utime(f"out/{newest}/channels/manifest.json", (2e9 + len(newest), 2e9 + len(newest)))
        assert report().output.splitlines()[0] == f"Results: out/{newest} (the newest of out/run and out/quick)"
        assert Path(f"out/{newest}/report.html").exists()
    assert report("run").output.splitlines()[0] == "Results: out/run"
    assert "C1 under conditions (quick run): " in done_with(report("quick"))


def done_with(done: Result) -> str:
    assert done.exit_code == 1
    return done.output


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("answer.json", "", "answer.json is not as it was written"),
        ("manifest.json", "[]", "manifest.json is no JSON object"),
        ("manifest.json", "{}", "is missing"),
        ("manifest.json", None, "manifest.json: No such file or directory"),
        ("runs.parquet", "PAR1", "runs.parquet is not as it was written"),
        ("effects.parquet", "no table", "effects.parquet is not as it was written"),
        ("channels.svg", None, "channels.svg is missing"),
        ("channels.png", None, "channels.png is missing"),
    ],
)
def test_what_is_damaged_is_told_and_the_rest_is_reported(
    results: Path, tmp_path: Path, file: str, text: str | None, told: str
) -> None:
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    if text is None:
        (tmp_path / "channels" / file).unlink()
    else:
        (tmp_path / "channels" / file).write_text(text)
    page = made(tmp_path)
    for words in (done_with(report(str(tmp_path))).replace("\n", " "), html.unescape(page)):
        assert "channels: cannot be read (" in words
        assert told in words
        assert "make it anew with: proto-v3 run channels" in words
    assert "2 runs | of reconfiguration" in page
    assert "2 runs | of channels" not in page


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("manifest.json", {"runs": 3}, "runs.parquet has 2 runs, and the manifest says 3"),
        ("manifest.json", {"complete": False, "runs_planned": 9}, "channels: is not complete: 2 of 9 runs"),
        ("answer.json", {"figures": ["../../secret"]}, "a figure is called ../../secret"),
        ("manifest.json", {"outcomes": {"v2": ["x"]}}, "outcomes must be counts by protocol"),
        ("manifest.json", {"seeds": 1}, "manifest.json: seeds must be of type list"),
        ("manifest.json", {"quick": False}, "differ in whether the run was quick"),
        ("answer.json", {"details": "x"}, "answer.json: details must be of type list"),
        ("answer.json", {"findings": [{"claim": "C1", "verdict": "proved", "why": ""}]}, "there is no verdict proved"),
    ],
)
def test_what_does_not_fit_is_told(
    results: Path, tmp_path: Path, file: str, change: dict[str, object], told: str
) -> None:
    """In a folder whose manifest has no digests, as those of older versions."""
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    for each, more in ((tmp_path / "channels/manifest.json", {"files": {}}), (tmp_path / "channels" / file, change)):
        each.write_text(json.dumps(json.loads(each.read_text()) | more))
    assert told in done_with(report(str(tmp_path)))


@pytest.mark.parametrize("name", ["report.html", "README.md"])
def test_a_link_out_of_somebody_elses_folder_is_not_followed(results: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").write_text("precious")
    shutil.copytree(results, tmp_path / "evil")
    (tmp_path / "evil" / name).unlink(missing_ok=True)
    (tmp_path / "evil" / name).symlink_to("../mine")
    done = report(str(tmp_path / "evil"))
    assert done.exit_code == 2
    assert f"{name}: is a symlink" in done.output
    assert (tmp_path / "mine").read_text() == "precious"


def test_texts_of_somebody_else_are_shown_without_escapes(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    for name, change in (
        ("manifest", {"files": {}, "command": "\x1b[2J"}),
        ("answer", {"answer": "a\x1b]0;b\x07c\nd"}),
    ):
        file = tmp_path / "channels" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    page = made(tmp_path)
    assert r"a\x1b]0;b\x07c d" in page
    assert r"\x1b[2J" in page
    assert "\x1b" not in page


def test_a_finding_of_a_claim_that_there_is_not_is_refused(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    for name, old, new in (("answer", '"C1"', '"C9"'), ("manifest", '"files"', '"no files"')):
        file = tmp_path / "channels" / f"{name}.json"
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match="there is no claim C9"):
        answers.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_folder_beside_the_experiments_is_one_line(results: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    (tmp_path / "validate").mkdir()
    for name in ("validate.png", "validate.svg"):
        (tmp_path / "validate" / name).write_text("<svg/>")
    (tmp_path / "validate" / "manifest.json").write_text(text)
    assert "validate: cannot be read" in done_with(report("--results", str(tmp_path)))


@pytest.mark.parametrize("text", ["", "{}", '{"experiment": 1'])
def test_a_damaged_answer_names_its_folder(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "channels"
    folder.mkdir()
    (folder / "answer.json").write_text(text)
    (folder / "manifest.json").write_text(json.dumps({"outcomes": {}}))
    with pytest.raises(UserError, match=r"channels: cannot be read .*make it anew with: proto-v3 run channels"):
        answers.read(tmp_path)


def test_a_readme_without_a_place_for_the_answers_is_left_alone(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(answers, "NAMES", ("reconfiguration", "channels"))
    (tmp_path / "README.md").write_text("# Mine\n")
    done = report(str(tmp_path))
    assert done.exit_code == 2
    assert "has no place for the answers" in done.output
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_what_the_model_leaves_out_is_shipped_as_its_document_says() -> None:
    assert left_out.COPY.read_text(encoding="utf-8") == left_out.section(), "run `make docs`"
    assert len(left_out.points()) > 5
