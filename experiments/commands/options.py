"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from sim.live.processes.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

jobs_option = click.option("--jobs", type=click.IntRange(1, 256), help="Processes.  [default: one a CPU]")
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a parameter, as in --set device.0.count=4 or --set driver.lock=device. May be repeated.",
)
format_option = click.option(
    "--format", "table_format", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True
)


def split(ctx: click.Context, option: click.Parameter, names: str) -> list[str]:
    """Names that are separated by commas, as a list; a callback of an option."""
    return [name.strip() for name in names.split(",")]


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
        click.option("--tls-cert", metavar="PEM", help="TLS: this side's certificate.  [default: no TLS]"),
        click.option("--tls-key", metavar="PEM", help="Its private key."),
        click.option("--tls-ca", metavar="PEM", help="Certificates that the other side's must be signed by."),
        click.option(
            "--silent-s",
            type=click.FloatRange(0.5, 3600),
            default=10.0,
            show_default=True,
            help="Give up a peer or a process that is silent for this time.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def live_settings(how: dict[str, Any], **more: Any) -> Settings:
    """The settings that the options of live_options() give."""
    from experiments.commands.live import tls_of
    from sim.live.processes.settings import Settings

    tls = tls_of(how["tls_cert"], how["tls_key"], how["tls_ca"])
    return Settings(io=how["io"], loop=how["loop"], tls=tls, silent_s=how["silent_s"], **more)
