# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line. A command imports its module only when it is called, so that `--help` answers at once.

Options have the names of the parameters of what they are passed to: `run_NAME` in experiments.commands.NAME.
"""

from __future__ import annotations

import errno
import inspect
import sys
from collections.abc import Iterable
from typing import Any

import click

from experiments import INTERRUPTED, __version__, streams
from experiments.commands import complete
from experiments.commands.options import (
    OLD_NAMES,
    Finite,
    by_option,
    first_seed_option,
    force_option,
    format_option,
    jobs_option,
    json_option,
    live_options,
    live_settings,
    names,
    out_option,
    output_options,
    protocol_option,
    protocols_option,
    scenario_argument,
    screening_option,
    seeds_option,
    set_option,
    spans_option,
    trace_option,
)
from experiments.runs import interrupt
from experiments.study.names import QUESTIONS
from proto_v3.errors import UserError
from proto_v3.text import clean

MAX_ERROR_CHARS = 20_000
BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Why a file cannot be written although the user named it well."""
NO_BREAK = "\N{NON-BREAKING HYPHEN}"


class Formatter(click.HelpFormatter):
    """Help in which no line ends within a name: `-no-ack` stays whole."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write terms and what they mean."""
        super().write_dl([(term, text.replace("-", NO_BREAK)) for term, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        """The text."""
        return super().getvalue().replace(NO_BREAK, "-")


class Context(click.Context):
    """Of all commands."""

    formatter_class = Formatter


class Command(click.Command):
    """One of the commands."""

    context_class = Context


class Cli(click.Group):
    """The commands, which return their exit status; a user's mistake is one message on stderr, never a traceback."""

    context_class = Context
    command_class = Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their first sentences, which are never cut."""
        commands = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(commands)

    def main(self, *args: Any, **more: Any) -> Any:
        """Be the program."""
        if sys.platform == "win32" or sys.stdout is not sys.__stdout__:  # called by a test, or from Python
            return super().main(*args, **more)
        stdout, raw = streams.take_over()
        try:
            return super().main(*args, **more)
        except SystemExit as end:
            interrupt.ignore()  # there is nothing left to do
            stdout.flush()
            if raw.lost:
                click.echo(f"proto-v3: error: standard output cannot be written: {raw.lost}", err=True)
                end.code = end.code or 1
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with interrupt.raised():
            ctx.exit(self._status(ctx))

    def _status(self, ctx: click.Context) -> int:
        try:
            status = super().invoke(ctx)
            return interrupt.exit_status() if status == INTERRUPTED else status or 0
        except UserError as error:
            click.echo(f"proto-v3: error: {clean(str(error), MAX_ERROR_CHARS, lines=True)}", err=True)
            return 1 if isinstance(error.__cause__, OSError) and error.__cause__.errno in BROKEN_DISK else 2
        except UnicodeEncodeError as error:  # a file's name
            click.echo(
                f"proto-v3: error: {error.object!a}: a name that the locale cannot write ({error.encoding}); "
                "set LC_ALL=C.UTF-8, or PYTHONUTF8=1",
                err=True,
            )
            return 2
        except OSError as error:
            click.echo(f"proto-v3: error: {clean(str(error), MAX_ERROR_CHARS)}", err=True)
            return 1
        except KeyboardInterrupt:
            click.echo("proto-v3: interrupted", err=True)
            return interrupt.exit_status()


def command_line() -> list[str]:
    """The command that runs, for manifests and figures."""
    return ["proto-v3", *sys.argv[1:]]


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

    SIGTERM and SIGHUP end a command as Ctrl-C does. The exit status is then 128 + the signal: 143, 129, 130.
    """


@main.command()
@scenario_argument
@protocols_option("v2,v2-multifd,v3-n1,v3-n4")
@seeds_option(10, "Runs of each protocol.", most=100_000)
@first_seed_option
@out_option("Write the table, the figure and the manifest into this folder.  [default: out/SCENARIO]")
@force_option
@format_option
@jobs_option
@set_option
@output_options
def compare(seeds: int, first_seed: int, **options: Any) -> int:
    """Migrate the devices of SCENARIO under each protocol: downtime, where it went, a figure.

    SCENARIO is a shipped scenario's name (see `proto-v3 scenarios`) or a TOML file. Every protocol gets the same
    seeds, so that guest and firmware do the same under each.

    Exit status: 0; 1 if a run FAILED; 2 for bad input; 130 if interrupted (what was done by then is kept).
    """
    from experiments.commands.compare import run_compare

    return run_compare(seeds=range(first_seed, first_seed + seeds), command=command_line(), **options)


@main.command()
@click.argument("scenario", default="mlx5-2vf", metavar="[SCENARIO]", shell_complete=complete.scenarios)
@click.option(
    "--samples",
    type=click.IntRange(1, 1 << 16),
    default=256,
    show_default=True,
    help="How many plausible machines are drawn from the scenario's ranges. Powers of two are spread most evenly.",
)
@click.option(
    "--near-ms",
    type=Finite(0, min_open=True),
    metavar="MS",
    help="The downtime of your machine as it is: of four times as many plausible machines those within 15 % are taken.",
)
@click.option(
    "--changes",
    default="",
    metavar="NAMES",
    callback=names,
    shell_complete=complete.changes,
    help="Only these, separated by commas, in the table's order.  [default: all]",
)
@screening_option
@click.option("--resume", is_flag=True, help="Make missing runs only; go on after an interruption.")
@out_option("Write the tables, the figure and the manifest into this folder.  [default: out/decide-SCENARIO]")
@force_option
@jobs_option
@set_option
@output_options
def decide(**options: Any) -> int:
    """Say what to change first for SCENARIO, and what it brings: the decision table.

    A row is a change of QEMU, of a driver or of the interface, on top of those above it, in order of what it costs to
    make: what it takes off the downtime, and off all else that counts, as medians and bands over plausible machines of
    that kind, and how probable it is that it brings more than 5 %. Then the verdict on a critical fd, on N dirty fds
    and on addressable blocks, with the measurement that would settle each. SCENARIO is a shipped scenario's name,
    mlx5-2vf if it is left out, or a TOML file, as `proto-v3 fit` writes it.

    The machines are quasi-random samples of the scenario's [ranges]; all protocols are run on the same ones. Which
    parameter decides takes SALib: proto-v3[indices].

    Exit status: 0; 1 if no figure can be drawn; 2 for bad input; 130 if interrupted (what was done by then is kept for
    --resume).
    """
    from experiments.commands.decide import run_decide

    return run_decide(command=command_line(), **options)


@main.command()
@click.argument("names", metavar="[CASE]...", nargs=-1, shell_complete=complete.cases)
@seeds_option(10, "Runs of each case.", most=100_000)
@click.option(
    "--samples",
    type=click.IntRange(0, 1 << 16),
    default=16,
    show_default=True,
    help="Samples of the ranges of each case, for the band of each figure; 0: no bands.",
)
@screening_option
@jobs_option
@set_option
@output_options
@out_option("Write the table, the figure and the manifest into this folder.  [default: out/validate]")
@force_option
def validate(seeds: int, **options: Any) -> int:
    """Compare the simulation with published figures: error and band of each figure, and how many errors are small.

    A CASE is a scenario with published figures, by name or as a TOML file; without one, all shipped cases are run.
    Each is run under the protocols that its figures were measured with. Figures that parameters were fitted to, sums of
    these, and predicted figures are counted apart. The band of a figure is from the 5th to the 95th percentile over
    samples of the case's ranges: plausible values of what is assumed, fitted or derived. For each case there is a table
    of the parameters that differ from the set that it builds on. With --set, the published figures are held against a
    machine that was not measured.

    Exit status: 0 if all figures are within 15 %; 1 if one is not, or a run FAILED; 2 for bad input; 130 if interrupted
    (nothing is written then).
    """
    from experiments.commands.validate import run_validate

    return run_validate(seeds=range(1, seeds + 1), command=command_line(), **options)


@main.command("run")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete.questions)
@click.option("--quick", is_flag=True, help="A coarse grid and few repeats: minutes become seconds, intervals wide.")
@click.option("--resume", is_flag=True, help="Make missing runs only; go on after an interruption.")
@click.option(
    "--half-width",
    type=Finite(0, 100),
    default=1.0,
    show_default=True,
    metavar="PERCENT",
    help="A setting gets no more seeds when the 95 % intervals of its means are within this. 0: it gets all.",
)
@jobs_option
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Make the runs on the workers of this Dask cluster instead (tcp://HOST:8786, or tls://HOST:8786 with the "
    "certificates of Dask's configuration); needs proto-v3[distributed]. A Dask scheduler and its workers run any code "
    "that is sent to them, by whoever reaches their ports: without TLS, in a network that you trust only.",
)
@set_option
@output_options
@out_option("Each experiment writes into a folder of its name in this one.  [default: out/run; out/quick if quick]")
@force_option
def run(**options: Any) -> int:
    """Answer a question that was asked on the kvm list: run a sweep, draw it, print the answer.

    NAME is one of the experiments, or several, or `all`:

    \b
    QUESTIONS

    Seeds are paired: all protocols get the same ones. The result does not depend on --jobs or --scheduler.
    --set changes the scenarios that a question builds on; it cannot set a key that the question sweeps.

    At the end stands a table: each question, its runs, how many broke, the verdicts on its claims, and its folder.

    Exit status: 0; 1 if a run broke (migrations that fail are results, and counted), or if no figure can be drawn;
    2 for bad input; 130 if interrupted (what was done by then is kept for --resume).
    """
    from experiments.commands.run import run_experiments

    return run_experiments(**options)


run.help = inspect.cleandoc(run.help or "").replace(
    "QUESTIONS", "\n".join(f"{name:<20}  {question}" for name, question in QUESTIONS.items())
)


@main.command()
@click.argument("folder", required=False, shell_complete=complete.folders)
@click.option("--results", metavar="FOLDER", shell_complete=complete.folders, help="The same as FOLDER.")
@click.option(
    "--page", metavar="FILE", shell_complete=complete.files, help="The page.  [default: report.html in that folder]"
)
def report(folder: str | None, results: str | None, page: str | None) -> int:
    """Put all answers, figures and tables on one HTML page that needs nothing beside itself.

    FOLDER is what `proto-v3 run` wrote, a path or a name in out/; the default is the newest of out/run and out/quick.
    The results that are kept with the project are in `results`. The answers come first, then each experiment, what the
    model is compared with, all parameters with their sources, and limits. The answers are also written into the
    README.md of the folder, if it has one and nothing is missing.

    Exit status: 0; 1 if a question is missing, damaged or not complete, which the page and the last lines say; 2 if
    there are no results.
    """
    from experiments.commands.report import run_report

    if folder is not None and results is not None:
        raise click.UsageError("name one FOLDER")
    return run_report(folder if results is None else results, page)


@main.command(context_settings=OLD_NAMES)
@scenario_argument
@protocols_option("v2")
@seeds_option(1, "Runs of each protocol.")
@first_seed_option
@click.option("--connect", metavar="HOST:PORT", help="The target is there: `proto-v3 live-target`.  [default: here]")
@out_option("Table, figure and manifest go there.  [default: out/live-SCENARIO]")
@force_option
@format_option
@live_options
@set_option
@output_options
def live(seeds: int, first_seed: int, **options: Any) -> int:
    """Migrate SCENARIO for real: processes, file descriptors, TCP, bytes; the clock is the machine's.

    There are four processes: a device process and a VMM at each side. The device processes hold the state, up to 4 GiB,
    and pace firmware and locks as the scenario says; a guest writes to the state meanwhile; at the end all blocks are
    compared. The tables and figures are those of `compare`, but no two runs are the same to the nanosecond. How near
    they are to virtual time: `proto-v3 agree`.

    Exit status: 0; 1 if a run FAILED; 2 for bad input; 130 if interrupted (what was done by then is kept).
    """
    from experiments.commands.live import run_live

    how = live_settings(options, progress=True)
    return run_live(seeds=range(first_seed, first_seed + seeds), how=how, command=command_line(), **options)


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
@click.option("--once", is_flag=True, help="End after one migration, or one that is refused.")
@click.option(
    "--max-state-mib",
    type=click.IntRange(1, 1 << 20),
    default=4096,
    show_default=True,
    help="The most memory that a migration may take: its state, and all that its offer asks for.",
)
@live_options
def live_target(listen: str, once: bool, max_state_mib: int, **options: Any) -> int:
    """Be the target of migrations from another host: wait for them, one after the other, until Ctrl-C.

    The source decides what is migrated. Without TLS, everybody who reaches the address can send any state up to
    --max-state-mib; therefore the default address is reachable from this machine only.

    Exit status: 0; with --once, 1 if the migration was not completed; 2 for bad input; 130 if interrupted.
    """
    from experiments.commands.live_target import run_target

    return run_target(listen, once, live_settings(options, max_state_bytes=max_state_mib << 20))


@main.command(context_settings=OLD_NAMES)
@click.argument("devices", metavar="DEVICE[,DEVICE...]", callback=names, shell_complete=complete.devices)
@click.option(
    "--to",
    metavar="DEVICE[,DEVICE...]",
    default="",
    callback=names,
    shell_complete=complete.devices,
    help="The target's, on this machine.",
)
@click.option("--connect", metavar="HOST:PORT", help="The target is there: `proto-v3 real DEVICE --listen`.")
@click.option(
    "--listen",
    is_flag=False,
    flag_value="127.0.0.1:22067",
    metavar="HOST:PORT",
    help="Be the target of migrations into DEVICE, one after the other, until Ctrl-C.  [without HOST:PORT: "
    "127.0.0.1:22067]",
)
@click.option("--once", is_flag=True, help="End after one migration, or one that is refused.")
@protocols_option("v2")
@seeds_option(1, "Runs of each protocol.")
@first_seed_option
@click.option(
    "--scenario",
    metavar="SCENARIO",
    shell_complete=complete.scenarios,
    help="Its VMM, RAM and link are taken, in place of defaults.",
)
@by_option
@out_option("Table, figure and manifest go there.  [default: out/real-DEVICE]")
@force_option
@format_option
@live_options
@set_option
@output_options
def real(seeds: int, first_seed: int, listen: str | None, once: bool, **options: Any) -> int:
    """Migrate VFIO devices of this kernel to others of the same driver, here or on another machine.

    DEVICE is a PCI address, the UUID of a mediated device, /dev/vfio/devices/vfioN, or a path in sysfs. It must be
    bound to a VFIO driver that migrates it, and nobody else may have it open. Nothing of a guest runs on it: this
    command is its VMM, with some RAM mapped for its DMA. At the end it is left as it was found, also after Ctrl-C.
    How to try it safely: docs/real.md.

    Exit status: 0; 1 if a run FAILED, or with --listen --once was not completed; 2 for bad input; 130 if interrupted
    (what was done by then is kept).
    """
    from experiments.commands.real import run_real, run_real_target

    how = live_settings(options, progress=listen is None)
    if listen is not None:
        if options["to"] or options["connect"]:
            raise UserError("--listen: this side is the target then, and --to and --connect are for the source")
        return run_real_target(options["devices"], listen, options["by"], once, how)
    if once:
        raise UserError("--once: goes with --listen only")
    return run_real(seeds=range(first_seed, first_seed + seeds), how=how, command=command_line(), **options)


@main.command(context_settings=OLD_NAMES)
@scenario_argument
@protocols_option("v2,v3-n2")
@seeds_option(10, "Runs of each protocol.")
@click.option(
    "--real",
    is_flag=True,
    help="A third column: devices of the sample driver in this kernel, made to be as the scenario says.",
)
@out_option("Tables, figure and manifest go there.  [default: out/agree-SCENARIO]")
@force_option
@live_options
@set_option
@output_options
def agree(seeds: int, **options: Any) -> int:
    """Run SCENARIO in virtual time and live, with the same seeds: every figure side by side, with its ratio.

    The aim: downtime and throughput are within 10 % of the simulation, in the median of the runs. The machine should be
    idle otherwise. --real takes root and a kernel with the project's driver (docs/real.md); live-sample is a scenario
    that the driver can be.

    Exit status: 0 if they are; 1 if not, or a run FAILED; 2 for bad input; 130 if interrupted (nothing is written).
    """
    from experiments.commands.agree import run_agree

    how = live_settings(options, progress=True)
    return run_agree(seeds=range(1, seeds + 1), how=how, command=command_line(), **options)


@main.command()
@click.argument("a", metavar="A", shell_complete=complete.folders)
@click.argument("b", metavar="B", shell_complete=complete.folders)
@output_options
def diff(**options: Any) -> int:
    """Compare two folders of results: what was run, how each run ended, and what it took.

    A and B are folders of `compare`, `live`, `agree` or `validate`, or of one question of `run`. What both have is
    compared: the difference of the means has a 95 % interval, paired by seed if the scenario and the seeds are the
    same.

    Exit status: 0 if the results are the same, run by run; 1 if they differ; 2 if one is no folder of results.
    """
    from experiments.commands.diff import run_diff

    return run_diff(**options)


@main.command()
@scenario_argument
@protocol_option
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@set_option
@trace_option("out/SCENARIO-PROTOCOL-SEED.perfetto-trace")
@spans_option
def trace(**options: Any) -> int:
    """Make one run of SCENARIO in virtual time, and write a trace of it for https://ui.perfetto.dev.

    There is a track for each thread, device stream, firmware command queue, lock and connection, for the phases of the
    downtime and for its critical path. An arrow leads to a span from the span that it waited for. Counters show what
    remains to be sent, how fast the guest dirties it, and what was sent. The same run gives the same file.

    Exit status: 0; 1 if the run FAILED; 2 for bad input.
    """
    from experiments.commands.trace import run_trace

    return run_trace(**options)


@main.command()
@click.argument("run", metavar="RUN", shell_complete=complete.folders)
@trace_option("out/RUN.perfetto-trace")
@spans_option
def replay(**options: Any) -> int:
    """Make one run of a results folder again, check that it is the same, and write a trace of it.

    RUN is FOLDER:PROTOCOL:SEED, as in results/mlx5-2vf:v2:1, or for the runs of `proto-v3 run` FOLDER:CELL; the first
    characters of CELL are enough if no other cell begins with them. FOLDER is a path, or a name in out/, out/run/,
    out/quick/ or results/, the first of them that has it.

    Exit status: 0; 1 if the digest is not the table's; 2 for bad input.
    """
    from experiments.commands.replay import run_replay

    return run_replay(**options)


@main.command()
@click.argument("name", metavar="[SCENARIO]", required=False, shell_complete=complete.scenarios)
@set_option
@json_option
def scenarios(name: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """List the shipped scenarios, or show the parameters of one: value, source, plausible range and its reason.

    At the end stands which parameters are assumed, fitted or derived and have no range. SCENARIO may also be a set of
    values that files extend, such as mlx5.
    """
    from experiments.commands.scenarios import list_scenarios, show_scenario

    if name is not None:
        show_scenario(name, settings, as_json=as_json)
    elif settings:
        raise click.UsageError("--set changes a scenario: name one")
    else:
        list_scenarios(as_json=as_json)


@main.command()
@click.argument("source", metavar="SOURCE.log", required=False, shell_complete=complete.files)
@click.argument("target", metavar="TARGET.log", required=False, shell_complete=complete.files)
@click.option("--how", is_flag=True, help="Print how to get the logs: what to trace, and how. Nothing else is done.")
@click.option(
    "--out",
    metavar="FILE.toml",
    shell_complete=complete.files,
    help="Write the scenario there, and its figure beside it.  [default: nothing is written]",
)
@click.option(
    "--cmdline",
    multiple=True,
    metavar="TEXT|FILE",
    shell_complete=complete.files,
    help="What QEMU was told: its arguments, or what query-migrate-parameters, query-migrate-capabilities or "
    "query-migrate returned; or a file with it. May be repeated.",
)
@click.option(
    "--driver",
    multiple=True,
    metavar="CALLS",
    shell_complete=complete.files,
    help="How long the driver's functions took, of bpftrace, function_graph or kprobes (--how). May be repeated.",
)
@click.option(
    "--extends",
    default="mlx5",
    show_default=True,
    metavar="SCENARIO",
    shell_complete=complete.bases,
    help="What the logs do not tell is as in this one: name or file.",
)
@click.option(
    "--migration",
    type=click.IntRange(1),
    metavar="N",
    help="The N-th migration in each log.  [default: the last one that completed]",
)
@click.option(
    "--rename", default="", metavar="NAME,NAME", callback=names, help="What devices are called.  [default: vf0,vf1]"
)
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="How many plausible machines the changes are tried on; 0: nothing is tried.",
)
@jobs_option
@force_option
@output_options
def fit(source: str | None, target: str | None, how: bool, **options: Any) -> int:
    """Fit a scenario to the logs of one migration of a real machine, seen from both ends.

    SOURCE.log and TARGET.log have QEMU's trace events, of 10.0 or newer, or VFIO_MIGRATION events over QMP; `proto-v3
    fit --how` says what to trace. A name `-` is standard input. Out come: each quantity, measured, bounded, or why the
    logs cannot tell it; the real downtime, phase by phase, beside the simulated one; what multifd, more chunks and v3
    would bring there, as bands over what is not known; and, with --out, the scenario. The hosts' clocks need not agree.
    More: docs/fit.md.

    Exit status: 0; 1 if no figure can be drawn; 2 for bad input; 130 if interrupted.
    """
    from experiments.commands.fit import print_how, run_fit

    if how:
        print_how()
        return 0
    if source is None or target is None:
        raise click.UsageError("name two logs, SOURCE.log and TARGET.log; or --how")
    return run_fit(source, target, command=command_line(), **options)


@main.command()
@click.argument("device", shell_complete=complete.devices)
@click.option(
    "--load-into",
    metavar="DEVICE",
    shell_complete=complete.devices,
    help="Also measure how a state is loaded, into this device, which may be the same one.  [default: no load]",
)
@by_option
@click.option("--read-kib", default="64,1024,16384", show_default=True, metavar="SIZES", help="Of read(), in KiB.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=3, show_default=True, help="Of all that is timed.")
@click.option(
    "--precopy-s",
    type=Finite(0.01, 3600),
    default=1.0,
    show_default=True,
    help="How long PRECOPY_INFO is asked for.",
)
@click.option(
    "--max-state-mib",
    type=click.IntRange(1, 1 << 20),
    default=4096,
    show_default=True,
    help="With --load-into: the largest state, which is kept in memory.",
)
@click.option("--reset", is_flag=True, help="Reset the device if only that leads to RUNNING. This loses its state.")
@click.option(
    "--scenario-out", metavar="FILE", shell_complete=complete.files, help="Write a scenario with what was measured."
)
@click.option(
    "--extends",
    default="mlx5",
    show_default=True,
    metavar="SCENARIO",
    shell_complete=complete.bases,
    help="What it changes: name or file.",
)
@output_options
def probe(**options: Any) -> int:
    """Measure a VFIO device of this machine: features, sizes, time of each arc, PRECOPY_INFO, read() rates.

    DEVICE is a PCI address, the UUID of a mediated device, /dev/vfio/devices/vfioN, or a path in sysfs. It must be
    bound to its VFIO driver, and no VM may have it open.

    The device is stopped and saved and, with --load-into, loaded with a state that was saved before. It is left in
    RUNNING as it was found, also after Ctrl-C or an error. From ERROR only a reset leads to RUNNING: that is said, and
    done with --reset. The own state of another device that a state is loaded into is saved first, and loaded again.

    Exit status: 0; 1 if a call failed or a device could not be left in RUNNING; 2 for bad input; 130 if interrupted.
    """
    from experiments.commands.probe import run_probe

    return run_probe(**options)


@main.command("new-scenario")
@click.argument("name")
@click.option(
    "--extends",
    default="mlx5",
    show_default=True,
    metavar="SCENARIO",
    shell_complete=complete.bases,
    help="What it changes: name or file.",
)
def new_scenario(name: str, extends: str) -> None:
    """Write NAME.toml, a scenario of your own: every key is there, with its value so far, its unit and its source.

    All keys are commented out, so that the file is the one that it extends until you change it. No file is replaced.
    """
    from experiments.commands.new_scenario import write_scenario

    write_scenario(name, extends)


@main.command()
def schema() -> None:
    """Print a JSON Schema of scenario files, with which an editor completes and checks them.

    For VS Code (Even Better TOML) and others that use Taplo: write it into a file beside the scenario, as in
    `proto-v3 schema > scenario.schema.json`, and begin the scenario with the line `#:schema ./scenario.schema.json`.
    """
    import json

    from sim.scenario.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
@click.argument("scenario", required=False, shell_complete=complete.scenarios)
@set_option
def protocols(scenario: str | None, settings: tuple[str, ...]) -> None:
    """List every suffix that a protocol's name may have, with what it changes.

    With a SCENARIO: also what each changes in it, and which of them it does not allow.
    """
    from experiments.commands.protocols import list_protocols

    if scenario is None and settings:
        raise click.UsageError("--set changes a scenario: name one")
    list_protocols(scenario, settings)


@main.command()
@click.argument("shell", type=click.Choice(list(complete.SHELLS)))
def completion(shell: str) -> None:
    """Print what completes commands, options and names in a SHELL when you press Tab.

    \b
    bash, in ~/.bashrc:                      eval "$(proto-v3 completion bash)"
    zsh, in ~/.zshrc, after compinit:        eval "$(proto-v3 completion zsh)"
    fish, in ~/.config/fish/config.fish:     proto-v3 completion fish | source
    """
    click.echo(complete.script(main, shell))


if __name__ == "__main__":
    main()
