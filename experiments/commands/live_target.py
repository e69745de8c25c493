# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 live-target`: the target of live migrations from another host."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from rich.console import Console

from experiments import INTERRUPTED
from experiments.commands.live import address, interruptible
from sim.live.processes.report import Note, RejectedNote, SessionNote
from sim.live.processes.settings import Settings
from sim.live.result import SideEnd
from sim.live.run import serve_one
from sim.live.tcp.sockets import listen, text_of
from sim.scenario.units import MIB


def run_target(where: str, once: bool, settings: Settings) -> int:
    """Listen at `where`, and receive migrations one after the other until Ctrl-C; returns the exit status.

    UserError if `where` is no address, or if it cannot be listened at.
    """
    host, port = address(where, "--listen")
    listener = listen((host, port))
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    bound = listener.getsockname()
    say(f"listening on {text_of(bound)}, at most {settings.max_state_bytes // MIB} MiB of memory a migration")
    if not bound[0].startswith("127.") and bound[0] != "::1" and settings.tls is None:
        say("warning: everybody who reaches this address can send state here: use --tls-cert, --tls-key, --tls-ca")
    status = 0

    def show(note: Note) -> None:
        match note:
            case SessionNote():
                say(f"{note.peer}: {note.scenario}, {note.protocol}")
            case RejectedNote():
                say(f"turned away: {note.why}")

    async def work() -> None:
        nonlocal status
        while True:
            end = await serve_one(listener, replace(settings, once=once), show)
            status = 0 if end.report is not None and end.report.whole else 1
            say(ending(end))
            if once:
                return

    with contextlib.closing(listener):
        if not interruptible(work):
            say("interrupted")
            return INTERRUPTED
    return status


def ending(end: SideEnd) -> str:
    """How a migration ended, at the target."""
    report = end.report
    if report is not None and report.whole:
        return "the guest runs here"
    why = [*end.deaths, *(failure.text for failure in (report.failures if report is not None else []))]
    if report is None and not why:
        why = ["the target VMM is gone"]
    runs = "the guest runs here" if report is not None and report.guest_runs else "the guest does not run here"
    return f"{runs}: {'; '.join(dict.fromkeys(why)) or 'the source gave up'}"
