# SPDX-License-Identifier: GPL-2.0-or-later
"""Does a pool of shared connections do as well as a connection for each stream?

The list objected to channels that are reserved for a purpose. v3 has three ways over the wire: a connection a stream
("dedicated"), one pool for all streams, critical frames first, or one connection for everything. The grid compares them
where the wire decides: all of the device's state moves after the stop; firmware and locks are no limit. The critical
lag is measured on another device, which the guest reconfigures while its dirty streams are busy.

C5 is decided twice, for the downtime and for the mean critical lag: the pool is close to dedicated connections at a
place if the ratio to theirs, at the upper end of its interval, is within a tolerance.
"""

from experiments.questions.channels.figures import figures
from experiments.questions.channels.question import answer, points
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="channels",
    question="Does a pool of shared connections, critical frames first, do as well as a connection for each stream?",
    points=points,
    answer=answer,
    figures=figures,
    values=(("downtime_ns",), ("critical_lag_mean_ns",)),
)
