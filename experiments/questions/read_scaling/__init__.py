# SPDX-License-Identifier: GPL-2.0-or-later
"""Does N buy anything? The time to move a stopped device's state against the number of its dirty streams.

One device, all of whose state moves after the stop (`stop-only`): so no pre-copy blurs the measurement. Around a base
point (mlx5's rates, 16 engines, a lock a fd, a link to spare) the grid varies lock, engines, copy rate, link, read size
and the kind of fd. *Stop-copy time* is from the device stopped to its last byte at the target (drain and transfer):
where the link binds, N sockets of 10 MiB take in what is only read, and the drain alone would show a gain that is none.

C2 is decided where by the rates alone (sim.theory.rates) the firmware binds: by the speed-up of N streams over one
against min(N, F). C3 is decided by what the best N takes off under one lock, and with one engine.
"""

from experiments.questions.read_scaling.figures import figures
from experiments.questions.read_scaling.grid import points
from experiments.questions.read_scaling.question import answer
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="read_scaling",
    question="Is read() the bottleneck, and when? How does the time to move a stopped device fall with N?",
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
    values=(("phase_drain_ns", "phase_transfer_ns"),),
)
