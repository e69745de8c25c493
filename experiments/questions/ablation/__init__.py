# SPDX-License-Identifier: GPL-2.0-or-later
"""What does each step from v2 to v3 bring?

v3 is several things at once: somebody waits for the target's set-up, critical data has a stream of its own, devices
and RAM move at the same time, and N streams read a device. Each can be had without those that come after it, and some
without v3. So the grid takes the steps one at a time, on cases that stress different things, and compares each step
with the one before it, seed by seed.

C1 is decided by the set-up that v3 leaves in the downtime, and by whether v2 with REINIT and a reusable ack leaves as
little. C4 is decided by the part of that set-up which one dirty stream takes out, and by whether what N gains is the
same with reconfigurations and without.
"""

from experiments.questions.ablation.figures import figures
from experiments.questions.ablation.question import answer, points
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="ablation",
    question="What does each step from v2 to v3 bring: REINIT, ack, multifd, a second fd, N fds, a pool?",
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
