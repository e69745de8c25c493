# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator from Python: scripts and notebooks import this, and nothing else of the project.

    from experiments import api

    runs = api.compare("mlx5-2vf", ["v2", "v3-n4"], seeds=5)
    print(api.downtimes(runs))

Tables are Polars frames; `.to_pandas()` makes one of pandas (extra `pandas`). A *table of runs* has one row a run, with
the unit at the end of each column's name: `_ns` nanoseconds, `_bytes`. Figures are matplotlib's: `.savefig(FILE)`.
Every mistake of a caller raises `UserError`, whose text says what would be right. All of it also works where an event
loop runs, as in Jupyter.

In the signatures, `Seeds` is a number of seeds, which count up from 1, or the seeds themselves. `Progress` is False
(nothing is shown), True (a bar on stderr), or a function that is called with the number of runs done and the number
of all runs. `Setting` is the value of a parameter: a text, a number, a bool, or a list of texts. `Pairs` is a list of
(base, other), both names of protocols.
"""

from experiments.api.deciding import decide, decision_indices, decision_rows
from experiments.api.fitting import fit, fitted_quantities, real_phases, real_steps, what_would_help
from experiments.api.running import (
    Progress,
    Seeds,
    Setting,
    compare,
    compare_command,
    load,
    parameters,
    questions,
    ranges,
    run,
    samples,
    scenarios,
    sweep,
)
from experiments.decision.decision import Decision
from experiments.draw.decision import draw_decision
from experiments.draw.distribution import draw_distribution
from experiments.draw.downtime import draw_critical, draw_downtime
from experiments.draw.effects import draw_changes, draw_seeds
from experiments.draw.fit import draw_fit
from experiments.draw.screen import shown, whole_tables
from experiments.draw.staircase import draw_path
from experiments.logs.machine import FittedMachine
from experiments.report.answers import claims, kept_answer, kept_figures, kept_runs, results_folder
from experiments.report.findings import findings
from experiments.study.advice import advice
from experiments.study.summaries import (
    above_bound,
    bounds,
    distributions,
    downtimes,
    read_times,
    resource_shares,
    scaling_laws,
)
from experiments.study.verdicts import count_verdicts, readable, seed_by_seed, verdicts
from experiments.trace.traced_run import TracedRun, spans, steps, stretches, write_spans, write_trace
from proto_v3.errors import UserError
from sim.scenario.sample import Sample
from sim.scenario.scenario import Scenario

SECTIONS = {
    "Scenarios": (scenarios, load, parameters, ranges, samples, Sample),
    "Runs": (compare, sweep, run, TracedRun, compare_command),
    "What to change first": (decide, Decision, decision_rows, decision_indices, draw_decision),
    "A machine from its logs": (
        fit,
        FittedMachine,
        fitted_quantities,
        real_phases,
        real_steps,
        what_would_help,
        draw_fit,
    ),
    "One run, step by step": (steps, stretches, spans, write_trace, write_spans),
    "Tables of runs, summed up": (
        downtimes,
        distributions,
        resource_shares,
        bounds,
        above_bound,
        read_times,
        scaling_laws,
    ),
    "Protocols against each other": (seed_by_seed, verdicts, readable, count_verdicts, findings, advice),
    "Figures": (draw_downtime, draw_distribution, draw_critical, draw_path, draw_seeds, draw_changes),
    "Kept results": (questions, kept_runs, kept_answer, kept_figures, claims, results_folder),
    "In a notebook": (whole_tables, shown),
    "Errors": (UserError,),
}
"""What is here, in the order of docs/api.md."""

__all__ = [
    "Decision",
    "FittedMachine",
    "Progress",
    "Sample",
    "Scenario",
    "Seeds",
    "Setting",
    "TracedRun",
    "UserError",
    "above_bound",
    "advice",
    "bounds",
    "claims",
    "compare",
    "compare_command",
    "count_verdicts",
    "decide",
    "decision_indices",
    "decision_rows",
    "distributions",
    "downtimes",
    "draw_changes",
    "draw_critical",
    "draw_decision",
    "draw_distribution",
    "draw_downtime",
    "draw_fit",
    "draw_path",
    "draw_seeds",
    "findings",
    "fit",
    "fitted_quantities",
    "kept_answer",
    "kept_figures",
    "kept_runs",
    "load",
    "parameters",
    "questions",
    "ranges",
    "read_times",
    "readable",
    "real_phases",
    "real_steps",
    "resource_shares",
    "results_folder",
    "run",
    "samples",
    "scaling_laws",
    "scenarios",
    "seed_by_seed",
    "shown",
    "spans",
    "steps",
    "stretches",
    "sweep",
    "verdicts",
    "what_would_help",
    "whole_tables",
    "write_spans",
    "write_trace",
]
