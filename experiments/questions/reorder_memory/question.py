"""How much memory does the target need for data that it cannot load yet, and is there a bound?

Two places hold it: the target VMM (frames that came and that no driver took: `peak_reorder_bytes`) and the target
driver (records that are coming in, held back for their epoch, or being loaded: `peak_held_bytes`). v3's rules bound
both, by what the VMMs and the driver are set to (docs/protocol-v3.md, section 10); QEMU's multifd has no bound unless
one is set. Each run is held against its own bound.
"""

from __future__ import annotations

import polars as pl

from experiments.questions.reorder_memory.figures import figures
from experiments.questions.reorder_memory.grid import (
    BOUNDS,
    LOAD_MIB_PER_S,
    MANY,
    ONE_READER,
    PEAKS,
    PLACE,
    SHARED,
    UNBOUNDED,
    WIRE_NAMES,
    of_kind,
    points,
    with_bounds,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import NOT_BOTH, Answer, Experiment, Finding, effect_row, kinds_told, places
from experiments.study.statistics import Effect, effect, interval
from sim.scenario.units import MIB


def answer(frame: pl.DataFrame) -> Answer:
    """Does the bound hold, how tight is it, and what does multifd take instead?"""
    told = with_bounds(frame)
    return Answer(
        _in_short(told),
        "Counted is what VMM and driver hold, frames' headers left out: not what the sockets' buffers hold, which "
        "dedicated connections lean on (the table's column sockets_mib), nor allocators' overhead. One device; its "
        "streams are uneven only by few blocks or few hot ones, for the model has no parameter for it. Multifd's peak "
        "is without the packet that is being written, v3's is with it; QEMU can set a limit by size, here none is set.",
        [
            *_growth(told),
            *_tightness(told),
            *_price(told),
            *_uneven(told),
            *_sockets(told),
            *_images(told),
            *_outcomes(frame),
        ],
        [_c6(told)],
        table(told),
    )


def _in_short(frame: pl.DataFrame) -> str:
    state = frame.filter(pl.col("part") == "state")
    largest = number(state["state_mib"].max() or 0)
    told = effect(state.filter(pl.col("state_mib") == largest), "peak_reorder_bytes", UNBOUNDED, SHARED)
    most = _most(frame)
    worst = f"at most {most:.3f} of its bound in any of {_v3(frame).height} v3 runs" if most is not None else "unknown"
    against = f"{told.told('MiB', MIB)}" if told else NOT_BOTH
    return (
        f"What waits at the target is {worst}, completed or not; with {largest:.0f} MiB of state and a slow LOAD, "
        f"{SHARED}'s VMM holds against multifd's {against}."
    )


def _v3(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("vmm_bound_bytes").is_not_null())


def _most(frame: pl.DataFrame) -> float | None:
    runs = _v3(frame)
    return max(number(runs[f"{name}_of_bound"].max()) for name in BOUNDS) if runs.height else None


def _c6(frame: pl.DataFrame) -> Finding:
    """Supported if no v3 run, however it ended, held more than its bound."""
    runs = _v3(frame)
    if not runs.height:
        return Finding("C6", "under conditions", "no v3 run was made: nothing shows a bound.")
    over = runs.filter((pl.col("vmm_of_bound") > 1) | (pl.col("driver_of_bound") > 1))
    most = {name: number(runs[f"{name}_of_bound"].max()) for name in BOUNDS}
    why = (
        f"the largest measured peak over its bound is {most['vmm']:.3f} for the target VMM and {most['driver']:.3f} "
        f"for the driver, over {runs.height} v3 runs, completed or not; {over.height} were beyond it"
    )
    if over.height:
        row = over.row(0, named=True)
        why += f", the first {row['protocol']} in {row['part']}, seed {row['seed']}"
    return Finding("C6", "refuted" if over.height else "supported", f"{why}. {_what_bounds(runs)}")


def _what_bounds(runs: pl.DataFrame) -> str:
    """The VMM's bound has the state's size nowhere; the driver's has it where images are saved whole."""
    whole = runs.filter(pl.col("image") == "whole")
    told = "The VMM's bound is of frames and credits alone"
    if whole.height:
        share = number((whole["driver_bound_bytes"] / (whole["state_mib"] * MIB)).max())
        told += (
            f"; the driver's is {share:.2f} of the state, all that comes before the stop, where images are saved whole"
        )
    return f"{told}."


def _growth(frame: pl.DataFrame) -> list[str]:
    """Peak by size of state, of multifd and of v3."""
    told = []
    for protocol in (UNBOUNDED, ONE_READER, f"v3-n{MANY}"):
        runs = frame.filter((pl.col("part") == "state") & (pl.col("protocol") == protocol) & COMPLETED)
        sizes = sorted(runs["state_mib"].unique())
        if len(sizes) < 2:
            continue
        means = [interval(_mib(runs.filter(pl.col("state_mib") == size))) for size in (sizes[0], sizes[-1])]
        told.append(
            f"{protocol}, LOAD of {LOAD_MIB_PER_S} MiB/s: the VMM's peak is {means[0].told('MiB')} at {sizes[0]} MiB "
            f"of state and {means[1].told('MiB')} at {sizes[-1]} MiB."
        )
    for at, runs in places(frame.filter((pl.col("part") == "load rate") & COMPLETED), ["load_mib_per_s", "protocol"]):
        told.append(f"{at['protocol']}, LOAD of {at['load_mib_per_s']} MiB/s: {interval(_mib(runs)).told('MiB')}.")
    return told


def _mib(runs: pl.DataFrame, column: str = "peak_reorder_bytes") -> list[float]:
    return (runs[column] / MIB).to_list()


def _tightness(frame: pl.DataFrame) -> list[str]:
    """How near to their bounds runs come, by way over the wire."""
    told = []
    for wire, name in (*WIRE_NAMES.items(), ("blocks", "addressable blocks")):
        runs = of_kind(_v3(frame), wire)
        if runs.height:
            taken = {of: runs[f"{of}_of_bound"] for of in BOUNDS}
            parts = [
                f"{of} {number(some.max()):.2f} at most, {number(some.median()):.2f} in the median"
                for of, some in taken.items()
            ]
            told.append(f"Of the bound, {name}: {'; '.join(parts)}.")
    return told


def _price(frame: pl.DataFrame) -> list[str]:
    """What less memory costs in downtime."""
    told = []
    for cost in _credit_effects(frame):
        told.append(f"Dirty credit of {cost.other} against {cost.base} (pool): {cost.told('ms', 1e6)}.")
    state = frame.filter(pl.col("part") == "state")
    largest = state.filter(pl.col("state_mib") == state["state_mib"].max())
    same = effect(largest, "downtime_ns", UNBOUNDED, ONE_READER)
    if same:
        told.append(f"Downtime of {ONE_READER}, bounded, against {UNBOUNDED}, not bounded: {same.told('ms', 1e6)}.")
    return told


def _credit_effects(frame: pl.DataFrame) -> list[Effect]:
    """The pool's downtime by its credit, against that of the largest: labelled, to be paired as protocols are."""
    runs = frame.filter((pl.col("part") == "credits") & (pl.col("protocol") == SHARED))
    labelled = runs.with_columns(protocol=pl.format("{} MiB", pl.col("dirty_credit_mib")))
    labels = list(labelled.sort("dirty_credit_mib")["protocol"].unique(maintain_order=True))
    found = [effect(labelled, "downtime_ns", labels[-1], label) for label in labels[:-1]]
    return [told for told in found if told is not None]


def _sockets(frame: pl.DataFrame) -> list[str]:
    """What the connections' buffers may hold besides: of both hosts, so at the target no more than that."""
    told = []
    for wire, name in WIRE_NAMES.items():
        runs = of_kind(_v3(frame.filter(pl.col("part") == "streams")), wire)
        if runs.height:
            least, most = (number(some) / MIB for some in (runs["sockets_bytes"].min(), runs["sockets_bytes"].max()))
            few, many = (number(some) for some in (runs["streams"].min(), runs["streams"].max()))
            told.append(
                f"Besides, sockets of both hosts may hold {least:.0f} MiB with N = {few:.0f} and {most:.0f} MiB with "
                f"N = {many:.0f} ({name})."
            )
    return told


def _uneven(frame: pl.DataFrame) -> list[str]:
    """Whether uneven streams need more than even ones: in the VMM by the writes, in the driver by the blocks."""
    told = []
    for part, name, what in (("hot", "vmm", "hot writes to"), ("uneven", "driver", "all blocks in")):
        of_part = frame.filter((pl.col("part") == part) & (pl.col("protocol") == SHARED))
        peaks = [
            f"{interval(_mib(runs, PEAKS[name])).told('MiB')} with {at['busy_streams']}"
            for at, runs in places(of_part, ["busy_streams"])
        ]
        by_seed = of_part.group_by("seed").agg(pl.col(PEAKS[name]).n_unique() == 1)
        equal = part == "hot" and len(peaks) > 1 and by_seed[PEAKS[name]].all()
        why = " (equal seed by seed: it is the first image's, which all streams share)" if equal else ""
        if peaks:
            told.append(f"{SHARED}, {what} so many streams of {MANY}, the {name}'s peak: {', '.join(peaks)}{why}.")
    return told


def _images(frame: pl.DataFrame) -> list[str]:
    """What the driver holds of a whole image before the stop, and of chunks."""
    told = []
    for at, runs in places(frame.filter(pl.col("part") == "image"), ["image", "protocol"]):
        peak = interval(_mib(runs, "peak_held_bytes"))
        share = number(runs["driver_bound_bytes"].max() or 0) / MIB
        told.append(
            f"{at['protocol']}, image {at['image']}: the driver holds {peak.told('MiB')}, bound {share:.1f} MiB."
        )
    return told


def _outcomes(frame: pl.DataFrame) -> list[str]:
    told = []
    for at, runs in places(frame, ["part", "setup_us", "protocol"]):
        left = runs.filter(~COMPLETED)
        if left.height:
            told.append(
                f"{at['protocol']}, {at['part']}, set-up of {at['setup_us']} us: {kinds_told(left)} of {runs.height}."
            )
    return told


def table(frame: pl.DataFrame) -> pl.DataFrame:
    """Each place and protocol: peaks with intervals, over all runs however they ended, beside their bounds; and the
    downtime against a connection a stream, where the place has it."""
    rows = []
    for at, runs in places(frame, [*PLACE, "protocol"]):
        row = at | {"runs": runs.height, "completed": runs.filter(COMPLETED).height}
        for name in BOUNDS:
            peak = interval(_mib(runs, PEAKS[name]))
            row |= {f"{name}_peak_{part}_mib": getattr(peak, part) for part in ("mean", "low", "high")}
            row[f"{name}_peak_most_mib"] = max(_mib(runs, PEAKS[name]))
            limit = runs[f"{name}_bound_bytes"].max()
            row[f"{name}_bound_mib"] = None if limit is None else number(limit) / MIB
            row[f"{name}_of_bound_most"] = runs[f"{name}_of_bound"].max()
        sockets = runs["sockets_bytes"].max()
        row["sockets_mib"] = None if sockets is None else number(sockets) / MIB
        base = f"v3-n{at['streams']}"
        here = frame.filter(pl.all_horizontal(pl.col(name) == at[name] for name in PLACE))
        told = effect(here, "downtime_ns", base, at["protocol"]) if at["protocol"] != base else None
        row |= effect_row(told, base, at["protocol"], 1e6, "ms")
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


EXPERIMENT = Experiment(
    name="reorder_memory",
    question="How much memory does the target need for data that it cannot load yet, and has it a bound?",
    claims=("C6",),
    points=points,
    answer=answer,
    figures=figures,
)
