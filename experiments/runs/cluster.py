# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs made by the workers of a Dask cluster, in place of this machine's processes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from experiments.runs.pool import Cell, Done, broken, run_cell
from proto_v3.errors import UserError
from proto_v3.text import clean

CONNECT_TIMEOUT_S = 10
CELLS_PER_WORKER = 16
"""Runs that the cluster has in advance: enough that no worker waits."""
LOOK_S, COUNT_S = 0.02, 2.0
"""How often a finished run is looked for, and how often the workers are counted while there is none."""
WITHOUT_WORKERS_S = 30.0
"""A cluster that has no worker for this time is given up."""
KEPT = "the runs that were done are kept: go on with --resume"


def on_cluster(cells: Sequence[Cell], address: str) -> Done:
    """Make all runs on the workers of the cluster whose scheduler has this address; the project is installed on them.

    Certificates for `tls://` come from Dask's configuration. If a worker dies, another one makes its runs; the outcome
    of a run that kills several is FAILED. UserError if no scheduler answers, if it has no workers or loses all of them,
    or if they cannot make runs.
    """
    try:
        import distributed
    except ImportError as error:
        raise UserError("--scheduler: needs Dask; install proto-v3[distributed]") from error
    connect: Any = distributed.Client
    as_completed: Any = distributed.as_completed  # neither has types
    try:
        client = connect(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two: TLS without certificates
        tls = "; certificates come from Dask's configuration, distributed.comm.tls" if address.startswith("tls") else ""
        raise UserError(f"--scheduler {address}: no Dask scheduler answers there: {_line(error)}{tls}") from error
    remaining = iter(enumerate(cells))
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise UserError(f"--scheduler {address}: it has no workers; start some with `dask worker {address}`")
        running, indices = as_completed(loop=client.loop), {}

        def submit(count: int) -> None:
            for at, cell in itertools.islice(remaining, count):
                future = client.submit(run_cell, cell, pure=False)
                indices[future.key] = at
                running.add(future)

        submit(CELLS_PER_WORKER * workers)
        while indices:
            _wait_for_one(running, client, address)
            future = next(running)
            at = indices.pop(future.key)
            try:
                outcome = future.result()
            except distributed.KilledWorker as error:
                outcome = broken(cells[at], f"the workers that made this run died: {error}")
            except Exception as error:  # run_cell() catches what a run raises, so this is the cluster's failure
                raise UserError(f"--scheduler {address}: its workers cannot make runs: {_line(error)}") from error
            yield at, outcome
            submit(1)


def _wait_for_one(running: Any, client: Any, address: str) -> None:
    """Wait until a run is finished. UserError if there is nobody any more to finish one."""
    counted_s = alive_s = time.monotonic()
    while not running.has_ready():
        time.sleep(LOOK_S)
        if time.monotonic() - counted_s < COUNT_S:
            continue
        counted_s = time.monotonic()
        try:
            workers = client.nthreads()
        except (OSError, RuntimeError) as error:
            raise UserError(f"--scheduler {address}: it does not answer any more: {_line(error)}; {KEPT}") from error
        if workers:
            alive_s = counted_s
        elif counted_s - alive_s >= WITHOUT_WORKERS_S:
            raise UserError(f"--scheduler {address}: it has no workers any more; {KEPT}")


def _line(error: Exception) -> str:
    return clean(" ".join(str(error).split()))
