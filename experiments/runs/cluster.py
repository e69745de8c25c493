"""Runs made by the workers of a Dask cluster, in place of this machine's processes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.runs.pool import CELLS_PER_WORKER, Cell, Done, broken, run_cell
from proto_v3.errors import UserError

CONNECTS_WITHIN_S = 10


def on_cluster(cells: Sequence[Cell], address: str) -> Done:
    """On the workers of the cluster whose scheduler is there, which must have this project installed.

    A worker that dies loses nothing: its runs are made by another one. A run that kills several is recorded as such.
    UserError if there is no such cluster, or if it is none that can make them.
    """
    try:
        import distributed
    except ImportError as error:
        raise UserError("--scheduler: needs Dask; install proto-v3[distributed]") from error
    as_completed: Any = distributed.as_completed  # none of it is typed
    left = iter(enumerate(cells))
    with _client(address) as client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise UserError(f"--scheduler {address}: it has no workers")
        running, places = as_completed(loop=client.loop), {}

        def submit(count: int) -> None:
            for at, cell in itertools.islice(left, count):
                future = client.submit(run_cell, cell, pure=False)
                places[future.key] = at
                running.add(future)

        submit(CELLS_PER_WORKER * workers)
        for future in running:
            at = places.pop(future.key)
            try:
                outcome = future.result()
            except distributed.KilledWorker as error:
                outcome = broken(cells[at], f"the workers that made this run died: {error}")
            except Exception as error:  # run_cell() tells what breaks in a run: it is the cluster that fails
                told = " ".join(str(error).split())
                raise UserError(f"--scheduler {address}: its workers cannot make runs: {told}") from error
            yield at, outcome
            submit(1)


def _client(address: str) -> Any:
    import distributed

    connect: Any = distributed.Client
    try:
        return connect(address, timeout=CONNECTS_WITHIN_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(f"--scheduler {address}: no Dask scheduler answers there: {error}") from error
