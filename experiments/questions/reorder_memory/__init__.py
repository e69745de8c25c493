# SPDX-License-Identifier: GPL-2.0-or-later
"""How much memory does the target need for data that it cannot load yet, and is there a bound?

Two places hold such data: the target VMM (frames that arrived and that no driver took: `peak_reorder_bytes`) and the
target driver (records that are coming in, held back for their epoch, or being loaded: `peak_held_bytes`). v3's rules
bound both, by the settings of the VMMs and of the driver (docs/protocol-v3.md, section 10; sim.theory.memory_bound);
QEMU's multifd has no bound unless one is set. The grid varies the number of streams, the ways to fill the target
(a slow LOAD, critical data that holds dirty data back), credits and the state's size.

C6 is decided by comparing each v3 run, however it ended, with its own bound.
"""

from experiments.questions.reorder_memory.figures import figures
from experiments.questions.reorder_memory.question import answer, points
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="reorder_memory",
    question="How much memory does the target need for data that it cannot load yet, and has it a bound?",
    points=points,
    answer=answer,
    figures=figures,
    values=(("downtime_ns",), ("peak_reorder_bytes",), ("peak_held_bytes",)),
)
