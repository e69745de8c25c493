# SPDX-License-Identifier: GPL-2.0-or-later
"""How often does critical data come too late, after the order to stop the guest, and what does that cost?

Between the moment when a VMM last knew what a device has and the moment when the vCPUs stand still, the guest may
reconfigure the device once more. What the target has to set up then falls into the downtime
(`late_reconfigured_objects`), unless the VMM makes a final check, and gives the migration up (QEMU 11.1's reusable ack)
or takes the stop back (v3's `retry`). The grid has reconfigurations at random, at several rates, which show how often
this happens; and one for sure, 10 ms after the order to stop, of several sizes, which shows what it costs.

C1 is decided by the runs that have late data in their downtime: of v3's policies, and of v2 with a final check.
"""

from experiments.questions.switchover_hazard.figures import figures
from experiments.questions.switchover_hazard.question import answer, points
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="switchover_hazard",
    question="How often does critical data come too late for the stop, by user, ack and policy, and what does it cost?",
    points=points,
    answer=answer,
    figures=figures,
    repeats=60,
)
"""60 repeats: at 8 reconfigurations a second 15 % of migrations are expected to meet one while the vCPUs stop."""
