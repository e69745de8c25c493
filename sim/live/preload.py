"""Imported by the server that processes are started from, and by nobody else.

A terminal's Ctrl-C goes to all processes of its group. The server and its children are in a group of their own, so that
it is the supervisor's alone, which ends them in good order.
"""

from __future__ import annotations

import os
import sys

if sys.argv[:1] == ["-c"]:  # multiprocessing's server runs so
    os.setpgrp()
