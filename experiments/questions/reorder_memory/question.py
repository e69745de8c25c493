"""What the runs of reorder_memory say: does each bound hold, how tight is it, and what does it cost?"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from experiments.questions.reorder_memory.grid import (
    LOAD_MIB_PER_S,
    MANY,
    ONE_READER,
    PEAKS,
    PLACE,
    SHARED,
    UNBOUNDED,
    WIRE_NAMES,
    of_kind,
    with_bounds,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.claims import Finding
from experiments.study.effects import NOT_BOTH, effect_row, incomplete, places, sentence, table
from experiments.study.experiment import Answer
from experiments.study.statistics import Effect, effect, interval
from sim.scenario.units import MIB


def answer(frame: pl.DataFrame) -> Answer:
    """Does the bound hold, how tight is it, and what does multifd take instead?"""
    bounded = with_bounds(frame)
    return Answer(
        _in_short(bounded),
        "The numbers count what VMM and driver hold, without frames' headers: not what sockets' buffers hold, which "
        "dedicated connections depend on (the table's column sockets_mib), nor allocators' overhead. One device; its "
        "streams are uneven only by few blocks or few hot ones, for the model has no parameter for it. Multifd's peak "
        "is without the packet that is being written, v3's is with it; QEMU can set a limit by size, here none is set.",
        [
            *_growth(bounded),
            *_tightness(bounded),
            *_price(bounded),
            *_uneven(bounded),
            *_sockets(bounded),
            *_images(bounded),
            *(
                f"{at['protocol']}, {at['part']}, set-up of {at['setup_us']} us: {ends}."
                for at, ends in incomplete(frame, ["part", "setup_us", "protocol"])
            ),
        ],
        [_c6(bounded)],
        table(_rows(bounded)),
    )


def _in_short(frame: pl.DataFrame) -> str:
    state, runs = frame.filter(part="state"), _v3(frame)
    largest = number(state["state_mib"].max() or 0)
    found = effect(state.filter(state_mib=largest), "peak_reorder_bytes", UNBOUNDED, SHARED)
    most = f"at most {max(_most(runs).values()):.3f} of its bound" if runs.height else "unknown"
    in_any = f" in any of {runs.height} v3 runs, completed or not" if runs.height else ""
    return (
        f"What waits at the target is {most}{in_any}; with {largest:.0f} MiB of state and a slow LOAD, {SHARED}'s VMM "
        f"holds against multifd's {found.text('MiB', MIB) if found else NOT_BOTH}."
    )


def _v3(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("vmm_bound_bytes").is_not_null())


def _most(runs: pl.DataFrame) -> dict[str, float]:
    """The largest peak over its bound, by bound."""
    return {name: number(runs[f"{name}_of_bound"].max()) for name in PEAKS}


def _c6(frame: pl.DataFrame) -> Finding:
    """Supported if no v3 run, however it ended, held more than its bound."""
    runs = _v3(frame)
    if not runs.height:
        return Finding("C6", "under conditions", "no v3 run was made: nothing shows a bound.")
    over, most = runs.filter((pl.col("vmm_of_bound") > 1) | (pl.col("driver_of_bound") > 1)), _most(runs)
    why = (
        f"the largest measured peak over its bound is {most['vmm']:.3f} for the target VMM and {most['driver']:.3f} "
        f"for the driver, over {runs.height} v3 runs, completed or not; {over.height} were beyond it"
    )
    if over.height:
        row = over.row(0, named=True)
        why += f", the first {row['protocol']} in {row['part']}, seed {row['seed']}"
    why += ". The VMM's bound is of frames and credits alone"  # the state's size is in the driver's only
    whole = runs.filter(image="whole")
    if whole.height:
        part = number((whole["driver_bound_bytes"] / (whole["state_mib"] * MIB)).max())
        why += (
            f"; the driver's is {part:.2f} of the state, all that comes before the stop, where images are saved whole"
        )
    return Finding("C6", "refuted" if over.height else "supported", f"{why}.")


def _peak(runs: pl.DataFrame, name: str = "vmm") -> str:
    return interval(_peaks_mib(runs, name)).text("MiB")


def _peaks_mib(runs: pl.DataFrame, name: str) -> list[float]:
    return (runs[PEAKS[name]] / MIB).to_list()


def _growth(frame: pl.DataFrame) -> Iterator[str]:
    """Peak by size of state, of multifd and of v3."""
    for protocol in (UNBOUNDED, ONE_READER, f"v3-n{MANY}"):
        runs = frame.filter(COMPLETED, part="state", protocol=protocol)
        sizes = sorted(runs["state_mib"].unique())
        if len(sizes) > 1:
            least, most = (_peak(runs.filter(state_mib=size)) for size in (sizes[0], sizes[-1]))
            yield (
                f"{protocol}, LOAD of {LOAD_MIB_PER_S} MiB/s: the VMM's peak is {least} at {sizes[0]} MiB of state and "
                f"{most} at {sizes[-1]} MiB."
            )
    for at, runs in places(frame.filter(COMPLETED, part="load rate"), ["load_mib_per_s", "protocol"]):
        yield f"{at['protocol']}, LOAD of {at['load_mib_per_s']} MiB/s: {_peak(runs)}."


def _tightness(frame: pl.DataFrame) -> Iterator[str]:
    """How near to their bounds runs come, by way over the wire."""
    for wire, name in (*WIRE_NAMES.items(), ("blocks", "addressable blocks")):
        runs = of_kind(_v3(frame), wire)
        parts = [
            f"{of} {number(part.max()):.2f} at most, {number(part.median()):.2f} in the median"
            for of in PEAKS
            if len(part := runs[f"{of}_of_bound"])
        ]
        yield from sentence(f"Of the bound, {name}: ", parts)


def _price(frame: pl.DataFrame) -> Iterator[str]:
    """What less memory costs in downtime."""
    for cost in _credit_effects(frame):
        yield f"Dirty credit of {cost.other} against {cost.base} (pool): {cost.text('ms', 1e6)}."
    state = frame.filter(part="state")
    largest = state.filter(pl.col("state_mib") == state["state_mib"].max())
    if same := effect(largest, "downtime_ns", UNBOUNDED, ONE_READER):
        yield f"Downtime of {ONE_READER}, bounded, against {UNBOUNDED}, not bounded: {same.text('ms', 1e6)}."


def _credit_effects(frame: pl.DataFrame) -> list[Effect]:
    """The pool's downtime by its credit against that of the largest credit; credits are paired as protocols are."""
    runs = frame.filter(part="credits", protocol=SHARED)
    labelled = runs.with_columns(protocol=pl.format("{} MiB", pl.col("dirty_credit_mib")))
    labels = list(labelled.sort("dirty_credit_mib")["protocol"].unique(maintain_order=True))
    found = [effect(labelled, "downtime_ns", labels[-1], label) for label in labels[:-1]]
    return [each for each in found if each is not None]


