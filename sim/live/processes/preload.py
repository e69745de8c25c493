# SPDX-License-Identifier: GPL-2.0-or-later
"""Imported by the fork server before it forks. Its children share these pages as long as none of them writes to one.

So what each child would set up for itself is set up here. gc.freeze() keeps the collector, which writes to every object
that it looks at, away from these objects.
"""

import encodings.idna  # noqa: F401 - of a socket's connect()
import gc
import os

import numpy.ma
import numpy.random  # noqa: F401 - of the guest; numpy.ma is of numpy.unique()
import uvloop  # noqa: F401

import sim.live.processes.children  # noqa: F401
from sim.live.processes.fork_server import SERVER_FOLDER, remove_at_exit
from sim.scenario.file import load

if SERVER_FOLDER in os.environ:
    remove_at_exit(os.environ.pop(SERVER_FOLDER))
load("live-paced")
gc.collect()
gc.freeze()
