# SPDX-License-Identifier: GPL-2.0-or-later
"""Which parameters do the conclusions depend on, and for which device does v3 bring next to nothing?

Each parameter is moved from low to high while the others stay: a tornado for each conclusion. Two maps, over the
parameters that decide most, show where the gain is less than `WORTH`: for such a device nobody should build v3. The
parameters with their ranges are in grid.py.

C3 is decided by the gain with one engine, and under one lock for all: whether each is shown to be less than `WORTH`.
"""

from experiments.questions.sensitivity.figures import figures
from experiments.questions.sensitivity.grid import points
from experiments.questions.sensitivity.question import answer
from experiments.study.experiment import Experiment

EXPERIMENT = Experiment(
    name="sensitivity",
    question="Which parameters do the conclusions hang on, and for which device does v3 bring less than 5 %?",
    points=points,
    answer=answer,
    figures=figures,
)
