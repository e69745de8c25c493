"""The command line. A command imports its module only when it is called, so that `--help` answers at once."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from experiments import INTERRUPTED, __version__
from experiments.commands.options import format_option, jobs_option, live_options, live_settings, set_option, split
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
            if error.errno == errno.EPIPE:  # the reader of our output closed it: click handles that
                raise
            click.echo(f"proto-v3: error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("proto-v3: interrupted", err=True)
            ctx.exit(INTERRUPTED)


def print_version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    """Print the version, and the git revision if the code runs from a clone."""
    if asked:
        from experiments.runs.manifest import clone, git_revision

        click.echo(f"proto-v3, version {__version__}{f' ({git_revision()})' if clone() else ''}")
        ctx.exit()


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Compare VFIO migration protocols, v2 and a multi-stream v3, on one simulated device.

    Start with: proto-v3 compare mlx5-2vf
    """


@main.command()
@click.argument("scenario")
@click.option(
    "--protocols",
    default="v2,v2-multifd,v3-n1,v3-n4",
    show_default=True,
    metavar="NAMES",
    callback=split,
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
@format_option
@jobs_option
@set_option
def compare(
    scenario: str,
    protocols: list[str],
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
    from experiments.commands.compare import run_compare

    ctx = click.get_current_context()
    chosen = range(first_seed, first_seed + seeds)
    ctx.exit(run_compare(scenario, protocols, chosen, out, table_format, jobs, ["proto-v3", *sys.argv[1:]], settings))


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
    """Compare the simulation with published figures: the error of each figure, and how many errors are small.

    A CASE is a scenario with published figures, by name or as a TOML file; without one, all shipped cases are run.
    Each is run under the protocols that its figures were measured with. Figures that parameters were fitted to and
    predicted figures are counted apart. For each case there is a table of the parameters that differ from the set that
    it builds on.

    Exit status: 0 if all figures are within 15 %; 1 if one is not, or a run FAILED; 2 for bad input; 130 if interrupted
    (nothing is written then).
    """
    from experiments.commands.validate import run_validate

    ctx = click.get_current_context()
    ctx.exit(run_validate(cases, range(1, seeds + 1), out, jobs, ["proto-v3", *sys.argv[1:]]))


@main.command("run")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--quick", is_flag=True, help="A coarse grid and few repeats: minutes become seconds, intervals wide.")
@click.option("--resume", is_flag=True, help="Make missing runs only; go on after an interruption.")
@jobs_option
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Make the runs on the workers of this Dask cluster (tcp://HOST:8786) instead; needs proto-v3[distributed].",
)
@click.option(
    "--out",
    metavar="FOLDER",
    help="Each experiment writes into a folder of its name in this one.  [default: results; results/quick if quick]",
)
def run(
    names: tuple[str, ...], quick: bool, resume: bool, jobs: int | None, scheduler: str | None, out: str | None
) -> None:
    """Answer a question that was asked on the kvm list: run a sweep, draw it, print the answer.

    NAME is one of the experiments, or several, or `all`:

    \b
    reconfiguration       set-up in the downtime against the rate of reconfigurations
    read_scaling          is read() the bottleneck, and when?
    state_and_dirty_rate  what converges, from 64 MiB to 64 GiB
    switchover_hazard     how often critical data comes too late, and what it costs
    channels              dedicated connections, a pool, or one
    reorder_memory        what waits at the target, and its bound
    buffer_and_chunk      read sizes from 4 KiB to 128 MiB, chunks
    many_devices          1 to 16 VFs on one PF and on several
    ablation              from v2 to v3, one step at a time
    sensitivity           which parameters the conclusions hang on

    Seeds are paired: all protocols get the same ones. The result does not depend on --jobs or --scheduler.

    Exit status: 0; 1 if a run broke (migrations that fail are results, and counted); 2 for bad input; 130 if
    interrupted (what was done by then is kept for --resume).
    """
    from experiments.commands.run import run_experiments

    ctx = click.get_current_context()
    ctx.exit(run_experiments(names, quick=quick, resume=resume, jobs=jobs, scheduler=scheduler, out=out))


@main.command()
@click.option("--results", metavar="FOLDER", default="results", show_default=True, help="What `proto-v3 run` wrote.")
@click.option("--out", metavar="FILE", help="The page.  [default: report.html in that folder]")
def report(results: str, out: str | None) -> None:
    """Put all answers, figures and tables on one HTML page that needs nothing beside itself.

    The answers come first, then each experiment, what the model is compared with, all parameters with their sources,
    and limits. The answers are also written into the README.md of the results folder, if it has one.

    Exit status: 0; 2 if there is no such folder, or it is damaged.
    """
    from experiments.commands.report import run_report

    click.get_current_context().exit(run_report(results, out))


@main.command()
@click.argument("scenario")
@click.option(
    "--protocol",
    "protocols",
    default="v2",
    show_default=True,
    metavar="NAMES",
    callback=split,
    help="Names as of `compare`, separated by commas.",
)
@click.option("--runs", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Runs of each protocol.")
@click.option("--first-seed", type=click.IntRange(0), default=1, show_default=True, help="The seeds count up from it.")
@click.option("--connect", metavar="HOST:PORT", help="The target is there: `proto-v3 live-target`.  [default: here]")
@click.option("--out", metavar="FOLDER", help="Table, figure and manifest go there.  [default: results/live-SCENARIO]")
@format_option
@live_options
@set_option
def live(
    scenario: str,
    protocols: list[str],
    runs: int,
    first_seed: int,
    connect: str | None,
    out: str | None,
    table_format: str,
    settings: tuple[str, ...],
    **how: Any,
) -> None:
    """Migrate SCENARIO for real: processes, file descriptors, TCP, bytes; the clock is the machine's.

    There are four processes: a device process and a VMM at each side. The device processes hold the state, up to 4 GiB,
    and pace firmware and locks as the scenario says; a guest writes to the state meanwhile; at the end all blocks are
    compared. The tables and figures are those of `compare`, but no two runs are the same to the nanosecond. How near
    they are to virtual time: `proto-v3 agree`.

    Exit status: 0; 1 if a run FAILED; 2 for bad input; 130 if interrupted (what was done by then is kept).
    """
    from experiments.commands.live import run_live

    ctx = click.get_current_context()
    seeds = range(first_seed, first_seed + runs)
    command = ["proto-v3", *sys.argv[1:]]
    how_live = live_settings(how, progress=True)
    ctx.exit(run_live(scenario, protocols, seeds, connect, how_live, out, table_format, command, settings))


@main.command("live-target")
@click.option(
    "--listen",
    is_flag=False,
    flag_value="127.0.0.1:22067",
    default="127.0.0.1:22067",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to wait for `proto-v3 live --connect`.",
)
@click.option("--once", is_flag=True, help="End after one migration.")
@click.option(
    "--max-state-mib",
    type=click.IntRange(1, 1 << 20),
    default=4096,
    show_default=True,
    help="The most state that a migration may have, all devices together; it is held in memory.",
)
@live_options
def live_target(listen: str, once: bool, max_state_mib: int, **how: Any) -> None:
    """Be the target of migrations from another host: wait for them, one after the other, until Ctrl-C.

    The source decides what is migrated. Without TLS, everybody who reaches the address can send any state up to
    --max-state-mib; therefore the default address is reachable from this machine only.

    Exit status: 0; with --once, 1 if the migration was not completed; 2 for bad input; 130 if interrupted.
    """
    from experiments.commands.live_target import run_target

    ctx = click.get_current_context()
    ctx.exit(run_target(listen, once, live_settings(how, max_state_bytes=max_state_mib << 20)))


@main.command()
@click.argument("scenario")
@click.option(
    "--protocols",
    default="v2,v3-n2",
    show_default=True,
    metavar="NAMES",
    callback=split,
    help="Names as of `compare`.",
)
@click.option("--runs", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Runs of each protocol.")
@click.option(
    "--out", metavar="FOLDER", help="Tables, figure and manifest go there.  [default: results/agree-SCENARIO]"
)
@live_options
@set_option
def agree(
    scenario: str, protocols: list[str], runs: int, out: str | None, settings: tuple[str, ...], **how: Any
) -> None:
    """Run SCENARIO in virtual time and live, with the same seeds: every figure side by side, with its ratio.

    The aim: downtime and throughput are within 10 % of the simulation, in the median of the runs. The machine should be
    idle otherwise.

    Exit status: 0 if they are; 1 if not, or a run FAILED; 2 for bad input; 130 if interrupted (nothing is written).
    """
    from experiments.commands.agree import run_agree

    ctx = click.get_current_context()
    how_live, command = live_settings(how, progress=True), ["proto-v3", *sys.argv[1:]]
    ctx.exit(run_agree(scenario, protocols, range(1, runs + 1), how_live, out, command, settings))


@main.command()
@click.argument("scenario")
@click.option("--protocol", required=True, metavar="NAME", help="As of `compare`.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@set_option
@click.option("--out", metavar="FILE", help="The trace.  [default: out/SCENARIO-PROTOCOL-SEED.perfetto-trace]")
@click.option("--spans", metavar="FILE", help="Write a table of all spans too, in Parquet.")
def trace(
    scenario: str, protocol: str, seed: int, settings: tuple[str, ...], out: str | None, spans: str | None
) -> None:
    """Make one run of SCENARIO in virtual time, and write a trace of it for https://ui.perfetto.dev.

    There is a track for each thread, device stream, firmware command queue, lock and connection, for the phases of the
    downtime and for its critical path. An arrow leads to a span from the span that it waited for. Counters show what
    remains to be sent, how fast the guest dirties it, and what was sent. The same run gives the same file.

    Exit status: 0; 1 if the run FAILED; 2 for bad input.
    """
    from experiments.commands.trace import run_trace

    click.get_current_context().exit(run_trace(scenario, protocol, seed, settings, out, spans))


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--trace", "trace_file", metavar="FILE", help="The trace.  [default: out/RUN.perfetto-trace]")
@click.option("--spans", metavar="FILE", help="Write a table of all spans too, in Parquet.")
def replay(run: str, trace_file: str | None, spans: str | None) -> None:
    """Make one run of a results folder again, check that it is the same, and write a trace of it.

    RUN is FOLDER:PROTOCOL:SEED, as in results/mlx5-2vf:v2:1, or for the runs of `proto-v3 run` FOLDER:CELL; the first
    characters of CELL are enough if no other cell begins with them. FOLDER is a path, or a name in results/.

    Exit status: 0; 1 if the digest is not the table's; 2 for bad input.
    """
    from experiments.commands.replay import run_replay

    click.get_current_context().exit(run_replay(run, trace_file, spans))


@main.command()
@click.argument("name", required=False)
@set_option
def scenarios(name: str | None, settings: tuple[str, ...]) -> None:
    """List the shipped scenarios, or show the parameters of one with the source of each."""
    from experiments.commands.scenarios import list_scenarios, show_scenario

    if name is not None:
        show_scenario(name, settings)
    elif settings:
        raise click.UsageError("--set changes a scenario: name one")
    else:
        list_scenarios()


if __name__ == "__main__":
    main()
