# SPDX-License-Identifier: GPL-2.0-or-later
"""What the logs tell of the VMM, of how it decided, and of what all devices share."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from experiments.logs.clocks import Clocks
from experiments.logs.cmdline import QemuSettings
from experiments.logs.device_quantities import rereads, setup_size
from experiments.logs.facts import starts, stops
from experiments.logs.pair import Pair
from experiments.logs.quantity import (
    GIB,
    MIB,
    US_PER_MS,
    US_PER_S,
    LogQuantity,
    assumed,
    measured,
    unknown,
)
from experiments.logs.ram_quantities import ram_quantities
from experiments.logs.waterfall import Waterfall
from proto_v3.timeline import Mark
from sim.scenario.scenario import Scenario
from sim.scenario.units import BYTES_PER_S_PER_GBIT

ROOM, LEAST_S = 3.0, 2.0
"""How much longer than the real migration a simulated one may take before it is given up. Ours."""


def machine_quantities(
    pair: Pair, clocks: Clocks, fall: Waterfall, settings: QemuSettings, base: Scenario
) -> Iterator[LogQuantity]:
    """All of them."""
    yield from _vcpus(pair, fall)
    if pair.source.traced:
        yield from ram_quantities(pair, settings, base)
        yield from _decision(pair, settings)
        yield from _driver(pair)
    else:
        yield from _told(settings)
    yield from _multifd(pair, settings)
    others = pair.target.loads_us.get("devices")
    if others is not None:
        how = "vmstate_downtime_load of type non-iterable, all but VFIO devices"
        yield measured("vmm.other_load_ms", others / US_PER_MS, how)
    elif pair.target.traced:
        yield unknown("vmm.other_load_ms", "vmstate_downtime_load is not in the target's log")


def _told(settings: QemuSettings) -> Iterator[LogQuantity]:
    """What QEMU was told, where no trace event shows it."""
    if settings.ram_bytes is not None:
        yield measured("ram.size_gib", settings.ram_bytes / GIB, "-m (--cmdline)")
    if settings.downtime_limit_ms:
        yield measured("vmm.downtime_limit_ms", float(settings.downtime_limit_ms), "downtime-limit (--cmdline)")
    if settings.switchover_ack:
        kind = "reusable" if settings.new_machine else "one_shot"
        yield measured("vmm.reinit", settings.new_machine, "the machine type (--cmdline)")
        yield measured("vmm.switchover_ack", kind, "capability switchover-ack, and the machine type (--cmdline)")


def _vcpus(pair: Pair, fall: Waterfall) -> Iterator[LogQuantity]:
    source = pair.source
    steps = [step for here, _ in pair.devices for step in stops(here)]
    begins = [step.begin_us for step in steps if step.begin_us is not None]
    start_us, stopped_us = source.marks.get("src-downtime-start"), source.marks.get("src-vm-stopped")
    if start_us is not None and stopped_us is not None and begins:
        last_us = max(source.moments.get("last vmstate change", 0), max(step.end_us for step in steps))
        before_us, after_us = max(0, min(begins) - start_us), max(0, stopped_us - min(last_us, stopped_us))
        how = (
            f"src-downtime-start to the first vfio_migration_set_state, {before_us / US_PER_MS:.3f} ms, and the last "
            f"vfio_vmstate_change to src-vm-stopped, {after_us / US_PER_MS:.3f} ms"
        )
        yield measured("vmm.vcpu_stop_ms", (before_us + after_us) / US_PER_MS, how)
    else:
        yield unknown("vmm.vcpu_stop_ms", "vmstate_downtime_checkpoint is not in the source's log")
    done_ms, runs_ms = fall.marks_ms.get(Mark.CONFIGURED), fall.marks_ms.get(Mark.RESUMED)
    times_us = [each.end_us - (each.begin_us or each.end_us) for _, there in pair.devices for each in starts(there)]
    if done_ms is not None and runs_ms is not None and "dst-precopy-bh-vm-started" in pair.target.marks:
        how = "from the last device's config to dst-precopy-bh-vm-started, less the devices' own steps to RUNNING"
        yield measured("vmm.vcpu_start_ms", max(0.0, runs_ms - done_ms - sum(times_us) / US_PER_MS), how)
    else:
        yield unknown("vmm.vcpu_start_ms", "vmstate_downtime_checkpoint is not in the target's log")
    if source.begun:
        begin_us = source.statuses[0][0]
        active = next((at_us for at_us, state in source.statuses if state == "active"), None)
        if active is not None:
            yield measured("vmm.setup_ms", (active - begin_us) / US_PER_MS, "migrate_set_state, setup to active")


# --- the decision -----------------------------------------------------------------------------------------------------


def _decision(pair: Pair, settings: QemuSettings) -> Iterator[LogQuantity]:
    source = pair.source
    last = source.windows[-1] if source.windows else None
    by_window = last.bytes_per_ms if last is not None else 0.0
    given = 0.0
    if settings.given_bandwidth_bytes_per_s is not None:
        given = settings.given_bandwidth_bytes_per_s / 1000
        how = "avail-switchover-bandwidth (--cmdline)"
    elif (
        last is not None and last.given_bytes_per_ms and abs(last.given_bytes_per_ms - by_window) > 1 + 0.01 * by_window
    ):
        given = last.given_bytes_per_ms
        how = "switchover_bw of migrate_transferred, which is not what was measured"
    if given:
        yield measured("vmm.bandwidth_gbit_per_s", given * 1000 / BYTES_PER_S_PER_GBIT, how)
    limits = [
        window.threshold_bytes / (given or window.bytes_per_ms)
        for window in source.windows
        if window.threshold_bytes > 1000 and window.bytes
    ]
    if settings.downtime_limit_ms is not None:
        limit = float(settings.downtime_limit_ms)
        yield measured("vmm.downtime_limit_ms", max(1e-6, limit), "downtime-limit (--cmdline)")
    elif limits:
        how = "max_size of migrate_transferred by its bandwidth"
        yield measured("vmm.downtime_limit_ms", float(round(median(limits))) or 1.0, how)
    else:
        yield unknown("vmm.downtime_limit_ms", "neither downtime-limit (--cmdline) nor migrate_transferred is known")
    told = [here.info_v2 for here, _ in pair.devices if here.info_v2 is not None]
    info_v2 = any(told)
    if told:
        yield measured("vmm.reinit", info_v2, "precopy_info_v2_used of vfio_migration_init")
    if source.ack_kind != "off":
        legacy = source.ack_kind == "one_shot" or "legacy ack" in source.moments
        kind = "reusable" if not legacy and info_v2 else "one_shot"
        how = "source_return_path_thread_switchover_acked"
        yield measured("vmm.switchover_ack", kind, f"{how}, {len(source.acks_us)} of them")
    if source.begun:
        lasted_s = (source.statuses[-1][0] - source.statuses[0][0]) / US_PER_S
        how = f"the migration took {lasted_s:.1f} s; {ROOM:g} times that, and {LEAST_S:g} s at least"
        yield assumed("vmm.give_up_s", round(max(LEAST_S, ROOM * lasted_s), 1), how)


def _driver(pair: Pair) -> Iterator[LogQuantity]:
    """Keys that all devices share, by the first one that tells."""
    both = [each for each in pair.devices if each[0].precopy_blocks]
    if not both:
        return
    devices = [here for here, _ in both]
    first = devices[0].reports[0] if devices[0].reports else None
    if first is not None and first.at_us <= (devices[0].setup_us or 0) and first.initial_bytes + first.dirty_bytes:
        told = f"{first.initial_bytes} of {first.initial_bytes + first.dirty_bytes} bytes are initial"
        initial = "critical" if first.dirty_bytes else "image"
        yield measured("driver.initial", initial, f"the first vfio_query_precopy_size: {told}")
    again = any(rereads(*each) for each in both)
    how = "STOP_COPY gives all of the state again" if again else "STOP_COPY gives what is left"
    yield measured("driver.precopy", "reread" if again else "incremental", f"vfio_save_block: {how}")
    size, left = setup_size(devices[0]), devices[0].sizes[-1].bytes if len(devices[0].sizes) > 1 else None
    if size and left is not None and devices[0].drained_us is not None:
        full = left >= 0.9 * size
        told = f"{left} bytes after all was read, {size} at set-up"
        yield measured("driver.stop_copy_size", "full" if full else "left", f"vfio_query_stop_copy_size: {told}")


def _multifd(pair: Pair, settings: QemuSettings) -> Iterator[LogQuantity]:
    state = pair.source.multifd or pair.target.multifd or (not pair.traced and settings.multifd_transfer is True)
    if not state and not settings.multifd:
        if pair.traced:
            yield measured(
                "vmm.multifd", False, "devices' data came on the main channel; no thread of multifd saved it"
            )
        return
    yield measured("vmm.multifd", True, "load threads of multifd" if state else "capability multifd (--cmdline)")
    yield measured("vmm.multifd_device_state", state, "vfio_load_state_device_buffer_*" if state else "no load threads")
    if settings.channels is not None:
        yield measured("vmm.multifd_channels", settings.channels, "multifd-channels (--cmdline)")
    else:
        yield unknown("vmm.multifd_channels", "the logs do not show their number; --cmdline does")
    if settings.max_queued_bytes is not None and state:
        most = settings.max_queued_bytes / MIB
        if most > 0:
            yield measured("vmm.multifd_max_queued_mib", most, "x-migration-max-queued-buffers-size (--cmdline)")
