"""Which devices converge, and with which downtime: by the size of their state and the guest's rate of dirtying it.

Pre-copy converges if the device's data is carried faster than it is dirtied, or if the data that is always dirty fits
the downtime limit. The map has v2 and v3 on one machine, whose link carries more than one connection does. Around the
boundary that theory gives (sim.theory.rates), other machines show what moves it: one firmware engine, a link that one
connection fills, a guest with much RAM, writes to few blocks.

C2 and C3 are decided by how far N = 4 moves the boundary of N = 1: with eight engines, as theory says; with one engine,
not at all.
"""

from experiments.questions.state_and_dirty_rate.figures import figures
from experiments.questions.state_and_dirty_rate.question import answer, points
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="state_and_dirty_rate",
    question="Up to which dirty rate does a device of 64 MiB to 64 GiB converge, and with which downtime?",
    claims=("C2", "C3"),
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
