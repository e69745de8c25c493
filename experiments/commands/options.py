# SPDX-License-Identifier: GPL-2.0-or-later
"""Options that several commands have."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from experiments.commands import complete
from experiments.runs.folder import OUT
from proto_v3.errors import UserError
from sim.scenario.suffixes import HELP

if TYPE_CHECKING:
    from sim.live.processes.settings import Settings
    from sim.scenario.protocol import Protocol
    from sim.scenario.scenario import Scenario

F = TypeVar("F", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """A number in a range, and no nan, which would be in each; -0 is 0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number; it must be in the range {self._describe_range()}.", param, ctx)
        return number + 0.0


jobs_option = click.option("--jobs", type=click.IntRange(1, 256), help="Processes.  [default: one a CPU]")
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete.settings,
    help="Change a parameter, as in --set device.0.count=4 or --set driver.lock=device. May be repeated.",
)
format_option = click.option(
    "--format", "table_format", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True
)
first_seed_option = click.option(
    "--first-seed", type=click.IntRange(0), default=1, show_default=True, help="The seeds count up from it."
)
force_option = click.option(
    "--force", is_flag=True, help="Replace what the folder holds, also results of another command or of more runs."
)
scenario_argument = click.argument("scenario", shell_complete=complete.scenarios)
spans_option = click.option(
    "--spans", metavar="FILE", shell_complete=complete.files, help="Write a table of all spans too, in Parquet."
)

OLD_NAMES = {"token_normalize_func": lambda name: {"protocol": "protocols", "runs": "seeds"}.get(name, name)}
"""Of `live` and `agree`: version 0.1 called two options so."""
PROTOCOLS = f"{HELP}. `proto-v3 protocols` says what each changes."
protocol_option = click.option(
    "--protocol", required=True, metavar="NAME", shell_complete=complete.protocol, help=PROTOCOLS
)


def protocols_option(default: str) -> Callable[[F], F]:
    """Names of protocols, separated by commas; the command gets them as a list."""
    return click.option(
        "--protocols",
        default=default,
        show_default=True,
        metavar="NAMES",
        shell_complete=complete.protocols,
        callback=_split,
        help=f"Separated by commas: {PROTOCOLS}",
    )


def _split(ctx: click.Context, option: click.Parameter, names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def names(ctx: click.Context, option: click.Parameter, text: str) -> list[str]:
    """Names separated by commas; none for an empty text."""
    return _split(ctx, option, text) if text else []


def seeds_option(default: int, what: str, most: int = 10_000) -> Callable[[F], F]:
    """A number of runs."""
    return click.option("--seeds", type=click.IntRange(1, most), default=default, show_default=True, help=what)


screening_option = click.option(
    "--screening/--no-screening",
    default=True,
    show_default=True,
    help="Simulate the samples in pieces of 4 MiB: downtimes stay within half a percent.",
)
by_option = click.option(
    "--by",
    type=click.Choice(["cdev", "group"]),
    help="Open devices by /dev/vfio/devices/vfioN and iommufd, or by group and container.  [default: cdev if there "
    "is one]",
)


def out_option(what: str) -> Callable[[F], F]:
    """The folder of the results."""
    return click.option("--out", metavar="FOLDER", shell_complete=complete.folders, help=what)


def out_folder(named: str | None, default: str) -> Path:
    """The folder that the user named, or the default one in out/. UserError for an empty name."""
    if named == "":
        raise UserError("--out '': must be the name of a folder")
    return Path(named) if named else OUT / default


def trace_option(default: str) -> Callable[[F], F]:
    """The file of the trace."""
    return click.option(
        "--trace", metavar="FILE", shell_complete=complete.files, help=f"The trace.  [default: {default}]"
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print all of it as one JSON document.")


def output_options(command: F) -> F:
    """What a command that prints results prints: `as_json`, `quiet`."""
    options = [
        json_option,
        click.option("--quiet", is_flag=True, help="Print the conclusion only. Files are written as without it."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def live_options(command: F) -> F:
    """Add the options of a live run: how its processes move bytes, and which certificates they trust."""
    options = [
        click.option(
            "--io",
            type=click.Choice(["threads", "loop"]),
            default="threads",
            show_default=True,
            help="Blocking reads and sends in threads, as a VMM does; or on readiness, in the event loop's thread.",
        ),
        click.option(
            "--loop", type=click.Choice(["uvloop", "asyncio"]), default="uvloop", show_default=True, help="Event loop."
        ),
        *(
            click.option(f"--tls-{file}", metavar="PEM", shell_complete=complete.files, help=what)
            for file, what in {
                "cert": "TLS: this side's certificate.  [default: no TLS]",
                "key": "Its private key.",
                "ca": "Certificates that the other side's must be signed by.",
            }.items()
        ),
        click.option(
            "--silent-s",
            type=Finite(0.5, 3600),
            default=10.0,
            show_default=True,
            help="Give up a peer or a process that is silent for this time.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def live_settings(options: dict[str, Any], **more: Any) -> Settings:
    """The settings that the options of live_options() give. They are taken out of `options`.

    UserError if one or two of the three files for TLS are missing.
    """
    from sim.live.processes.settings import Settings, Tls

    files = {file: options.pop(f"tls_{file}") for file in ("cert", "key", "ca")}
    missing = [f"--tls-{file}" for file, path in files.items() if path is None]
    if 0 < len(missing) < len(files):
        raise UserError(
            f"{', '.join(missing)}: must be given too; TLS takes a certificate, its key, and the certificates to trust"
        )
    return Settings(
        tls=None if missing else Tls(**files),
        **{name: options.pop(name) for name in ("io", "loop", "silent_s")},
        **more,
    )


def parsed(scenario: str, protocols: Sequence[str], settings: Sequence[str]) -> tuple[Scenario, list[Protocol]]:
    """The scenario and the protocols of --protocols. UserError if one is unknown, or if a protocol is named twice."""
    from sim.scenario.file import load
    from sim.scenario.protocol import Protocol

    loaded = load(scenario, settings)
    tell_outside(loaded)
    chosen = [Protocol.parse(name, loaded) for name in protocols]
    if len({protocol.name for protocol in chosen}) < len(chosen):
        raise UserError(f"--protocols {','.join(protocols)}: one is named twice")
    return loaded, chosen


def tell_outside(*scenarios: Scenario) -> None:
    """Say on stderr which values a user set outside of the range that they had, each once."""
    from sim.scenario.ranges import is_outside
    from sim.scenario.scenario import parameters

    lines = [
        f"proto-v3: note: {key} = {value}: {scenario.sources[key].removeprefix('yours: ')}"
        for scenario in scenarios
        for key, value in parameters(scenario).items()
        if is_outside(scenario.sources.get(key, ""))
    ]
    for line in dict.fromkeys(lines):
        print(line, file=sys.stderr)
