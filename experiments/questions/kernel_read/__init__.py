# SPDX-License-Identifier: GPL-2.0-or-later
"""Is read() of a driver in a real kernel what the simulation says, and does it bind?

benchmarks/real_read.py measures it: the project's sample driver in STOP_COPY, read by a thread for each data fd, under
v2 and under v3 with N dirty fds. Locks, copies, wake-ups and the scheduler are the kernel's; firmware is a delay. The
measured table is kept in results/real/read. This question reads it, simulates the same cases, and compares throughput
relative to that of one dirty stream. Where no table is found, it says so and has the simulated part alone.

Firmware binds where a command has a rate, 50 MiB/s; copies bind where it takes no time. C2 is decided where firmware
binds and each fd has a lock of its own, C3 with one engine, and with one lock over the command or over the copy.
"""

from experiments.questions.kernel_read.figures import figures
from experiments.questions.kernel_read.grid import points
from experiments.questions.kernel_read.question import answer
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="kernel_read",
    question="In a real kernel, does read() scale with N as simulated, and is it the bottleneck?",
    points=points,
    answer=answer,
    figures=figures,
    repeats=1,  # nothing in these runs is drawn by chance
    quick_repeats=1,
)
