"""The command line. Heavy imports are made inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from experiments import INTERRUPTED
from proto_v3.errors import UserError


class Cli(click.Group):
    """The commands; a user's mistake is one message on stderr and exit status 2, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"proto-v3: error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has enough: click's business
                raise
            click.echo(f"proto-v3: error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("proto-v3: interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="proto-v3", prog_name="proto-v3")
def main() -> None:
    """Compare VFIO migration protocols, v2 and a multi-stream v3, on one simulated device.

    Start with: proto-v3 compare mlx5-2vf
    """


jobs_option = click.option("--jobs", type=click.IntRange(1, 256), help="Processes.  [default: one a CPU]")
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a parameter, as in --set device.0.count=4 or --set driver.lock=device. May be repeated.",
)


@main.command()
@click.argument("scenario")
@click.option(
    "--protocols",
    default="v2,v2-multifd,v3-n1,v3-n4",
    show_default=True,
    metavar="NAMES",
    help="Separated by commas: v2 or v3, as the scenario sets them up, or with suffixes. Of v2: -multifd, -ack, "
    "-ack-reusable, -reinit-flush, -reinit-invalidate, -polls. Of v3: -n1 to -n64 (dirty streams), -blocks, -pool, "
    "-one, -invalidate, -retry.",
)
@click.option("--seeds", type=click.IntRange(1, 100_000), default=10, show_default=True, help="Runs of each protocol.")
@click.option("--first-seed", type=click.IntRange(0), default=1, show_default=True, help="The seeds count up from it.")
@click.option(
    "--out",
    metavar="FOLDER",
    help="Write the table, the figure and the manifest into this folder.  [default: results/SCENARIO]",
)
@click.option("--format", "table_format", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True)
@jobs_option
@set_option
def compare(
    scenario: str,
    protocols: str,
    seeds: int,
    first_seed: int,
    out: str | None,
    table_format: str,
    jobs: int | None,
    settings: tuple[str, ...],
) -> None:
    """Migrate the devices of SCENARIO under each protocol: downtime, where it went, a figure.

    SCENARIO is a shipped scenario's name (see `proto-v3 scenarios`) or a TOML file. Every protocol gets the same
    seeds, so that guest and firmware do the same under each.

    Exit status: 0; 1 if a run FAILED; 2 for bad input; 130 if interrupted (what was done by then is kept).
    """
    from experiments.compare import run_compare

    ctx = click.get_current_context()
    names = [name.strip() for name in protocols.split(",")]
    chosen = range(first_seed, first_seed + seeds)
    ctx.exit(run_compare(scenario, names, chosen, out, table_format, jobs, ["proto-v3", *sys.argv[1:]], settings))


@main.command()
@click.argument("cases", metavar="[CASE]...", nargs=-1)
@click.option("--seeds", type=click.IntRange(1, 100_000), default=10, show_default=True, help="Runs of each case.")
@jobs_option
@click.option(
    "--out",
    metavar="FOLDER",
    default="results/validate",
    show_default=True,
    help="Write the table, the figure and the manifest into this folder.",
)
def validate(cases: tuple[str, ...], seeds: int, jobs: int | None, out: str) -> None:
    """Hold the simulation against what was published: the error of each figure, and how many are small.

    A CASE is a scenario with published figures, by name or as a TOML file; without one, all that are shipped are run.
    Each is run under the protocols that its figures were measured with. Told apart are figures that parameters were
    fitted to and figures that are predicted, and for each case what had to differ from the set of parameters that it
    builds on.

    Exit status: 0 if all figures are within 15 %; 1 if one is not, or a run FAILED; 2 for bad input; 130 if interrupted
    (nothing is written then).
    """
    from experiments.validate import run_validate

    ctx = click.get_current_context()
    ctx.exit(run_validate(cases, range(1, seeds + 1), out, jobs, ["proto-v3", *sys.argv[1:]]))


@main.command()
@click.argument("name", required=False)
@set_option
def scenarios(name: str | None, settings: tuple[str, ...]) -> None:
    """List the shipped scenarios, or show the parameters of one with the source of each."""
    from experiments.show import list_scenarios, show_scenario

    if name is not None:
        show_scenario(name, settings)
    elif settings:
        raise click.UsageError("--set changes a scenario: name one")
    else:
        list_scenarios()


if __name__ == "__main__":
    main()
