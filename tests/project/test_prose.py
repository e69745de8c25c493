# SPDX-License-Identifier: GPL-2.0-or-later
"""README.md, "What comes out", and results/README.md, "In two minutes", are written by hand: every number that results
give there is held against the kept tables. `python -m tests.project.test_prose` puts other numbers in their places."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

import polars as pl
import pytest

from sim.scenario.file import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
NIC_CASES = ("nic-reconfig", "nic-much", "nic-much-left-alone")
ALL_OF_V2 = "v2-multifd-reinit-flush-ack-reusable"


def section(path: str, title: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    return " ".join(text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].split())


def table(name: str, of: str) -> pl.DataFrame:
    return pl.read_parquet(RESULTS / name / f"{of}.parquet")


def answer(name: str) -> str:
    told = json.loads((RESULTS / name / "answer.json").read_text(encoding="utf-8"))
    return " ".join([told["answer"], *told["details"], *(each["why"] for each in told["findings"])])


def found(name: str, pattern: str) -> tuple[str, ...]:
    """What an answer says where it says this."""
    match = re.search(pattern, answer(name))
    assert match is not None, f"{name} says nothing like {pattern!r} any more"
    return match.groups()


def effect_ms(**where: str) -> float:
    """What a step of the ablation, or one protocol against another, changes in the mean."""
    return float(table("ablation", "effects").filter(**where)["difference_mean_ms"].item())


def step_ms(case: str, step: str) -> float:
    return effect_ms(case=case, step=step, measure="downtime")


def mean(case: str, protocol: str, column: str) -> float:
    """Of the runs that both all of v2 and v3 completed, where they are compared."""
    runs = table("ablation", "runs").filter(case=case, outcome="COMPLETED")
    pairs = runs.filter(protocol=ALL_OF_V2)["seed"]
    return float(runs.filter(pl.col("seed").is_in(pairs.implode()), protocol=protocol)[column].to_numpy().mean())


def share_of_read() -> str:
    one, sixteen = found("read_scaling", r"with N = 1 it has ([\d.]+) %.*?with N = 16 it has ([\d.]+) %")
    return f"copy and lock are {one} % of what moves a stopped device on one stream, and {float(sixteen):.0f} % on 16"


def kernel_copies() -> str:
    mib_per_s, times = found("kernel_read", r"copies (\d+) MiB/s, ([\d.]+) times what one command")
    return f"one thread's read() of a driver copies {mib_per_s} MiB/s, {times} times what one command"


def kernel_ratios() -> str:
    close, of = found("kernel_read", r"(\d+) of (\d+) ratios to one stream are within 10 %")
    return f"{close} of {of} ratios of N streams to one are within 10 % of the simulated ones"


def calls() -> str:
    call_us, from_size = found("buffer_and_chunk", r"binds, (\d+) us a call, it does not come out.*?\((\d+ MiB) to")
    assert from_size == "1 MiB"
    times = float(call_us) / load("mlx5-2vf").driver.call_us
    return f"Larger reads than QEMU's 1 MiB bring nothing, but where a call costs {times:.0f} times what is assumed"


def multifd() -> str:
    whole = mean("mlx5-2vf", "v2", "downtime_ns") / 1e6
    return f"{-step_ms('mlx5-2vf', '+ multifd (QEMU 10)'):.0f} of {whole:.0f} ms of the published migration"


def streams() -> str:
    one, four = step_ms("mlx5-2vf", "+ second fd: v3, N = 1"), step_ms("mlx5-2vf", "+ N = 4")
    return f"v3 with one dirty stream takes off {-one:.0f} ms more, and four streams another {-four:.0f} ms"


def ack() -> str:
    saved_s = [-step_ms(case, "+ reusable ack") / 1e3 for case in NIC_CASES]
    return f"{min(saved_s):.1f} to {max(saved_s):.1f} s, by QEMU's REINIT with a re-usable ack"


def against_all_of_v2() -> str:
    shorter = -effect_ms(case="nic-reconfig", base=ALL_OF_V2, other="v3-n4", measure="downtime")
    there = mean("nic-reconfig", ALL_OF_V2, "downtime_ns") / 1e6
    assert round(there / 10) == 35
    lag = {name: mean("nic-reconfig", name, "critical_lag_max_ns") / 1e9 for name in (ALL_OF_V2, "v3-n4")}
    return (
        f"with 2 GiB of RAM, v3's downtime is {shorter:.0f} ms shorter (of some 350; with 16 GiB it is "
        f"longer, see above), and the data is at the target after {lag['v3-n4']:.0f} s instead of {lag[ALL_OF_V2]:.1f}"
    )


def given_up() -> str:
    runs, gives_up = found("reconfiguration", r"it completes \d+ of (\d+) runs .*? and gives up (\d+)")
    return f"makes v2 give the migration up ({gives_up} of {runs})"


def not_for() -> str:
    told = answer("sensitivity")
    of_multifd = re.search(r"less than 5 % over v2-multifd, mlx5-2vf, [^:]*MiB 12[^:]*: (.*?)(?= v3-n4 )", told)
    assert of_multifd is not None
    everywhere = [place.split(" engine")[0] for place in of_multifd[1].split("; ") if "everywhere" in place]
    assert everywhere == ["1", "1.5"]
    state_mib, _ = found("sensitivity", r"a device's state, MiB = ([\d.]+): ([\d.]+) %")
    return (
        "Do not build v3 for a device with one or one and a half engines, or with "
        f"{float(state_mib):.0f} MiB of state**: it brings less than 5 % over multifd there"
    )


def large_states() -> str:
    effects = table("state_and_dirty_rate", "effects")
    where = {"dirty_of_link": 0.15, "base": "v2", "other": "v3-n4", "machine": "map"}
    shorter = [
        (1 - effects.filter(state_mib=size_gib * 1024, **where)["ratio_mean"].item()) * 100 for size_gib in (16, 64)
    ]
    return f"its downtime is {shorter[0]:.0f} % shorter at 16 GiB and {shorter[1]:.0f} % at 64 GiB"


def compared(scenario: str, protocol: str, column: str = "downtime_ns", unit: float = 1e6) -> float:
    """The mean of the runs that completed; a time in ms."""
    runs = pl.read_parquet(RESULTS / scenario / "runs.parquet").filter(protocol=protocol, outcome="COMPLETED")
    return float(runs[column].to_numpy().mean() / unit)


def validated(**only: object) -> list[float]:
    """Errors of simulated against published figures, in %."""
    return [abs(error) * 100 for error in table("validate", "validate").filter(**only)["error"]]


def published() -> str:
    phases = table("validate", "validate").filter(scenario="mlx5-2vf", protocol="v2")
    errors = dict(zip(phases["figure"], phases["error"].abs() * 100, strict=True))
    of_downtime = math.ceil(errors.pop("downtime_ms"))
    return (
        f"gives the published downtime within {of_downtime} %, and each published phase within "
        f"{math.ceil(max(errors.values()))} %"
    )


def v3_takes_off() -> str:
    v2, v3 = (compared("mlx5-2vf", name) for name in ("v2", "v3-n1"))
    return f"v3 takes {v2 - v3:.0f} ms ({100 * (1 - v3 / v2):.0f} %) off"


def multifd_takes_off() -> str:
    v2, multifd = (compared("mlx5-2vf", name) for name in ("v2", "v2-multifd"))
    return f"multifd takes off {v2 - multifd:.0f} ms with v2 as it is"


def four_streams() -> str:
    one, four = (compared("mlx5-2vf", name) for name in ("v3-n1", "v3-n4"))
    return f"Four dirty streams a device bring another {one - four:.0f} ms"


def held_against() -> str:
    return f"`make validate` holds {len(validated())} published figures"


def by_class() -> dict[str, list[float]]:
    """Errors of simulated against published figures, in %: of fitted ones, sums of these, and predictions."""
    errors: dict[str, list[float]] = {"fitted": [], "sum": [], "predicted": []}
    for row in table("validate", "validate").iter_rows(named=True):
        errors[row["kind"]].append(abs(row["error"]) * 100)
    return errors


def baseline() -> str:
    errors = by_class()
    fitted, sums, predicted = (errors[kind] for kind in ("fitted", "sum", "predicted"))
    return (
        f"Parameters were fitted to {len(fitted)} of them, {len(sums)} are sums of such figures, and "
        f"{len(predicted)} are predicted: of these {sum(each <= 10 for each in predicted)} are within 10 %; median "
        f"error {median(predicted):.1f} %, worst {max(predicted):.1f} %"
    )


def late_data() -> str:
    names = ("v2-reinit-flush-ack-reusable", "v3-n1", "v3-n4", "v2")
    ack, one, four, none = (f"{compared('nic-reconfig', name):.0f}" for name in names)
    return (
        f"{ack} ms of downtime against {one} with one dirty stream and {four} with four, where QEMU without an ack "
        f"takes {none}"
    )


def sooner() -> str:
    v2, v3 = "v2-reinit-flush-ack-reusable", "v3-n4"
    lags = [compared("nic-reconfig", name, "critical_lag_max_ns", 1e9) for name in (v3, v2)]
    assert [round(each) for each in lags] == [1, 9]
    long, short = (compared("nic-reconfig", name, "total_ns", 1e9) for name in (v2, v3))
    assert 0.45 < short / long < 0.55
    return f"after one second and not after nine, the migration takes half as long ({short:.1f} s)"


def in_vain() -> str:
    sent = compared("nic-reconfig", "v3-n4-invalidate", "device_bytes_wasted", 2**20)
    downtime = compared("nic-reconfig", "v3-n4-invalidate")
    return f"{sent:.0f} MiB of a device of 512 are sent in vain, and the downtime is {downtime:.0f} ms"


def nothing_gained() -> str:
    v2, one, four, eight = (f"{compared('favours-v2', name):.0f}" for name in ("v2", "v3-n1", "v3-n4", "v3-n8"))
    own, pool = (compared("favours-v2", name, "messages", 100) for name in ("v3-n4", "v3-n4-pool"))
    return (
        f"v2 takes {v2} ms, v3 {one} with one dirty stream, {four} with four, {eight} with eight; shared connections "
        f"cost {pool - own:.0f}00 messages more"
    )


TWO_MINUTES = section("results/README.md", "In two minutes")
IN_TWO_MINUTES = [
    share_of_read, kernel_copies, kernel_ratios, calls, multifd, streams, ack, against_all_of_v2, given_up, not_for,
    large_states,
]  # fmt: skip
WHAT_COMES_OUT = [
    published, v3_takes_off, multifd_takes_off, four_streams, held_against, baseline, late_data, sooner, in_vain,
    nothing_gained,
]  # fmt: skip
Claim = Callable[[], str]


def name_of(claim: Claim) -> str:
    return claim.__name__


@pytest.mark.parametrize("claim", IN_TWO_MINUTES, ids=name_of)
def test_what_is_said_in_two_minutes_is_what_the_tables_say(claim: Claim) -> None:
    assert claim() in TWO_MINUTES


@pytest.mark.parametrize("claim", WHAT_COMES_OUT, ids=name_of)
def test_what_the_readme_says_comes_out_is_what_the_tables_say(claim: Claim) -> None:
    assert claim() in section("README.md", "What comes out")


def test_how_near_real_devices_are_is_what_the_table_says() -> None:
    rows = pl.read_parquet(RESULTS / "real/agree/agree.parquet").filter(figure="downtime").to_dicts()
    v2, one, two = ({name: row[name] for name in ("virtual", "live", "real")} for row in rows)
    more = [100 * (each["real"] / each["virtual"] - 1) for each in (v2, one, two)]
    said = " ".join((ROOT / "docs/live.md").read_text(encoding="utf-8").split())
    real, virtual = ([f"{each[clock]:.0f}" for each in (v2, one, two)] for clock in ("real", "virtual"))
    assert (
        f"{real[0]} ms with v2, {real[1]} with v3-n1 and {real[2]} with v3-n2, where virtual time says {virtual[0]}, "
        f"{virtual[1]} and {virtual[2]}: {more[0]:.0f}, {more[1]:.0f} and {more[2]:.0f} % more. Against v2, two dirty "
        f"streams take {two['real'] / v2['real']:.2f} of the downtime, simulated {two['virtual'] / v2['virtual']:.2f}."
    ) in said
    furthest = max(each["live"] / each["virtual"] for each in (v2, one, two))
    assert f"up to {100 * (furthest - 1):.0f} %" in said


KINDS = {"fitted": "fitted", "sum": "sums of fitted ones", "predicted": "predicted"}


def how_well(kind: str) -> str:
    """A row of docs/model.md. The straight lines of the vGPU cases are left out."""
    rows = table("validate", "validate").filter(~pl.col("scenario").str.starts_with("vmware"))
    errors = [abs(each) * 100 for each in rows.filter(kind=kind)["error"]]
    return f"| {KINDS[kind]} | {len(errors)} | {median(errors):.1f} % | {max(errors):.1f} % "


@pytest.mark.parametrize("kind", KINDS)
def test_how_well_the_model_does_is_what_the_table_says(kind: str) -> None:
    assert how_well(kind) in (ROOT / "docs/model.md").read_text(encoding="utf-8")


FIRST = "What to change first"
DECISIONS = ("mlx5-2vf", "szmigiero-4vf")
DECIDED = re.compile(r"^\| `([^`]+)`: [^|]+\|[^|]+\| (.+) \|$", re.MULTILINE)


def test_both_tops_say_alike_what_to_change_first() -> None:
    there = section("results/README.md", FIRST).replace("](../", "](").replace("](real/", "](results/real/")
    assert section("README.md", FIRST) == there
    for page in ("README.md", "results/README.md"):
        assert next(re.finditer(r"\n## (.*)\n", (ROOT / page).read_text(encoding="utf-8")))[1] == FIRST


def decided(change: str) -> str:
    """The cells of a change: its downtime over the machines of each kind, and in how many it is worth making."""
    cells = []
    for scenario in DECISIONS:
        row = table(f"decide-{scenario}", "decide").row(by_predicate=pl.col("change") == change, named=True)
        median_ms, low_ms, high_ms = (row[f"downtime_ms_{which}"] for which in ("median", "low", "high"))
        cells.append(f"{median_ms:.0f} ({low_ms:.0f} to {high_ms:.0f})")
        cells.append("" if row["probability"] is None else f"{100 * row['probability']:.0f} %")
    return " | ".join(cells)


def test_the_first_table_is_what_decide_says_of_all_that_was_run() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {FIRST}\n")[2].partition("\n## ")[0]
    said = dict(DECIDED.findall(page))
    for change, cells in said.items():
        assert " ".join(cells.split()) == " ".join(decided(change).split())
    run = [table(f"decide-{each}", "decide").filter(pl.col("samples") > 0)["change"].to_list() for each in DECISIONS]
    assert set(said) == {*run[0], *run[1]} - {"parts"}, "which changes nothing here"


def test_every_number_in_two_minutes_is_held_against_something() -> None:
    """What is left when the claims are taken out has no numbers but names and links."""
    left = TWO_MINUTES
    for claim in IN_TWO_MINUTES:
        left = left.replace(claim(), "")
    left = re.sub(r"\([./\w]*#[\w-]+\)|\bv[23]\b|\bN = 4\b|mlx5", "", left)
    assert not re.findall(r"[^.]*\d[^.]*", left)


# --- other numbers, after results were made anew ----------------------------------------------------------------------

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def with_numbers(text: str, sentence: str) -> str | None:
    """The text with the numbers that the sentence has, where it says the same otherwise; None where it does not.

    A line's end counts as a blank, and stays where it is.
    """
    numbers = NUMBER.findall(sentence)
    words = [r"\s+".join(map(re.escape, part.split(" "))) for part in NUMBER.split(sentence)]
    found = re.search(rf"({NUMBER.pattern})".join(words), text)
    if found is None:
        return None
    for at in range(len(numbers), 0, -1):
        text = text[: found.start(at)] + numbers[at - 1] + text[found.end(at) :]
    return text


def test_numbers_are_replaced_and_nothing_else() -> None:
    text = "It takes 12 ms, with\nfour 3.5 % more. It takes 12 s."
    assert with_numbers(text, "takes 7 ms, with four 10.25 % more") == text.replace("12 ms", "7 ms").replace(
        "3.5", "10.25"
    )
    assert with_numbers(text, "takes 7 ms, with five 3.5 % more") is None


if __name__ == "__main__":
    rows: list[Claim] = [functools.partial(how_well, kind) for kind in KINDS]
    pages = {"README.md": WHAT_COMES_OUT, "results/README.md": IN_TWO_MINUTES, "docs/model.md": rows}
    for page, every in pages.items():
        for claim in every:
            before = (ROOT / page).read_text(encoding="utf-8")
            try:
                said = claim()
            except AssertionError as error:
                print(f"{page}: to be said in other words: {error}")
                continue
            after = with_numbers(before, said)
            if after is None:
                print(f"{page}: to be said in other words: {said}")
            elif after != before:
                (ROOT / page).write_text(after, encoding="utf-8")
                print(f"{page}: {said}")
