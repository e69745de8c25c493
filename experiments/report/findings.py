# SPDX-License-Identifier: GPL-2.0-or-later
"""What a comparison shows, in sentences. Every number is computed from the runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from experiments.runs.frame import COMPLETED, completed_runs, ms, number, path_shares, protocols
from experiments.study.statistics import ENOUGH_SEEDS, interval
from experiments.study.summaries import far_over_limit
from sim.scenario.units import NS_PER_MS


def conclusion(runs: pl.DataFrame) -> list[str]:
    """What a comparison shows: the downtimes, shortest first; what did not complete; then the findings."""
    completed = completed_runs(runs)
    if completed.is_empty():
        return ["No run was completed: there is no downtime.", *not_completed(runs)]
    return [_order(completed), *not_completed(runs), *findings(runs)]


def findings(runs: pl.DataFrame) -> list[str]:
    """What the completed runs of a comparison show, in sentences: how protocols differ, what bounds each downtime."""
    completed = completed_runs(runs)
    named = protocols(completed)
    sentences = [_difference(completed, *pair) for pair in pairs(named)]
    sentences += [f"{name}: {far}." for name in named if (far := far_over_limit(completed, name))]
    sentences += [_bound(completed, protocol) for protocol in named]
    if "v2" in named:
        sentences += _overlap(completed)
    if "v2" in named and "v2-multifd" not in named and any(name.startswith("v3") for name in named):
        sentences.append(
            "Limit: v2 here moves RAM, then one device after the other, on one channel. A large part of what v3 gains "
            "may be that all of them move at the same time, which multifd gives v2 as well: compare with v2-multifd."
        )
    return sentences


def pairs(named: Sequence[str]) -> list[tuple[str, str]]:
    """The protocols that are compared, (base, other): each with v2, or else with the first; the first v3 with the last.

    v3 is compared with v2-multifd too, which moves RAM and devices side by side as v3 does.
    """
    base = "v2" if "v2" in named else named[0] if named else ""
    v3 = [name for name in named if name.startswith("v3")]
    found = [(base, other) for other in named if other != base]
    found += [(v3[0], v3[-1])] if len(v3) > 1 else []
    found += [("v2-multifd", other) for other in v3 if "v2-multifd" in named]
    return list(dict.fromkeys(found))


def _order(completed: pl.DataFrame) -> str:
    means = completed.group_by("protocol", maintain_order=True).agg(pl.col("downtime_ns").mean())
    shortest_first = ", ".join(f"{name} {ms(mean):.0f} ms" for name, mean in means.sort("downtime_ns").iter_rows())
    return f"Mean downtime, shortest first: {shortest_first}."


def not_completed(runs: pl.DataFrame) -> list[str]:
    """For each protocol and way to end: how many runs ended so, and the first reason."""
    sentences = []
    for (name,), some in runs.group_by("protocol", maintain_order=True):
        for (outcome,), ended in some.filter(~COMPLETED).group_by("outcome", maintain_order=True):
            lines = str(ended["reason"][0] or "").strip().splitlines()
            why = f": {lines[-1]}" if lines else ""
            sentences.append(f"{name}: {ended.height} of {some.height} run(s) {outcome}{why}")
    return sentences


def _bound(completed: pl.DataFrame, protocol: str) -> str:
    shares = sorted(path_shares(completed, protocol).items(), key=lambda item: -item[1])
    largest = ", ".join(f"{resource.name.lower()} {100 * share:.0f} %" for resource, share in shares if share >= 0.05)
    runs = completed.filter(pl.col("protocol") == protocol)
    mean, paused = ms(runs["downtime_ns"].mean()), ms(runs["retries_stopped_ns"].mean())
    before = f" Before that the guest stood still for {paused:.1f} ms, for stops that were taken back."
    return f"{protocol}: downtime {mean:.0f} ms, bounded by {largest} of the critical path.{before if paused else ''}"


def _overlap(completed: pl.DataFrame) -> list[str]:
    """How far v2's device saves and loads overlap, and what keeps them from overlapping more."""
    runs = completed.filter(pl.col("protocol") == "v2")
    save = [c for c in runs.columns if c.startswith("stage_device_save")]
    load = [c for c in runs.columns if c.startswith("stage_device_load")]
    if not save:
        return []
    saving = ms(sum(number(runs[c].mean()) for c in save))
    loading = ms(sum(number(runs[c].mean()) for c in load))
    elapsed = ms(sum(number(runs[f"phase_{name}_ns"].mean()) for name in ("drain", "transfer", "load")))
    elapsed -= ms(number(runs["stage_ram_save_0_ns"].mean()))
    blocked = ms(number(runs["send_blocked_ns"].mean()))
    busy = ms(number(runs["path_load_ns"].mean()) + number(runs["path_setup_ns"].mean()))
    return [
        f"v2: the devices' saves take {saving:.0f} ms and their loads {loading:.0f} ms, {saving + loading:.0f} ms "
        f"together, but only {elapsed:.0f} ms pass: they overlap, chunk by chunk. What does not overlap bounds the "
        f"downtime: for {busy:.0f} ms the target's one thread is in LOAD and set-up, nobody reads the channel, "
        f"and the source is held up in its sends for {blocked:.0f} ms."
    ]


def _difference(completed: pl.DataFrame, base: str, other: str) -> str:
    """The paired difference of two protocols' downtimes, seed by seed."""
    runs = completed.pivot(on="protocol", index="seed", values="downtime_ns").select(base, other).drop_nulls()
    if runs.is_empty():
        return f"{other} against {base}: no seed completed under both."
    change = (runs[other] - runs[base]) / NS_PER_MS
    relative = number(runs[other].mean()) / number(runs[base].mean()) - 1
    mean = number(change.mean())
    least, most = number(change.min()), number(change.max())
    return (
        f"{other} against {base}, seed by seed: downtime {abs(mean):.1f} ms {'shorter' if mean < 0 else 'longer'} "
        f"({100 * relative:+.1f} %), from {least:+.1f} to {most:+.1f} ms over {len(runs)} seed(s)"
        f"{_interval(change.to_numpy())}."
    )


def _interval(change_ms: NDArray[np.float64]) -> str:
    """The mean's 95 % confidence interval in words, by the bootstrap over seeds; nothing for a handful of them."""
    if len(change_ms) < ENOUGH_SEEDS:
        return ""
    mean = interval(change_ms)
    verdict = ", which has 0 in it: no difference is shown" if 0 in mean else ""
    return f"; 95 % interval of the mean {mean.low:+.1f} to {mean.high:+.1f} ms{verdict}"
