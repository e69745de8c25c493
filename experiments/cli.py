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


@main.command()
@click.argument("scenario")
@click.option(
    "--protocols",
    default="v2,v3-n1,v3-n4",
    show_default=True,
    metavar="NAMES",
    help="Separated by commas: v2, v3 (dirty streams as the scenario says), v3-n1 to v3-n64.",
)
@click.option("--seeds", type=click.IntRange(1, 100_000), default=10, show_default=True, help="Runs of each protocol.")
@click.option("--first-seed", type=click.IntRange(0), default=1, show_default=True, help="The seeds count up from it.")
@click.option(
    "--out",
    metavar="FOLDER",
    help="Write the table, the figure and the manifest into this folder.  [default: results/SCENARIO]",
)
@click.option("--format", "table_format", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True)
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes.  [default: one a CPU]")
def compare(
    scenario: str,
    protocols: str,
    seeds: int,
    first_seed: int,
    out: str | None,
    table_format: str,
    jobs: int | None,
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
    ctx.exit(run_compare(scenario, names, chosen, out, table_format, jobs, ["proto-v3", *sys.argv[1:]]))


@main.command()
@click.argument("name", required=False)
def scenarios(name: str | None) -> None:
    """List the shipped scenarios, or show the parameters of one with the source of each."""
    from experiments.show import list_scenarios, show_scenario

    if name is None:
        list_scenarios()
    else:
        show_scenario(name)


if __name__ == "__main__":
    main()