def _uneven(frame: pl.DataFrame) -> Iterator[str]:
    """Do uneven streams need more than even ones? In the VMM by the writes, in the driver by the blocks."""
    for part, name, what in (("hot", "vmm", "hot writes to"), ("uneven", "driver", "all blocks in")):
        of_part = frame.filter(part=part, protocol=SHARED)
        peaks = [f"{_peak(runs, name)} with {at['busy_streams']}" for at, runs in places(of_part, ["busy_streams"])]
        by_seed = of_part.group_by("seed").agg(pl.col(PEAKS[name]).n_unique() == 1)
        equal = part == "hot" and len(peaks) > 1 and by_seed[PEAKS[name]].all()
        why = " (equal seed by seed: it is the first image's, which all streams share)" if equal else ""
        start = f"{SHARED}, {what} this number of streams of {MANY}, the {name}'s peak: "
        yield from sentence(start, peaks, f"{why}.", ", ")


def _sockets(frame: pl.DataFrame) -> Iterator[str]:
    """What the connections' buffers may hold besides: of both hosts, so at the target no more than that."""
    for wire, name in WIRE_NAMES.items():
        runs = of_kind(_v3(frame.filter(part="streams")), wire)
        if runs.height:
            least, most = (number(some) / MIB for some in (runs["sockets_bytes"].min(), runs["sockets_bytes"].max()))
            few, many = (number(some) for some in (runs["streams"].min(), runs["streams"].max()))
            yield (
                f"Besides, sockets of both hosts may hold {least:.0f} MiB with N = {few:.0f} and {most:.0f} MiB with "
                f"N = {many:.0f} ({name})."
            )


def _images(frame: pl.DataFrame) -> Iterator[str]:
    """What the driver holds of a whole image before the stop, and of chunks."""
    for at, runs in places(frame.filter(part="image"), ["image", "protocol"]):
        bound = number(runs["driver_bound_bytes"].max() or 0) / MIB
        held = _peak(runs, "driver")
        yield f"{at['protocol']}, image {at['image']}: the driver holds {held}, bound {bound:.1f} MiB."


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, object]]:
    """Each place and protocol: peaks with intervals, over all runs however they ended, beside their bounds; and the
    downtime against a connection a stream, where the place has it."""
    for at, runs in places(frame, [*PLACE, "protocol"]):
        row = at | {"runs": runs.height, "completed": runs.filter(COMPLETED).height}
        for name in PEAKS:
            peaks = _peaks_mib(runs, name)
            peak, limit = interval(peaks), runs[f"{name}_bound_bytes"].max()
            row |= {f"{name}_peak_{part}_mib": getattr(peak, part) for part in ("mean", "low", "high")}
            row[f"{name}_peak_most_mib"] = max(peaks)
            row[f"{name}_bound_mib"] = None if limit is None else number(limit) / MIB
            row[f"{name}_of_bound_most"] = runs[f"{name}_of_bound"].max()
        sockets = runs["sockets_bytes"].max()
        row["sockets_mib"] = None if sockets is None else number(sockets) / MIB
        base, other = f"v3-n{at['streams']}", at["protocol"]
        here = frame.filter(**{name: at[name] for name in PLACE})
        found = effect(here, "downtime_ns", base, other) if other != base else None
        yield row | effect_row(found, base, other)
