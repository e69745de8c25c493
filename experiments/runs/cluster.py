"""Runs made by the workers of a Dask cluster, in place of this machine's processes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.runs.pool import Cell, Done, broken, run_cell
from proto_v3.errors import UserError

CONNECT_TIMEOUT_S = 10
CELLS_PER_WORKER = 16
"""Runs that the cluster has in advance: enough that no worker waits."""


def on_cluster(cells: Sequence[Cell], address: str) -> Done:
    """Make all runs on the workers of the cluster whose scheduler has this address; the project is installed on them.

    If a worker dies, another one makes its runs; the outcome of a run that kills several is FAILED. UserError if no
    scheduler answers, if it has no workers, or if they cannot make runs.
    """
    try:
        import distributed
    except ImportError as error:
        raise UserError("--scheduler: needs Dask; install proto-v3[distributed]") from error
    connect: Any = distributed.Client
    as_completed: Any = distributed.as_completed  # neither has types
    try:
        client = connect(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(f"--scheduler {address}: no Dask scheduler answers there: {error}") from error
    remaining = iter(enumerate(cells))
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise UserError(f"--scheduler {address}: it has no workers")
        running, indices = as_completed(loop=client.loop), {}

        def submit(count: int) -> None:
            for at, cell in itertools.islice(remaining, count):
                future = client.submit(run_cell, cell, pure=False)
                indices[future.key] = at
                running.add(future)

        submit(CELLS_PER_WORKER * workers)
        for future in running:
            at = indices.pop(future.key)
            try:
                outcome = future.result()
            except distributed.KilledWorker as error:
                outcome = broken(cells[at], f"the workers that made this run died: {error}")
            except Exception as error:  # run_cell() catches what a run raises, so this is the cluster's failure
                reason = " ".join(str(error).split())
                raise UserError(f"--scheduler {address}: its workers cannot make runs: {reason}") from error
            yield at, outcome
            submit(1)
