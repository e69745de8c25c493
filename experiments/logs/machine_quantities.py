# SPDX-License-Identifier: GPL-2.0-or-later
"""What the logs tell of the guest's RAM, of the VMM, and of how it decided."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from statistics import median

from experiments.logs.clocks import Clocks
from experiments.logs.cmdline import QemuSettings
from experiments.logs.device_quantities import rereads, setup_size
from experiments.logs.facts import SideFacts
from experiments.logs.pair import Pair
from experiments.logs.quantity import (
    GIB,
    MIB,
    US_PER_MS,
    US_PER_S,
    LogQuantity,
    bounded,
    measured,
    median_ms,
    times_told,
    unknown,
)
from experiments.logs.waterfall import Waterfall, starts, stops
from proto_v3.timeline import Mark
from sim.scenario.scenario import Scenario
from sim.scenario.units import BYTES_PER_S_PER_GBIT, PAGE_BYTES

ZERO_PAGE_BYTES = 9
"""On the wire (QEMU migration/ram.c)."""
NEAR = 0.1
"""So near to max-bandwidth a window was filled by it. Ours."""
ROOM, LEAST_S = 3.0, 2.0
"""How much longer than the real migration a simulated one may take before it is given up. Ours."""


def machine_quantities(
    pair: Pair, clocks: Clocks, fall: Waterfall, settings: QemuSettings, base: Scenario
) -> Iterator[LogQuantity]:
    """All of them."""
    yield from _vcpus(pair, fall)
    if pair.source.traced:
        yield from _ram(pair, settings, base)
        yield from _decision(pair, settings)
        yield from _driver(pair)
    yield from _multifd(pair, settings)
    others = pair.target.loads_us.get("devices")
    if others is not None:
        how = "vmstate_downtime_load of type non-iterable, all but VFIO devices"
        yield measured("vmm.other_load_ms", others / US_PER_MS, how)
    elif pair.target.traced:
        yield unknown("vmm.other_load_ms", "vmstate_downtime_load is not in the target's log")


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


# --- RAM --------------------------------------------------------------------------------------------------------------


def _ram(pair: Pair, settings: QemuSettings, base: Scenario) -> Iterator[LogQuantity]:
    source = pair.source
    size = settings.ram_bytes
    how = "-m"
    if size is None and source.begun and source.first_pending_bytes is not None:
        size = source.first_pending_bytes - source.first_device_pending_bytes
        how = "what was pending when the iterations began, less the devices' part"
    if size is None or size <= 0:
        yield unknown("ram.size_gib", "neither -m (--cmdline) nor the beginning of the log is known")
        return
    yield measured("ram.size_gib", size / GIB, f"{how}, {size} bytes")
    nonzero = yield from _nonzero(pair, settings, size)
    left = _left_bytes(pair)
    scan = yield from _ram_rates(source, settings, size, nonzero, left)
    syncs = [stretch.us for stretch, _ in source.syncs]
    if syncs:
        how = f"migration_bitmap_sync_start to _end before the stop, {times_told(syncs)}"
        yield measured("ram.sync_ms", median_ms(syncs), how)
    if source.final_syncs:
        last = [stretch.us for stretch, _ in source.final_syncs]
        how = f"migration_bitmap_sync_start to _end after the stop, {times_told(last)}"
        yield measured("ram.final_sync_ms", sum(last) / US_PER_MS, how)
    yield from _last_scan(pair, base, left, nonzero, scan)
    yield from _dirty(source, size, base)


def _left_bytes(pair: Pair) -> int:
    """Of RAM, what was left when the guest was stopped."""
    source = pair.source
    if source.final_ram_bytes is not None:
        return source.final_ram_bytes
    sizes = [here.sizes[-1].bytes for here, _ in pair.devices if here.sizes]  # QEMU 10: the figure is of all
    return max(0, source.decided[1] - sum(sizes)) if source.decided and len(sizes) == len(pair.devices) else 0


def _last_scan(pair: Pair, base: Scenario, left: int, nonzero: int | None, scan: float | None) -> Iterator[LogQuantity]:
    """What the last pass takes beside the sync and what was left: pages, and zeros that were not looked at yet."""
    source = pair.source
    whole_us, end_us = source.saves_us.get("ram"), source.moments.get("RAM done")
    if whole_us is None or end_us is None:
        yield unknown("ram.final_scan_ms", "vmstate_downtime_save is not in the source's log")
        return
    inside = [stretch for stretch, _ in source.final_syncs if stretch.begin_us < end_us < stretch.end_us + whole_us]
    most_ms = max(0, whole_us - sum(stretch.us for stretch in inside)) / US_PER_MS
    how = f"vmstate_downtime_save of RAM, {whole_us / US_PER_MS:.3f} ms, less the last sync and the {left} bytes left"
    fastest = max([base.ram.send_bytes_per_s / 1000, *(window.bytes_per_ms for window in source.windows)])
    zeros = max(0, left - nonzero) if nonzero is not None else 0
    left_ms = (left - zeros) / fastest + zeros / (scan or base.ram.scan_bytes_per_s) * 1000
    yield bounded("ram.final_scan_ms", max(0.0, most_ms - left_ms), how, max(0.0, most_ms - left_ms), most_ms)


def _nonzero(pair: Pair, settings: QemuSettings, size: int) -> Generator[LogQuantity, None, int | None]:
    """Yields one quantity; returns the bytes."""
    if settings.normal_bytes is not None:
        most = min(size, settings.normal_bytes)
        how = f"normal-bytes of query-migrate, {settings.normal_bytes}; pages that were sent twice are in it"
        yield bounded("ram.nonzero_gib", most / GIB, how, None, most / GIB)
        return most
    moved = sum(window.bytes for window in pair.source.windows)
    moved -= pair.source.windows[-1].device_bytes if pair.source.windows else 0
    if not pair.source.windows or not pair.source.begun:
        yield unknown("ram.nonzero_gib", "migrate_transferred is not in the source's log from its beginning")
        return None
    # A page of zeros takes 9 bytes: moved = nonzero + (size - nonzero) / page x 9.
    zero_share = ZERO_PAGE_BYTES / PAGE_BYTES
    nonzero = min(size, max(0, round((moved - size * zero_share) / (1 - zero_share))))
    how = f"{max(0, moved)} bytes of migrate_transferred that are no device's; pages that were sent twice are in it"
    yield bounded("ram.nonzero_gib", nonzero / GIB, how, None, nonzero / GIB)
    return nonzero


def _ram_rates(
    source: SideFacts, settings: QemuSettings, size: int, nonzero: int | None, left: int
) -> Generator[LogQuantity, None, float | None]:
    """Yields quantities; returns how fast zeros are found, bytes/s."""
    if not source.windows or nonzero is None or not source.begun:
        return None
    send = max(window.bytes_per_ms for window in source.windows) * 1000
    limit = settings.max_bandwidth_bytes_per_s
    how = "the fastest window of migrate_transferred, RAM and devices together"
    if limit is not None and send > (1 - NEAR) * limit:
        how += f"; max-bandwidth, {limit} bytes/s, held it back"
    if nonzero >= MIB:
        yield bounded("ram.send_gib_per_s", send / GIB, how, send / GIB)
    else:
        yield unknown("ram.send_gib_per_s", f"only {nonzero} bytes of RAM were not zero")
    begin_us = next((at_us for at_us, state in source.statuses if state == "active"), None)
    first = next((stretch.begin_us for stretch, _ in source.syncs if begin_us and stretch.begin_us > begin_us), None)
    if begin_us is None or first is None:
        return None
    scan_s = (first - begin_us) / US_PER_S - (nonzero / send if nonzero >= MIB else 0)
    scanned = size - nonzero - left
    if scan_s <= 0 or scanned < MIB:
        return None
    how = "the first pass, from active to the first sync of RAM, less the time of pages that are not zero"
    yield bounded(
        "ram.scan_gib_per_s", scanned / scan_s / GIB, f"{how}; devices' turns are in it", scanned / scan_s / GIB
    )
    return scanned / scan_s


def _dirty(source: SideFacts, size: int, base: Scenario) -> Iterator[LogQuantity]:
    """By the dirty pages of each sync, which count from the last period of a second."""
    syncs = [*source.syncs, *source.final_syncs]
    if len(syncs) < 2:
        yield unknown("ram.dirty_mib_per_s", "there were no two syncs of RAM (migration_bitmap_sync_end)")
        return
    pages, span_us = 0, syncs[-1][0].end_us - syncs[0][0].end_us
    for (_, before), (_, now) in itertools.pairwise(syncs):
        pages += now - before if now >= before else now
    rate = pages * PAGE_BYTES / max(1, span_us) * US_PER_S / MIB
    how = f"dirty_pages of migration_bitmap_sync_end, {pages} in {span_us / US_PER_S:.3g} s"
    yield measured("ram.dirty_mib_per_s", rate, how)
    most = max(dirty for _, dirty in syncs) * PAGE_BYTES / MIB
    if most > base.ram.working_set_mib or size / MIB < base.ram.working_set_mib:
        value = min(size / MIB, max(most, PAGE_BYTES / MIB))
        yield bounded("ram.working_set_mib", value, "the most dirty pages of one sync", value, size / MIB)


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
        yield measured("vmm.give_up_s", round(max(LEAST_S, ROOM * lasted_s), 1), how)


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
    state = pair.source.multifd or pair.target.multifd
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
