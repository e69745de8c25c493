# SPDX-License-Identifier: GPL-2.0-or-later
"""The fitting program: known values are found again, what figures cannot tell is named, files keep their comments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments.calibration.__main__ import main
from experiments.calibration.figures import SimulatedFigures
from experiments.calibration.fit import Fitter
from experiments.calibration.plan import SHIPPED, Calibration, FreeKey, Rig, as_in_file, reaches, read, value_at
from experiments.calibration.write import put, write
from experiments.runs import frame as results
from proto_v3.errors import UserError
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from tests.build.scenario import SMALL

TRUE = {"firmware.load_finish_ms": 14.0, "device.0.quiesce_ms": 6.0, "device.0.config_load_ms": 9.0}
HIGHEST = 30.0
COLUMNS = {
    "downtime_ms": "downtime_ns",
    "stop_ms": "stage_stop_0_ns",
    "config_load_ms": "stage_config_load_0_ns",
}


def write_rig(folder: Path, name: str, count: int, figures: Mapping[str, float], own: str = "") -> str:
    """A scenario with these figures, all of them used."""
    given = [f"{key} = {[value] * count if key == 'config_load_ms' else value}" for key, value in figures.items()]
    used = [f"{key}.{at}" for key in figures if key == "config_load_ms" for at in range(count)]
    used += [key for key in figures if key != "config_load_ms"]
    lines = [
        f'name = "{name}"',
        'description = "a rig"',
        'extends = "small.toml"',
        own,
        "[[device]]",
        f"count = {count}",
        "[[published]]",
        'citation = "a test"',
        f"fitted = {used}".replace("'", '"'),
        *given,
    ]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def plan(tmp_path: Path) -> Calibration:
    """Two rigs of one and of two devices, measured with the true values; the file has others."""
    base = tmp_path / "small.toml"
    base.write_text(SMALL, encoding="utf-8")
    rigs = []
    for name, count in {"one": 1, "two": 2}.items():
        path = write_rig(tmp_path, name, count, {"downtime_ms": 1.0})
        scenario = load(path, [f"{key}={value}" for key, value in TRUE.items()])
        runs = results.table([simulate(scenario, Protocol.parse("v2", scenario), 1)])
        figures = {figure: runs[column].item() / 1e6 for figure, column in COLUMNS.items()}
        rigs.append(Rig(name=name, scenarios=[write_rig(tmp_path, name, count, figures)]))
    free = [FreeKey(scenario=str(base), keys=[key], low=0.0, high=HIGHEST) for key in TRUE]
    return Calibration(free=free, rig=rigs)


def fitter(plan: Calibration) -> Fitter:
    return Fitter(plan, SimulatedFigures(plan, jobs=1))


def test_known_values_are_found_again(plan: Calibration) -> None:
    fit = fitter(plan).fit()
    assert fit.values == pytest.approx(tuple(TRUE.values()), rel=0.03)
    assert all(error is not None and abs(error) < 0.01 for error in fit.errors())


def test_a_rig_that_is_left_out_is_predicted_from_the_others(plan: Calibration) -> None:
    for rig in plan.rig:
        left_out = fitter(plan).without(rig.name)
        assert {target.rig for target in left_out.targets} == {rig.name}
        assert all(error is not None and abs(error) < 0.05 for error in left_out.errors())


def test_a_rigs_own_key_has_the_bases_value_when_the_rig_is_left_out(plan: Calibration, tmp_path: Path) -> None:
    own = write_rig(tmp_path, "own", 1, {"downtime_ms": 500.0}, "[vmm]\nvcpu_start_ms = 400.0")
    free = [*plan.free, FreeKey(scenario=own, keys=["vmm.vcpu_start_ms"], low=0.0, high=1000.0)]
    extended = Calibration(free=free, rig=[*plan.rig, Rig(name="own", scenarios=[own])])
    assert reaches(free[-1], own) == ["vmm.vcpu_start_ms"]
    assert extended.rig_of(free[-1]) == "own"
    fit = fitter(extended).fit()
    assert fit.errors()[-1] == pytest.approx(0.0, abs=0.02)
    left_out = fitter(extended).without("own")
    assert left_out.values[-1] == pytest.approx(500.0), (
        "the search begins at the prior, not at what the rig was fitted to"
    )
    (error,) = left_out.errors()
    assert error is not None
    assert error < -0.7  # the base starts its vCPUs in 1 ms


def test_what_no_figure_depends_on_is_named_and_is_its_prior(plan: Calibration) -> None:
    idle = FreeKey(scenario=plan.free[0].scenario, keys=["vmm.give_up_s"], low=1.0, high=9.0, prior=2.5)
    middle = FreeKey(scenario=plan.free[0].scenario, keys=["driver.reread_ms"], low=20.0, high=60.0)
    extended = Calibration(free=[*plan.free, middle, idle], rig=plan.rig)
    fit = fitter(extended).fit()
    assert fit.values[-2:] == pytest.approx((40.0, 2.5)), "without a prior the middle of its range"
    named = [each for each in fitter(extended).blind(fit.values) if each.why.startswith("no figure changes")]
    assert [each.keys for each in named] == [[middle.name], [idle.name]]


def test_a_number_at_an_end_of_its_range_stays_there(plan: Calibration) -> None:
    """The search begins inside of the range; nothing moves this one back."""
    idle = FreeKey(scenario=plan.free[0].scenario, keys=["vmm.give_up_s"], low=2.0, high=9.0, prior=2.0)
    assert fitter(Calibration(free=[*plan.free, idle], rig=plan.rig)).fit().values[-1] == 2.0


def test_keys_that_the_figures_mix_up_are_named(plan: Calibration) -> None:
    """A device is stopped in two steps, of which the figures have the sum."""
    suspend = FreeKey(scenario=plan.free[0].scenario, keys=["device.0.suspend_ms"], low=0.0, high=HIGHEST)
    extended = Calibration(free=[*plan.free, suspend], rig=plan.rig)
    fit = fitter(extended).fit()
    assert sum(fit.values[at] for at in (1, 3)) == pytest.approx(7.0, rel=0.05)
    pairs = [set(each.keys) for each in fitter(extended).blind(fit.values) if "correlation" in each.why]
    assert {plan.free[1].name, suspend.name} in pairs
    assert not any(plan.free[2].name in pair for pair in pairs)


def test_values_are_not_simulated_twice(plan: Calibration) -> None:
    figures = SimulatedFigures(plan, jobs=1)
    for _ in range(2):
        figures.of([figures.start], figures.targets)
        assert figures.runs == 2


def test_an_inherited_key_does_not_reach_a_rig_that_sets_its_own(plan: Calibration, tmp_path: Path) -> None:
    own = write_rig(tmp_path, "own", 1, {"downtime_ms": 1.0}, "[firmware]\nload_finish_ms = 3.0")
    assert reaches(plan.free[0], own) == []
    assert reaches(plan.free[1], own) == ["device.0.quiesce_ms"]


def test_the_command_writes_the_values_into_the_file(plan: Calibration, tmp_path: Path) -> None:
    lines = []
    for free in plan.free:
        lines += ["[[free]]", f'scenario = "{free.scenario}"', f'keys = ["{free.keys[0]}"]', "low = 0.0", "high = 30.0"]
    for rig in plan.rig:
        lines += ["[[rig]]", f'name = "{rig.name}"', f'scenarios = ["{rig.scenarios[0]}"]']
    (tmp_path / "plan.toml").write_text("\n".join(lines), encoding="utf-8")
    done = CliRunner().invoke(main, [str(tmp_path / "plan.toml"), "--jobs", "1", "--quick", "--write"])
    assert done.exit_code == 0, done.output
    written = load(plan.free[0].scenario)
    assert [value_at(written, key) for key in TRUE] == pytest.approx(list(TRUE.values()), rel=0.03)
    assert "load_finish_ms" in done.output


def test_priors_stay_if_others_are_hardly_better(plan: Calibration, tmp_path: Path) -> None:
    """A rig that contradicts the others leaves errors whatever the values are, beside which small ones are nothing."""
    other = write_rig(tmp_path, "other", 1, {"config_load_ms": 1.4 * TRUE["device.0.config_load_ms"]})
    rigs = [*plan.rig, Rig(name="other", scenarios=[other])]
    found = fitter(Calibration(free=plan.free, rig=rigs)).fit().values
    near = [float(f"{1.01 * value:.3g}") for value in found]
    assert tuple(near) != found
    free = [each.model_copy(update={"prior": value}) for each, value in zip(plan.free, near, strict=True)]
    assert fitter(Calibration(free=free, rig=rigs)).fit().values == tuple(near)


def test_a_second_fit_finds_what_the_first_one_wrote(plan: Calibration) -> None:
    """Whatever the files have: the search begins at the priors, which the plan declares."""
    mixed_up = FreeKey(scenario=plan.free[0].scenario, keys=["device.0.suspend_ms"], low=0.0, high=HIGHEST)
    extended = Calibration(free=[*plan.free, mixed_up], rig=plan.rig)
    first = fitter(extended).fit().values
    assert write(extended, first)
    as_in_file.cache_clear()
    assert SimulatedFigures(extended).start == first
    assert fitter(extended).fit().values == first


def test_no_file_is_written_if_one_cannot_be(plan: Calibration, tmp_path: Path) -> None:
    own = write_rig(tmp_path, "bare", 1, {"downtime_ms": 1.0}, "")
    idle = FreeKey(scenario=own, keys=["firmware.load_finish_ms"], low=0.0, high=HIGHEST)  # which its base sets
    extended = Calibration(free=[*plan.free, idle], rig=plan.rig)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"bare\.toml: firmware\.load_finish_ms: must be set in this file"):
        write(extended, tuple(1.0 for _ in extended.free))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sums_of_used_figures_are_no_predictions() -> None:
    figures = SimulatedFigures(read(SHIPPED)).targets
    sums = [each for each in figures if each.is_sum]
    assert {each.figure for each in sums if each.scenario == "mlx5-2vf"} == {"downtime_ms"}
    assert not any(each.used for each in sums)


def test_comments_and_other_tables_stay() -> None:
    devices = "[[device]]\nname = 'a'\nsuspend_ms = 1\n[[device]]\nsuspend_ms = 2\n"
    text = f"[firmware]\nengines = 2.5  # two and a half\n\n{devices}"
    after = put(text, {"firmware.engines": 3.0, "device.0.suspend_ms": 4.5}, "x.toml")
    assert after == text.replace("engines = 2.5", "engines = 3.0").replace("suspend_ms = 1\n", "suspend_ms = 4.5\n")
    with pytest.raises(UserError, match=r"x\.toml: vmm\.setup_ms: must be set in this file"):
        put(text, {"vmm.setup_ms": 3.0}, "x.toml")


@pytest.mark.parametrize(
    ("free", "rig", "why"),
    [
        (
            'scenario = "mlx5"\nkeys = ["firmware.enginess"]\nlow = 1\nhigh = 2',
            "",
            "must be a key with a number in mlx5",
        ),
        ('scenario = "mlx5"\nkeys = ["firmware.engines"]\nlow = 2\nhigh = 1', "", "must be less than high"),
        ('scenario = "mlx5"\nkeys = ["firmware.engines"]\nlow = 2', "", "must be given both"),
        ('scenario = "mlx5"\nkeys = ["firmware.save_command_us"]', "", "must be given, for mlx5 has no range"),
        ('scenario = "mlx5"\nkeys = ["firmware.engines"]\nprior = 4.5', "", "prior = 4.5: must be from 1 to 4"),
        ('scenario = "vgpu-32g"\nkeys = ["firmware.engines"]', "", "must be a scenario of a rig"),
        (
            'scenario = "mlx5"\nkeys = ["firmware.engines"]',
            'left_out = { "x.y" = 1.0 }',
            "left_out: 'x.y': must be a key",
        ),
        ('scenario = "mlx5"\nkeys = ["firmware.engines"]', "[[", "not valid TOML"),
        ('scenario = "mlx5"\nkeys = ["driver.chunks"]\nlow = 1\nhigh = 4', "", "'driver.chunks': must not be a whole"),
        (
            'scenario = "mlx5"\nkeys = ["firmware.engines"]\nlow = 0.5\nhigh = 4',
            "",
            "0.5 is not possible in mlx5: firmware.engines = 0.5: must be greater than or equal to 1",
        ),
        ('scenario = "mlx6"\nkeys = ["firmware.engines"]', "", "no scenario 'mlx6'"),
        (
            'scenario = "mlx5"\nkeys = ["firmware.engines"]',
            '[[rig]]\nname = "x"\nscenarios = ["liu-1vf"]',
            "must differ from rig to rig",
        ),
    ],
)
def test_a_wrong_plan_is_told(free: str, rig: str, why: str, tmp_path: Path) -> None:
    rigs = f'[[rig]]\nname = "x"\nscenarios = ["mlx5-2vf"]\n{rig}\n'
    (tmp_path / "plan.toml").write_text(f"[[free]]\n{free}\n\n{rigs}", encoding="utf-8")
    with pytest.raises(UserError, match=r"plan\.toml: ") as told:
        read(tmp_path / "plan.toml")
    assert why in str(told.value)


def test_a_scenario_without_figures_is_no_rig(tmp_path: Path) -> None:
    free = '[[free]]\nscenario = "mlx5"\nkeys = ["firmware.engines"]\n'
    (tmp_path / "plan.toml").write_text(f'{free}[[rig]]\nname = "x"\nscenarios = ["vgpu-32g"]\n', encoding="utf-8")
    with pytest.raises(UserError, match="vgpu-32g has no published figures"):
        read(tmp_path / "plan.toml")


def test_the_shipped_plan_is_valid_and_the_files_values_are_in_its_ranges() -> None:
    plan = read(SHIPPED)
    for free, value in zip(plan.free, SimulatedFigures(plan).start, strict=True):
        low, high = free.bounds
        assert low <= value <= high, free.name
